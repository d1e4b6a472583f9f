"""Prepares a stage's model: loads it from its origin, adds adapters, freezes groups, sets the device options."""

import logging
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from llava_llama31 import LlavaLlama31ForConditionalGeneration
from llava_llama31.packed_llama_llava_llama31 import LlavaLlama31TextModel
from llava_llama31.trainer.distributed.engine import uses_fsdp
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.model.adapters import adapt, quantization
from llava_llama31.trainer.model.device_options import checkpoint_activations, use_float8
from llava_llama31.trainer.model.flash_attention import leave_if_faulty
from llava_llama31.trainer.model.fused_layers import fuse_layers
from llava_llama31.trainer.model.module_groups import GroupReport, freeze, group_parameters
from llava_llama31.trainer.recipes.schema import Stage


logger = logging.getLogger(__name__)

# the type that weights are loaded in
_DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "bfloat16-weights": torch.bfloat16}


def product_dtype(stage: Stage) -> torch.dtype:
    """The type of the stage's matrix products, and so of its tiles."""
    return torch.float32 if stage.precision == "float32" else torch.bfloat16


def load_stage_model(origin: Path, stage: Stage, *, seed: int, where: str, quantized: bool = False) -> PreTrainedModel:
    """Load the origin's model, with fresh adapters if the stage has any; `quantized` if these ask for it.

    Raises:
        UserError: the origin can't be loaded, or lacks weights.
    """
    dtype, lora = _DTYPES[stage.precision], stage.lora
    options: dict[str, Any] = {}
    if quantized and lora is not None and lora.quantize:
        options = {"quantization_config": quantization(product_dtype(stage))}
    try:
        loaded: Any = LlavaLlama31ForConditionalGeneration.from_pretrained(
            origin, dtype=dtype, output_loading_info=True, packable=True, **options
        )
        model, info = loaded
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"cannot be loaded: {reason}", where=str(origin), fix="make or download it again") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"lacks {len(missing)} weights, the first {missing[0]}", where=str(origin), fix="make it again"
        )
    if lora is None:
        return model
    # PeftModel forwards what PreTrainedModel has
    return cast(PreTrainedModel, adapt(model, lora, seed=seed, where=where, groups=stage.adapted))


def base_model(model: PreTrainedModel, stage: Stage) -> LlavaLlama31ForConditionalGeneration:
    """The model without PEFT's wrapper."""
    return cast(Any, model) if stage.lora is None else cast(Any, model).get_base_model()


def freeze_groups(model: PreTrainedModel, stage: Stage) -> list[GroupReport]:
    """Freeze all but the stage's trained groups; frozen weights become bfloat16 if the stage computes in it."""
    report = freeze(
        base_model(model, stage),
        stage.learning_rates(),
        freeze_image_newline="frozen_image_newline" in stage.quirks,
    )
    if stage.precision != "bfloat16" or stage.deepspeed is not None or uses_fsdp():  # these manage dtypes themselves
        return report
    for line in report:
        # whole groups only: a layer with weights of two types would not run; adapters have their own type
        if line.num_trainable == 0 or line.group in stage.adapted:
            parameters = (parameter for _, parameter in group_parameters(base_model(model, stage), line.group))
            _narrow([p for p in parameters if p.is_floating_point() and not p.requires_grad])
    return report


def _narrow(parameters: list[torch.nn.Parameter]) -> None:
    """Convert parameters to bfloat16, if that is exact for all of them."""
    if all(_fits_bfloat16(parameter) for parameter in parameters):
        for parameter in parameters:
            parameter.data = parameter.data.to(torch.bfloat16)


def check_attention(model: LlavaLlama31ForConditionalGeneration, stage: Stage, device: torch.device) -> None:
    """Try a GPU's attention kernels before the first step, so that a warning about them comes at the stage's start."""
    language_model = model.model.language_model
    if stage.packing and isinstance(language_model, LlavaLlama31TextModel):
        leave_if_faulty(model, device, product_dtype(stage))
        language_model.check_attention(device, product_dtype(stage))


def use_device_options(
    model: LlavaLlama31ForConditionalGeneration, stage: Stage, device: torch.device | None = None
) -> None:
    """What the stage asks of its device (default: the CPU), and fused arithmetic where the device has it.

    Raises:
        UserError: the model has no layers of the kind that the stage asks for.
    """
    if stage.fp8:
        logger.info("float8 products in %d linear layers", len(use_float8(model)))
    if stage.compile:
        model.model.language_model.compile_token_wise()
    elif stage.packing:
        fuse_layers(model, device or torch.device("cpu"), remakes=stage.recomputed == "selective")
    if stage.recomputed:
        checkpoint_activations(model, stage.trainable, stage.recomputed)


def _fits_bfloat16(parameter: torch.nn.Parameter) -> bool:
    return torch.equal(parameter.data.to(torch.bfloat16).to(parameter.dtype), parameter.data)
