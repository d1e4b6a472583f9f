"""The model's three module groups, used by freezing, learning rates, reports and adapters."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn
from transformers import LlavaNextForConditionalGeneration

from llava_llama31.trainer.distributed.parameters import num_elements
from llava_llama31.trainer.recipes.schema import ModuleGroup


GROUPS: tuple[str, ...] = get_args(ModuleGroup)


def group_parameters(model: LlavaNextForConditionalGeneration, group: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of a group; the projector includes `image_newline`, the language model the head.

    Raises:
        ValueError: there is no such group.
    """
    inner = model.model
    if group == "vision_tower":
        yield from inner.vision_tower.named_parameters(prefix="model.vision_tower")
    elif group == "multi_modal_projector":
        yield from inner.multi_modal_projector.named_parameters(prefix="model.multi_modal_projector")
        yield "model.image_newline", inner.image_newline
    elif group == "language_model":
        yield from inner.language_model.named_parameters(prefix="model.language_model")
        if model.lm_head.weight is not inner.language_model.embed_tokens.weight:
            yield from model.lm_head.named_parameters(prefix="lm_head")
    else:
        raise ValueError(f"unknown module group {group!r}: one of {', '.join(GROUPS)}")


def lora_target_pattern(targets: Sequence[str]) -> str:
    """Regular expression for PEFT's `target_modules` that matches linear layers of the language model only."""
    return rf"model\.language_model\..*\.({'|'.join(re.escape(target) for target in targets)})"


def adapted_tower_pattern(model: LlavaNextForConditionalGeneration) -> str:
    """The same for all linear layers of the tower, up to the layer that is read: later ones get no gradient.

    Raises:
        ValueError: nothing is known of the layers of such a tower.
    """
    if not _tower_layers(model):
        tower: Any = model.config.vision_config
        raise ValueError(f"the layers of a {tower.model_type} tower are not known")
    layers = _tower_layers(model)[0]
    names = {id(module): name for name, module in model.named_modules()}
    linear = [name for name, module in layers[0].named_modules() if isinstance(module, nn.Linear)]
    used = "|".join(str(number) for number in range(_num_used_layers(model, layers)))
    return rf"{re.escape(names[id(layers)])}\.({used})\.({'|'.join(map(re.escape, linear))})"


ADAPTED_PROJECTOR_PATTERN = r"model\.multi_modal_projector\.linear_[12]"


@dataclass(frozen=True)
class GroupReport:
    """One line of the freeze report; counts are numbers of parameters."""

    group: str
    num_parameters: int
    num_trainable: int
    learning_rate: float | None


def freeze(
    model: LlavaNextForConditionalGeneration,
    learning_rates: Mapping[str, float],
    *,
    freeze_image_newline: bool = False,
) -> list[GroupReport]:
    """Make exactly the groups in `learning_rates` trainable; returns a report on each group.

    The tower's layers after the used one never get a gradient and stay frozen, as DDP requires. A group's adapters are
    trained in place of its weights, and of `image_newline`, which no adapter holds.
    """
    unused = {id(parameter) for parameter in _unused_tower_parameters(model)}
    report = []
    for group in GROUPS:
        total = trainable = 0
        adapted = any(_is_adapter(name) for name, _ in group_parameters(model, group))
        for name, parameter in group_parameters(model, group):
            train = group in learning_rates and id(parameter) not in unused
            if adapted:
                train = train and _is_adapter(name)
            if name == "model.image_newline" and freeze_image_newline:
                train = False
            if parameter.requires_grad != train:  # quantized weights refuse even a no-op
                parameter.requires_grad_(train)
            total += num_elements(parameter)
            trainable += num_elements(parameter) * train
        report.append(GroupReport(group, total, trainable, learning_rates.get(group) if trainable else None))
    return report


def layer_classes(model: LlavaNextForConditionalGeneration) -> list[str]:
    """Names of the classes of a decoder layer and of a tower's layer, which FSDP shards one by one."""
    modules = [model.model.language_model.layers, *_tower_layers(model)[:1]]
    return list(dict.fromkeys(type(layers[0]).__name__ for layers in modules))


def _is_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _tower_layers(model: LlavaNextForConditionalGeneration) -> list[Any]:
    """A known tower's list of layers, then the modules after it, which LLaVA does not read; else nothing."""
    tower: Any = model.model.vision_tower
    vision: Any = model.config.vision_config
    if vision.model_type == "dinov2":
        return [tower.encoder.layer, tower.layernorm]
    if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
        return []
    has_head = vision.model_type == "siglip_vision_model" and tower.use_head
    return [tower.encoder.layers, tower.post_layernorm, *([tower.head] if has_head else [])]


def _num_used_layers(model: LlavaNextForConditionalGeneration, layers: Any) -> int:
    """How many of the tower's layers run before the last output that is read."""
    feature_layer = model.config.vision_feature_layer
    chosen = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    return max(layer if layer >= 0 else len(layers) + 1 + layer for layer in chosen)


def _unused_tower_parameters(model: LlavaNextForConditionalGeneration) -> Iterator[nn.Parameter]:
    found = _tower_layers(model)
    if not found:
        return
    layers, *after = found
    for layer in layers[_num_used_layers(model, layers) :]:
        yield from layer.parameters()
    for module in after:
        yield from module.parameters()
