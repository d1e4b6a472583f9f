"""The page to browse the answers of a task: values by each of its protocols, and what they cut out of an answer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_llama31.trainer.evaluation.browser import CUT, IMAGE_SIDE, Browser, Marking, write_browser
from llava_llama31.trainer.evaluation.judging import Judge, judge_of
from llava_llama31.trainer.evaluation.questions import Question
from llava_llama31.trainer.evaluation.task_files import Task


def write_task_browser(
    task: Task,
    questions: Sequence[Question],
    rows: Iterable[Mapping[str, Any]],
    path: Path,
    *,
    note: str = "",
    image_side: int = IMAGE_SIDE,
    on_progress: Callable[[int, int], None] | None = None,
) -> Browser:
    """Write the browser of a task's answers, as `write_browser` does it for TextVQA's.

    Raises:
        UserError: as `write_browser`, or a user's function cannot be had.
    """
    return write_browser(
        questions,
        rows,
        path,
        title=task.title,
        note=note,
        image_side=image_side,
        on_progress=on_progress,
        marking=marking_of(task),
    )


def marking_of(task: Task) -> Marking:
    """How a task's protocols mark an answer."""
    judges = {name: (rules.rule, judge_of(task, rules)) for name, rules in task.protocols.items()}

    def mark(question: Question, row: Mapping[str, Any] | None) -> dict[str, Any]:
        facts = {"options": [list(option) for option in question.options], "groups": list(question.groups)}
        facts = {name: values for name, values in facts.items() if values}
        if row is None or row.get("answer") is None:
            error = "no row answers this question" if row is None else str(row.get("error", "no answer"))
            return facts | {"error": error, "answers": [_shown(question, text) for text in question.answers]}
        answer, done = str(row["answer"]), row.get("normalized")
        entry = facts | {"prediction": answer}
        if row.get("ended") == CUT:
            entry["cut"] = True
        if not question.answers or not judges:  # nothing to compare with
            return entry | {"answers": []}
        judged = [judge(question, answer, done == rule) for rule, judge in judges.values()]
        said = [judgement.said for judgement in judged]
        entry["scores"] = [judgement.value for judgement in judged]
        return entry | ({"said": said} if any(said) else {}) | {"answers": _answers(question, answer, judges, done)}

    return Marking(tuple(task.protocols), mark, "mean score")


def _answers(
    question: Question, answer: str, judges: Mapping[str, tuple[str, Judge]], done: object
) -> list[dict[str, Any]]:
    """The annotated answers, each with whether the prediction is right by it alone under each protocol."""
    times = {text: question.answers.count(text) for text in question.answers}
    shown = []
    for text, count in sorted(times.items(), key=lambda item: -item[1]):
        alone = replace(question, answers=(text,))
        matches = [judge(alone, answer, done == rule).value == 1 for rule, judge in judges.values()]
        shown.append(_shown(question, text) | {"count": count, "matches": matches})
    return shown


def _shown(question: Question, text: str) -> dict[str, Any]:
    option = dict(question.options).get(text)
    return {"text": text if option is None else f"{text}. {option}", "count": 1}
