"""`llava-llama31 shards`: balanced tar shards with an index, from a recipe's data or from files."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from llava_llama31.trainer.commands.options import add_json, counted, positive, run_folder
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.data_formats import DataFormat


if TYPE_CHECKING:
    from llava_llama31.trainer.recipes.schema import DataSource


HELP = "write a recipe's data, or data files, as shards with an index"

# keys of a source that say which rows and images it has
_OF_ROWS = ("path", "split", "where", "image_root", "format")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="+", metavar="RECIPE|FILE", help="one recipe, or data files")
    parser.add_argument(
        "--to",
        required=True,
        metavar="DIR|URL",
        help="folder or URL to write to; each source gets a folder of its name there",
    )
    parser.add_argument(
        "--shards", type=positive, metavar="N", help="number of shards per source; default: shards of about 512 MB"
    )
    parser.add_argument(
        "--on-bad",
        choices=("error", "skip"),
        default="error",
        help="what to do with a row that can't be read; default: error",
    )
    parser.add_argument("--image-root", metavar="DIR", help="folder of the images; default: the folder of each file")
    parser.add_argument(
        "--format",
        default="auto",
        choices=("auto", *get_args(DataFormat)),
        help="format of the rows; default: auto, by the first rows",
    )
    parser.add_argument("--output", metavar="DIR", help="the recipe's run folder; default: runs/RECIPE")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="change a key of the recipe"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from llava_llama31.trainer.data.shards.writing import write_shards
    from llava_llama31.trainer.terminal import Terminal, shown_size

    sources = _sources(options)
    terminal = Terminal(stderr=True)
    found = {}
    for source in sources:
        to = f"{options.to.rstrip('/')}/{source.name}"
        with terminal.progress(visible=terminal.is_terminal) as bar:
            task = bar.add_task(f"writing {source.name}", total=None)
            found[source.name] = write_shards(
                source,
                to,
                num_shards=options.shards,
                skip_bad=options.on_bad == "skip",
                advance=lambda num_rows, task=task, bar=bar: bar.advance(task, num_rows),  # type: ignore[misc]
            )
        if not options.json_output:
            one = found[source.name]
            left_out = f", {one.rejected:,} left out: {one.rejects}" if one.rejected else ""
            shown = f"{counted(one.rows, 'row')} in {counted(one.shards, 'shard')}, {shown_size(one.bytes)}"
            Terminal().print(f"{source.name}: {shown}: path: {to}{left_out}")
    if options.json_output:
        written = {name: asdict(one) | {"path": f"{options.to.rstrip('/')}/{name}"} for name, one in found.items()}
        sys.stdout.write(json.dumps({"sources": written}) + "\n")
    return 0


def _sources(options: argparse.Namespace) -> list["DataSource"]:
    from llava_llama31.trainer.recipes.loading import SHIPPED, load_recipe
    from llava_llama31.trainer.recipes.schema import DataSource

    first = options.data[0]
    if first in SHIPPED or Path(first).suffix in (".yaml", ".yml"):
        recipe = load_recipe(first, output=run_folder(options, first), overrides=options.overrides)
        listed = [source for stage in recipe.stages.values() for source in stage.data]
    else:
        listed = [
            DataSource(name=Path(path).stem, path=path, image_root=options.image_root, format=options.format)
            for path in options.data
        ]
    sources: dict[str, DataSource] = {}
    for source in listed:
        other = sources.setdefault(source.name, source)
        if any(getattr(other, key) != getattr(source, key) for key in _OF_ROWS):
            what = f"two sources are called {source.name} and would share one folder"
            raise UserError(what, where=options.data[0], fix="rename one")
    return list(sources.values())
