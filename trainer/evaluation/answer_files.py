"""Answer files to be scored: ours, and those that LLaVA's scripts, lmms-eval and VLMEvalKit write."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.questions import Question
from llava_llama31.trainer.evaluation.row_files import Row, json_lines, json_objects, json_value, tsv_rows, xlsx_rows
from llava_llama31.trainer.evaluation.vqa_accuracy import is_normalized


ANSWERS, LLAVA, SAMPLES, SUBMISSION, VLMEVALKIT = (
    "question ids and answers",
    "LLaVA's answers",
    "lmms-eval's samples",
    "lmms-eval's submission",
    "VLMEvalKit's predictions",
)
# what VLMEvalKit writes in the place of an answer (`INFER_FAIL_MSG` in its vlmeval/smp/file.py)
VLMEVALKIT_FAILED = "Failed to obtain answer"
NORMALIZED_NOTE = (
    "these answers are in m4c's normal form already, as lmms-eval writes them: m4c compares them as they stand; the "
    "scores under the other protocols are not those of the model's own words, which lmms-eval's --log_samples keeps"
)


@dataclass(frozen=True)
class AnswerFile:
    """The answers of a file, in one form whoever wrote it.

    Args:
        layout: what the file was recognised as.
        rows: {question_id, answer}, or {question_id, answer: None, error} where there is none, in the order of the
            file; `normalized` names the protocol whose normal form an answer is in already.
        note: what has to be known about a score of this file; empty where there is nothing to say.
    """

    layout: str
    rows: list[dict[str, Any]]
    note: str = ""


def read_predictions(path: str | Path, questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Rows {question_id, answer} or {question_id, error} of any file that `read_answers` reads."""
    return read_answers(path, questions).rows


def read_answers(path: str | Path, questions: Sequence[Question]) -> AnswerFile:
    """Read an answer file and say which question each answer belongs to.

    | written by | what the file holds                                                                              |
    |------------|--------------------------------------------------------------------------------------------------|
    | evaluate   | `.jsonl`, one {question_id, answer} or {question_id, error} a line                               |
    | LLaVA      | `.jsonl`, one {question_id, text} a line; the id is the image's, the order the questions'       |
    | lmms-eval  | `.json`, a list of {question_id, answer}, normalised as m4c does (`textvqa_submission_*.json`)   |
    | lmms-eval  | `.jsonl` of `--log_samples`: {filtered_resps, submission: {question_id, ...}}, the model's words |
    | VLMEvalKit | `.xlsx`, `.tsv` or `.json` with {index, question, prediction}; the index is TextVQA's            |
    |            | question_id, or else the rows have to ask the annotated questions in their order                 |

    Args:
        path: the file; its suffix says how it is read, the names of its fields what it is.
        questions: the annotated questions.

    Raises:
        UserError: the file cannot be read or is none of these, or its rows cannot be assigned to the questions.
    """
    path = Path(path)
    rows = list(_rows(path))
    if not rows:
        raise UserError("no answers", where=str(path), fix="name a file with at least one answer")
    layout = _layout(rows[0][1])
    for where, row in rows:
        if layout is None or _layout(row) != layout:
            fix = 'one {"question_id": ..., "answer": "..."} a line, or another layout of docs/evaluation.md'
            found = ", ".join(map(str, row)) or "nothing"
            expected = f", the first row those of {layout}" if layout is not None else ""
            raise UserError(f"no question_id, or no answer: the row has {found}{expected}", where=where, fix=fix)
    if layout == LLAVA:
        return AnswerFile(layout, _llava_answers(rows, questions, path))
    if layout == VLMEVALKIT:
        return AnswerFile(layout, _vlmevalkit_answers(rows, questions, path))
    if layout == SAMPLES:
        return AnswerFile(layout, [_sample(row, where) for where, row in rows])
    answers = [_answer(row, where) for where, row in rows]
    # only lmms-eval's file is a list of bare pairs; whether it is normalised is seen in the answers themselves
    bare = path.suffix.lower() == ".json" and all(row.keys() == {"question_id", "answer"} for _, row in rows)
    if bare and all(isinstance(row["answer"], str) and is_normalized(row["answer"], "m4c") for row in answers):
        return AnswerFile(SUBMISSION, [row | {"normalized": "m4c"} for row in answers], NORMALIZED_NOTE)
    return AnswerFile(ANSWERS, answers)


def _rows(path: Path) -> "list[Row] | Any":
    suffix = path.suffix.lower()
    if suffix == ".json":
        content = json_value(path)
        if not isinstance(content, list):
            what = "not a list of answers"
            raise UserError(what, where=str(path), fix="docs/evaluation.md lists the files that can be scored")
        return json_objects(content, path)
    if suffix == ".tsv":
        return tsv_rows(path)
    return xlsx_rows(path) if suffix == ".xlsx" else json_lines(path)


def _layout(row: dict[str, Any]) -> str | None:
    """What a row is by the names of its fields; None for a stranger."""
    fields = row.keys()
    if {"filtered_resps", "submission"} <= fields:
        return SAMPLES
    if "prediction" in fields and {"index", "question_id"} & fields:
        return VLMEVALKIT
    if "question_id" in fields and {"answer", "error"} & fields:
        return ANSWERS
    return LLAVA if {"question_id", "text"} <= fields else None


def _answer(row: dict[str, Any], where: str) -> dict[str, Any]:
    # what else stands in a row stays: the browser shows some of it
    answer = row.get("answer")
    return row | {
        "question_id": _id(row["question_id"], where),
        "answer": None if answer is None else _text(answer, where),
    }


def _sample(row: dict[str, Any], where: str) -> dict[str, Any]:
    submission, answer = row["submission"], row["filtered_resps"]
    while isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if not isinstance(submission, dict) or "question_id" not in submission or not isinstance(answer, str):
        fix = "pass the samples of a textvqa task"
        raise UserError("no question_id in submission, or not one text in filtered_resps", where=where, fix=fix)
    return {"question_id": _id(submission["question_id"], where), "answer": answer}


def _llava_answers(rows: list[Row], questions: Sequence[Question], path: Path) -> list[dict[str, Any]]:
    if [str(row["question_id"]) for _, row in rows] != [question.image_id for question in questions]:
        raise UserError(
            "LLaVA's answers name images, and these are not the annotated images in the same order",
            where=str(path),
            fix="pass the annotations that the answers were made for",
        )
    return [
        {"question_id": question.question_id, "answer": _text(row["text"], where)}
        for question, (where, row) in zip(questions, rows, strict=True)
    ]


def _vlmevalkit_answers(rows: list[Row], questions: Sequence[Question], path: Path) -> list[dict[str, Any]]:
    """By id where the rows that name an annotated one ask what it asks, or else by order where all rows do."""
    named = [row.get("index") if row.get("question_id") in (None, "") else row["question_id"] for _, row in rows]
    ids = [_id(question_id, where) for question_id, (where, _) in zip(named, rows, strict=True)]
    annotated = {str(question.question_id): question for question in questions}
    pairs = [(annotated.get(str(question_id)), row) for question_id, (_, row) in zip(ids, rows, strict=True)]
    known = [question is not None for question, _ in pairs]
    # a row without its question is taken at its word only if no index is unknown
    if not any(known) or not all(_asks(row, question, unsaid=all(known)) for question, row in pairs):
        ids = _ids_by_order(rows, questions, path)
    answers = []
    for question_id, (where, row) in zip(ids, rows, strict=True):
        # an empty cell is an empty answer
        text = "" if row["prediction"] is None else _text(row["prediction"], where)
        failed = text.startswith(VLMEVALKIT_FAILED)
        answers.append(
            {"question_id": question_id} | ({"answer": None, "error": text} if failed else {"answer": text})
        )
    return answers


def _ids_by_order(rows: list[Row], questions: Sequence[Question], path: Path) -> list[int | str]:
    what = "the indices are not the annotated question_ids, and the rows do not ask the annotated questions in order"
    fix = "pass the annotations that the answers were made for, or give the rows a column question_id"
    if len(rows) > len(questions):
        raise UserError(f"{what}: {len(rows)} rows for {len(questions)} questions", where=str(path), fix=fix)
    for question, (where, row) in zip(questions, rows, strict=False):
        if not _asks(row, question, unsaid=False):
            asked = f"{str(row.get('question'))!r:.80} in the place of {question.question!r:.80}"
            raise UserError(f"{what}: {asked}", where=where, fix=fix)
    return [question.question_id for question in questions[: len(rows)]]


def _asks(row: dict[str, Any], question: Question | None, *, unsaid: bool) -> bool:
    """Whether a row asks an annotated question, or one that is not annotated; `unsaid` if it does not say what."""
    text = row.get("question")
    if text is None or question is None:
        return unsaid if text is None else True
    return " ".join(str(text).split()).casefold() == " ".join(question.question.split()).casefold()


def _id(value: Any, where: str) -> int | str:
    if isinstance(value, float) and value.is_integer():
        return int(value)  # as Excel keeps numbers
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise UserError(f"question_id or index is {value!r}", where=where, fix="give a number or a text")
    return value


def _text(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"the answer is {value!r:.80}", where=where, fix="give a text")
    return str(value)
