"""FlashAttention 3 and 4, on the GPUs that run them and where their package is installed.

PyTorch takes another implementation in place of its own for the whole process (torch.nn.attention), so it is taken for
the time of a stage only: what is evaluated later doesn't depend on an optional package.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    list_flash_attention_impls,
    restore_flash_attention_impl,
    sdpa_kernel,
)

from llava_llama31 import LlavaLlama31ForConditionalGeneration
from llava_llama31.packed_llama_llava_llama31 import varlen_fault
from llava_llama31.trainer.distributed.devices import is_first_process, leave_out_cudnn_attention


logger = logging.getLogger(__name__)

# PyTorch's name, the module that it imports, and the major compute capabilities that it accepts; the better one first
_IMPLEMENTATIONS = (("FA3", "flash_attn_interface", (9,)), ("FA4", "flash_attn.cute.interface", (9, 10)))
# tokens of an image that the tower's attention is tried with, and how far off it may be, as a share of the largest
_TRIAL_TOKENS, _TOLERANCE = 77, 2**-5


def installed_implementations(device: torch.device) -> list[str]:
    """Implementations that this PyTorch knows, this GPU runs and this environment has, the better one first."""
    if device.type != "cuda" or torch.version.hip is not None:
        return []
    major, _ = torch.cuda.get_device_capability(device)
    known = list_flash_attention_impls()
    return [name for name, module, majors in _IMPLEMENTATIONS if name in known and major in majors and _has(module)]


@contextmanager
def faster_attention(device: torch.device) -> Iterator[None]:
    """Context with the best installed implementation, or the one that the user has activated already.

    Without cuDNN's, whose gradients are wrong on some GPUs.
    """
    active = None if current_flash_attention_impl() is not None else _activated(device)
    by_cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    leave_out_cudnn_attention()
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(by_cudnn)
        if active is not None and current_flash_attention_impl() == active:
            restore_flash_attention_impl()


def leave_if_faulty(model: LlavaLlama31ForConditionalGeneration, device: torch.device, dtype: torch.dtype) -> None:
    """Return to PyTorch's own kernel, with a warning, where the active implementation is wrong or refuses."""
    active = current_flash_attention_impl()
    if active is None:
        return
    fault = varlen_fault(model.config.text_config, device, dtype)
    vision = model.config.vision_config
    if fault is None:
        heads = vision.num_attention_heads
        fault = _tower_fault(heads, vision.hidden_size // heads, device, dtype)
    if fault is not None:
        restore_flash_attention_impl()
        if is_first_process():
            logger.warning("%s isn't used: %s", active, fault)


def _activated(device: torch.device) -> str | None:
    for name in installed_implementations(device):
        try:
            activate_flash_attention_impl(name)
        except (ImportError, RuntimeError, AttributeError, OSError) as error:  # of packages built for another PyTorch
            if is_first_process():
                logger.warning("%s is installed but can't be used: %s", name, str(error).partition("\n")[0])
        else:
            logger.info("attention by %s", name)
            return name
    return None


def _has(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # its parent is missing
        return False


def _tower_fault(num_heads: int, size: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why scaled dot products without a mask can't be used, forward or backward; None: they can."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, num_heads, _TRIAL_TOKENS, size, generator=generator) for _ in range(3)]
    results = []
    try:
        for exact in (False, True):
            inputs = [x.to(device, dtype).requires_grad_() for x in drawn]
            backends = [SDPBackend.MATH] if exact else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
            with torch.autocast(device.type, enabled=False), sdpa_kernel(backends):
                output = F.scaled_dot_product_attention(inputs[0], inputs[1], inputs[2])
            results.append((output, *torch.autograd.grad(output.float().square().sum(), inputs)))
    except RuntimeError as error:
        return f"the tower's attention: {str(error).partition(chr(10))[0]}"
    for mine, theirs in zip(*results, strict=True):
        difference = ((mine.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()
        if not difference <= _TOLERANCE:  # NaN neither
            return f"the tower's attention is off by {difference:.2g} of the largest number"
    return None
