"""Fused norms, rotary embeddings and MLP gates of the decoder, by torch.compile: on by themselves where it works.

Eager kernels move 706 of the 1,282 GB of a traced 8B step (docs/speed.md). Only arithmetic between the matrix products
is compiled, so that modules, hooks and parameters stay as every engine, adapter and quantized layer expects them.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch

from llava_llama31 import LlavaLlama31ForConditionalGeneration
from llava_llama31.packed_llama_llava_llama31 import PLAIN, Arithmetic, LlavaLlama31TextModel
from llava_llama31.trainer.distributed.devices import is_first_process
from llava_llama31.trainer.errors import UserError


logger = logging.getLogger(__name__)

# rows of the trials, the second so many that a sum over them is split as in a step, and how far a result may be off as
# a share of its largest number: bfloat16 rounds to a 256th
_TRIAL_ROWS, _TOLERANCE = (48, 3001), 2**-5


def fuse_layers(model: LlavaLlama31ForConditionalGeneration, device: torch.device, *, remakes: bool = False) -> None:
    """Fuse the decoder's arithmetic on a CUDA device where torch.compile works there; else warn once, and don't.

    Args:
        remakes: norms and gated products are computed again in the backward pass instead of kept, fused or not.

    Raises:
        UserError: `remakes` is asked of a model whose rows are not packed.
    """
    language_model = model.model.language_model
    if not isinstance(language_model, LlavaLlama31TextModel):
        if remakes:
            kind = model.config.text_config.model_type
            raise UserError(
                f"selective activation checkpointing is for Llama, and this language model is {kind}",
                where="activation_checkpointing",
                fix="set activation_checkpointing: true",
            )
        return
    if device.type == "cuda":
        fault = fused_fault(language_model, device)
        if fault is None:
            language_model.fuse(torch.compile, remakes=remakes)
            return
        if is_first_process():
            logger.warning("norms, rotary embeddings and MLPs run unfused, which is slower: %s", fault)
    if remakes:
        language_model.fuse(_plain, remakes=True)


def _plain(function: Any) -> Any:
    return function


def fused_fault(
    language_model: LlavaLlama31TextModel, device: torch.device, compiled: Callable[[Any], Any] | None = None
) -> str | None:
    """Why compiled arithmetic can't be used on this device; None: it can. Waits for the device.

    Every function is compiled and compared with its plain form, for two numbers of rows: from the second on the code
    is that for any number, which a stage runs.

    Args:
        compiled: default: torch.compile.
    """
    fused = Arithmetic(*map(compiled or torch.compile, PLAIN))
    for num_rows in _TRIAL_ROWS:
        for name, arguments in _trials(language_model, device, num_rows).items():
            fault = _differs(name, getattr(fused, name), getattr(PLAIN, name), arguments)
            if fault is not None:
                return fault
    return None


def _trials(language_model: LlavaLlama31TextModel, device: torch.device, num_rows: int) -> dict[str, tuple[Any, ...]]:
    """Arguments for each of the functions, in the types of a step: weights and sums of layers may be wider."""
    config = language_model.config
    size = config.head_dim or config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(0)
    exact = language_model.norm.weight.dtype

    def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(1, num_rows, *shape, generator=generator).to(device, dtype)

    x, passed = (drawn(config.hidden_size, dtype=exact) for _ in range(2))
    grad, added = (drawn(config.hidden_size) for _ in range(2))
    gate, up, product = (drawn(config.intermediate_size) for _ in range(3))
    heads, cos, sin = drawn(config.num_attention_heads, size), drawn(size), drawn(size)
    weight, eps, narrow = drawn(config.hidden_size, dtype=exact)[0, 0].clone(), config.rms_norm_eps, torch.bfloat16
    with torch.no_grad():
        scale = PLAIN.norm(x, weight, eps, narrow)[1]
    return {
        "norm": (x, weight, eps, narrow),
        "sum_norm": (x, added, weight, eps, narrow),
        "norm_again": (x, weight, scale, narrow),
        "norm_gradient": (grad, passed, x, weight, scale, True),
        "rotate": (heads, cos, sin),
        "rotate_back": (heads, cos, sin),
        "gated": (gate, up),
        "gated_gradient": (product, gate, up),
    }


@torch.no_grad()
def _differs(
    name: str, fused: Callable[..., Any], plain: Callable[..., Any], arguments: tuple[Any, ...]
) -> str | None:
    """How a compiled function fails, or is off from the plain one."""
    try:
        mine, wanted = fused(*arguments), plain(*arguments)
    except Exception as error:  # compilers and drivers raise what they like, and the stage can do without
        return f"torch.compile does not work here: {str(error).strip().partition(chr(10))[0]}"
    pairs = zip(mine, wanted, strict=True) if isinstance(mine, tuple) else [(mine, wanted)]
    for one, other in pairs:
        off = ((one.float() - other.float()).abs().max() / other.float().abs().max()).item()
        if not off <= _TOLERANCE:  # NaN neither
            return f"compiled {name} is off by {off:.2g} of the largest number"
    return None
