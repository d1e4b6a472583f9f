"""`llava-llama31 check-data` on a recipe or on data files."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from llava_llama31.trainer.commands.options import add_json, add_max_pixels, positive, run_folder
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.data_formats import DataFormat


if TYPE_CHECKING:
    from llava_llama31.trainer.data.check.report import DataReport
    from llava_llama31.trainer.data.contamination.search import Evaluation
    from llava_llama31.trainer.recipes.schema import DataSource


HELP = "check all records and images before training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="+", metavar="RECIPE|FILE", help="one recipe, or data files")
    parser.add_argument("--image-root", metavar="DIR", help="folder of the images; default: the folder of each file")
    parser.add_argument("--processor", metavar="DIR", help="checkpoint whose processor counts the tokens of FILES")
    parser.add_argument(
        "--format",
        default="auto",
        choices=("auto", *get_args(DataFormat)),
        help="format of the rows; default: auto, by the first rows",
    )
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="longest record, image tokens counted")
    add_max_pixels(parser)
    parser.add_argument(
        "--on-bad",
        metavar="POLICY",
        help="what to do with unusable records: error, skip or quarantine; or REASON=POLICY,...",
    )
    parser.add_argument("--rejects", metavar="FILE", help="list the unusable records here (JSON lines)")
    parser.add_argument("--no-decode", action="store_true", help="read image headers only")
    parser.add_argument("--against", metavar="FILE", help="questions of an evaluation to look for in the data")
    parser.add_argument(
        "--against-images", metavar="DIR", help="folder of that evaluation's images; default: the folder of FILE"
    )
    parser.add_argument(
        "--near-bits", type=int, metavar="N", help="how many of 256 bits may differ in a near duplicate"
    )
    parser.add_argument(
        "--matches", metavar="FILE", help="list what --against finds here; default: contamination.jsonl"
    )
    parser.add_argument("--output", metavar="DIR", help="the recipe's run folder; default: runs/RECIPE")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="change a key of the recipe"
    )
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
    from llava_llama31.trainer.recipes.loading import load_recipe
    from llava_llama31.trainer.runs.named_paths import check_paths

    for name in ("image_root", "processor", "max_tokens", "max_pixels"):
        if getattr(options, name) is not None:
            raise UserError("belongs to data files", where=f"--{name.replace('_', '-')}", fix="set it in the recipe")
    recipe = load_recipe(options.data[0], output=output, overrides=options.overrides)
    check_paths(recipe, output)  # before torch is imported: it fails faster

    from llava_llama31.processing import LlavaLlama31Processor
    from llava_llama31.trainer.checkpoint.run_folder import RunFolder
    from llava_llama31.trainer.data.batches.stage_rows import stage_check
    from llava_llama31.trainer.data.check.check import check_sources
    from llava_llama31.trainer.data.check.report import parse_policy, print_report
    from llava_llama31.trainer.data.contamination.search import contamination_check
    from llava_llama31.trainer.runs.base_model import base_of, prepare
    from llava_llama31.trainer.runs.origins import at_revisions, resolve_revisions
    from llava_llama31.trainer.terminal import Terminal

    folder, console = RunFolder(output), Terminal(stderr=True)
    with folder.claimed(recipe, is_main=True):
        recipe = at_revisions(recipe, resolve_revisions(recipe, folder, console.print))
        prepare(recipe, folder, console)
    evaluation = _evaluation(options)
    processor = LlavaLlama31Processor.from_pretrained(base_of(recipe, folder))
    reports = {
        name: check_sources(
            stage.data,
            stage_check(stage, processor, decode=not options.no_decode),
            policy=parse_policy(options.on_bad) if options.on_bad else stage.on_bad_record,
            adjust=contamination_check(stage),
            rejects=_rejects(options.rejects, name) or folder.stage(name, recipe.stages).rejects,
        )
        for name, stage in recipe.stages.items()
    }
    checked = [(recipe.stages[name].data, report) for name, report in reports.items()]
    found = _contamination(options, evaluation, checked)
    if options.json_output:
        stages = {name: report.to_dict() for name, report in reports.items()}
        ok = all(stage["ok"] for stage in stages.values())
        sys.stdout.write(json.dumps({"ok": ok, "stages": stages} | found) + "\n")
    else:
        for report in reports.values():
            print_report(report)
        _print_contamination(found)
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
    from llava_llama31.trainer.recipes.schema import DataSource

    sources = [
        DataSource(
            name=Path(path).stem,
            path=path,
            image_root=options.image_root,
            format=options.format,
            max_pixels=options.max_pixels,
        )
        for path in options.data
    ]
    evaluation = _evaluation(options)
    processor = None
    if options.processor:
        from llava_llama31.processing import LlavaLlama31Processor
        from llava_llama31.trainer.model.locating import local_checkpoint

        processor = LlavaLlama31Processor.from_pretrained(local_checkpoint(options.processor, where="--processor"))
    check = DataCheck(
        processor=processor,
        limits=Limits(max_tokens=options.max_tokens),
        decode=not options.no_decode,
    )
    policy = parse_policy(options.on_bad) if options.on_bad else None
    report = check_sources(sources, check, policy=policy, rejects=Path(options.rejects) if options.rejects else None)
    found = _contamination(options, evaluation, [(sources, report)])
    show_report(report, json_output=options.json_output, more=found)
    if not options.json_output:
        _print_contamination(found)
    return 0


def _evaluation(options: argparse.Namespace) -> "Evaluation | None":
    """That of `--against`; before the data is checked, which may take hours.

    Raises:
        UserError: it can't be read.
    """
    if options.against is None:
        return None
    from llava_llama31.trainer.data.contamination.search import load_evaluation

    return load_evaluation(options.against, options.against_images)


def _contamination(
    options: argparse.Namespace,
    evaluation: "Evaluation | None",
    checked: "Sequence[tuple[Sequence[DataSource], DataReport]]",
) -> dict[str, Any]:
    """What the usable rows hold of an evaluation, as `{"contamination": ...}`; empty without one."""
    if evaluation is None:
        return {}
    from llava_llama31.trainer.data.contamination.search import NEAR_BITS, find_in_sources

    sources: dict[tuple[str, ...], DataSource] = {}
    rows = {}
    for given, report in checked:
        for source, found in zip(given, report.sources, strict=True):
            key = (source.name, source.path, str(source.where), source.split)
            if key not in sources:
                # two stages may call different sources by one name
                name = source.name if source.name not in rows else f"{source.name} ({source.path})"
                sources[key] = source.model_copy(update={"name": name})
                rows[name] = found.rows
    near_bits = NEAR_BITS if options.near_bits is None else options.near_bits
    found_all = find_in_sources(list(sources.values()), rows, evaluation, near_bits=near_bits)
    listed = Path(options.matches) if options.matches else checked[0][1].rejects.with_name("contamination.jsonl")
    found_all.write(listed)
    return {"contamination": found_all.to_dict() | {"listed": str(listed)}}


def _print_contamination(found: dict[str, Any]) -> None:
    from llava_llama31.trainer.terminal import Terminal

    if not found:
        return
    it = found["contamination"]
    what = f"{it['exact']:,} rows show an image of {it['evaluation']}, {it['near']:,} a near duplicate of one "
    what += f"(at most {it['near_bits']} of 256 bits apart), {it['questions']:,} ask one of its questions"
    Terminal().print(f"{what}; {it['evaluation_images']:,} images compared: {it['listed']}")
