"""`llava-llama31 recipes`."""

import argparse
import sys


HELP = "list the shipped recipes, or copy one out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("copy", nargs="?", metavar="NAME", help="recipe to print as YAML")


def run(options: argparse.Namespace) -> int:
    from llava_llama31.trainer.recipes.loading import SHIPPED, load_recipe, read_recipe_text

    if options.copy:
        sys.stdout.flush()
        sys.stdout.buffer.write(read_recipe_text(options.copy)[0].encode())  # a copy, whatever the locale's encoding
    else:
        for name in SHIPPED:
            sys.stdout.write(f"{name:28}{load_recipe(name).description}\n")
    return 0
