"""What a run depends on beside its recipe: the contents of its data, questions and checkpoints, wherever they are."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.data.check.cache import file_signature
from llava_llama31.trainer.data.check.report import DataReport
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.row_files import question_files
from llava_llama31.trainer.evaluation.task_files import load_task
from llava_llama31.trainer.recipes.schema import MODEL_PARTS
from llava_llama31.trainer.runs.base_model import base_of
from llava_llama31.trainer.runs.context import RunContext


Inputs = dict[str, dict[str, str]]

_WEIGHTS = (".safetensors", ".bin")


def checkpoint_digests(folder: Path) -> dict[str, str]:
    """Digests of a checkpoint's weights, and of the config, tokenizer and template beside them.

    Large files count with 64 MiB spread over them.
    """
    files = [folder] if folder.is_file() else sorted(file for file in folder.iterdir() if file.is_file())
    # what a run writes beside a model is not part of it
    kept = [file for file in files if file.suffix in (*_WEIGHTS, ".json", ".jinja", ".model")]
    weights = [file for file in kept if file.suffix in _WEIGHTS]
    settings = [file for file in kept if file not in weights and not file.name.startswith(("stage.", "manifest."))]
    return {"weights": _digest(weights), "settings": _digest(settings)}


def run_inputs(run: RunContext, reports: Mapping[str, DataReport]) -> Inputs:
    """Digests by key of the recipe; a checkpoint that is not on this machine counts with its name.

    Args:
        reports: of the data of each stage.
    """
    recipe = run.recipe
    inputs: Inputs = {"model": checkpoint_digests(base_of(recipe, run.folder))}
    named = {f"model.{part}": getattr(recipe.model, part) for part in MODEL_PARTS}
    named |= {f"stages.{name}.init_from": stage.init_from for name, stage in recipe.stages.items()}
    for key, value in named.items():
        if value not in (None, "previous"):
            path = Path(value).expanduser()
            inputs[key] = {"name": value} | (checkpoint_digests(path) if path.exists() else {})
    for name, report in reports.items():
        inputs |= {f"stages.{name}.data.{found.name}": dict(found.content) for found in report.sources}
    for number, spec in enumerate(recipe.evaluations):
        own = spec.task if spec.task is not None and Path(spec.task).is_file() else None
        data = spec.data or (load_task(own).data if own is not None else None)
        for key, file in (("task", own), ("data", data)):
            if file is not None:
                inputs[f"{recipe.where_evaluation(number)}.{key}"] = {"files": _digest(_files_of(Path(file)))}
    if recipe.text_questions is not None:
        inputs["text_questions.data"] = {"files": _digest([Path(recipe.text_questions.data).expanduser()])}
    return inputs


def _files_of(path: Path) -> list[Path]:
    """Files of questions: one, the shards of a split, or all of a folder that holds no shards."""
    if path.is_dir() and not any(path.glob("**/*.parquet")):
        return sorted(file for file in path.iterdir() if file.is_file())
    return question_files(path)


def settle_inputs(run: RunContext, inputs: Inputs) -> None:
    """Write down what the run depends on; once it has begun, refuse anything else.

    Raises:
        UserError: naming what has changed, with both digests.
    """
    file = run.folder.inputs
    if run.folder.has_begun() and file.is_file():
        refuse_changes(atomic_folders.read_json(file), inputs, where=str(run.folder.path))
    else:
        atomic_folders.write_json(file, inputs)


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], *, where: str) -> None:
    """Refuse inputs that are no longer what a run, or a checkpoint of it, began with.

    Raises:
        UserError: naming what has changed, with both digests.
    """
    changed = [change for key in {**before, **now} for change in _changes(key, before.get(key), now.get(key))]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"changed since this run began: {'; '.join(changed[:3])}{more}",
            where=where,
            fix="restore what it began with, or choose another --output",
        )


def _changes(key: str, before: Mapping[str, str] | None, now: Mapping[str, str] | None) -> Iterator[str]:
    if before is None or now is None:
        yield f"{key} ({'new' if before is None else 'gone'})"
        return
    # names are compared only where a content is not on this machine: what a run began with may have been moved
    parts = (before.keys() & now.keys()) - {"name"} or {"name"}
    for part in sorted(parts):
        if before.get(part) != now.get(part):
            yield f"{key} ({part}: {before.get(part)} then, {now.get(part)} now)"


def _digest(files: list[Path]) -> str:
    contents = [(file.name if len(files) > 1 else "", *file_signature(file)[1::2]) for file in files]
    return hashlib.blake2b(json.dumps(contents).encode(), digest_size=16).hexdigest()
