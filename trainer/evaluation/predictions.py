"""Prediction files: JSON Lines that grow batch by batch and survive a kill."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from llava_llama31.trainer.errors import UserError


PREDICTIONS, SETTINGS = "predictions.jsonl", "settings.json"


class PredictionsFile:
    """The answers of one evaluation, in a folder with the settings they were made with.

    Opening it drops a batch that a kill cut short, so that an evaluation that goes on asks in the same batches.

    Args:
        folder: made if it is not there.
        settings: everything that the answers depend on.
        batch_size: rows that are appended together.

    Raises:
        UserError: the folder holds answers made with other settings.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], batch_size: int):
        self.path = Path(folder, PREDICTIONS)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._check_settings(settings)
        self.rows: list[dict[str, Any]] = []
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        if len(whole) < settings["num_questions"]:
            whole = whole[: len(whole) - len(whole) % batch_size]
        self.rows = [json.loads(line) for line in whole]
        # a lone surrogate is written as its JSON escape
        self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace")
        self._file.truncate(sum(map(len, whole)))

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write one batch of rows, out of the process before the next batch begins."""
        self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self._file.flush()
        self.rows += rows

    def __enter__(self) -> "PredictionsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def _check_settings(self, settings: dict[str, Any]) -> None:
        path = self.path.with_name(SETTINGS)
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            differing = sorted(key for key in settings.keys() | found.keys() if settings.get(key) != found.get(key))
            if differing:
                what = f"holds answers made with another {', '.join(differing)}"
                raise UserError(what, where=str(path.parent), fix="pass another --output, or remove this folder")
        elif self.path.exists():
            raise UserError(f"holds answers, but no {SETTINGS}", where=str(path.parent), fix="pass another --output")
        else:
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(partial, path)
