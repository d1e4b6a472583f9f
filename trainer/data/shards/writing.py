"""Writes the rows of a source into tar shards of equal numbers of rows, and the index that opens them.

A sample is `000000012.json` and its images, `000000012.0.jpg`, ..., as WebDataset has them, in the order of the rows.
Images keep their bytes, records their fields; a record whose images are in parts or columns of other tools is written
as `messages`. The index is written last, so a killed writing leaves no set.
"""

import hashlib
import io
import json
import logging
import shutil
import tarfile
import tempfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from llava_llama31.trainer.data.check.cache import write_atomically
from llava_llama31.trainer.data.sources import fields
from llava_llama31.trainer.data.sources.conversations import Record
from llava_llama31.trainer.data.sources.images import image_column
from llava_llama31.trainer.data.sources.records import RecordStore, open_records
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.data.sources.remote_files import is_remote, join
from llava_llama31.trainer.data.sources.sharded_rows import (
    INDEX,
    KEY_DIGITS,
    MEMBER_TYPE,
    MEMBERS,
    ROW_TYPE,
    ROWS,
    VERSION,
)
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.redaction import printable, redacted


if TYPE_CHECKING:
    from llava_llama31.trainer.recipes.schema import DataSource


logger = logging.getLogger(__name__)

SHARD_BYTES = 512 * 10**6
_SAMPLED_ROWS = 200  # whose bytes tell the number of shards
_BLOCK = tarfile.BLOCKSIZE
_SUFFIXES = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"), (b"GIF8", "gif"), (b"BM", "bmp"))


@dataclass(frozen=True)
class Written:
    """What was written: rows, shards, bytes of the shards, and the rows that could not be."""

    rows: int
    shards: int
    bytes: int
    rejected: int
    rejects: str


@dataclass
class _Index:
    """What the index will hold."""

    suffixes: list[str] = field(default_factory=list)
    starts: array = field(default_factory=lambda: array("Q"))
    sizes: array = field(default_factory=lambda: array("L"))
    crcs: array = field(default_factory=lambda: array("L"))
    kinds: array = field(default_factory=lambda: array("H"))
    ends: array = field(default_factory=lambda: array("Q"))
    shards: list[dict[str, Any]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, start: int, content: bytes, suffix: str) -> None:
        if suffix not in self.suffixes:
            self.suffixes.append(suffix)
        self.starts.append(start)
        self.sizes.append(len(content))
        self.crcs.append(zlib.crc32(content))
        self.kinds.append(self.suffixes.index(suffix))

    def members(self) -> np.ndarray:
        table = np.empty(len(self.starts), MEMBER_TYPE)
        for name, values in (("start", self.starts), ("size", self.sizes), ("crc", self.crcs), ("suffix", self.kinds)):
            table[name] = np.frombuffer(values, f"u{values.itemsize}") if len(values) else 0
        return table


def write_shards(
    source: "DataSource",
    to: str,
    *,
    num_shards: int | None = None,
    skip_bad: bool = False,
    advance: Callable[[int], None] = lambda num_rows: None,
) -> Written:
    """Write a source's rows into a folder or below a URL.

    Args:
        num_shards: default: as many as make about 512 MB each.
        skip_bad: leave out rows that can't be read, and list them; otherwise the first one stops the writing. What the
            source's `where` leaves out is left out and listed anyway.
        advance: is called with the number of rows as they are written.

    Raises:
        UserError: the place holds an index already, a row can't be read, or writing fails.
    """
    store = open_records(source)
    place = _Place(to)
    place.check_empty()
    rows = len(store)
    number = max(1, min(num_shards or _number_of_shards(store), rows))
    index = _Index()
    rejects: list[dict[str, Any]] = []
    for shard in range(number):
        begin, end = shard * rows // number, (shard + 1) * rows // number
        name = f"shard-{shard:05}-of-{number:05}.tar"
        with tempfile.NamedTemporaryFile(dir=place.staging(), suffix=".tar") as file:
            first = len(index.ends)
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for row in range(begin, end):
                    reject = _try_row(tar, index, store, row)
                    if reject is not None:
                        _refuse(reject, source, skip_bad=skip_bad)
                        rejects.append(reject)
                    advance(1)
            file.flush()
            size, sha256 = place.put(file.name, name)
        index.shards.append({"name": name, "rows": len(index.ends) - first, "bytes": size, "sha256": sha256})
    if not len(index.ends):
        raise UserError("no row can be written", where=source.path, fix="read the reasons with check-data")
    listed = place.put_lines("rejects.jsonl", (json.dumps(reject) + "\n" for reject in rejects)) if rejects else ""
    place.put_index(index, source)
    if index.left_out:
        counts = ", ".join(f"{printable(name)} of {number:,} rows" for name, number in sorted(index.left_out.items()))
        logger.warning("%s: not written: %s", source.path, counts)
    num_bytes = sum(shard["bytes"] for shard in index.shards)
    return Written(len(index.ends), number, num_bytes, len(rejects), listed)


def _try_row(tar: tarfile.TarFile, index: _Index, store: RecordStore, row: int) -> dict[str, Any] | None:
    """Add a sample, or say why the row can't be one."""
    try:
        _write_row(tar, index, store, row, first_key=len(index.ends))
    except RecordError as error:
        return {"row": row, "id": store.row_id(row), "reason": error.reason, "detail": error.detail}
    return None


def _refuse(reject: dict[str, Any], source: "DataSource", *, skip_bad: bool) -> None:
    """Nothing, unless a row that can't be read stops the writing."""
    if skip_bad or reject["reason"] == "filtered":
        return
    what = f"row {reject['row']} ({reject['id']}) can't be written: {reject['reason']}: {reject['detail']}"
    raise UserError(what, where=source.path, fix="correct the row, or leave such rows out with --on-bad skip")


def _write_row(tar: tarfile.TarFile, index: _Index, store: RecordStore, row: int, *, first_key: int) -> None:
    """Add a sample; a row that can't be read leaves no trace."""
    record = store[row]
    # files of a sample that are neither its record nor its images
    index.left_out.update(name for name in record.not_read if name.startswith("*"))
    images = []
    for number, image in enumerate(record.images):
        data = image.encoded()
        kind = next((suffix for head, suffix in _SUFFIXES if data.startswith(head)), None)
        if kind is None:
            raise RecordError("unsupported_image_format", f"starts with {data[:12]!r}", image.name)
        images.append((f"{number}.{kind}", data))
    key = f"{first_key:0{KEY_DIGITS}}"
    names = [f"{key}.{suffix}" for suffix, _ in images]
    content = json.dumps(_record(store.raw(row), record, names), ensure_ascii=False, default=_refused).encode()
    for suffix, data in [("json", content), *images]:
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(data)
        index.add(tar.offset + _BLOCK, data, suffix)
        tar.addfile(info, io.BytesIO(data))
    index.ends.append(len(index.starts))


def _record(raw: dict, record: Record, names: list[str]) -> dict:
    """The record as it is to be stored: with the images' names in the shard."""
    kept = {key: value for key, value in raw.items() if key not in ("id", "image", "images")}
    if len(image_column(raw)) == len(names) and not fields.numbers_images(raw):
        return {"id": record.id} | kept | ({"images": names} if names else {})
    # its images are elsewhere than in the column
    return {"id": record.id, "messages": record.messages, "images": names}


def _refused(value: object) -> object:
    raise RecordError("malformed_record", f"a value of type {type(value).__name__} can't be written as JSON")


def _number_of_shards(store: RecordStore) -> int:
    """As many as make about SHARD_BYTES each, by a sample of rows."""
    rows = range(0, len(store), max(1, len(store) // _SAMPLED_ROWS))
    sizes = []
    for row in rows:
        try:
            record = store[row]
            sizes.append(sum(len(image.encoded()) + _BLOCK for image in record.images) + 2 * _BLOCK)
        except RecordError:
            continue
    mean = sum(sizes) / len(sizes) if sizes else 0
    return max(1, round(mean * len(store) / SHARD_BYTES))


class _Place:
    """A folder or a URL that files are put into, each whole or absent."""

    def __init__(self, to: str):
        self._to = to
        self._folder = None if is_remote(to) else Path(to)

    def staging(self) -> Path | None:
        """Where files are written first: on the disk that they go to, or in the temporary folder."""
        if self._folder is None:
            return None
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def check_empty(self) -> None:
        if self._folder is not None:
            there = (self._folder / INDEX).exists()
        else:
            system, path = self._system()
            there = system.exists(f"{path.rstrip('/')}/{INDEX}")
        if there:
            what = "an index of shards already exists here"
            raise UserError(what, where=redacted(self._to), fix="name another place, or remove the shards")

    def put(self, file: str, name: str) -> tuple[int, str]:
        """Put a finished file there; its bytes and sha256."""
        path = Path(file)
        with path.open("rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        size = path.stat().st_size
        try:
            if self._folder is not None:
                staged = self._folder / f".{name}"
                shutil.copyfile(path, staged)
                staged.replace(self._folder / name)
            else:
                system, path_there = self._system()
                system.put_file(file, f"{path_there.rstrip('/')}/{name}")
        except OSError as error:
            what = f"{name} can't be written: {error.strerror or error}"
            raise UserError(
                what, where=redacted(self._to), fix="check space, network and credentials there"
            ) from error
        return size, sha256

    def put_lines(self, name: str, lines: Iterator[str]) -> str:
        if self._folder is not None:
            write_atomically(self._folder / name, lines)
            return str(self._folder / name)
        with tempfile.NamedTemporaryFile("w", suffix=name) as file:
            file.writelines(lines)
            file.flush()
            self.put(file.name, name)
        return str(join(self._to, name))

    def put_index(self, index: _Index, source: "DataSource") -> None:
        """The arrays, and last what names them."""
        arrays = {}
        for name, table in ((MEMBERS, index.members()), (ROWS, np.frombuffer(index.ends, ROW_TYPE))):
            with tempfile.NamedTemporaryFile(dir=self.staging(), suffix=name) as file:
                _save(file, table)
                size, sha256 = self.put(file.name, name)
            arrays[name] = {"bytes": size, "sha256": sha256}
        content = {
            "version": VERSION,
            "source": source.name,
            "rows": len(index.ends),
            "suffixes": index.suffixes,
            "shards": index.shards,
            "arrays": arrays,
        }
        self.put_lines(INDEX, iter([json.dumps(content, indent=1)]))

    def _system(self) -> tuple[Any, str]:
        import fsspec.core

        return fsspec.core.url_to_fs(self._to)


def _save(file: BinaryIO | Any, content: np.ndarray) -> None:
    np.save(file, content, allow_pickle=False)
    file.flush()
