"""`llava-llama31 train`."""

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from llava_llama31.trainer.commands.options import add_recipe, run_folder
from llava_llama31.trainer.fault_tolerance.signals import Signals
from llava_llama31.trainer.redaction import say


if TYPE_CHECKING:
    from llava_llama31.trainer.recipes.schema import Recipe


HELP = "run a recipe's stages, evaluate and export"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU whatever else the machine has")


def run(options: argparse.Namespace) -> int:
    """Run what is left of the recipe; a finished run says so before anything heavy is imported."""
    with Signals().handled() as signals:
        from llava_llama31.trainer.recipes.loading import load_recipe

        output = run_folder(options, options.recipe)
        recipe = load_recipe(options.recipe, output=output, overrides=options.overrides)
        if _says_finished(recipe, output):
            return 0
        sets = [argument for override in options.overrides for argument in ("--set", override)]
        command = shlex.join(["llava-llama31", "train", options.recipe, *sets, *["--cpu"] * options.cpu])
        from llava_llama31.trainer.distributed.devices import ask_for_cpu
        from llava_llama31.trainer.runs.run import run_recipe

        if options.cpu:
            ask_for_cpu()

        run_recipe(recipe, output, command=command, signals=signals)
    return 0


def what_is_kept(options: argparse.Namespace) -> str:
    """Where the same command resumes after a signal."""
    from llava_llama31.trainer.checkpoint.run_folder import RunFolder

    if RunFolder(run_folder(options, options.recipe)).has_begun():
        return "run the same command to resume from the last checkpoint"
    return "no checkpoint is written yet: the same command starts from the beginning"


def _says_finished(recipe: "Recipe", output: Path) -> bool:
    """Whether nothing is left to do, which is then said.

    Raises:
        UserError: the folder belongs to another recipe, or another run works in it.
    """
    from llava_llama31.trainer.checkpoint import atomic_folders
    from llava_llama31.trainer.checkpoint.run_folder import RunFolder
    from llava_llama31.trainer.publishing.published import is_outstanding
    from llava_llama31.trainer.runs.finished import finished_line

    folder = RunFolder(output)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or not folder.summary.is_file():
        return False  # several processes have to agree
    with folder.claimed(recipe, is_main=True):
        if is_outstanding(recipe.publish, atomic_folders.read_json(folder.summary)):
            return False
        say(finished_line(recipe, folder))
        return True
