"""`llava-llama31 check-data` on a recipe or on data files."""

import argparse
import json
import sys
from pathlib import Path

from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.data.check.check import check_sources, default_cache_dir, run_check
from llava_llama31.trainer.data.check.report import parse_policy, print_report
from llava_llama31.trainer.data.check.row_checker import Limits
from llava_llama31.trainer.data.sources.images import MAX_PIXELS
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.model.locating import local_checkpoint
from llava_llama31.trainer.recipes.loading import load_recipe
from llava_llama31.trainer.recipes.schema import DataSource


def check_recipe(options: argparse.Namespace, output: Path) -> int:
    """Check the data of every stage with the processor of the recipe's model.

    Raises:
        UserError: when records can't be used and the stage's policy is `error`.
    """
    from rich.console import Console

    from llava_llama31.processing import LlavaLlama31Processor
    from llava_llama31.trainer.data.batches.stage_rows import keeps_data_newline, stage_limits
    from llava_llama31.trainer.runs.base_model import base_of, prepare
    from llava_llama31.trainer.runs.origins import at_revisions, resolve_revisions

    for name in ("image_root", "processor", "max_tokens", "max_pixels"):
        if getattr(options, name) is not None:
            raise UserError("belongs to data files", where=f"--{name.replace('_', '-')}", fix="set it in the recipe")
    recipe = load_recipe(options.data[0], output=output, overrides=options.overrides)
    folder, console = RunFolder(output), Console(stderr=True)
    with folder.claimed(recipe, is_main=True):
        recipe = at_revisions(recipe, resolve_revisions(recipe, folder, console.print))
        prepare(recipe, folder, console)
    processor = LlavaLlama31Processor.from_pretrained(base_of(recipe, folder))
    reports = {
        name: check_sources(
            stage.data,
            processor,
            limits=stage_limits(stage),
            policy=parse_policy(options.on_bad) if options.on_bad else stage.on_bad_record,
            cache_dir=default_cache_dir(),
            rejects=_rejects(options.rejects, name) or folder.stage(name, recipe.stages).rejects,
            decode=not options.no_decode,
            keep_data_newline=keeps_data_newline(stage),
            enforce=False,
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


def check_files(options: argparse.Namespace) -> int:
    """Check data files; tokens are counted where a processor is named."""
    sources = [
        DataSource(name=Path(path).stem, path=path, image_root=options.image_root, format=options.format)
        for path in options.data
    ]
    processor = None
    if options.processor:
        from llava_llama31.processing import LlavaLlama31Processor

        processor = LlavaLlama31Processor.from_pretrained(local_checkpoint(options.processor, where="--processor"))
    run_check(
        sources,
        processor,
        limits=Limits(max_tokens=options.max_tokens, max_pixels=options.max_pixels or MAX_PIXELS),
        policy=parse_policy(options.on_bad) if options.on_bad else None,
        rejects=Path(options.rejects) if options.rejects else None,
        decode=not options.no_decode,
        json_output=options.json_output,
    )
    return 0
