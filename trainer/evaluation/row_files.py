"""Rows of the files in which questions and answers are handed around, as they stand, each with its place."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_llama31.trainer.data.sources.data_folders import (
    check_name_for_parquet,
    check_whole,
    matches,
    one_split,
    parquet_folder,
)
from llava_llama31.trainer.data.sources.json_rows import encoding_fault
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.strict_json import parse_json


Row = tuple[str, dict[str, Any]]

# a cell may hold an image in base64; the module's own limit of 128 KiB is too small for that
LARGEST_CELL = 1 << 28


def json_lines(path: Path) -> Iterator[Row]:
    """Objects of a JSON Lines file.

    Raises:
        UserError: the file cannot be read, or a line is not a JSON object.
    """
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield f"{path}:{number}", _object(_json(line, f"{path}:{number}"), f"{path}:{number}")


def json_value(path: Path) -> Any:
    """The one value that a JSON file holds.

    Raises:
        UserError: the file cannot be read, or is not JSON.
    """
    return _json("".join(_lines(path)), str(path))


def json_objects(values: list[Any], path: Path) -> Iterator[Row]:
    """Objects of a list that was read from `path`.

    Raises:
        UserError: an element is not an object.
    """
    for number, value in enumerate(values):
        yield f"{path}[{number}]", _object(value, f"{path}[{number}]")


def tsv_rows(path: Path) -> Iterator[Row]:
    """Rows of a table with tabs between the cells and the columns' names in the first line; cells may be quoted.

    Raises:
        UserError: the file cannot be read, or a row has another number of cells than the header.
    """
    limit = csv.field_size_limit(LARGEST_CELL)
    try:
        reader = csv.reader(_lines(path), delimiter="\t")
        header = next(reader, [])
        for cells in reader:
            if cells:
                where = f"{path}:{reader.line_num}"
                yield where, _named(header, cells, where)
    except csv.Error as error:
        raise UserError(
            f"not a table of tab-separated cells: {error}", where=str(path), fix="write it again"
        ) from error
    finally:
        csv.field_size_limit(limit)


def xlsx_rows(path: Path) -> Iterator[Row]:
    """Rows of the one sheet of an Excel file, with the columns' names in the first line.

    Raises:
        UserError: openpyxl is not installed, the file cannot be read, or it has several sheets.
    """
    try:
        import openpyxl
    except ModuleNotFoundError as error:
        fix = "pip install 'llava-llama31[xlsx]', or pip install openpyxl"
        raise UserError("openpyxl is needed to read .xlsx files", where=str(path), fix=fix) from error
    from zipfile import BadZipFile

    try:
        book = openpyxl.load_workbook(path, read_only=True)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), fix="check the path") from error
    except (BadZipFile, KeyError, ValueError) as error:
        raise UserError(f"not an Excel file: {error}", where=str(path), fix="check the file") from error
    try:
        if len(book.sheetnames) != 1:
            what = f"has {len(book.sheetnames)} sheets ({', '.join(book.sheetnames)})"
            raise UserError(what, where=str(path), fix="keep the one with the answers")
        table = enumerate(book[book.sheetnames[0]].iter_rows(values_only=True), 1)
        header = [str(cell) for cell in next(table, (0, ()))[1]]
        for number, cells in table:
            if any(cell is not None for cell in cells):
                yield f"{path}, row {number}", _named(header, list(cells), f"{path}, row {number}")
    finally:
        book.close()


def parquet_rows(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    """Rows of one parquet file, or of all shards of a folder or a pattern, with those of `columns` that they have.

    Raises:
        UserError: there is no such file, it cannot be read, or the files belong to several splits.
    """
    import pyarrow
    import pyarrow.parquet

    for file in question_files(path):
        check_name_for_parquet(file)
        try:
            table = pyarrow.parquet.ParquetFile(file)
            number = 0
            wanted = [name for name in table.schema_arrow.names if name in columns]
            _check_header(wanted, str(file))
            for batch in table.iter_batches(batch_size=64, columns=wanted):
                for row in batch.to_pylist():
                    yield f"{file}[{number}]", row
                    number += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"cannot be read: {error}", where=str(file), fix="download it again") from error
        except UnicodeDecodeError as error:
            raise UserError("holds text that is not UTF-8", where=str(file), fix="write it again") from error


def question_files(path: Path) -> list[Path]:
    """The file itself, or the parquet shards of one split: all in a folder, or those that a pattern with `*` names.

    Raises:
        UserError: there are none, or they are not one whole split.
    """
    if path.is_file():
        return [path]
    if path.is_dir():
        folder, files = path, parquet_folder(path)
    else:
        folder = path.parent
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        files = [folder / name for name in names if not name.startswith(".") and matches(name, path.name)]
    if not files:
        raise UserError("no parquet file there", where=str(path), fix="name a .parquet file, a folder or a pattern")
    one_split(files, folder)
    check_whole(files, path)
    return files


def _lines(path: Path) -> Iterator[str]:
    """Lines with their ends as they are, which a quoted cell may hold."""
    if path.exists() and not path.is_file():
        raise UserError("is not a file", where=str(path), fix="check the path")  # a pipe would never end
    try:
        with path.open("rb") as start:
            fault = encoding_fault(start.read(4))
        if fault is not None:
            raise UserError(fault[0], where=str(path), fix=fault[1])
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), fix="check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(
            "not UTF-8 text", where=str(path), fix="check the file, and that its suffix is right"
        ) from error


def _json(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}", where=where, fix="repair or remove it") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError("not an object", where=where, fix="give one JSON object per row")
    return value


def _named(header: list[str], cells: list[Any], where: str) -> dict[str, Any]:
    _check_header(header, where)
    if len(cells) != len(header):
        raise UserError(f"{len(cells)} cells under {len(header)} column names", where=where, fix="repair the row")
    return dict(zip(header, cells, strict=True))


def _check_header(names: list[str], where: str) -> None:
    """Of two columns of one name neither is the right one."""
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"column {ascii(twice)[:80]} is there twice", where=where, fix="remove or rename one")
