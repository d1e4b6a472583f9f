"""Low-rank adapters on the language model (LoRA, DoRA) through PEFT, identical under every engine."""

import math
from typing import TYPE_CHECKING, cast

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from llava_llama31.trainer.distributed.parameters import gathered
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.model.module_groups import lora_target_pattern
from llava_llama31.trainer.recipes.schema import Lora


if TYPE_CHECKING:
    from peft import PeftModel


TRAINABLE_WEIGHTS = "trainable.safetensors"


def adapt(model: PreTrainedModel, lora: Lora, *, seed: int, where: str) -> "PeftModel":
    """Add fresh adapters, whose initial values depend only on the seed.

    Raises:
        UserError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer
    except ImportError:
        raise UserError("lora needs peft", where=f"{where}.lora", fix="pip install 'llava-llama31[peft]'") from None
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides by r: a float is as good
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        target_modules=lora_target_pattern(lora.targets),
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
