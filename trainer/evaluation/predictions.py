"""Prediction files: JSON Lines that grow batch by batch and survive a kill."""

import fcntl
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from llava_llama31.trainer.checkpoint.run_folder import PREDICTIONS
from llava_llama31.trainer.errors import UserError, naming


if TYPE_CHECKING:
    from accelerate import PartialState


SETTINGS = "settings.json"
_DAMAGED = "remove that line, or this folder, or pass another --output"


class PredictionsFile:
    """The answers of one evaluation, in a folder with the settings they were made with.

    Answers are written a batch at a time, and only whole batches outlive a kill. Batches do not depend on the number
    of processes, so an evaluation that resumes with more or fewer of them asks in the same ones. The first process
    writes to predictions.jsonl, each other one to a file beside it, and `finish` merges them.

    Args:
        folder: made if it is not there.
        settings: everything that the answers depend on.
        batches: question ids that are answered together.
        processes: those that evaluate together; all of them have to come here. Default: this one alone.
        check: called with each answered row that is kept; raises if it was made from something else.

    A batch with a question that failed counts as not asked, so that what was fixed is tried again.

    Raises:
        UserError: the folder holds answers made with other settings, or another evaluation writes there now.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: dict[str, Any],
        batches: Sequence[Sequence[int | str]],
        processes: "PartialState | None" = None,
        check: Callable[[dict[str, Any]], None] | None = None,
    ):
        self.path = Path(folder, PREDICTIONS)
        self._processes = processes
        self._rank = processes.process_index if processes else 0
        self._lock: IO[str] | None = None
        if self._rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._check_settings(settings)
            self._lock = self._claim()
            answered = {key: row for key, row in self._rows().items() if row["answer"] is not None}
            if check is not None:
                for row in answered.values():
                    self._check_row(check, row)
            whole = [batch for batch in batches if all(question_id in answered for question_id in batch)]
            self._write([answered[question_id] for batch in whole for question_id in batch])
        self._wait()
        rows = self._rows()
        self.num_answered = sum(len(batch) for batch in batches if batch[0] in rows)
        # every other process reads before the first one appends
        self._wait()
        self.left = [batch for batch in batches if batch[0] not in rows]
        """Batches that no process has answered; the processes share them."""
        path = self.path.with_name(f"predictions.{self._rank}.jsonl") if self._rank else self.path
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write one batch of rows, out of the process before the next batch begins."""
        with naming(Path(self._file.name)):
            self._file.write(_lines(rows))
            self._file.flush()
        self.num_answered += len(rows)

    def finish(self, question_ids: Sequence[int | str]) -> list[dict[str, Any]]:
        """All rows in the order of `question_ids`, in the file too, once every process has written its own."""
        self._file.close()
        self._wait()
        rows = self._rows()
        ordered = [rows[question_id] for question_id in question_ids]
        self._wait()
        if self._rank == 0:
            self._write(ordered)
        self._wait()
        return ordered

    def __enter__(self) -> "PredictionsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        except OSError:  # of a full disk: what could not be written then cannot be now
            if error is None:
                raise
        finally:
            if self._lock is not None:
                self._lock.close()

    def _claim(self) -> IO[str]:
        """A lock that this process holds until it ends."""
        lock = self.path.with_name(SETTINGS).open()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = "another evaluation writes into this folder"
            raise UserError(what, where=str(self.path.parent), fix="wait for it, or pass another --output") from None
        return lock

    def _rows(self) -> dict[int | str, dict[str, Any]]:
        """Whole lines of all processes by question id."""
        rows = {}
        for path in (self.path, *self.path.parent.glob("predictions.*.jsonl")):
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            for number, line in enumerate(lines, 1):
                if line.endswith(b"\n"):
                    row = _parsed(line, f"{path}:{number}")
                    rows[row["question_id"]] = row
        return rows

    def _check_row(self, check: Callable[[dict[str, Any]], None], row: dict[str, Any]) -> None:
        try:
            check(row)
        except UserError as error:
            raise UserError(error.what, where=str(self.path), fix=error.fix) from error

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Make `rows` all there is; whenever it is killed, nothing that was there is lost."""
        partial = self.path.with_suffix(".partial")
        try:
            with naming(partial):
                partial.write_text(_lines(rows), encoding="utf-8", errors="backslashreplace")
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        os.replace(partial, self.path)
        for path in self.path.parent.glob("predictions.*.jsonl"):
            path.unlink()

    def _wait(self) -> None:
        if self._processes is not None:
            self._processes.wait_for_everyone()

    def _check_settings(self, settings: dict[str, Any]) -> None:
        path = self.path.with_name(SETTINGS)
        if path.exists():
            found = _object(path.read_bytes(), str(path))
            differing = sorted(key for key in settings.keys() | found.keys() if settings.get(key) != found.get(key))
            if differing:
                what = f"holds answers made with another {', '.join(differing)}"
                raise UserError(what, where=str(path.parent), fix="pass another --output, or remove this folder")
        elif self.path.exists():
            raise UserError(f"holds answers, but no {SETTINGS}", where=str(path.parent), fix="pass another --output")
        else:
            partial = path.with_suffix(".partial")
            with naming(partial):
                partial.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(partial, path)


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    """A row of an earlier run."""
    row = _object(line, where)
    if not isinstance(row.get("question_id"), int | str) or "answer" not in row:
        raise UserError("not a row of an evaluation", where=where, fix=_DAMAGED)
    return row


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"not JSON: {error}", where=where, fix=_DAMAGED) from error
    if not isinstance(value, dict):
        raise UserError("not a JSON object", where=where, fix=_DAMAGED)
    return value


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    # a lone surrogate is written as its JSON escape
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
