"""What a stage asks of the machine: low-bit optimizers, compiled layers, activation checkpointing, fp8.

`check_device_options` refuses before training what this machine or its packages can't do.
"""

from collections.abc import Collection
from importlib.util import find_spec

import torch
from torch import nn

from llava_llama31 import LlavaLlama31ForConditionalGeneration
from llava_llama31.trainer.distributed.engine import uses_fsdp
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.schema import Stage


LOW_BIT = "pip install 'llava-llama31[low-bit]'"
# float8 matrix products need widths that this divides
FLOAT8_MULTIPLE = 16
# the first NVIDIA GPUs with float8 matrix products
_FLOAT8_CAPABILITY = (8, 9)


def check_device_options(stage: Stage, where: str) -> None:
    """Refuse what cannot run here.

    Raises:
        UserError: naming the stage's key and what to do.
    """
    asked = {"optimizer": stage.optimizer != "adamw", "compile": stage.compile, "fp8": stage.fp8}
    for key in (key for key, is_asked in asked.items() if is_asked):
        if uses_fsdp():
            raise UserError(
                "not under FSDP, where nothing shows that it is right", where=f"{where}.{key}", fix=f"remove {key}"
            )
    optim = optim_name(stage, where)
    if stage.lora is not None and stage.lora.quantize and find_spec("bitsandbytes") is None:
        raise UserError("needs bitsandbytes", where=f"{where}.lora.quantize", fix=f"run {LOW_BIT}")
    if stage.fp8:
        _check_fp8(where)
    if stage.compile:
        _check_compiler(f"{where}.compile", "set compile: false")
    elif optim == "adamw_torch_8bit":
        _check_compiler(f"{where}.optimizer", "choose another optimizer: torchao's 8-bit AdamW is compiled")


def optim_name(stage: Stage, where: str) -> str:
    """The stage's optimizer as TrainingArguments calls it; `adamw_bf16` has no name there and no need of one.

    Raises:
        UserError: no package is there for it.
    """
    if stage.optimizer != "adamw_8bit":
        return "adamw_torch_fused"
    if find_spec("torchao") is not None:
        return "adamw_torch_8bit"
    if find_spec("bitsandbytes") is not None and torch.cuda.is_available():
        return "adamw_bnb_8bit"
    raise UserError(
        "adamw_8bit needs torchao, or bitsandbytes and a GPU", where=f"{where}.optimizer", fix=f"run {LOW_BIT}"
    )


def _check_compiler(where: str, otherwise: str) -> None:
    """Compile a function of one line: what is missing shows, whatever it is."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.compile(_increased)(torch.zeros(8, device=device))
    except (RuntimeError, OSError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"torch.compile does not work here: {reason}", where=where, fix=f"install a C++ compiler, or {otherwise}"
        ) from error


def _increased(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def _check_fp8(where: str) -> None:
    if not torch.cuda.is_available():
        raise UserError("fp8 needs a GPU, and none is here", where=f"{where}.fp8", fix="set fp8: false")
    capability = torch.cuda.get_device_capability()
    if capability < _FLOAT8_CAPABILITY:
        major, minor = capability
        raise UserError(
            f"fp8 needs a GPU of compute capability 8.9 (Ada, Hopper) or newer, this one has {major}.{minor}",
            where=f"{where}.fp8",
            fix="set fp8: false",
        )
    if find_spec("torchao") is None:
        raise UserError("fp8 needs torchao", where=f"{where}.fp8", fix=f"run {LOW_BIT}")


def use_float8(model: LlavaLlama31ForConditionalGeneration, *, emulate: bool = False) -> list[str]:
    """Give the decoder's linear layers float8 products (torchao, one scale a tensor); returns their names.

    Parameters and keys stay what they are. The last layer stays out: where it runs at supervised positions alone,
    their number is not a multiple of 16, as the products of its weights' gradients want it.

    Args:
        emulate: in wider types, on any device: for tests.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    converted: list[str] = []
    for number, layer in enumerate(model.model.language_model.layers[:-1]):

        def fits(module: nn.Module, name: str, number: int = number) -> bool:
            fit = isinstance(module, nn.Linear) and not any(size % FLOAT8_MULTIPLE for size in module.weight.shape)
            if fit:
                converted.append(f"layers.{number}.{name}")
            return fit

        convert_to_float8_training(layer, module_filter_fn=fits, config=Float8LinearConfig(emulate=emulate))
    return converted


def checkpoint_activations(
    model: LlavaLlama31ForConditionalGeneration, trainable: Collection[str], every: int = 1
) -> None:
    """Let every so manieth layer of the decoder, and of a tower that is trained, be recomputed on the way back.

    Layers are counted in each of the two from its first. Transformers' own call on the whole model would count the
    tower's and the decoder's layers as one row, and checkpoint a frozen tower.
    """
    parts = [model.model.language_model]
    if "vision_tower" in trainable:
        parts.append(model.model.vision_tower)
    for part in parts:
        part.activation_checkpointing_enable(every_n_layers=every)
    # that made frozen embeddings ask for gradients, which only re-entrant checkpointing needs
    model.model.language_model.disable_input_require_grads()
