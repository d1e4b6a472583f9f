"""Scores of a task: every question accounted for, metrics per protocol, and two sets of answers compared."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.judging import Judgement, judge_of
from llava_llama31.trainer.evaluation.metrics.yes_no import is_yes_for_want_of_no
from llava_llama31.trainer.evaluation.questions import Question
from llava_llama31.trainer.evaluation.task_files import ProtocolOf, Task
from llava_llama31.trainer.evaluation.task_questions import counted
from llava_llama31.trainer.evaluation.task_summaries import Sums, metrics_of, sums_of, wider_metrics


RESAMPLES, SEED = 1000, 0


@dataclass(frozen=True)
class ProtocolScores:
    """What a protocol says of a set of answers.

    Args:
        metrics: over the questions that were answered.
        headline: the published one among them.
        low: lower end of the headline's 95 % interval.
        high: upper end; the interval resamples images, with all their questions.
        unanswered_as_wrong: over all questions, where a missing or failed answer is wrong.
        groups: category -> its metrics.
        num_unclear: answers out of which the rule reads neither an option nor yes or no.
    """

    metrics: dict[str, float]
    headline: str
    low: float
    high: float
    unanswered_as_wrong: dict[str, float]
    groups: dict[str, dict[str, float]]
    num_unclear: int = 0

    def to_json(self) -> dict[str, Any]:
        """Metrics and headline first."""
        return {
            "metrics": self.metrics,
            "headline": self.headline,
            "low": self.low,
            "high": self.high,
            "unclear": self.num_unclear,
            "metrics_unanswered_as_wrong": self.unanswered_as_wrong,
            "groups": self.groups,
        }


@dataclass(frozen=True)
class TaskReport:
    """Scores of one set of answers to a task, and every question that has none by name.

    Args:
        task: its name.
        protocol: the one of the headline.
        num_questions: annotated questions of the task, answered or not.
        protocols: every protocol's scores; none where the annotated answers are not public.
        failed: question_id -> why there is no answer.
        missing: ids of questions that the answers leave out.
        unknown: ids that are answered but not annotated.
        num_left_out: answers to questions that the task leaves out, as ScienceQA-IMG those without an image.
        cut: ids whose answer reached the length limit, where the file says so.
    """

    task: str
    protocol: str
    num_questions: int
    protocols: dict[str, ProtocolScores]
    failed: dict[int | str, str]
    missing: tuple[int | str, ...]
    unknown: tuple[str, ...]
    num_left_out: int
    cut: tuple[int | str, ...]

    @property
    def complete(self) -> bool:
        """Whether every question has an answer."""
        return not (self.failed or self.missing or self.unknown)

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "task": self.task,
            "protocol": self.protocol,
            "num_questions": self.num_questions,
            "missing": len(self.missing),
            "failed": len(self.failed),
            "unknown": len(self.unknown),
            "left_out": self.num_left_out,
            "cut": len(self.cut),
            **(self.protocols[self.protocol].to_json() if self.protocols else {"metrics": {}, "headline": None}),
            "protocols": {name: scores.to_json() for name, scores in self.protocols.items()},
            "missing_ids": list(self.missing),
            "failed_ids": {str(question_id): reason for question_id, reason in self.failed.items()},
            "unknown_ids": list(self.unknown),
            "cut_ids": list(self.cut),
        }


@dataclass(frozen=True)
class TaskComparison:
    """Two sets of answers to a task, on the questions that both answer.

    Args:
        num_compared: how many these are.
        headline: the metric that is compared.
        differences: protocol -> (first, second, second - first, low, high) of its headline; the interval is paired.
        gained: ids of the questions whose value is higher in the second set, under the report's protocol.
        lost: ids of those whose value is lower.
        left_out: ids of the questions that not both answer.
        first: the first set by itself.
        second: the second set by itself.
    """

    num_compared: int
    headline: str
    differences: dict[str, tuple[float, float, float, float, float]]
    gained: tuple[int | str, ...]
    lost: tuple[int | str, ...]
    left_out: tuple[int | str, ...]
    first: TaskReport
    second: TaskReport

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        names = ("first", "second", "difference", "low", "high")
        return {
            "task": self.first.task,
            "protocol": self.first.protocol,
            "headline": self.headline,
            "compared": self.num_compared,
            "protocols": {name: dict(zip(names, row, strict=True)) for name, row in self.differences.items()},
            "gained": len(self.gained),
            "lost": len(self.lost),
            "tied": self.num_compared - len(self.gained) - len(self.lost),
            "gained_ids": list(self.gained),
            "lost_ids": list(self.lost),
            "left_out_ids": list(self.left_out),
            "first": self.first.to_json(),
            "second": self.second.to_json(),
        }


@dataclass(frozen=True)
class Answered:
    """Answers of a task under the questions they belong to, and what is left over.

    `normalized` has the ids of answers that are in a VQA protocol's normal form already, with its name.
    """

    questions: list[Question]
    answers: dict[str, str]
    normalized: dict[str, str]
    failed: dict[int | str, str]
    missing: tuple[int | str, ...]
    unknown: tuple[str, ...]
    num_left_out: int
    cut: tuple[int | str, ...]


def answered(task: Task, questions: Sequence[Question], rows: Iterable[Mapping[str, Any]]) -> Answered:
    """Answers by question.

    Args:
        task: says which questions count.
        questions: all annotated ones.
        rows: {question_id, answer} or {question_id, answer: None, error}.

    Raises:
        UserError: a question has several answers, or none has one.
    """
    asked = counted(task, questions)
    known = {str(question.question_id): question for question in asked}
    others = {str(question.question_id) for question in questions} - known.keys()
    answers: dict[str, str] = {}
    normalized: dict[str, str] = {}
    failed: dict[int | str, str] = {}
    unknown: list[str] = []
    cut: list[int | str] = []
    seen: set[str] = set()
    num_left_out = 0
    for row in rows:
        key = str(row["question_id"])
        if key in seen:
            fix = "keep one row a question; --where FIELD=VALUE keeps the rows of one method"
            raise UserError(f"question {key} has several answers", where=task.name, fix=fix)
        seen.add(key)
        if key in others:
            num_left_out += 1
        elif key not in known:
            unknown.append(key)
        elif row.get("answer") is None:
            failed[known[key].question_id] = str(row.get("error", "no answer"))
        else:
            answers[key] = str(row["answer"])
            if "normalized" in row:
                normalized[key] = str(row["normalized"])
            if row.get("ended") == "length":
                cut.append(known[key].question_id)
    if not answers:
        reason = "".join(f"; question {name}: {why}" for name, why in list(failed.items())[:1])
        if unknown and asked:
            reason += f"; the first row is of {unknown[0]!r:.60}, the first question is {asked[0].question_id!r:.60}"
        fix = "remove the cause, and ask again" if failed else "check that both files have the same questions"
        raise UserError(f"not one of {len(asked)} questions is answered{reason}", where=task.name, fix=fix)
    missing = tuple(question.question_id for key, question in known.items() if key not in seen)
    return Answered(asked, answers, normalized, failed, missing, tuple(unknown), num_left_out, tuple(cut))


def score_task(task: Task, found: Answered, protocol: str, *, intervals: bool = True) -> TaskReport:
    """Score the answers of a task under each of its protocols; under none where its answers are not public.

    Args:
        task: names the protocols.
        found: the answers.
        protocol: the one of the headline.
        intervals: False saves the time of resampling; the ends are then the value.
    """
    return TaskReport(
        task=task.name,
        protocol=protocol,
        num_questions=len(found.questions),
        protocols={
            name: _scores(task, rules, found, intervals)
            for name, rules in task.protocols.items()
            if any(question.answers for question in found.questions)
        },
        failed=found.failed,
        missing=found.missing,
        unknown=found.unknown,
        num_left_out=found.num_left_out,
        cut=found.cut,
    )


def compare_task(task: Task, first: Answered, second: Answered, protocol: str) -> TaskComparison:
    """Score two sets of answers and, on the questions that both answer, the difference of the headlines.

    Each resample draws images, with the answers of both sets to their questions.

    Raises:
        UserError: no question is answered by both, or one id is of two questions.
    """
    shared = first.answers.keys() & second.answers.keys()
    others = {str(question.question_id): question for question in second.questions}
    for question in first.questions:
        theirs = others.get(str(question.question_id), question)
        if (theirs.question, theirs.answers) != (question.question, question.answers):
            said, asked = (f"{q.question!r:.60} ({', '.join(q.answers[:1])!r:.40})" for q in (question, theirs))
            fix = "pass answers to the same questions, or the questions as --annotations"
            raise UserError(f"question {question.question_id} is {said} and {asked}", where=task.name, fix=fix)
    both = [question for question in first.questions if str(question.question_id) in shared]
    if not both:
        raise UserError("no question is answered by both", fix="check that both files answer these annotations")
    differences: dict[str, tuple[float, float, float, float, float]] = {}
    for name, rules in task.protocols.items():
        judged = [_judgements(task, rules, both, found) for found in (first, second)]
        one, other = (sums_of(both, judgements, rules) for judgements in judged)
        groups = _groups(both)
        values = [metrics_of(_total(sums.values()), rules, groups)[rules.headline] for sums in (one, other)]
        drawn = [_resampled(sums, rules, groups) for sums in (one, other)]
        low, high = _middle([b - a for a, b in zip(*drawn, strict=True)])
        differences[name] = (values[0], values[1], values[1] - values[0], low, high)
        if name == protocol:
            gains = [b.value - a.value for a, b in zip(*judged, strict=True)]
    compared = {str(question.question_id) for question in both}
    return TaskComparison(
        num_compared=len(both),
        headline=task.protocols[protocol].headline,
        differences=differences,
        gained=tuple(q.question_id for q, gain in zip(both, gains, strict=True) if gain > 0),
        lost=tuple(q.question_id for q, gain in zip(both, gains, strict=True) if gain < 0),
        left_out=tuple(q.question_id for q in first.questions if str(q.question_id) not in compared),
        first=score_task(task, first, protocol),
        second=score_task(task, second, protocol),
    )


def protocol_for(task: Task, layout: str, wanted: str | None) -> str:
    """The protocol of the headline: as asked, else that of the program that wrote the answers, else the task's.

    Raises:
        UserError: the task has no such protocol.
    """
    if wanted is not None and wanted not in task.protocols:
        what = f"{task.name} has no protocol {wanted!r}"
        raise UserError(what, where="--protocol", fix=f"one of {', '.join(task.protocols)}")
    theirs = [name for name, rules in task.protocols.items() if layout in rules.layouts]
    return wanted or (theirs[0] if theirs else task.protocol)


def num_yes_for_want_of_no(task: Task, found: Answered, protocol: str) -> int:
    """How many answers a protocol takes for yes in which the word is not."""
    rules = task.protocols[protocol]
    if rules.metric != "yes_no":
        return 0
    return sum(is_yes_for_want_of_no(answer, rules.rule) for answer in found.answers.values())


def mean_value(task: Task, found: Answered, protocol: str) -> float:
    """Mean over all questions of what an answer is worth, in [0, 1]; one without an answer is wrong."""
    judgements = _judgements(task, task.protocols[protocol], found.questions, found)
    return math.fsum(judgement.value for judgement in judgements) / len(judgements)


def _scores(task: Task, protocol: ProtocolOf, found: Answered, intervals: bool) -> ProtocolScores:
    questions = [question for question in found.questions if str(question.question_id) in found.answers]
    groups = _groups(found.questions)
    judged = _judgements(task, protocol, questions, found)
    sums = sums_of(questions, judged, protocol)
    total = _total(sums.values())
    metrics = metrics_of(total, protocol, groups)
    as_wrong = metrics
    if len(questions) < len(found.questions):
        judgements = _judgements(task, protocol, found.questions, found)
        as_wrong = metrics_of(_total(sums_of(found.questions, judgements, protocol).values()), protocol, groups)
    value = metrics[protocol.headline]
    low, high = _middle(_resampled(sums, protocol, groups)) if intervals else (value, value)
    each = ((group, wider_metrics(total, protocol, questions, group)) for group in groups)
    by_group = {group: scores for group, scores in each if scores}
    pairs = zip(questions, judged, strict=True)
    num_unclear = sum(_has_to_choose(protocol, question) and not judgement.said for question, judgement in pairs)
    return ProtocolScores(metrics, protocol.headline, low, high, as_wrong, by_group, num_unclear)


def _has_to_choose(protocol: ProtocolOf, question: Question) -> bool:
    """Whether the answer to a question is one of its options, or yes or no."""
    metric = question.metric if protocol.metric == "per_question" else protocol.metric
    return metric == "yes_no" or (metric == "choice" and bool(question.options))


def _judgements(task: Task, protocol: ProtocolOf, questions: Sequence[Question], found: Answered) -> list[Judgement]:
    judge = judge_of(task, protocol)
    judgements = []
    for question in questions:
        key = str(question.question_id)
        judgements.append(judge(question, found.answers.get(key), found.normalized.get(key, "") == protocol.rule))
    return judgements


def _groups(questions: Iterable[Question]) -> list[str]:
    return list(dict.fromkeys(group for question in questions for group in question.groups))


def _total(sums: Iterable[Sums]) -> dict[tuple[str, str], float]:
    """Sums of all clusters, rounded once."""
    amounts: dict[tuple[str, str], list[float]] = defaultdict(list)
    for part in sums:
        for name, amount in part.items():
            amounts[name].append(amount)
    return {name: math.fsum(parts) for name, parts in amounts.items()}


def _resampled(sums: Mapping[str, Sums], protocol: ProtocolOf, groups: Sequence[str]) -> list[float]:
    """The headline of each of RESAMPLES seeded draws of clusters with replacement."""
    names = sorted({name for part in sums.values() for name in part})
    table = np.array([[part.get(name, 0.0) for name in names] for part in sums.values()])
    draw, shares = np.random.default_rng(SEED), [1 / len(sums)] * len(sums)
    headlines = []
    for _ in range(RESAMPLES):
        drawn = (draw.multinomial(len(sums), shares) @ table).tolist()
        metrics = metrics_of(dict(zip(names, drawn, strict=True)), protocol, groups)
        headlines.append(metrics.get(protocol.headline, 0.0))
    return headlines


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """Ends of the middle 95 %."""
    ordered = sorted(values)
    tail = round(0.025 * len(ordered))
    return ordered[tail], ordered[-1 - tail]
