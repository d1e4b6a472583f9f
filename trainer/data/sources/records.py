"""Records to train on, read from LLaVA JSON, ShareGPT, messages and Cauldron data, one row at a time.

A reader opens nothing but the row that is asked for: JSON files and WebDataset shards are indexed by byte offset,
Hugging Face datasets stay memory-mapped with their images encoded.
"""

import base64
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from llava_llama31.trainer.data.sources.images import MAX_PIXELS, ImageRef, image_at, image_column
from llava_llama31.trainer.data.sources.json_rows import JsonRows
from llava_llama31.trainer.data.sources.reject_reasons import REASONS, RecordError
from llava_llama31.trainer.data.sources.tar_rows import TarRows
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.redaction import printable


if TYPE_CHECKING:
    from llava_llama31.trainer.recipes.schema import DataSource


__all__ = ["REASONS", "Record", "RecordError", "RecordStore", "data_files", "open_records"]

logger = logging.getLogger(__name__)

Format = Literal["llava", "sharegpt", "messages", "cauldron"]
Turn = tuple[object, object]  # role and content, as the data gives them

IMAGE_MARKER = "<image>"

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_DATASET_SUFFIXES = (".arrow", ".json", ".parquet", ".tar")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_PROBED_ROWS = 100


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation about images.

    Args:
        id: the data's own id as a string that can be printed (control characters escaped, cut at 200 characters), or
            `FILE:ROW`; not necessarily unique.
        images: in the order of their places in the messages.
        messages: `{"role", "content"}` with role system, user or assistant and content a list of
            `{"type": "image"}` and `{"type": "text", "text": str}`; user and assistant alternate, and an assistant
            turn with text ends them.
    """

    id: str
    images: tuple[ImageRef, ...]
    messages: list[dict]

    def digest(self) -> bytes:
        """16 bytes that are equal for records with the same images (path or bytes) and the same conversation."""
        pieces = [image.key() for image in self.images]
        for message in self.messages:
            pieces.append(message["role"])
            # no text holds the marker itself
            pieces += [part.get("text", IMAGE_MARKER) for part in message["content"]]
        return blake2b(repr(pieces).encode(), digest_size=16).digest()

    def prefix_digest(self) -> int:
        """Equal, and not 0, for records that begin with the same turns and images up to their last image."""
        if not self.images:
            return 0
        pieces = [image.key() for image in self.images]
        last = 0
        for message in self.messages:
            for part in message["content"]:
                pieces += (message["role"], part.get("text", IMAGE_MARKER))
                if part["type"] == "image":
                    last = len(pieces)
        digest = blake2b(repr(pieces[:last]).encode(), digest_size=8).digest()
        return int.from_bytes(digest) | 1


class _Rows(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> object: ...

    def text(self, row: int) -> str: ...


class RecordStore:
    """The records of one source as a sequence; a row is read, parsed and checked when it is asked for.

    Raises:
        RecordError: from `store[row]`, when that row can't be used. Other rows are not affected.
    """

    def __init__(self, rows: _Rows, data_format: Format, stem: str, convert: Callable[[dict, str], Record]):
        self.format = data_format
        self._rows, self._stem, self._convert = rows, stem, convert

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Record:
        raw = self._rows[row]
        if not isinstance(raw, dict):
            raise RecordError("malformed_record", f"the row is {_kind(raw)}, not an object")
        return self._convert(raw, self._id(raw, row))

    def __iter__(self) -> Iterator[Record]:
        return (self[row] for row in range(len(self)))

    def row_id(self, row: int) -> str:
        """Id of a row, whether or not it can be used."""
        try:
            return self._id(self._rows[row], row)
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


def open_records(
    source: "DataSource", *, keep_data_newline: bool = False, max_pixels: int = MAX_PIXELS
) -> RecordStore:
    """The records of a source: JSON array or lines, WebDataset shards, parquet, `save_to_disk`, or a Hub data set.

    Args:
        source: where the data lies and what shape it has; `image_root` defaults to the data's own folder. A Hub data
            set is `OWNER/NAME` or `OWNER/NAME:CONFIG`.
        keep_data_newline: keep the newline that follows an image marker, so that the chat template's own makes two.
        max_pixels: passed on to every image.

    Raises:
        UserError: when there is no such data, or its first rows have none of the known shapes.
    """
    path = Path(source.path)
    if path.is_file() and path.suffix in _JSON_SUFFIXES:
        rows: _Rows = JsonRows(path)
    elif shards := _shards(path):
        rows = TarRows(shards)
    else:
        rows = DatasetRows(source.path, source.split)
    if not len(rows):
        raise UserError("there are no records", where=source.path)
    data_format = source.format
    if data_format == "auto":
        data_format = _detect_format(rows, source.path)
        logger.info("%s: %d rows, format %s (detected)", source.path, len(rows), data_format)
    folder = path if path.is_dir() else path.parent
    root = Path(source.image_root) if source.image_root else folder
    if source.image_root and not root.is_dir():
        raise UserError(f"image_root {root} is not a folder", where=source.path, fix="name the folder of the images")
    convert = _Converter(data_format, Path(os.path.realpath(root)), max_pixels, keep_data_newline, source.images_only)
    return RecordStore(rows, data_format, path.stem, convert)


def data_files(source: "DataSource") -> list[Path]:
    """The files on this machine that hold a source's rows."""
    path = Path(source.path)
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.suffix in _DATASET_SUFFIXES and file.is_file())
    return [Path(file["filename"]) for file in DatasetRows(source.path, source.split).dataset.cache_files]


def _shards(path: Path) -> list[Path]:
    """WebDataset shards: the file itself, or those of a folder in the order of their names."""
    if path.is_file():
        return [path] if path.suffix == ".tar" else []
    shards = sorted(file for file in path.rglob("*.tar") if file.is_file()) if path.is_dir() else []
    if shards and any(path.rglob("*.parquet")):
        what = f"the folder holds both {len(shards)} .tar shards and parquet files"
        raise UserError(what, where=str(path), fix="name a folder with files of one kind")
    return shards


class DatasetRows:
    """Rows of a Hugging Face dataset as Python values, images as `{"bytes", "path"}`, still encoded."""

    def __init__(self, path: str, split: str):
        self.dataset = _load_dataset(path, split).with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> object:
        from pyarrow import ArrowException

        try:
            return self.dataset[row].to_pylist()[0]
        except UnicodeDecodeError as error:
            raise RecordError("invalid_text", f"{error.reason} at byte {error.start} of a text") from None
        except (ArrowException, OverflowError, ValueError) as error:  # a date that no calendar has
            raise RecordError("malformed_record", f"a value that can't be read: {error}") from None

    def text(self, row: int) -> str:
        return json.dumps(self[row], default=_encoded)


def _load_dataset(path: str, split: str):
    import datasets

    folder = Path(path)
    try:
        if folder.is_file() and folder.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files={split: path}, split=split)
        if (folder / "dataset_dict.json").is_file():
            return _saved_dataset(_saved_split(folder, split))
        if (folder / "state.json").is_file():
            return _saved_dataset(folder)
        if folder.is_dir() and next(folder.rglob("*.parquet"), None):
            # by its builder's name: opened as a folder, its README may name files elsewhere, and URLs
            return datasets.load_dataset("parquet", data_dir=path, split=split)
        if not folder.exists() and _HUB_ID.fullmatch(path):
            name, _, config = path.partition(":")
            return datasets.load_dataset(name, config or None, split=split)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(str(error).strip().split("\n")[0], where=path, fix="check `path` and `split`") from error
    what = "holds no data that can be read" if folder.exists() else "does not exist"
    kinds = "a .json, .jsonl, .tar or .parquet file, a folder of the last two or of save_to_disk, or OWNER/NAME"
    raise UserError(f"the path {what}", where=path, fix=f"name {kinds}")


def _saved_split(folder: Path, split: str) -> Path:
    """Folder of one split of a data set that `save_to_disk` wrote."""
    splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    if split not in splits:
        raise UserError(f"there is no split {split!r}", where=str(folder), fix="name one that is there in `split`")
    return _inside(folder, split)


def _saved_dataset(folder: Path):
    import datasets

    for file in json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]:
        _inside(folder, file["filename"])
    return datasets.load_from_disk(str(folder))


def _inside(folder: Path, name: str) -> Path:
    """A file of a saved data set, which its own description may not take from elsewhere."""
    if Path(name).name != name:
        raise ValueError(f"{name[:80]!r} is no name of a file in the folder")
    return folder / name


def _encoded(value: object) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _detect_format(rows: _Rows, path: str) -> Format:
    for row in range(min(len(rows), _PROBED_ROWS)):
        try:
            raw = rows[row]
        except RecordError:
            continue
        if not isinstance(raw, dict):
            continue
        if "texts" in raw:
            return "cauldron"
        if "messages" in raw or "prompt" in raw:
            return "messages"
        if "conversations" in raw:
            return "sharegpt" if "images" in raw else "llava"
        keys = ", ".join(ascii(str(key)[:80]) for key in sorted(raw)[:20])
        fix = "a record holds `conversations`, `messages`, `prompt` and `completion`, or `texts`; name its `format`"
        raise UserError(f"row {row} has none of the known shapes: its keys are {keys}", where=path, fix=fix)
    raise UserError(f"none of the first {_PROBED_ROWS} rows is a JSON object", where=path, fix="is it a data file?")


@dataclass(frozen=True, slots=True)
class _Converter:
    """Turns a row into a Record."""

    format: Format
    root: Path
    max_pixels: int
    keep_data_newline: bool
    images_only: bool

    def __call__(self, raw: dict, record_id: str) -> Record:
        column = image_column(raw)
        sources: list[object] = []  # of the images, in order of their places: None = the column's next
        messages = [self._message(turn, sources) for turn in _TURNS[self.format](raw)]
        if column and not sources and self.format in ("messages", "cauldron"):
            # a list of images without places belongs before the first question, as in TRL and Idefics
            first_user = next((message for message in messages if message["role"] == "user"), None)
            if first_user:
                first_user["content"][:0] = [{"type": "image"} for _ in column]
                sources = [None] * len(column)
        _check_turns(messages)
        num_open = sources.count(None)
        if num_open != len(column):
            raise RecordError("image_count_mismatch", f"{num_open} places for {len(column)} images")
        if self.images_only and not sources:
            raise RecordError("text_only", "the source asks for records with images")
        remaining = iter(column)
        images = tuple(self._image(next(remaining) if given is None else given) for given in sources)
        return Record(record_id, images, messages)

    def _message(self, turn: Turn, sources: list[object]) -> dict:
        role, content = turn
        if not isinstance(role, str):
            raise RecordError("malformed_record", f"a turn's role is {_kind(role)}")
        if role not in _ROLES:
            raise RecordError("unknown_role", f"{ascii(role)[:80]} is none of {', '.join(_ROLES)}")
        num_images = len(sources)
        if isinstance(content, str):
            parts = self._text_parts(content, sources)
        elif isinstance(content, list):
            parts = list(chain.from_iterable(self._parts(part, sources) for part in content))
        else:
            raise RecordError("malformed_record", f"the text of a {_ROLES[role]} turn is {_kind(content)}")
        if _ROLES[role] != "user" and len(sources) > num_images:
            raise RecordError("misplaced_image", f"{IMAGE_MARKER} in the {_ROLES[role]}'s turn")
        return {"role": _ROLES[role], "content": parts}

    def _text_parts(self, text: str, sources: list[object]) -> list[dict]:
        if not text.isascii():
            _check_unicode(text)
        first, *others = text.split(IMAGE_MARKER)
        parts = [{"type": "text", "text": first}] if first else []
        for piece in others:
            sources.append(None)
            parts.append({"type": "image"})
            rest = piece if self.keep_data_newline else piece.removeprefix("\n")
            if rest:
                parts.append({"type": "text", "text": rest})
        return parts

    def _parts(self, part: object, sources: list[object]) -> list[dict]:
        if not isinstance(part, dict):
            raise RecordError("malformed_record", f"a part of a turn is {_kind(part)}, not an object")
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            return self._text_parts(part["text"], sources)
        if kind == "image":
            given = (part[key] for key in ("image", "path", "url") if part.get(key) is not None)
            sources.append(next(given, None))
            return [{"type": "image"}]
        if kind == "image_url" and part.get("image_url"):
            url = part["image_url"]
            sources.append(url.get("url", "") if isinstance(url, dict) else url)
            return [{"type": "image"}]
        raise RecordError("malformed_record", f"a part of type {ascii(kind)[:80]} is neither text nor an image")

    def _image(self, given: object) -> ImageRef:
        if isinstance(given, str):
            return image_at(given, self.root, self.max_pixels)
        if isinstance(given, dict):
            data, path = given.get("bytes"), given.get("path")
            if isinstance(data, bytes):
                return ImageRef(path if isinstance(path, str) else "bytes", data=data, max_pixels=self.max_pixels)
            if isinstance(path, str):
                return image_at(path, self.root, self.max_pixels)
        raise RecordError("malformed_record", f"an image is {_kind(given)}, not a path and not bytes")


def _turn(raw: object) -> Turn:
    if isinstance(raw, dict):
        if "from" in raw and "value" in raw:
            return raw["from"], raw["value"]
        if "role" in raw and "content" in raw:
            return raw["role"], raw["content"]
        raise RecordError("malformed_record", "a turn needs `from` and `value`, or `role` and `content`")
    raise RecordError("malformed_record", f"a turn is {_kind(raw)}, not an object")


def _list(raw: dict, *keys: str) -> list:
    value = next((raw[key] for key in keys if raw.get(key) is not None), None)
    if not isinstance(value, list) or not value:
        what = "empty" if value == [] else _kind(value)
        raise RecordError("malformed_record", f"`{'` or `'.join(keys)}` is {what}")
    return value


def _conversation_turns(raw: dict) -> list[Turn]:
    turns = [_turn(turn) for turn in _list(raw, "conversations", "messages")]
    return turns if raw.get("system") in (None, "") else [("system", raw["system"]), *turns]


def _message_turns(raw: dict) -> list[Turn]:
    if raw.get("messages") is not None:
        return [_turn(turn) for turn in _list(raw, "messages")]
    prompt, completion = raw.get("prompt"), raw.get("completion")
    asked = [("user", prompt)] if isinstance(prompt, str) else [_turn(turn) for turn in _list(raw, "prompt")]
    if isinstance(completion, str):
        return [*asked, ("assistant", completion)]
    return asked + [_turn(turn) for turn in _list(raw, "completion")]


def _cauldron_turns(raw: dict) -> list[Turn]:
    turns: list[Turn] = []
    for text in _list(raw, "texts"):
        if not isinstance(text, dict) or "user" not in text or "assistant" not in text:
            raise RecordError("malformed_record", "an item of `texts` needs `user` and `assistant`")
        turns += [("user", text["user"]), ("assistant", text["assistant"])]
    return turns


_TURNS: dict[str, Callable[[dict], list[Turn]]] = {
    "llava": _conversation_turns,
    "sharegpt": _conversation_turns,
    "messages": _message_turns,
    "cauldron": _cauldron_turns,
}


def _check_turns(messages: list[dict]) -> None:
    roles = [message["role"] for message in messages]
    talk = roles[1:] if roles[0] == "system" else roles
    if "assistant" not in talk:
        raise RecordError("no_supervised_token", "there is no assistant turn")
    expected = ["user", "assistant"] * (len(talk) // 2 + 1)
    if talk != expected[: len(talk)]:
        turn = next(turn for turn, (role, right) in enumerate(zip(talk, expected, strict=False)) if role != right)
        raise RecordError("non_alternating_turns", f"turn {turn + 1} is the {talk[turn]}'s")
    if talk[-1] != "assistant":
        raise RecordError("non_alternating_turns", "the last question has no answer")
    for number, message in enumerate(messages):
        if message["role"] != "system" and not _says_something(message["content"]):
            reason = "empty_answer" if message["role"] == "assistant" else "empty_question"
            raise RecordError(reason, f"turn {number + 1} of {len(messages)} holds no text")


def _says_something(content: list[dict]) -> bool:
    return any(part["type"] == "image" or not part["text"].isspace() for part in content)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError("invalid_text", f"{ascii(text[error.start])} at character {error.start}") from None


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "missing"}
    return kinds.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
