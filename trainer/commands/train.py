"""`llava-llama31 train`."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from llava_llama31.trainer.commands.options import add_recipe, positive, run_folder
from llava_llama31.trainer.commands.quick_imports import quick_imports
from llava_llama31.trainer.distributed.rank import is_launched
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.fault_tolerance.signals import Signals
from llava_llama31.trainer.redaction import say


if TYPE_CHECKING:
    from llava_llama31.trainer.recipes.schema import Recipe


HELP = "run a recipe: train its stages, evaluate and export"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU whatever else the machine has")
    parser.add_argument("--devices", type=positive, metavar="N", help="start N processes on this machine, one per GPU")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, train nothing")


def run(options: argparse.Namespace) -> int:
    """Run what is left of the recipe; a finished run says so before anything heavy is imported."""
    with Signals().handled() as signals:
        from llava_llama31.trainer.checkpoint.run_folder import RunFolder
        from llava_llama31.trainer.recipes.loading import load_recipe
        from llava_llama31.trainer.runs.named_paths import check_paths

        output = run_folder(options, options.recipe)
        recipe = load_recipe(options.recipe, output=output, overrides=options.overrides)
        if not options.dry_run and _says_finished(recipe, output):
            return 0
        # before torch is imported: it fails faster. Of several processes one looks, later; a finished run publishes
        if "RANK" not in os.environ and not RunFolder(output).summary.is_file():
            check_paths(recipe, output)
        if options.dry_run:
            return _dry_run(options, recipe, output)
        if options.devices and options.devices > 1 and not is_launched(cpu=options.cpu):
            _launch(options)
        sets = [argument for override in options.overrides for argument in ("--set", override)]
        command = shlex.join(["llava-llama31", "train", options.recipe, *sets, *["--cpu"] * options.cpu])
        with quick_imports():
            from llava_llama31.trainer.distributed.devices import ask_for_cpu
            from llava_llama31.trainer.runs.run import run_recipe

        if options.cpu:
            ask_for_cpu()

        run_recipe(recipe, output, command=command, signals=signals)
    return 0


def launcher(options: argparse.Namespace) -> list[str]:
    """Command that starts the same run in several processes on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.devices)]
    command += ["--module", "llava_llama31.trainer.cli", "train", options.recipe]
    command += [f"--output={options.output}"] * bool(options.output)
    command += [f"--set={override}" for override in options.overrides]
    return command + ["--cpu"] * options.cpu + ["--debug"] * options.debug


def _launch(options: argparse.Namespace) -> NoReturn:
    """Become the launcher.

    Raises:
        UserError: the machine has fewer GPUs, or is one of several.
    """
    import torch

    if int(size := os.environ.get("WORLD_SIZE", "1")) > 1:
        fix = "start it on every machine with `accelerate launch` or torchrun"
        raise UserError(f"starts processes on one machine, and WORLD_SIZE is {size}", where="--devices", fix=fix)
    found = 0 if options.cpu else torch.accelerator.device_count()
    if not options.cpu and found < options.devices:
        fix = "name fewer, or add --cpu" if found else "add --cpu"
        raise UserError(f"{options.devices}, but this machine has {found} GPUs", where="--devices", fix=fix)
    command = launcher(options)
    os.execv(command[0], command)


def _dry_run(options: argparse.Namespace, recipe: "Recipe", output: Path) -> int:
    from llava_llama31.trainer.commands.plan import print_plan
    from llava_llama31.trainer.distributed.devices import ask_for_cpu
    from llava_llama31.trainer.planning.plan import Machine, plan_recipe
    from llava_llama31.trainer.planning.row_lengths import Assumptions
    from llava_llama31.trainer.runs.dry_run import dry_run
    from llava_llama31.trainer.runs.named_paths import missing_paths

    if options.cpu:
        ask_for_cpu()
    devices = options.devices or 1
    dry_run(recipe, output, num_processes=devices, say=say)
    plan = plan_recipe(recipe, output, Machine(num_devices=devices), Assumptions({}, None))
    print_plan(plan | {"missing": missing_paths(recipe, output)})
    say("everything that can be checked beforehand is right; nothing was written but caches")
    return 0


def what_is_kept(options: argparse.Namespace) -> str:
    """Where the same command resumes after a signal."""
    from llava_llama31.trainer.checkpoint.run_folder import RunFolder

    if RunFolder(run_folder(options, options.recipe)).has_begun():
        return "run the same command to resume from the last checkpoint"
    return "no checkpoint has been written yet: the same command starts from the beginning"


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
