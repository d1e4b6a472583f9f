"""Answers against annotations: every question accounted for, one score per protocol, and two sets of answers compared.

llava-llama31 score predictions.jsonl --annotations textvqa_val.jsonl
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.answer_files import AnswerFile, read_answers
from llava_llama31.trainer.evaluation.questions import Question, load_questions
from llava_llama31.trainer.evaluation.vqa_accuracy import PROTOCOLS, Score, mean_score, vqa_accuracy


EXIT_INCOMPLETE = 3
IDS_NAMED = 5


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
        cut: ids whose answer reached the length limit, where the file tells; it is scored as it is.
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
    both = [key for key in one.answered if key in other.answered]
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


def score_command(
    predictions: str,
    other: str | None = None,
    *,
    annotations: str,
    questions: str | None = None,
    json_output: bool = False,
) -> int:
    """`llava-llama31 score`: exit code 0, or 3 if answers are missing, failed, doubled or unknown."""
    annotated = load_questions(annotations, questions=questions, with_images=False)
    if other is not None:
        return _compare_command(predictions, other, annotated, Path(annotations).name, json_output)
    file = read_answers(predictions, annotated)
    report = score_answers(annotated, file.rows)
    if json_output:
        print_json(report.to_json() | _origin(predictions, file))
    else:
        print_report(report, f"{Path(predictions).name} ({file.layout}) against {Path(annotations).name}")
        _print_notes([file])
    return 0 if report.complete else EXIT_INCOMPLETE


def _compare_command(first: str, second: str, questions: list[Question], annotations: str, json_output: bool) -> int:
    files = [read_answers(path, questions) for path in (first, second)]
    comparison = compare_answers(questions, files[0].rows, files[1].rows)
    if json_output:
        value = comparison.to_json()
        value["first"] |= _origin(first, files[0])
        value["second"] |= _origin(second, files[1])
        print_json(value)
    else:
        names = [f"{Path(path).name} ({file.layout})" for path, file in zip((first, second), files, strict=True)]
        print_comparison(comparison, f"B = {names[1]} against A = {names[0]}, annotations {annotations}")
        _print_notes(files)
    return 0 if comparison.first.complete and comparison.second.complete else EXIT_INCOMPLETE


def _origin(path: str, file: AnswerFile) -> dict[str, Any]:
    return {"predictions": path, "layout": file.layout} | ({"note": file.note} if file.note else {})


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
        fix = "check the pictures" if matched.failed else "check that both files have the same question ids"
        raise UserError(f"not one of {len(annotated)} questions is answered{what}", fix=fix)
    protocols, as_zero = {}, {}
    unanswered = [0.0] * (len(annotated) - len(matched.answered))
    for name in PROTOCOLS:
        scores = [matched.score(key, name) for key in matched.answered]
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


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout, wide as it is."""
    from rich.console import Console

    Console(soft_wrap=True).out(json.dumps(value, indent=2), highlight=False)


def print_report(report: Report, title: str) -> None:
    """The table of the protocols, then every question without exactly one answer."""
    from rich.console import Console
    from rich.table import Table

    console, as_zero = Console(), report.protocols_failed_as_zero
    answered = report.num_questions - len(report.failed) - len(report.missing)
    table = Table()
    counted = f"{title}: {answered} of {report.num_questions} questions answered"
    console.print(counted, markup=False, highlight=False, soft_wrap=True)
    table.add_column("protocol")
    for column in ("accuracy %", "95 % interval", *(["unanswered as 0"] if answered < report.num_questions else [])):
        table.add_column(column, justify="right")
    for name, score in report.protocols.items():
        cells = [name, f"{100 * score.accuracy:.3f}", f"{100 * score.low:.2f} to {100 * score.high:.2f}"]
        table.add_row(*cells, *([f"{100 * as_zero[name].accuracy:.3f}"] if answered < report.num_questions else []))
    console.print(table)
    _print_ids(_unaccounted(report))


def print_comparison(comparison: Comparison, title: str) -> None:
    """The table of the differences, then the questions that changed, and those that were left out."""
    from rich.console import Console
    from rich.table import Table

    compared = f"{comparison.num_compared} of {comparison.num_questions} questions answered by both"
    console, table = Console(), Table(box=None, pad_edge=False)  # narrow enough for 80 columns
    console.print(f"{title}: {compared}", markup=False, highlight=False, soft_wrap=True)
    table.add_column("protocol")
    for column in ("A %", "B %", "B - A", "95 % interval", "gained", "lost", "tied"):
        table.add_column(column, justify="right")
    changed: dict[tuple[str, tuple[int | str, ...]], list[str]] = {}
    for name, pair in comparison.protocols.items():
        points = [f"{100 * pair.first:.3f}", f"{100 * pair.second:.3f}", f"{100 * pair.difference:+.3f}"]
        interval = f"{100 * pair.low:+.2f} to {100 * pair.high:+.2f}"
        table.add_row(name, *points, interval, *map(str, (len(pair.gained), len(pair.lost), pair.num_tied)))
        for what, ids in (("gained", pair.gained), ("lost", pair.lost)):
            changed.setdefault((what, ids), []).append(name)
    console.print(table)
    _print_ids({f"{what} under {', '.join(names)}": ids for (what, ids), names in changed.items()})
    left_out = {
        "only A answers, left out": comparison.only_first,
        "only B answers, left out": comparison.only_second,
        "neither answers, left out": comparison.neither,
    }
    _print_ids(left_out)
    for side, report in (("A", comparison.first), ("B", comparison.second)):
        _print_ids({f"{side}, {what}": ids for what, ids in _unaccounted(report).items()})


def _unaccounted(report: Report) -> dict[str, Sequence[int | str]]:
    return {
        "failed": [f"{question_id} ({reason})" for question_id, reason in report.failed.items()],
        "missing": report.missing,
        "answered more than once": report.duplicates,
        "not annotated": report.unknown,
        "cut at the length limit": report.cut,
    }


def _print_ids(named: Mapping[str, Sequence[int | str]]) -> None:
    """How many there are of each, and the first of them by name."""
    from rich.console import Console

    for what, ids in named.items():
        if ids:
            more = f" and {len(ids) - IDS_NAMED} more (--json names all)" if len(ids) > IDS_NAMED else ""
            line = f"{what}: {len(ids)}: {', '.join(map(str, ids[:IDS_NAMED]))}{more}"
            Console().print(line, markup=False, highlight=False, soft_wrap=True)


def _print_notes(files: Iterable[AnswerFile]) -> None:
    from rich.console import Console

    for note in dict.fromkeys(file.note for file in files if file.note):
        Console().print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
