"""Records to train on, read from LLaVA JSON, ShareGPT, messages and Cauldron data, one row at a time.

A reader opens nothing but the row that is asked for: JSON files and WebDataset shards are indexed by byte offset,
Hugging Face datasets stay memory-mapped with their images encoded, parquet in a store is read by row group.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from llava_llama31.trainer.data.sources.conversations import Converter, Record, kind_of
from llava_llama31.trainer.data.sources.data_folders import check_whole, data_files_at, log_beside, parquet_splits
from llava_llama31.trainer.data.sources.dataset_rows import WRITE_RECORDS, DatasetRows, can_unpack
from llava_llama31.trainer.data.sources.json_rows import JsonRows
from llava_llama31.trainer.data.sources.parquet_rows import ParquetRows, is_parquet, parquet_urls
from llava_llama31.trainer.data.sources.reject_reasons import REASONS, RecordError
from llava_llama31.trainer.data.sources.remote_files import Missing, check_is_path, is_remote, join
from llava_llama31.trainer.data.sources.sharded_rows import INDEX, ShardedRows
from llava_llama31.trainer.data.sources.tar_rows import TarRows
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.data_formats import MAX_PIXELS, DataFormat
from llava_llama31.trainer.recipes.file_names import ends_like_a_file
from llava_llama31.trainer.redaction import printable, redacted


if TYPE_CHECKING:
    from llava_llama31.trainer.recipes.schema import DataSource


__all__ = ["REASONS", "Record", "RecordError", "RecordStore", "data_files", "open_records", "what_is_read"]

logger = logging.getLogger(__name__)

_CONVERSATION_FIELDS = {"conversations", "messages", "prompt", "texts"}
_SAVED_SUFFIXES = (".arrow", ".json")
_PROBED_ROWS = 100


class _Rows(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> object: ...

    def text(self, row: int) -> str: ...


class RecordStore:
    """The records of one source as a sequence; a row is read, parsed and checked when it is asked for.

    Raises:
        RecordError: from `store[row]`, when that row can't be used. Other rows are not affected.
    """

    def __init__(self, rows: _Rows, data_format: DataFormat, stem: str, convert: Converter):
        self.format = data_format
        self._rows, self._stem, self._convert = rows, stem, convert

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def max_pixels(self) -> int:
        """Height x width above which an image is rejected by its header."""
        return self._convert.max_pixels

    def __getitem__(self, row: int) -> Record:
        if isinstance(self._rows, ParquetRows):
            return self._pruned(self._rows, row)
        raw = self.raw(row)
        record = self._convert(raw, self._id(raw, row))
        if isinstance(self._rows, TarRows):
            unread = set(self._rows.not_read(row, [image.name for image in record.images]))
            if unread:
                return replace(record, not_read=tuple(sorted({*record.not_read, *unread})))
        return record

    def _pruned(self, rows: ParquetRows, row: int) -> Record:
        """A row by the columns that are read; all of them matter to one that shows no image or is refused."""
        raw, is_pruned = rows.seen(row)
        try:
            record = self._convert(raw, self._id(raw, row))
            if record.images or not is_pruned:
                return record
        except RecordError as error:
            if error.reason == "filtered" or not is_pruned:
                raise
        raw = self.raw(row)
        return self._convert(raw, self._id(raw, row))

    def prefetch(self, rows: Sequence[int]) -> None:
        """Bring rows of a store into the cache, several at once; nothing where they are on this machine."""
        if isinstance(self._rows, (ShardedRows, ParquetRows)):
            self._rows.prefetch(list(rows))

    def raw(self, row: int) -> dict:
        """The row as the source has it.

        Raises:
            RecordError: it is not an object.
        """
        raw = self._rows[row]
        if not isinstance(raw, dict):
            raise RecordError("malformed_record", f"the row is {kind_of(raw)}, not an object")
        return raw

    def __iter__(self) -> Iterator[Record]:
        return (self[row] for row in range(len(self)))

    def row_id(self, row: int) -> str:
        """Id of a row, whether or not it can be used."""
        try:
            return self._id(_seen(self._rows, row), row)
        except RecordError:
            return f"{self._stem}:{row}"

    def source_text(self, row: int) -> str:
        """The row as the source holds it, as JSON where it is JSON; empty where it is too long to be read."""
        try:
            return self._rows.text(row)
        except RecordError:
            return ""

    def _id(self, raw: object, row: int) -> str:
        given = raw.get("id") if isinstance(raw, dict) else None
        if given in (None, "") or not isinstance(given, (str, int, float)) or isinstance(given, bool):
            return f"{self._stem}:{row}"
        return printable(str(given))


def open_records(source: "DataSource", *, keep_data_newline: bool = False) -> RecordStore:
    """The records of a source: JSON array or lines, WebDataset shards, parquet, `save_to_disk`, or a Hub data set.

    Args:
        source: where the data is and what shape it has; `image_root` defaults to the data's own folder. A Hub data
            set is `OWNER/NAME` or `OWNER/NAME:CONFIG`.
        keep_data_newline: keep the newline that follows an image marker, so that the chat template's own makes two.

    Raises:
        UserError: when there is no such data, or its first rows have none of the known shapes.
    """
    rows = _open_rows(source)
    if not len(rows):
        raise UserError("there are no records", where=source.path)
    data_format = source.format
    if data_format == "auto":
        data_format = _detect_format(rows, source.path)
        logger.info("%s: %d rows, format %s (detected)", source.path, len(rows), data_format)
    root, stem = _image_root(source), PurePosixPath(source.path).stem
    max_pixels = source.max_pixels or MAX_PIXELS
    convert = Converter(data_format, root, max_pixels, keep_data_newline, source.images_only, source.where)
    return RecordStore(rows, data_format, stem, convert)


def what_is_read(source: "DataSource") -> list:
    """All keys of the source that decide which rows and images are read, to be compared or hashed."""
    filters = {name: where.model_dump() for name, where in source.where.items()}
    place = [source.path, source.image_root, source.format, source.split, source.images_only, source.max_pixels]
    return [*place, filters]


def _image_root(source: "DataSource") -> Path | str:
    """The real path, or the URL, that image paths are relative to."""
    if source.image_root and is_remote(source.image_root):
        return source.image_root
    if is_remote(source.path) and not source.image_root:
        return source.path if not ends_like_a_file(source.path) else source.path.rpartition("/")[0]
    check_is_path(source.image_root, stores_too=True)
    path = Path(source.path)
    root = Path(source.image_root) if source.image_root else path if path.is_dir() else path.parent
    if source.image_root and not root.is_dir():
        raise UserError(f"image_root {root} is not a folder", where=source.path, fix="name the folder of the images")
    return Path(os.path.realpath(root))


def data_files(source: "DataSource") -> list[Path | str]:
    """The files that hold a source's rows, URLs as strings; of shards with an index that, which has their sums."""
    if is_remote(source.path):
        if is_parquet(source.path):
            splits = parquet_urls(source.path, source.split).values()
            return list(dict.fromkeys(file for files in splits for file in files))
        return [source.path if ends_like_a_file(source.path) else str(join(source.path, INDEX))]
    path = Path(source.path)
    if (path / INDEX).is_file():
        return [path / INDEX]
    return list(_local_files(source, path))


def _local_files(source: "DataSource", path: Path) -> Iterable[Path]:
    if path.is_file():
        return [path]
    found = data_files_at(path)
    if found is not None and found.kind == "parquet":
        splits = parquet_splits(path, source.split).values()
        return list(dict.fromkeys(file for files in splits for file in files))
    if found is not None and found.kind == "arrow":
        return sorted(file for file in path.rglob("*") if file.suffix in _SAVED_SUFFIXES and file.is_file())
    if found is not None:
        return found.files
    return [Path(file["filename"]) for file in DatasetRows(source.path, source.split).dataset.cache_files]


def _open_rows(source: "DataSource") -> _Rows:
    if is_remote(source.path):
        return _open_remote_rows(source)
    check_is_path(source.path, stores_too=True)
    path = Path(source.path)
    if (path / INDEX).is_file():
        return ShardedRows(source.path)
    found = data_files_at(path)
    if found is not None:
        log_beside(path, found)
    if found is not None and found.kind == "json":
        return JsonRows(path)
    if found is not None and found.kind == "tar":
        if path.is_dir():
            check_whole(found.files, path)
        return TarRows(found.files)
    if found is not None and found.kind == "parquet" and not can_unpack(path, source.split):
        splits = parquet_splits(path, source.split)
        named = {name: [str(file.absolute()) for file in files] for name, files in splits.items()}
        return ParquetRows(named, source.split, source.where)
    return DatasetRows(source.path, source.split)


def _open_remote_rows(source: "DataSource") -> _Rows:
    """The rows of JSON, of parquet, or of a folder of shards with an index, in a store.

    Raises:
        UserError: there is no such file, or it is of another kind.
    """
    url = source.path
    if is_parquet(url):
        return ParquetRows(parquet_urls(url, source.split), source.split, source.where)
    if not ends_like_a_file(url):
        return ShardedRows(url)
    if PurePosixPath(url).suffix.lower() in (".json", ".jsonl", ".ndjson"):
        try:
            return JsonRows(url)
        except Missing:
            raise UserError("there is no such file", where=redacted(url), fix="correct `path`") from None
    what = "a store is read as JSON, as parquet, or as a folder of shards with an index"
    if PurePosixPath(url).suffix.lower() == ".tar":
        what = "a shard without an index is not read from a store, since listing it means reading all of it"
    fix = "download it, and write it with `llava-llama31 shards FILE --to URL`"
    raise UserError(what, where=redacted(url), fix=fix)


def _seen(rows: _Rows, row: int) -> object:
    """A row by its names and what is read; columns of parquet that are not read are not fetched."""
    return rows.seen(row)[0] if isinstance(rows, ParquetRows) else rows[row]


def _beginning(rows: _Rows, row: int) -> str:
    """How a row begins, for the person who looks for its fault; empty where that is unknown."""
    try:
        return f", which begins {ascii(rows.text(row)[:40])}"
    except RecordError:
        return ""


def _detect_format(rows: _Rows, path: str) -> DataFormat:
    num_probed = min(len(rows), _PROBED_ROWS)
    first_fault = ""
    for row in range(num_probed):
        try:
            raw = _seen(rows, row)
        except RecordError as error:
            first_fault = first_fault or f"{error}{_beginning(rows, row)}"
            continue
        if not isinstance(raw, dict):
            first_fault = first_fault or f"it is {kind_of(raw)}"
            continue
        given = {key for key, value in raw.items() if value is not None}
        if "texts" in given:
            return "cauldron"
        if given & {"messages", "prompt"}:
            return "messages"
        if "conversations" in given:
            return "sharegpt" if "images" in given else "llava"
        if raw.keys() & _CONVERSATION_FIELDS:
            first_fault = first_fault or "its conversation is null"
            continue
        keys = ", ".join(ascii(str(key)[:80]) for key in sorted(raw)[:20])
        fix = "a record holds `conversations`, `messages`, `prompt` and `completion`, or `texts`; name its `format`"
        if "question" in given:
            fix = WRITE_RECORDS
        raise UserError(f"row {row} has none of the known shapes: its keys are {keys}", where=path, fix=fix)
    what = f"none of the first {num_probed} rows is a JSON object with a conversation; row 0: {first_fault}"
    raise UserError(what, where=path, fix="correct that; in JSON lines, each line holds one whole record")
