"""Checks rows in chunks, here or in a pool of processes: readable, images good, tokens within the limits."""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from llava_llama31.trainer.data.check.image_decoder import Decoder
from llava_llama31.trainer.data.sources.images import ImageRef
from llava_llama31.trainer.data.sources.records import RecordStore
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.redaction import printable
from llava_llama31.trainer.worker_pools import spawned_pool


if TYPE_CHECKING:
    from llava_llama31.processing import LlavaLlama31Processor


Size = tuple[int, int]  # (height, width) in pixels


class _Readable(NamedTuple):
    """What is kept of a record until it is counted; not the record, whose images may be megabytes."""

    row: int
    digest: bytes
    prefix: int
    messages: list[dict]
    sizes: list[Size]
    not_read: tuple[str, ...]


COUNTS = ("num_tokens", "num_image_tokens", "num_supervised_tokens", "num_tiles", "num_prefix_tokens")

_CHUNK_ROWS = 256
# a chunk's rows of the largest size would fill gigabytes
_CHUNK_CHARACTERS = 4_000_000
_NAME_LENGTH = 1000
# a process takes seconds to start
_ROWS_PER_WORKER = {"decode": 2500, "header": 20_000, "skip": 50_000}


@dataclass(frozen=True)
class Limits:
    """What a record may measure.

    Args:
        max_tokens: of the whole record, image tokens included; None: no limit.
        max_text_tokens: of the record without its image tokens; None: no limit.
    """

    max_tokens: int | None = None
    max_text_tokens: int | None = None


@dataclass
class Findings:
    """What one chunk of rows holds.

    Args:
        num_rows: of the chunk.
        rows: the usable ones.
        digests: 16 bytes each, of the usable rows.
        prefixes: of each usable row, equal where rows begin with the same turns and images; 0 without an image.
        counts: COUNTS of the usable rows; empty tuples without a processor.
        rejects: row, id, image, reason and detail of the others.
        files: size and modification time of every image file that was looked for.
        not_read: fields of the usable rows that nothing was made of, with the number of these rows.
    """

    num_rows: int
    rows: list[int] = field(default_factory=list)
    digests: bytearray = field(default_factory=bytearray)
    prefixes: list[int] = field(default_factory=list)
    counts: list[tuple[int, ...]] = field(default_factory=list)
    rejects: list[dict] = field(default_factory=list)
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    not_read: Counter[str] = field(default_factory=Counter)


@dataclass
class RowChecker:
    """Checks rows of one store; pickles, so that worker processes can have one each.

    Args:
        store: the records.
        processor: counts tokens; None to leave that out.
        limits: what a record may measure.
        images: decode them, read their headers, or leave them alone (then tokens can't be counted).
    """

    store: RecordStore
    processor: "LlavaLlama31Processor | None"
    limits: Limits
    images: Literal["decode", "header", "skip"]
    _measures: dict[Size, tuple[int, int]] = field(default_factory=dict, init=False)
    _decoder: Decoder = field(init=False)

    def __post_init__(self) -> None:
        self._decoder = Decoder(self.store.max_pixels)

    def close(self) -> None:
        """End the process that decodes, if one has started."""
        self._decoder.close()

    def check(self, rows: Sequence[int]) -> Findings:
        """Findings about these rows; duplicates are not looked for."""
        found = Findings(len(rows))
        known: dict[str, Size | RecordError] = {}
        readable: list[_Readable] = []
        num_characters = 0
        for row in rows:
            try:
                record = self.store[row]
                sizes = [] if self.images == "skip" else [self._size(image, known, found) for image in record.images]
            except RecordError as error:
                self._reject(found, row, error)
            else:
                digest, prefix = record.digest(), record.prefix_digest()
                readable.append(_Readable(row, digest, prefix, record.messages, sizes, record.not_read))
                num_characters += _num_characters(record.messages)
                if num_characters > _CHUNK_CHARACTERS:
                    self._count(readable, found)
                    readable, num_characters = [], 0
        self._count(readable, found)
        found.rejects.sort(key=lambda reject: reject["row"])
        return found

    def _count(self, readable: list[_Readable], found: Findings) -> None:
        for record, counts in self._counted(readable):
            if isinstance(counts, RecordError):
                self._reject(found, record.row, counts)
            else:
                found.rows.append(record.row)
                found.digests += record.digest
                found.prefixes.append(record.prefix)
                found.counts.append(counts)
                found.not_read.update(map(printable, record.not_read))

    def _size(self, image: ImageRef, known: dict[str, Size | RecordError], found: Findings) -> Size:
        if image.path is None:
            size = self._measured(image)
        else:
            path = image.path
            if path not in known:
                if not image.is_remote:  # the store is not asked for each image at every start
                    found.files[path] = image.stat()
                known[path] = self._measured(image)
            size = known[path]
        if isinstance(size, RecordError):
            raise size
        return size

    def _measured(self, image: ImageRef) -> Size | RecordError:
        try:
            size = image.size() if self.images == "header" else self._decoder.size(image.fetched())
        except RecordError as error:
            return error
        if self.processor is not None:
            processor = self.processor
            if tiles_vanish(
                size, processor.image_processor.image_grid_pinpoints, processor.patch_size, processor.tile_size
            ):
                return RecordError("too_thin_image", f"{size[0]} x {size[1]} pixels", image.name)
        return size

    def _counted(self, readable: list[_Readable]) -> Iterator[tuple[_Readable, tuple[int, ...] | RecordError]]:
        if self.processor is None:
            yield from ((record, ()) for record in readable)
            return
        encodings = self.processor.encode_batch(
            [record.messages for record in readable], [record.sizes for record in readable]
        )
        for record, encoding in zip(readable, encodings, strict=True):
            measures = [self._measure(size) for size in record.sizes]
            num_image_tokens, num_tiles = (sum(column) for column in zip((0, 0), *measures, strict=True))
            num_tokens = len(encoding.input_ids)
            num_supervised = num_tokens - encoding.labels.count(-100)
            counts = (num_tokens, num_image_tokens, num_supervised, num_tiles, encoding.num_prefix_tokens)
            yield record, self._within_limits(counts)

    def _measure(self, size: Size) -> tuple[int, int]:
        assert self.processor is not None
        if size not in self._measures:
            self._measures[size] = self.processor.num_image_tokens(size), self.processor.num_tiles(size)
        return self._measures[size]

    def _within_limits(self, counts: tuple[int, ...]) -> tuple[int, ...] | RecordError:
        num_tokens, num_image_tokens, num_supervised = counts[:3]
        longest, longest_text = self.limits.max_tokens, self.limits.max_text_tokens
        num_text = num_tokens - num_image_tokens
        if longest is not None and num_tokens > longest:
            what = f"{num_tokens} tokens, {num_image_tokens} of them of images; at most {longest}"
            return RecordError("too_long", what)
        if longest_text is not None and num_text > longest_text:
            return RecordError("too_long", f"{num_text} text tokens; at most {longest_text}")
        if not num_supervised:
            return RecordError("no_supervised_token", "no token of the record is trained on")
        return counts

    def _reject(self, found: Findings, row: int, error: RecordError) -> None:
        found.rejects.append(
            {
                "row": row,
                "id": self.store.row_id(row),
                "image": error.image and error.image[:_NAME_LENGTH],
                "reason": error.reason,
                "detail": error.detail[:_NAME_LENGTH],
            }
        )


def _num_characters(messages: list[dict]) -> int:
    return sum(len(part.get("text", "")) for message in messages for part in message["content"])


def tiles_vanish(size: Size, pinpoints: Sequence[Sequence[int]], patch_size: int, tile_size: int) -> bool:
    """Whether unpadding leaves no row or no column of the tiles' features, as LLaVA-NeXT unpads (height, width)."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = size
    # a tile's own patches: 384 px are 27 of 14 px
    best = select_best_resolution(size, list(pinpoints))
    rows, columns = (side // tile_size * (tile_size // patch_size) for side in best)
    if width / height > columns / rows:
        whole, kept = rows, int(round(height * (columns / width), 7))
    else:
        whole, kept = columns, int(round(width * (rows / height), 7))
    return whole - 2 * ((whole - kept) // 2) == 0


def check_rows(checker: RowChecker, num_workers: int | None = None) -> Iterator[Findings]:
    """Findings of all rows of the checker's store, chunk by chunk in order.

    Args:
        checker: what to check and how.
        num_workers: processes; 0 for this one alone, None for as many as the cores and the rows are worth.

    Raises:
        UserError: when a worker process dies.
    """
    num_rows = len(checker.store)
    chunks = [range(row, min(row + _CHUNK_ROWS, num_rows)) for row in range(0, num_rows, _CHUNK_ROWS)]
    if num_workers is None:
        num_workers = min(num_cores(), num_rows // _ROWS_PER_WORKER[checker.images])
    if num_workers < 2:
        with closing(checker):
            yield from map(checker.check, chunks)
        return
    pool = spawned_pool(num_workers, _start_worker, checker)
    try:
        yield from pool.map(_check_in_worker, chunks)
    except BrokenProcessPool:
        what = "a worker process died, perhaps because memory ran out; it was not decoding an image"
        raise UserError(what, where="check-data", fix="use fewer workers, or a machine with more memory") from None
    finally:
        pool.shutdown(cancel_futures=True)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


_worker_checker: RowChecker | None = None


def _start_worker(checker: RowChecker) -> None:
    global _worker_checker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_checker = checker


def _check_in_worker(rows: range) -> Findings:
    assert _worker_checker is not None
    return _worker_checker.check(rows)
