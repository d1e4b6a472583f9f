"""Options that several commands share."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava_llama31.trainer.recipes.data_formats import MAX_PIXELS


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", dest="json_output", help="print one JSON object on stdout")


def add_max_pixels(parser: argparse.ArgumentParser) -> None:
    """Add `--max-pixels`."""
    shown = f"largest image, height x width; default: {MAX_PIXELS:,}"
    parser.add_argument("--max-pixels", type=positive, metavar="N", help=shown)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add a recipe, its run folder and its overrides."""
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name, or a YAML file")
    parser.add_argument("--output", metavar="DIR", help="the run's folder; default: runs/RECIPE")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change a key of the recipe, e.g. stages.projector.epochs=2",
    )


def run_folder(options: argparse.Namespace, recipe: str) -> Path:
    """The folder of a recipe's run."""
    return Path(options.output) if options.output else Path("runs", Path(recipe).stem)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Which fields and rows of an answer file are read."""
    parser.add_argument(
        "--columns",
        metavar="PART=FIELD,...",
        type=_pairs,
        default={},
        help="which fields hold id, answer, question and image",
    )
    parser.add_argument(
        "--where", metavar="FIELD=VALUE,...", type=_pairs, default={}, help="read only rows with these values"
    )


def _pairs(text: str) -> dict[str, str]:
    pairs = [part.split("=", 1) for part in text.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE,...")
    return {name.strip(): value.strip() for name, value in pairs}


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def above_zero(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def told_apart(paths: Sequence[str]) -> list[str]:
    """The ends of paths by which they differ: names of files, where these do."""
    parts = [Path(path).absolute().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        ends = [str(Path(*path[-length:])) for path in parts]
        if len(set(ends)) == len(set(parts)):
            return ends
    return list(paths)


def counted(number: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
