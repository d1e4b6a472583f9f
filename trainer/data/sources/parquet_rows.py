"""Rows of parquet files, read in place: footers at first, a row group when one of its rows is read.

A row group is the smallest part of a parquet file that can be read. It is fetched by byte range, of its columns those
that a record is made of, and kept in the cache of `remote_files` as an Arrow file, from which single rows are mapped.
"""

import io
import logging
import os
import re
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

from llava_llama31.trainer.data.sources.data_folders import listed_files, log_beside, split_names, splits_of
from llava_llama31.trainer.data.sources.dataset_rows import as_json, python_row
from llava_llama31.trainer.data.sources.fields import may_change_a_record
from llava_llama31.trainer.data.sources.remote_files import (
    Missing,
    RemoteFile,
    at_once,
    can_list,
    files_below,
    is_remote,
    join,
    keep_file,
    keeps_file,
    open_remote,
)
from llava_llama31.trainer.data.sources.sharded_rows import INDEX
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.file_names import ends_like_a_file
from llava_llama31.trainer.redaction import redacted


logger = logging.getLogger(__name__)

PARQUET_SUFFIXES = (".parquet", ".parq", ".pq")
# as long as the largest image; a data worker holds one row group, encoded and decoded, while it unpacks it
MAX_GROUP_BYTES = 256 * 2**20
_MAX_FOOTER_BYTES = 64 * 2**20
_MAGIC = b"PAR1"
_END_BYTES = 8  # length of the footer, and the magic
_TAIL_BYTES = 64 * 2**10  # asked for at first; most footers are shorter
_PIECE_BYTES = 32 * 2**20  # of one request
_GAP_BYTES = 256 * 2**10  # two columns this close are fetched by one request
_AHEAD_BYTES = 2 * MAX_GROUP_BYTES  # in flight in one worker
_BATCH_BYTES = 2**20
_OPEN_GROUPS = 32
_SHARDS_FIX = "write the rows as shards: `llava-llama31 shards {} --to DIR|URL` with a copy on this machine"


class ParquetRows:
    """The rows of parquet files in the files' and their own order, images as `{"bytes", "path"}`.

    Args:
        splits: files of each split that `split` names; a URL of a store, or a path of this machine.
        split: such as `train[:10%]+test`, or `all`.
        filters: columns of the source's `where`.

    Raises:
        UserError: there are none, they are damaged or differ in columns, or a row group is too large to be held; from
            `rows[i]`, a file was replaced since it was opened.
        RecordError: from `rows[i]`, that row alone is bad.
    """

    def __init__(self, splits: Mapping[str, Sequence[str]], split: str, filters: Collection[str] = ()):
        self._filters = frozenset(filters)
        urls = list(dict.fromkeys(file for files in splits.values() for file in files))
        at_once([partial(_open_footer, file) for file in urls])
        self._files = [_opened(file) for file in urls]
        first = _footer(self._files[0]).schema.to_arrow_schema()
        lengths = [_checked_lengths(file, first) for file in self._files]
        numbers = {file: number for number, file in enumerate(urls)}
        self._groups: list[tuple[int, int, int]] = []  # (file, row group, its first row that is taken)
        ends = array("Q")
        for split_urls, begin, end in _parts(splits, split, {u: sum(lengths[n]) for u, n in numbers.items()}):
            self._add([numbers[file] for file in split_urls], lengths, begin, end, ends)
        self._ends = ends
        self._opened: OrderedDict[tuple[int, int, bool], _Group] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": OrderedDict()}

    def __getitem__(self, row: int) -> object:
        """The row with all its columns."""
        return self._row(row, whole=True)

    def seen(self, row: int) -> tuple[dict, bool]:
        """The row with the columns that make a record that shows images, and whether others were left out.

        A column that was left out and has a value has `True` in its place.
        """
        place = self._place(row)
        found = self._row(row, whole=False)
        left_out = self._opened[(*self._groups[place][:2], False)].left_out
        return found | dict.fromkeys(left_out, True), bool(left_out)

    def text(self, row: int) -> str:
        """The row as JSON."""
        return as_json(self[row])

    def prefetch(self, rows: Iterable[int]) -> None:
        """Bring the row groups of rows into the cache, several at once."""
        wanted = sorted({self._groups[self._place(row)][:2] for row in rows})
        missing = [one for one in wanted if (*one, False) not in self._opened]
        largest = max((_view(self._files[number], group, self._filters).bytes for number, group in missing), default=0)
        if largest and keeps_file(largest):
            at_once([partial(self._bring, *one) for one in missing], max(1, _AHEAD_BYTES // largest))

    def _add(self, numbers: list[int], lengths: list[list[int]], begin: int, end: int, ends: array) -> None:
        """Take the rows from `begin` to `end` of some files."""
        first = 0
        for number in numbers:
            for group, length in enumerate(lengths[number]):
                start, stop = max(begin - first, 0), min(end - first, length)
                if start < stop:
                    self._groups.append((number, group, start))
                    ends.append((ends[-1] if ends else 0) + stop - start)
                first += length

    def _place(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return bisect_right(self._ends, row)

    def _row(self, row: int, *, whole: bool) -> dict:
        place = self._place(row)
        number, group, first = self._groups[place]
        within = row - (self._ends[place - 1] if place else 0) + first
        key = (number, group, whole)
        if key not in self._opened:
            self._opened[key] = self._open(number, group, whole=whole)
            # without a cache the row group itself is held: one with these columns, and one with all
            while len(self._opened) > (_OPEN_GROUPS if self._opened[key].on_disk else 2):
                self._opened.popitem(last=False)
        self._opened.move_to_end(key)
        return python_row(self._opened[key].row(within))

    def _bring(self, number: int, group: int) -> bytes:
        self._open(number, group, whole=False)
        return b""

    def _open(self, number: int, group: int, *, whole: bool) -> "_Group":
        import pyarrow

        file = self._files[number]
        view = _view(file, group, None if whole else self._filters)
        key = f"parquet {pyarrow.__version__}\0{file.url}\0{file.version}\0{file.size}\0{group}\0{view.columns}"
        for _ in range(2):
            path = keep_file(key, view.bytes, partial(_write, file, group, view))
            if path is None:
                return _Group(list(_batches(file, group, view)), view.left_out, on_disk=False)
            try:
                with pyarrow.ipc.open_file(pyarrow.memory_map(str(path))) as reader:
                    return _Group(
                        [reader.get_batch(i) for i in range(reader.num_record_batches)], view.left_out, on_disk=True
                    )
            except (OSError, pyarrow.ArrowException) as error:
                logger.info("%s: not used: %s", path, error)  # removed by another process, or damaged
                path.unlink(missing_ok=True)
        return _Group(list(_batches(file, group, view)), view.left_out, on_disk=False)


@dataclass(frozen=True)
class _View:
    """What is read of a row group.

    Args:
        columns: names of the columns that are read; None: all.
        spans: (start, end) of the bytes that hold them.
        bytes: unpacked.
        left_out: columns that are not read and have a value in every row.
    """

    columns: tuple[str, ...] | None
    spans: tuple[tuple[int, int], ...]
    bytes: int
    left_out: tuple[str, ...]


class _Group:
    """The rows of a row group, without the columns `left_out`."""

    def __init__(self, batches: list[Any], left_out: tuple[str, ...], *, on_disk: bool):
        self.left_out, self.on_disk = left_out, on_disk
        self._batches = batches
        self._ends = list(accumulate(batch.num_rows for batch in batches))

    def row(self, row: int) -> Any:
        """A table of one row."""
        number = bisect_right(self._ends, row)
        return self._batches[number].slice(row - (self._ends[number - 1] if number else 0), 1)


@dataclass(frozen=True)
class LocalFile:
    """A file of this machine, as `RemoteFile` is one of a store."""

    url: str
    size: int
    version: str

    def read(self, start: int, size: int) -> bytes:
        """Up to `size` bytes from byte `start` on."""
        try:
            with open(self.url, "rb") as file:
                file.seek(start)
                return file.read(size)
        except OSError as error:
            raise UserError(f"can't be read: {error.strerror}", where=self.url, fix="put the file back") from error

    fetch = read

    def check_unchanged(self) -> None:
        """Check that it is still the file that was opened.

        Raises:
            UserError: it is another one.
        """
        if _opened(self.url) != self:
            raise UserError("was changed since it was opened", where=self.url, fix="put the file back, or run again")


_File = RemoteFile | LocalFile


def _opened(name: str) -> _File:
    """A file of a store or of this machine."""
    if is_remote(name):
        return open_remote(name)
    try:
        facts = os.stat(name)
    except OSError as error:
        raise UserError(f"can't be read: {error.strerror}", where=name, fix="put the file back") from error
    return LocalFile(name, facts.st_size, str(facts.st_mtime_ns))


class _Held(io.RawIOBase):
    """A file of which some bytes are held; others are read from the store."""

    def __init__(self, file: _File, held: Sequence[tuple[int, bytes]]):
        super().__init__()
        self._file, self._held, self._position = file, held, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size}[whence]
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        start = self._position
        end = self._file.size if size is None or size < 0 else min(start + size, self._file.size)
        self._position = max(start, end)
        for first, data in self._held:
            if first <= start and end <= first + len(data):
                return data[start - first : end - first]
        return self._file.read(start, max(end - start, 0))


def is_parquet(url: str) -> bool:
    """Whether a URL names a parquet file, or a folder of them in a store that lists its files, without an index.

    Raises:
        UserError: the folder also holds others that look like data.
    """
    if ends_like_a_file(url) or not can_list(url):
        return _is_file(url)
    try:
        open_remote(str(join(url, INDEX)))
        return False
    except Missing:
        return bool(_listed(url, os.getpid()))


def _is_file(url: str) -> bool:
    return PurePosixPath(url).suffix.lower() in PARQUET_SUFFIXES


@lru_cache(64)
def _listed(url: str, process: int) -> tuple[str, ...]:
    """Names of the parquet files of a folder of a store, which is asked once."""
    found = listed_files(files_below(url), redacted(url))
    if found is None or found.kind != "parquet":
        return ()
    log_beside(redacted(url), found)
    return tuple(map(str, found.files))


def parquet_urls(url: str, split: str) -> dict[str, list[str]]:
    """The files of each split that `split` names, as `parquet_splits` finds them on this machine.

    Raises:
        UserError: there is no such split, or a file is missing.
    """
    if _is_file(url):
        return {name: [url] for name in split_names(split, redacted(url))}
    root = Path(os.sep)
    files = [root / name for name in _listed(url, os.getpid())]
    chosen = splits_of(root, files, split, redacted(url))
    return {name: [url.rstrip("/") + file.as_posix() for file in of_split] for name, of_split in chosen.items()}


def _parts(
    splits: Mapping[str, Sequence[str]], asked: str, rows_of: Mapping[str, int]
) -> Iterator[tuple[Sequence[str], int, int]]:
    """(files, first row, last) of each part of `train[:10%]+test`, with the rounding of `datasets`."""
    import datasets

    if asked == "all":
        yield splits["all"], 0, sum(rows_of[file] for file in splits["all"])
        return
    rows = {name: sum(rows_of[file] for file in files) for name, files in splits.items()}
    named = "+".join(part for part in asked.split("+") if rows[re.sub(r"\[.*?\]", "", part)])
    if not named:
        return
    try:
        for part in datasets.ReadInstruction.from_spec(named).to_absolute(rows):
            yield splits[part.splitname], part.from_ or 0, rows[part.splitname] if part.to is None else part.to
    except (ValueError, AssertionError) as error:
        raise UserError(f"{asked!r} is not a split: {error}", fix="name one in `split`, such as train[:10%]") from None


def _open_footer(url: str) -> bytes:
    _footer(_opened(url))
    return b""


@lru_cache(64)
def _footer(file: _File) -> Any:
    """A file's metadata.

    Raises:
        UserError: the file is not a whole parquet file.
    """
    import pyarrow.parquet

    tail = file.read(max(file.size - _TAIL_BYTES, 0), _TAIL_BYTES)
    fix = "write or upload the file again"
    if len(tail) < _END_BYTES + len(_MAGIC) or tail[-len(_MAGIC) :] != _MAGIC:
        raise UserError("does not end as a parquet file does", where=redacted(file.url), fix=fix)
    length = int.from_bytes(tail[-_END_BYTES:-4], "little") + _END_BYTES
    if length > min(file.size, _MAX_FOOTER_BYTES):
        raise UserError(f"its footer would have {length:,} bytes", where=redacted(file.url), fix=fix)
    if length > len(tail):
        tail = file.read(file.size - length, length)
    try:
        return pyarrow.parquet.read_metadata(pyarrow.BufferReader(_MAGIC + tail[-length:]))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"can't be read as parquet: {error}", where=redacted(file.url), fix=fix) from error


def _checked_lengths(file: _File, first: Any) -> list[int]:
    """Rows of each row group of a file.

    Args:
        first: columns of the first file.

    Raises:
        UserError: a row group is too large, or the file has other columns.
    """
    footer = _footer(file)
    _check_columns(file, first)
    for group in range(footer.num_row_groups):
        size, rows = footer.row_group(group).total_byte_size, footer.row_group(group).num_rows
        if size > MAX_GROUP_BYTES:
            what = (
                f"row group {group} has {size:,} bytes in {rows:,} rows, and is read as a whole for each of them: "
                f"more than the {MAX_GROUP_BYTES:,} that a data worker can hold"
            )
            fix = f"{_fix(file.url)}, or write the file with smaller row groups (pyarrow's `row_group_size`)"
            raise UserError(what, where=redacted(file.url), fix=fix)
    return [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]


def _check_columns(file: _File, first: Any) -> None:
    import pyarrow

    where, fix = redacted(file.url), "write all files with the same columns and types, or name each file separately"
    schema = _footer(file).schema.to_arrow_schema()
    if len(set(schema.names)) < len(schema.names):
        twice = next(name for name in schema.names if schema.names.count(name) > 1)
        raise UserError(f"column {ascii(twice)} occurs twice", where=where, fix=fix)
    if set(schema.names) != set(first.names):
        names = ", ".join(map(ascii, sorted({*schema.names} ^ {*first.names})))
        raise UserError(f"not all files have the columns {names}", where=where, fix=fix)
    for field in schema:
        both = [pyarrow.schema([one]) for one in (first.field(field.name), field)]
        try:
            pyarrow.unify_schemas(both, promote_options="permissive")
        except pyarrow.ArrowException:
            what = f"column {ascii(field.name)} is {field.type}, but {first.field(field.name).type} in another file"
            raise UserError(what, where=where, fix=fix) from None


@lru_cache(4096)
def _view(file: _File, group: int, filters: frozenset[str] | None) -> _View:
    """What is read of a row group: all columns where `filters` is None."""
    footer = _footer(file)
    facts = footer.row_group(group)
    chunks = [facts.column(number) for number in range(facts.num_columns)]
    names = footer.schema.to_arrow_schema().names
    columns, left_out = None, []
    if filters is not None and not any("." in name for name in names):  # which pyarrow takes for a column's field
        columns = []
        for name in names:
            leaves = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] == name]
            if name in filters or may_change_a_record(name):
                columns.append(name)
            elif any(_num_nulls(leaf) == 0 for leaf in leaves):
                left_out.append(name)
            elif "." in leaves[0].path_in_schema or _num_nulls(leaves[0]) != facts.num_rows:
                columns.append(name)  # some rows have a value
        chunks = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] in columns]
    spans = _merged(map(_span, chunks))
    size = sum(chunk.total_uncompressed_size for chunk in chunks)
    return _View(None if columns is None else tuple(columns), spans, size, tuple(left_out))


def _num_nulls(leaf: Any) -> int | None:
    """How many places of a column have no value, where the file says so."""
    facts = leaf.statistics
    return facts.null_count if facts is not None and facts.has_null_count else None


def _span(chunk: Any) -> tuple[int, int]:
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None:
        start = min(start, chunk.dictionary_page_offset)
    return start, start + chunk.total_compressed_size


def _merged(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The spans in order, those that are close to each other as one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start - merged[-1][1] <= _GAP_BYTES:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def _batches(file: _File, group: int, view: _View) -> Iterator[Any]:
    """The rows of a row group, decoded a few at a time.

    Raises:
        UserError: the file was replaced or is damaged, or unpacks to more than can be held.
    """
    import pyarrow.parquet

    held = [(start, b"".join(_pieces(file, start, end))) for start, end in view.spans]
    file.check_unchanged()
    footer = _footer(file)
    num_rows = footer.row_group(group).num_rows
    per_batch = max(1, min(num_rows * _BATCH_BYTES // max(view.bytes, 1), 4096))
    where = redacted(file.url)
    columns = None if view.columns is None else list(view.columns)
    found = 0
    try:
        reader = pyarrow.parquet.ParquetFile(
            _Held(file, held), metadata=footer, pre_buffer=False, page_checksum_verification=True
        )
        for batch in reader.iter_batches(per_batch, row_groups=[group], columns=columns, use_threads=False):
            found += batch.nbytes
            if found > 2 * MAX_GROUP_BYTES:  # a dictionary of few values may stand for many
                what = f"row group {group} unpacks to more than {2 * MAX_GROUP_BYTES:,} bytes"
                raise UserError(what, where=where, fix=_fix(file.url))
            num_rows -= batch.num_rows
            yield batch
        if num_rows:
            raise UserError(f"row group {group} has {num_rows} fewer rows than it says", where=where)
    except (pyarrow.ArrowException, OSError) as error:
        what = f"row group {group} can't be read: {error}"
        raise UserError(what, where=where, fix="write or upload the file again") from error


def _pieces(file: _File, start: int, end: int) -> Iterator[bytes]:
    for begin in range(start, end, _PIECE_BYTES):
        yield file.fetch(begin, min(_PIECE_BYTES, end - begin))


def _write(file: _File, group: int, view: _View, path: Path) -> None:
    """Write a row group as an Arrow file."""
    import pyarrow

    batches = _batches(file, group, view)
    first = next(batches)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, first.schema) as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)


def _fix(url: str) -> str:
    return _SHARDS_FIX.format(PurePosixPath(url).name)
