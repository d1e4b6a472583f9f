"""Traces one training step of the 8B model at its real shape without its memory: tensors have shapes but no data.

Runs one rank of a fake process group, one that holds most; FakeTensor for all floating-point data; our packed path,
the real `fully_shard`, DDP and DeepSpeed engine. Prints the shapes, and the memory of the step in each of its phases.
A trainable parameter without a gradient is an error. The figures do not include the CUDA context, NCCL, kernel
workspaces and allocator fragmentation.

python benchmarks/trace_8b.py                        # the card's pretrain stage on all engines: make trace-8b
python benchmarks/trace_8b.py --engines zero3 fsdp2 --set activation_checkpointing=false --set micro_batch=1
python benchmarks/trace_8b.py --shape small --json
python benchmarks/trace_8b.py --shape recipe --recipe llama31-8b-qlora-24gb --stage instruct --engines single
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.utils import patch_environment
from gpu import SHAPES
from peak_memory import PeakMemory
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers.initialization import no_init_weights

from llava_llama31 import LlavaLlama31Config, LlavaLlama31ForConditionalGeneration
from llava_llama31.packed_llama_llava_llama31 import _HEAD_SIZES
from llava_llama31.trainer.costs.memory import ENGINES as ENGINES_OF_PLAN
from llava_llama31.trainer.costs.memory import Memory, MicroBatch, estimate
from llava_llama31.trainer.distributed.engine import fsdp_plugin
from llava_llama31.trainer.model.adapters import adapt
from llava_llama31.trainer.model.device_options import checkpoint_activations
from llava_llama31.trainer.model.module_groups import freeze, group_parameters
from llava_llama31.trainer.planning.model_sizes import model_config
from llava_llama31.trainer.planning.plan import setup_of
from llava_llama31.trainer.recipes.deepspeed_files import deepspeed_content
from llava_llama31.trainer.recipes.loading import load_recipe
from llava_llama31.trainer.recipes.schema import Recipe, Stage
from llava_llama31.trainer.training.optimizers import AdamWBfloat16


ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
# of the devices under ZeRO-1 one with neither head nor embedding in its share, under ZeRO-2 the head's: they hold most
BUSIEST = {"zero1": -2, "zero2": -1}
STEPS = 2  # the optimizer creates its state in the first
NUM_TEXT, NUM_SUPERVISED = 1184, 256  # tokens of a sample after its image
GB = 1e9


class RealIndices(TorchDispatchMode):
    """Computes on real tensors (indices, made beforehand), so that `nonzero` has a result.

    A number read from a fake tensor is 0: the only decision made on losses and norms is whether they are finite.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if DTensor in types:  # it comes back with its local tensor
            return NotImplemented
        tensors = [x for x in tree_iter((args, kwargs or {})) if isinstance(x, torch.Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(tensors[0], FakeTensor):
            return 0.0 if tensors[0].is_floating_point() else 0
        if tensors and not any(isinstance(x, FakeTensor) for x in tensors):
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Row:
    """Layout of a micro-batch: trees of positions, each starting with one image of a given size."""

    packing: list[list[int]]
    image_sizes: list[tuple[int, int]]
    supervised: list[int]
    num_tiles: int
    num_features: list[int]

    @property
    def num_tokens(self) -> int:
        return sum(map(sum, self.packing))


def make_row(config: LlavaLlama31Config, num_samples: int, num_text: int, num_supervised: int) -> Row:
    """Samples with one image of two by two tiles each and their answer at the end."""
    with torch.device("meta"):
        layouts = LlavaLlama31ForConditionalGeneration(config).model
    size = (2 * config.vision_config.image_size,) * 2
    layout, (tiles, _) = layouts.feature_layout([size])
    length = len(layout) + num_text
    supervised = [n * length + i for n in range(num_samples) for i in range(length - num_supervised - 1, length - 1)]
    return Row(
        [[length]] * num_samples, [size] * num_samples, supervised, tiles * num_samples, [len(layout)] * num_samples
    )


def batch_of(row: Row, config: LlavaLlama31Config, dtype: torch.dtype) -> dict[str, Any]:
    """The row in the collator's format; call outside fake mode, except for `pixel_values`."""
    total, begins = row.num_tokens, [0]
    for tree in row.packing:
        begins.append(begins[-1] + sum(tree))
    labels = torch.full((1, total), -100)
    labels[0, torch.tensor(row.supervised) + 1] = 1
    images = [torch.arange(begin, begin + n) for begin, n in zip(begins[:-1], row.num_features, strict=True)]
    return {
        "input_ids": torch.zeros(1, total, dtype=torch.long),
        "labels": labels,
        "position_ids": torch.cat([torch.arange(sum(tree)) for tree in row.packing])[None],
        "packing": row.packing,
        "image_sizes": row.image_sizes,
        "image_positions": torch.cat(images),
        "supervised_positions": row.supervised,
    }


@dataclass
class Traced:
    """A rank's bytes; `missing` are trainable parameters without a gradient, `shapes` those of the step's tensors."""

    engine: str
    states: int = 0
    forward: int = 0
    backward: int = 0
    step: int = 0
    missing: list[str] = field(default_factory=list)
    shapes: dict[str, Any] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward, self.step)


def trace(
    config: LlavaLlama31Config,
    stage: Stage,
    row: Row,
    engine: str,
    num_devices: int,
    *,
    accumulation: int = 1,
    fake: bool = True,
    rank: int = 0,
) -> Traced:
    """Two optimizer steps of one rank; the memory is that of the second. Without `fake` they run on real data."""
    batch = batch_of(row, config, torch.float32)
    with torch.device("meta"):
        layouts = LlavaLlama31ForConditionalGeneration(config).model
    layouts.feature_layout(row.image_sizes)
    traced, memory = Traced(engine), PeakMemory(fake=fake)
    modes = (FakeTensorMode(allow_non_fake_inputs=True), RealIndices()) if fake else ()
    with ExitStack() as stack:
        for context in (_world(engine, num_devices, rank), *modes, memory):
            stack.enter_context(context)
        model, run = _RUNS[engine](config, stage, num_devices, accumulation)
        model.model._layouts = layouts._layouts
        if stage.recomputed == "selective":
            model.model.language_model.fuse(memory.as_one_kernel, remakes=True)
        dtype = torch.float32 if stage.precision == "float32" else torch.bfloat16
        side = config.vision_config.image_size
        batch["pixel_values"] = torch.zeros(row.num_tiles, 3, side, side, dtype=dtype)
        memory.watch(list(model.parameters()))
        for _ in range(STEPS):
            memory.restart()
            for number in range(1, accumulation + 1):
                with run.before_the_last() if number < accumulation else nullcontext():
                    loss = run.forward(batch)
                    traced.forward = memory.restart()
                    run.backward(loss)
                    del loss
                    traced.backward = memory.restart()
            traced.missing = run.without_gradient()
            run.step()
            traced.step = memory.restart()
            traced.states = memory.now
    traced.shapes = {"positions": row.num_tokens, "tiles": row.num_tiles, "supervised": len(row.supervised)}
    return traced


@contextmanager
def _world(engine: str, num_devices: int, rank: int) -> Iterator[None]:
    if engine == "single":
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_devices)
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Run:
    """A model under an engine: forward, backward, step."""

    def __init__(self, model: LlavaLlama31ForConditionalGeneration, wrapped: nn.Module, stage: Stage, autocast: bool):
        self.model, self.wrapped, self.stage = model, wrapped, stage
        self.autocast = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(stage, self.trained)

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        with self.autocast:
            return self.wrapped(**batch, num_items_in_batch=100).loss

    def before_the_last(self) -> AbstractContextManager[None]:
        """Around a micro-batch whose gradients are not reduced yet, as the Trainer has it."""
        if isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            return self.wrapped.no_sync()
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def without_gradient(self) -> list[str]:
        return [name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None]

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.trained, self.stage.max_grad_norm, foreach=False)
        self.optimizer.step()
        self.optimizer.zero_grad()


def make_optimizer(stage: Stage, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if stage.optimizer == "adamw_bf16":
        return AdamWBfloat16([{"params": parameters}], 1e-5)
    return torch.optim.AdamW(parameters, lr=1e-5, fused=True)


class _DeepSpeedRun(_Run):
    """A run through DeepSpeed's engine, which casts, accumulates, clips and steps by itself."""

    def __init__(self, model: LlavaLlama31ForConditionalGeneration, settings: dict[str, Any], stage: Stage):
        import deepspeed

        self.model, self.stage, self.autocast = model, stage, nullcontext()
        trained = [p for p in model.parameters() if p.requires_grad]
        self.wrapped, *_ = deepspeed.initialize(
            model=model, optimizer=make_optimizer(stage, trained), config=settings, dist_init_required=False
        )
        self.reduced: set[int] = set()
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda p: self.reduced.add(id(p)))

    def backward(self, loss: torch.Tensor) -> None:
        self.wrapped.backward(loss)
        if not self.wrapped.is_gradient_accumulation_boundary():
            self.wrapped.step()  # counts

    def without_gradient(self) -> list[str]:
        # the engine removes gradients as they arrive
        return [n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in self.reduced]

    def step(self) -> None:
        self.wrapped.step()


def _make_model(config: LlavaLlama31Config, stage: Stage, dtype: torch.dtype) -> LlavaLlama31ForConditionalGeneration:
    is_fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    with no_init_weights() if is_fake else nullcontext():
        model = LlavaLlama31ForConditionalGeneration._from_config(config, dtype=dtype, packable=True)
    model.tie_weights()  # without initial values it has not been done
    if stage.lora is not None and stage.lora.quantize:
        pack_linears(model.model.language_model.layers)
    return model.train()


class _PackedProduct(torch.autograd.Function):
    """bitsandbytes' product with 4-bit weights: they are widened in each direction, and not kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, num_outputs: int) -> torch.Tensor:
        ctx.shape = (num_outputs, x.shape[-1])
        return nn.functional.linear(x, x.new_empty(ctx.shape))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] @ gradients[0].new_empty(ctx.shape), None


class PackedLinear(nn.Linear):
    """The tensors of a linear layer in NF4 with double quantization; bitsandbytes has no fake ones."""

    def pack(self) -> None:
        number = self.weight.numel()
        for name, size, dtype in (
            ("scales", number // 64, torch.uint8),
            ("scales_of_scales", number // 64 // 256, torch.float32),
        ):
            self.register_buffer(name, torch.empty(size, dtype=dtype))
        shape = self.weight.shape
        self.weight = nn.Parameter(torch.empty(number // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.weight.quant_state = SimpleNamespace(shape=shape)  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x
        return _PackedProduct.apply(x, self.out_features).clone()  # PEFT copies the result of a 4-bit layer


def pack_linears(layers: nn.Module) -> None:
    for module in list(layers.modules()):
        if type(module) is nn.Linear:
            module.__class__ = PackedLinear
            module.pack()


def _prepare(model: LlavaLlama31ForConditionalGeneration, stage: Stage, *, narrows: bool) -> None:
    """What `runs/stage.py` does before the Trainer; adapters are put into the model in place."""
    if stage.lora is not None:
        # PEFT moves its adapters to where they are; fake tensors refuse the swap that this is
        with mock.patch.object(nn.Module, "to", lambda module, *_, **__: module):
            adapt(model, stage.lora, seed=0, where="", groups=stage.adapted)
    report = freeze(model, stage.learning_rates(), freeze_image_newline="frozen_image_newline" in stage.quirks)
    if stage.precision == "bfloat16" and narrows:
        for line in report:
            if line.num_trainable == 0 or line.group in stage.adapted:
                for _, parameter in group_parameters(model, line.group):
                    if not parameter.requires_grad and parameter.is_floating_point():
                        parameter.data = parameter.data.to(torch.bfloat16)
    if stage.recomputed:
        checkpoint_activations(model, stage.trainable, stage.recomputed)


def _plain(config: LlavaLlama31Config, stage: Stage, *, narrows: bool = True) -> LlavaLlama31ForConditionalGeneration:
    dtype = torch.bfloat16 if stage.precision == "bfloat16-weights" else torch.float32
    model = _make_model(config, stage, dtype)
    _prepare(model, stage, narrows=narrows)
    return model


def _single(config: LlavaLlama31Config, stage: Stage, num_devices: int, accumulation: int) -> tuple[nn.Module, _Run]:
    model = _plain(config, stage)
    return model, _Run(model, model, stage, stage.precision != "float32")


def _ddp(config: LlavaLlama31Config, stage: Stage, num_devices: int, accumulation: int) -> tuple[nn.Module, _Run]:
    model = _plain(config, stage)
    # unused parameters are looked for, as they aren't in training: else DDP reads its buckets, which are fake
    wrapped = nn.parallel.DistributedDataParallel(
        model, init_sync=False, find_unused_parameters=True, gradient_as_bucket_view=True
    )
    wrapped.register_comm_hook(None, _reduced_alone)
    return model, _Run(model, wrapped, stage, stage.precision != "float32")


def _reduced_alone(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's all-reduce without the other ranks; the fake group's own returns nothing."""
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def _fsdp2(config: LlavaLlama31Config, stage: Stage, num_devices: int, accumulation: int) -> tuple[nn.Module, _Run]:
    """Wrap a model like Accelerate's `fsdp2_prepare_model`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = _plain(config, stage, narrows=False)
    with unset_fake_temporarily():
        mesh = init_device_mesh("cpu", (num_devices,))
    with patch_environment(FSDP_VERSION="2"):  # as `accelerate launch` sets it
        policy = fsdp_plugin(bfloat16=stage.precision != "float32").mixed_precision_policy
    inner = model.model
    for layer in (*inner.vision_tower.encoder.layers, *inner.language_model.layers):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(inner.language_model.embed_tokens, mesh=mesh, mp_policy=policy)
    fully_shard([inner.language_model.norm, model.lm_head], mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model, _Run(model, model, stage, stage.precision != "float32")


def _deepspeed(number: int) -> Any:
    def make(config: LlavaLlama31Config, stage: Stage, num_devices: int, accumulation: int) -> tuple[nn.Module, _Run]:
        import deepspeed

        _quiet_deepspeed(num_devices)
        settings = deepspeed_settings(number, stage, config, num_devices, accumulation)
        half = stage.precision != "float32"
        if number == 3:
            with deepspeed.zero.Init(config_dict_or_path=settings):
                model = _make_model(config, stage, torch.bfloat16 if half else torch.float32)
        else:
            model = _make_model(config, stage, torch.bfloat16 if half else torch.float32)
            model._apply = lambda *_: (
                model
            )  # the engine's own cast would swap the parameters, which fake tensors do not support
        _prepare(model, stage, narrows=False)
        return model, _DeepSpeedRun(model, settings, stage)

    return make


def deepspeed_settings(
    number: int, stage: Stage, config: LlavaLlama31Config, num_devices: int, accumulation: int
) -> dict[str, Any]:
    """The stage's file's settings, with Transformers' values for "auto"."""
    hidden = config.text_config.hidden_size
    shipped = deepspeed_content(stage.deepspeed or f"zero{number}", "the stage")
    auto = {"stage3_param_persistence_threshold": 10 * hidden, "reduce_bucket_size": hidden**2}
    auto["stage3_prefetch_bucket_size"] = int(0.9 * hidden**2)
    zero = {key: auto[key] if value == "auto" else value for key, value in shipped["zero_optimization"].items()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": accumulation * num_devices,
        "gradient_clipping": stage.max_grad_norm,
        "bf16": {"enabled": stage.precision != "float32"},
        "data_types": shipped.get("data_types", {}),
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }


def _quiet_deepspeed(num_devices: int) -> None:
    """Join the fake group, and skip everything that communicates with the missing ranks."""
    import deepspeed
    import deepspeed.runtime.zero.partition_parameters
    import deepspeed.runtime.zero.partitioned_param_coordinator
    import deepspeed.runtime.zero.utils

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": "0", "WORLD_SIZE": str(num_devices)}
    with unset_fake_temporarily():
        deepspeed.init_distributed(dist_backend="fake", dist_init_required=False, verbose=False)
    for module in (
        deepspeed.runtime.zero.utils,
        deepspeed.runtime.zero.partitioned_param_coordinator,
        deepspeed.runtime.zero.partition_parameters,
    ):
        if "assert_ints_same_as_other_ranks" in vars(module):
            module.assert_ints_same_as_other_ranks = lambda ints: None  # type: ignore[attr-defined]


_RUNS = {
    "single": _single,
    "ddp": _ddp,
    "fsdp2": _fsdp2,
    "zero1": _deepspeed(1),
    "zero2": _deepspeed(2),
    "zero3": _deepspeed(3),
}


def planned(
    config: LlavaLlama31Config, stage: Stage, row: Row, engine: str, num_devices: int, accumulates: bool
) -> Memory:
    """`llava-llama31 plan`'s prediction for the same step, with a CPU's attention, since the trace runs on a CPU."""
    kind = ENGINES_OF_PLAN["ddp" if engine == "single" else engine]
    groups = {"vision_tower", "multi_modal_projector", "language_model"} - set(stage.trainable)
    groups |= set(stage.adapted)
    setup = setup_of(stage, config.to_dict(), kind, frozenset(groups), accumulates)
    batch = MicroBatch(
        num_tokens=row.num_tokens,
        num_keys=row.num_tokens,
        num_supervised=len(row.supervised),
        num_last_queries=len(row.supervised),
        num_tiles=row.num_tiles,
        num_features=sum(row.num_features),
        copies_attention=True,
        fuses=False,
        head_rows=_HEAD_SIZES.rows,
        softmax_rows=_HEAD_SIZES.softmax_rows,
    )
    return estimate(setup, batch, kind, 1 if engine == "single" else num_devices)


PHASES = ("forward", "backward", "step", "peak")


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Compare traced and planned GB of one engine."""
    engine = options.engines[0]
    prefix = f"stages.{options.stage}."
    overrides = [f"{prefix}deepspeed={engine if engine.startswith('zero') else 'null'}"]
    overrides += [f"{prefix}{override}" for override in options.overrides]
    recipe = load_recipe(options.recipe, overrides=overrides)
    stage = recipe.stages[options.stage]
    config = config_of(recipe) if options.shape == "recipe" else SHAPES[options.shape].config
    row = make_row(config, stage.micro_batch, NUM_TEXT, NUM_SUPERVISED)
    traced = trace(
        config,
        stage,
        row,
        engine,
        options.devices,
        accumulation=options.accumulation,
        fake=not options.real,
        rank=(BUSIEST.get(engine, 0) if options.rank is None else options.rank) % options.devices,
    )
    plan = planned(config, stage, row, engine, options.devices, options.accumulation > 1)
    return {
        "engine": engine,
        "stage": options.stage,
        "micro_batch": stage.micro_batch,
        "accumulation": options.accumulation,
        "overrides": options.overrides,
        "missing": traced.missing,
        "shapes": traced.shapes,
        "traced": {name: getattr(traced, name) / GB for name in PHASES},
        "planned": {name: getattr(plan, "of_a_step" if name == "peak" else name) / GB for name in PHASES},
    }


def config_of(recipe: Recipe) -> LlavaLlama31Config:
    """The recipe's own model, from what the package knows of published parts."""
    found = model_config(recipe, Path("no-run"))
    assert found is not None, f"the parts of {recipe.name} are not known"
    return LlavaLlama31Config.from_dict({key: value for key, value in found[0].items() if key != "model_type"})


def in_own_process(engine: str, arguments: Sequence[str]) -> dict[str, Any]:
    """`compare` in a fresh process: DeepSpeed remembers the former group."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *arguments, "--engines", engine, "--drive"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(f"{engine}: {run.stderr[-3000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def print_result(result: dict[str, Any]) -> None:
    shapes = ", ".join(f"{number:,} {name}" for name, number in result["shapes"].items())
    columns = []
    for name in PHASES:
        traced, plan = result["traced"][name], result["planned"][name]
        columns.append(f"{name} {traced:7.2f} {plan:7.2f} {plan / traced - 1:+6.1%}")
    print(f"{result['engine']:7} {shapes}; GB traced, planned: {'; '.join(columns)}")
    if result["missing"]:
        print(f"  no gradient: {', '.join(result['missing'][:5])} and others, {len(result['missing'])} in all")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--shape", choices=(*SHAPES, "recipe"), default="8b")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--rank", type=int, help="the device that is traced; by default one that holds most")
    parser.add_argument("--recipe", default="llama31-8b-card")
    parser.add_argument("--stage", default="pretrain")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--real", action="store_true", help="compute on real data; for --shape small")
    parser.add_argument("--json", action="store_true", help="print one JSON object: the results are its `engines`")
    parser.add_argument("--drive", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    """Returns 1 if a trainable parameter has no gradient."""
    options = parse()
    if options.drive:
        print(json.dumps(compare(options)))
        return 0
    arguments = [argument for argument in sys.argv[1:] if argument != "--json"]
    results = []
    for engine in options.engines:
        results.append(in_own_process(engine, arguments))
        if not options.json:
            print_result(results[-1])
    if options.json:
        print(json.dumps({"engines": results}, indent=1))
    return int(any(result["missing"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
