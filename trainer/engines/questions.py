"""The fixed questions that a reference records and an engine is asked: same messages and pixels on every machine.

They cover what engines get wrong: every grid of tiles, thin images, several images, text alone and before an image, a
system turn, an earlier turn, transparency. An image is a sign with a word, drawn from a table of bits: fonts differ
between machines.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image


Part = str | Image.Image
_GLYPHS = {  # 5 x 7, a row of bits each
    "A": (14, 17, 17, 31, 17, 17, 17),
    "E": (31, 16, 16, 30, 16, 16, 31),
    "I": (14, 4, 4, 4, 4, 4, 14),
    "N": (17, 25, 21, 19, 17, 17, 17),
    "O": (14, 17, 17, 17, 17, 17, 14),
    "P": (30, 17, 17, 30, 16, 16, 16),
    "S": (15, 16, 16, 14, 1, 1, 30),
    "T": (31, 4, 4, 4, 4, 4, 4),
    "X": (17, 17, 10, 4, 10, 17, 17),
}
_WORDS = ("STOP", "EXIT", "OPEN", "TAXI", "TEN", "SIX", "POST", "SEA")
_COLOURS = ((200, 30, 40), (30, 90, 200), (20, 140, 70), (240, 190, 20), (120, 50, 150), (40, 40, 40))
_READ = "What does the sign say?\nAnswer the question using a single word or phrase."
_DESCRIBE = "Describe the image."


@dataclass(frozen=True)
class FixedQuestion:
    """A conversation that waits for an answer.

    Args:
        id: its name in references and reports.
        turns: role and parts of each turn, strings and images in order.
    """

    id: str
    turns: tuple[tuple[str, tuple[Part, ...]], ...]

    @property
    def images(self) -> list[Image.Image]:
        return [part for _, parts in self.turns for part in parts if isinstance(part, Image.Image)]

    @property
    def is_transparent(self) -> bool:
        return any(image.mode == "RGBA" for image in self.images)

    def messages(self) -> list[dict[str, Any]]:
        """As Transformers' chat templates and processors take them."""
        return [{"role": role, "content": [_as_part(part) for part in parts]} for role, parts in self.turns]

    def openai_messages(self) -> list[dict[str, Any]]:
        """As OpenAI-compatible servers take them: images as data URIs of PNG files, a single text as a string."""
        return [
            {"role": role, "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else _as_uris(parts)}
            for role, parts in self.turns
        ]


def fixed_questions(grids: Sequence[Sequence[int]], tile: int) -> list[FixedQuestion]:
    """The questions for a model.

    Args:
        grids: (height, width) in pixels of the resolutions that images are tiled at.
        tile: side of a tile in pixels.
    """

    def of_user(name: str, *parts: Part) -> FixedQuestion:
        return FixedQuestion(name, (("user", parts),))

    asked = [
        of_user(
            f"grid {height}x{width}", sign(number, 6 * height // 7, 6 * width // 7), (_READ, _DESCRIBE)[number % 2]
        )
        for number, (height, width) in enumerate(grids)
    ]
    near, wide = (tile, 3 * tile // 2), (tile // 4, 3 * tile)
    asked += [
        of_user("thin, wide", sign(1, *wide), _DESCRIBE),
        of_user("thin, tall", sign(2, *wide[::-1]), _DESCRIBE),
        of_user("text only", "What is the capital of France?"),
        of_user("text only, longer", "Name three colours of traffic signs, and say what each of them stands for."),
        of_user("text before the image", _READ, sign(3, *near)),
        of_user("two images", sign(4, *near), sign(5, *near[::-1]), "Which two words do the signs show?"),
        FixedQuestion("system turn", (("system", ("Answer in one word.",)), ("user", (sign(6, *near), _DESCRIBE)))),
        FixedQuestion(
            "earlier turns",
            (
                ("user", (sign(7, *near), _READ)),
                ("assistant", ("SEA",)),
                ("user", ("Which colour does the sign have?",)),
            ),
        ),
        of_user("transparent image", sign(0, *near, transparent=True), _READ),
    ]
    return asked


def sign(number: int, height: int, width: int, *, transparent: bool = False) -> Image.Image:
    """A word on a coloured panel, before a gradient or, if asked, before nothing."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 255 // height, columns * 255 // width, np.full_like(rows, 40 * number)], axis=-1)
    top, left = height // 8, width // 8
    opaque = (rows >= top) & (rows < height - top) & (columns >= left) & (columns < width - left)
    pixels[opaque] = _COLOURS[number % len(_COLOURS)]
    mask = _word(_WORDS[number % len(_WORDS)])
    scale = max(1, min((height - 3 * top) // mask.shape[0], (width - 3 * left) // mask.shape[1]))
    mask = mask.repeat(scale, axis=0).repeat(scale, axis=1)[: height - 2 * top, : width - 2 * left]
    y, x = (height - mask.shape[0]) // 2, (width - mask.shape[1]) // 2
    pixels[y : y + mask.shape[0], x : x + mask.shape[1]][mask] = 255
    image = Image.fromarray(pixels.astype(np.uint8))
    if transparent:
        image.putalpha(Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8)))
    return image


def data_uri(image: Image.Image) -> str:
    """The image as a PNG file in a data URI."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _word(word: str) -> np.ndarray:
    """Which points a word covers, (7, 6 * letters - 1)."""
    letters = [np.array([[row >> bit & 1 for bit in (4, 3, 2, 1, 0)] for row in _GLYPHS[letter]]) for letter in word]
    gap = np.zeros((7, 1), int)
    return np.concatenate([part for letter in letters for part in (letter, gap)][:-1], axis=1).astype(bool)


def _as_part(part: Part) -> dict[str, Any]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}


def _as_uris(parts: Sequence[Part]) -> list[dict[str, Any]]:
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_uri(part)}}
        for part in parts
    ]
