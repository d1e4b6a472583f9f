"""One answer against its annotation, by the metric and rule of a protocol."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.metrics import lmms_eval_choices
from llava_llama31.trainer.evaluation.metrics.choices import LETTER_ALONE, chosen_letter
from llava_llama31.trainer.evaluation.metrics.evalscope import LABEL, answer_line, answer_line_or_all
from llava_llama31.trainer.evaluation.metrics.fields import field_counts
from llava_llama31.trainer.evaluation.metrics.numbers import relaxed_accuracy
from llava_llama31.trainer.evaluation.metrics.open_answers import open_as_choice, open_match
from llava_llama31.trainer.evaluation.metrics.text import anls, contains_answer, error_counts, exact_match
from llava_llama31.trainer.evaluation.metrics.yes_no import NO, YES, yes_or_no
from llava_llama31.trainer.evaluation.questions import Question, python_list
from llava_llama31.trainer.evaluation.task_files import PER_QUESTION, ProtocolOf, Task
from llava_llama31.trainer.evaluation.user_functions import user_function
from llava_llama31.trainer.evaluation.vqa_accuracy import vqa_accuracy


@dataclass(frozen=True)
class Judgement:
    """What an answer is worth.

    Args:
        value: in [0, 1]; for error rates 1 if there is no error.
        said: what was cut out of the answer, where something was.
        counts: what is summed over questions beside the value.
    """

    value: float
    said: str = ""
    counts: Mapping[str, float] = field(default_factory=dict)


Judge = Callable[[Question, str | None, bool], Judgement]
"""Judges a question's answer, which is in the rule's normal form already if so said; None, no answer, is wrong."""


def judge_of(task: Task, protocol: ProtocolOf) -> Judge:
    """The judge of a protocol.

    Raises:
        UserError: a user's function cannot be had.
    """
    if protocol.metric == "function":
        return _by_function(user_function(protocol.rule, task.folder, task.name))
    if protocol.metric == "per_question":
        return _by_question

    def judge(question: Question, answer: str | None, normalized: bool) -> Judgement:
        return _judged(protocol, question, answer, normalized)

    return judge


def _judged(protocol: ProtocolOf, question: Question, answer: str | None, normalized: bool = False) -> Judgement:
    if protocol.reads == "stripped" and answer is not None:
        answer = answer.strip()
    if protocol.metric == "yes_no":
        return _yes_no(protocol, question, answer)
    if protocol.metric == "choice":
        return _choice(protocol.rule, question, answer)
    if protocol.metric in ("cer", "wer"):
        unit = "character" if protocol.metric == "cer" else "word"
        edits, length = error_counts(answer or "", question.answers, unit)
        return Judgement(float(answer is not None and not edits), counts={"edits": edits, "length": length})
    if protocol.metric == "fields":
        counts = field_counts(answer or "", question.answers[0], ignore_case=protocol.rule == "ignore-case")
        summed = {"matched": counts.matched, "unmatched": counts.missing + counts.extra, "exact": counts.exact}
        return Judgement(counts.f1 if answer is not None else 0.0, counts=summed)
    if answer is None:
        return Judgement(0.0)
    if protocol.reads in ("all", "stripped"):
        return Judgement(_text_value(protocol, question, answer, normalized))
    said = answer_line_or_all(answer) if protocol.reads == "answer_line_or_all" else answer_line(answer) or ""
    return Judgement(_text_value(protocol, question, said, normalized), said)


def _text_value(protocol: ProtocolOf, question: Question, answer: str, normalized: bool) -> float:
    answers = list(question.answers)
    if protocol.list_answers and len(answers) == 1:
        answers = [str(item) for item in python_list(answers[0]) or answers]
    if protocol.metric == "vqa":
        as_they_stand = question.answers_normalized == protocol.rule
        return vqa_accuracy(answer, answers, protocol.rule, normalized=normalized, answers_normalized=as_they_stand)
    if protocol.metric == "exact":
        return exact_match(answer, answers, protocol.rule)
    if protocol.metric == "contains":
        return contains_answer(answer, answers, formula=bool(set(protocol.formulas) & set(question.groups)))
    if protocol.metric == "relaxed":
        return relaxed_accuracy(answer, answers, protocol.rule)
    if protocol.metric == "anls":
        return anls(answer, answers, protocol.rule)
    raise ValueError(f"no metric is named {protocol.metric!r}")


def _choice(rule: str, question: Question, answer: str | None) -> Judgement:
    if answer is None:
        return Judgement(0.0)
    if not question.options:  # an open question among the others
        return Judgement(_open_value(rule, answer, question.answers))
    options = dict(question.options)
    if rule in LETTER_ALONE:  # right also where the table lost the option, as pandas loses `None`
        options.setdefault(question.answers[0], "")
    letter = chosen_letter(answer, options, rule)
    return Judgement(float(letter in question.answers), letter)


def _open_value(rule: str, answer: str, answers: tuple[str, ...]) -> float:
    if rule.startswith("letter"):
        return open_as_choice(answer, answers[0], rule)
    if rule in lmms_eval_choices.RULES:
        return float(lmms_eval_choices.open_answer_is_right(answer, answers[0], rule))
    if rule == LABEL:
        answer = answer_line_or_all(answer)
    if rule.endswith("mmmu") or rule == LABEL:
        return max(open_match(answer, wanted) for wanted in answers)
    return exact_match(answer, answers, "lmms-eval")


def _yes_no(protocol: ProtocolOf, question: Question, answer: str | None) -> Judgement:
    gold = question.answers[0].strip().lower()
    said = "" if answer is None else yes_or_no(answer, protocol.rule)
    value = float(said == gold)
    if said:
        name = {(YES, YES): "true_yes", (YES, NO): "false_yes", (NO, YES): "false_no", (NO, NO): "true_no"}[said, gold]
    else:
        name = "false_no" if gold == YES and protocol.unclear == "no" else "wrong"
    return Judgement(value, said, {name: 1})


def _by_question(question: Question, answer: str | None, normalized: bool) -> Judgement:
    judgement = _judged(PER_QUESTION[question.metric], question, answer, normalized)
    return Judgement(judgement.value, judgement.said)


def _by_function(function: Callable[[str, list[str]], float]) -> Judge:
    def judge(question: Question, answer: str | None, normalized: bool) -> Judgement:
        if answer is None:
            return Judgement(0.0)
        try:
            value = function(answer, list(question.answers))
        except Exception as error:  # whatever the user's code raises
            what = f"the function fails on {answer!r:.60}: {type(error).__name__}: {error}"
            fix = "fix the function; the answers are kept"
            raise UserError(what, where=f"question {question.question_id}", fix=fix) from error
        if isinstance(value, bool):
            value = float(value)
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            what = f"the function returned {value!r:.80}"
            raise UserError(what, where=f"question {question.question_id}", fix="return a number from 0 to 1")
        return Judgement(float(value))

    return judge
