"""A step with few layers: its results, what it waits for, its optimizer, its time."""

import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu
import numpy as np
import torch
from torch.compiler import set_stance
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_checks.place import Detail, Place, expect, milliseconds
from llava_llama31 import LlavaLlama31ForConditionalGeneration
from llava_llama31.trainer.checkpoint.atomic_folders import load_tree, save_tree
from llava_llama31.trainer.model.fused_layers import fused_fault
from llava_llama31.trainer.model.module_groups import freeze
from llava_llama31.trainer.training.optimizers import AdamWBfloat16
from llava_llama31.trainer.training.portable_state import load_portable_state, portable_state


def _model_and_batch(shape: str, micro_batch: int) -> tuple[Any, dict[str, Any]]:
    """A model of 2 layers in float32 on the CPU, and a packed row."""
    stage = gpu.card_stage("instruct")
    whole = gpu.SHAPES[shape]
    cut = replace(whole, text=whole.text | {"num_hidden_layers": 2}, vision=whole.vision | {"num_hidden_layers": 3})
    work = gpu.Workload(cut, stage, num_samples=micro_batch, samples_per_step=micro_batch)
    ((row,),) = work.micro_batches(gpu.SHARED, micro_batch)
    torch.manual_seed(0)
    model = LlavaLlama31ForConditionalGeneration._from_config(cut.config, dtype=torch.float32, packable=True)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, 0.02)
    freeze(model, stage.learning_rates())
    return model.train(), work.collator(gpu.SHARED)([work.with_pixels(sample) for sample in row])


def _there(batch: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        pinned = value.pin_memory() if device.type == "cuda" else value
        return pinned.to(device, dtype if value.is_floating_point() else None, non_blocking=True)

    return {name: moved(value) for name, value in batch.items()}


def step(place: Place) -> Detail:
    """Loss and gradient norm of a packed row: this device in float32 and under autocast beside the CPU in float32."""
    model, batch = _model_and_batch("tiny" if place.small else "small", 2)
    cpu, found = torch.device("cpu"), []
    for device, dtype in ((cpu, torch.float32), (place.device, torch.float32), (place.device, torch.bfloat16)):
        model.to(device).zero_grad()
        with torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext():
            loss = model(**_there(batch, device, torch.float32), num_items_in_batch=100).loss
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        found.append((loss.item(), norm.item()))
    (loss, norm), *others = found
    for (other, other_norm), tolerance in zip(others, (1e-3, 2e-2), strict=True):
        close = abs(other - loss) <= tolerance * abs(loss) and abs(other_norm - norm) <= 5 * tolerance * norm
        expect(close, f"loss and gradient norm are {other, other_norm} and on the CPU {loss, norm}")
    return {"cpu": found[0], "float32": found[1], "bfloat16": found[2]}


# how torch warns of a wait; that it may miss some is another warning, of every process's first question for them
_WAITED = "called a synchronizing"


class _Asked(TorchDispatchMode):
    """Counts numbers that the host asks a step for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def waits(place: Place) -> Detail:
    """A micro-batch's forward and backward make the host wait for nothing."""
    model, batch = _model_and_batch("tiny" if place.small else "small", 4)
    dtype = torch.bfloat16 if place.device.type == "cuda" else torch.float32
    model.to(place.device, dtype)
    there = _there(batch, place.device, dtype)
    model(**there, num_items_in_batch=100).loss.backward()
    with warnings.catch_warnings(record=True) as caught, _Asked() as asked:
        warnings.simplefilter("always")
        if place.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            model(**there, num_items_in_batch=100).loss.backward()
        finally:
            if place.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    lines = lines_that_wait(caught)
    expect(not lines and not asked.count, f"the host waits {lines.total() or asked.count} times: {dict(lines)}")
    return {"waits": 0}


def lines_that_wait(caught: Sequence[warnings.WarningMessage]) -> Counter[str]:
    """Lines at which torch's warnings say that the host waited, with their numbers."""
    return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if _WAITED in str(w.message))


def _optimizers(place: Place) -> dict[str, Callable[[list[Any]], torch.optim.Optimizer]]:
    made: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
        "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
        "adamw_bf16": lambda parameters: AdamWBfloat16(
            [{"params": parameters}], lr=1e-3, compiled=None if place.small else torch.compile
        ),
    }
    try:
        from torchao.optim import AdamW8bit

        made["torchao"] = lambda parameters: AdamW8bit(parameters, lr=1e-3)
    except ImportError:
        pass
    try:
        from bitsandbytes.optim import AdamW

        made["bitsandbytes"] = lambda parameters: AdamW(parameters, lr=1e-3, optim_bits=8)
    except ImportError:
        pass
    return made


def optimizers(place: Place) -> Detail:
    """Every installed optimizer: its state saved, loaded, and the next steps with the same bits."""
    found = {}
    for name, make in _optimizers(place).items():
        with set_stance("force_eager") if place.small else nullcontext():
            found[name] = _resumes(name, make, place)
    return {"bytes_of_state": found}


def _resumes(name: str, make: Callable[[list[Any]], torch.optim.Optimizer], place: Place) -> int:
    def steps(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(2):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator).to(weight)
            optimizer.step()

    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(size, device=place.device)) for size in ((64, 128), (7,))]
    optimizer = make(weights)
    steps(optimizer, weights, 1)
    again = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    resumed = make(again)
    with tempfile.TemporaryDirectory() as folder:
        save_tree(Path(folder, "optimizer"), portable_state(optimizer))
        load_portable_state(resumed, load_tree(Path(folder, "optimizer")))
        size = Path(folder, "optimizer.safetensors").stat().st_size
    steps(optimizer, weights, 2)
    steps(resumed, again, 2)
    same = all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
    expect(same, f"{name}: a resumed optimizer takes other steps")
    return size


def profile(place: Place) -> Detail:
    """A micro-batch at the true width with few layers: milliseconds, eager, fused and compiled, whose losses agree."""
    model, batch = _model_and_batch("tiny" if place.small else "8b", 1 if place.small else 8)
    dtype = torch.float32 if place.device.type == "cpu" else torch.bfloat16
    model.to(place.device, dtype)
    there = _there(batch, place.device, dtype)
    losses: list[float] = []

    def run() -> None:
        loss = model(**there, num_items_in_batch=100).loss
        loss.backward()
        losses.append(loss.item())

    run()
    found = {"eager": milliseconds(run, place)}
    language_model = model.model.language_model
    if not place.small:  # a CPU compiles for a minute
        fault = fused_fault(language_model, place.device)
        expect(fault is None, f"fused arithmetic: {fault}")
    for name, remakes in (("fused", False), ("selective", True)):
        language_model.fuse((lambda function: function) if place.small else torch.compile, remakes=remakes)
        run()
        found[name] = milliseconds(run, place)
    if not place.small:
        language_model.compile_token_wise()
        run()
        found["compiled"] = milliseconds(run, place)
    expect(bool(np.isfinite(losses).all()), f"losses of the same row are {losses}")
    spread = (max(losses) - min(losses)) / abs(losses[0])
    expect(spread <= 3e-3, f"losses of the same row differ by {spread:.2g}")
    return {"milliseconds": found}
