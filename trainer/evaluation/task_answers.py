"""Answers and questions of a task from its files: whatever program wrote them, and wherever the labels are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.answer_files import (
    ANSWERS,
    NORMALIZED_NOTE,
    SAMPLES,
    AnswerRows,
    Reading,
    in_order,
    read_answer_rows,
)
from llava_llama31.trainer.evaluation.answer_matching import match_answers, place_answers, refuse_questions
from llava_llama31.trainer.evaluation.questions import Question
from llava_llama31.trainer.evaluation.row_files import Row, any_rows
from llava_llama31.trainer.evaluation.task_files import Task
from llava_llama31.trainer.evaluation.task_questions import (
    DOC_ID,
    holds_questions,
    labels_note,
    layout_size,
    load_task_questions,
)


IMAGES_NOTE = "lmms-eval's samples do not say which questions have an image; all of them count"


@dataclass(frozen=True)
class TaskAnswers:
    """An answer file of a task.

    Args:
        layout: what it was recognised as.
        rows: {question_id, answer} or {question_id, answer: None, error}.
        note: what has to be known about its score.
        questions: all annotated questions.
    """

    layout: str
    rows: list[dict[str, Any]]
    note: str
    questions: list[Question]


def read_task_answers(
    task: Task, path: str | Path, *, annotations: str | None, questions: str | None, reading: Reading
) -> TaskAnswers:
    """Read answers, and the annotated questions they belong to.

    Args:
        task: what was asked.
        path: the answers.
        annotations: file or folder of the annotated questions; not needed where the answers' rows hold them.
        questions: LLaVA's question file, which says image and category of its ids; or a file that has the answers too.
        reading: which fields and rows of `path` count.

    Raises:
        UserError: a file cannot be read, there are no annotations, or answers and annotations are not of one revision.
    """
    file = read_answer_rows(path, reading)
    _refuse_annotations(file, annotations or questions or task.data)
    if task.units == "circular" and "hit" in file.source[0][1]:
        what = "this is VLMEvalKit's result file, whose rows are whole questions; its turns are in the prediction file"
        raise UserError(what, where=str(path), fix="pass the .xlsx without _result in its name")
    if questions is not None and holds_questions(task, list(any_rows(Path(questions)))):
        annotations, questions = annotations or questions, None
    elif questions is not None and annotations is None and task.submission is not None:
        annotations, questions = questions, None  # those of a split whose answers are not public
    annotations = annotations or task.data
    normalizes = any(protocol.metric == "vqa" for protocol in task.protocols.values())
    is_about_others = file.note == NORMALIZED_NOTE and not (normalizes or task.submission is not None)
    notes = ["" if is_about_others else file.note, _protocol_note(task, file)]
    if annotations is None and questions is None:
        annotated = load_task_questions(task, _held(task, file), with_images=False)
        pairs = zip(file.answers, annotated, strict=True)
        rows = [answer.under(question.question_id) for answer, question in pairs]
        notes += [IMAGES_NOTE] if task.only_with_image and file.layout == SAMPLES else []
        notes.append(_size_note(task, file, annotated))
    else:
        annotated = load_task_questions(
            task, annotations if annotations is not None else _held(task, file), with_images=False
        )
        answers = file.answers if questions is None else place_answers(file.answers, questions)
        running = in_order(file) and questions is None
        rows = match_answers(answers, annotated, file.path, in_order=running, labels=task.labels)
        refuse_questions(file.answers, rows, annotated, file.path)
    notes += [labels_note(annotated), _categories_note(task, annotated)]
    return TaskAnswers(file.layout, rows, "; ".join(note for note in notes if note), annotated)


def _refuse_annotations(file: AnswerRows, annotations: str | None) -> None:
    """Refuse the annotated questions as answers: their `answer` is right everywhere."""
    if annotations is None or file.layout != ANSWERS:
        return
    if file.path.exists() and Path(annotations).exists() and file.path.samefile(annotations):
        fix = "pass the model's answers, or name their field: --columns id=FIELD,answer=FIELD"
        raise UserError("these are the annotated questions themselves", where=str(file.path), fix=fix)


def _protocol_note(task: Task, file: AnswerRows) -> str:
    """That a benchmark's protocols have lmms-eval's not among them."""
    named = [layout for protocol in task.protocols.values() for layout in protocol.layouts]
    is_strange = file.layout == SAMPLES and task.dataset is not None and SAMPLES not in named
    return f"lmms-eval scores {task.name} by a rule that is none of these protocols" if is_strange else ""


def _size_note(task: Task, file: AnswerRows, questions: Sequence[Question]) -> str:
    """That a file whose rows are the only questions is not of the benchmark's length."""
    size, count = layout_size(task, _held(task, file)), sum(not question.left_out for question in questions)
    if size is None or count == size or (task.only_with_image and file.layout == SAMPLES):
        return ""
    if count < size:
        return f"the file has {count:,} of {task.name}'s {size:,} questions; those it lacks are not counted as missing"
    return f"the file has {count:,} questions, and {task.name} has {size:,}"


def _categories_note(task: Task, questions: Sequence[Question]) -> str:
    """That a sum of categories lacks some, or that there is none of those that are averaged."""
    there = {group for question in questions for group in question.groups}
    for name, protocol in task.protocols.items():
        if protocol.averaged and not there & set(protocol.averaged):
            return f"no question is of a category that {name} averages, so its figure is that of all questions"
        if protocol.headline in protocol.sums:
            missing = [part for parts in protocol.sums.values() for part in parts if part not in there]
            return f"no question is of {', '.join(missing)}, so the sums lack them" if missing else ""
    return ""


def _held(task: Task, file: AnswerRows) -> Sequence[Row]:
    """Questions that the answers' rows hold, one a row."""
    rows = file.source
    if file.layout == SAMPLES:
        docs = [(where, row.get("doc"), row.get("doc_id")) for where, row in rows]
        rows = [(where, {DOC_ID: doc_id, **doc}) for where, doc, doc_id in docs if isinstance(doc, dict)]
    if len(rows) < len(file.source) or not holds_questions(task, rows, annotated=task.submission is None):
        what = f"the rows hold no annotated answers of {task.name}"
        raise UserError(what, where=str(file.path), fix="pass the task's annotations with --annotations")
    return rows
