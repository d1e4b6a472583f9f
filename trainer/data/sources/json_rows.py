"""Rows of a JSON array or of JSON lines, found once by byte offset and parsed one at a time, in bounded memory."""

import json
import os
import re
from array import array
from collections.abc import Generator, Iterator
from pathlib import Path

from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.data.sources.remote_files import open_remote
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.strict_json import unique_keys


MAX_ROW_BYTES = 16 * 2**20
# far below what the parser's own recursion allows, which depends on the caller
MAX_DEPTH = 64

_CHUNK_BYTES = 4 * 2**20
_BOM = b"\xef\xbb\xbf"
_HEAD_BYTES = 4
_ARCHIVES = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zX": "xz", b"(\xb5/\xfd": "zstd", b"PK\x03\x04": "zip"}
_SPACE = re.compile(r"[ \t\r\n]*")
_NOT_SPACE = re.compile(rb"[^ \t\r\n]")
_STRUCTURE = re.compile(r'["{}\[\],]')
_STRING_END = re.compile(r'["\\]')
_DECODE = json.JSONDecoder().raw_decode


# made once: json.loads makes a decoder for every row that it hooks
_DECODE_ROW = json.JSONDecoder(object_pairs_hook=unique_keys).decode


class JsonRows:
    """The values of a JSON array, or of a file with one JSON value a line, as a sequence.

    Opening it reads the file once and keeps 12 bytes a row; `rows[i]` reads and parses that row alone. A pickled copy
    opens the file again.

    Args:
        path: of this machine; a string is a URL.

    Raises:
        UserError: when the file as a whole can't be read (truncated array, not JSON, not UTF-8), with the byte offset.
        RecordError: from `rows[i]`, malformed_json, when that row alone is bad.
    """

    _file_descriptor = -1

    def __init__(self, path: Path | str):
        self.path = path
        self._remote = open_remote(path) if isinstance(path, str) else None
        self._starts = array("Q")
        self._sizes = array("I")
        if self._remote is None:
            self._file_descriptor = os.open(path, os.O_RDONLY)
        head = self.read(0, _HEAD_BYTES)
        if fault := encoding_fault(head):
            raise UserError(fault[0], where=str(path), fix=fault[1])
        start = _next_not_space(self, len(_BOM) if head.startswith(_BOM) else 0)
        byte = self.read(start, 1)
        if not byte:
            raise UserError("the file is empty", where=str(path))
        for begin, end in _array_rows(self, start) if byte == b"[" else _line_rows(self, start):
            self._starts.append(begin)
            # a longer row is refused by its size alone
            self._sizes.append(min(end - begin, MAX_ROW_BYTES + 1))
        if byte != b"[" and str(path).lower().endswith(".json"):
            self._check_lines()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: int) -> object:
        return parse_row(self.text(row), f"in the row at byte {self._starts[row]}")

    def text(self, row: int) -> str:
        """The row as it is in the file; bytes that are not UTF-8 become lone surrogates.

        Raises:
            RecordError: malformed_json, when the row is longer than MAX_ROW_BYTES.
        """
        start, size = self._starts[row], self._sizes[row]
        if size > MAX_ROW_BYTES:
            raise RecordError("malformed_json", f"the row at byte {start} is longer than {MAX_ROW_BYTES} bytes")
        return self.read(start, size).decode("utf-8", "surrogateescape")

    def read(self, start: int, size: int) -> bytes:
        """Up to `size` bytes of the file from byte `start` on."""
        if self._remote is not None:
            return self._remote.read(start, size)
        # pread, not mmap: the pages of a mapped file would count as this process's memory
        return os.pread(self._file_descriptor, size, start)

    def _check_lines(self) -> None:
        try:
            self[0]
        except RecordError as error:
            raise UserError(
                f"neither a JSON array nor JSON lines ({error.detail})",
                where=str(self.path),
                fix="store the records as one array, or one per line in a .jsonl file",
            ) from None

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self._remote is None:
            self._file_descriptor = os.open(self.path, os.O_RDONLY)

    def __del__(self) -> None:
        if self._file_descriptor >= 0:
            os.close(self._file_descriptor)


def encoding_fault(head: bytes) -> tuple[str, str] | None:
    """What is wrong with a text that begins with these four bytes, and its fix, where it is not UTF-8."""
    for magic, name in _ARCHIVES.items():
        if head.startswith(magic):
            return f"the file is compressed ({name})", "unpack it"
    encoding = json.detect_encoding(head)
    if encoding.startswith("utf-8") or not any(head):
        return None
    return f"the file is {encoding[:6].upper()}", "convert it to UTF-8"


def stand_in(path: str | Path) -> tuple[str, str] | None:
    """What a file is that was taken for data, and its fix: an archive, a pointer of Git LFS, a web page."""
    try:
        with open(path, "rb") as file:
            head = file.read(200).lstrip()
    except OSError:
        return None
    for magic, name in _ARCHIVES.items():
        if head.startswith(magic):
            return f"the file is compressed ({name})", "unpack it"
    if head.startswith(b"version https://git-lfs"):
        return "the file is a pointer of Git LFS, not the data", "fetch it with `git lfs pull`"
    if head.lower().startswith((b"<html", b"<!doctype html")):
        return "the file is a web page, not the data", "fetch it again, with the access that it asks for"
    return None


def parse_row(text: str, where: str) -> object:
    """The JSON value of one row.

    Raises:
        RecordError: malformed_json, with what is wrong and `where`.
    """
    if _depth(text) > MAX_DEPTH:
        raise RecordError("malformed_json", f"nested too deeply {where}")
    try:
        return _DECODE_ROW(text)
    except json.JSONDecodeError as error:
        raise RecordError("malformed_json", f"{error.msg} {where}") from None
    except ValueError as error:  # a key given twice, a number with thousands of digits
        raise RecordError("malformed_json", f"{error} {where}") from None


def _line_rows(rows: JsonRows, start: int) -> Iterator[tuple[int, int]]:
    """(start, end) of every line from byte `start` on that is not blank."""
    line_start = position = start
    while chunk := rows.read(position, _CHUNK_BYTES):
        found = chunk.find(b"\n")
        while found >= 0:
            end = position + found
            if line_start >= position:
                blank = not chunk[line_start - position : found].strip()
            else:
                blank = end - line_start < 4096 and not rows.read(line_start, end - line_start).strip()
            if not blank:
                yield line_start, end
            line_start = end + 1
            found = chunk.find(b"\n", found + 1)
        position += len(chunk)
    if rows.read(line_start, min(position - line_start, 4096)).strip():
        yield line_start, position


def _next_not_space(rows: JsonRows, position: int) -> int:
    """Byte offset of the next byte that is not JSON white space; the file's size where there is none."""
    while chunk := rows.read(position, _CHUNK_BYTES):
        if match := _NOT_SPACE.search(chunk):
            return position + match.start()
        position += len(chunk)
    return position


def _array_rows(rows: JsonRows, start: int) -> Iterator[tuple[int, int]]:
    """(start, end) of every element of the array that opens at byte `start`."""
    position = _next_not_space(rows, start + 1)
    closed = rows.read(position, 1) == b"]"
    while not closed:
        ends = yield from _whole_elements(rows, position)
        position = _next_not_space(rows, ends)
        separator = rows.read(position, 1)
        closed = separator == b"]"
        if separator == b",":
            position = _next_not_space(rows, position + 1)
        elif not closed:
            raise _broken_array(rows, position, separator)
    garbage = _next_not_space(rows, position + 1)
    if rows.read(garbage, 1):
        raise UserError(f"text after the end of the JSON array, at byte {garbage}", where=str(rows.path))


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None  # no space is a match too
    return match.end()


def _whole_elements(rows: JsonRows, position: int) -> Generator[tuple[int, int], None, int]:
    """Elements from byte `position` on, as many as one chunk holds or else one; returns where the last one ends."""
    text = rows.read(position, _CHUNK_BYTES).decode("utf-8", "surrogateescape")
    num_bytes = len if text.isascii() else _num_bytes
    begin = end = 0
    while True:
        stop = _value_end(text, begin)
        if stop is None or stop == begin or stop == len(text):
            # cut by the chunk's end, or no value at all
            break
        start = position + num_bytes(text[end:begin])
        position = start + num_bytes(text[begin:stop])
        yield start, position
        end = stop
        comma = _after_space(text, end)
        begin = _after_space(text, comma + 1)
        if text[comma : comma + 1] != "," or begin >= len(text):
            return position
    start = position + num_bytes(text[end:begin])
    position = _skip_element(rows, start)
    yield start, position
    return position


def _value_end(text: str, start: int) -> int | None:
    try:
        return _DECODE(text, start)[1]
    except (ValueError, RecursionError):
        return _element_end(text, start)


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))


def _skip_element(rows: JsonRows, start: int) -> int:
    """Where the array's element that starts at byte `start` ends, by its brackets and quotes alone, or the file."""
    data = rows.read(start, MAX_ROW_BYTES + 1)
    # latin-1: one character a byte
    end = _element_end(data.decode("latin-1"), 0)
    if end == 0:
        what = f"expected a value, found {chr(data[0])} at byte {start}"
        raise UserError(what, where=str(rows.path), fix="correct the JSON there")
    if end is not None:
        return start + end
    if len(data) > MAX_ROW_BYTES:
        raise UserError(
            f"row {len(rows)}, at byte {start}, is longer than {MAX_ROW_BYTES} bytes or never ends",
            where=str(rows.path),
            fix="correct the row, or store large images as files",
        )
    return start + len(data)


def _element_end(text: str, start: int) -> int | None:
    """Where an array's element that starts at `start` ends, by its brackets and quotes alone; None: not in `text`."""
    depth, position = 0, start
    while match := _STRUCTURE.search(text, position):
        position = match.end()
        character = match.group()
        if character == '"':
            position = _string_end(text, position)
        elif depth == 0 and character in ",]}":
            return match.start()
        elif character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
            if depth == 0:
                return position
    return None


def _string_end(text: str, position: int) -> int:
    """The place after the quote that closes a string; the text's end where none does."""
    while (match := _STRING_END.search(text, position)) and match.group() == "\\":
        position = match.end() + 1
    return match.end() if match else len(text)


def _depth(text: str) -> int:
    """How deep brackets nest; no more than an upper bound where that is within MAX_DEPTH."""
    bound = text.count("{") + text.count("[")
    if bound <= MAX_DEPTH:
        return bound
    depth = deepest = position = 0
    while match := _STRUCTURE.search(text, position):
        position = match.end()
        character = match.group()
        if character == '"':
            position = _string_end(text, position)
        elif character in "{[":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "}]":
            depth -= 1
    return deepest


def _broken_array(rows: JsonRows, position: int, found: bytes) -> UserError:
    if found:
        character = ascii(found.decode("latin-1"))
        what = f"expected `,` or `]` after row {len(rows) - 1}, found {character} at byte {position}"
    else:
        what = f"the JSON array breaks off at byte {position}, in or after row {max(len(rows) - 1, 0)}"
    return UserError(what, where=str(rows.path), fix="the file is incomplete or damaged: fetch or write it again")
