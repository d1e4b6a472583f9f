"""The pass over all data before training: counts tokens, finds what can't be used and why, drops nothing silently.

The command is `llava-llama31 check-data RECIPE|FILES...`; `train` makes the same pass before its first step.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from uuid import uuid4

import numpy as np

from llava_llama31.trainer.data.check.cache import (
    CheckCache,
    WatchedFiles,
    content_digests,
    file_signature,
    fingerprint,
    write_atomically,
)
from llava_llama31.trainer.data.check.report import (
    ACTIONS,
    Action,
    DataReport,
    SourceReport,
    action_for,
    check_policy,
    parse_policy,
    print_report,
    select_rows,
)
from llava_llama31.trainer.data.check.row_checker import COUNTS, Findings, Limits, RowChecker, check_rows
from llava_llama31.trainer.data.sources.records import RecordStore, data_files, open_records, what_is_read
from llava_llama31.trainer.data.sources.reject_reasons import REASONS
from llava_llama31.trainer.data.sources.user_cache import user_cache
from llava_llama31.trainer.errors import naming
from llava_llama31.trainer.redaction import printable, redacted
from llava_llama31.trainer.strict_json import parse_json


if TYPE_CHECKING:
    from llava_llama31.processing import LlavaLlama31Processor
    from llava_llama31.trainer.recipes.schema import DataSource


__all__ = [
    "ACTIONS",
    "COUNTS",
    "Action",
    "DataCheck",
    "DataReport",
    "Limits",
    "SourceReport",
    "cached_reports",
    "check_policy",
    "check_sources",
    "default_cache_dir",
    "parse_policy",
    "select_rows",
    "show_report",
]

Adjust = Callable[["DataSource", SourceReport], SourceReport]

_NUM_FIRST_IDS = 5
# rows whose keys are data would name millions
_NUM_NOT_READ = 1000
_OTHER_FIELDS = "(other fields)"
_DEFAULT_POLICY: dict[str, Action] = {"default": "error"}


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """How records are checked.

    Args:
        processor: counts tokens and tiles; without it only the records and their images are checked.
        limits: records beyond them are rejected.
        decode: decode every image whole; otherwise read headers alone.
        keep_data_newline: as in `open_records`.
        num_workers: processes; 0 for this one alone, None for as many as the cores and the rows are worth.
        progress: show a bar, when standard error is a terminal.
    """

    processor: "LlavaLlama31Processor | None" = None
    limits: Limits = Limits()
    decode: bool = True
    keep_data_newline: bool = False
    num_workers: int | None = None
    progress: bool = True

    def source(self, source: "DataSource", cache: CheckCache) -> SourceReport:
        """The source's report, from the cache where that holds."""
        # what was found with every image decoded holds for headers too
        signatures = [file_signature(file) for file in data_files(source)]
        for decode in (True,) if self.decode else (True, False):
            key = self.key(source, decode, signatures)
            if entry := cache.load(key):
                return _report(source, *entry)
        store = open_records(source, keep_data_newline=self.keep_data_newline)
        spool = cache.folder / f".rejects.{uuid4().hex[:8]}"
        try:
            summary, arrays = self._pass_over(store, source.name, spool)
            summary["content"] = content_digests(signatures, arrays)
            rejects = cache.store(key, summary, arrays, spool)
        finally:
            spool.unlink(missing_ok=True)
        return replace(_report(source, summary, arrays, rejects), cached=False)

    def key(self, source: "DataSource", decode: bool, signatures: Sequence[list]) -> str:
        """Key of the finding in the cache; `signatures` are those of the source's files."""
        settings = asdict(self.limits) | {"newline": self.keep_data_newline, "decode": decode}
        settings["source"] = what_is_read(source)
        return fingerprint(signatures, self.processor, settings)

    def _pass_over(self, store: RecordStore, name: str, spool: Path) -> tuple[dict, dict[str, np.ndarray]]:
        """Summary and arrays; the rejects go to the file `spool`."""
        checker = RowChecker(store, self.processor, self.limits, "decode" if self.decode else "header")
        num_counts = 0 if self.processor is None else len(COUNTS)
        rows: list[np.ndarray] = []
        counts: list[np.ndarray] = []
        prefixes: list[np.ndarray] = []
        watched, digests = WatchedFiles(), bytearray()
        not_read: Counter[str] = Counter()
        with open(spool, "w", encoding="utf-8") as file:
            rejected = _RejectWriter(file)
            for found in self._shown(check_rows(checker, self.num_workers), name, len(store)):
                rows.append(np.array(found.rows, np.int64))
                counts.append(np.array(found.counts, np.int32).reshape(len(found.rows), num_counts))
                prefixes.append(np.array(found.prefixes, np.uint64))
                digests += found.digests
                for path, signature in found.files.items():
                    watched.add(path, signature)
                _add(not_read, found.not_read)
                for reject in found.rejects:
                    rejected.add(reject)
            all_rows, all_counts = np.concatenate(rows), np.concatenate(counts)
            first = _first_equal(digests)
            is_first = first == np.arange(len(first))
            for position in np.flatnonzero(~is_first):
                row = int(all_rows[position])
                rejected.add(_duplicate(store, row, int(all_rows[first[position]])))
                for field in map(printable, store[row].not_read):
                    not_read[field if field in not_read else _OTHER_FIELDS] -= 1
        arrays = {name: all_counts[is_first, number] for number, name in enumerate(COUNTS[:num_counts])}
        arrays |= {"rows": all_rows[is_first], "prefixes": np.concatenate(prefixes)[is_first]} | watched.to_arrays()
        summary = {"format": store.format, "num_rows": len(store), "not_read": dict(sorted((+not_read).items()))}
        return summary | {"dropped": rejected.counts, "first_ids": rejected.first_ids}, arrays

    def _shown(self, findings: Iterator[Findings], name: str, num_rows: int) -> Iterator[Findings]:
        from llava_llama31.trainer.terminal import Terminal

        terminal = Terminal(stderr=True)
        with terminal.progress(visible=self.progress and terminal.is_terminal) as bar:
            task = bar.add_task(f"checking {name}", total=num_rows)
            for found in findings:
                yield found
                bar.advance(task, found.num_rows)


def check_sources(
    sources: Sequence["DataSource"],
    check: DataCheck,
    *,
    policy: Mapping[str, str] | None = None,
    cache_dir: Path | None = None,
    rejects: Path | None = None,
    adjust: "Adjust | None" = None,
) -> DataReport:
    """Check every record of every source; what the policy says of it is left to the report's `raise_for_policy`.

    Args:
        policy: action per reason, with `default`; default `error`.
        cache_dir: findings are kept here and found again while data, images, processor and code stay the same;
            default `default_cache_dir()`.
        rejects: file of all unusable rows; default `rejects.jsonl` in `cache_dir`. Quarantined records go to
            `quarantine.jsonl` beside it.
        adjust: what else to make of each source's report, given its rejects' file, before the policy is applied.

    Raises:
        UserError: a source can't be read, or the policy names an unknown reason or action.
    """
    actions = check_policy(_DEFAULT_POLICY if policy is None else policy)
    cache = CheckCache(cache_dir or default_cache_dir())
    reports = tuple(check.source(source, cache) for source in sources)
    if adjust is not None:
        reports = tuple(adjust(source, report) for source, report in zip(sources, reports, strict=True))
    rejects = rejects or cache.folder / "rejects.jsonl"
    write_atomically(rejects, _rejected(reports, actions))
    if not any(action_for(actions, reason) == "quarantine" for report in reports for reason in report.dropped):
        return DataReport(reports, actions, rejects)
    quarantine = rejects.with_name("quarantine.jsonl")
    write_atomically(quarantine, _quarantined(sources, reports, actions))
    return DataReport(reports, actions, rejects, quarantine)


def cached_reports(sources: Sequence["DataSource"], check: DataCheck) -> list[SourceReport] | None:
    """What an earlier check with images decoded found of every source; None where one has yet to be checked."""
    cache = CheckCache(default_cache_dir())
    keys = [check.key(source, True, [file_signature(file) for file in data_files(source)]) for source in sources]
    entries = [(source, cache.load(key)) for source, key in zip(sources, keys, strict=True)]
    return [_report(source, *entry) for source, entry in entries if entry] if all(e for _, e in entries) else None


def show_report(report: DataReport, *, json_output: bool, more: Mapping[str, Any] | None = None) -> None:
    """Print the report as tables or as one JSON object, with `more` keys, then raise what the policy says.

    Raises:
        UserError: records can't be used, and the policy for their reason is `error`.
    """
    if json_output:
        sys.stdout.write(json.dumps(report.to_dict() | dict(more or {})) + "\n")
    else:
        print_report(report)
    report.raise_for_policy()


def default_cache_dir() -> Path:
    """`llava-llama31/check-data` under the user's cache folder."""
    return user_cache("check-data")


class _RejectWriter:
    """Writes rejects as JSON lines, and counts them per reason."""

    def __init__(self, file: TextIO):
        self._file = file
        self.counts: Counter[str] = Counter()
        self.first_ids: dict[str, list[str]] = {}

    def add(self, reject: dict) -> None:
        # data may name its images by URLs with passwords
        reject = {key: redacted(value) if isinstance(value, str) else value for key, value in reject.items()}
        with naming(Path(self._file.name)):
            self._file.write(json.dumps(reject) + "\n")
        self.counts[reject["reason"]] += 1
        ids = self.first_ids.setdefault(reject["reason"], [])
        if len(ids) < _NUM_FIRST_IDS:
            ids.append(reject["id"])


def _duplicate(store: RecordStore, row: int, earlier: int) -> dict:
    detail = f"same images and conversation as row {earlier} ({store.row_id(earlier)})"
    return {"row": row, "id": store.row_id(row), "image": None, "reason": "duplicate", "detail": detail}


def _first_equal(digests: bytearray) -> np.ndarray:
    """For each 16-byte digest, the position of the first equal one."""
    pairs = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    order = np.lexsort((pairs[:, 0], pairs[:, 1]))
    first = np.arange(len(pairs))
    if len(pairs):
        starts_group = np.concatenate([[True], (pairs[order[1:]] != pairs[order[:-1]]).any(1)])
        first[order] = order[starts_group][np.cumsum(starts_group) - 1]
    return first


def _add(not_read: Counter[str], found: Counter[str]) -> None:
    """Count fields; beyond `_NUM_NOT_READ` of them, the rest as one."""
    for name, number in found.items():
        not_read[name if name in not_read or len(not_read) < _NUM_NOT_READ else _OTHER_FIELDS] += number


def _report(source: "DataSource", summary: dict, arrays: dict[str, np.ndarray], rejects: Path) -> SourceReport:
    return SourceReport(
        name=source.name,
        path=source.path,
        format=summary["format"],
        num_rows=summary["num_rows"],
        dropped={reason: summary["dropped"][reason] for reason in REASONS if reason in summary["dropped"]},
        first_ids=summary["first_ids"],
        not_read=summary["not_read"],
        rows=arrays["rows"],
        counts={name: arrays[name] for name in COUNTS if name in arrays},
        prefixes=arrays["prefixes"],
        content=summary["content"],
        rejects=rejects,
        cached=True,
    )


def _rejected(reports: Sequence[SourceReport], policy: Mapping[str, Action]) -> Iterator[str]:
    for report in reports:
        for reject in report.rejected():
            row = {"source": report.name} | reject | {"action": action_for(policy, reject["reason"])}
            yield json.dumps(row) + "\n"


def _quarantined(
    sources: Sequence["DataSource"], reports: Sequence[SourceReport], policy: Mapping[str, Action]
) -> Iterator[str]:
    for source, report in zip(sources, reports, strict=True):
        store = open_records(source)
        for reject in report.rejected():
            if action_for(policy, reject["reason"]) == "quarantine":
                kept = {key: reject[key] for key in ("row", "id", "reason")}
                text = store.source_text(reject["row"])
                yield _quarantined_line({"source": report.name} | kept, text) + "\n"


def _quarantined_line(kept: dict, text: str) -> str:
    """The reject with its record; with the record's text where that is not JSON, gives a key twice, or holds NaN."""
    try:
        return json.dumps(kept | {"record": parse_json(text)}, allow_nan=False)
    except (ValueError, RecursionError):
        return json.dumps(kept | {"record": text})
