"""Answer files to be scored: ours, and those that other evaluators write."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.questions import Question, json_lines


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
