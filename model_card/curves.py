"""Draws the loss of a stage over its steps as a small image."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


WIDTH, HEIGHT = 640, 320
LEFT, TOP, RIGHT, BOTTOM = 64, 34, 16, 40
TRAINING, VALIDATION, GRID, TEXT = "#1f6fb4", "#d1590a", "#dddddd", "#333333"
NUM_TICKS = 5

Points = Sequence[tuple[float, float]]


def draw_curve(title: str, training: Points, validation: Points = ()) -> Image.Image:
    """Draw losses over steps: training as a line, validation as a line with dots.

    Args:
        title: above the curves.
        training: (step, loss); not empty.
        validation: (step, loss); may be empty.

    Raises:
        ValueError: there is no point, or one is not finite.
    """
    points = [*training, *validation]
    if not training or not all(math.isfinite(number) for point in points for number in point):
        raise ValueError("a loss curve needs at least one training point, and all points must be finite")
    steps, losses = _ticks([step for step, _ in points]), _ticks([loss for _, loss in points])
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)

    def place(step: float, loss: float) -> tuple[float, float]:
        across = (step - steps[0]) / (steps[-1] - steps[0])
        up = (loss - losses[0]) / (losses[-1] - losses[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    for loss in losses:
        pen.line([place(steps[0], loss), place(steps[-1], loss)], fill=GRID)
        pen.text((LEFT - 6, place(steps[0], loss)[1]), f"{loss:.4g}", fill=TEXT, font=font, anchor="rm")
    for step in steps:
        pen.line([place(step, losses[0]), place(step, losses[-1])], fill=GRID)
        pen.text((place(step, losses[0])[0], HEIGHT - BOTTOM + 6), f"{step:,.6g}", fill=TEXT, font=font, anchor="ma")
    pen.line([place(*point) for point in training], fill=TRAINING, width=2)
    for point in training if len(training) == 1 else validation:
        x, y = place(*point)
        pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=VALIDATION if validation else TRAINING)
    if validation:
        pen.line([place(*point) for point in validation], fill=VALIDATION, width=2)
    pen.text((LEFT, 8), title, fill=TEXT, font=font)
    labels = [("training loss", TRAINING), *([("validation loss", VALIDATION)] if validation else [])]
    for number, (label, colour) in enumerate(reversed(labels)):
        pen.text((WIDTH - RIGHT - 120 * number, 8), label, fill=colour, font=font, anchor="ra")
    pen.text((WIDTH - RIGHT, HEIGHT - 16), "step", fill=TEXT, font=font, anchor="ra")
    return image


def _ticks(values: Sequence[float]) -> list[float]:
    """Equally spaced round numbers that cover all values."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / NUM_TICKS))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * NUM_TICKS >= span)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]
