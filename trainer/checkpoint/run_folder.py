"""The layout of a run's folder, and who may write into it."""

import fcntl
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.schema import CHANGEABLE, MODEL_PARTS, Recipe


logger = logging.getLogger(__name__)

STAGE_RECORD = "stage.json"
PREDICTIONS = "predictions.jsonl"  # of the run, and of each of its evaluations
_FINAL = "final"
_LOCK = ".lock"
# recipe keys that may change between two starts of a run, beside `CHANGEABLE`
_UNTRAINED = ("description", "device_watts", "hub_id", "report_to")
_PLACES = re.compile(
    r"stages\.[^.]+\.(init_from|data\.\d+\.(path|image_root))|evaluation\.(\d+\.)?(data|image_root)|text_questions\.data"
    rf"|model\.({'|'.join(MODEL_PARTS)})"
)
_NOTHING = re.compile(r"(?!)")


@dataclass(frozen=True)
class StageFolder:
    """What one stage leaves in a run's folder: its checkpoints, and its weights in `final`."""

    path: Path

    @property
    def final(self) -> Path:
        """The stage's weights: complete, or absent."""
        return self.path / _FINAL

    @property
    def rejects(self) -> Path:
        """Records that can't be used, with their reasons."""
        return self.path / "rejects.jsonl"

    @property
    def evaluation(self) -> Path:
        """Answers given while the stage trained."""
        return self.path / "evaluation"

    @property
    def wandb_id(self) -> Path:
        """The id of the stage's run at Weights & Biases."""
        return self.path / "wandb-id"

    def finished_record(self) -> dict[str, Any] | None:
        """The record of a stage whose weights are complete, or None."""
        if not (self.final / STAGE_RECORD).is_file():
            return None
        fault = atomic_folders.verify(self.final)
        if fault is not None:
            logger.warning("%s is damaged (%s): the stage resumes from its newest whole checkpoint", self.final, fault)
            return None
        return atomic_folders.read_json(self.final / STAGE_RECORD)


@dataclass(frozen=True)
class RunFolder:
    """A run's folder; nothing else knows its layout."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The recipe that the run began with."""
        return self.path / "recipe.json"

    @property
    def origins(self) -> Path:
        """The revisions of the Hub's repositories that the run uses."""
        return self.path / "origins.json"

    @property
    def inputs(self) -> Path:
        """Digests of the data, questions and checkpoints that the run began with."""
        return self.path / "inputs.json"

    @property
    def precision(self) -> Path:
        """The precision that each stage computes in, as settled when the run began."""
        return self.path / "precision.json"

    @property
    def elapsed(self) -> Path:
        """The minutes that the run has taken, over all its starts."""
        return self.path / "elapsed.json"

    @property
    def log(self) -> Path:
        """What the stages log, a JSON object a line."""
        return self.path / "log.jsonl"

    @property
    def text_ability(self) -> Path:
        """Answers and scores of the text-only questions, before the first and after each stage."""
        return self.path / "text_ability"

    @property
    def prepared(self) -> Path:
        """Parts and data that a recipe makes itself."""
        return self.path / "prepared"

    @property
    def base(self) -> Path:
        """The checkpoint assembled for the first stage, if the recipe names parts or another layout."""
        return self.path / "base"

    @property
    def save_now(self) -> Path:
        """A file that asks a running stage to save."""
        return self.path / "save-now"

    @property
    def shared_mark(self) -> Path:
        """Written by rank 0 for all machines to see."""
        return self.path / ".shared"

    @property
    def evaluation(self) -> Path:
        """One folder of answers per evaluation at the end of the run."""
        return self.path / "evaluation"

    @property
    def predictions(self) -> Path:
        return self.path / PREDICTIONS

    @property
    def browser(self) -> Path:
        """The page to look through the answers."""
        return self.path / "predictions.html"

    def task_evaluation(self, slug: str) -> Path:
        """One folder of answers per evaluation of a task at the end of the run."""
        return self.evaluation / "tasks" / slug

    def task_predictions(self, slug: str) -> Path:
        """The finished model's answers to a task; the page to look through them has its name."""
        return self.path / f"predictions-{slug}.jsonl"

    @property
    def export(self) -> Path:
        """The folder that opens through both doors."""
        return self.path / "export"

    @property
    def record(self) -> Path:
        """What the model card is made from."""
        return self.path / "record.json"

    @property
    def summary(self) -> Path:
        """Written last: a run that has it is finished."""
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.path / "report.html"

    def stage(self, name: str, stages: Iterable[str]) -> StageFolder:
        """The folder of a stage, by its place among the recipe's stages."""
        return StageFolder(self.path / "stages" / f"{list(stages).index(name) + 1}-{name}")

    def has_begun(self) -> bool:
        """Whether any stage has saved."""
        stages = self.path / "stages"
        return any(stages.glob("*/checkpoint-*")) or any(stages.glob(f"*/{_FINAL}"))

    def is_claimed(self) -> bool:
        """Whether a run works in the folder."""
        try:
            with (self.path / _LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    @contextmanager
    def claimed(self, recipe: Recipe, *, is_main: bool) -> Iterator[None]:
        """Hold the folder for this run alone, and remove the clock file that a killed run left half written.

        Raises:
            UserError: another process holds it, it can't be written, or it belongs to another recipe.
        """
        if not is_main:
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / _LOCK).open("w")
        except OSError as error:
            raise UserError(
                f"cannot be written: {error.strerror}", where=str(self.path), fix="choose another --output"
            ) from None
        with lock:
            try:
                _lock(lock)
            except BlockingIOError:
                raise UserError(
                    "another run is using this folder",
                    where=str(self.path),
                    fix="wait for it, or choose another --output",
                ) from None
            # nothing else replaces it once a run has finished; what `export` and `publish` stage here is theirs
            atomic_folders.remove(atomic_folders.staged(self.elapsed))
            self._settle_recipe(recipe)
            yield

    @contextmanager
    def clocked(self, *, is_main: bool) -> Iterator[Callable[[], float]]:
        """Gives the minutes that a run has taken, summed over all its starts."""
        file, started = self.elapsed, time.monotonic()
        before = atomic_folders.read_json(file)["minutes"] if file.is_file() else 0.0

        def minutes() -> float:
            return before + (time.monotonic() - started) / 60

        try:
            yield minutes
        finally:
            if is_main:
                try:
                    atomic_folders.write_json(file, {"minutes": minutes()})
                except OSError as error:  # must not mask the original error
                    logger.warning("%s is not written: %s", file, error)

    def refuse_other(self, recipe: Recipe) -> None:
        """Refuse another recipe than the one that a run in this folder began with; nothing is written.

        Raises:
            UserError: naming the keys that differ.
        """
        if self.recipe.is_file() and self.has_begun():
            self._refuse_changes(self._recipe_before(), recipe.model_dump(mode="json"))

    def _settle_recipe(self, recipe: Recipe) -> None:
        """Write down what the folder is for; before the first checkpoint of a run it may still change."""
        now = recipe.model_dump(mode="json")
        before = self._recipe_before() if self.recipe.is_file() else now
        if self.has_begun():
            self._refuse_changes(before, now)
        elif before["model"] != now["model"] or before["seed"] != now["seed"]:
            atomic_folders.remove(self.base)
        atomic_folders.write_json(self.recipe, now)

    def _recipe_before(self) -> dict[str, Any]:
        """The recipe that a run began with; keys that are newer than it have their defaults."""
        before = atomic_folders.read_json(self.recipe)
        try:
            return Recipe.model_validate(before).model_dump(mode="json")
        except ValidationError:
            return before

    def _refuse_changes(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        free = (*_UNTRAINED, *CHANGEABLE)
        # runs/inputs.py compares the contents, wherever they are
        moved = _PLACES if self.inputs.is_file() else _NOTHING
        before, now = before | {"publish": None}, now | {"publish": None}  # does not change the training
        changes = [
            change
            for change in _differences(before, now)
            if change[0].rpartition(".")[2] not in free and not moved.fullmatch(change[0])
        ]
        if changes:
            listed = "; ".join(f"{key}: {old!r} -> {new!r}" for key, old, new in changes[:5])
            more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
            raise UserError(
                f"this run began with another recipe: {listed}{more}",
                where=str(self.path),
                fix="choose another --output, or undo the change",
            )


def _lock(file: IO[str]) -> None:
    """Lock a file for this process alone; one that looks whether it is locked lets go at once."""
    for pause in (0.02, 0.2, None):
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if pause is None:
                raise
            time.sleep(pause)


def _differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from _differences(old, new, f"{key}.{number}")
    elif before != now:
        yield key, before, now
