"""What a check of data found, what the policy makes of it, and which rows that leaves to train on."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from llava_llama31.trainer.data.sources.reject_reasons import REASONS
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.redaction import plain, printable


Action = Literal["error", "skip", "quarantine"]
ACTIONS: tuple[Action, ...] = ("error", "skip", "quarantine")

_NUM_NAMED_IDS = 5


@dataclass(frozen=True)
class SourceReport:
    """What the check found in one source.

    Args:
        name: the source's name.
        path: where its records lie.
        format: the format that they are in.
        num_rows: rows of the source, usable or not.
        dropped: number of unusable rows per reason.
        first_ids: per reason, the ids of the first unusable rows.
        not_read: fields of records, turns (`messages[].name`) and content parts (`messages[].content[].name`) that
            nothing was made of, with the number of usable rows that have them.
        rows: int64 (N,), the usable rows, ascending.
        counts: int32 (N,) each, per usable row: num_tokens (image tokens included), num_image_tokens,
            num_supervised_tokens, num_tiles, num_prefix_tokens (to the end of the last image, if that is in the
            first turn); empty where no processor was given.
        prefixes: uint64 (N,), equal where rows begin with the same turns and images; 0 without an image.
        content: digests of the data files and of the image files, wherever they are.
        rejects: JSON lines with row, id, image, reason and detail of every unusable row.
        cached: whether an earlier check of the same data was found again.
        contamination: rows that hold something of an evaluation, by kind, one entry per evaluation.
    """

    name: str
    path: str
    format: str
    num_rows: int
    dropped: dict[str, int]
    first_ids: dict[str, list[str]]
    not_read: dict[str, int]
    rows: np.ndarray
    counts: dict[str, np.ndarray]
    prefixes: np.ndarray
    content: dict[str, str]
    rejects: Path
    cached: bool = False
    contamination: tuple[dict, ...] = ()

    def statistics(self) -> dict[str, dict[str, int]]:
        """p5, p50, p95, max and total of every count over the usable rows."""
        return {name: _statistics(values) for name, values in self.counts.items() if len(values)}

    def sharing(self) -> dict[str, int]:
        """Records that begin as an earlier one does, and the tokens that prefix sharing saves on them at most."""
        if not self.counts:
            return {"records": 0, "tokens": 0}
        shared = (self.prefixes != 0) & (self.counts["num_prefix_tokens"] > 0)
        _, first = np.unique(self.prefixes[shared], return_index=True)
        tokens = np.delete(self.counts["num_prefix_tokens"][shared], first)
        return {"records": len(tokens), "tokens": int(tokens.sum(dtype=np.int64))}

    def not_read_line(self) -> str:
        """Which fields nothing was made of, for people; empty where there are none."""
        fields = (f"{printable(name)} {n:,} record{'s' * (n != 1)}" for name, n in self.not_read.items())
        return f"not read: {', '.join(fields)}" if self.not_read else ""

    def rejected(self) -> Iterator[dict]:
        """row, id, image, reason and detail of every unusable row."""
        with open(self.rejects, encoding="utf-8") as file:
            yield from map(json.loads, file)

    def to_dict(self) -> dict:
        """The report without its arrays, ready for JSON."""
        return {
            "name": self.name,
            "path": self.path,
            "format": self.format,
            "rows": self.num_rows,
            "usable": len(self.rows),
            "dropped": self.dropped,
            "first_ids": self.first_ids,
            "not_read": self.not_read,
            "tokens_counted": bool(self.counts),
            "statistics": self.statistics(),
            "sharing": self.sharing(),
            "cached": self.cached,
        }


@dataclass(frozen=True)
class DataReport:
    """What the check found in all sources, and what the policy makes of it.

    Args:
        sources: one report each.
        policy: what to do with an unusable row, per reason, and `default`.
        rejects: JSON lines with source, row, id, image, reason, detail and action of every unusable row.
        quarantine: JSON lines with source, row, id, reason and the whole record, where the policy asks for it.
    """

    sources: tuple[SourceReport, ...]
    policy: Mapping[str, Action]
    rejects: Path
    quarantine: Path | None = None

    @property
    def dropped(self) -> dict[str, int]:
        """Unusable rows per reason, in the order of REASONS."""
        total = sum((Counter(source.dropped) for source in self.sources), Counter())
        return {reason: total[reason] for reason in REASONS if total[reason]}

    def errors(self) -> dict[str, int]:
        """Unusable rows per reason that the policy does not let pass."""
        return {reason: n for reason, n in self.dropped.items() if action_for(self.policy, reason) == "error"}

    def raise_for_policy(self) -> None:
        """Nothing, unless a reason occurs whose action is `error`, or a source is left without a record.

        Raises:
            UserError: naming counts, first ids and the rejects file.
        """
        errors = self.errors()
        if not errors:
            empty = [source.path for source in self.sources if not len(source.rows)]
            if empty:
                raise UserError("no record can be used", where=", ".join(empty), fix=f"read {self.rejects}")
            return
        found = []
        for reason, number in errors.items():
            ids = [printable(i) for source in self.sources for i in source.first_ids.get(reason, ())]
            named = ids[:_NUM_NAMED_IDS] + ["..."] * (number > _NUM_NAMED_IDS)
            found.append(f"{reason} {number} ({', '.join(named)})")
        num_rows = sum(source.num_rows for source in self.sources)
        raise UserError(
            f"{sum(errors.values())} of {num_rows} records can't be used: {', '.join(found)}",
            where=", ".join(source.path for source in self.sources if source.dropped.keys() & errors.keys()),
            fix=f"read {self.rejects}; correct these records, or choose skip or quarantine for their reasons",
        )

    def to_dict(self) -> dict:
        """The report without its arrays, ready for JSON."""
        return {
            "ok": not self.errors() and all(len(source.rows) for source in self.sources),
            "rows": sum(source.num_rows for source in self.sources),
            "usable": sum(len(source.rows) for source in self.sources),
            "dropped": self.dropped,
            "policy": dict(self.policy),
            "sources": [source.to_dict() for source in self.sources],
            "rejects": str(self.rejects),
            "quarantine": str(self.quarantine) if self.quarantine else None,
        }


def parse_policy(text: str) -> dict[str, Action]:
    """A policy from `skip` or from `error,missing_image=skip,duplicate=quarantine`."""
    given: dict[str, str] = {}
    for item in text.split(","):
        reason, equals, action = item.strip().partition("=")
        given |= {reason: action} if equals else {"default": reason}
    return check_policy(given)


def check_policy(policy: Mapping[str, str]) -> dict[str, Action]:
    """The policy itself, when its keys are `default` and reasons and its values actions.

    Raises:
        UserError: naming the key or the value that is not.
    """
    known: dict[str, Action] = {action: action for action in ACTIONS}
    for reason, action in policy.items():
        if reason != "default" and reason not in REASONS:
            raise UserError(f"unknown reason {reason!r}", where="policy", fix=f"one of default, {', '.join(REASONS)}")
        if action not in known:
            raise UserError(f"unknown action {action!r}", where=f"policy: {reason}", fix=", ".join(ACTIONS))
    return {reason: known[action] for reason, action in policy.items()}


def action_for(policy: Mapping[str, Action], reason: str) -> Action:
    """What a policy says of a reason: its own entry, else `default`, else error; what `where` filters is skipped."""
    if reason == "filtered":
        return "skip"
    return policy.get(reason, policy.get("default", "error"))


def select_rows(
    report: SourceReport,
    sample: int | None,
    when: Literal["before_filtering", "after_filtering"] = "after_filtering",
    seed: int = 0,
) -> np.ndarray:
    """Positions in the report's arrays of the rows to train on: int64, ascending.

    The sample depends on the row numbers and the seed alone, and a smaller one is part of a larger one.

    Args:
        report: of the source to sample from.
        sample: number of rows to draw; None for all.
        when: draw from the usable rows (so that `sample` rows remain), or from all rows, dropping the unusable ones
            from the sample afterwards.
        seed: another seed draws other rows.

    Raises:
        UserError: when there are fewer rows than `sample`.
    """
    if sample is None:
        return np.arange(len(report.rows))
    drawn_from = np.arange(report.num_rows) if when == "before_filtering" else report.rows
    if sample > len(drawn_from):
        kind = "" if when == "before_filtering" else "usable "
        what = f"can't draw {sample} rows, there are {len(drawn_from)} {kind}ones"
        raise UserError(what, where=f"{report.name}: sample", fix="draw fewer, or leave `sample` out")
    drawn = drawn_from[np.argsort(_random_keys(drawn_from, seed), kind="stable")[:sample]]
    return np.flatnonzero(np.isin(report.rows, drawn))


def _random_keys(rows: np.ndarray, seed: int) -> np.ndarray:
    """A 64-bit key per row, the same on every machine and with every version of NumPy (splitmix64's finaliser)."""
    with np.errstate(over="ignore"):
        keys = rows.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
    return keys


def _statistics(values: np.ndarray) -> dict[str, int]:
    p5, p50, p95 = np.percentile(values, (5, 50, 95), method="nearest")
    return {
        "p5": int(p5),
        "p50": int(p50),
        "p95": int(p95),
        "max": int(values.max()),
        "total": int(values.sum(dtype=np.int64)),
    }


def print_report(report: DataReport) -> None:
    """Tables of reasons and of lengths per source, on standard output."""
    from llava_llama31.trainer.terminal import Terminal

    terminal = Terminal()
    for source in report.sources:
        origin = ", checked before" if source.cached else ""
        heading = f"{source.name}: {len(source.rows)} of {source.num_rows} records usable ({source.format}{origin})"
        terminal.print(plain(heading), style="bold")
        if source.dropped:
            reasons = []
            for reason, number in source.dropped.items():
                ids = ", ".join(map(printable, source.first_ids[reason]))
                reasons.append((reason, f"{number:,}", action_for(report.policy, reason), ids, REASONS[reason]))
            columns = ("reason", "records", "action", "first ids", "meaning")
            terminal.table(columns, reasons, numbers=("records",))
        if source.not_read:
            terminal.print(source.not_read_line())
        statistics = source.statistics()
        if statistics:
            lengths = [
                (name.removeprefix("num_").replace("_", " "), *(f"{value:,}" for value in values.values()))
                for name, values in statistics.items()
            ]
            numbers = ("p5", "p50", "p95", "max", "total")
            terminal.table(("per record", *numbers), lengths, numbers=numbers)
            sharing = source.sharing()
            if sharing["records"]:
                saved = sharing["tokens"] / statistics["num_tokens"]["total"]
                what = f"{sharing['records']:,} records begin with the images and the turns of an earlier one"
                terminal.print(f"{what}: sharing prefixes saves up to {sharing['tokens']:,} tokens ({saved:.0%}).")
        elif not source.counts:
            terminal.print(
                "Tokens were not counted: that needs a processor (check a recipe, or name one with --processor)."
            )
    if report.dropped:
        terminal.print(f"rejects: {report.rejects}")
    if report.quarantine:
        terminal.print(f"quarantine: {report.quarantine}")
