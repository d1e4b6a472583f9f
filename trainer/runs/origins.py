"""The Hub's repositories that a run starts from, resolved to one revision each before the first step."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.data.sources.dataset_rows import DatasetId
from llava_llama31.trainer.model.locating import hub_id, local_checkpoint
from llava_llama31.trainer.recipes.schema import MODEL_PARTS, DataSource, Recipe


_COMMIT = re.compile(r"[0-9a-f]{40}")
_DATASETS = "datasets/"  # before the ids of data sets, which may be those of models too


def resolve_revisions(recipe: Recipe, folder: RunFolder, say: Callable[[str], None]) -> dict[str, str]:
    """Commit of every checkpoint and data set of the Hub that the recipe names: the one that the run began with.

    What the run's folder does not name yet is resolved and written there. A branch that has moved since is reported
    and not followed. For rank 0 alone.

    A data set whose commit can't be asked for is not named; it then comes from the cache of this machine.

    Raises:
        UserError: a checkpoint is neither on this machine nor can it be downloaded.
    """
    before = atomic_folders.read_json(folder.origins) if folder.origins.is_file() else {}
    revisions: dict[str, str] = {}
    for where, name in [*_checkpoints(recipe), *_datasets(recipe)]:
        if name in revisions:
            continue
        now = _newest_commit(name)
        if name not in before and name.startswith(_DATASETS):
            if now is not None:
                revisions[name] = now
            continue
        if name not in before:
            revisions[name] = local_checkpoint(name, where=where).name  # a snapshot's folder is called by its commit
            continue
        revisions[name] = before[name]
        if now not in (None, before[name]):
            say(
                f"warning: {where}: {name} has moved to {now} since this run began; the run stays at {before[name]}. "
                "Train the new one with another --output"
            )
    if revisions != before:
        atomic_folders.write_json(folder.origins, revisions)
    return revisions


def _datasets(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key in the recipe, `datasets/` and Hub id) of every data set that is not on this machine."""
    for name, stage in recipe.stages.items():
        for number, source in enumerate(stage.data):
            if DatasetId.parse(source.path) is not None:
                yield f"stages.{name}.data.{number}", _DATASETS + source.path


def _checkpoints(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key in the recipe, Hub id) of every checkpoint that is not a folder of this machine."""
    named: list[tuple[str, Any]] = [(f"model.{part}", getattr(recipe.model, part)) for part in MODEL_PARTS]
    named += [(f"stages.{name}.init_from", stage.init_from) for name, stage in recipe.stages.items()]
    for where, name in named:
        if name is not None and hub_id(name) is not None:
            yield where, name


def _newest_commit(name: str) -> str | None:
    """Commit that a Hub id stands for now; None where it names a commit, or the Hub can't be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    is_dataset = name.startswith(_DATASETS)
    dataset = DatasetId.parse(name.removeprefix(_DATASETS)) if is_dataset else None
    named = (dataset.name, dataset.revision) if dataset is not None else hub_id(name)
    if named is None or (named[1] and _COMMIT.fullmatch(named[1])):
        return None
    try:
        return HfApi().repo_info(named[0], revision=named[1], repo_type="dataset" if is_dataset else "model").sha
    except (HTTPError, OfflineModeIsEnabled, OSError):
        return None


def at_revisions(recipe: Recipe, revisions: dict[str, str]) -> Recipe:
    """The recipe with its Hub ids at these revisions, which it then uses everywhere."""

    def pin(name: str | None) -> str | None:
        return f"{name.partition('@')[0]}@{revisions[name]}" if name is not None and name in revisions else name

    def pin_source(source: DataSource) -> DataSource:
        dataset, revision = DatasetId.parse(source.path), revisions.get(_DATASETS + source.path)
        return source.model_copy(update={"path": dataset.at(revision)}) if dataset and revision else source

    model = recipe.model.model_copy(update={part: pin(getattr(recipe.model, part)) for part in MODEL_PARTS})
    stages = {
        name: stage.model_copy(
            update={"init_from": pin(stage.init_from), "data": [pin_source(source) for source in stage.data]}
        )
        for name, stage in recipe.stages.items()
    }
    return recipe.model_copy(update={"model": model, "stages": stages})
