"""Answers against annotations: every question accounted for, and one score per protocol; `llava-llama31 score`."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.answer_files import read_predictions
from llava_llama31.trainer.evaluation.questions import Question, load_questions
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
    """

    num_questions: int
    protocols: dict[str, Score]
    protocols_failed_as_zero: dict[str, Score]
    failed: dict[int | str, str]
    missing: tuple[int | str, ...] = ()
    duplicates: tuple[int | str, ...] = ()
    unknown: tuple[int | str, ...] = ()

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
            "protocols": {name: asdict(score) for name, score in self.protocols.items()},
            "protocols_failed_as_zero": {name: asdict(score) for name, score in self.protocols_failed_as_zero.items()},
            "missing_ids": list(self.missing),
            "failed_ids": {str(question_id): reason for question_id, reason in self.failed.items()},
            "duplicate_ids": list(self.duplicates),
            "unknown_ids": list(self.unknown),
        }


def score_answers(questions: Sequence[Question], rows: Iterable[dict[str, Any]]) -> Report:
    """Score rows {question_id, answer} or {question_id, error} against the annotators' answers.

    Raises:
        UserError: not one annotated question is answered.
    """
    annotated = {str(question.question_id): question for question in questions}
    times: Counter[str] = Counter()
    answers: dict[str, str] = {}
    failed: dict[int | str, str] = {}
    for row in rows:
        key = str(row["question_id"])
        times[key] += 1
        if key not in annotated or times[key] > 1:
            continue
        if row.get("answer") is None:
            failed[annotated[key].question_id] = str(row.get("error", "no answer"))
        else:
            answers[key] = str(row["answer"])
    if not answers:
        what = "".join(f"; question {question_id}: {reason}" for question_id, reason in list(failed.items())[:1])
        fix = "check the pictures" if failed else "check that both files have the same question ids"
        raise UserError(f"not one of {len(annotated)} questions is answered{what}", fix=fix)
    protocols, as_zero = {}, {}
    unanswered = [0.0] * (len(annotated) - len(answers))
    for name in PROTOCOLS:
        scores = [vqa_accuracy(answer, annotated[key].answers, name) for key, answer in answers.items()]
        protocols[name] = mean_score(scores)
        as_zero[name] = mean_score(scores + unanswered) if unanswered else protocols[name]
    return Report(
        num_questions=len(annotated),
        protocols=protocols,
        protocols_failed_as_zero=as_zero,
        failed=failed,
        missing=tuple(question.question_id for key, question in annotated.items() if key not in times),
        duplicates=tuple(annotated[key].question_id for key in times if times[key] > 1 and key in annotated),
        unknown=tuple(key for key in times if key not in annotated),
    )


def score_command(predictions: str, *, annotations: str, json_output: bool = False) -> int:
    """`llava-llama31 score`: exit code 0, or 3 if answers are missing, failed, doubled or unknown."""
    questions = load_questions(annotations, with_images=False)
    report = score_answers(questions, read_predictions(predictions, questions))
    if json_output:
        print_json(report.to_json())
    else:
        print_report(report, f"{Path(predictions).name} against {Path(annotations).name}")
    return 0 if report.complete else EXIT_INCOMPLETE


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout, wide as it is."""
    from rich.console import Console

    Console(soft_wrap=True).out(json.dumps(value, indent=2), highlight=False)


def print_report(report: Report, title: str) -> None:
    """The table of the protocols, then every question without exactly one answer."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, as_zero = Console(), report.protocols_failed_as_zero
    answered = report.num_questions - len(report.failed) - len(report.missing)
    table = Table(title=Text(f"{title}: {answered} of {report.num_questions} questions answered"))
    table.add_column("protocol")
    for column in ("accuracy %", "95 % interval", *(["unanswered as 0"] if answered < report.num_questions else [])):
        table.add_column(column, justify="right")
    for name, score in report.protocols.items():
        cells = [name, f"{100 * score.accuracy:.3f}", f"{100 * score.low:.2f} to {100 * score.high:.2f}"]
        table.add_row(*cells, *([f"{100 * as_zero[name].accuracy:.3f}"] if answered < report.num_questions else []))
    console.print(table)
    named = {
        "failed": [f"{question_id} ({reason})" for question_id, reason in report.failed.items()],
        "missing": report.missing,
        "answered more than once": report.duplicates,
        "not annotated": report.unknown,
    }
    for what, ids in named.items():
        if ids:
            more = f" and {len(ids) - 5} more (--json names all)" if len(ids) > 5 else ""
            console.print(f"{what}: {len(ids)}: {', '.join(map(str, ids[:5]))}{more}", markup=False, highlight=False)
