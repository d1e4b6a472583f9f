"""Steps on the fake device, each as the product runs it: what they wait for, copy, start and move."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "benchmarks")]

import library


library.load()

import gpu
import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from fused import Fused, add_fused
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.initialization import no_init_weights
from watch import CUDA, Trace, Watch, fake_cuda

from llava_llama31 import LlavaLlama31ForConditionalGeneration
from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.data.batches.collator import Sample
from llava_llama31.trainer.data.batches.device_tiles import DeviceTiles
from llava_llama31.trainer.distributed.engine import fsdp_plugin
from llava_llama31.trainer.distributed.parameters import whole_parameters
from llava_llama31.trainer.evaluation.generation import GreedyAnswerer
from llava_llama31.trainer.fault_tolerance.step_health import summed
from llava_llama31.trainer.model.adapters import adapt
from llava_llama31.trainer.model.device_options import checkpoint_activations
from llava_llama31.trainer.model.module_groups import freeze
from llava_llama31.trainer.recipes.schema import Lora, Recomputed
from llava_llama31.trainer.training.llava_trainer import LlavaTrainer
from llava_llama31.trainer.training.portable_state import portable_state
from llava_llama31.trainer.training.source_losses import SourceLosses


ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Step:
    """One training step.

    Args:
        shape: of gpu.py.
        stage: of the recipe llama31-8b-card.
        autocast: float32 weights, computed with in bfloat16; else all in bfloat16.
        rank: of LoRA adapters; 0: none.
        checkpointing: of every nth layer; 0: none.
        images: how they come: `tiles`, `pixels` (device_tiles) or `features` (cached).
        varlen: the device's attention kernel is used.
        fused: norms, rotary embeddings and gated products are compiled.
    """

    shape: gpu.Shape
    stage: str = "instruct"
    micro_batch: int = 8
    autocast: bool = False
    rank: int = 0
    checkpointing: Recomputed = 1
    images: str = "tiles"
    varlen: bool = True
    fused: bool = True


def make_model(step: Step, watch: Watch, *, narrows: bool = True) -> LlavaLlama31ForConditionalGeneration:
    """A model with fake weights on the device, frozen as the stage wants it; `narrows` those to bfloat16."""
    dtype = torch.float32 if step.autocast else torch.bfloat16
    stage = gpu.card_stage(step.stage)
    with torch.device("meta"), no_init_weights():  # adapters can't be put onto fake weights
        model = LlavaLlama31ForConditionalGeneration._from_config(step.shape.config, dtype=dtype, packable=True)
        if step.rank:
            adapt(model, Lora(r=step.rank), seed=0, where="")
    freeze(model, stage.learning_rates())
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            narrow = torch.bfloat16 if narrows and not parameter.requires_grad else parameter.dtype
            there = torch.empty(parameter.shape, dtype=narrow, device=CUDA)
            module.register_parameter(name, torch.nn.Parameter(there, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty_like(buffer, device=CUDA), persistent=False)
    model.model.language_model.uses_varlen = {torch.bfloat16: step.varlen}
    language_model = model.model.language_model
    if step.fused:
        language_model.fuse(lambda function: Fused(function, watch), remakes=step.checkpointing == "selective")
    if step.checkpointing:
        checkpoint_activations(model, stage.trainable, step.checkpointing)
    return model.train()


def make_batches(step: Step, watch: Watch, number: int) -> list[dict[str, Any]]:
    """One micro-batch for each step, as the loader gives it: on the host, pinned."""
    workload = gpu.Workload(
        step.shape,
        gpu.card_stage(step.stage),
        num_samples=number * step.micro_batch,
        samples_per_step=step.micro_batch,
    )
    collate = workload.collator(gpu.SHARED)
    rows = [row for rows in workload.micro_batches(gpu.SHARED, step.micro_batch) for row in rows]
    batches = [collate([_with_images(step, workload, sample) for sample in row]) for row in rows]
    return [{name: _pinned(watch, value) for name, value in batch.items()} for batch in batches]


def _with_images(step: Step, workload: gpu.Workload, sample: Sample) -> Sample:
    if step.images == "tiles":
        return workload.with_pixels(sample)
    if step.images == "pixels":
        ((height, width),) = sample.image_sizes
        return sample._replace(pixel_values=None, pixels=(torch.zeros(height, width, 3, dtype=torch.uint8),))
    vision = step.shape.config.vision_config
    size = (len(sample.pixel_values), (vision.image_size // vision.patch_size) ** 2, vision.hidden_size)
    return sample._replace(
        pixel_values=None, image_features=torch.zeros(size, dtype=torch.bfloat16), has_features=[True]
    )


def _pinned(watch: Watch, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return watch.pinned(value)
    return [_pinned(watch, item) for item in value] if isinstance(value, list) else value


def _moments(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any] | None:
    """What a save gathers, of fake tensors."""
    with mock.patch("llava_llama31.trainer.training.portable_state._is_plain", lambda value: True):
        return portable_state(optimizer, keep=keep)


def _trainer(tiles: DeviceTiles | None) -> Any:
    """What sends a micro-batch to the device."""
    trainer: Any = LlavaTrainer.__new__(LlavaTrainer)
    trainer.args, trainer.is_deepspeed_enabled = SimpleNamespace(device=CUDA, world_size=1), False
    trainer.batches = SimpleNamespace(device_tiles=tiles)
    return trainer


def train(
    step: Step,
    processor: LlavaLlama31Processor | None = None,
    plant: Callable[[Any], None] = lambda model: None,
    *,
    saves: bool = True,
) -> dict[str, Trace]:
    """The second of two steps, by phase, and a save's gather of moments, which are real on the host: 32 GB at 8B.

    In the first step, masks and filters that are kept are made.

    Args:
        processor: for `pixels`.
        plant: does something to the model first.
    """
    watch = Watch(ROOT)
    watch.phase = "make"
    batches = make_batches(step, watch, 2)
    tiles = DeviceTiles(processor, torch.bfloat16) if step.images == "pixels" and processor is not None else None
    trainer = _trainer(tiles)
    with fake_cuda(watch):
        trainer.model = model = make_model(step, watch)
        trainer.sources = SourceLosses(("rows",), CUDA)
        plant(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        autocast = torch.autocast("cuda", torch.bfloat16) if step.autocast else nullcontext()
        for number, batch in enumerate(batches):
            is_last = number == len(batches) - 1
            watch.phase = "inputs" if is_last else "first"
            number = trainer._get_num_items_in_batch([batch], CUDA)
            given = trainer._prepare_inputs(batch)
            watch.phase = "forward" if is_last else "first"
            with autocast:
                loss = model(**given, num_items_in_batch=number).loss
            watch.phase = "backward" if is_last else "first"
            loss.backward()
            assert all(parameter.grad is not None for parameter in trained)
            watch.phase = "clip" if is_last else "first"
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            watch.phase = "judge" if is_last else "first"
            summed([0.0, 0.0, torch.stack([loss.detach()]).sum(), norm], CUDA)
            watch.phase = "optimizer" if is_last else "first"
            optimizer.step()
            optimizer.zero_grad()
        watch.phase = "save"
        if saves:
            _moments(optimizer, keep=True)
    for phase in ("make", "first"):
        watch.traces.pop(phase, None)  # before what it fuses is scheduled
    add_fused(watch)
    return dict(watch.traces)


def sharded(step: Step, *, rank: int) -> dict[str, Trace]:
    """A step and a save under FSDP2, as one of two ranks sees them; the other one is not there."""
    watch = Watch(ROOT)
    watch.phase = "make"
    (batch,) = make_batches(step, watch, 1)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    try:
        with fake_cuda(watch), mock.patch.object(PartialState, "is_main_process", rank == 0):
            mesh, model = init_device_mesh("cuda", (2,)), make_model(step, watch, narrows=False)
            with mock.patch.dict(os.environ, {"FSDP_VERSION": "2"}):  # as `accelerate launch` sets it
                policy = fsdp_plugin(bfloat16=True).mixed_precision_policy
            language_model = model.model.language_model
            for part in (*model.model.vision_tower.encoder.layers, *language_model.layers, model):
                fully_shard(part, mesh=mesh, mp_policy=policy)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
            trainer = _trainer(None)
            trainer.model, trainer.sources = model, SourceLosses(("rows",), CUDA)
            watch.phase = "inputs"
            there = trainer._prepare_inputs(batch)
            watch.phase = "forward"
            loss = model(**there, num_items_in_batch=100).loss
            watch.phase = "backward"
            loss.backward()
            watch.phase = "clip"
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            watch.phase = "optimizer"
            optimizer.step()
            watch.phase = "moments"
            state = _moments(optimizer, keep=rank == 0)
            watch.phase = "weights"
            weights = whole_parameters(model.named_parameters(), deepspeed=False)
            assert bool(state) == bool(weights) == (rank == 0)
    finally:
        dist.destroy_process_group()
    add_fused(watch)
    return {phase: trace for phase, trace in watch.traces.items() if phase != "make"}


def answer(shape: gpu.Shape, processor: LlavaLlama31Processor, sizes: Sequence[tuple[int, int]]) -> dict[str, Trace]:
    """Answers to two questions about each image of these (height, width)."""
    watch = Watch(ROOT)
    watch.phase = "make"
    with fake_cuda(watch):
        model = make_model(Step(shape, checkpointing=0), watch).eval()
        answerer = GreedyAnswerer(model, processor, max_new_tokens=6)
        asked: list[tuple[dict[str, Any], list[Image.Image]]] = []
        for size in sizes:
            image = Image.fromarray(np.zeros((*size, 3), dtype=np.uint8))
            for text in ("what is it?", "of which colour is it?"):
                content = [{"type": "image"}, {"type": "text", "text": text}]
                asked.append(({"role": "user", "content": content}, [image]))
        prompts = [answerer.prompt([turn], images) for turn, images in asked]
        watch.phase = "answer"
        answers = answerer.answer(prompts)
    assert len(answers) == len(asked)
    return {phase: trace for phase, trace in watch.traces.items() if phase != "make"}
