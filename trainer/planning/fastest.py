"""The fastest settings of each stage on a named GPU, their hours and cost, by the model of costs/seconds.py."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

from llava_llama31.trainer.costs.accelerators import Accelerator
from llava_llama31.trainer.costs.flops import FlopsByPart, ModelShape, adapter_ranks, needed_flops
from llava_llama31.trainer.costs.memory import ENGINES, Engine, estimate
from llava_llama31.trainer.costs.seconds import StepWork, step_seconds
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.planning.plan import (
    USABLE,
    Case,
    passes_of,
    runs_under,
    setup_of,
    shipped_file,
    worst_micro_batch,
)
from llava_llama31.trainer.recipes.derived import derive
from llava_llama31.trainer.recipes.schema import Stage


# of a stage that are looked at, and the largest micro-batch that is tried
_STEPS, _LARGEST_MICRO_BATCH = 16, 64
_CHECKPOINTING: tuple[bool | int | str, ...] = (False, "selective", 3, 2, True)
_OPTIMIZERS = ("adamw", "adamw_8bit", "adamw_bf16")
_flops = lru_cache(maxsize=256)(needed_flops)  # of many settings that differ in other things
# proposed where nothing else fits
_ADAPTERS: tuple[dict[str, Any], ...] = ({"r": 64}, {"r": 64, "quantize": "nf4"})


@dataclass(frozen=True)
class Timed:
    """A stage with settings that fit: how long a step and the stage take, and its peak memory in bytes."""

    stage: Stage
    engine: Engine
    step: float
    hours: float | None
    peak: float


def timed(case: Case, gpu: Accelerator) -> Timed | None:
    """A stage's time and memory; None: it can't be run so."""
    assert case.config is not None
    stage, devices = case.stage, case.machine.num_devices
    num_train = stage.global_batch if case.rows.num_train is None else case.rows.num_train
    try:
        derived = derive(stage, num_train, devices)
    except UserError:
        return None
    found, shape = passes_of(case, _STEPS), ModelShape.of(case.config)
    options = adapter_ranks(stage) | {"checkpointing": stage.recomputed}
    flops = FlopsByPart()
    for work in found.works:
        flops += _flops(shape, work, tuple(stage.trainable), **options)
    setup = setup_of(stage, case.config, case.engine, case.narrow_groups, derived.gradient_accumulation > 1)
    # `passes` adds up its steps
    whole = StepWork(flops, found.positions, derived.gradient_accumulation * _STEPS, fused=stage.packing)
    seconds = step_seconds(setup, whole, case.engine, gpu, devices, case.machine.per_node) / _STEPS
    steps = stage.max_steps if case.rows.num_train is None else derived.steps
    memory = estimate(setup, found.worst, case.engine, devices, case.machine.per_node)
    return Timed(stage, case.engine, seconds, None if steps is None else seconds * steps / 3600, memory.peak)


def settings_of(case: Case, *, fsdp: bool | None = None) -> Iterator[Case]:
    """The stage with every micro-batch, checkpointing, engine without offload, and optimizer that it can have.

    Args:
        fsdp: launched with FSDP, which then holds for all stages; or without; None: either.
    """
    stage, devices = case.stage, case.machine.num_devices
    sizes = [size for size in range(1, min(stage.global_batch, _LARGEST_MICRO_BATCH) + 1)]
    sizes = [size for size in sizes if stage.global_batch % (size * devices) == 0]
    engines = [name for name, engine in ENGINES.items() if not engine.offloads_weights]
    engines = [name for name in engines if devices > 1 or name != "fsdp2"]
    engines = [name for name in engines if fsdp is None or fsdp == (name == "fsdp2")]
    for size, every, name, optimizer in itertools.product(sizes, _CHECKPOINTING, engines, _OPTIMIZERS):
        engine, file = ENGINES[name], shipped_file(name)
        if not runs_under(stage, engine, optimizer, file):
            continue
        changes: dict[str, Any] = {"micro_batch": size, "activation_checkpointing": every, "optimizer": optimizer}
        changes["deepspeed"] = file if engine.deepspeed else None
        try:
            changed = Stage.model_validate(stage.model_dump() | changes)
        except ValidationError:
            continue
        yield replace(case, stage=changed, engine=engine)


def fastest(case: Case, gpu: Accelerator, *, fsdp: bool | None = None) -> Timed | None:
    """The settings with which the stage takes least time, of those that fit; None: none does.

    Args:
        fsdp: as `settings_of` takes it.
    """
    limit = USABLE * (case.machine.device_memory or gpu.memory)
    found = (timed(changed, gpu) for changed in settings_of(case, fsdp=fsdp))
    fitting = [result for result in found if result is not None and result.peak <= limit]
    for result in sorted(fitting, key=lambda result: result.step):
        peak = _peak_of_all_steps(case, result)
        if peak <= limit:
            return replace(result, peak=peak)
    return None


def _peak_of_all_steps(case: Case, found: Timed) -> float:
    """Memory by the longest micro-batch of all steps, not only of those that were timed."""
    assert case.config is not None
    chosen, machine = replace(case, stage=found.stage, engine=found.engine), case.machine
    num_train = found.stage.global_batch if case.rows.num_train is None else case.rows.num_train
    derived = derive(found.stage, num_train, machine.num_devices)
    setup = setup_of(found.stage, case.config, found.engine, case.narrow_groups, derived.gradient_accumulation > 1)
    return estimate(
        setup, worst_micro_batch(chosen, derived), found.engine, machine.num_devices, machine.per_node
    ).peak


def with_adapters(case: Case, gpu: Accelerator, *, fsdp: bool | None = None) -> Timed | None:
    """The fastest settings with LoRA, else QLoRA; None: that does not fit either."""
    if "language_model" not in case.stage.trainable or case.stage.lora is not None:
        return None
    for lora in _ADAPTERS:
        if fsdp and "quantize" in lora:
            continue  # refused there
        changes = {"lora": lora, "deepspeed": None, "compile": False, "fp8": False}
        try:
            stage = Stage.model_validate(case.stage.model_dump() | changes)
        except ValidationError:
            continue
        adapted = replace(case, stage=stage, engine=ENGINES["ddp"], narrow_groups=case.narrow_with_adapters)
        found = fastest(adapted, gpu, fsdp=fsdp)
        if found is not None:
            return found
    return None


def timed_plan(cases: list[Case], gpu: Accelerator) -> dict[str, Any]:
    """What a plan for a named GPU has besides: hours and cost of all stages, the fastest settings, and the verdict.

    Hours and cost are those of the fastest settings; None where a stage's are not known.
    """
    if any(case.config is None for case in cases):
        verdict = "the model's parts are not here yet: time and memory can't be estimated"
        return {"hours": None, "cost": None, "fastest": None, "verdict": verdict}
    whole, chosen = _of_one_launch(cases, gpu)
    stages = {
        case.name: None if found is None else _settings(case, found) for case, found in zip(cases, chosen, strict=True)
    }
    hours = [None if found is None else found.hours for found in chosen]
    unfit = [case.name for case, fits in zip(cases, whole, strict=True) if not fits]
    total = None if None in hours else sum(filter(None, hours))
    machine = cases[0].machine
    price = machine.price
    cost = None if total is None or price is None else total * machine.num_devices * price
    return {
        "hours": total,
        "cost": cost,
        "fastest": stages,
        "verdict": _verdict(cases, gpu, stages, unfit, total, cost),
    }


def _of_one_launch(cases: list[Case], gpu: Accelerator) -> tuple[list[bool], list[Timed | None]]:
    """Whether each stage fits whole, and its settings: of the launches, with and without FSDP, the faster one."""
    results = []
    for fsdp in (False, True):
        whole = [fastest(case, gpu, fsdp=fsdp) for case in cases]
        found = [one or with_adapters(case, gpu, fsdp=fsdp) for case, one in zip(cases, whole, strict=True)]
        # a step's share of the whole run is not known where rows are not
        seconds = sum(one.step if one.hours is None else 3600 * one.hours for one in found if one is not None)
        results.append((found.count(None), whole.count(None), seconds, [one is not None for one in whole], found))
    best = min(results, key=lambda result: result[:3])
    return best[3], best[4]


def _settings(case: Case, found: Timed) -> dict[str, Any]:
    keys = ("micro_batch", "activation_checkpointing", "optimizer", "deepspeed", "lora")
    changed = {key: getattr(found.stage, key) for key in keys if getattr(found.stage, key) != getattr(case.stage, key)}
    plain = found.stage.model_dump()
    given = [f"--set stages.{case.name}.{key}={json.dumps(plain[key]).strip(chr(34))}" for key in changed]
    return {
        "micro_batch": found.stage.micro_batch,
        "activation_checkpointing": found.stage.activation_checkpointing,
        "optimizer": found.stage.optimizer,
        "engine": found.engine.name,
        "lora": plain["lora"],
        "seconds_per_step": round(found.step, 3),
        "hours": found.hours,
        "peak": found.peak / 1e9,
        "set": given,
        "accelerate": "examples/accelerate/fsdp2.yaml" if found.engine.name == "fsdp2" else None,
    }


def _verdict(
    cases: list[Case],
    gpu: Accelerator,
    stages: dict[str, Any],
    unfit: list[str],
    hours: float | None,
    cost: float | None,
) -> str:
    where = f"{cases[0].machine.num_devices} x {gpu.name}"
    if lost := [name for name, found in stages.items() if found is None]:
        return f"does not fit on {where}, not even with adapters: {', '.join(lost)}; use more devices"
    time = "" if hours is None else f" in {hours:,.1f} hours" + ("" if cost is None else f" for {cost:,.0f}")
    if unfit:
        kind = "QLoRA" if any(stages[name]["lora"].get("quantize") for name in unfit) else "LoRA"
        return f"does not fit on {where} whole: {', '.join(unfit)}; with {kind} it does{time}"
    return f"fits on {where}{time} with the fastest settings, by a model, not by measurement"
