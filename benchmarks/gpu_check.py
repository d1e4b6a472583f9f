"""What a GPU has to show before this code is trusted on it; `make gpu-check`.

Checks in the order of what they settle, each in a process of its own with a time limit: a kernel that hangs or breaks
the device ends its own check only. The JSON file is written after each, so that a loan that ends early leaves what was
found.
On a CPU the same checks run small, to see that they work.

python benchmarks/gpu_check.py [--device cuda|cpu] [--seconds 600] [--only NAME ...] [--json FILE]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import gpu
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.compiler import set_stance
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl
from torch.utils._python_dispatch import TorchDispatchMode

from llava_llama31 import LlavaLlama31ForConditionalGeneration
from llava_llama31 import packed_llama_llava_llama31 as packed
from llava_llama31.trainer.checkpoint.atomic_folders import load_tree, save_tree, write_json
from llava_llama31.trainer.data.batches.device_tiles import resized_by_products
from llava_llama31.trainer.distributed.devices import default_device, device_name, wait_for
from llava_llama31.trainer.model.flash_attention import installed_implementations
from llava_llama31.trainer.model.fused_layers import fused_fault
from llava_llama31.trainer.model.module_groups import freeze
from llava_llama31.trainer.training.optimizers import AdamWBfloat16
from llava_llama31.trainer.training.portable_state import load_portable_state, portable_state


Detail = dict[str, Any]
PACKINGS: dict[str, packed.Packing] = {
    "squares": [[300], [7], [1], [129]],
    "branches": [[257, 40, 1, 130], [64, 5, 64]],
    "rows of one": [[1], [1]],
    "many": [[12, 3]] * 60,
}
# of the largest number; bfloat16 has 8 bits
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
HEAD_SIZES = (64, 128)
IMAGE_SIZES = ((480, 640), (1024, 768), (3000, 4000))
HEAD_CHUNKS = ((256, 64), (1024, 256), (2048, 512), (4096, 1024))


@dataclass(frozen=True)
class Place:
    """Where checks run; `small` is for a CPU."""

    device: torch.device
    small: bool

    @property
    def half_types(self) -> tuple[torch.dtype, ...]:
        return () if self.device.type == "cpu" else (torch.bfloat16, torch.float16)


class Failed(Exception):
    """A check's finding."""


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Failed(otherwise)


def facts(place: Place) -> Detail:
    """Versions, the device, and whether torch computes on it."""
    found: Detail = {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    found["device"] = device_name(place.device)
    if place.device.type == "cuda":
        properties = torch.cuda.get_device_properties(place.device)
        found |= {"capability": f"{properties.major}.{properties.minor}", "memory": properties.total_memory}
        found |= {"free": torch.cuda.mem_get_info(place.device)[0], "sms": properties.multi_processor_count}
    size = 64 if place.small else 4096
    ones = torch.ones(size, size, device=place.device)
    expect(float((ones @ ones).mean()) == size, "a product of ones is wrong")
    return found


def reference_attention(heads: Sequence[torch.Tensor], plan: packed.AttentionPlan) -> torch.Tensor:
    """Attention by masks, segment by segment."""
    query, key, value = heads
    groups, outputs = query.shape[1] // key.shape[1], []
    for segment in plan.segments:
        keys, values = (segment.keys(x)[0].repeat_interleave(groups, 0) for x in (key, value))
        scores = query[0, :, segment.queries] @ keys.transpose(1, 2) * query.shape[-1] ** -0.5
        shape = (segment.num_queries, segment.num_keys)
        hidden = torch.ones(shape, dtype=torch.bool).triu(1 + shape[1] - shape[0])
        outputs.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values)
    return torch.cat(outputs, 1).transpose(0, 1)[None]


def attention(place: Place) -> Detail:
    """Packed attention, forward and backward, beside float64 masks: GQA, branches, rows of one, two head sizes.

    By PyTorch's own kernel, then by FlashAttention 3 and 4 where they are installed.
    """
    found = {"own": _largest_errors(place)}
    for name in installed_implementations(place.device):
        activate_flash_attention_impl(name)
        try:
            found[name] = _largest_errors(place)
        finally:
            restore_flash_attention_impl()
    return {"largest_error": found}


def _largest_errors(place: Place) -> dict[str, float]:
    """By type of the numbers."""
    worst: dict[str, float] = {}
    config = gpu.SHAPES["8b"].config.text_config
    for dtype in place.half_types:
        fault = packed.varlen_fault(config, place.device, dtype)
        expect(fault is None, f"{dtype}: the varlen kernel can't be used: {fault}")
    for dtype in (torch.float32, *place.half_types):
        for size in HEAD_SIZES:
            for name, packing in PACKINGS.items():
                error = _attention_error(packing, size, dtype, place.device)
                expect(error <= TOLERANCES[dtype], f"{dtype}, head size {size}, {name}: off by {error:.2g}")
                worst[str(dtype)] = max(error, worst.get(str(dtype), 0.0))
    return worst


def _attention_error(packing: packed.Packing, size: int, dtype: torch.dtype, device: torch.device) -> float:
    """The largest difference of output and gradients, as a share of the largest number; NaN where one is NaN."""
    torch.manual_seed(0)
    plan, length = packed.plan_row(packing, varlen=True), sum(map(sum, packing))
    drawn = [torch.randn(1, heads, length, size).to(dtype) for heads in (8, 2, 2)]
    weights = torch.randn(1, length, 8, size, dtype=torch.float64)
    exact = [x.double().requires_grad_() for x in drawn]
    expected = reference_attention(exact, plan)
    given = [x.to(device).requires_grad_() for x in drawn]
    output = packed.packed_attention(given[0], given[1], given[2], plan, size**-0.5)
    wanted = (expected, *torch.autograd.grad(expected, exact, weights))
    made = (output, *torch.autograd.grad(output, given, weights.to(device, dtype)))
    differences = [
        # the gradient of a query with one key is zero
        ((a.detach().double().cpu() - b.detach()).abs().max() / b.detach().abs().max().clamp_min(1.0)).item()
        for a, b in zip(made, wanted, strict=True)
    ]
    return max(differences) if all(map(np.isfinite, differences)) else float("nan")


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
    lines = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
    expect(not lines and not asked.count, f"the host waits {lines.total() or asked.count} times: {dict(lines)}")
    return {"waits": 0}


def tiles(place: Place) -> Detail:
    """The bits of Pillow's resize, and milliseconds an image."""
    found = {}
    for height, width in IMAGE_SIZES[: 1 if place.small else None]:
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = torch.from_numpy(noise).to(place.device)
        wanted = np.asarray(Image.fromarray(noise).resize((336, 336), Image.Resampling.BICUBIC))
        made = resized_by_products(image, 336, 336).cpu().numpy()
        expect(np.array_equal(made, wanted), f"{height} x {width}: other bits than Pillow's")
        found[f"{height}x{width}"] = _milliseconds(lambda image=image: resized_by_products(image, 336, 336), place)
    return {"milliseconds": found}


def _milliseconds(run: Callable[[], Any], place: Place) -> float:
    readings = []
    for _ in range(3):
        wait_for(place.device)
        started = time.perf_counter()
        run()
        wait_for(place.device)
        readings.append(time.perf_counter() - started)
    return round(statistics.median(readings) * 1e3, 3)


def head(place: Place) -> Detail:
    """The head's loss and gradients against plain cross-entropy, and milliseconds by chunk and softmax rows."""
    rows, hidden, words = (96, 32, 512) if place.small else (4096, 4096, 128_256)
    dtype = torch.float32 if place.device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    x = torch.randn(rows, hidden, device=place.device, dtype=dtype, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(words, hidden, device=place.device, dtype=dtype) * 0.02)
    targets = torch.randint(0, words, (rows,), device=place.device)
    some = slice(0, min(rows, 512))  # whose logits fit
    plain = torch.nn.functional.cross_entropy((x[some] @ weight.T).float(), targets[some], reduction="sum")
    (wanted,) = torch.autograd.grad(plain, x)
    ours = packed._LinearCrossEntropy.apply(x[some], weight, targets[some], None)
    (made,) = torch.autograd.grad(ours, x)
    tolerance, loss, plain_loss = TOLERANCES[dtype], ours.item(), plain.item()
    expect(abs(loss - plain_loss) <= tolerance * plain_loss, f"loss {loss}, plainly {plain_loss}")
    difference = ((made - wanted).abs().max() / wanted.abs().max()).item()
    expect(difference <= tolerance, f"a gradient is off by {difference:.2g}")
    found = {}
    for chunk, piece in HEAD_CHUNKS:
        sizes = packed.HeadSizes(chunk, piece, True)
        with mock.patch.multiple(packed, _HEAD_SIZES=sizes, _HEAD_SIZES_CUDA=sizes):
            run = lambda: packed._LinearCrossEntropy.apply(x, weight, targets, None).backward()  # noqa: E731
            found[f"{chunk}/{piece}"] = _milliseconds(run, place)
    return {"milliseconds": found}


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


def sharded(place: Place) -> Detail:
    """FSDP2 on this device alone: a step, its state gathered for a save, and loaded again."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    backend = dist.get_default_backend_for_device(place.device)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(place.device.type, (1,))
        torch.manual_seed(0)
        model = torch.nn.Sequential(*[torch.nn.Linear(64, 64, bias=False, device=place.device) for _ in range(3)])
        plain = [layer.weight.detach().clone().requires_grad_() for layer in model]
        for layer in model:
            fully_shard(layer, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        x = torch.randn(8, 64, device=place.device)
        model(x).square().sum().backward()
        optimizer.step()
        alone = torch.optim.AdamW(plain, lr=1e-2)
        y = x
        for weight in plain:
            y = y @ weight.T
        y.square().sum().backward()
        alone.step()
        state = portable_state(optimizer)
        assert state is not None
        for number, weight in enumerate(plain):
            wanted = alone.state[weight]["exp_avg"].cpu()
            close = torch.allclose(state["state"][number]["exp_avg"], wanted, rtol=1e-3, atol=1e-5)
            expect(close, "a gathered moment differs from that of one device")
        load_portable_state(optimizer, state)
        return {"backend": backend}
    finally:
        dist.destroy_process_group()


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
    found = {"eager": _milliseconds(run, place)}
    language_model = model.model.language_model
    if not place.small:  # a CPU compiles for a minute
        fault = fused_fault(language_model, place.device)
        expect(fault is None, f"fused arithmetic: {fault}")
    for name, remakes in (("fused", False), ("selective", True)):
        language_model.fuse((lambda function: function) if place.small else torch.compile, remakes=remakes)
        run()
        found[name] = _milliseconds(run, place)
    if not place.small:
        language_model.compile_token_wise()
        run()
        found["compiled"] = _milliseconds(run, place)
    expect(bool(np.isfinite(losses).all()), f"losses of the same row are {losses}")
    spread = (max(losses) - min(losses)) / abs(losses[0])
    expect(spread <= 3e-3, f"losses of the same row differ by {spread:.2g}")
    return {"milliseconds": found}


def speed(place: Place) -> Detail:
    """The true 8B step (on a CPU a small one): MFU and peak memory, with the largest micro-batch that fits."""
    shape = "tiny" if place.small else "8b"
    size = 2 if place.small else 8
    settings = gpu.Settings(shape, "instruct", gpu.SHARED, str(place.device), size, size, 1, 2, "adamw")
    result = gpu.largest_that_fits(settings, gpu.drive if place.small else gpu.in_own_process)
    expect(result is not None, "not even a micro-batch of one fits")
    assert result is not None
    expect(all(np.isfinite(result["losses"])), f"losses are {result['losses']}")
    # a busy CPU's peak is measured too low
    expect(0 < result["mfu"] < (1 if not place.small else float("inf")), f"an MFU of {result['mfu']:.3g} is none")
    return {key: result[key] for key in ("mfu", "hfu", "memory", "micro_batch", "seconds", "losses")}


def command(place: Place) -> Detail:
    """The command line: the demo recipe's first stage on this device, to its end."""
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, "-m", "llava_llama31.trainer.cli", "train", "tiny", "--output", folder]
        run += (
            ["--set", "stages.projector.max_steps=4", "--set", "stages.projector.epochs=null"] if place.small else []
        )
        ended = subprocess.run(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        expect(ended.returncode == 0, f"exit code {ended.returncode}: {ended.stdout[-400:]}")
        expect(Path(folder, "summary.json").is_file(), "no summary.json")
        return {"output": ended.stdout[-400:]}


@dataclass(frozen=True)
class Check:
    """A check, and the seconds that it may take on a GPU."""

    run: Callable[[Place], Detail]
    limit: float
    on_cpu: bool = True

    @property
    def name(self) -> str:
        return self.run.__name__


CHECKS = (
    Check(facts, 60),
    Check(attention, 90),
    Check(step, 90),
    Check(waits, 60),
    Check(tiles, 60),
    Check(head, 60),
    Check(optimizers, 120),
    Check(sharded, 60),
    Check(profile, 150),
    Check(speed, 300),
    Check(command, 240, on_cpu=False),
)


def run_check(check: Check, place: Place) -> dict[str, Any]:
    """The entry of a check, run in this process: `passed` says whether its finding is what it should be."""
    started = time.monotonic()
    try:
        detail, passed = check.run(place), True
    except Exception as error:  # whatever a device raises is the check's finding
        detail, passed = {"error": f"{type(error).__name__}: {str(error)[:500]}"}, False
    return {"name": check.name, "passed": passed, "seconds": round(time.monotonic() - started, 2), "detail": detail}


def in_own_process(check: Check, place: Place, seconds: float) -> dict[str, Any]:
    """`run_check` in a fresh process, ended after `seconds`."""
    started = time.monotonic()
    run = [sys.executable, __file__, "--device", str(place.device), "--check", check.name]
    try:
        ended = subprocess.run(run, capture_output=True, text=True, timeout=seconds)
        if ended.returncode == 0:
            return json.loads(ended.stdout.splitlines()[-1])
        error = f"the process ended with {ended.returncode}: {ended.stderr[-500:]}"
    except subprocess.TimeoutExpired:
        error = f"no end in {seconds:.0f} s"
    spent = round(time.monotonic() - started, 2)
    return {"name": check.name, "passed": False, "seconds": spent, "detail": {"error": error}}


def run_all(
    checks: Sequence[Check],
    place: Place,
    file: Path | None,
    seconds: float,
    run: Callable[[Check, Place, float], dict[str, Any]] = in_own_process,
) -> dict[str, Any]:
    """Run the checks; the report is written after each. What there was no time for is in `not_run`."""
    end = time.monotonic() + seconds
    report: dict[str, Any] = {"device": str(place.device), "checks": [], "not_run": [check.name for check in checks]}
    for check in checks:
        left = end - time.monotonic()
        if left <= 0:
            break
        entry = run(check, place, min(left, check.limit * (3 if place.small else 1)))
        report["checks"].append(entry)
        report["not_run"].remove(check.name)
        if file is not None:
            write_json(file, report)
        words = json.dumps(entry["detail"])
        print(
            f"{entry['name']:12}{'ok' if entry['passed'] else 'FAILED':8}{entry['seconds']:7.1f} s  {words}",
            flush=True,
        )
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a check failed or there was no time for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=None, help="default: the accelerator, else the CPU")
    parser.add_argument("--seconds", type=float, default=600, help="for all checks together")
    parser.add_argument("--only", nargs="+", choices=[check.name for check in CHECKS], metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after each check")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = options.device or default_device()
    place = Place(device, small=device.type == "cpu")
    if options.check:
        (check,) = (check for check in CHECKS if check.name == options.check)
        print(json.dumps(run_check(check, place)))
        return 0
    chosen = [
        check for check in CHECKS if (check.name in options.only if options.only else check.on_cpu or not place.small)
    ]
    report = run_all(chosen, place, options.json, options.seconds)
    return int(bool(report["not_run"]) or not all(entry["passed"] for entry in report["checks"]))


if __name__ == "__main__":
    sys.exit(main())
