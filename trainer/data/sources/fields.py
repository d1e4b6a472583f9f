"""Fields of records, turns and parts other than text: honoured, refused by a reason, or named as not read."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from llava_llama31.trainer.data.sources.images import holds_base64_image, is_absent, is_encoded_image, medium_of
from llava_llama31.trainer.data.sources.reject_reasons import RecordError


if TYPE_CHECKING:
    from llava_llama31.trainer.recipes.schema import Where


IMAGE_FIELDS = ("image", "images")
SYSTEM_FIELDS = ("system", "system_prompt", "system_message", "system_instruction")

# all names below also stand for other spellings of them: `systemPrompt`, `Image`, `tool-calls`
_READ = frozenset({"id", *IMAGE_FIELDS})
_TURN_FIELDS = frozenset({"conversations", "messages", "prompt", "completion", "texts"})
_SYSTEM_FIELDS = frozenset(SYSTEM_FIELDS)
# what other tools call `image` and `images`
_IMAGE_FIELDS_OF_OTHERS = frozenset(
    {"image_path", "image_paths", "image_file", "image_files", "image_url", "image_urls", "image_bytes", "image_list"}
    | {"img", "imgs", "img_path", "img_paths", "img_url", "img_urls", "pil_image", "picture", "pictures"}
)
# an image's name only where they end as one
_FILE_FIELDS = frozenset(
    {"file_name", "file_names", "filename", "filenames", "file", "files", "file_path", "file_paths", "path"}
    | {"image_name", "image_names", "image_file_name", "image_filename", "img_name", "photo", "photos"}
)
_PART_IMAGE_FIELDS = frozenset(
    {*IMAGE_FIELDS, *_IMAGE_FIELDS_OF_OTHERS, "source", "data", "base64", "b64", "bytes", "blob", "file", "file_id"}
)
_VIDEO_AND_AUDIO = frozenset(
    kind + ending
    for kind in ("video", "audio")
    for ending in (
        "",
        "s",
        "_path",
        "_paths",
        "_file",
        "_files",
        "_url",
        "_urls",
        "_bytes",
        "_list",
        "_name",
        "_names",
    )
)
VIDEO_AND_AUDIO_PARTS = ("video", "video_url", "input_video", "audio", "audio_url", "input_audio")
_COMPARED = (
    "response",
    "message",
    "messages",
    "conversation",
    "conversations",
    "answer",
    "completion",
    "output",
    "text",
)
_PREFERENCES = frozenset(
    name
    for kind in ("chosen", "rejected")
    for name in (
        kind,
        f"{kind}_images",
        *(f"{kind}_{what}" for what in _COMPARED),
        *(f"{what}_{kind}" for what in _COMPARED),
    )
) | {"positive_messages", "negative_messages"}
_LABELS = frozenset({"label", "kto_tag"})
_BOXES = frozenset({"objects", "bbox", "bboxes", "boxes"})
_BOX_MARKERS = ("<ref-object>", "<bbox>", "<box>")
_WEIGHTS = frozenset(
    {"weight", "loss", "train", "training", "trainable", "loss_mask", "loss_weight", "loss_scale"}
    | {"train_detail", "training_detail", "weights", "loss_weights", "compute_loss", "calculate_loss"}
    | {"output_with_loss", "train_on", "train_on_turn", "supervised", "learn"}
)
# the same the other way round: true leaves a turn out
_LEFT_OUT = frozenset(
    {"mask", "masked", "is_masked", "mask_loss", "loss_masked", "ignore", "ignored", "ignore_loss", "no_loss"}
    | {"skip", "skip_loss", "exclude", "excluded"}
)
# the number of an image part's image
INDEX_FIELDS = frozenset({"index", "image_index", "image_idx", "img_index", "img_idx"})
_TOOL_CALLS = frozenset({"tool_call", "tool_calls", "function_call", "function_calls"})
_JUDGED = _VIDEO_AND_AUDIO | _PREFERENCES | _BOXES | _TOOL_CALLS | _IMAGE_FIELDS_OF_OTHERS | _FILE_FIELDS

_IMAGE_NAME = re.compile(r"\.(jpe?g?|jfif|png|webp|gif|bmp|tiff?|avif|heic)(\?\S*)?$", re.IGNORECASE)
_VIDEO_NAME = re.compile(r"\.(mp4|m4v|mov|avi|mkv|webm|mpe?g|wav|mp3|flac|ogg|opus|m4a|aac)(\?\S*)?$", re.IGNORECASE)
_VIDEO_DATA = re.compile("data:(video|audio)/", re.IGNORECASE)
_SOUND_HEAD = re.compile(rb"ID3|fLaC|OggS|RIFF....WAVE", re.DOTALL)
_HEAD_BYTES = 16
_NEXT_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[- ]")


def plain(key: str) -> str:
    """A field's name in the spelling of the tables above: `systemPrompt` and `System-Prompt` are `system_prompt`."""
    # no name of the tables is as long; data may use keys of any length as values
    return _plain(key) if len(key) < 40 else key


@lru_cache(1024)
def _plain(key: str) -> str:
    return _NEXT_WORD.sub("_", key).lower()


def may_change_a_record(key: str) -> bool:
    """Whether what a field of this name holds may matter to a record that shows its images in its own fields."""
    if key in _READ or key in _TURN_FIELDS:
        return True
    return plain(key) in _JUDGED | _SYSTEM_FIELDS | _LABELS | _WEIGHTS | _LEFT_OUT | {*IMAGE_FIELDS, "id"}


def other_fields(raw: Mapping[str, object]) -> dict[str, object]:
    """The fields of a record that have a value and are none that every format reads.

    Raises:
        RecordError: video_or_audio, preference, turn_weight.
    """
    others = {
        key: value
        for key, value in raw.items()
        if value is not None and key not in _READ and (key in _TURN_FIELDS or plain(key) not in _SYSTEM_FIELDS)
    }
    _refuse_video_and_audio(others)
    for key, value in others.items():
        if key in _TURN_FIELDS:
            continue
        name = plain(key)
        compares = name in _PREFERENCES and isinstance(value, (str, list, dict)) and not is_absent(value)
        if compares or (name in _LABELS and (value is False or (isinstance(value, str) and value.lower() == "false"))):
            raise RecordError("preference", f"`{key[:80]}` marks an answer as better or worse than another")
        if (name in _WEIGHTS and _is_number(value, 0)) or (name in _LEFT_OUT and _is_number(value, 1)):
            raise RecordError(
                "turn_weight", f"`{key[:80]}` leaves the whole record out: remove the record, or the field"
            )
        if isinstance(value, list) and _weighs_turns(name, value):
            raise RecordError("turn_weight", f"`{key[:80]}` is a list: give each turn a `weight` of its own")
    return others


def system_fields(raw: Mapping[str, object]) -> list[str]:
    """The fields of a record that give a system turn."""
    given = [
        key
        for key, value in raw.items()
        if key not in _READ and key not in _TURN_FIELDS and plain(key) in _SYSTEM_FIELDS and not is_absent(value)
    ]
    return sorted(given, key=lambda key: SYSTEM_FIELDS.index(plain(key))) if len(given) > 1 else given


def filtered(raw: Mapping[str, object], where: Mapping[str, "Where"]) -> dict:
    """The record without the columns of a source's `where`, and without the turns that a list column leaves out.

    A list column has one number per entry of `texts`, as FineVision's ratings of each turn.

    Raises:
        RecordError: filtered, the record is not to be taken; malformed_record, a list fits no turns.
    """
    kept = {key: value for key, value in raw.items() if key not in where}
    turns = raw.get("texts")
    taken = [True] * len(turns) if isinstance(turns, list) else []
    for name, condition in where.items():
        value = raw.get(name)
        if not isinstance(value, list):
            if not _meets(value, condition):
                raise RecordError("filtered", f"`{name}` is {ascii(value)[:80]}")
            continue
        if len(value) != len(taken):
            what = f"`{name}` has {len(value)} entries for {len(taken)} entries of `texts`"
            raise RecordError("malformed_record", what)
        taken = [kept_so_far and _meets(one, condition) for kept_so_far, one in zip(taken, value, strict=True)]
    if isinstance(turns, list) and not all(taken):
        kept["texts"] = [turn for turn, is_taken in zip(turns, taken, strict=True) if is_taken]
        if not kept["texts"]:
            raise RecordError("filtered", f"no turn has {', '.join(f'`{name}`' for name in where)} as asked for")
    return kept


def _meets(value: object, where: "Where") -> bool:
    if where.one_of is not None and value not in where.one_of:
        return False
    if where.min is None and where.max is None:
        return True
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return (where.min is None or value >= where.min) and (where.max is None or value <= where.max)


def image_fields(others: Mapping[str, object]) -> tuple[list[object], list[str]]:
    """The images that other tools' fields give to a record without any of its own, and the names of these fields.

    Raises:
        RecordError: image_not_read, when it is not clear which field holds the record's images; video_or_audio.
    """
    named = [key for key, value in others.items() if names_images(key, value)]
    if len(named) > 1:
        raise RecordError("image_not_read", f"both `{named[0]}` and `{named[1]}` give images: name them in `images`")
    if not named:
        for key, value in others.items():
            if _holds(value, _is_image):
                raise RecordError("image_not_read", f"`{key[:80]}` gives an image: name it in `image` or `images`")
            if _holds(value, _is_video):
                raise RecordError("video_or_audio", f"`{key[:80]}` gives video or sound")
        return [], []
    value = others[named[0]]
    return value if isinstance(value, list) else [value], named


def numbers_images(raw: object) -> bool:
    """Whether image parts of a record say by number which image they show."""
    if isinstance(raw, list):
        return any(map(numbers_images, raw))
    if not isinstance(raw, dict):
        return False
    if raw.get("type") == "image" and any(plain(key) in INDEX_FIELDS and raw[key] is not None for key in raw):
        return True
    return any(map(numbers_images, raw.values()))


def refuse_boxes(others: Mapping[str, object], texts: Iterator[str]) -> None:
    """Nothing, unless fields hold what placeholders in the texts stand for.

    Raises:
        RecordError: grounding.
    """
    boxes = [key for key, value in others.items() if plain(key) in _BOXES and not is_absent(value)]
    if boxes:
        markers = next((marker for text in texts for marker in _BOX_MARKERS if marker in text), None)
        if markers is not None:
            raise RecordError("grounding", f"{markers} in the text refers to values of `{boxes[0]}`")


def not_read(fields: Mapping[str, object]) -> Iterator[str]:
    """Names of fields that are left over; an empty field of a known meaning says nothing."""
    return (key for key, value in fields.items() if not (plain(key) in _JUDGED and is_absent(value)))


def turn_weight(fields: Mapping[str, object], role: str) -> tuple[bool, list[str]]:
    """Whether an assistant turn is trained on, and the names of the turn's fields that are not read.

    Args:
        fields: of the turn, beside its role and its content.
        role: system, user or assistant.

    Raises:
        RecordError: turn_weight, tool_calls, image_not_read, video_or_audio.
    """
    _refuse_video_and_audio(fields)
    weights = {key: value for key, value in fields.items() if plain(key) in _WEIGHTS}
    left_out = {key: value for key, value in fields.items() if plain(key) in _LEFT_OUT and _is_flag(value)}
    others = {key: value for key, value in fields.items() if key not in weights and key not in left_out}
    for key, value in others.items():
        if is_absent(value):
            continue
        if plain(key) in _TOOL_CALLS:
            raise RecordError("tool_calls", f"the {role}'s turn has `{key}`")
        if plain(key) in _SYSTEM_FIELDS:
            raise RecordError(
                "conflicting_system", f"a turn's own `{key}`: make it the first turn, or a field of the row"
            )
        if key in IMAGE_FIELDS or names_images(key, value) or _holds(value, _is_image):
            raise RecordError("image_not_read", f"a turn's own `{key[:80]}` gives an image: name it in `images`")
    if role != "assistant":
        asked = [key for key, value in weights.items() if value != 0]
        return True, [*not_read(others), *asked, *(key for key, value in left_out.items() if not value)]
    for key, value in weights.items():
        _check_weight(key, value)
    says = weights | {key: not value for key, value in left_out.items()}
    if len(set(map(bool, says.values()))) > 1:
        raise RecordError("turn_weight", f"{' and '.join(f'`{key}`' for key in says)} disagree")
    return all(says.values()), list(not_read(others))


def text_part_fields(fields: Mapping[str, object]) -> Iterator[str]:
    """Names of a text part's fields that are not read.

    Args:
        fields: of the part, beside its type and its text.

    Raises:
        RecordError: turn_weight, image_not_read, video_or_audio.
    """
    _refuse_video_and_audio(fields)
    for key, value in fields.items():
        name = plain(key)
        if (name in _WEIGHTS and not _is_number(value, 1)) or (name in _LEFT_OUT and _is_number(value, 1)):
            raise RecordError("turn_weight", f"`{key}` of a part of a turn: only whole turns can be left out")
        if _gives_part_image(key, value):
            raise RecordError("image_not_read", f"a text part's `{key[:80]}` gives an image: make it an image part")
    return not_read({key: value for key, value in fields.items() if plain(key) not in _WEIGHTS})


def image_part_fields(fields: Mapping[str, object], *, has_image: bool) -> Iterator[str]:
    """Names of an image part's fields that are not read.

    Args:
        fields: of the part, beside those that gave its image.
        has_image: the part has its own image.

    Raises:
        RecordError: malformed_record, image_not_read, video_or_audio.
    """
    _refuse_video_and_audio(fields)
    text = fields.get("text")
    if isinstance(text, str) and text.strip():
        raise RecordError("malformed_record", "an image part also has text: make it a text part")
    for key, value in fields.items():
        if not has_image and _gives_part_image(key, value):
            raise RecordError("image_not_read", f"an image part's `{key[:80]}` gives an image: name it `image`")
    return not_read({key: value for key, value in fields.items() if key != "text"})


def _refuse_video_and_audio(fields: Mapping[str, object]) -> None:
    for key, value in fields.items():
        if key not in _TURN_FIELDS and plain(key) in _VIDEO_AND_AUDIO and not is_absent(value):
            raise RecordError("video_or_audio", f"the data gives `{key}`")


def _weighs_turns(name: str, value: list) -> bool:
    """Whether a record's list of weights leaves something out, or weighs it."""
    learnt = 1 if name in _WEIGHTS else 0 if name in _LEFT_OUT else None
    return learnt is not None and not all(_is_number(one, learnt) for one in value)


def _check_weight(key: str, value: object) -> None:
    if not (isinstance(value, (bool, int, float)) and value in (0, 1)):
        raise RecordError("turn_weight", f"`{key}` is {ascii(value)[:80]}")


def _is_number(value: object, number: int) -> bool:
    return isinstance(value, (bool, int, float)) and value == number


def _is_flag(value: object) -> bool:
    return _is_number(value, 0) or _is_number(value, 1)


def _gives_part_image(key: str, value: object) -> bool:
    return not is_absent(value) and (plain(key) in _PART_IMAGE_FIELDS or _holds(value, _is_image))


def names_images(key: str, value: object) -> bool:
    """Whether a field, by its name, gives images under another name than `image`."""
    if is_absent(value):
        return False
    name = plain(key)
    if name in _FILE_FIELDS:
        names = value if isinstance(value, list) else [value]
        return any(_is_image(one) or _holds(one, _is_image) for one in names)
    return name in _IMAGE_FIELDS_OF_OTHERS or name in IMAGE_FIELDS


def _holds(value: object, is_one: Callable[[object], bool]) -> bool:
    """Whether a field of whatever name gives one, however deep; a sentence that ends with a file's name is none."""
    if isinstance(value, list):
        return any(_holds(item, is_one) for item in value)
    if isinstance(value, dict):
        return any(_holds(item, is_one) for item in value.values())
    return is_one(value) and not (isinstance(value, str) and len(value.split()) > 1)


def _is_image(value: object) -> bool:
    if isinstance(value, bytes):
        return is_encoded_image(value) or medium_of(value[:_HEAD_BYTES]) == "image"
    if not isinstance(value, str):
        return False
    return bool(_IMAGE_NAME.search(value[-4096:])) or value[:11].lower() == "data:image/" or holds_base64_image(value)


def _is_video(value: object) -> bool:
    if isinstance(value, bytes):
        head = value[:_HEAD_BYTES]
        return medium_of(head) == "video" or _SOUND_HEAD.match(head) is not None
    return isinstance(value, str) and bool(_VIDEO_NAME.search(value[-4096:]) or _VIDEO_DATA.match(value))
