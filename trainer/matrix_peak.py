"""What a device's matrix unit really does: the denominator of MFU, measured and not taken from a data sheet."""

import statistics
import time
from collections.abc import Callable

import torch


# (m, k, n): squares, and the tall products of a decoder's layers
_SMALL = ((1024, 1024, 1024), (2048, 2048, 2048), (2048, 1024, 4096))
_LARGE = ((4096, 4096, 4096), (8192, 8192, 8192), (8192, 4096, 14336), (16384, 8192, 8192))


def measure_matrix_peak(
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    shapes: tuple[tuple[int, int, int], ...] | None = None,
    num_repeats: int = 7,
    seconds_per_repeat: float = 0.05,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """FLOP/s of `torch.mm` into an output that is there: the best shape's median over the repeats.

    As PyTorch is set: the number of its threads, and TF32 for float32, count.

    Args:
        shapes: (m, k, n) of the products (m, k) times (k, n); by default as large as the device likes them.
        seconds_per_repeat: products are repeated to fill it.
        clock: seconds; `time.process_time` for FLOP per CPU second on a shared machine.
    """
    device = torch.device(device)
    chosen = shapes or (_SMALL if device.type == "cpu" else _LARGE)
    return max(_speed(dtype, device, shape, num_repeats, seconds_per_repeat, clock) for shape in chosen)


def _speed(
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, int, int],
    num_repeats: int,
    seconds: float,
    clock: Callable[[], float],
) -> float:
    m, k, n = shape
    # numbers that are not all alike: a GPU draws less power, and clocks higher, on zeros
    left, right = (torch.randn(size, device=device, dtype=dtype) for size in ((m, k), (k, n)))
    output = torch.empty(m, n, device=device, dtype=dtype)

    def measure(count: int) -> float:
        begin = clock()
        for _ in range(count):
            torch.mm(left, right, out=output)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (clock() - begin) / count

    measure(2)  # kernels are chosen and pages touched
    count = max(1, round(seconds / max(measure(1), 1e-9)))
    return 2 * m * k * n / statistics.median(measure(count) for _ in range(num_repeats))
