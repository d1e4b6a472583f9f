"""Answers against annotations: every question accounted for, one score per protocol, and two sets of answers compared.

llava-llama31 score predictions.jsonl --annotations textvqa_val.jsonl
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.questions import Question
from llava_llama31.trainer.evaluation.vqa_accuracy import PROTOCOLS, Score, mean_score, vqa_accuracy


EXIT_INCOMPLETE = 3


@dataclass(frozen=True)
class Report:
    """Scores of one set of answers, and every question that has none by name.

    Args:
        num_questions: annotated questions, answered or not.
        protocols: scores over the questions that were answered.
        protocols_failed_as_zero: scores over all questions, where a missing or failed answer counts 0.
        failed: question_id -> why there is no answer.
        missing: ids of questions that the predictions leave out.
        duplicates: ids that are answered more than once; the first answer counts.
        unknown: ids that are answered but not annotated.
        cut: ids whose answer reached the length limit, where the file says so; it is scored as it is.
    """

    num_questions: int
    protocols: dict[str, Score]
    protocols_failed_as_zero: dict[str, Score]
    failed: dict[int | str, str]
    missing: tuple[int | str, ...] = ()
    duplicates: tuple[int | str, ...] = ()
    unknown: tuple[int | str, ...] = ()
    cut: tuple[int | str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every question has exactly one answer."""
        return not (self.failed or self.missing or self.duplicates or self.unknown)

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "num_questions": self.num_questions,
            "missing": len(self.missing),
            "failed": len(self.failed),
            "duplicates": len(self.duplicates),
            "unknown": len(self.unknown),
            "cut": len(self.cut),
            "protocols": {name: asdict(score) for name, score in self.protocols.items()},
            "protocols_failed_as_zero": {name: asdict(score) for name, score in self.protocols_failed_as_zero.items()},
            "missing_ids": list(self.missing),
            "failed_ids": {str(question_id): reason for question_id, reason in self.failed.items()},
            "duplicate_ids": list(self.duplicates),
            "unknown_ids": list(self.unknown),
            "cut_ids": list(self.cut),
        }


@dataclass(frozen=True)
class Difference:
    """How the second of two sets of answers scores against the first under one protocol, on the same questions.

    Args:
        first: mean accuracy of the first set.
        second: mean accuracy of the second set.
        difference: second - first.
        low: lower end of the difference's paired 95 % interval.
        high: upper end.
        gained: ids of the questions that score higher in the second set.
        lost: ids of those that score lower.
        num_tied: how many score the same.
    """

    first: float
    second: float
    difference: float
    low: float
    high: float
    gained: tuple[int | str, ...]
    lost: tuple[int | str, ...]
    num_tied: int

    def to_json(self) -> dict[str, Any]:
        """Accuracies and interval, then the counts, then the ids."""
        return {
            "first": self.first,
            "second": self.second,
            "difference": self.difference,
            "low": self.low,
            "high": self.high,
            "gained": len(self.gained),
            "lost": len(self.lost),
            "tied": self.num_tied,
            "gained_ids": list(self.gained),
            "lost_ids": list(self.lost),
        }


@dataclass(frozen=True)
class Comparison:
    """Two sets of answers to the same questions.

    Args:
        num_questions: annotated questions.
        num_compared: questions that both sets answer; only these enter `protocols`.
        protocols: the paired differences.
        only_first: ids that only the first set answers.
        only_second: ids that only the second set answers.
        neither: ids that no set answers.
        first: the first set by itself.
        second: the second set by itself.
    """

    num_questions: int
    num_compared: int
    protocols: dict[str, Difference]
    only_first: tuple[int | str, ...]
    only_second: tuple[int | str, ...]
    neither: tuple[int | str, ...]
    first: Report
    second: Report

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        left_out = {"only_first": self.only_first, "only_second": self.only_second, "neither": self.neither}
        return {
            "num_questions": self.num_questions,
            "compared": self.num_compared,
            "protocols": {name: difference.to_json() for name, difference in self.protocols.items()},
            **{name: len(ids) for name, ids in left_out.items()},
            **{f"{name}_ids": list(ids) for name, ids in left_out.items()},
            "first": self.first.to_json(),
            "second": self.second.to_json(),
        }


def score_answers(questions: Sequence[Question], rows: Iterable[Mapping[str, Any]]) -> Report:
    """Score rows {question_id, answer} or {question_id, error} against the annotators' answers.

    A row's `normalized` names the protocol whose normal form its answer is in already.

    Raises:
        UserError: not one annotated question is answered.
    """
    return _report(_matched(questions, rows))


def compare_answers(
    questions: Sequence[Question], first: Iterable[Mapping[str, Any]], second: Iterable[Mapping[str, Any]]
) -> Comparison:
    """Score two sets of answers and, on the questions that both answer, the difference between them.

    The interval is that of the mean of the questions' differences: each resample draws the two answers to a question
    together, so that what makes a question hard for both does not widen it (Koehn, 2004, "Statistical Significance
    Tests for Machine Translation Evaluation").

    Raises:
        UserError: a set answers no annotated question, or no question is answered by both.
    """
    one, other = _matched(questions, first), _matched(questions, second)
    reports = _report(one), _report(other)
    both = [key for key in one.questions if key in one.answered and key in other.answered]
    if not both:
        raise UserError("no question is answered by both", fix="check that both files answer these annotations")
    ids = {str(question.question_id): question.question_id for question in questions}
    return Comparison(
        num_questions=len(ids),
        num_compared=len(both),
        protocols={name: _difference(one, other, both, name) for name in PROTOCOLS},
        only_first=tuple(ids[key] for key in one.answered if key not in other.answered),
        only_second=tuple(ids[key] for key in other.answered if key not in one.answered),
        neither=tuple(ids[key] for key in ids if key not in one.answered and key not in other.answered),
        first=reports[0],
        second=reports[1],
    )


@dataclass(frozen=True)
class _Matched:
    """Answers under the questions they belong to, and what is left over."""

    questions: dict[str, Question]
    answered: dict[str, Mapping[str, Any]]
    failed: dict[int | str, str]
    times: Counter[str]

    def score(self, key: str, protocol: str) -> float:
        row = self.answered[key]
        normalized = row.get("normalized") == protocol
        return vqa_accuracy(str(row["answer"]), self.questions[key].answers, protocol, normalized=normalized)


def _matched(questions: Sequence[Question], rows: Iterable[Mapping[str, Any]]) -> _Matched:
    matched = _Matched({str(question.question_id): question for question in questions}, {}, {}, Counter())
    for row in rows:
        key = str(row["question_id"])
        matched.times[key] += 1
        if key not in matched.questions or matched.times[key] > 1:
            continue
        if row.get("answer") is None:
            matched.failed[matched.questions[key].question_id] = str(row.get("error", "no answer"))
        else:
            matched.answered[key] = row
    return matched


def _report(matched: _Matched) -> Report:
    annotated, times = matched.questions, matched.times
    if not matched.answered:
        what = "".join(
            f"; question {question_id}: {reason}" for question_id, reason in list(matched.failed.items())[:1]
        )
        same = "check that both files have the same question ids"
        fix = "remove the cause, and ask again" if matched.failed else same
        raise UserError(f"not one of {len(annotated)} questions is answered{what}", fix=fix)
    protocols, as_zero = {}, {}
    unanswered = [0.0] * (len(annotated) - len(matched.answered))
    for name in PROTOCOLS:
        # in the questions' order, so that the interval does not depend on the file's
        scores = [matched.score(key, name) for key in annotated if key in matched.answered]
        protocols[name] = mean_score(scores)
        as_zero[name] = mean_score(scores + unanswered) if unanswered else protocols[name]
    return Report(
        num_questions=len(annotated),
        protocols=protocols,
        protocols_failed_as_zero=as_zero,
        failed=matched.failed,
        missing=tuple(question.question_id for key, question in annotated.items() if key not in times),
        duplicates=tuple(annotated[key].question_id for key in times if times[key] > 1 and key in annotated),
        unknown=tuple(key for key in times if key not in annotated),
        cut=tuple(annotated[key].question_id for key, row in matched.answered.items() if row.get("ended") == "length"),
    )


def _difference(first: _Matched, second: _Matched, keys: Sequence[str], protocol: str) -> Difference:
    before = [first.score(key, protocol) for key in keys]
    after = [second.score(key, protocol) for key in keys]
    # whole tenths for ten annotators: 0.9 - 0.6 has to be what 0.3 - 0 is
    differences = [round(b - a, 12) for a, b in zip(before, after, strict=True)]
    ids = [first.questions[key].question_id for key in keys]
    paired = mean_score(differences)
    gained = tuple(i for i, difference in zip(ids, differences, strict=True) if difference > 0)
    lost = tuple(i for i, difference in zip(ids, differences, strict=True) if difference < 0)
    return Difference(
        first=math.fsum(before) / len(keys),
        second=math.fsum(after) / len(keys),
        difference=paired.accuracy,
        low=paired.low,
        high=paired.high,
        gained=gained,
        lost=lost,
        num_tied=len(keys) - len(gained) - len(lost),
    )
