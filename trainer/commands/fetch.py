"""`llava-llama31 fetch` on a recipe or a data set of the registry."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llava_llama31.trainer.commands.options import add_json, run_folder
from llava_llama31.trainer.errors import UserError


if TYPE_CHECKING:
    from llava_llama31.trainer.data.fetch.closure import Closure
    from llava_llama31.trainer.data.fetch.fetching import Fetcher
    from llava_llama31.trainer.data.fetch.items import Item
    from llava_llama31.trainer.data.registry.registry import Dataset


HELP = "download what a recipe or a data set needs, and check that every image is there"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="RECIPE|DATASET", help="a recipe, or a name that --list shows", nargs="?")
    parser.add_argument("--list", action="store_true", dest="list_datasets", help="list the data sets of the registry")
    parser.add_argument("--to", metavar="DIR", help="the data root; default: the recipe's, or data")
    parser.add_argument("--dry-run", action="store_true", help="list what would be fetched, without a network")
    parser.add_argument(
        "--accept-licence",
        "--accept-license",
        action="append",
        default=[],
        metavar="NAME",
        help="data set or checkpoint whose licence you have read and accept; all: every one",
    )
    parser.add_argument("--keep-archives", action="store_true", help="keep archives after unpacking")
    parser.add_argument("--registry", metavar="FILE", help="YAML with data sets of your own (docs/fetch.md)")
    parser.add_argument("--output", metavar="DIR", help="the recipe's run folder; default: runs/RECIPE")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="change a key of the recipe"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from llava_llama31.trainer.data.fetch.fetching import (
        Fetcher,
        check_disk,
        check_licences,
        closures,
        with_sizes_of_servers,
    )
    from llava_llama31.trainer.data.registry.registry import with_own
    from llava_llama31.trainer.redaction import say

    known = with_own(Path(options.registry) if options.registry else None)
    if options.list_datasets:
        return _list(options)
    if options.what is None:
        raise UserError("nothing was named", where="fetch", fix="name a recipe or a data set, or --list")
    items, roots, unknown = _named(options, known)
    for line in unknown:
        say(f"warning: {line} is not in the registry: fetch it yourself")
    root = roots[0][1] if roots else Path(options.to or "data")
    if options.dry_run:
        _show(items, root, [], json_output=options.json_output)
        return 0
    check_licences(items, options.accept_licence)
    fetcher = Fetcher(say, keep_archives=options.keep_archives)
    with fetcher.client:
        items = with_sizes_of_servers(items, fetcher.client, say)
        check_disk(items, root)
        _fetch(fetcher, items)
    found = closures(roots, known, say)
    items = _named(options, known)[0]
    _show(items, root, found, json_output=options.json_output)
    _raise_for(found)
    return 0


def _named(
    options: argparse.Namespace, known: dict[str, "Dataset"]
) -> tuple[list["Item"], list[tuple[str, Path]], list[str]]:
    """Items, (data set, its root) whose rows are named, and what the registry does not know."""
    from llava_llama31.trainer.data.fetch.items import datasets_of_recipe, items_of_dataset, items_of_recipe
    from llava_llama31.trainer.recipes.loading import SHIPPED, load_recipe

    root = Path(options.to) if options.to else None
    if options.what in SHIPPED or Path(options.what).suffix in (".yaml", ".yml"):
        output = run_folder(options, options.what)
        recipe = load_recipe(options.what, output=output, overrides=options.overrides)
        items, unknown = items_of_recipe(recipe, root, known)
        return items, datasets_of_recipe(recipe, root, known), unknown
    root = root or Path("data")
    return items_of_dataset(options.what, root, known), [(options.what, root)], []


def _fetch(fetcher: "Fetcher", items: list["Item"]) -> None:
    from llava_llama31.trainer.terminal import Terminal

    terminal = Terminal(stderr=True)
    total = sum(item.bytes or 0 for item in items if not item.have)
    with terminal.progress(visible=terminal.is_terminal) as bar:
        task = bar.add_task("fetching", total=total)
        fetcher.advance = lambda num_bytes: bar.advance(task, num_bytes)
        fetcher.fetch(items)


def _list(options: argparse.Namespace) -> int:
    from llava_llama31.trainer.data.registry.registry import NOT_VERIFIED, with_own
    from llava_llama31.trainer.terminal import Terminal

    known = with_own(Path(options.registry) if options.registry else None)
    if options.json_output:
        listed = {name: dataset.model_dump() for name, dataset in known.items()}
        sys.stdout.write(json.dumps(listed) + "\n")
        return 0
    rows = []
    for name, dataset in known.items():
        open_facts = [fact for fact, source in dataset.evidence.items() if NOT_VERIFIED in source]
        note = f"{NOT_VERIFIED}: {', '.join(open_facts)}" if open_facts else ""
        rows.append((name, dataset.title, dataset.license, note))
    Terminal().table(("name", "data set", "licence", "note"), rows)
    return 0


def _show(items: list["Item"], root: Path, found: list["Closure"], *, json_output: bool) -> None:
    from llava_llama31.trainer.data.fetch.fetching import bytes_needed, free_bytes, size_text
    from llava_llama31.trainer.terminal import Terminal

    free = free_bytes(root)
    if json_output:
        content = {
            "items": [item.to_dict() for item in items],
            "bytes": sum(item.bytes or 0 for item in items if not item.have),
            "bytes_needed": bytes_needed(items),
            "free": free,
            "closure": [one.to_dict() for one in found],
        }
        sys.stdout.write(json.dumps(content) + "\n")
        return
    terminal = Terminal()
    if not items:
        terminal.print(
            "nothing to fetch: the run makes its own parts and data, or the recipe names all of them by path"
        )
        return
    listed = []
    for item in items:
        size = ("" if item.exact or item.bytes is None else "~") + size_text(item.bytes)
        accept = " (to be accepted)" if item.accept else ""
        rows = "" if item.rows is None else f"{item.rows:,}"
        listed.append((item.name, size, rows, "yes" if item.have else "no", item.license + accept))
    terminal.table(("file", "size", "rows", "here", "licence"), listed, numbers=("size", "rows"))
    missing = sum(item.bytes or 0 for item in items if not item.have)
    needed = size_text(bytes_needed(items))
    terminal.print(
        f"to fetch: {size_text(missing)}; {needed} of disk while archives are unpacked, {size_text(free)} free"
    )
    for one in found:
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in one.missing.items()) or "none missing"
        terminal.print(
            f"{one.name}: checked the images of {one.rows:,} rows: {reasons} ({one.explained:,} known holes)"
        )


def _raise_for(found: list["Closure"]) -> None:
    """Nothing, unless images are missing that the registry can't explain.

    Raises:
        UserError: naming the first, and the file that lists all.
    """
    for one in found:
        if one.expected is not None and one.rows < one.expected:
            what = f"{one.rows:,} rows, but the published file has {one.expected:,}"
            raise UserError(what, where=one.name, fix="remove its file of rows and fetch it again")
        if one.unexplained:
            what = f"the images of {one.unexplained:,} rows are not there or can't be read: {'; '.join(one.first)}"
            raise UserError(
                what, where=one.name, fix=f"read {one.listed}; remove the archive's folder to fetch it again"
            )
