"""`llava-llama31 recipes`."""

import argparse
import sys


HELP = "list the shipped recipes, copy one out, or print the schema of recipes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("copy", nargs="?", metavar="NAME", help="recipe to print as YAML")
    what.add_argument("--schema", action="store_true", help="print the JSON schema of recipes, for editors")


def run(options: argparse.Namespace) -> int:
    from llava_llama31.trainer.recipes.loading import SHIPPED, load_recipe, read_recipe_text

    if options.schema:
        from llava_llama31.trainer.recipes.json_schema import schema_text

        sys.stdout.write(schema_text())
    elif options.copy:
        from llava_llama31.trainer.recipes.json_schema import NAMED, SCHEMA_FILE

        text = read_recipe_text(options.copy)[0].replace(NAMED, f"$schema={SCHEMA_FILE}\n", 1)
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode())  # a copy, whatever the locale's encoding
    else:
        for name in SHIPPED:
            sys.stdout.write(f"{name:28}{load_recipe(name).description}\n")
    return 0
