"""The true 8B step: its speed, and its memory beside what `plan` says."""

from functools import partial
from typing import Any
from unittest import mock

import gpu
import numpy as np
import torch
from peak_memory import PeakMemory

from gpu_checks.place import Detail, Place, expect
from llava_llama31.packed_llama_llava_llama31 import _HEAD_SIZES, plan_row
from llava_llama31.trainer.costs.memory import ENGINES, MicroBatch, estimate
from llava_llama31.trainer.planning.plan import USABLE, setup_of


# a trace of the step at 8B is within 2 % of the plan; so is a small step here
PLAN_TOLERANCE = 0.05
GROWING = "growing segments"


def _settings(place: Place, *, warmup: int, steps: int, small: str = "tiny") -> gpu.Settings:
    shape, size = (small, 2) if place.small else ("8b", 8)
    return gpu.Settings(shape, "instruct", gpu.SHARED, str(place.device), size, size, warmup, steps, "adamw")


def speed(place: Place) -> Detail:
    """The true 8B step (on a CPU a small one): MFU and peak memory, with the largest micro-batch that fits."""
    settings = _settings(place, warmup=1, steps=2)
    result = gpu.largest_that_fits(settings, gpu.drive if place.small else gpu.in_own_process)
    expect(result is not None, "not even a micro-batch of one fits")
    assert result is not None
    expect(all(np.isfinite(result["losses"])), f"losses are {result['losses']}")
    # a busy CPU's peak is measured too low
    expect(0 < result["mfu"] < (1 if not place.small else float("inf")), f"an MFU of {result['mfu']:.3g} is none")
    return {key: result[key] for key in ("mfu", "hfu", "memory", "micro_batch", "seconds", "losses")}


def memory(place: Place) -> Detail:
    """Most memory of the same step beside `plan`'s figure, with segments that grow and without.

    On a CPU, whose process says nothing of it, all tensors of a small step in float32 are counted.
    """
    settings = _settings(place, warmup=1, steps=1, small="small")
    measured = {"tensors": _counted(settings)} if place.small else _with_both_allocators(settings)
    found: Detail = {}
    for name, result in measured.items():
        planned = _planned(settings, result["micro_batch"], place)
        found[name] = {key: result[key] for key in ("micro_batch", "memory", "reserved")} | {"planned": planned}
        off = result["memory"] / planned - 1
        expect(
            abs(off) <= PLAN_TOLERANCE, f"{name}: {result['memory']:,} bytes, and planned {planned:,.0f}: {off:+.1%}"
        )
    if GROWING in found:
        kept, planned = found[GROWING]["reserved"], found[GROWING]["planned"]
        expect(kept * USABLE <= planned, f"the allocator keeps {kept:,} bytes, and planned are {planned:,.0f}")
    return found


def _with_both_allocators(settings: gpu.Settings) -> dict[str, dict[str, Any]]:
    found = {}
    for name, expandable in ((GROWING, True), ("fixed segments", False)):
        result = gpu.largest_that_fits(settings, partial(gpu.in_own_process, expandable=expandable))
        expect(result is not None, f"{name}: not even a micro-batch of one fits")
        assert result is not None
        found[name] = result
    return found


def _stage(settings: gpu.Settings) -> gpu.Stage:
    """The card's stage with weights as they are trained here."""
    return gpu.card_stage(
        settings.stage, (f"precision={'float32' if settings.device == 'cpu' else 'bfloat16-weights'}",)
    )


def _workload(settings: gpu.Settings) -> gpu.Workload:
    number = (settings.warmup + settings.steps) * settings.samples_per_step
    shape = gpu.SHAPES[settings.shape]
    return gpu.Workload(shape, _stage(settings), num_samples=number, samples_per_step=settings.samples_per_step)


def _planned(settings: gpu.Settings, micro_batch: int, place: Place) -> float:
    """`plan`'s bytes of the step that is measured."""
    work = _workload(settings)
    rows = work.micro_batches(settings.variant, micro_batch)[settings.warmup]
    setup = setup_of(work.stage, work.shape.config.to_dict(), ENGINES["ddp"], frozenset(), len(rows) > 1)
    batches = [_micro_batch(work.collator(settings.variant)(row), work, place) for row in rows]
    return max(estimate(setup, batch, ENGINES["ddp"], 1).of_a_step for batch in batches)


def _micro_batch(batch: dict[str, Any], work: gpu.Workload, place: Place) -> MicroBatch:
    layout = work._layouts.feature_layout(batch["image_sizes"])[0]
    supervised = len(batch["supervised_positions"])
    on_cpu: dict[str, Any] = {"copies_attention": True, "fuses": False}
    on_cpu |= {"head_rows": _HEAD_SIZES.rows, "softmax_rows": _HEAD_SIZES.softmax_rows}
    return MicroBatch(
        num_tokens=batch["input_ids"].shape[1],
        num_keys=sum(segment.num_keys for segment in plan_row(batch["packing"]).segments),
        num_supervised=supervised,
        num_last_queries=supervised,
        num_tiles=len(batch["pixel_values"]),
        num_features=int((layout >= 0).sum()),
        **(on_cpu if place.small else {}),
    )


def _counted(settings: gpu.Settings) -> dict[str, Any]:
    """Bytes of all tensors of a step after the first, at most."""
    with mock.patch.object(gpu, "DTYPE", torch.float32), PeakMemory(fake=False) as counted:
        work = _workload(settings)
        steps = work.micro_batches(settings.variant, settings.micro_batch)
        batches = gpu.make_batches(work, steps, settings.variant, settings.device)
        model = gpu.make_model(work.shape, work.stage, settings.variant, settings.device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = gpu.make_optimizer(settings.optimizer, work.stage, trained)
        for step in batches:
            counted.restart()
            gpu.train_step(model, optimizer, step, 100, settings.device)
    return {"micro_batch": settings.micro_batch, "memory": counted.peak, "reserved": None}
