"""The rows that a stage will see, as numbers: what check-data found of them, or a named assumption."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava_llama31.trainer.costs.flops import Work
from llava_llama31.trainer.costs.image_tokens import CLIP_336, TileGrid
from llava_llama31.trainer.costs.memory import MicroBatch
from llava_llama31.trainer.data.batches.batch_order import BatchOrder, Lengths, RankBatches
from llava_llama31.trainer.data.sources.records import open_records
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.planning.model_sizes import published
from llava_llama31.trainer.recipes.derived import num_held_out
from llava_llama31.trainer.recipes.schema import DataSource, Stage


# batches that are gone through one by one; more are sampled evenly
_MAX_BATCHES = 200
# rows that are drawn for data that is not here
_MAX_DRAWN = 64 * 256
_Z95 = 1.645  # of the normal distribution


@dataclass(frozen=True)
class Assumptions:
    """What the user says of data that is not here.

    Args:
        rows: number of rows by source.
        tokens_per_row: of every row, image tokens among them.
        image: (height, width) in pixels of every row's image; None: COCO's sizes.
    """

    rows: Mapping[str, int]
    tokens_per_row: int | None = None
    image: tuple[int, int] | None = None


@dataclass(frozen=True)
class StageRows:
    """Rows of a stage.

    Args:
        lengths: of the training rows, or of rows that are drawn to stand for them.
        num_tiles, num_features: along `lengths`: of a row's images.
        num_rows: of the stage, held-out ones among them; None: not known.
        num_train: of them.
        assumed: what is not counted, in words; empty: all was counted by check-data.
    """

    lengths: Lengths
    num_tiles: np.ndarray
    num_features: np.ndarray
    num_rows: int | None
    num_train: int | None
    assumed: tuple[str, ...]


def stage_rows(
    stage: Stage, counted: StageRows | None, assumptions: Assumptions, seed: int, grid: TileGrid | None = None
) -> StageRows:
    """The counted rows where there are any, else rows that are drawn.

    Args:
        grid: of the model; default: that of CLIP at 336 px.
    """
    return counted if counted is not None else _assumed_rows(stage, assumptions, seed, grid or CLIP_336)


def _assumed_rows(stage: Stage, assumptions: Assumptions, seed: int, grid: TileGrid) -> StageRows:
    notes: list[str] = []
    numbers = [_num_rows(source, assumptions, notes) for source in stage.data]
    known = [number for number in numbers if number is not None]
    num_rows = sum(known) if len(known) == len(numbers) else None
    num_train = None if num_rows is None else _num_train(stage, numbers)
    shares = [(number or 1) * source.weight for number, source in zip(numbers, stage.data, strict=True)]
    drawn = min(num_train or stage.global_batch, _MAX_DRAWN)
    parts = [
        _draw(source, max(1, round(drawn * share / sum(shares))), stage, assumptions, _Chance(seed + i, grid, notes))
        for i, (source, share) in enumerate(zip(stage.data, shares, strict=True))
    ]
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    # images of different sources are different
    columns[3] = columns[3] + np.repeat(np.arange(len(parts)) * 2**32, [len(part[0]) for part in parts])
    mixed = np.random.default_rng(seed).permutation(len(columns[0]))
    tokens, supervised, prefix, prefixes, tiles, features = (column[mixed] for column in columns)
    return StageRows(Lengths(tokens, supervised, prefix, prefixes), tiles, features, num_rows, num_train, tuple(notes))


def _num_train(stage: Stage, numbers: list[int | None]) -> int:
    """Training rows of an epoch, each as often as the weight of its source says."""
    num_rows = sum(number or 0 for number in numbers)
    kept = 1 - num_held_out(stage, num_rows) / max(num_rows, 1)
    if all(source.weight == 1 for source in stage.data):
        return num_rows - num_held_out(stage, num_rows)
    return round(sum((n or 0) * kept * source.weight for n, source in zip(numbers, stage.data, strict=True)))


def _num_rows(source: DataSource, assumptions: Assumptions, notes: list[str]) -> int | None:
    """Rows that a source contributes, before any is found unusable."""
    if source.name in assumptions.rows:
        given = assumptions.rows[source.name]
        notes.append(f"{source.name}: {given:,} rows, as --rows says")
        return given
    number, reason = _num_rows_here(source)
    if number is None:
        entry = published()["data"].get(source.name)
        if entry is None:
            notes.append(f"{source.name} {reason}: its number of rows is not known (--rows {source.name}=N)")
            return None
        number = int(entry.get("images_only_rows", entry["rows"]) if source.images_only else entry["rows"])
        notes.append(f"{source.name} {reason}: {number:,} rows, as the published file has")
    return min(number, source.sample) if source.sample else number


def _num_rows_here(source: DataSource) -> tuple[int | None, str]:
    """Number of rows of a file or folder, or why it is unknown; a Hub id is not opened, which would download it."""
    if not Path(source.path).expanduser().exists():
        return None, "is not here"
    try:
        return len(open_records(source)), ""
    except UserError as error:
        return None, f"can't be read ({error})"


@dataclass(frozen=True)
class _Chance:
    """What rows are drawn with; `notes` collects what is assumed."""

    seed: int
    grid: TileGrid
    notes: list[str]


def _draw(
    source: DataSource, number: int, stage: Stage, assumptions: Assumptions, chance: _Chance
) -> tuple[np.ndarray, ...]:
    """Tokens, supervised ones, prefix, prefix key, tiles and patch features of rows with one image each."""
    entry = published()["data"].get(source.name) or published()["unknown"]
    draw, notes = np.random.default_rng(chance.seed), chance.notes
    images = published()["images"] if assumptions.image is None else [[*assumptions.image, 1]]
    shares = np.array([share for *_, share in images])
    chosen = draw.choice(len(images), number, p=shares / shares.sum())
    image_tokens, features, tiles = np.array([chance.grid.measure(size[:2]) for size in images])[chosen].T
    if assumptions.tokens_per_row is not None:
        total = assumptions.tokens_per_row
        notes.append(f"{source.name}: rows of {total:,} tokens, as --tokens-per-row says, with an image each")
        image_tokens = np.full(number, min(int(image_tokens.mean()), total // 2 if total < 4000 else total))
        tokens = np.full(number, total)
        supervised = np.maximum(1, np.minimum(tokens - image_tokens, np.full(number, entry["supervised_tokens"][1])))
        features = np.minimum(features, image_tokens)
    else:
        text = _lognormal(draw, entry["text_tokens"], number)
        if stage.max_text_tokens is not None:
            text = np.minimum(text, stage.max_text_tokens)
        tokens = image_tokens + text
        supervised = np.minimum(_lognormal(draw, entry["supervised_tokens"], number), text - 1)
        notes.append(
            f"{source.name} is not counted: a row has {_image_words(assumptions)} in tiles of {chance.grid.tile} px, "
            f"and {entry['text_tokens'][1]} tokens of text in the median (check-data counts them where data and model "
            "are here)"
        )
    group = np.arange(number) // entry["rows_per_image"]
    # rows about one image have one image
    first = group * entry["rows_per_image"]
    tokens = tokens - image_tokens + image_tokens[first]
    return tokens, supervised, image_tokens[first] + 5, group + 1, tiles[first], features[first]


def _image_words(assumptions: Assumptions) -> str:
    if assumptions.image is None:
        return "an image of COCO's sizes"
    return f"an image of {assumptions.image[0]} x {assumptions.image[1]} px"


def _lognormal(draw: np.random.Generator, quantiles: list[int], number: int) -> np.ndarray:
    low, middle, high = quantiles
    values = np.exp(draw.normal(np.log(middle), np.log(high / low) / 2 / _Z95, number))
    return np.maximum(2, np.round(values)).astype(np.int64)


def counted_rows(stage: Stage, model_folder: Path, seed: int) -> StageRows | None:
    """The rows as check-data found them; None where it has not checked them, or they have changed since."""
    from llava_llama31.processing import LlavaLlama31Processor
    from llava_llama31.trainer.data.batches.stage_rows import split_rows, stage_check
    from llava_llama31.trainer.data.check.check import cached_reports
    from llava_llama31.trainer.data.check.report import select_rows

    if stage.contamination is not None:
        return None  # which rows it leaves is known to the check alone
    try:
        processor = LlavaLlama31Processor.from_pretrained(model_folder)
        reports = cached_reports(stage.data, stage_check(stage, processor))
    except (OSError, UserError):
        return None
    if reports is None:
        return None
    columns: list[tuple[np.ndarray, ...]] = []
    for source, found in zip(stage.data, reports, strict=True):
        chosen = select_rows(found, source.sample, source.sample_when, seed)
        names = ("num_tokens", "num_supervised_tokens", "num_prefix_tokens", "num_tiles", "num_image_tokens")
        counts = [found.counts[name][chosen] for name in names]
        columns.append((*counts[:3], np.where(counts[2] > 0, found.prefixes[chosen], 0), *counts[3:]))
    joined = [np.concatenate(column) for column in zip(*columns, strict=True)]
    num_rows = len(joined[0])
    trained, _ = split_rows(stage, np.repeat(np.arange(len(columns)), [len(column[0]) for column in columns]), seed)
    tokens, supervised, prefix, prefixes, tiles, image_tokens = (column[trained] for column in joined)
    return StageRows(Lengths(tokens, supervised, prefix, prefixes), tiles, image_tokens, num_rows, len(trained), ())


@dataclass(frozen=True)
class Passes:
    """What all steps of a stage read.

    Args:
        tokens: of the samples, a shared image's for each of them.
        positions: that are computed, in packed rows.
        tiles: that the vision tower reads.
        works: micro-batches with and without images, added up.
        worst: the longest micro-batch.
        sampled: not all steps were gone through.
    """

    tokens: int
    positions: int
    tiles: int
    works: tuple[Work, Work]
    worst: MicroBatch
    sampled: bool


def passes(stage: Stage, rows: StageRows, order: BatchOrder, steps: int, num_devices: int) -> Passes:
    """Go through the stage's steps, or through some of them."""
    ranks = RankBatches(order, micro_batch=stage.micro_batch, rank=0, num_processes=num_devices, packed=stage.packing)
    batches, whole = _chosen_batches(order, steps)
    counted = not rows.assumed
    totals = np.zeros((2, len(_FIELDS)), np.float64)
    tokens, worst = 0, np.zeros(len(_FIELDS))
    for batch in batches:
        tokens += int(order.lengths.num_tokens[batch].sum())
        found = _measure([micro for micro in ranks.micro_batches(batch) if micro], rows, order, stage.packing)
        has_images = found[:, _TILES] > 0
        totals += found[has_images].sum(axis=0), found[~has_images].sum(axis=0)
        worst = max(worst, found[found[:, _TOKENS].argmax()], key=lambda measured: measured[_TOKENS])
    scale = steps / len(batches)
    with_images, without = (np.round(total * scale).astype(np.int64) for total in totals)
    return Passes(
        tokens=_tokens(order, steps) if counted else round(tokens * scale),
        positions=int(with_images[_TOKENS] + without[_TOKENS]),
        tiles=int(with_images[_TILES]),
        works=(_work(with_images), _work(without)),
        worst=MicroBatch(
            num_tokens=int(worst[_TOKENS]),
            num_keys=int(worst[_KEYS]),
            num_supervised=int(worst[4]),
            num_last_queries=int(worst[5]),
            num_tiles=int(worst[_TILES]),
            num_features=int(worst[1]),
            keeps_logits=not stage.packing,
        ),
        sampled=not whole,
    )


def _tokens(order: BatchOrder, steps: int) -> int:
    """Tokens of the samples of all steps."""
    total, per_epoch = 0, order.steps_per_epoch
    for epoch in range(-(-steps // per_epoch)):
        batches = order.batches(epoch)[: steps - epoch * per_epoch]
        total += sum(int(order.lengths.num_tokens[batch].sum()) for batch in batches)
    return total


def _chosen_batches(order: BatchOrder, steps: int) -> tuple[list[np.ndarray], bool]:
    """All steps' batches, or as many of the first epoch's as are worth the time."""
    per_epoch = order.steps_per_epoch
    if steps <= _MAX_BATCHES:
        epochs = -(-steps // per_epoch)
        return [batch for epoch in range(epochs) for batch in order.batches(epoch)][:steps], True
    batches = order.batches(0)
    chosen = np.unique(np.linspace(0, len(batches) - 1, min(_MAX_BATCHES, len(batches))).astype(int))
    return [batches[i] for i in chosen], False


# the fields of Work in order, and the keys of all segments
_FIELDS = (*Work.__dataclass_fields__, "num_keys")
_TILES, _TOKENS, _KEYS = 0, 2, len(_FIELDS) - 1


def _measure(micro_batches: list[list[int]], rows: StageRows, order: BatchOrder, packed: bool) -> np.ndarray:
    """Each micro-batch's Work, and its keys; supervised tokens are taken to be the last ones of their sample.

    A step's at once: a plan goes through a million micro-batches, and arrays of eight samples are slower than numbers.
    """
    shares = packed and order.share_prefix > 1
    units = [order.units(np.array(micro)) if shares else [[index] for index in micro] for micro in micro_batches]
    sizes = np.array([len(unit) for micro in units for unit in micro])
    index = np.array([index for micro in units for unit in micro for index in unit])
    # where each unit begins among the samples, and each micro-batch among the units and among the samples
    begins, of_units, of_samples = (_begins(x) for x in (sizes, [*map(len, units)], [*map(len, micro_batches)]))
    first = index[begins]
    lengths = rows.lengths
    trunk = np.where(sizes > 1, lengths.num_prefix_tokens[first], 0).astype(np.float64)
    before = np.repeat(trunk, sizes)
    length = lengths.num_tokens[index] - before
    if not packed:  # padded to the longest
        length = np.repeat(np.maximum.reduceat(length, of_samples), [*map(len, micro_batches)])
    learnt = np.minimum(lengths.num_supervised_tokens[index], length)
    pairs = before * length + length * (length + 1) / 2
    learnt_pairs = learnt * (before + length) - learnt * (learnt - 1) / 2
    samples = [np.add.reduceat(x, of_samples) for x in (length, pairs, learnt, learnt_pairs)]
    parts = rows.num_tiles[first], rows.num_features[first], trunk, trunk * (trunk + 1) / 2, trunk * (sizes + 1)
    tiles, features, *trunks = (np.add.reduceat(x.astype(np.float64), of_units) for x in parts)
    tokens, pairs, supervised, learnt_pairs = samples
    fields = tiles, features, tokens + trunks[0], pairs + trunks[1], supervised, supervised, learnt_pairs, supervised
    return np.stack([*fields, tokens + trunks[2]], axis=1)


def _begins(sizes: np.ndarray | list[int]) -> np.ndarray:
    """Where each of parts of these sizes begins."""
    return np.cumsum(sizes) - sizes


def _work(total: np.ndarray) -> Work:
    return Work(*(int(number) for number in total[: len(_FIELDS) - 1]))


def histogram(lengths: Lengths) -> dict[str, int]:
    """Quantiles of the rows' tokens."""
    values = np.percentile(lengths.num_tokens, (5, 50, 95, 100), method="nearest")
    return dict(zip(("p5", "p50", "p95", "max"), (int(value) for value in values), strict=True))
