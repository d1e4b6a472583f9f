"""OCR tokens for prompts that contain them, where the annotations have none; needs the `ocr` extra."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_llama31.trainer.data.sources.images import ImageRef
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.errors import UserError, naming
from llava_llama31.trainer.evaluation.questions import Question


def with_ocr_tokens(
    questions: Sequence[Question], cache: Path, on_progress: Callable[[int, int], None] | None = None
) -> list[Question]:
    """The same questions, each with the words that rapidocr reads in its image.

    Args:
        cache: JSON Lines {image_id, ocr_tokens} that grow image by image; what is there is not read again.
        on_progress: called with (images done, all images).

    Raises:
        UserError: rapidocr is not installed.
    """
    images = {question.image_id: question.image for question in questions if question.image is not None}
    tokens = _read_cache(cache)
    read = _reader() if images.keys() - tokens.keys() else None
    cache.parent.mkdir(parents=True, exist_ok=True)
    with cache.open("a", encoding="utf-8") as file:
        for done, (image_id, image) in enumerate(images.items(), 1):
            if image_id not in tokens and read is not None:
                tokens[image_id] = _words(read, image)
                with naming(cache):
                    file.write(json.dumps({"image_id": image_id, "ocr_tokens": tokens[image_id]}) + "\n")
                    file.flush()
            if on_progress is not None:
                on_progress(done, len(images))
    return [replace(question, ocr_tokens=tuple(tokens.get(question.image_id, ()))) for question in questions]


def _words(read: Callable[[np.ndarray], list[str]], image: ImageRef) -> list[str]:
    try:
        return read(np.asarray(image.open()))
    except RecordError:  # the evaluation itself counts and names it
        return []


def _reader() -> Callable[[np.ndarray], list[str]]:
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise UserError("--ocr rapidocr needs rapidocr", fix="pip install 'llava-llama31[ocr]'") from error
    engine: Any = RapidOCR(params={"Global.log_level": "error"})

    def read(rgb: np.ndarray) -> list[str]:
        lines = engine(np.ascontiguousarray(rgb[..., ::-1])).txts or ()  # it takes OpenCV's order of channels
        return [word for line in lines for word in line.split()]

    return read


def _read_cache(cache: Path) -> dict[str, list[str]]:
    lines = cache.read_text(encoding="utf-8").splitlines(keepends=True) if cache.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    if len(rows) < len(lines):  # a kill cut the last one short
        cache.write_text("".join(lines[:-1]), encoding="utf-8")
    return {row["image_id"]: row["ocr_tokens"] for row in rows}
