"""Rows of a Hugging Face dataset: parquet, a folder of `save_to_disk`, or a dataset on the Hub."""

import base64
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from llava_llama31.trainer.data.sources.data_folders import (
    check_name_for_datasets,
    data_files_at,
    parquet_splits,
    refuse_json,
)
from llava_llama31.trainer.data.sources.json_rows import stand_in
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.file_names import ends_like_a_file
from llava_llama31.trainer.strict_json import parse_json


logger = logging.getLogger(__name__)

# how questions and answers of another shape become records
WRITE_RECORDS = (
    'write each row as {"image": FILE, "conversations": [{"from": "human", "value": "<image>\\nQUESTION"}, '
    '{"from": "gpt", "value": "ANSWER"}]}, one per line of a .jsonl file; docs/own-data.md shows how for a table'
)
_TABLES = (".csv", ".tsv", ".xls", ".xlsx", ".ods")
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:@([\w./-]+))?")


class DatasetId(NamedTuple):
    """A data set on the Hub: `OWNER/NAME`, `OWNER/NAME:CONFIG`, either with `@REVISION`."""

    name: str
    config: str | None
    revision: str | None

    @classmethod
    def parse(cls, path: str) -> "DatasetId | None":
        """What a source's path names on the Hub; None for a path of this machine, and for the name of a file."""
        match = None if Path(path).exists() else _HUB_ID.fullmatch(path)
        return cls(*match.groups()) if match and not ends_like_a_file(match[1]) else None

    def at(self, revision: str) -> str:
        return f"{self.name}{f':{self.config}' if self.config else ''}@{revision}"


class DatasetRows:
    """Rows of a Hugging Face dataset as Python values, images as `{"bytes", "path"}`, still encoded."""

    def __init__(self, path: str, split: str):
        self.dataset = _load_dataset(path, split).with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> object:
        return python_row(self.dataset[row])

    def text(self, row: int) -> str:
        return as_json(self[row])


def python_row(table: Any) -> Any:
    """The Python values of a table or batch of one row.

    Raises:
        RecordError: invalid_text, malformed_record.
    """
    from pyarrow import ArrowException

    try:
        return table.to_pylist()[0]
    except UnicodeDecodeError as error:
        raise RecordError("invalid_text", f"{error.reason} at byte {error.start} of a text") from None
    except (ArrowException, OverflowError, ValueError) as error:  # a date that no calendar has
        raise RecordError("malformed_record", f"a value that can't be read: {error}") from None


def as_json(row: object) -> str:
    """A row as JSON, its bytes as base64."""
    return json.dumps(row, default=_encoded)


def _load_dataset(path: str, split: str) -> Any:
    import datasets

    folder = Path(path)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        check_name_for_datasets(folder)
    try:
        if (folder / "dataset_dict.json").is_file():
            return _saved_dataset(_saved_split(folder, split))
        if (folder / "state.json").is_file():
            return _saved_dataset(folder)
        found = data_files_at(folder)
        if found is not None and found.kind == "parquet":
            return _parquet_dataset(folder, split)
        if (on_hub := DatasetId.parse(path)) is not None:
            return datasets.load_dataset(on_hub.name, on_hub.config, split=split, revision=on_hub.revision)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(_reason(error), where=path, fix="check `path` and `split`") from error
    if not folder.exists():
        what, fix = f"{folder.absolute()} does not exist", "correct the path; it is relative to the working directory"
        raise UserError(what, where=path, fix=fix)
    if folder.is_dir():
        refuse_json(folder)
    if folder.suffix.lower() in _TABLES:
        raise UserError("tables are not read as training data", where=path, fix=WRITE_RECORDS)
    if folder.is_dir() and any(file.suffix.lower() in _IMAGES for file in folder.rglob("*")):
        what = "the folder holds images, but no rows with questions and answers about them"
        raise UserError(what, where=path, fix=WRITE_RECORDS)
    kinds = "a .json, .jsonl, .tar or .parquet file, a folder of the last two or of save_to_disk, or OWNER/NAME"
    raise UserError("the path holds no data that can be read", where=path, fix=f"name {kinds}")


def can_unpack(path: Path, split: str) -> bool:
    """Whether the cache of `datasets` has, or has room for, what a parquet file or folder unpacks to."""
    import datasets
    import pyarrow.parquet

    data_files, features = _files_and_features(path, split)
    needed = 0
    for file in {file for files in data_files.values() for file in files}:
        facts = pyarrow.parquet.read_metadata(file)
        needed += sum(facts.row_group(group).total_byte_size for group in range(facts.num_row_groups))
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())).free
    if needed <= free:
        return True
    try:
        builder = datasets.load_dataset_builder("parquet", data_files=data_files, features=features)
        if builder.cache_dir is not None and Path(builder.cache_dir).is_dir():
            return True
    except OSError as error:  # a full disk has no room for its lock either
        logger.info("%s: %s", cache, error)
    what = "%s: unpacked it has %s bytes and %s has %s free, so it is read in place"
    logger.info(what, path, f"{needed:,}", cache, f"{free:,}")
    return False


def _parquet_dataset(path: Path, split: str) -> Any:
    """The rows of these files and no others: their names reach no glob, and their folder's README is not asked."""
    import datasets

    data_files, features = _files_and_features(path, split)
    if not data_files:
        return datasets.Dataset.from_dict({})
    asked = "train" if split == "all" else _without(split, data_files)
    try:
        with _no_bars():
            return datasets.load_dataset("parquet", data_files=data_files, split=asked, features=features)
    except datasets.exceptions.DatasetsError as error:
        files = [Path(file) for files in data_files.values() for file in files]
        file, what = _other_type(files) or (path, _reason(error))
        raise UserError(what, where=str(file), fix="write all files with the same columns and types") from error


def _files_and_features(path: Path, split: str) -> tuple[dict[str, Any], Any]:
    """What `datasets` opens: the files with rows of each split, and the columns of all of them."""
    from datasets.data_files import DataFilesList

    splits = parquet_splits(path, split)
    for file in (file for files in splits.values() for file in files):
        check_name_for_datasets(file)
        if os.path.expandvars(file.absolute()) != str(file.absolute()):
            what = "`datasets` would put the value of an environment variable into the path, since it holds `$`"
            raise UserError(what, where=str(file), fix="rename it")
    filled = {name: _with_rows(files) for name, files in splits.items()}
    files = [file for files in filled.values() for file in files]
    _check_columns(files)
    # only a list of this class is taken as it is; with sizes and times `datasets` reads a file again that has changed
    data_files = {
        name: DataFilesList([str(file.absolute()) for file in files], [_signature(file) for file in files])
        for name, files in filled.items()
        if files
    }
    if split == "all" and data_files:  # which `datasets` does not take as the name of a split
        data_files = {"train": data_files["all"]}
    return data_files, _features(files) if files else None


def _without(split: str, filled: Mapping[str, Any]) -> str:
    """The parts of `train[:10%]+test` that have rows."""
    return "+".join(part for part in split.split("+") if re.sub(r"\[.*?\]", "", part) in filled)


def _signature(file: Path) -> tuple[str, str]:
    found = file.stat()
    return str(found.st_size), str(found.st_mtime_ns)


def _with_rows(files: Sequence[Path]) -> list[Path]:
    """The files that hold rows; `datasets` stops at one that holds none.

    Raises:
        UserError: a file can't be read.
    """
    import pyarrow.parquet

    filled = []
    for file in files:
        try:
            if pyarrow.parquet.read_metadata(file).num_rows:
                filled.append(file)
        except (pyarrow.ArrowException, OSError) as error:
            fault = stand_in(file) or (f"can't be read as parquet: {error}", "fetch or write it again")
            raise UserError(fault[0], where=str(file), fix=fault[1]) from error
    return filled


def _check_columns(files: Sequence[Path]) -> None:
    """Check that all files have the first one's columns.

    Raises:
        UserError: naming the file and its columns.
    """
    import pyarrow.parquet

    if not files:
        return
    first = pyarrow.parquet.read_schema(files[0])
    for file in files:
        schema = pyarrow.parquet.read_schema(file)
        if len(set(schema.names)) < len(schema.names):
            twice = next(name for name in schema.names if schema.names.count(name) > 1)
            raise UserError(f"column {ascii(twice)} occurs twice", where=str(file), fix="write the file again")
        parts = [
            f"{word} {', '.join(map(ascii, names))}"
            for word, names in (
                ("it also has", [name for name in schema.names if name not in first.names]),
                ("it lacks", [name for name in first.names if name not in schema.names]),
            )
            if names
        ]
        if parts:
            what = f"its columns are not those of {files[0].name}: {'; '.join(parts)}"
            raise UserError(what, where=str(file), fix="write all files with the same columns, or name each one")


def _features(files: Sequence[Path]) -> Any:
    """The columns of all files, where one that is empty in some file has its type from another; None: the first's."""
    import datasets
    import pyarrow.parquet

    schemas = [pyarrow.parquet.read_schema(file).remove_metadata() for file in files]
    if all(schema.equals(schemas[0]) for schema in schemas):
        return None
    try:
        return datasets.Features.from_arrow_schema(pyarrow.unify_schemas(schemas))
    except pyarrow.ArrowException:
        return None  # `datasets` may cast them still


def _other_type(files: Sequence[Path]) -> tuple[Path, str] | None:
    """The first file with a column of another type, and what is different."""
    import pyarrow.parquet

    first = pyarrow.parquet.read_schema(files[0])
    for file in files:
        for field in pyarrow.parquet.read_schema(file):
            if field.type != (other := first.field(field.name).type):
                return file, f"column {ascii(field.name)} is {field.type}, but {other} in {files[0].name}"
    return None


def _reason(error: BaseException) -> str:
    """The first line of what went wrong; the error into which `datasets` wraps it says nothing."""
    from datasets.exceptions import DatasetGenerationError

    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n")[0] or type(error).__name__


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep the bars of `datasets`, which stay on the screen, out of the output."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _saved_split(folder: Path, split: str) -> Path:
    """Folder of one split of a data set that `save_to_disk` wrote."""
    splits = parse_json((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    if split not in splits:
        raise UserError(f"there is no split {split!r}", where=str(folder), fix="name one that is there in `split`")
    return _inside(folder, split)


def _saved_dataset(folder: Path) -> Any:
    import datasets

    named = [
        file["filename"] for file in parse_json((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
    ]
    for name in named:
        _inside(folder, name)
    for file in sorted(folder.glob("*.arrow")):
        # what `datasets` computes from a data set and keeps beside it
        if file.name not in named and not file.name.startswith(("cache-", "tmp")):
            what = "the file is not one of those that state.json names, so it would not be read"
            raise UserError(what, where=str(file), fix="remove it, or save the data set again")
    return datasets.load_from_disk(str(folder))


def _inside(folder: Path, name: str) -> Path:
    """A file of a saved data set, which its own description may not take from elsewhere."""
    if Path(name).name != name:
        raise ValueError(f"{name[:80]!r} does not name a file in the folder")
    return folder / name


def _encoded(value: object) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
