"""Why a record can't be trained on: one table of reasons, and the error that carries one."""

REASONS: dict[str, str] = {
    "malformed_json": "the row is not JSON, gives a key twice, is nested too deeply, or is longer than 16 MiB",
    "malformed_record": "the row is JSON, but a field is missing or of the wrong type",
    "invalid_text": "the text holds a lone surrogate or bytes that are not UTF-8",
    "unknown_role": "a turn's role is not system, user (human) or assistant (gpt)",
    "non_alternating_turns": "turns do not go (system,) user, assistant, user, assistant, ... up to an assistant turn",
    "empty_question": "a user turn has neither text nor image",
    "empty_answer": "an assistant turn has no text",
    "no_supervised_token": "there is no assistant turn, or none that is trained on",
    "turn_weight": "a `weight`, `loss` or `train` is not 0, 1, true or false, or leaves out less or more than a turn",
    "conflicting_system": "the record gives two different system turns, or one where none is allowed",
    "tool_calls": "a turn calls tools, which the chat template does not write",
    "preference": "the record compares answers (`chosen`, `rejected`, `label: false`); training takes only good ones",
    "grounding": "the text has `<bbox>` or `<ref-object>` for boxes or `objects`, which is not supported",
    "video_or_audio": "the record has video or audio; only images are read",
    "image_not_read": "a field that is not read gives an image; `image`, `images` and image parts are read",
    "image_count_mismatch": "places for images (`<image>` markers or image parts) and images differ in number",
    "misplaced_image": "an image is in a system or assistant turn",
    "text_only": "the record has no image, and its source is `images_only`",
    "image_url": "the image is a URL; images are read from disk only",
    "invalid_image_path": "the image's path is empty, too long, base64 text, or holds a NUL or a lone surrogate",
    "image_outside_root": "the image's path is absolute or holds `..`, and leaves the image root",
    "image_symlink_escape": "the image's path follows a symbolic link that leaves the image root",
    "image_not_a_file": "the image's path is a folder, a device, a pipe or a socket",
    "missing_image": "the image's file does not exist",
    "unreadable_image": "the operating system refuses to read the image file",
    "unsupported_image_format": "the image is not JPEG, PNG, WebP, GIF or BMP",
    "corrupt_image": "the image is truncated, damaged or empty",
    "oversized_image": "the image has more pixels, a longer side, more bytes or more metadata than the limit",
    "decoder_died": "the process that decodes images crashed, was killed or stalled on this one, twice",
    "too_thin_image": "the image is so thin that unpadding leaves nothing of its tiles, only the squashed overview",
    "too_long": "the record has more tokens than the limit; no image and no answer is ever cut",
    "filtered": "the source's `where` leaves the row out; never an error",
    "evaluation_image": "the row shows an image of an evaluation, or a near duplicate of one",
    "evaluation_question": "the row asks a question of an evaluation",
    "duplicate": "an earlier row of the same source has the same images and the same conversation",
}


class RecordError(ValueError):
    """One record can't be used.

    Args:
        reason: a key of `REASONS`.
        detail: what was found, for the person who corrects the data.
        image: name of the image at fault, as the data gives it.
    """

    def __init__(self, reason: str, detail: str, image: str | None = None):
        assert reason in REASONS, reason
        self.reason, self.detail, self.image = reason, detail, image
        super().__init__(f"{reason}: {detail}")

    def __reduce__(self) -> tuple[type["RecordError"], tuple[str, str, str | None]]:
        return RecordError, (self.reason, self.detail, self.image)
