"""Low-rank adapters by module group (LoRA, DoRA) through PEFT, identical under every engine."""

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, cast

import torch
from transformers import BitsAndBytesConfig, LlavaNextForConditionalGeneration, PreTrainedModel

from llava_llama31.trainer.distributed.parameters import gathered
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.model.module_groups import (
    ADAPTED_PROJECTOR_PATTERN,
    adapted_tower_pattern,
    lora_target_pattern,
)
from llava_llama31.trainer.recipes.schema import Lora, LoraGroup


if TYPE_CHECKING:
    from peft import PeftModel


TRAINABLE_WEIGHTS = "trainable.safetensors"


def adapt(
    model: PreTrainedModel,
    lora: Lora,
    *,
    seed: int,
    where: str,
    groups: Collection[str] = ("language_model",),
) -> "PeftModel":
    """Add fresh adapters, whose initial values depend only on the seed.

    Args:
        groups: those that get adapters, each with its own rank: `Stage.adapted`.

    Raises:
        UserError: PEFT is not installed, or nothing is known of the tower's layers.
    """
    try:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer
    except ImportError:
        raise UserError("lora needs peft", where=f"{where}.lora", fix="pip install 'llava-llama31[peft]'") from None
    try:
        patterns = _patterns(cast(LlavaNextForConditionalGeneration, model), lora, groups)
    except ValueError as error:
        where = f"{where}.lora.vision_tower"
        raise UserError(str(error), where=where, fix="remove it, or take a CLIP, SigLIP or DINOv2 tower") from error
    own = {patterns[group]: settings for group, settings in _group_settings(lora).items() if group in patterns}
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides by r: a float is as good
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        target_modules="|".join(patterns.values()),
        rank_pattern={pattern: settings.r for pattern, settings in own.items()},
        alpha_pattern={pattern: settings.alpha for pattern, settings in own.items()},
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    # PEFT's own draw differs under ZeRO-3, which shards weights as they are created
    generator = torch.Generator().manual_seed(seed)
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            for linear in module.lora_A.values():
                assert isinstance(linear, torch.nn.Linear)
                with gathered(cast(torch.nn.Parameter, linear.weight), changed=True):
                    _draw(linear, generator)
    return adapted


def _group_settings(lora: Lora) -> dict[str, LoraGroup]:
    named = {"vision_tower": lora.vision_tower, "multi_modal_projector": lora.multi_modal_projector}
    return {group: settings for group, settings in named.items() if settings is not None}


def _patterns(model: LlavaNextForConditionalGeneration, lora: Lora, groups: Collection[str]) -> dict[str, str]:
    """Regular expression of each group's adapted layers."""
    patterns = {}
    if "language_model" in groups:
        patterns["language_model"] = lora_target_pattern(lora.targets)
    if "vision_tower" in groups:
        patterns["vision_tower"] = adapted_tower_pattern(model)
    if "multi_modal_projector" in groups:
        patterns["multi_modal_projector"] = ADAPTED_PROJECTOR_PATTERN
    return patterns


def quantization(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's storage (Dettmers et al., 2023): the decoder's linear layers in NF4 with double quantization."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    )


@torch.no_grad()
def take_dequantized(model: torch.nn.Module, quantized: torch.nn.Module) -> None:
    """Copy a quantized model's dequantized weights into a plain adapted model: its adapters were trained on them."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    plain = dict(model.named_parameters())
    for name, parameter in quantized.named_parameters():
        if isinstance(parameter, Params4bit):
            plain[name].copy_(dequantize_4bit(parameter.data, parameter.quant_state))


@torch.no_grad()
def _draw(linear: torch.nn.Linear, generator: torch.Generator) -> None:
    # like PEFT and nn.Linear (He et al., 2015), but on the CPU, so that every device gets the same values
    fresh = torch.empty(linear.out_features, linear.in_features)
    torch.nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
    if linear.weight.numel():
        linear.weight.copy_(fresh)
