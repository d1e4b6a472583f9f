"""Pillow's bicubic filter as numbers: which samples of a line become which, and by what weights.

N samples of a line, K weights of one sample.
"""

import functools

import numpy as np


PRECISION_BITS = 32 - 8 - 2  # of Pillow's weights; their products with 8 bits fit an int32


def turns_rows_first(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Whether Pillow resizes the rows of (height, width) first; the passes do not commute, since each rounds."""
    lost_rows, lost_columns = before[0] - after[0], before[1] - after[1]
    return lost_rows > max(0, 2 * lost_columns)  # Pillow 13 (#9549)


@functools.lru_cache(maxsize=256)
def banded(num_before: int, num_after: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The filter as a matrix of num_before rows and num_after columns: rows, columns and values that are not zero."""
    first, weights = pillow_filter(num_before, num_after)
    rows = first[None] + np.arange(len(weights))[:, None]
    columns = np.broadcast_to(np.arange(num_after), rows.shape)
    kept = weights != 0  # all beyond the line's end are
    return rows[kept], columns[kept], weights[kept] * 2.0**-PRECISION_BITS


@functools.lru_cache(maxsize=256)
def pillow_filter(num_before: int, num_after: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each output sample's inputs begin, int64 (num_after,), and their weights, int32 (K, num_after)."""
    scale = num_before / num_after
    stretch = max(scale, 1.0)
    support = 2.0 * stretch  # of the bicubic filter
    center = (np.arange(num_after) + 0.5) * scale
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    end = np.minimum((center + support + 0.5).astype(np.int64), num_before)
    weights = np.zeros((int((end - first).max()), num_after))
    total = np.zeros(num_after)
    for k, row in enumerate(weights):
        inside = k < end - first
        row[inside] = _bicubic((k + first - center + 0.5) * (1 / stretch))[inside]
        total += row  # one after the other, as Pillow adds them
    weights /= total
    scaled = np.trunc(weights * (1 << PRECISION_BITS) + np.where(weights < 0, -0.5, 0.5))
    return first, scaled.astype(np.int32)


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution with a = -0.5, in the order of operations that Pillow has."""
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
