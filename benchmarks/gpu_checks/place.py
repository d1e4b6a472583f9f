"""Where checks run, and how they find, fail and measure."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peak_memory import PeakMemory

from llava_llama31.trainer.distributed.devices import forget_peak, peak_allocated, wait_for


Detail = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where checks run; `small` is for a CPU."""

    device: torch.device
    small: bool

    @property
    def half_types(self) -> tuple[torch.dtype, ...]:
        return () if self.device.type == "cpu" else (torch.bfloat16, torch.float16)


class Failed(Exception):
    """A check's finding."""


class NotHere(Exception):
    """Why a check can't be made on this device."""


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Failed(otherwise)


def milliseconds(run: Callable[[], Any], place: Place) -> float:
    readings = []
    for _ in range(3):
        wait_for(place.device)
        started = time.perf_counter()
        run()
        wait_for(place.device)
        readings.append(time.perf_counter() - started)
    return round(statistics.median(readings) * 1e3, 3)


@contextmanager
def held_at_most(place: Place) -> Iterator[list[int]]:
    """Context; the list then has the bytes that tensors held at most, beyond those before. On a CPU the host's too."""
    found: list[int] = []
    if place.device.type == "cpu":
        with PeakMemory(fake=False) as memory:
            # a view of what was there is nothing new
            memory.watch([x for x in gc.get_objects() if isinstance(x, torch.Tensor)])
            memory.restart()
            before = memory.now
            yield found
        found.append(memory.peak - before)
        return
    wait_for(place.device)
    forget_peak(place.device)
    before = torch.accelerator.memory_allocated(place.device)
    yield found
    wait_for(place.device)
    found.append(peak_allocated(place.device) - before)
