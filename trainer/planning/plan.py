"""What a recipe will do on a number of devices: steps, tokens, FLOPs, hours, and memory on each device.

Without a GPU, without the model's weights, and without the data where that is not here: what is assumed is named.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.costs.flops import ModelShape, Work, adapter_ranks, needed_flops
from llava_llama31.trainer.costs.image_tokens import TileGrid
from llava_llama31.trainer.costs.memory import ENGINES, Engine, Memory, MicroBatch, Setup, estimate
from llava_llama31.trainer.costs.parameters import Parameters, stage_adapters
from llava_llama31.trainer.costs.zero import ZeroSettings
from llava_llama31.trainer.data.batches.batch_order import BatchOrder, batch_order, within_row_limit
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.planning.model_sizes import model_config
from llava_llama31.trainer.planning.row_lengths import (
    Assumptions,
    Passes,
    StageRows,
    counted_rows,
    histogram,
    passes,
    stage_rows,
)
from llava_llama31.trainer.recipes.deepspeed_files import deepspeed_content, deepspeed_file, shipped_deepspeed_files
from llava_llama31.trainer.recipes.derived import Derived, check_evaluations, derive, remarks
from llava_llama31.trainer.recipes.schema import Lora, Recipe, Stage


GB = 1e9
# share of a device's memory that a step may take; the rest is for the CUDA context, NCCL and the allocator's gaps.
# An assumption: no GPU has measured it here
USABLE = 0.92
# what a change costs in time, to try the cheapest first: rough ranks and no measurements
_COST_MICRO_BATCH, _COST_CHECKPOINTING = 1.02, 1.3
_COST_ENGINE = {
    "ddp": 1.0,
    "zero1": 1.01,
    "zero2": 1.03,
    "fsdp2": 1.1,
    "zero3": 1.12,
    "zero3-offload-params": 1.8,
    "zero3-offload": 2.5,
}
_COST_OPTIMIZER = {"adamw": 1.0, "adamw_bf16": 1.04, "adamw_8bit": 1.05}
_COST_OTHER_ENGINE, _COST_OTHER_OPTIMIZER = 1.005, 1.005


@dataclass(frozen=True)
class Machine:
    """Where a recipe is to run.

    Args:
        num_devices: of all machines.
        device_memory: bytes; None: whether a stage fits is not asked.
        per_node: devices of one machine.
        engine: of all stages; None: what each stage says.
        mfu: share of `peak` that training reaches.
        peak: FLOP/s of a device in the type of the stage's products.
        price: of a device for an hour.
    """

    num_devices: int = 1
    device_memory: float | None = None
    per_node: int | None = None
    engine: str | None = None
    mfu: float | None = None
    peak: float | None = None
    price: float | None = None


@dataclass(frozen=True)
class Case:
    """A stage with all that its plan is made from; `config` is None where the model is not known yet.

    Args:
        narrow_groups: whose frozen weights bfloat16 holds exactly.
        narrow_with_adapters: the same if the stage trained adapters instead of the language model.
        passed: what `passes_of` has found, by micro-batch and number of steps: no other setting changes it.
    """

    name: str
    stage: Stage
    engine: Engine
    rows: StageRows
    seed: int
    machine: Machine
    config: Mapping[str, Any] | None
    narrow_groups: frozenset[str]
    narrow_with_adapters: frozenset[str] = frozenset()
    passed: dict[tuple[int, int], Passes] = field(default_factory=dict, compare=False, repr=False)


def plan_recipe(
    recipe: Recipe,
    output: Path,
    machine: Machine,
    assumptions: Assumptions | None = None,
    cases: Sequence[Case] | None = None,
) -> dict[str, Any]:
    """The plan as a mapping that JSON can hold; memory in 10^9 bytes, a figure that is not known is None.

    Args:
        cases: what `cases_of` returns for the same arguments.

    Raises:
        UserError: when a stage's batch does not divide among the devices, or the engine is unknown.
    """
    found = model_config(recipe, output)
    stages = [_plan_stage(case) for case in cases or cases_of(recipe, output, machine, assumptions)]
    return {
        "recipe": recipe.name,
        "devices": machine.num_devices,
        "device_memory": None if machine.device_memory is None else machine.device_memory / GB,
        "model": found[1] if found else None,
        "hours_from": _hours_from(machine),
        "stages": stages,
    }


def cases_of(recipe: Recipe, output: Path, machine: Machine, assumptions: Assumptions | None = None) -> list[Case]:
    """The recipe's stages with what is known of their model and rows.

    Raises:
        UserError: the engine is unknown.
    """
    found = model_config(recipe, output)
    config, origin = found if found else (None, None)
    grid = None if config is None else TileGrid.of(config)
    cases, trained_before = [], set[str]()
    for number, (name, stage) in enumerate(recipe.stages.items()):
        engine = engine_for(stage, machine.engine, where=f"stages.{name}")
        counted = _counted(stage, recipe, output, origin)
        rows = stage_rows(stage, counted, assumptions or Assumptions({}), recipe.seed + number, grid)
        narrow = _narrow_groups(stage, recipe, trained_before)
        adapted = stage.model_copy(update={"lora": stage.lora or Lora.model_validate({})})
        with_adapters = _narrow_groups(adapted, recipe, trained_before)
        cases.append(Case(name, stage, engine, rows, recipe.seed, machine, config, narrow, with_adapters))
        trained_before |= set(stage.trainable)
    return cases


def _hours_from(machine: Machine) -> str | None:
    if machine.mfu is None or machine.peak is None:
        return None
    return f"--mfu {machine.mfu:g} of --peak-tflops {machine.peak / 1e12:g} a device, as given"


def _counted(stage: Stage, recipe: Recipe, output: Path, origin: str | None) -> StageRows | None:
    """What check-data has found of the stage's rows with the model's own processor."""
    folder = RunFolder(output).base if RunFolder(output).base.exists() else Path(origin or "")
    is_here = origin is not None and (folder / "processor_config.json").is_file()
    return counted_rows(stage, folder, recipe.seed) if is_here else None


def _narrow_groups(stage: Stage, recipe: Recipe, trained_before: set[str]) -> frozenset[str]:
    """Groups whose frozen weights are as they were assembled, and so hold nothing that bfloat16 could not."""
    if recipe.model.dtype != "bfloat16" or stage.precision != "bfloat16":
        return frozenset()
    changed = set(stage.trainable) - set(stage.adapted)
    return frozenset({"vision_tower", "multi_modal_projector", "language_model"} - changed - trained_before)


# engines


def engine_for(stage: Stage, name: str | None, *, where: str) -> Engine:
    """The engine that is asked for, else the one that the stage's DeepSpeed file describes, else DDP.

    Raises:
        UserError: there is no such engine, or no such file.
    """
    if name is not None:
        return ENGINES[name]
    if stage.deepspeed is None:
        return ENGINES["ddp"]
    return ENGINES[_engine_name(_zero_content(stage.deepspeed, where))]


def _zero_content(name: str, where: str) -> dict[str, Any]:
    zero = deepspeed_content(name, where).get("zero_optimization")
    if not isinstance(zero, dict):
        raise UserError("not a DeepSpeed file with ZeRO", where=str(deepspeed_file(name, where)), fix="fix the file")
    return zero


def _engine_name(zero: Mapping[str, Any]) -> str:
    parameters, optimizer = (zero.get(key, {}).get("device") for key in ("offload_param", "offload_optimizer"))
    if zero["stage"] < 3:
        return f"zero{max(1, zero['stage'])}"
    if optimizer not in (None, "none"):
        return "zero3-offload"
    return "zero3-offload-params" if parameters not in (None, "none") else "zero3"


@cache
def shipped_file(engine: str) -> str | None:
    """The `deepspeed` value that gives an engine: of the shipped files the first without an optimizer or a disk."""
    for name, content in shipped_deepspeed_files().items():
        zero = content["zero_optimization"]
        on_disk = zero.get("offload_optimizer", {}).get("device") == "nvme"
        if "optimizer" not in content and not on_disk and _engine_name(zero) == engine:
            return name
    return None


def _zero_settings(stage: Stage, engine: Engine) -> ZeroSettings:
    """Sizes of DeepSpeed's buffers where the stage's file names them; its defaults else."""
    if not engine.deepspeed or stage.deepspeed is None:
        return ZeroSettings()
    zero, types = _zero_content(stage.deepspeed, ""), deepspeed_content(stage.deepspeed, "").get("data_types", {})
    bucket, ahead = zero.get("reduce_bucket_size", 5e8), zero.get("stage3_prefetch_bucket_size", 5e7)
    return ZeroSettings(
        reduce_bucket=None if bucket == "auto" else float(bucket),
        max_live=float(zero.get("stage3_max_live_parameters", 1e9)),
        prefetch=None if ahead == "auto" else float(ahead),
        sub_group=float(zero.get("sub_group_size", 1e9)),
        overlap=bool(zero.get("overlap_comm", True)),
        wide_sums=types.get("grad_accum_dtype") == "fp32",
    )


# one stage


def _plan_stage(case: Case) -> dict[str, Any]:
    machine, rows = case.machine, case.rows
    stage = within_row_limit(case.stage, rows.lengths, case.seed, machine.num_devices)
    case = replace(case, stage=stage)
    num_train = stage.global_batch if rows.num_train is None else rows.num_train
    derived = derive(stage, num_train, machine.num_devices, where=f"stages.{case.name}")
    steps = stage.max_steps if rows.num_train is None else derived.steps
    if steps is not None:
        check_evaluations(stage, steps, where=f"stages.{case.name}")
    planned: dict[str, Any] = {
        "name": case.name,
        "trainable": list(stage.trainable),
        "learning_rate": stage.learning_rates(),
        "engine": case.engine.name,
        "rows": rows.num_rows,
        "global_batch": stage.global_batch,
        "micro_batch": stage.micro_batch,
        "gradient_accumulation": derived.gradient_accumulation,
        "steps": steps,
        "warmup_steps": None if rows.num_train is None else derived.warmup_steps,
        "row_tokens": histogram(rows.lengths),
        "assumed": list(rows.assumed),
        "notes": [] if rows.num_train is None else remarks(stage, derived),
    }
    seen = passes_of(case, steps or 1)
    known = steps is not None
    planned |= {"tokens": seen.tokens if known else None, "tiles": seen.tiles if known else None}
    planned |= {"sampled": seen.sampled, "longest_micro_batch": seen.worst.num_tokens}
    planned |= _work(case, seen.works if known else None)
    return planned | _memory(case, seen.worst, derived)


def order_of(case: Case) -> BatchOrder:
    """The stage's order; rows that are drawn may be fewer than a global batch."""
    lengths = case.rows.lengths
    whole = case.stage.model_copy(update={"global_batch": min(case.stage.global_batch, len(lengths))})
    return batch_order(whole, lengths, case.seed)


def _work(case: Case, works: tuple[Work, Work] | None) -> dict[str, Any]:
    """FLOPs that the stage needs, hours and cost where an MFU is given."""
    unknown = {"flops": None, "hours": None, "cost": None}
    if works is None or case.config is None:
        return unknown
    stage, machine = case.stage, case.machine
    shape = ModelShape.of(case.config)
    options = adapter_ranks(stage) | {"checkpointing": stage.recomputed}
    # a micro-batch without images needs other gradients: the two kinds are counted apart
    flops = sum(needed_flops(shape, work, stage.trainable, **options).total.needed for work in works)
    if machine.mfu is None or machine.peak is None:
        return unknown | {"flops": flops}
    hours = flops / (machine.mfu * machine.peak * machine.num_devices) / 3600
    cost = None if machine.price is None else hours * machine.num_devices * machine.price
    return {"flops": flops, "hours": hours, "cost": cost}


def _memory(case: Case, worst: MicroBatch, derived: Derived) -> dict[str, Any]:
    if case.config is None:
        return {"parameters": None, "memory": None, "fits": None, "fix": None}
    setup = setup_of(case.stage, case.config, case.engine, case.narrow_groups, derived.gradient_accumulation > 1)
    machine = case.machine
    memory = estimate(setup, worst, case.engine, machine.num_devices, machine.per_node)
    groups = setup.parameters.groups()
    parameters = {group: {"total": groups[group], "trainable": setup.trained[group]} for group in groups}
    for group, number in setup.adapters.items():
        parameters[group]["total"] += number
    fits = None if machine.device_memory is None else memory.peak <= USABLE * machine.device_memory
    return {
        "parameters": parameters,
        "memory": {name: value / GB for name, value in (asdict(memory) | {"peak": memory.peak}).items()},
        "fits": fits,
        "fix": nearest_that_fits(case) if fits is False else None,
    }


def setup_of(
    stage: Stage, config: Mapping[str, Any], engine: Engine, narrow_groups: frozenset[str], accumulates: bool
) -> Setup:
    """A stage as its memory depends on it."""
    shape, parameters = ModelShape.of(config), Parameters.of(config)
    lora, adapters = stage.lora, stage_adapters(shape, stage)
    frozen_newline = shape.hidden_size if "frozen_image_newline" in stage.quirks else 0
    return Setup(
        shape,
        parameters,
        parameters.trainable(stage.trainable, adapters=adapters, frozen_newline=frozen_newline),
        precision=stage.precision,
        optimizer=stage.optimizer,
        checkpointing=stage.recomputed,
        accumulates=accumulates,
        **adapter_ranks(stage),
        adapters=adapters,
        narrow_groups=narrow_groups,
        quantized=lora is not None and lora.quantize is not None,
        zero=_zero_settings(stage, engine),
    )


# what fits


def nearest_that_fits(case: Case) -> dict[str, Any] | None:
    """The cheapest change, by rank, with which the stage fits: overrides, and what else the launch needs."""
    assert case.machine.device_memory is not None and case.config is not None
    worst: dict[int, MicroBatch] = {}
    whole: dict[int, MicroBatch] = {}  # of as many steps as the stage's plan goes through, which takes longer
    for changes, engine in _changes(case):
        try:
            stage = Stage.model_validate(case.stage.model_dump() | changes)
            changed = replace(case, stage=stage, engine=engine)
            num_train = stage.global_batch if case.rows.num_train is None else case.rows.num_train
            derived = derive(stage, num_train, case.machine.num_devices)
        except (ValidationError, UserError):
            continue  # the stage can't be run so
        if stage.micro_batch not in worst:
            worst[stage.micro_batch] = passes_of(changed, 16).worst
        setup = setup_of(stage, case.config, engine, case.narrow_groups, derived.gradient_accumulation > 1)
        limit, devices = USABLE * case.machine.device_memory, (case.machine.num_devices, case.machine.per_node)
        if estimate(setup, worst[stage.micro_batch], engine, *devices).peak > limit:
            continue
        if stage.micro_batch not in whole:
            whole[stage.micro_batch] = worst_micro_batch(changed, derived)
        memory = estimate(setup, whole[stage.micro_batch], engine, *devices)
        if memory.peak <= limit:
            return _fix(case, changes, engine, memory)
    return None


def worst_micro_batch(case: Case, derived: Derived) -> MicroBatch:
    """The longest micro-batch of the steps that the stage's plan goes through."""
    steps = case.stage.max_steps if case.rows.num_train is None else derived.steps
    return passes_of(case, steps or 1).worst


def passes_of(case: Case, steps: int) -> Passes:
    """`passes` through the stage's steps, or through this many of them."""
    key = (case.stage.micro_batch, steps)
    if key not in case.passed:
        case.passed[key] = passes(case.stage, case.rows, order_of(case), steps, case.machine.num_devices)
    return case.passed[key]


def _changes(case: Case) -> Iterator[tuple[dict[str, Any], Engine]]:
    """Keys of the stage with other values, and an engine; cheapest first."""
    stage = case.stage
    micro_batches = [size for size in range(stage.micro_batch, 0, -1) if stage.global_batch % size == 0]
    checkpointing = [stage.activation_checkpointing] + [True] * (stage.activation_checkpointing is not True)
    engines = [name for name in ENGINES if case.machine.num_devices > 1 or name != "fsdp2"]
    choices: list[tuple[float, int, dict[str, Any], Engine]] = []
    for micro_batch, recompute, name, optimizer in itertools.product(
        micro_batches, checkpointing, engines, _COST_OPTIMIZER
    ):
        file = shipped_file(name)
        if not runs_under(stage, ENGINES[name], optimizer, file):
            continue
        changes: dict[str, Any] = {}
        cost = _COST_MICRO_BATCH ** micro_batches.index(micro_batch) * _COST_ENGINE[name] * _COST_OPTIMIZER[optimizer]
        if micro_batch != stage.micro_batch:
            changes["micro_batch"] = micro_batch
        if recompute != stage.activation_checkpointing:
            changes["activation_checkpointing"] = recompute
            cost *= _COST_CHECKPOINTING
        if name != case.engine.name:
            changes["deepspeed"] = file
            cost *= _COST_OTHER_ENGINE
        if optimizer != stage.optimizer:
            changes["optimizer"] = optimizer
            cost *= _COST_OTHER_OPTIMIZER
        choices.append((cost, len(choices), changes, ENGINES[name]))
    for _, _, changes, engine in sorted(choices, key=lambda choice: choice[:2]):
        yield changes, engine


def runs_under(stage: Stage, engine: Engine, optimizer: str, file: str | None) -> bool:
    """What stages refuse of DeepSpeed, whose file must be there, and of FSDP."""
    if engine.name == "ddp":
        return True
    if stage.feature_cache_gb is not None or stage.precision == "bfloat16-weights":
        return False
    if engine.deepspeed:
        return file is not None and optimizer == "adamw" and not stage.compile and not stage.fp8
    return stage.lora is None or not stage.lora.quantize


def _fix(case: Case, changes: Mapping[str, Any], engine: Engine, memory: Memory) -> dict[str, Any]:
    given = {key: value for key, value in changes.items() if getattr(case.stage, key) != value}
    text = [f"--set stages.{case.name}.{key}={json.dumps(value).strip(chr(34))}" for key, value in given.items()]
    launch = "examples/accelerate/fsdp2.yaml" if engine.name == "fsdp2" and case.engine != engine else None
    return {"set": text, "engine": engine.name, "accelerate": launch, "peak": memory.peak / GB}
