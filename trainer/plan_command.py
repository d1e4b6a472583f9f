"""`llava-llama31 plan`: its options, and its tables."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.memory import ENGINES
from llava_llama31.trainer.plan import GB, USABLE, Machine, plan_recipe
from llava_llama31.trainer.plan_data import Assumptions
from llava_llama31.trainer.recipe import load_recipe


def plan_command(options: argparse.Namespace, output: Path) -> int:
    """Plan and print.

    Raises:
        UserError: what an option or the recipe asks for can't be.
    """
    recipe = load_recipe(options.recipe, output=output, overrides=options.overrides)
    plan = plan_recipe(recipe, output, _machine(options), Assumptions(_rows(options.rows), options.tokens_per_row))
    if options.json_output:
        sys.stdout.write(json.dumps(plan) + "\n")
    else:
        print_plan(plan)
    return 0


def _machine(options: argparse.Namespace) -> Machine:
    if options.engine is not None and options.engine not in ENGINES:
        raise UserError(f"there is no engine {options.engine!r}", where="--engine", fix=f"one of {', '.join(ENGINES)}")
    if (options.mfu is None) != (options.peak_tflops is None):
        raise UserError(
            "an MFU is a share of a peak",
            where="--mfu" if options.peak_tflops is None else "--peak-tflops",
            fix="give both, e.g. --mfu 0.4 --peak-tflops 989: a training log's `mfu` is of the peak that it measured",
        )
    return Machine(
        num_devices=options.devices,
        device_memory=None if options.device_memory is None else options.device_memory * GB,
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


def print_plan(plan: dict[str, Any]) -> None:
    """The plan as tables, on standard output."""
    console = Console(highlight=False, soft_wrap=True)
    memory = "" if plan["device_memory"] is None else f" of {plan['device_memory']:g} GB"
    model = f"sizes of {plan['model']}" if plan["model"] else "the model's parts are not here yet: no memory, no FLOPs"
    console.print(f"{plan['recipe']} on {plan['devices']} device(s){memory}; {model}")
    console.print(_steps_table(plan))
    if any(stage["memory"] for stage in plan["stages"]):
        console.print(_memory_table(plan))
    for note in _notes(plan):
        console.print(note)


def _steps_table(plan: dict[str, Any]) -> Table:
    table = Table("stage", "trains", box=None, pad_edge=False)
    for name in ("rows", "micro x accumulated x devices", "steps", "tokens", "tiles", "FLOPs", "hours", "cost"):
        table.add_column(name, justify="right")
    for stage in plan["stages"]:
        rates = ", ".join(f"{group} {rate:g}" for group, rate in stage["learning_rate"].items())
        table.add_row(
            stage["name"],
            rates,
            _number(stage["rows"]),
            f"{stage['micro_batch']} x {stage['gradient_accumulation']} x {plan['devices']} = {stage['global_batch']}",
            _number(stage["steps"]),
            _number(stage["tokens"]),
            _number(stage["tiles"]),
            "?" if stage["flops"] is None else f"{stage['flops']:.3g}",
            "" if stage["hours"] is None else f"{stage['hours']:,.1f}",
            "" if stage["cost"] is None else f"{stage['cost']:,.0f}",
        )
    return table


_PARTS = ("weights", "gradients", "optimizer", "activations", "peak")


def _memory_table(plan: dict[str, Any]) -> Table:
    table = Table("GB a device", "engine", box=None, pad_edge=False)
    for name in (*_PARTS, "fits", "host, a machine", "trainable parameters"):
        table.add_column(name, justify="right")
    for stage in plan["stages"]:
        memory, trained = stage["memory"], sum(group["trainable"] for group in stage["parameters"].values())
        fits = {True: "yes", False: "no", None: ""}[stage["fits"]]
        figures = [f"{memory[part]:,.1f}" for part in _PARTS]
        row = [stage["name"], stage["engine"], *figures, fits, f"{memory['host']:,.1f}", f"{trained:,}"]
        table.add_row(*row)
    return table


def _notes(plan: dict[str, Any]) -> list[str]:
    notes = []
    for stage in plan["stages"]:
        if stage["fits"] is False:
            notes.append(_fix_line(stage))
    seen: dict[str, None] = {}
    for stage in plan["stages"]:
        seen |= dict.fromkeys(stage["assumed"])
    notes += [f"assumed: {note}" for note in seen]
    if any(stage["sampled"] for stage in plan["stages"]):
        notes.append("tokens, tiles and FLOPs are those of evenly chosen steps, times the number of steps")
    if plan["hours_from"]:
        notes.append(f"hours: {plan['hours_from']}; evaluation and checkpoints not counted")
    else:
        notes.append("hours: not without --mfu and --peak-tflops")
    if any(stage["memory"] for stage in plan["stages"]):
        notes.append(
            f"peak is the most that lives at once, not the sum; a stage fits below {USABLE:.0%} of the device's memory"
        )
    return notes


def _fix_line(stage: dict[str, Any]) -> str:
    fix, peak = stage["fix"], stage["memory"]["peak"]
    if fix is None:
        return f"{stage['name']} does not fit ({peak:,.1f} GB), and no setting tried does: add devices, or lora"
    launch = f"accelerate launch --config_file {fix['accelerate']} and " if fix["accelerate"] else ""
    return f"{stage['name']} does not fit ({peak:,.1f} GB); {fix['peak']:,.1f} GB with {launch}{' '.join(fix['set'])}"


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
