"""The rows of a stage: checked, sampled, split into training and validation, batched."""

import hashlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.data.batches.batch_order import Lengths
from llava_llama31.trainer.data.check.check import DataCheck, check_sources
from llava_llama31.trainer.data.check.report import DataReport, select_rows
from llava_llama31.trainer.data.check.row_checker import Limits
from llava_llama31.trainer.data.contamination.search import contamination_check
from llava_llama31.trainer.data.sources.records import RecordStore, open_records
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.derived import num_held_out
from llava_llama31.trainer.recipes.schema import DataSource, Stage


@dataclass(frozen=True)
class Rows:
    """Rows of a stage: (source, row) in the stage's data and, along these, their lengths."""

    places: list[tuple[int, int]]
    lengths: Lengths

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, chosen: np.ndarray) -> "Rows":
        return Rows([self.places[i] for i in chosen], self.lengths[chosen])


@dataclass(frozen=True)
class StageData:
    """What a stage trains on and is validated with.

    `summary` has one entry per source: name, rows, content (digests), usable, dropped by reason, fields not read,
    selected, license.
    """

    stores: list[RecordStore]
    train: Rows
    validation: Rows
    summary: list[dict[str, Any]]


def check_stage(
    stage: Stage, processor: LlavaLlama31Processor, rejects: Path | None, *, progress: bool = True
) -> DataReport:
    """Check all records of a stage under its limits and policy; findings are cached over runs.

    Raises:
        UserError: when records can't be used and their policy is `error`, or a weight leaves none of a source's rows.
    """
    check = stage_check(stage, processor, progress=progress)
    adjust = contamination_check(stage)
    report = check_sources(stage.data, check, policy=stage.on_bad_record, rejects=rejects, adjust=adjust)
    report.raise_for_policy()
    for source, found in zip(stage.data, report.sources, strict=True):
        # here too, since it is before the first stage; held-out rows are known when the stage begins
        check_weight(source, min(len(found.rows), source.sample or len(found.rows)))
    return report


def stage_check(
    stage: Stage, processor: LlavaLlama31Processor, *, decode: bool = True, progress: bool = True
) -> DataCheck:
    """How the records of a stage are checked."""
    limits = [limit for limit in (stage.max_tokens, stage.max_row_tokens) if limit is not None]
    return DataCheck(
        processor=processor,
        limits=Limits(max_tokens=min(limits, default=None), max_text_tokens=stage.max_text_tokens),
        decode=decode,
        keep_data_newline=keeps_data_newline(stage),
        progress=progress,
    )


def keeps_data_newline(stage: Stage) -> bool:
    return "double_newline_after_image" in stage.quirks


def weighted(rows: np.ndarray, sources: np.ndarray, weights: Sequence[float], seed: int) -> np.ndarray:
    """Rows, each as often as the weight of its source says; what is left of a weight is a draw by the seed.

    Args:
        rows: row numbers, in the order that is kept.
        sources: along `rows`, the number of each one's source.
    """
    times = np.empty(len(rows), dtype=np.int64)
    for source, weight in enumerate(weights):
        own = np.flatnonzero(sources == source)
        times[own] = int(weight)
        rest = round((weight - int(weight)) * len(own))
        times[np.random.default_rng([seed, source]).permutation(own)[:rest]] += 1
    return np.repeat(rows, times)


def check_weight(source: DataSource, num_rows: int) -> None:
    """Check that an epoch sees something of a source that has rows.

    Raises:
        UserError: weight x rows is rounded to nothing.
    """
    if num_rows and int(source.weight) == 0 and round(source.weight * num_rows) == 0:
        raise UserError(
            f"weight {source.weight:g} of {num_rows} rows is less than half a row, so none would be trained on",
            where=f"data: {source.name}",
            fix=f"give a weight above {0.5 / num_rows:.3g}, or remove the source",
        )


def split_rows(stage: Stage, sources: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training rows, each as often as the weight of its source says, and held-out rows.

    Args:
        sources: of every row, the number of its source; the rows are returned as positions here.

    Raises:
        UserError: a source's weight leaves none of its rows.
    """
    order = np.random.default_rng([seed, len(sources)]).permutation(len(sources))
    num_held = num_held_out(stage, len(sources))
    held_out, trained = np.sort(order[:num_held]), np.sort(order[num_held:])
    for number, source in enumerate(stage.data):
        check_weight(source, int((sources[trained] == number).sum()))
    return weighted(trained, sources[trained], [source.weight for source in stage.data], seed), held_out


def load_stage_data(stage: Stage, processor: LlavaLlama31Processor, rejects: Path, seed: int) -> StageData:
    """Check the data (the first process of a machine does, the others find its result) and choose the rows.

    Raises:
        UserError: records can't be used and their policy is `error`, or the machines find different ones.
    """
    state = PartialState()
    with state.local_main_process_first():
        own_rejects = rejects if state.is_main_process else None  # one writer
        report = check_stage(stage, processor, own_rejects, progress=state.is_main_process)
    places: list[tuple[int, int]] = []
    lengths = []
    summary = []
    for i, (source, found) in enumerate(zip(stage.data, report.sources, strict=True)):
        chosen = select_rows(found, source.sample, source.sample_when, seed)
        places += [(i, int(row)) for row in found.rows[chosen]]
        names = ("num_tokens", "num_supervised_tokens", "num_prefix_tokens")
        counts = [found.counts[name][chosen] for name in names]
        lengths.append((*counts, np.where(counts[2] > 0, found.prefixes[chosen], 0)))
        summary.append(
            {
                "name": source.name,
                "rows": found.num_rows,
                "content": dict(found.content),
                "usable": len(found.rows),
                "dropped": dict(found.dropped),
                "not_read": dict(found.not_read),
                "selected": len(chosen),
                "weight": source.weight,
                "license": source.license,
                "hub_id": source.hub_id,
                "contamination": list(found.contamination),
            }
        )
    rows = Rows(places, Lengths(*(np.concatenate(column) for column in zip(*lengths, strict=True))))
    trained, held_out = split_rows(stage, np.array([source for source, _ in places], dtype=np.int64), seed)
    data = StageData(
        stores=[open_records(source, keep_data_newline=keeps_data_newline(stage)) for source in stage.data],
        train=rows[trained],
        validation=rows[held_out],
        summary=summary,
    )
    if state.num_processes > 1:
        _check_agreement(data)
    return data


def _check_agreement(data: StageData) -> None:
    """Every process has to train on the same rows, or the steps would silently differ."""
    digest = hashlib.sha256(np.array([*data.train.places, *data.validation.places], dtype=np.int64).tobytes())
    for lengths in (data.train.lengths, data.validation.lengths):
        for column in (lengths.num_tokens, lengths.num_supervised_tokens, lengths.num_prefix_tokens):
            digest.update(np.ascontiguousarray(column, dtype=np.int64).tobytes())
    found = gather_object([(socket.gethostname(), len(data.train), digest.hexdigest())])
    (first, num_rows, expected), *others = found
    different = {host: rows for host, rows, digest_there in others if digest_there != expected}
    if different:
        listed = ", ".join(f"{host} has {rows:,}" for host, rows in different.items())
        raise UserError(
            f"the processes find different records: {first} has {num_rows:,} to train on, {listed}",
            fix="make data, image folders and processor the same on all machines; `llava-llama31 check-data RECIPE` "
            "on each lists what it can't use",
        )
