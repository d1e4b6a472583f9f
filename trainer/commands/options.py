"""Options that several commands share."""

import argparse
from pathlib import Path


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", dest="json_output", help="print one JSON object on stdout")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add a recipe, its run folder and its overrides."""
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name, or a YAML file")
    parser.add_argument("--output", metavar="DIR", help="folder of the run; default: runs/RECIPE")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="e.g. stages.projector.epochs=2",
    )


def run_folder(options: argparse.Namespace, recipe: str) -> Path:
    """The folder of a recipe's run."""
    return Path(options.output) if options.output else Path("runs", Path(recipe).stem)


def positive(text: str) -> int:
    """An integer of at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def above_zero(text: str) -> float:
    """A finite number above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError
    return number
