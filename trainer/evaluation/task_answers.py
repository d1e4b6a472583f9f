"""Answers and questions of a task from its files: whatever program wrote them, and wherever the labels are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.answer_files import (
    ANSWERS,
    EVALSCOPE,
    MODEL,
    NORMALIZED_NOTE,
    SAMPLES,
    AnswerRows,
    Reading,
    in_order,
    read_answer_rows,
)
from llava_llama31.trainer.evaluation.answer_matching import match_answers, place_answers, refuse_questions
from llava_llama31.trainer.evaluation.questions import Question, vqa_pair
from llava_llama31.trainer.evaluation.row_files import Row, any_rows
from llava_llama31.trainer.evaluation.task_files import Task
from llava_llama31.trainer.evaluation.task_questions import (
    DOC_ID,
    holds_questions,
    labels_note,
    layout_of,
    load_task_questions,
    needs_categories,
    second_id,
    turns_note,
)
from llava_llama31.trainer.evaluation.vqa_accuracy import is_normalized


NORMALIZED_LABELS_NOTE = (
    "lmms-eval's samples hold the annotated answers in a normal form, in which {rule} compares them; the scores under "
    "the other protocols are not those of the annotators' own words: pass the annotations with --annotations for these"
)
IMAGES_NOTE = "lmms-eval's samples do not say which questions have an image; all of them count"


@dataclass(frozen=True)
class TaskAnswers:
    """An answer file of a task.

    Args:
        task: the task, without the protocols that need categories where the file has none.
        layout: what it was recognised as.
        rows: {question_id, answer} or {question_id, answer: None, error}.
        note: what has to be known about its score.
        questions: all annotated questions.
    """

    task: Task
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
        questions: LLaVA's question file, which says image and category of its ids; the questions of VQA's annotations;
            or a file that has the answers too.
        reading: which fields and rows of `path` count.

    Raises:
        UserError: a file cannot be read, there are no annotations, or answers and annotations are not of one revision.
    """
    file = read_answer_rows(path, reading)
    if task.units == "circular" and "hit" in file.source[0][1]:
        what = "this is VLMEvalKit's result file, whose rows are whole questions; its turns are in the prediction file"
        raise UserError(what, where=str(path), fix="pass the .xlsx without _result in its name")
    if questions is not None and holds_questions(task, list(any_rows(Path(questions)))):
        annotations, questions = annotations or questions, None
    elif questions is not None and annotations is None and task.submission is not None:
        annotations, questions = questions, None  # those of a split whose answers are not public
    annotations = annotations or task.data
    source: str | Sequence[Row] | None = annotations
    normalizes = any(protocol.metric == "vqa" for protocol in task.protocols.values())
    if annotations is not None and normalizes:
        pair = vqa_pair(annotations, questions)
        source, questions = (pair, None) if pair else (annotations, questions)
    about_others = () if normalizes or task.submission is not None else (NORMALIZED_NOTE,)
    notes = [*(note for note in file.notes if note not in about_others), _protocol_note(task, file)]
    if source is None and questions is None:
        task, left_out = _without_categories(task, file)
        notes.append(left_out)
        annotated = load_task_questions(task, _held(task, file), with_images=False)
        annotated, normal = _as_lmms_eval_keeps(task, file, annotated)
        notes.append(normal)
        pairs = zip(file.answers, annotated, strict=True)
        rows = [answer.under(question.question_id) for answer, question in pairs]
        notes += [IMAGES_NOTE] if task.only_with_image and file.layout == SAMPLES else []
        notes.append(_size_note(task, file, annotated))
    else:
        annotated = load_task_questions(task, _held(task, file) if source is None else source, with_images=False)
        answers = file.answers if questions is None else place_answers(file.answers, questions)
        running = in_order(file) and questions is None
        rows = match_answers(answers, annotated, file.path, in_order=running, labels=task.labels)
        refuse_questions(file.answers, rows, annotated, file.path)
    notes.append(_refuse_labels(task, file, rows, annotated))
    rows = _listed_twice(task, rows, annotated)
    notes += [labels_note(annotated), turns_note(task, annotated), _categories_note(task, annotated)]
    return TaskAnswers(task, file.layout, rows, "; ".join(note for note in notes if note), annotated)


def _refuse_labels(
    task: Task, file: AnswerRows, rows: Sequence[Mapping[str, Any]], questions: Sequence[Question]
) -> str:
    """Refuse a benchmark's own rows, whose `answer` is the annotators' and would be right in every row.

    Returns:
        A note where a column of a model's words says no more than the annotators' does; else an empty text.
    """
    if (file.layout == ANSWERS and MODEL in file.source[0][1]) or not holds_questions(task, file.source):
        return ""
    annotated = {str(question.question_id): question.answers for question in questions}
    said = [(str(row["answer"]).strip().casefold(), annotated.get(str(row["question_id"]), ())) for row in rows]
    if not all(answer in _spellings(answers) for answer, answers in said):
        return ""
    if file.layout != ANSWERS:
        return f"the answer of each of {len(rows)} rows is the annotated one, letter for letter"
    what = f"these are labels: the answer of each of {len(rows)} rows is the annotated one"
    fix = "pass the model's answers; if these are, call the field prediction instead of answer"
    raise UserError(what, where=str(file.path), fix=fix)


def _spellings(answers: Sequence[str]) -> list[str]:
    """What a column of annotated answers says: one of them, or all as Python writes a list."""
    return [answer.strip().casefold() for answer in (*answers, str(list(answers)))]


def _listed_twice(task: Task, rows: list[dict[str, Any]], questions: Sequence[Question]) -> list[dict[str, Any]]:
    """The rows, where a question that the benchmark lists twice has one answer: its last, for both.

    Rows that name the second one themselves keep both answers, as those of `evaluate` do.
    """
    last = {str(row["question_id"]): row for row in rows if str(row["question_id"]) in task.listed_twice}
    seconds = {second_id(key): row for key, row in last.items()}
    lacking = {str(question.question_id) for question in questions} - {str(row["question_id"]) for row in rows}
    kept = [row for row in rows if last.get(str(row["question_id"]), row) is row]
    return kept + [row | {"question_id": key} for key, row in seconds.items() if key in lacking]


def _without_categories(task: Task, file: AnswerRows) -> tuple[Task, str]:
    """The task without protocols that need categories, which lmms-eval's samples of POPE do not say, and a note."""
    left_out = [name for name, protocol in task.protocols.items() if needs_categories(protocol)]
    if file.layout != SAMPLES or not left_out or layout_of(task, _held(task, file)).groups:
        return task, ""
    kept = {name: protocol for name, protocol in task.protocols.items() if name not in left_out}
    what = f"lmms-eval's samples do not say the categories, which {', '.join(left_out)} need"
    return task.model_copy(update={"protocols": kept}), f"{what}: pass the Hub's files with --annotations for these"


def _protocol_note(task: Task, file: AnswerRows) -> str:
    """That a benchmark's protocols have lmms-eval's or EvalScope's not among them."""
    named = [layout for protocol in task.protocols.values() for layout in protocol.layouts]
    if task.dataset is None or file.layout in named:
        return ""
    if file.layout == SAMPLES:
        return f"lmms-eval scores {task.name} by a rule that is none of these protocols"
    return "none of these protocols is EvalScope's" if file.layout == EVALSCOPE else ""


def _size_note(task: Task, file: AnswerRows, questions: Sequence[Question]) -> str:
    """That a file whose rows are the only questions is not of the benchmark's length."""
    size, count = layout_of(task, _held(task, file)).size, sum(not question.left_out for question in questions)
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


def _document(row: Mapping[str, Any], *, unscored: bool) -> dict[str, Any] | None:
    """The question that a row of lmms-eval's samples holds; None if it holds none.

    Since its 0.4 that is the prompt (`input`), the annotated answer (`target`) and what the metrics keep of the
    question, such as MME's category. A target is always a text: `None` where the answers are not public (`unscored`).
    """
    doc, number = row.get("doc"), row.get("doc_id")
    if isinstance(doc, dict):
        return {DOC_ID: number, **doc}
    if number is None or not {"input", "target"} <= row.keys():
        return None
    metrics = {name: value for name, value in row.items() if isinstance(value, dict)}
    kept = {name: value for held in metrics.values() for name, value in held.items()}
    target = None if unscored and row["target"] == "None" else row["target"]
    return {**row, **kept, "metrics": ", ".join(sorted(metrics)), DOC_ID: number, "target": target}


def _as_lmms_eval_keeps(task: Task, file: AnswerRows, questions: list[Question]) -> tuple[list[Question], str]:
    """The questions of lmms-eval's samples of VQA, whose annotated answers it normalised before it wrote them; a note.

    A second normalisation would make another text of some, as for its submissions.
    """
    protocols = task.protocols.values() if file.layout == SAMPLES else ()
    rules = [protocol.rule for protocol in protocols if file.layout in protocol.layouts and protocol.metric == "vqa"]
    if not rules or not all(is_normalized(answer, rules[0]) for q in questions for answer in q.answers):
        return questions, ""
    note = NORMALIZED_LABELS_NOTE.format(rule=rules[0])
    return [replace(question, answers_normalized=rules[0]) for question in questions], note


def _held(task: Task, file: AnswerRows) -> Sequence[Row]:
    """Questions that the answers' rows hold, one a row."""
    rows = file.source
    if file.layout == SAMPLES:
        docs = [(where, _document(row, unscored=task.submission is not None)) for where, row in rows]
        rows = [(where, doc) for where, doc in docs if doc is not None]
    if len(rows) < len(file.source) or not holds_questions(task, rows, annotated=task.submission is None):
        what = f"the rows hold no annotated answers of {task.name}"
        raise UserError(what, where=str(file.path), fix="pass the task's annotations with --annotations")
    return rows
