"""The charts of a report: quantities of one run or several over training time, or over steps."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llava_llama31.model_card.curves import Chart, Line
from llava_llama31.trainer.report.run_facts import Entry, RunFacts


_RATE = "learning rate of "
_TASK = "score of "
_SOURCE, _BY_SOURCE = "validation loss of ", "eval_loss_by_source"
_PER_TOKEN = "eval_token_loss"  # the validation loss again, of all tokens at once
# title; (label, key) of its lines, or what the keys of its lines begin with; whether they are shares of one
_PANELS: tuple[tuple[str, tuple[tuple[str, str], ...] | str, bool], ...] = (
    ("Loss", (("training", "loss"), ("validation", "eval_loss")), False),
    ("Validation accuracy", (("accuracy", "eval_accuracy"),), True),
    ("Validation loss by source", _SOURCE, False),
    ("Scores of tasks", _TASK, False),
    ("Learning rate", _RATE, False),
    ("Gradient norm", (("gradient norm", "grad_norm"),), False),
    ("Tokens per second", (("all", "tokens_per_second"), ("supervised", "supervised_tokens_per_second")), False),
    (
        "Share of time and of the matrix peak",
        (("MFU", "mfu"), ("data wait", "data_wait"), ("padding", "padding")),
        True,
    ),
    ("Memory, GiB", (("peak", "memory_gib"),), False),
)
_KEYS = tuple(key for _, lines, _ in _PANELS if not isinstance(lines, str) for _, key in lines)
_VALIDATED = ("eval_loss", "eval_accuracy", _SOURCE, _TASK)
_UNITS = (
    (2 * 3600.0, 3600.0, "hours of training"),
    (180.0, 60.0, "minutes of training"),
    (0.0, 1.0, "seconds of training"),
)


@dataclass(frozen=True)
class Panel:
    """One quantity, over training time and over steps, with the lines' names for a legend."""

    title: str
    charts: Mapping[str, Chart]
    legend: Sequence[Line]


@dataclass(frozen=True)
class _Column:
    """The logged values (N,) of one key in one stage, and their x (N,) by axis."""

    x: Mapping[str, np.ndarray]
    y: np.ndarray


@dataclass(frozen=True)
class _Stage:
    """A stage on both axes: where it begins, its columns, and the x of its findings."""

    name: str
    begins: Mapping[str, float]
    columns: Mapping[str, _Column]
    findings: Mapping[str, np.ndarray]


def panels(runs: Sequence[RunFacts]) -> list[Panel]:
    """All panels for which a run has a figure."""
    longest = max((sum(stage.seconds for stage in run.stages) for run in runs), default=0.0)
    _, unit, label = next(choice for choice in _UNITS if longest >= choice[0])
    placed = [list(_placed(run, unit)) for run in runs]
    found = []
    for title, keys, percent in _PANELS:
        charts, legend = {}, []
        for axis, x_label in (("time", label), ("steps", "step")):
            lines = list(_lines(runs, placed, keys, axis))
            if lines:
                bounds = {stage.begins[axis]: stage.name for stage in (placed[0] if placed else ())}
                marks = [float(x) for stages in placed for stage in stages for x in stage.findings[axis]]
                charts[axis] = Chart(title, lines, x_label, bounds, marks, percent)
                legend = [replace(line, points=()) for line in lines]
        if charts:
            found.append(Panel(title, charts, legend))
    return found


def _placed(run: RunFacts, unit: float) -> Iterator[_Stage]:
    seconds_before, steps_before = 0.0, 0
    for stage in run.stages:
        timed = sorted((entry["step"], entry["seconds"]) for entry in stage.logged if "seconds" in entry)
        steps, seconds = np.array([(0, 0.0), *timed]).T

        def x(
            at: Sequence[int] | np.ndarray,
            steps: np.ndarray = steps,
            seconds: np.ndarray = seconds,
            before: tuple[float, int] = (seconds_before, steps_before),
        ) -> dict[str, np.ndarray]:
            index = np.searchsorted(steps, at, side="right") - 1
            return {"time": (before[0] + seconds[index]) / unit, "steps": before[1] + np.array(at)}

        findings = [event["step"] for event in stage.events if event["event"] == "finding"]
        if stage.logged or stage.events:
            found = _columns(stage.logged)
            places = {id(at): x(at) for at in {id(at): at for at, _ in found.values()}.values()}
            columns = {key: _Column(places[id(at)], np.array(values)) for key, (at, values) in found.items()}
            begins = {axis: float(place[0]) for axis, place in x([0]).items()}
            yield _Stage(stage.name, begins, columns, x(findings))
        seconds_before, steps_before = seconds_before + stage.seconds, steps_before + stage.step


def _columns(logged: Sequence[Entry]) -> dict[str, tuple[np.ndarray, list[float]]]:
    """Steps and values of each key that has a line; of a learning rate by group. Keys in all entries share steps."""
    found = {}
    every = np.array([entry["step"] for entry in logged], dtype=np.int64)

    def steps(having: Sequence[Entry]) -> np.ndarray:
        return every if len(having) == len(logged) else np.array([entry["step"] for entry in having], dtype=np.int64)

    for key, name in _drawn(dict.fromkeys(key for entry in logged for key in entry)).items():
        having = [entry for entry in logged if key in entry]
        found[name] = (steps(having), [number(entry[key]) for entry in having])
    for key, prefix in (("learning_rates", _RATE), (_BY_SOURCE, _SOURCE)):
        having = [entry for entry in logged if key in entry]
        for inner in dict.fromkeys(inner for entry in having for inner in entry[key]):
            inside = [entry for entry in having if inner in entry[key]]
            values = [entry[key][inner] for entry in inside]
            values = [number(value["loss"] if key == _BY_SOURCE else value) for value in values]
            found[f"{prefix}{inner}"] = (steps(inside), values)
    return found


def _drawn(keys: Iterable[str]) -> dict[str, str]:
    """Those keys of entries whose figures are drawn, with the names of their columns."""
    names = {}
    for key in keys:
        if key in _KEYS:
            names[key] = key
        elif key.startswith("eval_") and not key.endswith("unanswered") and key not in (_BY_SOURCE, _PER_TOKEN):
            names[key] = f"{_TASK}{key.removeprefix('eval_')}"
    return names


def _lines(
    runs: Sequence[RunFacts],
    placed: Sequence[Sequence[_Stage]],
    keys: Sequence[tuple[str, str]] | str,
    axis: str,
) -> Iterator[Line]:
    """One line for each run and quantity; colours tell runs apart, or the quantities of a single run."""
    for number_of_run, (run, stages) in enumerate(zip(runs, placed, strict=True)):
        if isinstance(keys, str):
            names = dict.fromkeys(key for stage in stages for key in stage.columns if key.startswith(keys))
            wanted = [(key.removeprefix(keys), key) for key in names]
        else:
            wanted = list(keys)
        for dash, (label, key) in enumerate(wanted):
            gap = np.full((1, 2), np.nan)
            columns = [stage.columns[key] for stage in stages if key in stage.columns]
            parts = [part for column in columns for part in (np.stack([column.x[axis], column.y], axis=1), gap)]
            points = np.concatenate(parts) if parts else gap
            if np.isfinite(points[:, 1]).any():
                name = f"{run.name}, {label}" if len(runs) > 1 else label
                colour = number_of_run if len(runs) > 1 else dash
                yield Line(name, points, colour, dash, dots=key.startswith(_VALIDATED) or len(points) <= 2)


def number(value: Any) -> float:
    """A figure of the log; one that is not finite is text there."""
    return float(value)
