"""The device that this process computes on, of whatever make, and what the machine has besides."""

import ctypes
import os
import platform
from pathlib import Path

import psutil
import torch
from accelerate.utils.memory import clear_device_cache

from llava_llama31.trainer.distributed.gpu_architectures import is_built_for
from llava_llama31.trainer.errors import UserError


# accelerate's own variable, which `accelerate launch --cpu` sets
_CPU_VARIABLE = "ACCELERATE_USE_CPU"
_DRIVERS_GPUS, _DEVICES = Path("/proc/driver/nvidia/gpus"), Path("/dev")
# glibc's M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD: tensors lie in its heap, which does not shrink and grows by 64 MiB
_KEEPING = {-4: 0, -1: 2**31 - 1, -2: 64 * 2**20}


def ask_for_cpu() -> None:
    """Compute on the CPU from here on, in this process and those it starts, whatever else the machine has."""
    os.environ[_CPU_VARIABLE] = "true"


def uses_cpu() -> bool:
    """Whether this process computes on the CPU: it was asked to, or torch has no accelerator."""
    return is_asked_for_cpu() or not torch.accelerator.is_available()


def default_device() -> torch.device:
    """Where this process computes: the current accelerator or the CPU."""
    found = None if uses_cpu() else torch.accelerator.current_accelerator()
    return found or torch.device("cpu")


def num_installed_gpus() -> int:
    """NVIDIA GPUs that the driver knows or that this container was given, whether or not torch can use them."""
    nodes = [path for path in _DEVICES.glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit()]
    return max(len(list(_DRIVERS_GPUS.glob("*"))), len(nodes))


def refuse_unused_gpus() -> None:
    """Refuse to compute on the CPU by mistake.

    Raises:
        UserError: the machine has GPUs, torch can't use them, and nobody asked for the CPU.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "?").strip() in ("", "-1")
    number = num_installed_gpus()
    if number and uses_cpu() and not is_asked_for_cpu() and not hidden:
        raise UserError(
            f"this machine has {number} NVIDIA GPU(s), but torch {torch.__version__} can't use them, and the CPU is "
            "hundreds of times slower",
            fix="see what `llava-llama31 doctor` finds, or choose the CPU: train --cpu, evaluate --device cpu",
        )


def refuse_unbuilt_gpu(device: torch.device) -> None:
    """Refuse a GPU for which this torch has no kernels: its first one would fail.

    Raises:
        UserError: naming the GPU and what torch is built for.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return
    (major, minor), built = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if built and not is_built_for((major, minor), built):
        raise UserError(
            f"torch {torch.__version__} has no kernels for {device_name(device)}, capability {major}.{minor}: it is "
            f"built for {', '.join(built)}",
            fix="install a torch build that lists it, by the selector on pytorch.org, or choose the CPU: train --cpu, "
            "evaluate --device cpu",
        )


def is_first_process() -> bool:
    """Whether this process speaks for all of a launch: the first one, or the only one."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def widest_float(device: torch.device) -> torch.dtype:
    """The type for sums on a device; Apple's GPUs and some of Intel's have no float64."""
    if device.type == "xpu":
        return torch.float64 if torch.xpu.get_device_properties(device).has_fp64 else torch.float32
    return torch.float32 if device.type == "mps" else torch.float64


def device_name(device: torch.device) -> str:
    """A GPU's model, e.g. NVIDIA H100 80GB HBM3; the type of any other device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.xpu.get_device_name(device) if device.type == "xpu" else device.type


def total_memory(device: torch.device) -> int:
    """Bytes of a device; on Apple silicon and a CPU those of the host, which they share."""
    if device.type in ("cpu", "mps"):
        return psutil.virtual_memory().total
    return torch.accelerator.get_memory_info(device)[1]


def peak_allocated(device: torch.device) -> int:
    """Bytes at most allocated on an accelerator since `forget_peak`; on Apple silicon, which keeps no peak, now."""
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return torch.accelerator.max_memory_allocated(device)


def forget_peak(device: torch.device) -> None:
    """Reset the measured peak."""
    if device.type not in ("cpu", "mps"):
        torch.accelerator.reset_peak_memory_stats(device)


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def keep_freed_memory() -> None:
    """Let glibc keep the memory that tensors on the CPU give back, for the next ones.

    Otherwise it returns most of it to the system, and each page of a new tensor costs a fault: a sixth of the time of
    a vision tower. For the whole process; without effect on another C library. Source: mallopt(3).
    """
    if platform.libc_ver()[0] == "glibc":
        set_option = ctypes.CDLL(None).mallopt
        for option, value in _KEEPING.items():
            set_option(option, value)


def leave_out_cudnn_attention() -> None:
    """Compute no scaled dot products by cuDNN, for the whole process.

    On Hopper and Blackwell PyTorch prefers it since 2.11. Its gradients may be NaN where rows have a mask, and on a
    B200 generated tokens were wrong (pytorch #196678, #193893); PyTorch's other kernels are right, and about as fast.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def release_cached_memory() -> None:
    """Give back to the device what torch's allocator keeps."""
    if not uses_cpu():
        clear_device_cache()


def random_state(device: torch.device) -> torch.Tensor:
    """State of the device's own random numbers."""
    return torch.get_device_module(device).get_rng_state()


def set_random_state(device: torch.device, state: torch.Tensor) -> None:
    """Undo `random_state`."""
    torch.get_device_module(device).set_rng_state(state)


def is_asked_for_cpu() -> bool:
    """Whether this process was asked to compute on the CPU, whatever else the machine has."""
    return os.environ.get(_CPU_VARIABLE, "false").lower() in ("1", "true", "yes", "on")
