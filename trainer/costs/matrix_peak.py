"""Measures a device's real matrix throughput, the denominator of MFU, instead of trusting a data sheet."""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from llava_llama31.trainer.distributed.devices import wait_for


# (m, k, n): a quick first estimate, squares, and the tall products of a decoder's layers
_SMALL = ((256, 256, 256), (1024, 1024, 1024), (2048, 2048, 2048), (2048, 1024, 4096))
_LARGE = ((1024, 1024, 1024), (4096, 4096, 4096), (8192, 8192, 8192), (8192, 4096, 14336), (16384, 8192, 8192))
_MIN_REPEATS = 3
# (m, k, n) that takes milliseconds even where bfloat16 is emulated, at 2 GFLOP/s
_TINY = ((256, 256, 256),)
# below this share of float32's throughput, the narrower type costs more than it saves
_SLOW = 1 / 4
_INSTRUCTIONS = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX", "bf16": "BF16"}


def measure_matrix_peak(
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    shapes: tuple[tuple[int, int, int], ...] | None = None,
    seconds: float = 0.4,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """FLOP/s of `torch.mm` into an existing output: the best shape's median over the repeats.

    It depends on PyTorch's settings: the number of threads, and TF32 for float32.

    Args:
        shapes: (m, k, n) of the products (m, k) times (k, n), smallest first; default: sizes suited to the device. A
            shape whose minimum repeats would exceed its share of the time is skipped: a CPU without bfloat16
            instructions takes minutes for products that another does in milliseconds.
        seconds: approximate time for all shapes together.
        clock: seconds; `time.process_time` for FLOP per CPU second on a shared machine.
    """
    device = torch.device(device)
    chosen = shapes or (_SMALL if device.type == "cpu" else _LARGE)
    peak = fastest = 0.0
    for m, k, n in chosen:
        share, num_operations = seconds / len(chosen), 2 * m * k * n
        if fastest and (1 + _MIN_REPEATS) * num_operations / fastest > 2 * share:  # larger ones may be twice as fast
            break
        readings = _seconds_of_product(dtype, device, (m, k, n), share, clock)
        peak = max(peak, num_operations / statistics.median(readings))
        # on a busy machine most readings of a small product are those of the scheduler: one that is not tells its size
        fastest = max(fastest, num_operations / min(readings))
    return peak


def measure_beside_other_work(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s where other work may have the device: on a CPU those of one thread by its own clock, times the threads.

    Threads of one product wait for each other, so where one has to share its core, all are slow.
    """
    if device.type != "cpu":
        return measure_matrix_peak(dtype, device)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return num_threads * measure_matrix_peak(dtype, device, clock=time.thread_time)
    finally:
        torch.set_num_threads(num_threads)


def _seconds_of_product(
    dtype: torch.dtype, device: torch.device, shape: tuple[int, int, int], share: float, clock: Callable[[], float]
) -> list[float]:
    """Seconds of one product, several readings in about `share` seconds."""
    m, k, n = shape
    # random numbers: on zeros a GPU draws less power and clocks higher
    left, right = (torch.randn(size, device=device, dtype=dtype) for size in ((m, k), (k, n)))
    output = torch.empty(m, n, device=device, dtype=dtype)

    def measure(count: int) -> float:
        begin = clock()
        for _ in range(count):
            torch.mm(left, right, out=output)
        wait_for(device)
        return (clock() - begin) / count

    measure(1)  # warm up: choose kernels and touch pages
    first = measure(1)
    # ten readings, or as many as fit; each covers several products, so that the clock's resolution does not matter
    count = max(1, round(share / 10 / max(first, 1e-9)))
    num_readings = max(_MIN_REPEATS - 1, min(10, round(share / max(first * count, 1e-9))))
    return [first, *(measure(count) for _ in range(num_readings))]


@dataclass(frozen=True)
class CpuSpeed:
    """FLOP/s of small matrix products on one core of this machine, and the instructions that they are made of."""

    bfloat16: float
    float32: float
    instructions: str

    @property
    def is_slow_in_bfloat16(self) -> bool:
        """Whether bfloat16 products are emulated, on a CPU without instructions for them."""
        has_instructions = any(name in self.instructions.split(", ") for name in _INSTRUCTIONS.values())
        return not has_instructions and self.bfloat16 < _SLOW * self.float32

    def __str__(self) -> str:
        bfloat16, float32 = (f"{peak / 1e9:.0f}" for peak in (self.bfloat16, self.float32))
        return (
            f"on a core of this CPU ({self.instructions}) bfloat16 products reach {bfloat16} GFLOP/s, "
            f"float32 products {float32}"
        )


def measure_cpu_speed() -> CpuSpeed:
    """Measure both types in some tens of milliseconds, per second of CPU time on one core: other work may be there."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        bfloat16, float32 = (
            max(
                measure_matrix_peak(dtype, "cpu", shapes=_TINY, seconds=0.005, clock=time.thread_time)
                for _ in range(3)
            )
            for dtype in (torch.bfloat16, torch.float32)
        )
    finally:
        torch.set_num_threads(num_threads)
    return CpuSpeed(bfloat16, float32, cpu_instructions())


def cpu_instructions() -> str:
    """Architecture, the vector instructions that PyTorch uses, and those for bfloat16, e.g. x86_64, AVX2."""
    vector = torch.backends.cpu.get_cpu_capability()
    found = [platform.machine(), vector]
    if vector not in ("DEFAULT", "AVX2"):
        flags = _cpu_flags()
        found += [name for flag, name in _INSTRUCTIONS.items() if flag in flags]
    return ", ".join(found)


def _cpu_flags() -> set[str]:
    """What Linux says that the first core can do."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    found = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return set(next(found, "").split())
