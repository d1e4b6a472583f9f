"""Low-rank adapters on the language model (LoRA, DoRA), through PEFT, the same under every engine."""

import math
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from llava_llama31.trainer.engine import gathered
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.module_groups import lora_target_pattern
from llava_llama31.trainer.recipe import Lora


if TYPE_CHECKING:
    from peft import PeftModel


def adapt(model: PreTrainedModel, lora: Lora, *, seed: int, where: str) -> "PeftModel":
    """The model with fresh adapters, whose first values depend on the seed alone.

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
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        target_modules=lora_target_pattern(lora.targets),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    # PEFT's own draw differs where ZeRO-3 partitions the weights as they are made
    chance = torch.Generator().manual_seed(seed)
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            for linear in module.lora_A.values():
                with gathered(linear.weight, changed=True):
                    _draw(linear, chance)
    return adapted


@torch.no_grad()
def _draw(linear: torch.nn.Linear, chance: torch.Generator) -> None:
    # as PEFT and nn.Linear do (He et al., 2015), but on the CPU, so that every device gets the same numbers
    fresh = torch.empty(linear.out_features, linear.in_features)
    torch.nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=chance)
    if linear.weight.numel():
        linear.weight.copy_(fresh)
