"""The rows of a stage: checked, sampled, split into training and validation, batched."""

import hashlib
import math
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.data.batches.batch_order import BatchOrder, Lengths, RankBatches
from llava_llama31.trainer.data.check.check import check_sources, default_cache_dir
from llava_llama31.trainer.data.check.report import DataReport, select_rows
from llava_llama31.trainer.data.check.row_checker import Limits
from llava_llama31.trainer.data.sources.records import RecordStore, open_records
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.derived import num_held_out
from llava_llama31.trainer.recipes.schema import Stage


@dataclass(frozen=True)
class StageData:
    """Rows as (source, row); `lengths` and `eval_lengths` run along `train_rows` and `eval_rows`.

    `summary` has one entry per source: name, rows, usable, dropped by reason, selected, license.
    """

    stores: list[RecordStore]
    train_rows: list[tuple[int, int]]
    eval_rows: list[tuple[int, int]]
    lengths: Lengths
    eval_lengths: Lengths
    summary: list[dict[str, Any]]


def check_stage(
    stage: Stage, processor: LlavaLlama31Processor, rejects: Path | None, *, progress: bool = True
) -> DataReport:
    """Check all records of a stage under its limits and policy; findings are cached over runs.

    Raises:
        UserError: when records can't be used and their policy is `error`.
    """
    return check_sources(
        stage.data,
        processor,
        limits=stage_limits(stage),
        policy=stage.on_bad_record,
        cache_dir=default_cache_dir(),
        rejects=rejects,
        keep_data_newline=keeps_data_newline(stage),
        progress=progress,
    )


def stage_limits(stage: Stage) -> Limits:
    limits = [limit for limit in (stage.max_tokens, stage.max_row_tokens) if limit is not None]
    return Limits(max_tokens=min(limits, default=None), max_text_tokens=stage.max_text_tokens)


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


def load_stage_data(stage: Stage, processor: LlavaLlama31Processor, rejects: Path, seed: int) -> StageData:
    """Check the data (the first process of a machine does, the others find its result) and choose the rows.

    Raises:
        UserError: records can't be used and their policy is `error`, or the machines find different ones.
    """
    state = PartialState()
    with state.local_main_process_first():
        own_rejects = rejects if state.is_main_process else None  # one writer
        report = check_stage(stage, processor, own_rejects, progress=state.is_main_process)
    rows: list[tuple[int, int]] = []
    lengths = []
    summary = []
    for i, (source, found) in enumerate(zip(stage.data, report.sources, strict=True)):
        chosen = select_rows(found, source.sample, source.sample_when, seed)
        rows += [(i, int(row)) for row in found.rows[chosen]]
        names = ("num_tokens", "num_supervised_tokens", "num_prefix_tokens")
        counts = [found.counts[name][chosen] for name in names]
        lengths.append((*counts, np.where(counts[2] > 0, found.prefixes[chosen], 0)))
        summary.append(
            {
                "name": source.name,
                "rows": found.num_rows,
                "usable": len(found.rows),
                "dropped": dict(found.dropped),
                "selected": len(chosen),
                "weight": source.weight,
                "license": source.license,
                "hub_id": source.hub_id,
            }
        )
    order = np.random.default_rng([seed, len(rows)]).permutation(len(rows))
    num_eval = num_held_out(stage, len(rows))
    held_out, trained = np.sort(order[:num_eval]), np.sort(order[num_eval:])
    sources = np.array([source for source, _ in rows], dtype=np.int64)
    trained = weighted(trained, sources[trained], [source.weight for source in stage.data], seed)
    found_lengths = Lengths(*(np.concatenate(column) for column in zip(*lengths, strict=True)))
    data = StageData(
        stores=[open_records(source, keep_data_newline=keeps_data_newline(stage)) for source in stage.data],
        train_rows=[rows[i] for i in trained],
        eval_rows=[rows[i] for i in held_out],
        lengths=found_lengths[trained],
        eval_lengths=found_lengths[held_out],
        summary=summary,
    )
    if state.num_processes > 1:
        _check_agreement(data)
    return data


def _check_agreement(data: StageData) -> None:
    """Every process has to train on the same rows, or the steps would differ without a word."""
    digest = hashlib.sha256(np.array([*data.train_rows, *data.eval_rows], dtype=np.int64).tobytes())
    for lengths in (data.lengths, data.eval_lengths):
        for column in (lengths.num_tokens, lengths.num_supervised_tokens, lengths.num_prefix_tokens):
            digest.update(np.ascontiguousarray(column, dtype=np.int64).tobytes())
    found = gather_object([(socket.gethostname(), len(data.train_rows), digest.hexdigest())])
    (first, num_rows, expected), *others = found
    different = {host: rows for host, rows, digest_there in others if digest_there != expected}
    if different:
        listed = ", ".join(f"{host} has {rows:,}" for host, rows in different.items())
        raise UserError(
            f"the processes find different records: {first} has {num_rows:,} to train on, {listed}",
            fix="make data, image folders and processor the same on all machines; `llava-llama31 check-data RECIPE` "
            "on each lists what it can't use",
        )


def batch_order(stage: Stage, lengths: Lengths, seed: int) -> BatchOrder:
    """The stage's global batches."""
    return BatchOrder(
        lengths,
        global_batch=stage.global_batch,
        seed=seed,
        keep_last=stage.last_batch == "keep",
        group_by_length=stage.group_by_length,
        equal_tokens=stage.batch_by == "supervised_tokens",
        share_prefix=stage.share_prefix if stage.packing else 1,
    )


def within_row_limit(stage: Stage, lengths: Lengths, seed: int, num_processes: int) -> Stage:
    """The stage with the largest micro-batch whose packed rows keep within `max_row_tokens`, as all samples do."""
    limit, order = stage.max_row_tokens, batch_order(stage, lengths, seed)
    if limit is None:
        return stage
    epochs = math.ceil(stage.epochs or (stage.max_steps or 0) / max(1, order.steps_per_epoch))
    batches = [batch for epoch in range(epochs) for batch in order.batches(epoch)]
    samples = stage.global_batch // num_processes

    def fits(micro_batch: int) -> bool:
        rows = RankBatches(order, micro_batch=micro_batch, rank=0, num_processes=num_processes, packed=True)
        return all(order.row_length(row) <= limit for batch in batches for row in rows.micro_batches(batch)[:1])

    sizes = (size for size in range(samples, 0, -1) if samples % size == 0 and fits(size))
    return stage.model_copy(update={"micro_batch": next(sizes, 1)})
