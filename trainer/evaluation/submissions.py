"""Files for the servers of benchmarks whose answers are not public, in each server's own format."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.metrics.choices import chosen_letter
from llava_llama31.trainer.evaluation.questions import Question, plain_number
from llava_llama31.trainer.evaluation.row_files import write_table
from llava_llama31.trainer.evaluation.task_files import Submission, Task
from llava_llama31.trainer.evaluation.task_scoring import Answered
from llava_llama31.trainer.evaluation.vqa_accuracy import normalize


_NAME = re.compile(r"\{([^{}]+)\}")


def submission_file(task: Task, folder: Path) -> Path:
    """Where the submission of a task's answers is written.

    Raises:
        UserError: the task has no server.
    """
    if task.submission is None:
        what = f"no server takes answers of {task.name} in a format that is known here"
        raise UserError(what, where=task.name, fix="leave --submission out, or give the task a submission")
    suffix = {"list": "json", "lines": "jsonl", "object": "json", "table": "xlsx"}[task.submission.file]
    return folder / f"{task.name}_submission.{suffix}"


def write_submission(task: Task, found: Answered, path: Path) -> list[int | str]:
    """Write the answers to all questions as the task's server takes them.

    A question without an answer gets an empty one, since servers refuse a file that leaves questions out.

    Args:
        task: says what its server takes.
        found: answers, and all questions of the split in its order.
        path: of `submission_file`, or another one with its suffix; it appears when it is complete.

    Returns:
        ids of the questions without an answer.

    Raises:
        UserError: the task has no server, or the file cannot be written.
    """
    wanted = submission_file(task, path.parent)
    assert task.submission is not None
    if path.suffix != wanted.suffix:
        what = f"the server of {task.name} takes a {wanted.suffix} file"
        raise UserError(what, where=str(path), fix=f"name it {path.with_suffix(wanted.suffix).name}")
    rows = []
    for question in found.questions:
        key = str(question.question_id)
        is_normal = found.normalized.get(key) == task.submission.normalize
        rows.append(_row(task.submission, question, found.answers.get(key, ""), is_normal=is_normal))
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if task.submission.file == "table":
            write_table(partial, rows)
        else:
            partial.write_text(_text(task.submission, rows), "utf-8", errors="backslashreplace")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(path), fix="choose another path") from error
    return [question.question_id for question in found.questions if str(question.question_id) not in found.answers]


def _text(submission: Submission, rows: Sequence[Mapping[str, Any]]) -> str:
    content: Any = rows
    if submission.file == "lines":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if submission.file == "object":
        content = {str(row["key"]): row["value"] for row in rows}
    return json.dumps(content, ensure_ascii=False) + "\n"


def _row(submission: Submission, question: Question, answer: str, *, is_normal: bool) -> dict[str, Any]:
    """One question's entry: a single name keeps its type, a text with names is filled in."""
    if submission.normalize and not is_normal:
        answer = normalize(answer, submission.normalize)
    options = dict(question.options)
    parts: dict[str, Callable[[], Any]] = {
        "question_id": lambda: question.question_id,
        "number": lambda: plain_number(str(question.question_id)),
        "image": lambda: _with_suffix(question.image_id),
        "question": lambda: question.question,
        "answer": lambda: answer,
        "letter": lambda: (
            chosen_letter(answer, dict(question.options), submission.rule) if question.options else answer
        ),
    }

    def value(name: str) -> Any:
        return parts[name]() if name in parts else options.get(name, "")

    def filled(spec: str) -> Any:
        whole = _NAME.fullmatch(spec)
        return value(whole[1]) if whole else _NAME.sub(lambda found: str(value(found[1])), spec)

    return {name: filled(spec) for name, spec in submission.fields.items()}


def _with_suffix(image_id: str) -> str:
    name = Path(image_id).name
    return name if Path(name).suffix else f"{name}.jpg"
