"""Prediction files: JSON Lines that grow batch by batch and survive a kill, and those that others wrote."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.questions import Question, json_lines


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


def read_predictions(path: str | Path, questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Rows {question_id, answer} or {question_id, error}: ours, or LLaVA's answers (which name the picture instead).

    Raises:
        UserError: a row without question_id or answer, or LLaVA's answers in another order than the questions.
    """
    rows = []
    for where, row in json_lines(Path(path)):
        if "question_id" not in row or not {"answer", "text", "error"} & row.keys():
            fix = 'one {"question_id": ..., "answer": "..."} a line'
            raise UserError("no question_id, or no answer", where=where, fix=fix)
        rows.append(row)
    if all("text" in row and "answer" not in row for row in rows):
        if [str(row["question_id"]) for row in rows] != [question.image_id for question in questions]:
            raise UserError(
                "LLaVA's answers name pictures, and these are not the annotated pictures in the same order",
                where=str(path),
                fix="pass the annotations that the answers were made for",
            )
        pairs = zip(questions, rows, strict=True)
        rows = [{"question_id": question.question_id, "answer": row["text"]} for question, row in pairs]
    return rows
