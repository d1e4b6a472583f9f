"""Annotated answers that their metric cannot compare, named before a question is asked or an answer is scored."""

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.metrics.yes_no import NO, YES
from llava_llama31.trainer.evaluation.questions import Question
from llava_llama31.trainer.evaluation.task_files import Layout, Task
from llava_llama31.trainer.strict_json import parse_json


def check_annotated(task: Task, layout: Layout, question: Question, where: str, *, normalized: bool = False) -> None:
    """Refuse a question whose annotated answer is of another kind than its metric compares.

    Args:
        task: names the metrics, where the question does not.
        layout: says whether there are options.
        question: with its annotated answers; one without any is not looked at.
        where: its place.
        normalized: a VQA rule may have normalised the answers, which leaves nothing of the word `a`.

    Raises:
        UserError: an answer, yes or no, a JSON object, options or a text to look for is not there.
    """
    if not question.answers:
        return
    if question.metric:
        _check_own(layout, question, where)
    metrics = {question.metric} if question.metric else {protocol.metric for protocol in task.protocols.values()}
    answers = question.answers
    shown = f"{layout.answer} is {', '.join(map(repr, answers)):.80}"
    # an empty page has an empty text, and a function may know better
    may_be_empty = metrics & {"cer", "wer", "function", "contains"} or (normalized and metrics == {"vqa"})
    if not any(answer.strip() for answer in answers) and not may_be_empty:
        raise UserError(f"{shown}: the question has no answer", where=where, fix="give one, or remove the row")
    if "yes_no" in metrics and (len(answers) > 1 or answers[0].strip().lower() not in (YES, NO)):
        raise UserError(f"{shown}, and the metric is yes_no", where=where, fix="give yes or no")
    if "fields" in metrics and not (len(answers) == 1 and _is_object(answers[0])):
        raise UserError(f"{shown}, and the metric is fields", where=where, fix="give one JSON object")
    if "contains" in metrics and not all(answer.strip() for answer in answers):
        fix = "give the text that a right answer contains"
        raise UserError(f"{shown}: every answer contains an empty text", where=where, fix=fix)
    if "choice" in metrics and not question.options and (question.metric or layout.options is None):
        fix = "give the options in columns A, B, ..., or in a task file as its layout's options"
        raise UserError("the metric is choice, and the question has no options", where=where, fix=fix)


def _check_own(layout: Layout, question: Question, where: str) -> None:
    """Refuse what no answer could be right for, in questions that name their metric themselves."""
    answers, letters = question.answers, [letter for letter, _ in question.options]
    shown = f"{layout.answer} is {', '.join(map(repr, answers)):.80}"
    if question.metric != "contains" and not any(answer.strip() for answer in answers):
        raise UserError(f"{shown}: the question has no answer", where=where, fix="give one, or remove the row")
    if question.metric == "choice" and letters and not (len(answers) == 1 and answers[0] in letters):
        what = f"{shown}, and the options are {', '.join(letters)}"
        raise UserError(what, where=where, fix="give the letter of the right option")


def _is_object(text: str) -> bool:
    try:
        return isinstance(parse_json(text), dict)
    except (ValueError, RecursionError):
        return False
