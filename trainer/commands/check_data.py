"""`llava-llama31 check-data` on a recipe or on data files."""

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

from llava_llama31.trainer.commands.options import add_json, positive, run_folder
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.data_formats import DataFormat


HELP = "check all records and images before training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="+", metavar="RECIPE|FILE", help="one recipe, or data files")
    parser.add_argument("--image-root", metavar="DIR", help="default: the folder of each file")
    parser.add_argument("--processor", metavar="DIR", help="checkpoint whose processor counts the tokens of FILES")
    parser.add_argument("--format", default="auto", choices=("auto", *get_args(DataFormat)))
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="longest record, image tokens counted")
    parser.add_argument("--max-pixels", type=positive, metavar="N", help="largest image, height x width")
    parser.add_argument("--on-bad", metavar="POLICY", help="error, skip or quarantine; or REASON=POLICY,...")
    parser.add_argument("--rejects", metavar="FILE", help="where the unusable records are listed (JSON lines)")
    parser.add_argument("--no-decode", action="store_true", help="read image headers only")
    parser.add_argument("--output", metavar="DIR", help="the recipe's run folder; default: runs/RECIPE")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from llava_llama31.trainer.recipes.loading import SHIPPED

    if options.rejects and Path(options.rejects).is_dir():
        raise UserError("is a folder", where=f"--rejects {options.rejects}", fix="name a file of JSON lines in it")
    is_recipe = options.data[0] in SHIPPED or Path(options.data[0]).suffix in (".yaml", ".yml")
    if is_recipe and len(options.data) > 1:
        raise UserError("a recipe is checked alone", where=options.data[1], fix="give one recipe, or data files")
    return _check_recipe(options, run_folder(options, options.data[0])) if is_recipe else _check_files(options)


def _check_recipe(options: argparse.Namespace, output: Path) -> int:
    """Check the data of every stage with the processor of the recipe's model.

    Raises:
        UserError: when a path does not exist, or records can't be used and the stage's policy is `error`.
    """
    from llava_llama31.processing import LlavaLlama31Processor
    from llava_llama31.trainer.checkpoint.run_folder import RunFolder
    from llava_llama31.trainer.data.batches.stage_rows import stage_check
    from llava_llama31.trainer.data.check.check import check_sources
    from llava_llama31.trainer.data.check.report import parse_policy, print_report
    from llava_llama31.trainer.recipes.loading import load_recipe
    from llava_llama31.trainer.runs.base_model import base_of, prepare
    from llava_llama31.trainer.runs.named_paths import check_paths
    from llava_llama31.trainer.runs.origins import at_revisions, resolve_revisions
    from llava_llama31.trainer.terminal import Terminal

    for name in ("image_root", "processor", "max_tokens", "max_pixels"):
        if getattr(options, name) is not None:
            raise UserError("belongs to data files", where=f"--{name.replace('_', '-')}", fix="set it in the recipe")
    recipe = load_recipe(options.data[0], output=output, overrides=options.overrides)
    check_paths(recipe, output)
    folder, console = RunFolder(output), Terminal(stderr=True)
    with folder.claimed(recipe, is_main=True):
        recipe = at_revisions(recipe, resolve_revisions(recipe, folder, console.print))
        prepare(recipe, folder, console)
    processor = LlavaLlama31Processor.from_pretrained(base_of(recipe, folder))
    reports = {
        name: check_sources(
            stage.data,
            stage_check(stage, processor, decode=not options.no_decode),
            policy=parse_policy(options.on_bad) if options.on_bad else stage.on_bad_record,
            rejects=_rejects(options.rejects, name) or folder.stage(name, recipe.stages).rejects,
        )
        for name, stage in recipe.stages.items()
    }
    if options.json_output:
        stages = {name: report.to_dict() for name, report in reports.items()}
        ok = all(stage["ok"] for stage in stages.values())
        sys.stdout.write(json.dumps({"ok": ok, "stages": stages}) + "\n")
    else:
        for report in reports.values():
            print_report(report)
    for report in reports.values():
        report.raise_for_policy()
    return 0


def _rejects(given: str | None, stage: str) -> Path | None:
    """One file per stage."""
    return Path(given).with_stem(f"{Path(given).stem}-{stage}") if given else None


def _check_files(options: argparse.Namespace) -> int:
    """Check data files; tokens are counted where a processor is named."""
    from llava_llama31.trainer.data.check.check import DataCheck, check_sources, show_report
    from llava_llama31.trainer.data.check.report import parse_policy
    from llava_llama31.trainer.data.check.row_checker import Limits
    from llava_llama31.trainer.data.sources.images import MAX_PIXELS
    from llava_llama31.trainer.recipes.schema import DataSource

    sources = [
        DataSource(name=Path(path).stem, path=path, image_root=options.image_root, format=options.format)
        for path in options.data
    ]
    processor = None
    if options.processor:
        from llava_llama31.processing import LlavaLlama31Processor
        from llava_llama31.trainer.model.locating import local_checkpoint

        processor = LlavaLlama31Processor.from_pretrained(local_checkpoint(options.processor, where="--processor"))
    check = DataCheck(
        processor=processor,
        limits=Limits(max_tokens=options.max_tokens, max_pixels=options.max_pixels or MAX_PIXELS),
        decode=not options.no_decode,
    )
    policy = parse_policy(options.on_bad) if options.on_bad else None
    report = check_sources(sources, check, policy=policy, rejects=Path(options.rejects) if options.rejects else None)
    show_report(report, json_output=options.json_output)
    return 0
