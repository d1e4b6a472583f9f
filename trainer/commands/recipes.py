"""`llava-llama31 recipes`."""

import argparse
import sys


HELP = "list the shipped recipes, copy one out, check or compare recipes, or print their schema"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("copy", nargs="?", metavar="NAME", help="recipe to print as YAML")
    what.add_argument("--check", metavar="FILE", help="say whether a recipe is one, and what is wrong")
    what.add_argument("--diff", nargs=2, metavar=("A", "B"), help="keys that differ between two recipes")
    what.add_argument("--schema", action="store_true", help="print the JSON schema of recipes, for editors")


def _print_differences(one: str, other: str) -> None:
    from rich.table import Table

    from llava_llama31.trainer.recipes.differences import differing
    from llava_llama31.trainer.recipes.loading import load_recipe
    from llava_llama31.trainer.terminal import Terminal

    recipes = [load_recipe(name).model_dump(mode="json") for name in (one, other)]
    found = differing(recipes)
    if not found:
        sys.stdout.write("all keys have the same values\n")
        return
    table = Table("key", one, other, box=None, pad_edge=False)
    for key, values in found.items():
        table.add_row(key, *values)
    Terminal().print(table)


def run(options: argparse.Namespace) -> int:
    from llava_llama31.trainer.recipes.loading import SHIPPED, load_recipe, read_recipe_text

    if options.schema:
        from llava_llama31.trainer.recipes.json_schema import schema_text

        sys.stdout.write(schema_text())
    elif options.check:
        recipe = load_recipe(options.check)
        sys.stdout.write(f"{options.check}: a recipe with {len(recipe.stages)} stages: {', '.join(recipe.stages)}\n")
    elif options.diff:
        _print_differences(*options.diff)
    elif options.copy:
        from llava_llama31.trainer.recipes.json_schema import NAMED, SCHEMA_FILE

        text = read_recipe_text(options.copy)[0].replace(NAMED, f"$schema={SCHEMA_FILE}\n", 1)
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode())  # a copy, whatever the locale's encoding
    else:
        for name in SHIPPED:
            sys.stdout.write(f"{name:28}{load_recipe(name).description}\n")
    return 0
