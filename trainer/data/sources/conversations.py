"""A row of any known format -> one conversation about images, checked."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llava_llama31.trainer.data.sources import fields
from llava_llama31.trainer.data.sources.images import ImageRef, image_at, image_column, is_absent
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.recipes.data_formats import DataFormat


if TYPE_CHECKING:
    from llava_llama31.trainer.recipes.schema import Where


IMAGE_MARKER = "<image>"
# what stands for an image in the texts of other tools; with attributes it is HTML
_OTHER_MARKER = re.compile(
    r"<\|?(?:image|img|picture)\b[^<>=]{0,40}>|<\|?(?:image_\w{1,20}|vision_start)\|?>|<start_of_image>|\[IMG\]",
    re.IGNORECASE,
)

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_TURN_FIELDS = (("from", "value"), ("role", "content"))
_SPEAKERS_AND_TEXTS = frozenset(chain.from_iterable(_TURN_FIELDS))
_A_TURN = {"system": "a system turn", "user": "a user turn", "assistant": "an assistant turn"}


class Turn(NamedTuple):
    """A turn as the data gives it.

    Args:
        role, content: of any type.
        field: of the record, that holds the turn.
        text_field: of the turn, that holds the content; empty where the record's field does.
        others: the turn's other fields, without those that are null.
    """

    role: object
    content: object
    field: str
    text_field: str = ""
    others: Mapping[str, object] = {}

    def place(self) -> str:
        """Where the record holds the turn, such as `messages[]`."""
        return f"{self.field}[]" if self.text_field else self.field


class _Nth(NamedTuple):
    """The image of that number in the record's column."""

    number: int


@dataclass(slots=True)
class _Reading:
    """What the turns of a record give beside text.

    Args:
        sources: of the images, in order of their places: None is the column's next.
        not_read: fields, by their places in the record.
        num_supervised_turns: assistant turns that are trained on.
    """

    sources: list[object] = field(default_factory=list)
    not_read: set[str] = field(default_factory=set)
    num_supervised_turns: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation about images.

    Args:
        id: the data's own id as a string that can be printed (control characters escaped, cut at 200 characters), or
            `FILE:ROW`; not necessarily unique.
        images: in the order of their places in the messages.
        messages: `{"role", "content"}` with role system, user or assistant and content a list of
            `{"type": "image"}` and `{"type": "text", "text": str}`; user and assistant alternate, and an assistant
            turn with text ends them. An assistant turn that is not trained on has `"weight": 0`.
        not_read: fields that nothing was made of, such as `license` or `messages[].name`.
    """

    id: str
    images: tuple[ImageRef, ...]
    messages: list[dict]
    not_read: tuple[str, ...] = ()

    def digest(self) -> bytes:
        """16 bytes that are equal for records with the same images (path or bytes) and the same conversation."""
        pieces = [image.key() for image in self.images]
        for message in self.messages:
            pieces.append(message["role"] if message.get("weight", 1) else "not trained on")
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


@dataclass(frozen=True, slots=True)
class Converter:
    """Turns a row into a Record."""

    format: DataFormat
    root: Path | str
    max_pixels: int
    keep_data_newline: bool
    images_only: bool
    where: Mapping[str, "Where"] = field(default_factory=dict)

    def __call__(self, raw: dict, record_id: str) -> Record:
        if self.where:
            raw = fields.filtered(raw, self.where)
        others = fields.other_fields(raw)
        turns = _TURNS[self.format](raw)
        for turn in turns:
            others.pop(turn.field, None)
        reading = _Reading()
        system = [self._message(Turn("system", raw[key], key), reading) for key in fields.system_fields(raw)]
        messages = _with_system(system, [self._message(turn, reading) for turn in turns])
        column = self._column(raw, others, reading)
        if column and not reading.sources and self.format in ("messages", "cauldron"):
            # a list of images without places belongs before the first question, as in TRL and Idefics
            first_user = next((message for message in messages if message["role"] == "user"), None)
            if first_user:
                first_user["content"][:0] = [{"type": "image"} for _ in column]
                reading.sources = [None] * len(column)
        _check_turns(messages, reading.num_supervised_turns)
        if others:
            fields.refuse_boxes(others, (part.get("text", "") for turn in messages for part in turn["content"]))
        if reading.sources.count(None) < len(column):
            _refuse_other_marker(messages)
        images = tuple(self._image(given) for given in _in_place(reading.sources, column))
        if self.images_only and not images:
            raise RecordError("text_only", "the source asks for records with images")
        if others:
            reading.not_read.update(fields.not_read(others))
        return Record(record_id, images, messages, tuple(sorted(reading.not_read)))

    def _column(self, raw: dict, others: dict[str, object], reading: _Reading) -> list[object]:
        """The record's images; those in fields of other tools leave `others`, where nothing else shows an image."""
        column = image_column(raw)
        given = [image for image in column if not is_absent(image)]
        if not reading.sources or reading.sources.count(None) == len(given):
            column = given  # a null has no place
        names: list[str] = []
        if others and not column and all(given is None for given in reading.sources):
            column, names = fields.image_fields(others)
            for name in names:
                del others[name]
        for image in column:
            if isinstance(image, dict):
                name = names[0] if names else "image" if not is_absent(raw.get("image")) else "images"
                reading.not_read.update(f"{name}.{key}" for key in _not_read_of_image(image))
        return column

    def _message(self, turn: Turn, reading: _Reading) -> dict:
        role, content = turn.role, turn.content
        if not isinstance(role, str):
            raise RecordError("malformed_record", f"a turn's role is {kind_of(role)}")
        if role not in _ROLES:
            raise RecordError("unknown_role", f"{ascii(role)[:80]} is not one of {', '.join(_ROLES)}")
        role = _ROLES[role]
        is_learnt = True
        if turn.others:
            is_learnt, not_read = fields.turn_weight(turn.others, role)
            reading.not_read.update(f"{turn.place()}.{name}" for name in not_read)
        num_images = len(reading.sources)
        if isinstance(content, str):
            parts = self._text_parts(content, reading)
        elif isinstance(content, list):
            place = f"{turn.place()}.{turn.text_field}[]" if turn.text_field else f"{turn.field}[]"
            parts = list(chain.from_iterable(self._parts(part, place, reading) for part in content))
        else:
            raise RecordError("malformed_record", f"the text of {_A_TURN[role]} is {kind_of(content)}")
        if role != "user" and len(reading.sources) > num_images:
            raise RecordError("misplaced_image", f"{IMAGE_MARKER} in the {role}'s turn")
        message = {"role": role, "content": parts}
        if not is_learnt:
            return message | {"weight": 0}
        reading.num_supervised_turns += role == "assistant"
        return message

    def _text_parts(self, text: str, reading: _Reading) -> list[dict]:
        if not text.isascii():
            _check_unicode(text)
        first, *others = text.split(IMAGE_MARKER)
        parts = [{"type": "text", "text": first}] if first else []
        for piece in others:
            reading.sources.append(None)
            parts.append({"type": "image"})
            rest = piece
            if piece.startswith(("\n", "\r")):
                rest = piece[2 if piece.startswith("\r\n") else 1 :]
                if self.keep_data_newline:
                    rest = "\n" + rest
            if rest:
                parts.append({"type": "text", "text": rest})
        return parts

    def _parts(self, part: object, place: str, reading: _Reading) -> list[dict]:
        if not isinstance(part, dict):
            raise RecordError("malformed_record", f"a part of a turn is {kind_of(part)}, not an object")
        kind = part.get("type")
        others = {key: value for key, value in part.items() if value is not None and key != "type"}
        if kind in fields.VIDEO_AND_AUDIO_PARTS:
            raise RecordError("video_or_audio", f"a part of type {kind}")
        if kind == "text" and isinstance(others.get("text"), str):
            text = part["text"]
            del others["text"]
            if others:
                reading.not_read.update(f"{place}.{name}" for name in fields.text_part_fields(others))
            return self._text_parts(text, reading)
        if kind == "image" or (kind == "image_url" and part.get("image_url")):
            given, names = _image_of_part(others)
            for name in names:
                reading.not_read.update(f"{place}.{name}.{key}" for key in _not_read_of_image(others.pop(name)))
            if others:
                not_read = fields.image_part_fields(others, has_image=given is not None)
                reading.not_read.update(f"{place}.{name}" for name in not_read)
            reading.sources.append(given)
            return [{"type": "image"}]
        raise RecordError("malformed_record", f"a part of type {ascii(kind)[:80]} is neither text nor an image")

    def _image(self, given: object) -> ImageRef:
        if isinstance(given, str):
            return image_at(given, self.root, self.max_pixels)
        if isinstance(given, bytes):
            return ImageRef("bytes", data=given, max_pixels=self.max_pixels)
        if isinstance(given, dict):
            data, path = given.get("bytes"), given.get("path")
            if isinstance(data, bytes):
                return ImageRef(path if isinstance(path, str) else "bytes", data=data, max_pixels=self.max_pixels)
            if isinstance(data, str) and data:
                what = "an image's `bytes` are text: base64 goes into a `data:image/TYPE;base64,...` URI"
                raise RecordError("malformed_record", what)
            name = path if path is not None else given.get("url")
            if isinstance(name, str):
                return image_at(name, self.root, self.max_pixels)
        raise RecordError("malformed_record", f"an image is {kind_of(given)}, not a path and not bytes")


def _image_of_part(part: Mapping[str, object]) -> tuple[object, tuple[str, ...]]:
    """What an image part shows, None for the column's next image, and the fields that say so."""
    if isinstance(part.get("bytes"), bytes):
        return {"bytes": part["bytes"], "path": part.get("path")}, ("bytes", "path") if "path" in part else ("bytes",)
    for key in ("image", "path", "url", "image_url"):
        if key in part:
            value = part[key]
            if key == "image_url" and isinstance(value, dict):
                value = value.get("url", "")
            return value, (key,)
    source = part.get("source")
    if isinstance(source, str):
        return source, ("source",)
    if isinstance(source, dict) and source.get("type") == "base64" and isinstance(source.get("data"), str):
        return f"data:{source.get('media_type')};base64,{source['data']}", ("source",)
    if isinstance(source, dict) and source.get("type") == "url" and isinstance(source.get("url"), str):
        return source["url"], ("source",)
    if not is_absent(source):
        raise RecordError("image_not_read", "an image part's `source` is neither text, nor of type base64 or url")
    for key, number in part.items():
        if fields.plain(key) in fields.INDEX_FIELDS:
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise RecordError("malformed_record", f"an image part's `{key}` is {ascii(number)[:80]}")
            return _Nth(number), (key,)
    return None, ()


def _not_read_of_image(given: object) -> Iterator[str]:
    """Fields of an object that gives an image, beside those that say which."""
    read = ("type", "media_type", "data", "bytes", "path", "url")
    values = given if isinstance(given, dict) else {}
    return (key for key, value in values.items() if value is not None and key not in read)


def _in_place(sources: list[object], column: list[object]) -> list[object]:
    """What each place for an image shows: its own image, the column's next one, or that of a number.

    Raises:
        RecordError: image_count_mismatch, when the column's images and their places don't agree.
    """
    num_open = sources.count(None)
    if num_open == len(sources) == len(column):
        return column
    numbers = [given.number for given in sources if isinstance(given, _Nth)]
    if numbers and num_open:
        raise RecordError("malformed_record", "one image part has an `index`, another place has none")
    if numbers and set(numbers) != set(range(len(column))):
        listed = ", ".join(map(str, sorted(set(numbers))[:20]))
        raise RecordError("image_count_mismatch", f"image parts of index {listed} for {len(column)} images")
    if not numbers and num_open != len(column):
        raise RecordError("image_count_mismatch", f"{num_open} places for {len(column)} images")
    remaining = iter(column)
    return [
        next(remaining) if given is None else column[given.number] if isinstance(given, _Nth) else given
        for given in sources
    ]


def _refuse_other_marker(messages: list[dict]) -> None:
    """Nothing, unless a user's text has what stands for an image in other tools' data.

    Raises:
        RecordError: image_count_mismatch.
    """
    asked = (message["content"] for message in messages if message["role"] == "user")  # answers may be HTML
    for part in chain.from_iterable(asked):
        if found := _OTHER_MARKER.search(part.get("text", "")):
            what = f"{found[0]} in the text is not a place for an image: write {IMAGE_MARKER}"
            raise RecordError("image_count_mismatch", what)


def _with_system(system: list[dict], messages: list[dict]) -> list[dict]:
    """The messages with the one system turn that fields and turns give; none where it is empty.

    Args:
        system: from the record's fields.
        messages: from its turns.

    Raises:
        RecordError: conflicting_system.
    """
    if messages[0]["role"] == "system":
        system, messages = [*system, messages[0]], messages[1:]
    if not system:
        return messages
    said = [turn for turn in system if _says_something(turn["content"])]
    texts = {"".join(part["text"] for part in turn["content"]).strip() for turn in said}
    if len(texts) > 1:
        shown = " and ".join(ascii(text[:80]) for text in sorted(texts)[:2])
        raise RecordError("conflicting_system", shown)
    return said[:1] + messages


def _turn(raw: object, field: str) -> Turn:
    if isinstance(raw, dict):
        for role, text in _TURN_FIELDS:
            speaker = raw.get(role)
            if speaker is not None and text in raw:
                if len(raw) == 2:
                    return Turn(speaker, raw[text], field, text)
                others = {key: value for key, value in raw.items() if value is not None and key not in (role, text)}
                if not _SPEAKERS_AND_TEXTS.isdisjoint(others):
                    _refuse_second_turn(speaker, raw[text], others)
                return Turn(speaker, raw[text], field, text, others)
        raise RecordError("malformed_record", "a turn needs `from` and `value`, or `role` and `content`")
    raise RecordError("malformed_record", f"a turn is {kind_of(raw)}, not an object")


def _refuse_second_turn(speaker: object, text: object, others: dict) -> None:
    """Take the fields of the other kind of turn out of `others`, where they say the same.

    Raises:
        RecordError: malformed_record, they say something else.
    """
    for name, said in (("from", speaker), ("role", speaker), ("value", text), ("content", text)):
        other = others.pop(name, said)
        if other != said and (_ROLES.get(str(other)) is None or _ROLES[str(other)] != _ROLES.get(str(said))):
            raise RecordError(
                "malformed_record", f"a turn has both kinds of fields, and `{name}` contradicts the other kind"
            )


def _list(raw: dict, *keys: str) -> tuple[list, str]:
    """The list that the first field with a value holds, and the field's name."""
    name = next((key for key in keys if raw.get(key) is not None), keys[0])
    value = raw.get(name)
    if not isinstance(value, list) or not value:
        what = "empty" if value == [] else kind_of(value)
        if isinstance(value, str) and value.lstrip().startswith("["):
            what = "text that looks like JSON: write it as a list of the row"
        raise RecordError("malformed_record", f"`{'` or `'.join(keys)}` is {what}")
    return value, name


def _turns(raw: dict, *keys: str) -> list[Turn]:
    values, name = _list(raw, *keys)
    return [_turn(value, name) for value in values]


def _conversation_turns(raw: dict) -> list[Turn]:
    return _turns(raw, "conversations", "messages")


def _message_turns(raw: dict) -> list[Turn]:
    if raw.get("messages") is not None:
        return _turns(raw, "messages")
    prompt, completion = raw.get("prompt"), raw.get("completion")
    asked = [Turn("user", prompt, "prompt")] if isinstance(prompt, str) else _turns(raw, "prompt")
    if isinstance(completion, str):
        return [*asked, Turn("assistant", completion, "completion")]
    return asked + _turns(raw, "completion")


def _cauldron_turns(raw: dict) -> list[Turn]:
    turns: list[Turn] = []
    texts, name = _list(raw, "texts")
    for text in texts:
        if not isinstance(text, dict) or "user" not in text or "assistant" not in text:
            raise RecordError("malformed_record", "an item of `texts` needs `user` and `assistant`")
        others = {key: text[key] for key in text if key not in ("user", "assistant") and text[key] is not None}
        system = fields.system_fields(others)
        turns += [Turn("system", others.pop(key), name, key) for key in system]
        turns += [
            Turn("user", text["user"], name, "user"),
            Turn("assistant", text["assistant"], name, "assistant", others),
        ]
    return turns


_TURNS: dict[DataFormat, Callable[[dict], list[Turn]]] = {
    "llava": _conversation_turns,
    "sharegpt": _conversation_turns,
    "messages": _message_turns,
    "cauldron": _cauldron_turns,
}


def _check_turns(messages: list[dict], num_supervised_turns: int) -> None:
    roles = [message["role"] for message in messages]
    talk = roles[1:] if roles[:1] == ["system"] else roles
    if "assistant" not in talk:
        raise RecordError("no_supervised_token", "there is no assistant turn")
    expected = ["user", "assistant"] * (len(talk) // 2 + 1)
    if talk != expected[: len(talk)]:
        turn = next(turn for turn, (role, right) in enumerate(zip(talk, expected, strict=False)) if role != right)
        raise RecordError("non_alternating_turns", f"turn {turn + 1} is the {talk[turn]}'s")
    if talk[-1] != "assistant":
        raise RecordError("non_alternating_turns", "the last question has no answer")
    if not num_supervised_turns:
        raise RecordError("no_supervised_token", "every assistant turn has weight 0")
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


def kind_of(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "missing"}
    return kinds.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
