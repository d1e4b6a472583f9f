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

    The tower's layers after the used one never get a gradient and stay frozen, as DDP requires. Adapters of the
    language model are trained in place of the weights they adapt.
    """
    unused = {id(parameter) for parameter in _unused_tower_parameters(model)}
    adapted = any(_is_adapter(name) for name, _ in group_parameters(model, "language_model"))
    report = []
    for group in GROUPS:
        total = trainable = 0
        for name, parameter in group_parameters(model, group):
            train = group in learning_rates and id(parameter) not in unused
            if group == "language_model" and adapted:
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


def _unused_tower_parameters(model: LlavaNextForConditionalGeneration) -> Iterator[nn.Parameter]:
    found, feature_layer = _tower_layers(model), model.config.vision_feature_layer
    if not found:
        return
    layers, *after = found
    chosen = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    used = max(layer if layer >= 0 else len(layers) + 1 + layer for layer in chosen)
    for layer in layers[used:]:
        yield from layer.parameters()
    for module in after:
        yield from module.parameters()
