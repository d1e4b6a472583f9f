"""Pushes a run's saves to the Hub in the background; training never waits for a push or fails with it."""

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.publishing.hub_calls import redact
from llava_llama31.trainer.publishing.interim import CHECKPOINT, JOB
from llava_llama31.trainer.publishing.staging import link
from llava_llama31.trainer.recipes.schema import Recipe, Stage


logger = logging.getLogger(__name__)

FOLDER, OUTCOME = "interim", "pushed.json"
# time limits of one push, and of all remaining pushes when the run ends
LONGEST_PUSH_S, LONGEST_END_S = 7200.0, 1800.0
# a launcher's variables, which a pushing process must not inherit
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHERS = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "PET_")


class Pusher:
    """Pushes one save at a time; meanwhile only the newest waits, and the saves it replaces are reported as skipped.

    A failed push is retried at the end, unless a newer save has replaced it. The next run resumes what a killed run
    left.

    Args:
        folder: for pending pushes: hard links to the checkpoint, and the model made from it.
        job: settings that all pushes share.
        say: prints a line for the user.
    """

    def __init__(self, folder: Path, job: dict[str, Any], say: Callable[[str], None]):
        self.folder, self.job, self.say = folder, job, say
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._failed: Path | None = None
        self._process: subprocess.Popen[str] | None = None
        self._closing = self._killed = False
        folder.mkdir(parents=True, exist_ok=True)
        outcome = folder / OUTCOME
        self.outcome: dict[str, Any] = {"pushed": {}, "skipped": [], "failed": {}}
        if outcome.is_file():
            self.outcome = atomic_folders.read_json(outcome)
        for left in sorted(folder.glob(f"*/{JOB}"), key=lambda file: file.stat().st_mtime):
            self._put(left.parent)
        for broken in (path for path in folder.iterdir() if path.is_dir() and not (path / JOB).is_file()):
            atomic_folders.remove(broken)
        self._thread = threading.Thread(target=self._work, name="pusher", daemon=True)
        self._thread.start()

    def add(self, checkpoint: Path, stage_name: str, step: int, stage: Stage, origin: Path) -> None:
        """Queue a save; errors are recorded, never raised."""
        job = self.folder / f"{stage_name}-step-{step}"
        facts = {"stage_name": stage_name, "step": step, "stage": stage.model_dump(mode="json"), "origin": str(origin)}
        try:
            atomic_folders.remove(job)
            shutil.copytree(checkpoint, job / CHECKPOINT, copy_function=link)
            atomic_folders.write_json(job / JOB, {**self.job, **facts})
        except OSError as error:
            self._note_failure(job, str(error))
            return
        with self._changed:
            self._put(job)
            self._changed.notify()

    def close(self, *, finish: bool) -> dict[str, Any]:
        """Push what remains within the time limit, or with `finish=False` end at once; returns the outcome."""
        with self._changed:
            self._closing, self._killed = True, not finish
            if finish and self._waiting is None:
                self._waiting, self._failed = self._failed, None
            self._end_process()
            self._changed.notify()
        self._thread.join(LONGEST_END_S if finish else None)
        with self._changed:
            self._killed = True
            self._end_process()
        self._thread.join()
        if finish:
            for path in (path for path in self.folder.iterdir() if path.is_dir()):
                atomic_folders.remove(path)
        return self.outcome

    def _end_process(self) -> None:
        if self._killed and self._process is not None:
            self._process.kill()

    def _put(self, job: Path) -> None:
        """Queue the newest save in place of earlier ones."""
        for older in (self._waiting, self._failed):
            if older is not None and older != job:
                self.outcome["failed"].pop(older.name, None)
                self.outcome["skipped"].append(older.name)
                atomic_folders.remove(older)
                self.say(f"{older.name} is not pushed: a newer save replaces it")
        self._waiting, self._failed = job, None

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None and not self._closing:
                    self._changed.wait()
                if self._waiting is None or self._killed:
                    return
                job, self._waiting = self._waiting, None
            self._push(job)

    def _push(self, job: Path) -> None:
        try:
            result = self._run(job)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            with self._changed:
                if self._waiting is None:
                    self._failed = job
            self._let_go(job)
            self._note_failure(job, str(error))
            return
        self._let_go(job)
        self.outcome["failed"].pop(job.name, None)
        self.outcome["pushed"][result["tag"]] = result["revision"]
        self._write()
        self.say(f"{job.name} is on the Hub: {self.job['repo_id']}@{result['tag']}")

    def _let_go(self, job: Path) -> None:
        with self._changed:
            if job not in (self._waiting, self._failed):  # a resumed run may save the same step again
                atomic_folders.remove(job)

    def _run(self, job: Path) -> dict[str, str]:
        """Push a job in a separate process, isolated in memory and failure; returns tag and commit."""
        with self._changed:
            if self._killed:
                raise ValueError("the run ended before it was pushed")
            self._process = subprocess.Popen(
                self._command(job),
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C must reach only the training
            )
        try:
            output, errors = self._process.communicate(timeout=LONGEST_PUSH_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise ValueError(f"it took longer than {LONGEST_PUSH_S:.0f} s") from None
        if self._process.returncode != 0:
            raise ValueError((errors.strip() or "the process was killed").splitlines()[-1])
        return json.loads(output.splitlines()[-1])

    def _command(self, job: Path) -> list[str]:
        return [sys.executable, "-m", "llava_llama31.trainer.publishing.interim", str(job.resolve())]

    def _note_failure(self, job: Path, reason: str) -> None:
        reason = redact(reason)
        self.outcome["failed"][job.name] = reason
        self._write()
        logger.warning("%s was not pushed, training continues: %s", job.name, reason)

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            atomic_folders.write_json(self.folder / OUTCOME, self.outcome)


@contextmanager
def pushing(
    recipe: Recipe, output: Path, record: dict[str, Any] | None, say: Callable[[str], None]
) -> Iterator[Pusher | None]:
    """Context in which saves go to the Hub if the recipe asks for it; `record` is None on all ranks but 0."""
    spec = recipe.publish
    if spec is None or spec.hub_strategy == "end" or record is None:
        yield None
        return
    job = {
        "repo_id": spec.repo_id,
        "private": spec.private,
        "with_state": spec.hub_strategy == "checkpoint",
        "dtype": recipe.model.dtype,
        "seed": recipe.seed,
        "record": record,
        "resume": "nothing to do, it is retried",
    }
    pusher = Pusher(output / FOLDER, job, say)
    try:
        yield pusher
    finally:
        pusher.close(finish=False)


def _environment() -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if name not in LAUNCHED and not name.startswith(LAUNCHERS)
    }
    return kept | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
