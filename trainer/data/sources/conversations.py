"""A row of any known format -> one conversation about images, checked."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path

from llava_llama31.trainer.data.sources.images import ImageRef, image_at, image_column
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.recipes.data_formats import DataFormat


Turn = tuple[object, object]  # role and content, as the data gives them

IMAGE_MARKER = "<image>"

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


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


@dataclass(frozen=True, slots=True)
class Converter:
    """Turns a row into a Record."""

    format: DataFormat
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
            raise RecordError("malformed_record", f"a turn's role is {kind_of(role)}")
        if role not in _ROLES:
            raise RecordError("unknown_role", f"{ascii(role)[:80]} is none of {', '.join(_ROLES)}")
        num_images = len(sources)
        if isinstance(content, str):
            parts = self._text_parts(content, sources)
        elif isinstance(content, list):
            parts = list(chain.from_iterable(self._parts(part, sources) for part in content))
        else:
            raise RecordError("malformed_record", f"the text of a {_ROLES[role]} turn is {kind_of(content)}")
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
            raise RecordError("malformed_record", f"a part of a turn is {kind_of(part)}, not an object")
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
        raise RecordError("malformed_record", f"an image is {kind_of(given)}, not a path and not bytes")


def _turn(raw: object) -> Turn:
    if isinstance(raw, dict):
        if "from" in raw and "value" in raw:
            return raw["from"], raw["value"]
        if "role" in raw and "content" in raw:
            return raw["role"], raw["content"]
        raise RecordError("malformed_record", "a turn needs `from` and `value`, or `role` and `content`")
    raise RecordError("malformed_record", f"a turn is {kind_of(raw)}, not an object")


def _list(raw: dict, *keys: str) -> list:
    value = next((raw[key] for key in keys if raw.get(key) is not None), None)
    if not isinstance(value, list) or not value:
        what = "empty" if value == [] else kind_of(value)
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


_TURNS: dict[DataFormat, Callable[[dict], list[Turn]]] = {
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


def kind_of(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "missing"}
    return kinds.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
