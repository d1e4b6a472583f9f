"""Scores and comparisons as tables or JSON on standard output; cheap to import."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from llava_llama31.trainer.evaluation.answer_files import AnswerFile
    from llava_llama31.trainer.evaluation.scoring import Comparison, Report


_IDS_NAMED = 5


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on stdout, without wrapping lines."""
    from rich.console import Console

    Console(soft_wrap=True).out(json.dumps(value, indent=2), highlight=False)


def print_report(report: "Report", title: str) -> None:
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


def print_comparison(comparison: "Comparison", title: str) -> None:
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


def _unaccounted(report: "Report") -> dict[str, Sequence[int | str]]:
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
            more = f" and {len(ids) - _IDS_NAMED} more (--json names all)" if len(ids) > _IDS_NAMED else ""
            line = f"{what}: {len(ids)}: {', '.join(map(str, ids[:_IDS_NAMED]))}{more}"
            Console().print(line, markup=False, highlight=False, soft_wrap=True)


def print_notes(files: Iterable["AnswerFile"]) -> None:
    """What has to be known about the scores of these files."""
    from rich.console import Console

    for note in dict.fromkeys(file.note for file in files if file.note):
        Console().print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
