"""A stage's demands on the machine: low-bit optimizers, compiled layers, activation checkpointing, fp8.

`check_device_options` refuses, before training, what this machine or its packages don't support.
"""

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers.utils import is_torch_tf32_available

from llava_llama31 import LlavaLlama31ForConditionalGeneration
from llava_llama31.trainer.distributed.devices import default_device, uses_cpu, widest_float
from llava_llama31.trainer.distributed.engine import uses_fsdp
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.schema import Recomputed, Stage


# whose type does not declare what is set there
_BACKENDS: Any = torch.backends
# when Transformers gave `gradient_checkpointing_enable` another name
_RENAMED = Version("5.23")
LOW_BIT = "pip install 'llava-llama31[low-bit]'"
# float8 matrix products need widths divisible by this
FLOAT8_MULTIPLE = 16
# the first NVIDIA GPUs with float8 matrix products
_FLOAT8_CAPABILITY = (8, 9)
# AMD's: MI300, MI350 and RDNA 4; a MI250 reports capability 9.0 and has none
_FLOAT8_AMD = ("gfx942", "gfx950", "gfx1200", "gfx1201")


def check_device_options(stage: Stage, where: str) -> None:
    """Refuse options that cannot run on this machine.

    Raises:
        UserError: an option cannot run; names the stage's key and the fix.
    """
    optim = optim_name(stage, where)
    if stage.lora is not None and stage.lora.quantize and find_spec("bitsandbytes") is None:
        raise UserError("needs bitsandbytes", where=f"{where}.lora.quantize", fix=f"run {LOW_BIT}")
    if stage.fp8:
        _check_fp8(where)
    device = default_device()
    if stage.device_tiles and device.type != "cpu" and widest_float(device) != torch.float64:
        what = f"tiles are made in float64, and this device ({device.type}) has none"
        raise UserError(what, where=f"{where}.device_tiles", fix="set device_tiles: false")
    if stage.trainer_args.get("tf32") and not is_torch_tf32_available():
        fix = "remove it"
        raise UserError("needs an NVIDIA GPU, Ampere or newer", where=f"{where}.trainer_args.tf32", fix=fix)
    if stage.compile:
        _check_compiler(f"{where}.compile", "set compile: false")
    elif optim == "adamw_torch_8bit":
        _check_compiler(f"{where}.optimizer", "choose another optimizer: torchao's 8-bit AdamW needs a compiler")


def optim_name(stage: Stage, where: str) -> str:
    """The optimizer's name in TrainingArguments; `adamw_bf16` has none and needs none.

    Raises:
        UserError: no installed package provides it.
    """
    if stage.optimizer != "adamw_8bit":
        return "adamw_torch_fused"
    if find_spec("torchao") is not None:
        return "adamw_torch_8bit"
    if find_spec("bitsandbytes") is not None and not uses_cpu() and not uses_fsdp():
        return "adamw_bnb_8bit"
    needs = (
        "torchao under FSDP" if uses_fsdp() else "torchao, or bitsandbytes and a GPU"
    )  # whose tensors have no shards
    raise UserError(f"adamw_8bit needs {needs}", where=f"{where}.optimizer", fix=f"run {LOW_BIT}")


def _check_compiler(where: str, otherwise: str) -> None:
    device = default_device()
    needed = "a C++ compiler" if device.type == "cpu" else "a C++ compiler and Triton"
    if (fault := compiler_fault(device)) is not None:
        raise UserError(fault, where=where, fix=f"install {needed}, or {otherwise}")


def compiler_fault(device: torch.device) -> str | None:
    """Why torch.compile can't be used for this device; compiles a one-line function to find out what is missing."""
    try:
        torch.compile(_increased)(torch.zeros(8, device=device))
    except Exception as error:  # compilers and drivers raise what they like
        return f"torch.compile does not work here: {str(error).strip().partition(chr(10))[0]}"
    return None


def compiles(device: torch.device) -> bool:
    """Whether arithmetic on this device is compiled by itself: on CUDA devices where that works."""
    return device.type == "cuda" and compiler_fault(device) is None


def _increased(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def _check_fp8(where: str) -> None:
    if default_device().type != "cuda":
        what = f"fp8 needs a GPU, and this stage runs on {default_device().type}"
        raise UserError(what, where=f"{where}.fp8", fix="set fp8: false")
    if torch.version.hip is not None:  # AMD's numbers say nothing of what their GPUs can do
        name = torch.cuda.get_device_properties().gcnArchName.partition(":")[0]
        if name not in _FLOAT8_AMD:
            what = f"fp8 needs one of AMD's {', '.join(_FLOAT8_AMD)}; this GPU is {name}"
            raise UserError(what, where=f"{where}.fp8", fix="set fp8: false")
    elif (capability := torch.cuda.get_device_capability()) < _FLOAT8_CAPABILITY:
        major, minor = capability
        raise UserError(
            f"fp8 needs a GPU of compute capability 8.9 (Ada, Hopper) or newer; this one has {major}.{minor}",
            where=f"{where}.fp8",
            fix="set fp8: false",
        )
    if find_spec("torchao") is None:
        raise UserError("fp8 needs torchao", where=f"{where}.fp8", fix=f"run {LOW_BIT}")


def prepare_cublas(stages: Iterable[Stage]) -> None:
    """Let cuBLAS compute the same bits each time, where a stage is `deterministic`. Call it before any product.

    torch looks at this variable once, at a process's first product on a GPU, and refuses those of a deterministic
    stage if it was not set then: an earlier stage's product, or one of the questions before the first stage.
    """
    if any(stage.deterministic or stage.trainer_args.get("full_determinism") for stage in stages):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def numerical_settings(stage: Stage) -> Iterator[None]:
    """Context with PyTorch's settings for a stage.

    One with `deterministic` computes the same bits each time; an operation that can't fails. One in float32 computes
    in float32: cuDNN's convolutions, the patch embedding, use no TF32 in it. One whose `trainer_args` have `tf32`
    gets what these say, and the next one does not: TrainingArguments would set it once for the whole process.
    """
    before, narrows = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32
    others, tf32 = _BACKENDS.fp32_precision, stage.trainer_args.get("tf32")
    # torch narrows no product of matrices by itself, but a GPU's convolutions
    if stage.precision == "float32" or tf32 is False:
        torch.backends.cudnn.allow_tf32 = False
    if tf32 is not None:
        _BACKENDS.fp32_precision = "tf32" if tf32 else "ieee"
    if stage.deterministic:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        _BACKENDS.fp32_precision = others
        torch.backends.cudnn.allow_tf32 = narrows


def use_float8(model: LlavaLlama31ForConditionalGeneration, *, emulate: bool = False) -> list[str]:
    """Use float8 products in the decoder's linear layers (torchao, one scale per tensor); returns their names.

    Parameters and keys don't change. The last layer is left out: if it runs at supervised positions only, their
    number is not a multiple of 16, which the products of its weight gradients need.

    Args:
        emulate: compute in wider types, on any device; for tests.
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
    model: LlavaLlama31ForConditionalGeneration, trainable: Collection[str], every: Recomputed = 1
) -> None:
    """Recompute every n-th layer of the decoder, and of a trained tower, in the backward pass.

    `selective` concerns the tower only, whose layers are all recomputed; the decoder's are `fuse_layers`' business.
    Layers are counted separately in each of the two. Transformers' own call on the whole model would count the
    tower's and the decoder's layers in one sequence, and checkpoint a frozen tower.
    """
    parts = [] if every == "selective" else [model.model.language_model]
    if "vision_tower" in trainable:
        parts.append(model.model.vision_tower)
    for part in parts:
        number = 1 if every == "selective" else every
        if Version(transformers.__version__) >= _RENAMED:
            part.activation_checkpointing_enable(every_n_layers=number)
        else:
            part.gradient_checkpointing_enable(every_n_layers=number)
    # undo the gradients of frozen embeddings, which only re-entrant checkpointing needs
    model.model.language_model.disable_input_require_grads()
