"""Charts of a run: the loss of a stage as an image for the card, and lines over a common axis as inline SVG.

matplotlib draws both; it is imported when the first chart is drawn.
"""

import io
import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Points = Sequence[tuple[float, float]] | np.ndarray

WIDTH, HEIGHT = 640, 320  # of the card's image, in its page's pixels
SCALE = 2  # its own pixels for one of the page's
NUM_COLOURS = 6
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_DRAWING = threading.Lock()
_BUCKETS = 300  # of a line with more than twice as many points
# readable on white and on black: a card's image does not know its page's colours
_CARD_COLOURS = {"line-1": "#2f7fd0", "line-2": "#d1690a", "ink": "#7d7d7d", "grid": "#7d7d7d40", "mark": "#c0392b"}
_INK = ("line-1", "line-2", "line-3", "line-4", "line-5", "line-6", "ink", "grid", "mark")
# stand for the page's own colours until the SVG is written
_STAND_INS = {name: f"#0102{number:02x}" for number, name in enumerate(_INK, start=3)}


@dataclass(frozen=True)
class Line:
    """Points of one quantity.

    Args:
        label: what it is called in the description for screen readers.
        points: (x, y); a y that is not finite is a gap.
        colour: number of the line's colour, from 0.
        dash: number of its dashes, from 0, which is a solid line.
        dots: mark the points.
    """

    label: str
    points: Points
    colour: int = 0
    dash: int = 0
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over one axis.

    Args:
        title: of the chart.
        lines: at least one point among them is finite.
        x_label: unit of the axis.
        bounds: x where a part begins -> its name.
        marks: x of events.
        percent: show y in percent.
    """

    title: str
    lines: Sequence[Line]
    x_label: str = "step"
    bounds: Mapping[float, str] | None = None
    marks: Sequence[float] = ()
    percent: bool = False


def draw_curve(title: str, training: Points, validation: Points = ()) -> Image.Image:
    """Draw losses over steps: training as a line, validation as a line with dots; (WIDTH, HEIGHT) times SCALE pixels.

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
    lines = [Line("training loss", training, dots=len(training) == 1)]
    if validation:
        lines.append(Line("validation loss", validation, colour=1, dots=True))
    file = io.BytesIO()
    with _style():
        figure, axes = _drawn(Chart(title, lines), _CARD_COLOURS, (WIDTH / 100, HEIGHT / 100))
        axes.set_title(title, loc="left", color=_CARD_COLOURS["ink"])
        axes.legend(
            frameon=False, labelcolor="linecolor", ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0
        )
        figure.savefig(file, format="png", dpi=100 * SCALE, transparent=True, metadata={"Software": None})
    return Image.open(file)


def svg(chart: Chart, key: str, *, size: tuple[int, int] = (520, 260)) -> str:
    """The chart as an element of a page, whose style gives `--line-1` to `--line-6`, `--ink`, `--grid` and `--mark`.

    Args:
        key: what ids of the element begin with; letters and digits, unique in the page.
        size: (width, height) in pixels of the page.

    Raises:
        ValueError: there is no finite point.
    """
    if not any(len(_finite(line.points)) for line in chart.lines):
        raise ValueError(f"{chart.title}: there is no finite point to draw")
    file = io.StringIO()
    with _style():
        figure, _ = _drawn(chart, _STAND_INS, (size[0] / 100, size[1] / 100))
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inline(file.getvalue(), chart, key)


def described(chart: Chart) -> str:
    """The chart in words, for those who do not see it."""
    unit = (lambda y: f"{y:.1%}") if chart.percent else (lambda y: f"{y:.4g}")
    said = []
    for line in chart.lines:
        y = _finite(line.points)[:, 1]
        if len(y):
            first, last, low, high = map(unit, (y[0], y[-1], y.min(), y.max()))
            said.append(f"{line.label}: first {first}, last {last}, from {low} to {high}")
    return f"{chart.title} over {chart.x_label}. {'; '.join(said)}."


def thinned(points: Points, buckets: int = _BUCKETS) -> np.ndarray:
    """(x, mean, lowest, highest) of equal parts of the axis (N, 4); few points stay as they are, with gaps."""
    values = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    if len(values) <= 2 * buckets:
        return values[:, [0, 1, 1, 1]]
    values = _finite(values)
    x, y = values[np.argsort(values[:, 0], kind="stable")].T
    starts = np.unique(np.searchsorted(x, np.linspace(x[0], x[-1], buckets, endpoint=False)))
    counts = np.diff([*starts, len(x)])
    columns = [np.add.reduceat(column, starts) / counts for column in (x, y)]
    return np.stack([*columns, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)], axis=1)


def _finite(points: Points) -> np.ndarray:
    values = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    return values[np.isfinite(values[:, 1])]


def _between_gaps(y: np.ndarray) -> np.ndarray:
    """Whether a point has no neighbour that a line could lead to."""
    given = np.pad(np.isfinite(y), 1)
    return given[1:-1] & ~given[:-2] & ~given[2:]


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib's settings for one chart. They are the process's, so threads of `report --watch` wait."""
    import matplotlib

    # text stays text, and no label is read as mathematics
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "llava-llama31",
        "text.parse_math": False,
        "font.size": 9,
    }
    with _DRAWING, matplotlib.rc_context(settings):
        yield


def _drawn(chart: Chart, colours: Mapping[str, str], inches: tuple[float, float]) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

    figure = Figure(figsize=inches)
    width, height = inches
    axes = figure.add_axes((0.62 / width, 0.42 / height, 1 - 0.72 / width, 1 - 0.72 / height))
    for line in chart.lines:
        x, mean, low, high = thinned(line.points).T
        colour, marker = colours[f"line-{line.colour % NUM_COLOURS + 1}"], "o" if line.dots else None
        dash = DASHES[line.dash % len(DASHES)]
        axes.plot(x, mean, color=colour, linestyle=dash, linewidth=1.4, marker=marker, markersize=3, label=line.label)
        alone = _between_gaps(mean)
        axes.plot(x[alone], mean[alone], color=colour, linestyle="none", marker="o", markersize=3)
        if not np.array_equal(low, high, equal_nan=True):
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    for x, name in (chart.bounds or {}).items():
        axes.axvline(x, color=colours["grid"], linewidth=1)
        axes.text(x, 1.02, name, color=colours["ink"], transform=axes.get_xaxis_transform())
    for x in chart.marks:
        axes.axvline(x, color=colours["mark"], linewidth=1, linestyle=DASHES[2])
    axes.set_xlabel(chart.x_label, color=colours["ink"])
    axes.tick_params(colors=colours["ink"], length=0)
    axes.grid(color=colours["grid"], linewidth=0.6)
    axes.spines[:].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=chart.x_label == "step"))
    # whole numbers at each line: a common factor (1e-6) would stand on the name of the first part
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.8g}"))
    if chart.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        axes.set_ylim(bottom=0)
    return figure, axes


def _inline(text: str, chart: Chart, key: str) -> str:
    """matplotlib's file as an element: named, in the page's colours, with ids of its own, without its style sheet."""
    text = text[text.index("<svg") :]
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None
    body = text[text.index(">") + 1 : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", body)
    body = re.sub(r'(id="|url\(#|href="#)([mp][0-9a-f]{10})', rf"\1{key}\2", body)
    for name, colour in _STAND_INS.items():
        body = body.replace(colour, f"var(--{name})")
    body = re.sub(r"\s*\n\s*", " ", re.sub(r"font-family: [^;\"]*;? ?", "", body))
    words = _escaped(described(chart))
    return (
        f'<svg class="chart" role="img" aria-labelledby="{key}t {key}d" viewBox="{box[1]}">'
        f'<title id="{key}t">{_escaped(chart.title)}</title><desc id="{key}d">{words}</desc>{body}</svg>'
    )


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
