"""Measures FLOPs, padding, data wait and memory per step."""

import resource
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from llava_llama31.processing import IGNORE_INDEX
from llava_llama31.trainer.costs.flops import ModelShape, Work, needed_flops
from llava_llama31.trainer.costs.matrix_peak import measure_beside_other_work, measure_matrix_peak
from llava_llama31.trainer.distributed.devices import forget_peak, peak_allocated, widest_float


_GIB = 2**30


@dataclass
class Meter:
    """Adds up the micro-batches of this process between two readings.

    Args:
        model: sizes of the model.
        trainable: module groups that are trained.
        image_token_id, pad_token_id: in `input_ids`.
        num_patch_features: of images of these (height, width), without newlines.
        num_tiles: of an image of this (height, width).
        device, dtype: of the matrix products.
        options: `checkpointing` and the ranks of adapters, of `needed_flops`.
        again: times that the peak is measured again, where a step is faster: other work had the device.
    """

    model: ModelShape
    trainable: Collection[str]
    image_token_id: int
    pad_token_id: int
    num_patch_features: Callable[[Sequence[tuple[int, int]]], int]
    num_tiles: Callable[[tuple[int, int]], int]
    device: torch.device
    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)
    again: int = 3

    def __post_init__(self) -> None:
        matrix_peak(self.dtype, self.device)  # now, and not within a step
        self.restart()

    def restart(self) -> None:
        self._since = time.monotonic()
        self._aside = 0.0
        # needed FLOPs, FLOPs with recomputation, positions, those of them that are padding, seconds waited
        self._sums = torch.zeros(5, dtype=torch.float64)
        forget_peak(self.device)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent here is waiting for data."""
        started = time.monotonic()
        yield
        self._sums[4] += time.monotonic() - started

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time spent here is not training: evaluating, saving."""
        started = time.monotonic()
        yield
        self._aside += time.monotonic() - started

    def add(self, batch: dict[str, Any]) -> None:
        """Count a micro-batch that still is on the host."""
        work, num_padding = self._work(batch)
        total = needed_flops(self.model, work, self.trainable, **self.options).total
        counts = (total.needed, total.hardware, batch["input_ids"].numel(), num_padding, 0)
        self._sums += torch.tensor(counts, dtype=torch.float64)

    def _work(self, batch: dict[str, Any]) -> tuple[Work, int]:
        """The work that a micro-batch needs without its padding, and the number of padding positions."""
        ids, labels = batch["input_ids"], batch["labels"]
        num_tiles = num_image_features = 0
        if "image_sizes" in batch:
            sizes = [(int(height), int(width)) for height, width in batch["image_sizes"]]
            num_image_features = self.num_patch_features(sizes)
            # images with cached features need no tower
            num_tiles = len(batch.get("pixel_values", ()))
            num_tiles += sum(self.num_tiles(tuple(pixels.shape[:2])) for pixels in batch.get("pixels", ()))
        if "packing" in batch:
            packing = batch["packing"]
            # padding is a segment of its own, and every sample begins with bos
            if int(ids[0, -sum(packing[-1])]) == self.pad_token_id:
                packing = packing[:-1]
            padding = ids.numel() - sum(map(sum, packing))
            supervised = batch["supervised_positions"]
            work = Work.pruned(packing, supervised, num_tiles=num_tiles, num_image_features=num_image_features)
            return work, padding
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        lengths = mask.sum(dim=1).tolist()
        supervised = ((labels != IGNORE_INDEX)[mask].nonzero()[:, 0] - 1).tolist()
        work = Work.pruned(
            [[length] for length in lengths], supervised, num_tiles=num_tiles, num_image_features=num_image_features
        )
        return work, ids.numel() - sum(lengths)

    def read(self) -> tuple[float, dict[str, float]]:
        """Seconds of training since the last reading, and the meters of all processes together; then restart."""
        seconds = max(time.monotonic() - self._since - self._aside, 1e-9)
        sums, num_devices = self._sums, 1
        if dist.is_available() and dist.is_initialized():
            num_devices = dist.get_world_size()
            sums = sums.to(self.device, widest_float(self.device))
            dist.all_reduce(sums)
        needed, hardware, positions, padding, waited = sums.tolist()
        peak = matrix_peak(self.dtype, self.device) * num_devices
        if needed / seconds > peak and self.again > 0:
            self.again -= 1
            peak = measured_again(self.dtype, self.device) * num_devices
        meters = {
            "padding": round(padding / max(positions, 1), 4),
            "data_wait": round(waited / num_devices / seconds, 4),
            "memory_gib": round(peak_memory(self.device) / _GIB, 2),
            "mfu": round(needed / seconds / peak, 4),
        }
        if hardware > needed:
            meters["hfu"] = round(hardware / seconds / peak, 4)
        self.restart()
        return seconds, meters


def matrix_peak(dtype: torch.dtype, device: torch.device) -> float:
    """`measure_matrix_peak`, once per process and device."""
    key = (dtype, _device(device))
    if key not in _peaks:
        _peaks[key] = measure_matrix_peak(*key)
    return _peaks[key]


def measured_again(dtype: torch.dtype, device: torch.device) -> float:
    """The larger of the known peak and a new reading, which is the known one from now on."""
    key = (dtype, _device(device))
    _peaks[key] = max(matrix_peak(dtype, device), measure_beside_other_work(*key))
    return _peaks[key]


def _device(device: torch.device) -> torch.device:
    # Accelerate calls the one CPU `cpu` or, with several processes, `cpu:0`
    return torch.device("cpu") if device.type == "cpu" else device


_peaks: dict[tuple[torch.dtype, torch.device], float] = {}


def peak_memory(device: torch.device) -> int:
    """Bytes at most allocated on a GPU since the last reading; on a CPU, held by the process at any time."""
    if device.type != "cpu":
        return peak_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
