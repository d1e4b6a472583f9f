"""Scores and comparisons as tables or JSON on standard output; cheap to import."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llava_llama31.trainer.redaction import plain, printable


if TYPE_CHECKING:
    from llava_llama31.trainer.evaluation.scoring import Comparison, Report
    from llava_llama31.trainer.evaluation.task_scoring import TaskComparison, TaskReport
    from llava_llama31.trainer.terminal import Terminal


_IDS_NAMED = 5


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on stdout, without wrapping lines."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_report(report: "Report", title: str) -> None:
    """The table of the protocols, then every question without exactly one answer."""
    from llava_llama31.trainer.terminal import Terminal

    terminal, as_zero = Terminal(), report.protocols_failed_as_zero
    answered = report.num_questions - len(report.failed) - len(report.missing)
    counted = f"{title}: {answered} of {report.num_questions} questions answered"
    terminal.print(plain(counted))
    columns = ["protocol", "accuracy %", "95 % interval"]
    rows = [
        [name, f"{100 * score.accuracy:.3f}", f"{100 * score.low:.2f} to {100 * score.high:.2f}"]
        for name, score in report.protocols.items()
    ]
    if answered < report.num_questions:
        columns.append("unanswered as 0")
        rows = [[*row, f"{100 * as_zero[row[0]].accuracy:.3f}"] for row in rows]
    terminal.table(columns, rows, numbers=columns[1:])
    _print_ids(_unaccounted(report))


def print_comparison(comparison: "Comparison", title: str) -> None:
    """The table of the differences, then the questions that changed, and those that were left out."""
    from llava_llama31.trainer.terminal import Terminal

    compared = f"{comparison.num_compared} of {comparison.num_questions} questions answered by both"
    terminal = Terminal()
    terminal.print(plain(f"{title}: {compared}"))
    columns = ("protocol", "A %", "B %", "B - A", "95 % interval", "gained", "lost", "tied")
    rows = []
    changed: dict[tuple[str, tuple[int | str, ...]], list[str]] = {}
    for name, pair in comparison.protocols.items():
        points = [f"{100 * pair.first:.3f}", f"{100 * pair.second:.3f}", f"{100 * pair.difference:+.3f}"]
        interval = f"{100 * pair.low:+.2f} to {100 * pair.high:+.2f}"
        rows.append((name, *points, interval, *map(str, (len(pair.gained), len(pair.lost), pair.num_tied))))
        for what, ids in (("gained", pair.gained), ("lost", pair.lost)):
            changed.setdefault((what, ids), []).append(name)
    terminal.table(columns, rows, numbers=columns[1:])
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
    from llava_llama31.trainer.terminal import Terminal

    for what, ids in named.items():
        if ids:
            more = f" and {len(ids) - _IDS_NAMED} more (--json names all)" if len(ids) > _IDS_NAMED else ""
            line = f"{what}: {len(ids)}: {', '.join(printable(str(named_id)) for named_id in ids[:_IDS_NAMED])}{more}"
            Terminal().print(line)


def print_notes(notes: Iterable[str]) -> None:
    """What has to be known about the scores of files."""
    from llava_llama31.trainer.terminal import Terminal

    for note in dict.fromkeys(note for note in notes if note):
        Terminal().print(f"note: {plain(note)}")


def print_task_report(report: "TaskReport", title: str) -> None:
    """The headline under every protocol, the chosen one's metrics and groups, then questions without an answer."""
    from llava_llama31.trainer.terminal import Terminal

    terminal = Terminal()
    num_answered = report.num_questions - len(report.failed) - len(report.missing)
    left_out = f", and {report.num_left_out} that {report.task} leaves out" if report.num_left_out else ""
    terminal.print(plain(f"{title}: {num_answered} of {report.num_questions} questions answered{left_out}"))
    if report.protocols:
        _print_scores(terminal, report, partly=num_answered < report.num_questions)
    else:
        terminal.print("not scored here: the right answers are not public, or a language model grades them")
    _print_ids(_unaccounted_of_task(report))


def _print_scores(terminal: "Terminal", report: "TaskReport", *, partly: bool) -> None:
    """The headline under every protocol, then metrics and groups of the report's one."""
    chosen = report.protocols[report.protocol]
    # of several figures, each row names its own
    measures = {name: scores.headline for name, scores in report.protocols.items()}
    is_one = len(set(measures.values())) == 1
    columns = [chosen.headline if is_one else "value", "95 % interval", *(["unanswered as wrong"] if partly else [])]
    headlines = []
    for name, scores in report.protocols.items():
        cells = [f"{name} *" if name == report.protocol else name, *([] if is_one else [measures[name]])]
        cells += [f"{scores.metrics[scores.headline]:.3f}", f"{scores.low:.2f} to {scores.high:.2f}"]
        headlines.append([*cells, *([f"{scores.unanswered_as_wrong[scores.headline]:.3f}"] if partly else [])])
    terminal.table(["protocol", *([] if is_one else ["metric"]), *columns], headlines, numbers=columns)
    rows = {f"all ({report.protocol})": chosen.metrics, **chosen.groups}
    names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    details = [
        [printable(group), *(f"{metrics[name]:.3f}" if name in metrics else "" for name in names)]
        for group, metrics in rows.items()
    ]
    terminal.table(["questions", *names], details, numbers=names)


def print_task_comparison(comparison: "TaskComparison", title: str) -> None:
    """The differences of the headline, then the questions that changed, and those that were left out."""
    from llava_llama31.trainer.terminal import Terminal

    terminal = Terminal()
    num_questions = comparison.first.num_questions
    counted = f"{comparison.num_compared} of {num_questions} questions answered by both"
    measures = {name: scores.headline for name, scores in comparison.first.protocols.items()}
    is_one = len(set(measures.values())) == 1
    terminal.print(plain(f"{title}: {counted}{f', {comparison.headline}' if is_one else ''}"))
    columns = ("A", "B", "B - A", "95 % interval")
    rows = []
    for name, (first, second, difference, low, high) in comparison.differences.items():
        cells = [name, *([] if is_one else [measures[name]]), f"{first:.3f}", f"{second:.3f}", f"{difference:+.3f}"]
        rows.append([*cells, f"{low:+.2f} to {high:+.2f}"])
    terminal.table(["protocol", *([] if is_one else ["metric"]), *columns], rows, numbers=columns)
    _print_ids({"gained": comparison.gained, "lost": comparison.lost, "not answered by both": comparison.left_out})
    for side, report in (("A", comparison.first), ("B", comparison.second)):
        _print_ids({f"{side}, {what}": ids for what, ids in _unaccounted_of_task(report).items()})


def _unaccounted_of_task(report: "TaskReport") -> dict[str, Sequence[int | str]]:
    return {
        "failed": [f"{question_id} ({reason})" for question_id, reason in report.failed.items()],
        "missing": report.missing,
        "not annotated": report.unknown,
        "cut at the length limit": report.cut,
    }
