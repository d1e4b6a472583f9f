"""`llava-llama31 recipes`."""

import argparse
import sys

from llava_llama31.trainer.redaction import say


HELP = "list the shipped recipes, copy one out, check or compare recipes, or print their schema"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("copy", nargs="?", metavar="NAME", help="recipe to print as YAML")
    what.add_argument("--check", metavar="FILE", help="check a recipe and say what is wrong")
    what.add_argument("--diff", nargs=2, metavar=("A", "B"), help="list the keys that differ between two recipes")
    what.add_argument("--schema", action="store_true", help="print the JSON schema of recipes, for editors")


def _print_differences(one: str, other: str) -> None:
    """A line for each key that differs."""
    from llava_llama31.trainer.recipes.differences import differing
    from llava_llama31.trainer.recipes.loading import load_recipe

    recipes = [load_recipe(name).model_dump(mode="json") for name in (one, other)]
    found = differing(recipes)
    lines = [f"{key}: {first} -> {second}" for key, (first, second) in found.items()]
    for line in lines or ["all keys have the same values"]:
        say(line, stdout=True)


def run(options: argparse.Namespace) -> int:
    from llava_llama31.trainer.recipes.loading import SHIPPED, load_recipe, read_recipe_text

    if options.schema:
        from llava_llama31.trainer.recipes.json_schema import schema_text

        sys.stdout.write(schema_text())
    elif options.check:
        recipe = load_recipe(options.check)
        number = "1 stage" if len(recipe.stages) == 1 else f"{len(recipe.stages)} stages"
        sys.stdout.write(f"{options.check}: a recipe with {number}: {', '.join(recipe.stages)}\n")
    elif options.diff:
        _print_differences(*options.diff)
    elif options.copy:
        from llava_llama31.trainer.recipes.json_schema import NAMED, SCHEMA_FILE

        text = read_recipe_text(options.copy)[0].replace(NAMED, f"$schema={SCHEMA_FILE}\n", 1)
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode())  # a copy, whatever the locale's encoding
    else:
        from llava_llama31.trainer.terminal import Terminal

        terminal = Terminal()
        rows = [(name, load_recipe(name).description) for name in SHIPPED]
        terminal.table(("recipe", "what it is"), rows, header=terminal.is_terminal)
        if terminal.is_terminal:
            terminal.print("to copy one: llava-llama31 recipes NAME > mine.yaml", style="dim")
    return 0
