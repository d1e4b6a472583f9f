"""Images with text in them: signs, product labels, receipts and clocks, with captions, questions and answers.

A `Scene` is what an image says: words, layout, caption, questions. `paint` turns a scene into pixels. Every scene
belongs to one split by a hash of its (words, layout) pair, so no pair is ever in both training and validation.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from llava_llama31.trainer.errors import UserError


TILE = 48
PATCH = 8
GRID_PINPOINTS = [[48, 96], [96, 48], [96, 96], [48, 144], [144, 48]]
PROMPT_SUFFIX = "\nAnswer the question using a single word or phrase."
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.:"

# columns and rows of patches, so that each shape needs other anyres tiles
SHAPES = {
    "square": (12, 12),
    "broad": (12, 8),
    "wide": (12, 6),
    "banner": (18, 6),
    "high": (8, 12),
    "tall": (6, 12),
    "pole": (6, 18),
}
# the text is on the grid of patches, give or take this much of a patch: the difficulty of the set
JITTER = 0.12
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "DejaVuSansMono-Bold")

SIGN_WORDS = """
    stop slow exit open closed sale free gate north south east west left right park bridge river lake hill road street
    lane one two school zoo farm mill port dock pier ferry bus taxi train metro bike walk run wait push pull enter
    danger wet hot cold ice fire water gas oil food fresh fish bread books toys shoes hats music art film show club
    bar cafe hotel rooms bank shop store market garden forest beach camp trail summit tower castle museum library
    quiet private staff only no dogs cats horses deer cows ducks children work ahead area zone keep out off lawn
    clean hands mind the step low high speed limit end begin main old new town city hall court police post office
""".upper().split()
ITEMS = """
    milk bread eggs rice tea coffee sugar salt flour butter cheese ham fish beef lamb soup beans corn peas kale leek
    onion garlic plum pear apple lemon lime mango melon grape figs dates nuts oats honey jam cake pie cookie candy
    juice cola water wine beer soap paper tape glue pen lamp bulb socks comb brush
""".upper().split()
DAYS = ("MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN")
UNITS = ("G", "ML")


@dataclass(frozen=True)
class Question:
    """A question about an image, its true answer, and another way in which people put that answer."""

    text: str
    answer: str
    variant: str


@dataclass(frozen=True)
class Scene:
    """What an image says.

    Args:
        kind: sign, label, receipt or clock.
        shape: a key of `SHAPES`.
        lines: the cells of every line, top to bottom; two cells stand at the two ends of their line.
        caption: one sentence with all the text.
        questions: what can be asked about it.
    """

    kind: str
    shape: str
    lines: tuple[tuple[str, ...], ...]
    caption: str
    questions: tuple[Question, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """All words in reading order."""
        return tuple(word for line in self.lines for cell in line for word in cell.split())

    @property
    def layout(self) -> tuple[str, str, tuple[tuple[int, ...], ...]]:
        """The kind, the shape, and how many words stand in each cell of each line."""
        return self.kind, self.shape, tuple(tuple(len(cell.split()) for cell in line) for line in self.lines)

    @property
    def split(self) -> str:
        """`validation` for a fifth of all (words, layout) pairs, by hash, else `train`."""
        digest = hashlib.sha256(repr((self.words, self.layout)).encode()).digest()
        return "validation" if digest[0] < 51 else "train"

    def fits(self) -> bool:
        """Whether the lines fit into the shape, one character a patch and a free row below each line."""
        columns, rows = SHAPES[self.shape]
        return max(len(" ".join(line)) for line in self.lines) <= columns and 2 * len(self.lines) <= rows


@dataclass(frozen=True)
class Glyph:
    """One character and the patch that contains it."""

    character: str
    column: int
    row: int


def make_scene(rng: random.Random, split: str) -> Scene:
    """Draws a scene of that split."""
    while True:
        scene = rng.choice(_MAKERS)(rng)
        if scene.fits() and scene.split == split:
            return scene


def paint(scene: Scene, rng: random.Random) -> tuple[Image.Image, list[Glyph]]:
    """The scene as an RGB image, in fonts, colours, sizes and positions of the generator's choice."""
    columns, rows = SHAPES[scene.shape]
    # whole pixels per patch keep the shape exact: LLaVA's choice of tiles turns on the last pixel
    cell = rng.randint(12, 24)
    ground, ink = random_colours(rng)
    image = Image.new("RGB", (columns * cell, rows * cell), ground)
    canvas = ImageDraw.Draw(image)
    if rng.random() < 0.3:
        canvas.rectangle((0, 0, image.width - 1, image.height - 1), outline=ink)
    style, centred = rng.choice(font_names()), rng.random() < 0.5
    # a free row below each line: choose places among the rows that are left, then spread them
    places = sorted(rng.sample(range(rows - len(scene.lines) + 1), len(scene.lines)))
    glyphs = []
    for number, (place, line) in enumerate(zip(places, scene.lines, strict=True)):
        font = fitting_font(style, cell, rng)
        for text, column in _cell_columns(line, columns, centred, rng):
            glyphs += write(canvas, text, font, (column, place + number), cell, ink, rng)
    return image, glyphs


def write(
    canvas: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.FreeTypeFont,
    place: tuple[int, int],
    cell: int,
    ink: tuple[int, int, int],
    rng: random.Random,
) -> list[Glyph]:
    """Write a text from a place (column, row) on, one character per cell; returns where each character is."""
    column, row = place
    right, down = rng.uniform(-JITTER, JITTER), rng.uniform(-JITTER, JITTER)
    # capitals of these fonts are 0.73 em high: half of that below the middle is their foot
    foot = (row + 0.5 + down) * cell + 0.365 * font.size
    for position, character in enumerate(text, column):
        canvas.text(((position + 0.5 + right) * cell, foot), character, fill=ink, font=font, anchor="ms")
    return [Glyph(character, position, row) for position, character in enumerate(text, column) if character != " "]


def random_colours(rng: random.Random) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """A ground and an ink of clearly different brightness."""
    light = (rng.randrange(180, 256), rng.randrange(180, 256), rng.randrange(180, 256))
    dark = (rng.randrange(0, 90), rng.randrange(0, 90), rng.randrange(0, 90))
    return light, dark


@lru_cache(maxsize=1)
def font_names() -> tuple[str, ...]:
    """The names that `load_font` takes; the empty one is Pillow's own font."""
    return ("", *FONTS)


@lru_cache(maxsize=1024)
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font of that size in pixels."""
    font = ImageFont.load_default(size) if not name else ImageFont.truetype(_font_folder() / f"{name}.ttf", size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


@lru_cache(maxsize=1)
def _font_folder() -> Path:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            "the demo draws with the fonts that matplotlib carries, and it is not installed",
            fix="pip install 'llava-llama31[demo]'",
        ) from error
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def fitting_font(style: str, cell: int, rng: random.Random) -> ImageFont.FreeTypeFont:
    """A font of a random size in which most letters keep to their cell."""
    largest = min(1.4, 0.98 / (load_font(style, 100).getlength("M") / 100))
    return load_font(style, round(cell * largest * rng.uniform(0.85, 1.0)))


def _cell_columns(line: tuple[str, ...], columns: int, centred: bool, rng: random.Random) -> list[tuple[str, int]]:
    if len(line) == 2:
        return [(line[0], 0), (line[1], columns - len(line[1]))]
    free = columns - len(line[0])
    return [(line[0], free // 2 if centred else rng.randint(0, free))]


def _invented_name(rng: random.Random) -> str:
    syllables = [rng.choice("BDFGKLMNPRSTVZ") + rng.choice("AEIOU") for _ in range(2)]
    return "".join(syllables) + rng.choice(("", "", "N", "R", "S", "X"))


def _price(rng: random.Random) -> str:
    return str(rng.randrange(1, 100))


def _sign(rng: random.Random) -> Scene:
    words = rng.sample(SIGN_WORDS, rng.choice((1, 2)))
    shape = rng.choice(tuple(SHAPES))
    lines = ((" ".join(words),),) if shape in ("wide", "banner") else tuple((word,) for word in words)
    text = " ".join(words)
    questions = [Question("what does the sign say?", text, words[0])]
    if len(words) > 1:
        questions.append(Question("what is the first word on the sign?", words[0], text))
        questions.append(Question("what is the last word on the sign?", words[-1], text))
    return Scene("sign", shape, lines, f"a sign that says {text}.", tuple(questions))


def _label(rng: random.Random) -> Scene:
    brand, product = _invented_name(rng), rng.choice(ITEMS)
    amount = f"{rng.randrange(1, 10)}{rng.choice(('0', '5', '00', '25', '50', '75'))} {rng.choice(UNITS)}"
    shape = rng.choice(("square", "broad", "high", "tall", "pole"))
    caption = f"a label of {product} by {brand}, {amount}."
    questions = (
        Question("what is the brand?", brand, f"{brand} {product}"),
        Question("what is in the package?", product, f"{brand} {product}"),
        Question("how much is in the package?", amount, amount.split()[0]),
    )
    return Scene("label", shape, ((brand,), (product,), (amount,)), caption, questions)


def _receipt(rng: random.Random) -> Scene:
    store, items = _invented_name(rng), rng.sample(ITEMS, 2)
    prices = [_price(rng) for _ in items]
    shape = rng.choice(("square", "square", "broad", "pole"))
    lines: tuple[tuple[str, ...], ...]
    if shape == "pole":
        lines = ((store,), *((cell,) for pair in zip(items, prices, strict=True) for cell in pair))
    else:
        lines = ((store,), *zip(items, prices, strict=True))
    listing = ", ".join(f"{item} {price}" for item, price in zip(items, prices, strict=True))
    questions = [Question("what is the name of the store?", store, f"{store} store")]
    for item, price in zip(items, prices, strict=True):
        questions.append(Question(f"how much is the {item}?", price, f"${price}"))
    return Scene("receipt", shape, lines, f"a receipt from {store}: {listing}.", tuple(questions))


def _clock(rng: random.Random) -> Scene:
    time = f"{rng.randrange(1, 13)}:{rng.randrange(0, 60, 5):02d}"
    day = rng.choice(DAYS)
    shape = rng.choice(("square", "broad", "wide", "banner", "high", "tall"))
    lines = {"banner": ((f"{day} {time}",),)}.get(
        shape, ((day,), (time,)) if rng.random() < 0.5 else ((time,), (day,))
    )
    questions = (
        Question("what time is it?", time, time.replace(":", ".")),
        Question("which day does the clock show?", day, f"{day}day"),
    )
    return Scene("clock", shape, lines, f"a clock that shows {day}, {time}.", questions)


_MAKERS: tuple[Callable[[random.Random], Scene], ...] = (_sign, _label, _receipt, _clock)
