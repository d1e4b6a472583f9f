"""Fields of records, turns and parts other than text: honoured, refused by a reason, or named as not read."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from llava_llama31.trainer.data.sources.images import holds_base64_image, is_absent, is_encoded_image
from llava_llama31.trainer.data.sources.reject_reasons import RecordError


if TYPE_CHECKING:
    from llava_llama31.trainer.recipes.schema import Where


IMAGE_FIELDS = ("image", "images")
SYSTEM_FIELDS = ("system", "system_prompt", "system_message")

_READ = frozenset({"id", *IMAGE_FIELDS, *SYSTEM_FIELDS})
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
    for ending in ("", "s", "_path", "_paths", "_file", "_files", "_url", "_urls", "_bytes", "_list")
)
VIDEO_AND_AUDIO_PARTS = ("video", "video_url", "input_video", "audio", "audio_url", "input_audio")
_PREFERENCES = frozenset(
    f"{kind}{ending}" for kind in ("chosen", "rejected") for ending in ("", "_response", "_messages", "_images")
)
_LABELS = frozenset({"label", "kto_tag"})
_BOXES = frozenset({"objects", "bbox", "bboxes", "boxes"})
_BOX_MARKERS = ("<ref-object>", "<bbox>", "<box>")
_WEIGHTS = frozenset(
    {"weight", "loss", "train", "training", "trainable", "loss_mask", "loss_weight", "loss_scale"}
    | {"train_detail", "training_detail"}
)
_TOOL_CALLS = frozenset({"tool_calls", "function_call"})
_JUDGED = _VIDEO_AND_AUDIO | _PREFERENCES | _BOXES | _TOOL_CALLS | _IMAGE_FIELDS_OF_OTHERS | _FILE_FIELDS

_IMAGE_NAME = re.compile(r"\.(jpe?g?|jfif|png|webp|gif|bmp|tiff?|avif|heic)(\?\S*)?$", re.IGNORECASE)


def other_fields(raw: Mapping[str, object]) -> dict[str, object]:
    """The fields of a record that have a value and are none that every format reads.

    Raises:
        RecordError: video_or_audio, preference.
    """
    others = {key: value for key, value in raw.items() if value is not None and key not in _READ}
    _refuse_video_and_audio(others)
    for key, value in others.items():
        compares = key in _PREFERENCES and isinstance(value, (str, list, dict)) and not is_absent(value)
        if compares or (key in _LABELS and value is False):
            raise RecordError("preference", f"`{key}` marks an answer as better or worse than another")
    return others


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
        RecordError: image_not_read, when it is not clear which field holds the record's images.
    """
    named = [key for key, value in others.items() if _names_images(key, value)]
    if len(named) > 1:
        raise RecordError("image_not_read", f"both `{named[0]}` and `{named[1]}` give images: name them in `images`")
    if not named:
        for key, value in others.items():
            if _holds_image(value):
                raise RecordError("image_not_read", f"`{key[:80]}` gives an image: name it in `image` or `images`")
        return [], []
    value = others[named[0]]
    return value if isinstance(value, list) else [value], named


def refuse_boxes(others: Mapping[str, object], texts: Iterator[str]) -> None:
    """Nothing, unless fields hold what placeholders in the texts stand for.

    Raises:
        RecordError: grounding.
    """
    boxes = [key for key, value in others.items() if key in _BOXES and not is_absent(value)]
    if boxes:
        markers = next((marker for text in texts for marker in _BOX_MARKERS if marker in text), None)
        if markers is not None:
            raise RecordError("grounding", f"{markers} in the text refers to values of `{boxes[0]}`")


def not_read(fields: Mapping[str, object]) -> Iterator[str]:
    """Names of fields that are left over; an empty field of a known meaning says nothing."""
    return (key for key, value in fields.items() if not (key in _JUDGED and is_absent(value)))


def turn_weight(fields: Mapping[str, object], role: str) -> tuple[bool, list[str]]:
    """Whether an assistant turn is trained on, and the names of the turn's fields that are not read.

    Args:
        fields: of the turn, beside its role and its content.
        role: system, user or assistant.

    Raises:
        RecordError: turn_weight, tool_calls, image_not_read, video_or_audio.
    """
    _refuse_video_and_audio(fields)
    weights = {key: value for key, value in fields.items() if key in _WEIGHTS}
    others = {key: value for key, value in fields.items() if key not in _WEIGHTS}
    for key, value in others.items():
        if is_absent(value):
            continue
        if key in _TOOL_CALLS:
            raise RecordError("tool_calls", f"the {role}'s turn has `{key}`")
        if key in IMAGE_FIELDS or _names_images(key, value) or _holds_image(value):
            raise RecordError("image_not_read", f"a turn's own `{key[:80]}` gives an image: name it in `images`")
    if role != "assistant":
        return True, [*not_read(others), *(key for key, value in weights.items() if value != 0)]
    for key, value in weights.items():
        _check_weight(key, value)
    if len(set(map(bool, weights.values()))) > 1:
        raise RecordError("turn_weight", f"{' and '.join(f'`{key}`' for key in weights)} disagree")
    return all(weights.values()), list(not_read(others))


def text_part_fields(fields: Mapping[str, object]) -> Iterator[str]:
    """Names of a text part's fields that are not read.

    Args:
        fields: of the part, beside its type and its text.

    Raises:
        RecordError: turn_weight, image_not_read, video_or_audio.
    """
    _refuse_video_and_audio(fields)
    for key, value in fields.items():
        if key in _WEIGHTS and not _is_one(value):
            raise RecordError("turn_weight", f"`{key}` of a part of a turn: only whole turns can be left out")
        if _gives_part_image(key, value):
            raise RecordError("image_not_read", f"a text part's `{key[:80]}` gives an image: make it an image part")
    return not_read({key: value for key, value in fields.items() if key not in _WEIGHTS})


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
        if key in _VIDEO_AND_AUDIO and not is_absent(value):
            raise RecordError("video_or_audio", f"the data gives `{key}`")


def _check_weight(key: str, value: object) -> None:
    if not (isinstance(value, (bool, int, float)) and value in (0, 1)):
        raise RecordError("turn_weight", f"`{key}` is {ascii(value)[:80]}")


def _is_one(value: object) -> bool:
    return isinstance(value, (bool, int, float)) and value == 1


def _gives_part_image(key: str, value: object) -> bool:
    return not is_absent(value) and (key in _PART_IMAGE_FIELDS or _holds_image(value))


def _names_images(key: str, value: object) -> bool:
    if is_absent(value):
        return False
    if key in _FILE_FIELDS:
        names = value if isinstance(value, list) else [value]
        return any(_is_image(name) for name in names)
    return key in _IMAGE_FIELDS_OF_OTHERS


def _holds_image(value: object) -> bool:
    """Whether a field of whatever name gives an image; a sentence that ends with a file's name is none."""
    values = value if isinstance(value, list) else [value]
    return any(_is_image(item) and not (isinstance(item, str) and len(item.split()) > 1) for item in values)


def _is_image(value: object) -> bool:
    if isinstance(value, dict):
        return any(_is_image(value.get(key)) for key in ("bytes", "path", "url"))
    if isinstance(value, bytes):
        return is_encoded_image(value)
    if not isinstance(value, str):
        return False
    return bool(_IMAGE_NAME.search(value[-4096:])) or value[:11].lower() == "data:image/" or holds_base64_image(value)
