"""Rows of question and answer files, unchanged, each with its place."""

import csv
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

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
PICKLES = (".pkl", ".pickle")
# keys under which a JSON file holds its rows: the official files; lmms-eval's logs before 0.2.4; LLaVA's ScienceQA;
# VQA's questions
_ROWS_UNDER = (("data",), ("logs",), ("correct", "incorrect"), ("questions",))
# fields of labels that are an object of question ids: MMMU's, GQA's and ScienceQA's
_LABELS_UNDER_IDS = (
    {"question_type", "ground_truth"},
    {"question", "answer", "imageId"},
    {"question", "answer", "choices", "split"},
)
# how an Excel sheet's XML names a range of merged cells
_MERGED = re.compile(rb'<mergeCell\s[^>]*?ref="([^"]{1,40})"')
# how pandas writes a whole number of a column of floats
_FLOAT = re.compile(r"\d+\.0", re.ASCII)
# what LLaVA's scripts call the part of GPU K of N
_PART = re.compile(r"(\d+)_(\d+)\.jsonl", re.ASCII)
_MMMU_OUTPUT = "output.json"
# how VLMEvalKit's names of files of scores end
_SCORES = ("_acc.csv", "_score.csv", "_score.json")
_MME_RESULTS = ("image", "question", "answer", "prediction")
# what XML, and so a cell of an Excel table, cannot hold
_NOT_IN_CELLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


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


def listed_rows(content: Any, path: Path, keyed: Sequence[str] = ()) -> list[Any]:
    """The list that a JSON file holds, by itself or under the keys of _ROWS_UNDER.

    Args:
        content: of the file.
        path: the file.
        keyed: what key and text are called in the rows of an object of texts; none: such an object is no list.

    Raises:
        UserError: it holds none.
    """
    if isinstance(content, list):
        return content
    for keys in _ROWS_UNDER:
        if isinstance(content, dict) and all(isinstance(content.get(key), list) for key in keys):
            return [row for key in keys for row in content[key]]
    if keyed and isinstance(content, dict) and {"acc", "outputs"} <= content.keys():
        content = content["outputs"]  # LLaVA's results of ScienceQA
    if isinstance(content, dict) and content and all(_is_label(value) for value in content.values()):
        return [{"id": key, **label} for key, label in content.items()]
    is_keyed = bool(keyed) and isinstance(content, dict) and bool(content) and not set(keyed) & content.keys()
    if is_keyed and all(isinstance(value, str) for value in content.values()):
        return [dict(zip(keyed, pair, strict=True)) for pair in content.items()]
    found = f"; it has {', '.join(islice(content, 10))}" if isinstance(content, dict) and content else ""
    fix = answers_of_scores(path) or "docs/evaluation.md lists the files that are read"
    if isinstance(content, dict) and {"results", "configs"} <= content.keys():
        fix = "these are lmms-eval's scores: pass its samples, which --log_samples writes"
    raise UserError(f"not a list of answers or questions{found}", where=str(path), fix=fix)


def answers_of_scores(path: Path) -> str:
    """What to pass instead of a file that is called like VLMEvalKit's scores; empty if it is not."""
    for ending in _SCORES:
        if path.name.endswith(ending):
            return f"these are VLMEvalKit's scores: pass its answers, {path.name.removesuffix(ending)}.xlsx"
    return ""


def _is_label(value: Any) -> bool:
    """Whether this is one of the labels of a benchmark whose file is an object of question ids."""
    return isinstance(value, dict) and any(names <= value.keys() for names in _LABELS_UNDER_IDS)


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
    yield from _table(path, "\t", "tab-separated")


def csv_rows(path: Path) -> Iterator[Row]:
    """Rows of a table with commas between the cells, else as `tsv_rows`.

    Raises:
        UserError: the file cannot be read, or a row has another number of cells than the header.
    """
    yield from _table(path, ",", "comma-separated")


def _table(path: Path, delimiter: str, called: str) -> Iterator[Row]:
    limit = csv.field_size_limit(LARGEST_CELL)
    try:
        # strict: a quotation mark that is not closed would take in the rows below it
        reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
        header = next(reader, [])
        _refuse_other_delimiter(header, delimiter, called, path)
        for cells in reader:
            if cells:
                where = f"{path}:{reader.line_num}"
                yield where, _named(header, cells, where)
    except csv.Error as error:
        what = f"not a table of {called} cells: {error}"
        fix = 'quote every cell, and write a quotation mark in it twice: "5"" pipe"'
        raise UserError(what, where=f"{path}:{reader.line_num}", fix=fix) from error
    finally:
        csv.field_size_limit(limit)


def _refuse_other_delimiter(header: list[str], delimiter: str, called: str, path: Path) -> None:
    """Refuse a header of one cell that another delimiter parts, as Excel writes `;` where the comma is decimal."""
    other = next((mark for mark in ";\t,|" if mark != delimiter and len(header) == 1 and mark in header[0]), None)
    if other is not None:
        suffix = {"\t": "name it .tsv, or ", ",": "name it .csv, or "}.get(other, "")
        what = f"the first line has one {called} cell, and {other!r} in it"
        raise UserError(what, where=f"{path}:1", fix=f"{suffix}save it again with {called} cells")


def _headless_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a tab-separated table without a header or quotes, as MME's."""
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, _named(list(columns), line.rstrip("\r\n").split("\t"), where)


def value_at(row: Mapping[str, Any], name: str, absent: Any = None) -> Any:
    """What a field, or a way into the row (`choices.0.message`), says; `absent` where there is none."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return absent
    return value


def number_or_text(value: str | int | float) -> str:
    """What a cell says; pandas keeps whole numbers as 3.0 in a column with an empty cell, and writes them so."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def plain_id(value: Any, where: str, name: str) -> int | str:
    """A question's id, without what tables make of one: 7.0 and ` 7` are 7.

    Raises:
        UserError: it is neither a number nor a text.
    """
    value = value.strip() if isinstance(value, str) else value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise UserError(f"{name} is {value!r:.80}", where=where, fix="give a number or a text")
    return value[:-2] if isinstance(value, str) and _FLOAT.fullmatch(value) else value


def holds_mme_results(path: Path) -> bool:
    """Whether a `.txt`, or the first of a folder, begins as MME's results do."""
    file = next(iter(_texts(path)), None) if path.is_dir() else path
    if file is None or file.suffix.lower() != ".txt" or not file.is_file():
        return False
    return next(_lines(file), "").count("\t") == len(_MME_RESULTS) - 1


def mme_results(path: Path) -> Iterator[Row]:
    """Rows of the results that MME's `eval_tool/calculation.py` takes: a text a category, named like it.

    A row has the annotated answer and the prediction, and the category, as the image's folder too.

    Args:
        path: a folder of such texts, or one of them.

    Raises:
        UserError: a file cannot be read, a row has not four cells, or a question occurs twice.
    """
    for file in _texts(path) if path.is_dir() else [path]:
        places: dict[tuple[str, str], str] = {}
        for where, row in _headless_rows(file, _MME_RESULTS):
            first = places.setdefault((row["image"], row["question"]), where)
            if first != where:  # no id tells a second answer from one to another question
                what = f"{row['question']!r:.80} about {row['image']!r:.80} occurs twice, first in {first}"
                raise UserError(what, where=where, fix="keep one row a question")
            yield where, row | {"category": file.stem, "image": f"{file.stem}/{row['image']}"}


def parts_of_gpus(path: Path) -> list[Path]:
    """A folder's files `N_K.jsonl`, as LLaVA's scripts write them on N GPUs, in the order of K; empty if it has none.

    Raises:
        UserError: a part is missing, or there are parts of several runs.
    """
    files = path.iterdir() if path.is_dir() else ()
    parts = {(int(named[1]), int(named[2])): file for file in files if (named := _PART.fullmatch(file.name))}
    if not parts:
        return []
    numbers = sorted({number for number, _ in parts})
    fix = "keep the parts of one run, all of them, in a folder of their own"
    if len(numbers) > 1:
        listed = " and of ".join(map(str, numbers))
        raise UserError(f"holds parts of {listed} GPUs", where=str(path), fix=fix)
    missing = [f"{numbers[0]}_{part}.jsonl" for part in range(numbers[0]) if (numbers[0], part) not in parts]
    if missing or len(parts) > numbers[0]:
        what = f"lacks {', '.join(missing[:20])}" if missing else f"holds more than {numbers[0]} parts"
        raise UserError(f"{what} of the parts of {numbers[0]} GPUs", where=str(path), fix=fix)
    return [parts[key] for key in sorted(parts)]


def refuse_to_compare_parts(first: Path, second: Path) -> None:
    """Refuse two parts of one run, as a shell makes them of a pattern."""
    named = [_PART.fullmatch(path.name) for path in (first, second)]
    if first.parent == second.parent and named[0] and named[1] and named[0][1] == named[1][1]:
        what = "two parts of one run, which would be compared"
        raise UserError(what, where=f"{first} {second}", fix=f"name {first.parent}, whose parts are read as one file")


def holds_mmmu_outputs(path: Path) -> bool:
    """Whether a folder has a folder a subject with an `output.json`, as MMMU's evaluator takes them."""
    return path.is_dir() and next(path.glob(f"*/{_MMMU_OUTPUT}"), None) is not None


def mmmu_outputs(path: Path) -> Iterator[Row]:
    """Rows of the outputs that MMMU's `main_parse_and_eval.py` takes, with the subject.

    Raises:
        UserError: a file cannot be read, or is not a list of objects.
    """
    for file in sorted(path.glob(f"*/{_MMMU_OUTPUT}")):
        for where, row in json_objects(listed_rows(json_value(file), file), file):
            yield where, row | {"subject": file.parent.name}


def _texts(folder: Path) -> list[Path]:
    files = (path for path in folder.iterdir() if path.suffix.lower() == ".txt")
    return sorted(path for path in files if not path.name.startswith("."))


def xlsx_rows(path: Path, *, formulas: bool = False) -> Iterator[Row]:
    """Rows of the one sheet of an Excel file, with the columns' names in the first line; a column may have none.

    Args:
        path: the file.
        formulas: a formula is a text, as programs make formulas of answers that begin with an equals sign; else it is
            refused, since its value is not read.

    Raises:
        UserError: openpyxl is not installed, or the file cannot be read or has several sheets, merged cells or a
            formula.
    """
    openpyxl = _openpyxl(path)
    from xml.etree.ElementTree import ParseError
    from zipfile import BadZipFile
    from zlib import error as DeflateError

    book = None
    try:
        _refuse_merged(path)
        book = openpyxl.load_workbook(path, read_only=True)
        if len(book.sheetnames) != 1:
            what = f"has {len(book.sheetnames)} sheets ({', '.join(book.sheetnames)})"
            raise UserError(what, where=str(path), fix="keep the one with the rows")
        table = enumerate(book[book.sheetnames[0]].iter_rows(), 1)
        header = ["" if cell.value is None else str(cell.value) for cell in next(table, (0, ()))[1]]
        for number, row in table:
            where = f"{path}, row {number}"
            cells = [_cell_value(cell, where, formulas=formulas) for cell in row]
            if any(cell is not None for cell in cells):
                yield where, _named(header, cells, where)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", where=str(path), fix="check the path") from error
    except (BadZipFile, DeflateError, EOFError, ParseError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"not an Excel file: {error}", where=str(path), fix="check the file") from error
    finally:
        if book is not None:
            book.close()


def _cell_value(cell: Any, where: str, *, formulas: bool) -> Any:
    if cell.data_type == "e" and not formulas:
        what = f"a cell is Excel's error {cell.value}"
        raise UserError(what, where=where, fix="correct the cell, or write it as a text")
    if cell.data_type != "f":
        return cell.value
    text = str(getattr(cell.value, "text", cell.value))
    if not formulas:
        what = f"a cell is the formula {text!r:.60}, whose value is not read"
        raise UserError(what, where=where, fix="copy the table and paste its values")
    return text


def _refuse_merged(path: Path) -> None:
    """Of merged cells only the first holds the value, and the others would be read as empty."""
    from zipfile import ZipFile

    with ZipFile(path) as archive:
        for name in archive.namelist():
            if name.startswith("xl/worksheets/") and name.endswith(".xml"):
                with archive.open(name) as sheet:
                    _refuse_merged_sheet(sheet, path)


def _refuse_merged_sheet(sheet: IO[bytes], path: Path) -> None:
    tail = b""
    while block := sheet.read(1 << 20):
        found = _MERGED.search(tail + block)
        if found is not None:
            what = f"the cells {found[1].decode('ascii', 'replace')} are merged"
            raise UserError(what, where=str(path), fix="unmerge them, and give each row its own value")
        tail = (tail + block)[-200:]


def _openpyxl(path: Path) -> Any:
    try:
        import openpyxl
    except ModuleNotFoundError as error:
        fix = "pip install 'llava-llama31[xlsx]', or pip install openpyxl"
        raise UserError("openpyxl is needed for .xlsx files", where=str(path), fix=fix) from error
    return openpyxl


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as an Excel table of one sheet; its columns are all names that a row has, in order of appearance.

    Raises:
        UserError: openpyxl is not installed.
    """
    book = _openpyxl(path).Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    names = list(dict.fromkeys(name for row in rows for name in row))
    sheet.append(names)
    for row in rows:
        sheet.append([_cell(row.get(name)) for name in names])
    book.save(path)


def _cell(value: Any) -> Any:
    """A value without the control characters that a cell cannot hold."""
    return _NOT_IN_CELLS.sub("", value) if isinstance(value, str) else value


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
        _refuse_parts(files, path)
    if not files:
        raise UserError("no parquet file there", where=str(path), fix="name a .parquet file, a folder or a pattern")
    one_split(files, folder)
    check_whole(files, path)
    return files


def _refuse_parts(files: Sequence[Path], pattern: Path) -> None:
    """Refuse parts of one file of lines, as LLaVA's scripts write on several GPUs."""
    if files and all(file.suffix.lower() == ".jsonl" for file in files):
        what = f"{len(files)} files of JSON lines, and a pattern names parquet files"
        fix = f"name the folder, if these are N_K.jsonl of N GPUs, or join them: cat {pattern} > joined.jsonl"
        raise UserError(what, where=str(pattern), fix=fix)


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
        fix = "save it as UTF-8 (Excel calls it CSV UTF-8), or check that its suffix is right"
        raise UserError("not UTF-8 text", where=str(path), fix=fix) from error


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
    """Refuse two columns of one name: neither is the right one."""
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"column {ascii(twice)[:80]} occurs twice", where=where, fix="remove or rename one")


def any_rows(
    path: Path,
    *,
    columns: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    keyed: Sequence[str] = (),
    formulas: bool = False,
) -> Iterator[Row]:
    """Rows of any file that holds rows, by its suffix; `.txt` is a table without a header.

    Args:
        path: JSON, JSON Lines (also named `.json`, as POPE's labels), TSV, CSV, xlsx, or parquet, also a folder or
            pattern of its shards.
        columns: names of a table's columns, where it has no header.
        leave_out: columns of parquet files that are not read.
        keyed: as that of `listed_rows`.
        formulas: as that of `xlsx_rows`.

    Raises:
        UserError: the file cannot be read, or is of another kind.
    """
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        what = "a pickle, which can run code when it is opened, is not read"
        raise UserError(what, where=str(path), fix="write the answers as .xlsx, .tsv, .json or .jsonl")
    if suffix == ".parquet" or path.is_dir() or ("*" in path.name and not path.is_file()):
        yield from parquet_rows(path, tuple(name for name in _parquet_columns(path) if name not in leave_out))
    elif suffix in (".json", ".jsonl") and _is_one_value(path):
        yield from json_objects(listed_rows(json_value(path), path, keyed), path)
    elif suffix in (".tsv", ".csv"):
        yield from tsv_rows(path) if suffix == ".tsv" else csv_rows(path)
    elif suffix == ".xlsx":
        yield from xlsx_rows(path, formulas=formulas)
    elif suffix == ".txt" and columns:
        yield from _headless_rows(path, columns)
    else:
        yield from json_lines(path)


def _is_one_value(path: Path) -> bool:
    """Whether a file holds one JSON value rather than one per line, whatever its suffix."""
    lines = (line.strip() for line in _lines(path))
    start = [line for line in islice((line for line in lines if line), 2)]
    if path.suffix.lower() == ".json":
        return not (len(start) == 2 and start[0].startswith("{") and start[0].endswith("}"))
    # no line of objects begins with a bracket, but a whole list may stand in one
    return start[:1] == ["{"] or (bool(start) and start[0].startswith("["))


def _parquet_columns(path: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    files = question_files(path)
    try:
        return list(pyarrow.parquet.read_schema(files[0]).names)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"cannot be read: {error}", where=str(files[0]), fix="download it again") from error
