"""`llava-llama31 plan`: its options, and its tables."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_llama31.trainer.commands.options import above_zero, add_json, add_recipe, counted, positive, run_folder
from llava_llama31.trainer.costs.accelerators import ACCELERATORS
from llava_llama31.trainer.errors import UserError


if TYPE_CHECKING:
    from llava_llama31.trainer.planning.plan import Machine
    from llava_llama31.trainer.terminal import Terminal


HELP = "predict what a recipe will do, without running it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--devices", type=positive, default=1, metavar="N", help="devices on all machines together; default: 1"
    )
    parser.add_argument(
        "--devices-per-node", type=positive, metavar="M", help="devices per machine; default: all on one"
    )
    parser.add_argument(
        "--device-memory",
        type=above_zero,
        metavar="GB",
        help="memory of a device in 10^9 bytes: shows whether each stage fits",
    )
    parser.add_argument(
        "--device", metavar="NAME", help=f"hours and the fastest settings on a GPU: {', '.join(ACCELERATORS)}"
    )
    parser.add_argument(
        "--engine",
        metavar="NAME",
        help="ddp, zero1 to zero3, zero3-offload-params, zero3-offload or fsdp2; default: as each stage says",
    )
    parser.add_argument(
        "--mfu", type=above_zero, metavar="X", help="expected MFU, 0 to 1; with --peak-tflops shows hours"
    )
    parser.add_argument(
        "--peak-tflops", type=above_zero, metavar="X", help="peak of a device in the stage's precision"
    )
    parser.add_argument("--price", type=above_zero, metavar="P", help="price per device-hour; shows cost")
    parser.add_argument(
        "--rows",
        action="append",
        default=[],
        metavar="NAME=N",
        help="number of rows of a source that isn't on this machine",
    )
    parser.add_argument(
        "--tokens-per-row", type=positive, metavar="N", help="length of rows that check-data has not counted"
    )
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="write a recipe with the fastest settings; needs --device"
    )
    parser.add_argument(
        "--image", metavar="HxW", help="size in pixels of images that are not counted; default: COCO's sizes"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Plan and print.

    Raises:
        UserError: an option, or the recipe, asks for something impossible.
    """
    from llava_llama31.trainer.planning.fastest import timed_plan
    from llava_llama31.trainer.planning.plan import cases_of, plan_recipe
    from llava_llama31.trainer.planning.row_lengths import Assumptions
    from llava_llama31.trainer.recipes.loading import load_recipe
    from llava_llama31.trainer.runs.named_paths import missing_paths

    if options.write is not None:
        _check_new_file(options)
    output = run_folder(options, options.recipe)
    recipe = load_recipe(options.recipe, output=output, overrides=options.overrides)
    machine = _machine(options)
    assumed = Assumptions(_rows(options.rows), options.tokens_per_row, _image(options.image))
    cases = cases_of(recipe, output, machine, assumed)
    plan = plan_recipe(recipe, output, machine, assumed, cases)
    if options.device is not None:
        plan |= timed_plan(cases, ACCELERATORS[options.device])
        plan["device"] = options.device
    if options.write is not None:
        _write(options, plan)
        plan["written"] = str(options.write)
    plan["missing"] = missing_paths(recipe, output)
    if options.json_output:
        sys.stdout.write(json.dumps(plan) + "\n")
    else:
        print_plan(plan)
    return 0


def _check_new_file(options: argparse.Namespace) -> None:
    if options.device is None:
        raise UserError("the fastest settings are those on a named GPU", where="--write", fix="give --device too")
    if options.write.exists():
        raise UserError("exists already", where=f"--write {options.write}", fix="name a new file")


def _write(options: argparse.Namespace, plan: dict[str, Any]) -> None:
    """Write the recipe with the settings that were found, and how to launch it on its first lines."""
    from llava_llama31.trainer.recipes.json_schema import SCHEMA_FILE
    from llava_llama31.trainer.recipes.loading import changed_recipe, load_recipe

    stages = (plan["fastest"] or {}).values()
    if not stages or None in stages:
        raise UserError(plan["verdict"], where=f"--write {options.write}", fix="see the plan without --write")
    given = [*options.overrides, *(text.removeprefix("--set ") for found in stages for text in found["set"])]
    launch = next((f"--config_file {found['accelerate']} " for found in stages if found["accelerate"]), "")
    number = f"--num_processes {options.devices} "
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        f"# {plan['recipe']} with the fastest settings on {options.devices} x {options.device}, by a model of data",
        "# sheets and not by measurement (llava-llama31 plan --write). To launch it:",
        f"#   accelerate launch {launch}{number}examples/train.py {options.write}",
        "",
    ]
    try:
        options.write.write_text("\n".join(lines) + changed_recipe(options.recipe, given), encoding="utf-8")
    except OSError as error:
        raise UserError(f"can't be written: {error}", where=f"--write {options.write}", fix="name another") from None
    load_recipe(str(options.write))  # what is written is a recipe


def _machine(options: argparse.Namespace) -> "Machine":
    from llava_llama31.trainer.costs.memory import ENGINES
    from llava_llama31.trainer.planning.plan import GB, Machine

    if options.engine is not None and options.engine not in ENGINES:
        raise UserError(f"unknown engine {options.engine!r}", where="--engine", fix=f"one of {', '.join(ENGINES)}")
    if options.device is not None and options.device not in ACCELERATORS:
        fix = f"one of {', '.join(ACCELERATORS)}"
        raise UserError(f"no figures of a GPU {options.device!r}", where="--device", fix=fix)
    memory = None if options.device_memory is None else options.device_memory * GB
    if memory is None and options.device is not None:
        memory = ACCELERATORS[options.device].memory
    if (options.mfu is None) != (options.peak_tflops is None):
        raise UserError(
            "an MFU is a share of a peak, so both are needed",
            where="--mfu" if options.peak_tflops is None else "--peak-tflops",
            fix="give both, e.g. --mfu 0.4 --peak-tflops 989; a training log's `mfu` is of the peak measured there",
        )
    return Machine(
        num_devices=options.devices,
        device_memory=memory,
        per_node=options.devices_per_node,
        engine=options.engine,
        mfu=options.mfu,
        peak=None if options.peak_tflops is None else options.peak_tflops * 1e12,
        price=options.price,
    )


def _rows(given: list[str]) -> dict[str, int]:
    rows = {}
    for text in given:
        name, separator, number = text.partition("=")
        if not separator or not number.isdigit() or int(number) < 1:
            raise UserError(f"{text!r} is not NAME=N", where="--rows", fix="--rows llava-pretrain=558128")
        rows[name] = int(number)
    return rows


def _image(given: str | None) -> tuple[int, int] | None:
    if given is None:
        return None
    height, _, width = given.partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise UserError(f"{given!r} is not HEIGHTxWIDTH", where="--image", fix="--image 1754x1240, A4 at 150 dpi")
    return int(height), int(width)


def print_plan(plan: dict[str, Any], *, stderr: bool = False) -> None:
    """Print the plan, one table per stage, on stdout or stderr."""
    from llava_llama31.trainer.terminal import Terminal

    console = Terminal(stderr=stderr)
    memory = "" if plan["device_memory"] is None else f" of {plan['device_memory']:g} GB"
    model = f"sizes of {plan['model']}" if plan["model"] else "the model's parts are not here yet: no memory, no FLOPs"
    console.print(f"{plan['recipe']} on {counted(plan['devices'], 'device')}{memory}; {model}")
    for key, what in plan["missing"].items():
        console.print(f"not here: {key}: {what}; `train` stops at it")
    for stage in plan["stages"]:
        console.print()
        _print_stage(console, stage, plan["devices"])
        if stage["fits"] is False:
            console.print(_fix_line(stage))
        for note in stage["assumed"]:
            console.print(f"assumed: {note}")
        for note in stage["notes"]:
            console.print(f"note: {note}")
    if "fastest" in plan:
        console.print()
        _print_fastest(console, plan)
        console.print(plan["verdict"])
    if "written" in plan:
        console.print(f"written: {plan['written']}; its first lines say how to launch it")
    console.print()
    for note in _notes(plan):
        console.print(note)


def _print_stage(console: "Terminal", stage: dict[str, Any], devices: int) -> None:
    rates = ", ".join(f"{group} at {rate:g}" for group, rate in stage["learning_rate"].items())
    batch = f"{stage['global_batch']} = {stage['micro_batch']} x {stage['gradient_accumulation']} accumulated"
    steps = f"{_number(stage['steps'])} of {batch} x {counted(devices, 'device')}; {_number(stage['rows'])} rows"
    lengths = ", ".join(f"{name} {value:,}" for name, value in stage["row_tokens"].items())
    data = f"{_number(stage['tokens'])} tokens (a row: {lengths}), {_number(stage['tiles'])} tiles"
    work = "not known" if stage["flops"] is None else f"{stage['flops']:.3g} FLOPs"
    work += "" if stage["hours"] is None else f", {stage['hours']:,.1f} hours"
    work += "" if stage["cost"] is None else f", cost {stage['cost']:,.0f}"
    rows = [("steps", steps), ("data", data), ("work", work)]
    if stage["memory"]:
        trained = sum(group["trainable"] for group in stage["parameters"].values())
        total = sum(group["total"] for group in stage["parameters"].values())
        rows += [("parameters", f"{trained:,} of {total:,} trained"), _memory_row(stage)]
    console.table((stage["name"], rates), rows)


def _print_fastest(console: "Terminal", plan: dict[str, Any]) -> None:
    rows = []
    for name, found in (plan["fastest"] or {}).items():
        if found is None:
            rows.append((name, "?", "?", "none fits"))
            continue
        words = [found["engine"], *found["set"]]
        hours = "?" if found["hours"] is None else f"{found['hours']:,.1f}"
        rows.append((name, hours, f"{found['peak']:,.1f}", " ".join(words)))
    cost = "" if plan["cost"] is None else f"cost {plan['cost']:,.0f}"
    rows.append(("all stages", "?" if plan["hours"] is None else f"{plan['hours']:,.1f}", "", cost))
    console.table((f"fastest on {plan['device']}", "hours", "GB", "settings"), rows, numbers=("hours", "GB"))


def _memory_row(stage: dict[str, Any]) -> tuple[str, str]:
    memory = stage["memory"]
    fits = {True: ": fits", False: ": does not fit", None: ""}[stage["fits"]]
    parts = ", ".join(f"{name} {_gb(memory[name])}" for name in ("weights", "gradients", "optimizer", "activations"))
    row = f"a micro-batch of {stage['longest_micro_batch']:,} positions"
    return f"GB, {stage['engine']}", f"peak {_gb(memory['peak'])}{fits} ({parts}; {row}); host {_gb(memory['host'])}"


def _notes(plan: dict[str, Any]) -> list[str]:
    from llava_llama31.trainer.planning.plan import USABLE

    notes = []
    if any(stage["sampled"] for stage in plan["stages"]):
        notes.append("Tiles, FLOPs and the longest micro-batch come from evenly spaced steps.")
    if "fastest" in plan:
        notes.append("Hours and cost of the fastest settings come from a model of data sheets; they are not measured.")
    elif plan["hours_from"]:
        notes.append(f"Hours: {plan['hours_from']}; evaluation and checkpoints are not counted.")
    else:
        notes.append("Add --device, or --mfu and --peak-tflops, to see hours.")
    if any(stage["memory"] for stage in plan["stages"]):
        notes.append(f"Memory: the peak, not the sum; a stage fits below {USABLE:.0%} of a device's memory.")
    return notes


def _fix_line(stage: dict[str, Any]) -> str:
    fix = stage["fix"]
    if fix is None:
        return "no setting that was tried fits: add devices, or lora"
    launch = f" under accelerate launch --config_file {fix['accelerate']}" if fix["accelerate"] else ""
    return f"{fix['peak']:,.1f} GB with {fix['engine']}{launch}{': ' * bool(fix['set'])}{' '.join(fix['set'])}"


def _gb(value: float) -> str:
    return f"{value:,.1f}" if value >= 1 else f"{value:.3f}"


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
