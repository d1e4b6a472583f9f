"""What a run's folder says of the run, whether it has finished, is training or was stopped."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.checkpoint.run_folder import STAGE_RECORD, RunFolder, StageFolder
from llava_llama31.trainer.errors import UserError


Entry = dict[str, Any]


def entries(path: Path) -> list[Entry]:
    """What a run's log says, each step once: lines of steps that a resumed stage trained again are dropped.

    A line that a kill cut is dropped too: the resumed stage wrote it again.
    """
    kept: list[Entry] = []
    for entry in _parsed(path.read_text(encoding="utf-8").splitlines()):
        if entry.get("event") == "start":
            stage, step = entry["stage"], entry["step"]
            kept = [former for former in kept if former["stage"] != stage or former["step"] <= step]
        kept.append(entry)
    return kept


def _parsed(lines: Sequence[str]) -> list[Entry]:
    """The objects of lines of JSON without those that are none."""
    try:
        return json.loads(f"[{','.join(lines)}]")  # twice as fast as line by line
    except ValueError:
        pass
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


@dataclass(frozen=True)
class StageFacts:
    """One stage of a run.

    Args:
        folder: of the stage.
        steps: that it has in all; 0 before it starts.
        logged: lines of its log with figures, in the order of steps.
        events: the other lines.
        record: what it wrote down at its end, or None.
    """

    name: str
    folder: StageFolder
    steps: int
    logged: Sequence[Entry]
    events: Sequence[Entry]
    record: Mapping[str, Any] | None

    @property
    def step(self) -> int:
        """The last one that was logged."""
        return max((entry["step"] for entry in self.logged), default=0)

    @property
    def seconds(self) -> float:
        """Seconds of training until the last log, over all starts."""
        return max((entry["seconds"] for entry in self.logged if "seconds" in entry), default=0.0)

    @property
    def seconds_left(self) -> float | None:
        """Until its last step, at the speed so far; None where that is not known."""
        if self.record is not None or not (self.step and self.steps and self.seconds):
            return None
        return self.seconds / self.step * (self.steps - self.step)

    def said(self, key: str) -> Any:
        """What the record, or else the newest start, says under a key."""
        starts = [event for event in self.events if event["event"] == "start"]
        return next((source[key] for source in [self.record or {}, *reversed(starts)] if key in source), None)


@dataclass(frozen=True)
class RunFacts:
    """A run.

    Args:
        state: finished, running, stopped, or not begun.
        recipe: that it began with.
        record: what its card is made from; empty before its end.
        last: when it last logged.
        num_starts: of stages, those after a stop counted.
    """

    folder: RunFolder
    name: str
    state: str
    recipe: Mapping[str, Any]
    stages: Sequence[StageFacts]
    record: Mapping[str, Any] = field(default_factory=dict)
    last: datetime | None = None
    num_starts: int = 0

    @property
    def answer_pages(self) -> list[Path]:
        """The browsers of answers."""
        return sorted(self.folder.path.glob(f"{self.folder.predictions.stem}*.html"))

    @property
    def provenance(self) -> dict[str, Any]:
        """Command, commit and environment: of the record, or else of the newest start."""
        found = {}
        for key in ("command", "commit", "environment"):
            if key in self.record:
                found[key] = self.record[key]
            else:
                found[key] = next((said for stage in reversed(self.stages) if (said := stage.said(key))), None)
        return {key: value for key, value in found.items() if value}


def run_facts(path: Path) -> RunFacts:
    """Read a run's folder; nothing in it is changed.

    Raises:
        UserError: it is not the folder of a run.
    """
    folder = RunFolder(path)
    if not folder.recipe.is_file():
        what = "is not a run's folder: it has no recipe.json" if path.is_dir() else "there is no such folder"
        raise UserError(what, where=str(path), fix="name the --output of `train`, e.g. runs/tiny")
    recipe = atomic_folders.read_json(folder.recipe)
    log = entries(folder.log) if folder.log.is_file() else []
    stages = [_stage(name, folder.stage(name, recipe["stages"]), log) for name in recipe["stages"]]
    if folder.summary.is_file():
        state = "finished"
    elif folder.is_claimed():
        state = "running"
    else:
        state = "stopped" if any(stage.events or stage.record for stage in stages) else "not begun"
    return RunFacts(
        folder=folder,
        name=recipe["name"],
        state=state,
        recipe=recipe,
        stages=stages,
        record=atomic_folders.read_json(folder.record) if folder.record.is_file() else {},
        last=datetime.fromisoformat(log[-1]["time"]).astimezone(UTC) if log else None,
        num_starts=sum(entry.get("event") == "start" for entry in log),
    )


def _stage(name: str, folder: StageFolder, log: Sequence[Entry]) -> StageFacts:
    record = None
    if (folder.final / STAGE_RECORD).is_file():
        record = atomic_folders.read_json(folder.final / STAGE_RECORD)
    own = [entry for entry in log if entry["stage"] == name]
    logged = list(_one_a_step(entry for entry in own if "event" not in entry))
    events = [entry for entry in own if "event" in entry]
    if record is not None and not logged:  # a run of before the log
        logged = list(_of_curves(record))
    starts = [event["steps"] for event in events if event["event"] == "start"]
    steps = starts[-1] if starts else (record or {}).get("steps", 0)
    return StageFacts(name, folder, steps, logged, events, record)


def _one_a_step(logged: Iterator[Entry]) -> Iterator[Entry]:
    """The last of several evaluations at one step: they have the same weights."""
    kept: dict[tuple[int, bool], Entry] = {}
    for entry in logged:
        kept[(entry["step"], "loss" not in entry and any(key.startswith("eval_") for key in entry))] = entry
    yield from kept.values()


def _of_curves(record: Mapping[str, Any]) -> Iterator[Entry]:
    seconds = 60 * record.get("minutes", 0) / max(record.get("steps", 1), 1)
    for step, loss in record.get("loss_curve", ()):
        yield {"step": step, "loss": loss, "seconds": seconds * step}
    for step, loss in record.get("validation_curve", ()):
        yield {"step": step, "eval_loss": loss}
