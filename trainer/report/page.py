"""Runs as one HTML page that needs nothing else: no script, no network, curves as inline SVG."""

import json
import os
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from llava_llama31.model_card.curves import DASHES, NUM_COLOURS, svg
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.questions import load_questions
from llava_llama31.trainer.recipes.differences import as_yaml, differing, flat
from llava_llama31.trainer.redaction import redacted
from llava_llama31.trainer.report.panels import number, panels
from llava_llama31.trainer.report.run_facts import Entry, RunFacts, StageFacts


NUM_ASKED = 6
NUM_EVALUATIONS = 8
NUM_FIGURES = 20
IMAGE_SIDE = 240
_TONES = {"finished": "good", "stopped": "bad"}
_FIGURES = ("loss", "eval_loss", "eval_accuracy", "grad_norm", "tokens_per_second", "mfu", "memory_gib")

Row = Sequence[str | Markup]


def write_report(runs: Sequence[RunFacts], path: Path) -> None:
    """Write the page of one run, or of several laid over each other; the file appears when it is complete.

    Raises:
        UserError: the file cannot be written.
    """
    if path.is_dir():
        raise UserError("is a folder", where=str(path), fix="name an .html file, in that folder or elsewhere")
    text = report_page(runs, lambda page: Path(os.path.relpath(page.resolve(), path.parent.resolve())).as_posix())
    partial = path.with_name(f"{path.name}.partial")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        fix = "free some space, or pass another --output"
        raise UserError(f"cannot be written: {error.strerror or error}", where=str(path), fix=fix) from error


def report_page(runs: Sequence[RunFacts], address: Callable[[Path], str], *, refresh: int = 0) -> str:
    """The page's text.

    Args:
        address: of a page of answers in a run's folder.
        refresh: seconds after which a browser asks for the page again; 0: never.
    """
    runs = _distinct(runs)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    level = 2 if len(runs) == 1 else 3  # below the run's name, if that is a heading
    environment.globals |= {"key": _key, "table": _table, "heading": partial(_heading, level)}
    environment.globals |= {"subheading": partial(_heading, level + 1)}
    template = environment.from_string(_file("report.html.jinja"))
    drawn = [
        {
            "title": panel.title,
            "legend": panel.legend,
            "drawings": [(axis, Markup(svg(chart, f"c{number}{axis}"))) for axis, chart in panel.charts.items()],
        }
        for number, panel in enumerate(panels(runs))
    ]
    return template.render(
        title=" and ".join(run.name for run in runs),
        style=Markup(_file("report.css")),
        refresh=refresh,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        runs=[_run(i, run, address) for i, run in enumerate(runs)],
        panels=drawn,
        differences=_differences(runs) if len(runs) > 1 else [],
    )


def _distinct(runs: Sequence[RunFacts]) -> list[RunFacts]:
    """Runs of one name with their folders behind it."""
    times = Counter(run.name for run in runs)
    return [replace(run, name=f"{run.name} ({run.folder.path})") if times[run.name] > 1 else run for run in runs]


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _heading(level: int, text: str) -> Markup:
    return Markup("<h{0}>{1}</h{0}>").format(level, text)


def _key(colour: int, dash: int) -> Markup:
    """A piece of a line, for legends."""
    style = DASHES[dash % len(DASHES)]
    dashes = "none" if isinstance(style, str) else " ".join(f"{1.4 * part:g}" for part in style[1])
    return Markup(
        '<svg class="key" viewBox="0 0 28 12" aria-hidden="true"><path d="M0 7H28" fill="none" stroke-width="2" '
        f'style="stroke: var(--line-{colour % NUM_COLOURS + 1}); stroke-dasharray: {dashes}"/></svg>'
    )


def _table(label: str, head: Sequence[str], rows: Sequence[Row]) -> Markup:
    """A table that scrolls by itself where it is wider than the page; figures are aligned to the right."""
    numeric = [
        bool(rows) and all(_is_figure(row[column]) for row in rows) for column in range(len(rows[0]) if rows else 0)
    ]
    kinds = [Markup(' class="n"') if is_numeric else Markup("") for is_numeric in numeric]
    top = Markup("").join(Markup('<th scope="col"{}>{}</th>').format(*cell) for cell in zip(kinds, head, strict=False))
    body = Markup("").join(
        Markup('<tr><th scope="row"><bdi>{}</bdi></th>{}</tr>').format(
            row[0],
            Markup("").join(
                Markup("<td{}>{}</td>").format(
                    kind, cell if isinstance(cell, Markup) else Markup("<bdi>{}</bdi>").format(cell)
                )
                for kind, cell in zip(kinds[1:], row[1:], strict=True)
            ),
        )
        for row in rows
    )
    thead = Markup("<thead><tr>{}</tr></thead>").format(top) if head else Markup("")
    frame = Markup(
        '<div class="wide" tabindex="0" role="group" aria-label="{}"><table>{}<tbody>{}</tbody></table></div>'
    )
    return frame.format(label, thead, body)


def _is_figure(cell: str | Markup) -> bool:
    return not isinstance(cell, Markup) and (not cell or cell[0] in "-0123456789") and cell[-1:] not in "abcdef"


def _run(number: int, run: RunFacts, address: Callable[[Path], str]) -> dict[str, Any]:
    scores = run.record.get("evaluation", {})
    return {
        "number": number,
        "name": run.name,
        "state": run.state,
        "tone": _TONES.get(run.state, ""),
        "state_detail": _state_detail(run),
        "browser": address(run.folder.browser) if run.folder.browser.is_file() else None,
        "scores": list(_scores(scores)),
        "score_note": _score_note(scores),
        "tasks": [_task(run, task, address) for task in run.record.get("tasks", ())],
        "findings": [
            _finding(stage, event) for stage in run.stages for event in stage.events if event["event"] == "finding"
        ],
        "samples": list(_samples(run)),
        "asked": [
            asked for stage in run.stages for folder in _asked_folders(stage) if (asked := _asked(run, stage, folder))
        ],
        "stages": [_stage(stage) for stage in run.stages],
        "provenance": list(_provenance(run)),
        "figures": _figures(run),
        "recipe": [(key, redacted(as_yaml(value))) for key, value in flat(run.recipe).items()],
    }


def _state_detail(run: RunFacts) -> str:
    said = []
    started = [stage for stage in run.stages if stage.events]
    current = started[-1] if started and started[-1].record is None else None
    if run.state in ("running", "stopped") and current is not None:
        said.append(f"stage {current.name}, step {current.step:,} of {current.steps:,}")
        if run.state == "running" and (left := current.seconds_left) is not None:
            said.append(f"about {_duration(left)} left in this stage")
        later = [stage.name for stage in run.stages[run.stages.index(current) + 1 :]]
        if later:
            said.append(f"then {', '.join(later)}")
    elif run.state == "running":
        said.append("between stages" if len(started) < len(run.stages) else "evaluating and exporting")
    if run.state == "stopped":
        said.append("the same command resumes it")
    seconds = sum(stage.seconds for stage in run.stages)
    if seconds:
        said.append(f"{_duration(seconds)} of training")
    restarts = run.num_starts - sum(bool(stage.events) for stage in run.stages)
    if restarts > 0:
        said.append(f"resumed {restarts} time{'s' * (restarts > 1)}")
    if run.last is not None:
        said.append(f"last logged {run.last:%Y-%m-%d %H:%M} UTC")
    return "".join(f"; {part}" for part in said)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _task(run: RunFacts, task: Mapping[str, Any], address: Callable[[Path], str]) -> dict[str, Any]:
    page = run.folder.path / Path(task["predictions"]["file"]).with_suffix(".html").name
    rows = [
        (
            name,
            score["headline"],
            f"{score['metrics'][score['headline']]:.1f}",
            f"{score['low']:.1f} to {score['high']:.1f}",
        )
        for name, score in task["protocols"].items()
        if score["low"] is not None
    ]
    note = f"{task['name']}, {_counts(task)}; {task['decoding']}"
    return {"title": task["title"], "note": note, "rows": rows, "browser": address(page) if page.is_file() else None}


def _score_note(scores: Mapping[str, Any]) -> str:
    if not scores:
        return ""
    return f"{scores['dataset']}, {_counts(scores)}; {scores['decoding']}"


def _counts(scores: Mapping[str, Any]) -> str:
    """How many questions, and how many of them the score leaves out or has cut answers of."""
    named = [("failed", "failed"), ("missing", "unanswered"), ("cut", "answers cut at the limit")]
    counts = [f"{scores[key]:,} {name}" for key, name in named if scores.get(key)]
    return ", ".join([f"{scores['num_questions']:,} questions", *counts])


def _scores(scores: Mapping[str, Any]) -> Iterator[Row]:
    for name, score in scores.get("protocols", {}).items():
        yield name, f"{score['accuracy']:.1%}", f"{score['low']:.1%} to {score['high']:.1%}"
    protocol = scores.get("accuracy_protocol", "")
    for key, label in (("before", "before training"), ("blind", "images shuffled between questions")):
        if f"accuracy_{key}" in scores:
            yield f"{label} ({protocol})", f"{scores[f'accuracy_{key}']:.1%}", ""


def _finding(stage: StageFacts, event: Entry) -> Row:
    records = [record for rank in event.get("records", {}).values() for record in rank]
    more = f" and {len(records) - 8} more" if len(records) > 8 else ""
    return (
        stage.name,
        f"{event['step']:,}",
        event["what"],
        event.get("action", ""),
        ", ".join(map(str, records[:8])) + more,
    )


def _samples(run: RunFacts) -> Iterator[dict[str, Any]]:
    for sample in run.record.get("samples", ()):
        file = run.folder.path / sample["image"]
        yield {
            "image": _data_uri(Image.open(file)) if file.is_file() else None,
            "question": sample["question"],
            "prediction": sample["prediction"],
            "truth": _grouped(sample["answers"]),
            "accuracy": f"{sample['accuracy']:.2g}",
        }


def _grouped(answers: Sequence[str]) -> str:
    return ", ".join(f"{text} x {count}" if count > 1 else text for text, count in Counter(answers).most_common())


def _data_uri(image: Image.Image) -> str:
    image = image.convert("RGB")
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    file = BytesIO()
    image.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}"


def _asked_folders(stage: StageFacts) -> list[Path]:
    """Answer folders of the sets of questions that a stage asks; the first set's holds those of the others."""
    folder = stage.folder.evaluation
    return [folder, *sorted(path for path in folder.glob("*") if path.is_dir())] if folder.is_dir() else []


def _asked(run: RunFacts, stage: StageFacts, folder: Path) -> dict[str, Any] | None:
    """The first questions, and what the model answered at some of the evaluations of a stage."""
    files = {int(file.stem.removeprefix("step-")): file for file in folder.glob("step-*.jsonl")}
    steps = sorted(step for step in files if not stage.step or step <= stage.step)
    if not steps:
        return None
    chosen = [steps[i * (len(steps) - 1) // max(NUM_EVALUATIONS - 1, 1)] for i in range(NUM_EVALUATIONS)]
    chosen = steps if len(steps) <= NUM_EVALUATIONS else sorted(set(chosen))
    answers = {step: {str(row["question_id"]): row for row in _rows(files[step])} for step in chosen}
    ids = list(answers[chosen[0]])[:NUM_ASKED]
    is_first = folder == stage.folder.evaluation
    known = _questions(run) if is_first else {}
    rows = []
    for question_id in ids:
        text, truth, uri = known.get(
            question_id, (answers[chosen[0]][question_id].get("question", question_id), "", None)
        )
        image = Markup('<img src="{}" alt="">').format(uri) if uri else Markup("")
        said = [answers[step].get(question_id, {}).get("answer") for step in chosen]
        rows.append((text, image, truth, *("no answer" if answer is None else answer for answer in said)))
    return {
        "stage": stage.name if is_first else f"{stage.name}, {folder.name}",
        "head": ("question", "image", "annotated", *(f"step {step:,}" for step in chosen)),
        "rows": rows,
        "left_out": f"{len(chosen)} of {len(steps)} evaluations are shown." if len(chosen) < len(steps) else "",
    }


def _rows(file: Path) -> Iterator[Entry]:
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # being written
            continue


def _questions(run: RunFacts) -> dict[str, tuple[str, str, str | None]]:
    """Question, annotators' answers and image of the first questions, where the file is still there."""
    specs = run.recipe.get("evaluation") or {}
    spec = specs[0] if isinstance(specs, list) else specs
    if not spec.get("data") or spec.get("task"):
        return {}
    try:
        questions = load_questions(
            spec["data"], image_root=spec["image_root"], max_pixels=spec.get("max_pixels"), limit=NUM_ASKED
        )
    except UserError:  # the answers are shown without them
        return {}
    return {
        str(question.question_id): (question.question, _grouped(question.answers), _opened(question.image))
        for question in questions
    }


def _opened(image: Any) -> str | None:
    try:
        return _data_uri(image.open()) if image is not None else None
    except RecordError:
        return None


def _stage(stage: StageFacts) -> dict[str, Any]:
    progress = "has not started"
    if stage.steps:
        progress = f"{stage.step:,} of {stage.steps:,} steps, {_duration(stage.seconds)} of training"
    if stage.record is not None:
        progress += f"; finished with the weights of step {stage.record.get('weights_of_step', stage.steps):,}"
    groups = [
        (
            line["group"],
            f"{line['num_parameters']:,}",
            f"{line['num_trainable']:,}",
            "frozen" if line["learning_rate"] is None else f"{line['learning_rate']:g}",
        )
        for line in stage.said("groups") or ()
    ]
    return {"name": stage.name, "progress": progress, "groups": groups, "data": list(_data(stage))}


def _data(stage: StageFacts) -> Iterator[Row]:
    for source in stage.said("data") or ():
        dropped, not_read = (
            ", ".join(f"{name}: {count:,}" for name, count in source.get(key, {}).items()) or "none"
            for key in ("dropped", "not_read")
        )
        counts = (f"{source[key]:,}" for key in ("rows", "usable", "selected"))
        yield source["name"], *counts, f"{source.get('weight', 1):g}", dropped, not_read


def _provenance(run: RunFacts) -> Iterator[Row]:
    for key, value in run.provenance.items():
        if isinstance(value, Mapping):
            yield from ((name, redacted(str(item))) for name, item in value.items())
        else:
            yield key, redacted(str(value))


def _figures(run: RunFacts) -> tuple[Row, list[Row]] | None:
    """Some logged figures as a table, for those who do not see the curves."""
    rows: list[Row] = []
    for stage in run.stages:
        logged = list(stage.logged)
        chosen = (
            [logged[i * len(logged) // NUM_FIGURES] for i in range(NUM_FIGURES)]
            if len(logged) > NUM_FIGURES
            else logged
        )
        for entry in [*chosen, *([logged[-1]] if len(logged) > NUM_FIGURES else [])]:
            figures = (f"{number(entry[key]):.5g}" if key in entry else "" for key in _FIGURES)
            rows.append((stage.name, f"{entry['step']:,}", *figures))
    return (("stage", "step", *_FIGURES), rows) if rows else None


def _differences(runs: Sequence[RunFacts]) -> list[tuple[str, list[str]]]:
    """Keys of the recipes whose values are not the same in all runs; a stage that one of them lacks is one row."""
    stages = [run.recipe.get("stages") or {} for run in runs]
    lacked = {name for some in stages for name in some if not all(name in others for others in stages)}
    shared = [
        {**run.recipe, "stages": {name: stage for name, stage in some.items() if name not in lacked}}
        for run, some in zip(runs, stages, strict=True)
    ]
    found = differing(shared)
    for name in sorted(lacked):
        trained = [
            f"trains {as_yaml(some[name].get('trainable'))}" if name in some else "not there" for some in stages
        ]
        found[f"stages.{name}"] = trained
    return [(key, [redacted(value) for value in values]) for key, values in found.items()]
