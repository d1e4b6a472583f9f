"""The files and folders that a recipe names, looked for before anything is downloaded, assembled or asked for."""

from collections.abc import Iterator
from pathlib import Path

from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.data.sources.data_folders import matches
from llava_llama31.trainer.data.sources.dataset_rows import DatasetId
from llava_llama31.trainer.data.sources.remote_files import is_remote, url_fault
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.model.locating import hub_id
from llava_llama31.trainer.recipes.deepspeed_files import deepspeed_file
from llava_llama31.trainer.recipes.schema import MODEL_PARTS, Evaluation, Recipe, Stage
from llava_llama31.trainer.redaction import redacted


def check_paths(recipe: Recipe, output: Path) -> None:
    """Check that every file and folder that a recipe names is on this machine.

    Raises:
        UserError: naming the first that is not, by its key, and how many others.
    """
    missing = missing_paths(recipe, output)
    if not missing:
        return
    (where, what), *others = missing.items()
    more = f" (and {len(others)} more: {', '.join(key for key, _ in others)})" if others else ""
    fix = "correct the path; it is relative to the working directory"
    if any(key.startswith(("stages.", "evaluation.")) for key in missing):
        fix += "; `llava-llama31 fetch RECIPE` downloads published data"
    raise UserError(f"{what}{more}", where=where, fix=fix)


def missing_paths(recipe: Recipe, output: Path) -> dict[str, str]:
    """What a recipe names and is not on this machine: what is missing, by the key in the recipe.

    A Hub id is not asked for. What the run prepares itself is not missing, nor are the parts of a model that it has
    assembled already.
    """
    folder = RunFolder(output)
    prepared = folder.prepared.absolute()
    found = {}
    for where, what, path in _missing(recipe):
        if where.startswith("model.") and folder.base.exists():
            continue
        if recipe.prepare not in ("tiny", "tiny-siglip") or prepared not in path.parents:
            found[where] = what
    return found


def _missing(recipe: Recipe) -> Iterator[tuple[str, str, Path]]:
    """(key, what is wrong, absolute path) of everything that is not there."""
    named = [(f"model.{part}", getattr(recipe.model, part)) for part in MODEL_PARTS]
    named += [(f"stages.{name}.init_from", stage.init_from) for name, stage in recipe.stages.items()]
    for where, checkpoint in named:
        if checkpoint in (None, "previous") or hub_id(checkpoint) is not None:
            continue
        path = Path(checkpoint).expanduser()
        if not path.exists():
            yield where, _absent(checkpoint), path.absolute()
    for name, stage in recipe.stages.items():
        yield from _missing_of_stage(stage, f"stages.{name}")
    for number, spec in enumerate(recipe.evaluations):
        yield from _missing_of_evaluation(spec, recipe.where_evaluation(number))
    if recipe.text_questions is not None:
        path = Path(recipe.text_questions.data).expanduser().absolute()
        if not path.is_file():
            yield "text_questions.data", _absent(recipe.text_questions.data), path


def _missing_of_stage(stage: Stage, where: str) -> Iterator[tuple[str, str, Path]]:
    if stage.deepspeed is not None:
        try:
            deepspeed_file(stage.deepspeed, where)
        except UserError as error:
            yield f"{where}.deepspeed", error.what, Path(stage.deepspeed).absolute()
    if stage.contamination is not None:
        for number, file in enumerate(stage.contamination.against):
            path = Path(file).absolute()
            if "*" not in path.name and not path.exists():
                yield f"{where}.contamination.against.{number}", _absent(file), path
        yield from _missing_root(stage.contamination.image_root, f"{where}.contamination.image_root")
    for number, source in enumerate(stage.data):
        path = Path(source.path).absolute()
        if is_remote(source.path):
            yield from _missing_root(source.image_root, f"{where}.data.{number}.image_root", stores_too=True)
            continue
        if not path.exists() and DatasetId.parse(source.path) is None:
            yield f"{where}.data.{number}.path", _absent(source.path, stores_too=True), path
        yield from _missing_root(source.image_root, f"{where}.data.{number}.image_root", stores_too=True)


def _missing_of_evaluation(spec: Evaluation, where: str) -> Iterator[tuple[str, str, Path]]:
    # a shipped task is a plain name
    if spec.task is not None and Path(spec.task).suffix and not Path(spec.task).is_file():
        path = Path(spec.task).absolute()
        yield f"{where}.task", _absent(spec.task), path
    if spec.data is not None:
        path = Path(spec.data).absolute()
        if "*" in path.name and not path.exists():
            names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
            if not any(matches(name, path.name) for name in names):
                yield f"{where}.data", f"no file matches {path}", path
        elif not path.exists():
            yield f"{where}.data", _absent(spec.data), path
    yield from _missing_root(spec.image_root, f"{where}.image_root")


def _missing_root(root: str | None, where: str, *, stores_too: bool = False) -> Iterator[tuple[str, str, Path]]:
    if root is not None and not (stores_too and is_remote(root)) and not Path(root).is_dir():
        path = Path(root).absolute()
        yield where, f"{path} is not a folder" if path.exists() else _absent(root, stores_too=stores_too), path


def _absent(given: str, *, stores_too: bool = False) -> str:
    """What is wrong with a path that is not there; a URL is not a path under the working directory."""
    fault = url_fault(given, stores_too=stores_too)
    if fault is not None:
        return f"{redacted(given)}: {': '.join(fault)}"
    return f"{Path(given).expanduser().absolute()} does not exist"
