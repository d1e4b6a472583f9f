"""The tables of docs/memory.md: what `plan` finds for every shipped recipe on every GPU that it knows.

python -m llava_llama31.trainer.planning.memory_page docs/memory.md
"""

import sys
from pathlib import Path

from llava_llama31.trainer.costs.accelerators import ACCELERATORS, Accelerator
from llava_llama31.trainer.planning.fastest import timed_plan
from llava_llama31.trainer.planning.plan import Machine, cases_of
from llava_llama31.trainer.planning.row_lengths import Assumptions
from llava_llama31.trainer.recipes.loading import SHIPPED, load_recipe


DEVICES = (1, 8)
BEGIN, END = "<!-- begin tables: made by `make memory-page` -->\n", "<!-- end tables -->\n"
DOES_NOT_FIT = "no"


def tables() -> str:
    """A table for each number of GPUs, with a row for each recipe whose sizes are known before it is run."""
    planned = [name for name in SHIPPED if cell(name, next(iter(ACCELERATORS.values())), 1) is not None]
    parts = []
    for devices in DEVICES:
        parts += [f"## {devices} GPU{'s of one machine' if devices > 1 else ''}\n", head()]
        parts += [row(name, devices) for name in planned]
        parts.append("")
    return "\n".join(parts)


def head() -> str:
    """The first two lines of a table."""
    return f"| recipe | {' | '.join(ACCELERATORS)} |\n|---|{'---|' * len(ACCELERATORS)}"


def row(name: str, devices: int) -> str:
    """A recipe's line of a table."""
    return f"| `{name}` | {' | '.join(str(cell(name, gpu, devices)) for gpu in ACCELERATORS.values())} |"


def cell(name: str, gpu: Accelerator, devices: int) -> str | None:
    """Hours of all stages and the most memory of one, with the settings that `plan --device` proposes.

    None: the sizes of the recipe's parts are not known before they are made.
    """
    # in no folder that exists: what this machine has of the recipe's data must not count
    output = Path("no-such-run")
    machine = Machine(num_devices=devices, device_memory=gpu.memory)
    cases = cases_of(load_recipe(name, output=output), output, machine, Assumptions({}, None, None))
    plan = timed_plan(cases, gpu)
    if plan["fastest"] is None:
        return None
    stages = list(plan["fastest"].values())
    if None in stages:
        return DOES_NOT_FIT
    hours = "? h" if plan["hours"] is None else f"{plan['hours']:,.1f} h"
    proposed = [stage["lora"] for case, stage in zip(cases, stages, strict=True) if case.stage.lora is None]
    adapters = [lora for lora in proposed if lora is not None]
    kind = "" if not adapters else " QLoRA" if any(lora.get("quantize") for lora in adapters) else " LoRA"
    return f"{hours}, {max(stage['peak'] for stage in stages):.0f} GB{kind}"


def _write(page: Path) -> None:
    start, mark, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    assert mark and end, f"{page} lacks the marks of its tables"
    page.write_text(start + mark + tables() + end + tail, encoding="utf-8")


if __name__ == "__main__":
    _write(Path(sys.argv[1]))
