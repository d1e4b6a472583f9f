"""A meter for any subclass of Transformers' Trainer, the same for all compared; imports nothing of the project.

Per step it records the clock, the CPU seconds of the process and all its children, and the loss; per run the memory.
"""

import ctypes
import functools
import gc
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback


IGNORE_INDEX = -100
PROFILED_STEPS = 3
PROFILED_ROWS = 40


def cpu_seconds() -> float:
    """User and system time of this process, of its ended children and of its living descendants."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    living = sum(_ticks(child) for child in _descendants(os.getpid())) / os.sysconf("SC_CLK_TCK")
    return time.process_time() + ended.ru_utime + ended.ru_stime + living


def _descendants(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *_descendants(child)]
    return found


def _ticks(process: int) -> int:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:  # it has ended in the meantime
        return 0
    return sum(int(ticks) for ticks in fields[11:15])  # user and system, own and of ended children


def memory(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` the peak since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def return_freed_memory() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class Meter(TrainerCallback):
    """Records what a Trainer does and writes it when training ends.

    Args:
        trainer: any subclass of Transformers' Trainer.
        result: JSON file.
        note_order: also write which rows our trainer used at which step.
        profile: file for torch.profiler's table of three steps, if wanted.
        profile_from: the step before these three.
    """

    def __init__(self, trainer: Any, result: Path, *, note_order: bool, profile: Path | None, profile_from: int):
        self.trainer, self.result, self.note_order = trainer, result, note_order
        self.profile, self.profile_from = profile, profile_from
        self.profiler: Any = None
        self.record: dict[str, Any] = {"wall": [], "cpu": [], "losses": [], "tokens": 0, "supervised_tokens": 0}

    def counting(self, collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The collator, with a count of its positions (including padding) and supervised tokens."""

        def collate_and_count(rows: Any) -> Any:
            batch = collate(rows)
            self.record["tokens"] += batch["input_ids"].numel()
            self.record["supervised_tokens"] += int((batch["labels"] != IGNORE_INDEX).sum())
            return batch

        return collate_and_count

    def on_train_begin(self, args, state, control, **kwargs):
        if self.note_order:
            self.record["order"] = self.order(state.max_steps)
        return_freed_memory()
        forget_peak()
        self.note_time()

    def order(self, num_steps: int) -> list[list[int]]:
        order = self.trainer.batches.order
        steps: list[Any] = []
        while len(steps) < num_steps:
            steps += order.batches(len(steps) // order.steps_per_epoch)
        return [batch.tolist() for batch in steps[:num_steps]]

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps - 1:  # not among the timed steps
            self.note_memory()
        if self.profile is not None and state.global_step == self.profile_from:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self.profiler.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.note_time()
        if self.profiler is not None and state.global_step == self.profile_from + PROFILED_STEPS:
            self.profiler.stop()
            averages = self.profiler.key_averages()
            table = averages.table("self_cpu_time_total", row_limit=PROFILED_ROWS, max_name_column_width=60)
            self.profile.write_text(f"{PROFILED_STEPS} optimizer steps\n{table}\n")
            self.profiler = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.record["losses"].append(float(logs["loss"]))

    def on_train_end(self, args, state, control, **kwargs):
        self.result.write_text(json.dumps(self.record))

    def note_time(self) -> None:
        self.record["wall"].append(time.monotonic())
        self.record["cpu"].append(cpu_seconds())

    def note_memory(self) -> None:
        trained = [p for p in self.trainer.model.parameters() if p.requires_grad]
        self.record["peak"] = memory("VmHWM")
        return_freed_memory()
        # between two steps: the program, weights and optimizer state
        self.record["resident"] = memory("VmRSS")
        self.record["gradients"] = sum(p.numel() * p.element_size() for p in trained)
        self.record["trained"] = sum(p.numel() for p in trained)


def attach(result: Path, **options: Any) -> None:
    """Give every Trainer that this process makes from now on a Meter with these options."""
    original = Trainer.__init__

    @functools.wraps(original)  # ms-swift looks at the signature
    def make(trainer: Any, *args: Any, **kwargs: Any) -> None:
        original(trainer, *args, **kwargs)
        meter = Meter(trainer, result, **options)
        trainer.data_collator = meter.counting(trainer.data_collator)
        trainer.add_callback(meter)

    Trainer.__init__ = make  # type: ignore[method-assign, assignment]
