"""Advises which settings to lower when a device or the host runs out of memory."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llava_llama31.trainer.errors import OutOfMemory
from llava_llama31.trainer.recipes.schema import Stage


# those of CUDA's libraries, of the CUDA and HIP runtimes, of the driver, of NCCL, and of other makers' allocators
_DEVICE_WORDS = (
    "cublas_status_alloc_failed",
    "cusolver_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cudnn_status_internal_error_device_allocation_failed",
    "cuda error: out of memory",
    "cuda driver error: out of memory",
    "hip error: out of memory",
    "cuda failure 2 'out of memory'",
    "cuda failure 'out of memory'",
    "mps backend out of memory",
    "ur_result_error_out_of_device_memory",
    "npu out of memory",
)


@contextmanager
def advising(stage: Stage, where: str) -> Iterator[None]:
    """Context that loads and trains a stage.

    Raises:
        OutOfMemory: a device or the host ran out; names the keys to lower.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        on_device = is_of_device(error)
        if not on_device and not _is_hosts(error):
            raise
        what = f"the {'device' if on_device else 'host'} is out of memory: {str(error).partition(chr(10))[0]}"
        raise OutOfMemory(what, where=where, fix=_advice(stage, on_device)) from error


def is_of_device(error: BaseException) -> bool:
    """Whether a device ran out of memory, in the words of torch's allocator or of a library that has its own."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in message for words in _DEVICE_WORDS)


def _is_hosts(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch's host allocator raises a plain RuntimeError
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def _advice(stage: Stage, on_device: bool) -> str:
    lower = []
    if stage.micro_batch > 1:
        lower.append(f"lower micro_batch (now {stage.micro_batch})")
    if stage.packing:
        lower.append(f"lower max_row_tokens (now {stage.max_row_tokens or 'none'})")
    if not stage.recomputed and stage.packing and not stage.compile:
        lower.append("set activation_checkpointing: selective, or true")
    elif stage.recomputed != 1:
        lower.append("set activation_checkpointing: true")
    if on_device:
        if stage.optimizer == "adamw" and stage.deepspeed is None:
            lower.append("set optimizer: adamw_8bit")
        lower.append("shard the weights across more devices (deepspeed: zero3)")
    elif stage.dataloader_workers:
        lower.append(f"lower dataloader_workers (now {stage.dataloader_workers})")
    return ", ".join(lower)
