"""`log.jsonl` of a run: what its stages logged, line by line, for people and programs that watch it.

Lines are only ever appended. Each has `time` (UTC) and `stage`. Where a stage starts, a line with `event: start` names
the step that it starts after, the freeze report, the data, and what it runs on. After a resume that step may be less
than what an earlier start logged: `report` drops the lines of steps that were trained again (`report/run_facts.py`). A
number that is not finite is text: "nan", "inf".
"""

import json
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_llama31.trainer.errors import naming
from llava_llama31.trainer.fault_tolerance.step_health import Health
from llava_llama31.trainer.recipes.schema import Stage
from llava_llama31.trainer.training.source_losses import nested


class RunLog(TrainerCallback):
    """Appends what a stage logs: loss, learning rates, gradient norm, throughput, meters, findings.

    Args:
        path: of the file.
        name: of the stage.
        stage: for its learning rates.
        health: whose findings are logged once each.
        facts: of the start, for its line.
    """

    def __init__(self, path: Path, name: str, stage: Stage, health: Health, facts: Mapping[str, Any]):
        self.path, self.name, self.health, self.facts = path, name, health, facts
        self._rates = stage.learning_rates()
        self._num_events = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._num_events = len(self.health.events)  # those of an earlier start are in the file
        self._append({"event": "start", "step": state.global_step, "steps": state.max_steps, **self.facts})

    def on_log(  # type: ignore[override]  # Transformers passes `logs` by name
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, float],
        **kwargs: object,
    ) -> None:
        for event in self.health.events[self._num_events :]:
            self._append({"event": "finding", **event})
        self._num_events = len(self.health.events)
        rates: dict[str, Any] = {}
        if "learning_rate" in logs:  # that of the first group; all follow one schedule
            part = logs["learning_rate"] / next(iter(self._rates.values()))
            rates["learning_rates"] = {group: rate * part for group, rate in self._rates.items()}
        self._append({"step": state.global_step, **nested(logs), **rates})

    def _append(self, entry: dict[str, Any]) -> None:
        append_entry(self.path, self.name, entry)


def append_save(path: Path, stage: str, step: int) -> None:
    """Append that a checkpoint is complete; not earlier, for a resume does not know one that a kill cut off."""
    append_entry(path, stage, {"event": "save", "step": step})


def append_entry(path: Path, stage: str, entry: dict[str, Any]) -> None:
    """Append one line to a run's log."""
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    plain = {key: str(value) if _is_odd(value) else value for key, value in entry.items()}
    line = json.dumps({"time": time, "stage": stage, **plain}, allow_nan=False)
    with naming(path), path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        cut = end > 0 and file.read(1) != b"\n"  # a start that was killed as it wrote, or a disk that was full
        file.write(f"{chr(10) * cut}{line}\n".encode())


def _is_odd(value: object) -> bool:
    """Whether JSON has no number for it."""
    return isinstance(value, float) and not math.isfinite(value)
