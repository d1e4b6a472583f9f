"""What a recipe will do on a number of devices, from the recipe and the number of its rows alone."""

from typing import Any

from rich.console import Console
from rich.table import Table

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipe import DataSource, Recipe, derive, num_held_out
from llava_llama31.trainer.records import open_records


def plan_recipe(recipe: Recipe, *, num_processes: int) -> dict[str, Any]:
    """Batches and steps of every stage; `rows` and `steps` are None where the data is not there yet.

    Raises:
        UserError: when a stage's batch does not divide among the devices.
    """
    stages = []
    for name, stage in recipe.stages.items():
        rows = [_num_rows(source) for source in stage.data]
        num_rows = None if None in rows else sum(row for row in rows if row is not None)
        samples = stage.global_batch if num_rows is None else num_rows - num_held_out(stage, num_rows)
        derived = derive(stage, samples, num_processes, where=f"stages.{name}")
        stages.append(
            {
                "name": name,
                "trainable": list(stage.trainable),
                "learning_rate": stage.learning_rates(),
                "rows": num_rows,
                "global_batch": stage.global_batch,
                "micro_batch": stage.micro_batch,
                "gradient_accumulation": derived.gradient_accumulation,
                "steps": stage.max_steps if num_rows is None else derived.steps,
                "warmup_steps": None if num_rows is None else derived.warmup_steps,
            }
        )
    return {"recipe": recipe.name, "devices": num_processes, "stages": stages}


def _num_rows(source: DataSource) -> int | None:
    """Rows that a source contributes, before any is found unusable."""
    try:
        rows = len(open_records(source))
    except UserError:
        return None
    return min(rows, source.sample) if source.sample else rows


def print_plan(plan: dict[str, Any]) -> None:
    """The plan as a table."""
    table = Table(
        "stage", "trains", "rows", "batch", "micro x accumulated x devices", "steps", box=None, pad_edge=False
    )
    for stage in plan["stages"]:
        rates = ", ".join(f"{group} {rate:g}" for group, rate in stage["learning_rate"].items())
        table.add_row(
            stage["name"],
            rates,
            "no data yet" if stage["rows"] is None else f"{stage['rows']:,}",
            str(stage["global_batch"]),
            f"{stage['micro_batch']} x {stage['gradient_accumulation']} x {plan['devices']}",
            "?" if stage["steps"] is None else f"{stage['steps']:,}",
        )
    Console().print(table)
