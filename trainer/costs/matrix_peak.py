"""Measures a device's real matrix throughput, the denominator of MFU, instead of trusting a data sheet."""

import statistics
import time
from collections.abc import Callable

import torch


# (m, k, n): a quick first estimate, squares, and the tall products of a decoder's layers
_SMALL = ((256, 256, 256), (1024, 1024, 1024), (2048, 2048, 2048), (2048, 1024, 4096))
_LARGE = ((1024, 1024, 1024), (4096, 4096, 4096), (8192, 8192, 8192), (8192, 4096, 14336), (16384, 8192, 8192))
_MIN_REPEATS = 3


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
    peak = 0.0
    for m, k, n in chosen:
        share, num_operations = seconds / len(chosen), 2 * m * k * n
        if peak and (1 + _MIN_REPEATS) * num_operations / peak > 2 * share:  # larger products may be twice as fast
            break
        peak = max(peak, num_operations / _seconds_of_product(dtype, device, (m, k, n), share, clock))
    return peak


def _seconds_of_product(
    dtype: torch.dtype, device: torch.device, shape: tuple[int, int, int], share: float, clock: Callable[[], float]
) -> float:
    """Median seconds of one product, repeated for about `share` seconds."""
    m, k, n = shape
    # random numbers: on zeros a GPU draws less power and clocks higher
    left, right = (torch.randn(size, device=device, dtype=dtype) for size in ((m, k), (k, n)))
    output = torch.empty(m, n, device=device, dtype=dtype)

    def measure(count: int) -> float:
        begin = clock()
        for _ in range(count):
            torch.mm(left, right, out=output)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (clock() - begin) / count

    measure(1)  # warm up: choose kernels and touch pages
    first = measure(1)
    # ten readings, or as many as fit; each covers several products, so that the clock's resolution does not matter
    count = max(1, round(share / 10 / max(first, 1e-9)))
    num_readings = max(_MIN_REPEATS - 1, min(10, round(share / max(first * count, 1e-9))))
    return statistics.median([first, *(measure(count) for _ in range(num_readings))])
