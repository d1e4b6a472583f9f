"""Measures training speed of LLaVA-1.6 at Llama 3.1 8B's size on one GPU, against stock Transformers on the same rows.

The model has random bfloat16 weights made on the device, activation checkpointing, fused AdamW with bfloat16 states
and gradient clipping, so that everything fits in 80 GB. The rows have the lengths of the model card's data:
anyres images at 336 px, conversations like llava-instruct's (two per image) and captions like llava-pretrain's. Ours
packs them, with and without sharing images; stock LlavaNext pads them on the right and computes its own loss. Each
runs in a separate process, with the largest micro-batch that fits. Preparing the data is not timed, copying it is.

`--set` gives ours other settings of the stage, as a recipe has them: compile, fp8, activation_checkpointing.
FlashAttention 3 and 4 are used where they are installed. `--breakdown` adds the milliseconds of one more step by
kernel. A variant that fails is named in `failed`, one for which `--seconds` did not suffice in `not_run`;
`--output FILE` is written after each.

The hours of the card's stages are counted work at the measured MFU: eight devices that wait neither for each other nor
for data, without evaluation or checkpoints.

python benchmarks/gpu.py            # minutes for each stage on a GPU; on a CPU the small shape
python benchmarks/gpu.py --stages instruct --steps 10 --json
python benchmarks/gpu.py --stages instruct --set activation_checkpointing=selective --breakdown --output gpu.json
python benchmarks/gpu.py --small
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlavaNextForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from llava_llama31 import LlavaLlama31Config, LlavaLlama31ForConditionalGeneration
from llava_llama31.checkpoint_parts import VISION_TOWERS
from llava_llama31.processing import IGNORE_INDEX
from llava_llama31.tile_grids import GRID_SHAPES
from llava_llama31.trainer.checkpoint.atomic_folders import write_json
from llava_llama31.trainer.costs.flops import Flops, ModelShape, Work, hfu, mfu, needed_flops
from llava_llama31.trainer.costs.matrix_peak import cpu_instructions
from llava_llama31.trainer.data.batches.batch_order import BatchOrder, Lengths, RankBatches
from llava_llama31.trainer.data.batches.collator import Collator, Sample
from llava_llama31.trainer.fault_tolerance.out_of_memory import is_of_device
from llava_llama31.trainer.model.device_options import FLOAT8_MULTIPLE
from llava_llama31.trainer.model.flash_attention import faster_attention
from llava_llama31.trainer.model.module_groups import freeze
from llava_llama31.trainer.model.stage_model import check_attention, use_device_options
from llava_llama31.trainer.recipes.derived import derive, num_held_out
from llava_llama31.trainer.recipes.loading import load_recipe
from llava_llama31.trainer.recipes.schema import Stage
from llava_llama31.trainer.training.meter import matrix_peak, peak_memory
from llava_llama31.trainer.training.optimizers import AdamWBfloat16


RECIPE = "llama31-8b-card"
NUM_DEVICES = 8
DTYPE = torch.bfloat16
SEED = 0
SHARED, PACKED, STOCK = "shared", "packed", "stock"
OUT_OF_MEMORY = 3  # exit code of a run whose micro-batch does not fit
LOSS_TOLERANCE = 3e-3  # relative, for every step; bfloat16 sums differ
NORM_TOLERANCE = 3e-2  # relative, of all gradients of the first step
NUM_COUNTED = 256  # samples that a stage's work is estimated from

# (height, width) of images and how often: 2,140 features on average at 336 px
SIZES = {(427, 640): 6, (480, 640): 2, (360, 640): 2, (640, 427): 1}
# rounds per conversation, and how often
ROUNDS = {1: 11, 2: 2, 3: 4, 4: 3}
# tokens that the chat template puts before an image, around a question, and before an answer
BEFORE_IMAGE, AROUND_QUESTION, BEFORE_ANSWER = 5, 5, 4


@dataclass(frozen=True)
class DataSet:
    """One of the card's data sets.

    Args:
        num_rows: of the published file.
        per_image: conversations about one image.
    """

    num_rows: int
    per_image: int


DATA_SETS = {
    "llava-pretrain": DataSet(num_rows=558_128, per_image=1),
    "llava-instruct-150k": DataSet(num_rows=157_712, per_image=2),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; `num_words` is the vocabulary without the image token and the padding to 64."""

    text: dict[str, Any]
    vision: dict[str, Any]
    num_words: int
    tied: bool = False

    @cached_property
    def config(self) -> LlavaLlama31Config:
        tile = self.vision["image_size"]
        text = LlamaConfig(
            **self.text,
            vocab_size=-(-(self.num_words + 1) // 64) * 64,
            max_position_embeddings=131_072,
            tie_word_embeddings=self.tied,
            pad_token_id=self.num_words - 1,
            use_cache=False,
        )
        vision = AutoConfig.for_model(**{"model_type": "clip_vision_model"} | self.vision)
        family = VISION_TOWERS[vision.model_type]
        return LlavaLlama31Config(
            vision_config=vision,
            text_config=text,
            image_token_index=self.num_words,
            image_seq_length=(tile // self.vision["patch_size"]) ** 2,
            image_grid_pinpoints=[[tile * rows, tile * columns] for rows, columns in GRID_SHAPES],
            vision_feature_layer=-2,
            vision_feature_select_strategy=family.select_strategy,
            tie_word_embeddings=self.tied,
        )


LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
CLIP_L_336: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
SMALL_LLAMA: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
SMALL_CLIP: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 112,
    "patch_size": 14,
    "projection_dim": 128,
}
# google/siglip-so400m-patch14-384 and google/siglip2-so400m-patch14-384
SIGLIP_SO400M_384: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
SMALL_SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 144,
    "intermediate_size": 536,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 128,
    "patch_size": 14,
    "vision_use_head": False,
}
# Llama 3.2
LLAMA_1B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
LLAMA_3B: dict[str, Any] = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
SHAPES = {
    "8b": Shape(LLAMA_8B, CLIP_L_336, 128_256),
    "8b-siglip": Shape(LLAMA_8B, SIGLIP_SO400M_384, 128_256),
    "1b": Shape(LLAMA_1B, SIGLIP_SO400M_384, 128_256, tied=True),
    "3b": Shape(LLAMA_3B, SIGLIP_SO400M_384, 128_256, tied=True),
    "small": Shape(SMALL_LLAMA, SMALL_CLIP, 16_000),
    "small-siglip": Shape(SMALL_LLAMA, SMALL_SIGLIP, 16_000),
    "small-tied": Shape(SMALL_LLAMA, SMALL_SIGLIP, 16_000, tied=True),
    "tiny": Shape(
        SMALL_LLAMA | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        SMALL_CLIP | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "image_size": 56},
        500,
    ),
}


@dataclass(frozen=True)
class Settings:
    """One process's work; batches in samples.

    Args:
        overrides: KEY=VALUE of the stage, for our variants.
        breakdown: profile one more step.
    """

    shape: str
    stage: str
    variant: str
    device: str
    samples_per_step: int
    micro_batch: int
    warmup: int
    steps: int
    optimizer: str
    overrides: tuple[str, ...] = ()
    breakdown: bool = False


class Workload:
    """Rows with a stage's lengths, in our trainer's order and micro-batches.

    Args:
        num_samples: each is used once.
        samples_per_step: on one device.
    """

    def __init__(self, shape: Shape, stage: Stage, *, num_samples: int, samples_per_step: int):
        self.shape, self.stage, self.samples_per_step = shape, stage, samples_per_step
        self.data = DATA_SETS[stage.data[0].name]
        with torch.device("meta"):
            self._layouts = LlavaLlama31ForConditionalGeneration(shape.config).model
        draw = random.Random(SEED)
        num_images = -(-num_samples // self.data.per_image)
        sizes = draw.choices(list(SIZES), list(SIZES.values()), k=num_images)
        self.samples = [self._sample(draw, i % num_images, sizes[i % num_images]) for i in range(num_samples)]
        self.lengths = Lengths(
            np.array([len(sample.input_ids) for sample in self.samples]),
            np.array([_num_supervised(sample) for sample in self.samples]),
            np.array([sample.num_prefix_tokens for sample in self.samples]),
            np.array([int(sample.images[0]) + 1 for sample in self.samples]),
        )

    def _sample(self, draw: random.Random, image: int, size: tuple[int, int]) -> Sample:
        config = self.shape.config
        layout = self._layouts.feature_layout([size])[0]
        num_tiles = image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        prefix = [0] * BEFORE_IMAGE + [config.image_token_id] * len(layout)
        ids, labels = list(prefix), [IGNORE_INDEX] * len(prefix)
        for num_asked, num_answered in _conversation(draw, self.data):
            words = [draw.randrange(1, self.shape.num_words - 1) for _ in range(num_asked + num_answered)]
            ids += words
            labels += [IGNORE_INDEX] * num_asked + words[num_asked:]
        return Sample(
            record_id=str(len(ids)),
            input_ids=ids,
            labels=labels,
            pixel_values=torch.empty(num_tiles, 0),  # only counted, until `with_pixels`
            image_sizes=[size],
            num_image_tokens=len(layout),
            num_prefix_tokens=len(prefix),
            images=(str(image),),
        )

    def with_pixels(self, sample: Sample) -> Sample:
        """The sample with noise for an image, the same for the same image."""
        assert sample.pixel_values is not None
        side = self.shape.vision["image_size"]
        generator = torch.Generator().manual_seed(int(sample.images[0]))
        noise = torch.randn(len(sample.pixel_values), 3, side, side, generator=generator)
        return sample._replace(pixel_values=noise.to(DTYPE))

    def micro_batches(self, variant: str, micro_batch: int) -> list[list[list[Sample]]]:
        """Micro-batches of each step; every variant has the same samples in a step."""
        order, grouped = (
            BatchOrder(
                self.lengths, global_batch=self.samples_per_step, seed=SEED, keep_last=False, share_prefix=share
            )
            for share in (1, self.stage.share_prefix)
        )
        rows = RankBatches(
            grouped if variant == SHARED else order,
            micro_batch=micro_batch,
            rank=0,
            num_processes=1,
            packed=variant != STOCK,
        )
        steps = grouped.batches(0)
        if variant == STOCK:  # samples of similar length together: less padding
            steps = [step[np.argsort(self.lengths.num_tokens[step], kind="stable")] for step in steps]
        return [[[self.samples[i] for i in row] for row in rows.micro_batches(step)] for step in steps]

    def collator(self, variant: str, *, multiple_of: int = 1) -> Collator:
        return Collator(
            self.shape.config.text_config.pad_token_id,
            self.shape.config.image_token_id,
            packed=variant != STOCK,
            share_prefix=variant == SHARED,
            multiple_of=multiple_of,
        )

    def flops(self, variant: str, row: Sequence[Sample]) -> Flops:
        """A micro-batch's needed FLOPs: no padding, and a shared image only once."""
        batch = self.collator(SHARED if variant == SHARED else PACKED)(row)
        layout = self._layouts.feature_layout(batch["image_sizes"])[0]
        work = Work.pruned(
            batch["packing"],
            batch["supervised_positions"],
            num_tiles=len(batch["pixel_values"]),
            num_image_features=int((layout >= 0).sum()),
        )
        shape = ModelShape.of(self.shape.config)
        return needed_flops(shape, work, self.stage.trainable, checkpointing=self.stage.recomputed).total


def _num_supervised(sample: Sample) -> int:
    return sum(label != IGNORE_INDEX for label in sample.labels)


def _conversation(draw: random.Random, data: DataSet) -> list[tuple[int, int]]:
    """Tokens of each round: unsupervised and supervised."""
    if data.per_image == 1:  # captions: 15 to 24 supervised tokens
        return [(AROUND_QUESTION + draw.randint(5, 14) + BEFORE_ANSWER, draw.randint(15, 24))]
    # supervised tokens as in llava-instruct: 5, 50 and 95 % at 69, 127 and 235, mean 135
    total = math.exp(draw.gauss(math.log(127), math.log(235 / 69) / 2 / 1.645))
    num_rounds = draw.choices(list(ROUNDS), list(ROUNDS.values()))[0]
    shares = [draw.uniform(0.5, 1.5) for _ in range(num_rounds)]
    return [
        (AROUND_QUESTION + draw.randint(10, 26) + BEFORE_ANSWER, max(2, round(total * share / sum(shares))))
        for share in shares
    ]


def card_stage(name: str, overrides: Sequence[str] = ()) -> Stage:
    """The card's stage on one device, with overrides of its keys."""
    given = ["deepspeed=null", *overrides] if overrides else []
    return load_recipe(RECIPE, overrides=[f"stages.{name}.{override}" for override in given]).stages[name]


def make_model(shape: Shape, stage: Stage, variant: str, device: str) -> nn.Module:
    """Random weights, the same for all variants, made on the device."""
    with torch.device(device):
        if variant == STOCK:
            model = LlavaNextForConditionalGeneration._from_config(shape.config, dtype=DTYPE)
        else:
            model = LlavaLlama31ForConditionalGeneration._from_config(shape.config, dtype=DTYPE, packable=True)
    # the classes create their parts in different orders; norms are ones and biases zeros
    vectors = {model.model.image_newline, model.model.vision_tower.embeddings.class_embedding}
    torch.manual_seed(SEED)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1 or parameter in vectors:
                parameter.normal_(0, 0.02)
    freeze(model, stage.learning_rates())
    if variant == STOCK:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # its name at the lower bound
    else:
        use_device_options(model, stage, torch.device(device))
        check_attention(model, stage, torch.device(device))
    return model.train()


def make_optimizer(name: str, stage: Stage, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    options: dict[str, Any] = {
        "lr": max(stage.learning_rates().values()),
        "betas": (stage.adam_beta1, stage.adam_beta2),
        "weight_decay": stage.weight_decay,
    }
    if name == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    if name == "adamw-bf16":
        compiled = torch.compile if parameters[0].is_cuda else None
        return AdamWBfloat16([{"params": parameters}], **options, compiled=compiled)
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, **options)


def make_batches(
    workload: Workload, steps: Sequence[Sequence[Sequence[Sample]]], variant: str, device: str
) -> list[list[dict[str, Any]]]:
    """Micro-batches of each step on the host, as model inputs."""
    # CPU kernels for bfloat16 are built for every new shape
    multiple_of = 128 if device == "cpu" else FLOAT8_MULTIPLE if workload.stage.fp8 else 1
    collate = workload.collator(variant, multiple_of=multiple_of)
    steps_of: list[list[dict[str, Any]]] = []
    for step in steps:
        batches = [collate([workload.with_pixels(sample) for sample in row]) for row in step]
        if device != "cpu":
            batches = [{name: _pinned(value) for name, value in batch.items()} for batch in batches]
        steps_of.append(batches)
    return steps_of


def _pinned(value: Any) -> Any:
    return value.pin_memory() if isinstance(value, torch.Tensor) else value


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[dict[str, Any]], num_items: int, device: str
) -> torch.Tensor:
    """Run one optimizer step; returns its loss and gradient norm, as one tensor."""
    total = torch.zeros((), device=device)
    for batch in batches:
        there = {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
        loss = model(**there, num_items_in_batch=num_items).loss
        loss.backward()
        total += loss.detach()
    norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack([total, norm.float()])


def drive(settings: Settings) -> dict[str, Any]:
    """Speed of one variant on one stage; seconds of each timed step, memory in bytes, peak in FLOP/s."""
    device = torch.device(settings.device)
    with nullcontext() if settings.variant == STOCK else faster_attention(device):
        return _drive(settings, device)


def _drive(settings: Settings, device: torch.device) -> dict[str, Any]:
    peak = matrix_peak(DTYPE, device)
    _empty_cache(device)
    variant = settings.variant
    stage = card_stage(settings.stage, () if variant == STOCK else settings.overrides)
    workload = Workload(
        SHAPES[settings.shape],
        stage,
        num_samples=(settings.warmup + settings.steps) * settings.samples_per_step,
        samples_per_step=settings.samples_per_step,
    )
    steps = workload.micro_batches(variant, settings.micro_batch)
    batches = make_batches(workload, steps, variant, settings.device)
    num_items = [sum(_num_supervised(sample) for row in step for sample in row) for step in steps]
    model = make_model(SHAPES[settings.shape], stage, variant, settings.device)
    optimizer = make_optimizer(settings.optimizer, stage, [p for p in model.parameters() if p.requires_grad])
    seconds, losses, norms = [], [], []
    for number, (step, items) in enumerate(zip(batches, num_items, strict=True)):
        if number == settings.warmup and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        _synchronize(device)
        started = time.perf_counter()
        found = train_step(model, optimizer, step, items, settings.device)
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
        losses.append(float(found[0]))
        norms.append(float(found[1]))
    timed = slice(settings.warmup, None)
    flops = sum((workload.flops(variant, row) for step in steps[timed] for row in step), Flops())
    samples = [sample for step in steps[timed] for row in step for sample in row]
    return measurement(samples, flops, seconds[timed], peak, _padding(batches[timed], workload)) | {
        "memory": peak_memory(device),
        "reserved": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
        "losses": losses,
        "norms": norms,
        "breakdown": breakdown(
            lambda: train_step(model, optimizer, batches[-1], num_items[-1], settings.device), device
        )
        if settings.breakdown
        else None,
        "micro_batch": settings.micro_batch,
        "mean_tokens": statistics.mean(len(sample.input_ids) for sample in workload.samples),
        "mean_image_tokens": statistics.mean(sample.num_image_tokens for sample in workload.samples),
        "mean_supervised_tokens": statistics.mean(_num_supervised(sample) for sample in workload.samples),
    }


def breakdown(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Milliseconds by kernel, of the dearest 30; on a CPU by operation."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        run()
        _synchronize(device)
    of_device = device.type == "cuda"
    times = {
        entry.key: (entry.self_device_time_total if of_device else entry.self_cpu_time_total) / 1e3
        for entry in profile.key_averages()
    }
    dearest = sorted(times.items(), key=lambda item: -item[1])[:30]
    return {name: round(milliseconds, 3) for name, milliseconds in dearest}


def measurement(
    samples: Sequence[Sample], flops: Flops, seconds: Sequence[float], peak: float, padding: float
) -> dict[str, Any]:
    """Figures of the timed steps; a shared image's tokens count for every sample."""
    total = sum(seconds)
    return {
        "seconds": [min(seconds), statistics.median(seconds), max(seconds)],
        "samples_per_second": len(samples) / total,
        "tokens_per_second": sum(len(sample.input_ids) for sample in samples) / total,
        "supervised_tokens_per_second": sum(map(_num_supervised, samples)) / total,
        "padding": padding,
        "needed_flops_per_sample": flops.needed / len(samples),
        "mfu": mfu(flops, seconds=total, peak=peak),
        "hfu": hfu(flops, seconds=total, peak=peak),
        "matrix_peak": peak,
    }


def _padding(steps: Sequence[Sequence[dict[str, Any]]], workload: Workload) -> float:
    """Share of positions that are padding."""
    ids = torch.cat([batch["input_ids"].flatten() for step in steps for batch in step])
    return float((ids == workload.shape.config.text_config.pad_token_id).float().mean())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def in_own_process(settings: Settings, *, expandable: bool = True) -> dict[str, Any]:
    """`drive` in a fresh process.

    Args:
        expandable: the allocator's segments grow, as in training: blocks of many sizes would leave gaps.

    Raises:
        torch.OutOfMemoryError: the micro-batch does not fit the GPU.
    """
    environment = os.environ | {"PYTORCH_ALLOC_CONF": f"expandable_segments:{expandable}"}
    command = [sys.executable, __file__, "--drive", json.dumps(asdict(settings))]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if run.returncode == OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(f"micro-batch {settings.micro_batch}")
    run.check_returncode()
    return json.loads(run.stdout.splitlines()[-1])


Runner = Callable[[Settings], dict[str, Any]]


def largest_that_fits(settings: Settings, run: Runner) -> dict[str, Any] | None:
    """The run with the largest micro-batch, halved until it fits; None: not even one sample fits."""
    micro_batch = settings.micro_batch
    while micro_batch:
        try:
            return run(Settings(**(asdict(settings) | {"micro_batch": micro_batch})))
        except RuntimeError as error:
            if not is_of_device(error):
                raise
            print(f"{settings.stage}, {settings.variant}: micro-batch {micro_batch} does not fit", file=sys.stderr)
            micro_batch //= 2
    return None


def measure(options: argparse.Namespace, run: Runner = in_own_process) -> dict[str, Any]:
    """Everything that `--json` prints: variants, ratios to stock and hours by stage; what failed or was not run."""
    stages: dict[str, Any] = {}
    failed: dict[str, str] = {}
    not_run: list[str] = []
    end = time.monotonic() + options.seconds
    report = {
        "device": device_name(options.device),
        "shape": options.shape,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "optimizer": options.optimizer,
        "overrides": options.overrides,
        "samples_per_step": options.samples_per_step,
        "steps": options.steps,
        "stages": stages,
        "failed": failed,
        "not_run": not_run,
    }
    for name in options.stages:
        stage = card_stage(name)
        shares = DATA_SETS[stage.data[0].name].per_image > 1
        results: dict[str, Any] = {}
        for variant in (SHARED, PACKED, STOCK) if shares else (PACKED, STOCK):
            settings = Settings(
                shape=options.shape,
                stage=name,
                variant=variant,
                device=options.device,
                samples_per_step=options.samples_per_step,
                micro_batch=options.micro_batch,
                warmup=options.warmup,
                steps=options.steps,
                optimizer=options.optimizer,
                overrides=tuple(options.overrides),
                breakdown=options.breakdown,
            )
            if time.monotonic() > end:
                not_run.append(f"{name}, {variant}")
                continue
            try:
                result = largest_that_fits(settings, run)
            except subprocess.CalledProcessError as error:  # its words are on stderr
                failed[f"{name}, {variant}"] = f"exit code {error.returncode}"
                result = None
            if result:
                results[variant] = result
            stages[name] = {"variants": results} | compare(name, results)
            if options.output is not None:
                write_json(options.output, report)
    return report


def compare(stage: str, results: dict[str, Any]) -> dict[str, Any]:
    """Samples per second relative to stock, whether losses and gradients match, and the stage's projected hours."""
    compared: dict[str, Any] = {"ratios": {}, "loss_difference": {}, "norm_difference": {}}
    stock = results.get(STOCK)
    for variant in (SHARED, PACKED):
        if variant in results and stock:
            ours = results[variant]
            compared["ratios"][variant] = ours["samples_per_second"] / stock["samples_per_second"]
            differences = [abs(a - b) / abs(b) for a, b in zip(ours["losses"], stock["losses"], strict=True)]
            compared["loss_difference"][variant] = max(differences)
            # the first step's: later ones follow from other weights
            compared["norm_difference"][variant] = abs(ours["norms"][0] / stock["norms"][0] - 1)
    compared["projected"] = {variant: project(stage, variant, result) for variant, result in results.items()}
    return compared


def project(name: str, variant: str, result: dict[str, Any]) -> dict[str, float]:
    """Needed FLOPs of a complete stage of the card at 8B, and its hours at this run's speed on eight such devices."""
    stage = card_stage(name)
    source = stage.data[0]
    num_rows = source.sample or DATA_SETS[source.name].num_rows
    derived = derive(stage, num_rows - num_held_out(stage, num_rows), NUM_DEVICES)
    workload = Workload(
        SHAPES["8b"], stage, num_samples=NUM_COUNTED, samples_per_step=stage.global_batch // NUM_DEVICES
    )
    steps = workload.micro_batches(variant, result["micro_batch"])
    counted = sum((workload.flops(variant, row) for step in steps for row in step), Flops())
    num_counted = sum(len(row) for step in steps for row in step)
    needed = counted.needed / num_counted * derived.steps * stage.global_batch
    return {
        "samples": derived.steps * stage.global_batch,
        "exaflop": needed / 1e18,
        "hours": needed / (result["mfu"] * result["matrix_peak"] * NUM_DEVICES) / 3600,
    }


def device_name(device: str) -> str:
    if device == "cpu":
        return f"CPU ({cpu_instructions()}), {torch.get_num_threads()} thread(s)"
    return torch.cuda.get_device_name()


def print_report(report: dict[str, Any]) -> None:
    print(
        f"{report['device']}; {report['shape']} shape in bfloat16, {report['optimizer']}, activation checkpointing; "
        f"{report['samples_per_step']} samples per step, {report['steps']} steps; torch {report['torch']}, "
        f"Transformers {report['transformers']}"
    )
    for name, stage in report["stages"].items():
        print_stage(name, stage)
    print(f"\nThe card's stages at 8B on {NUM_DEVICES} such devices, at this run's MFU")
    print(f"{'':12}{'':9}{'samples':>9}{'needed EFLOP':>14}{'hours':>11}")
    for name, stage in report["stages"].items():
        for variant, projected in stage["projected"].items():
            print(
                f"{name:12}{variant:9}{projected['samples']:9,}{projected['exaflop']:14,.1f}{projected['hours']:11,.1f}"
            )
    for name, what in report["failed"].items():
        print(f"{name} failed: {what}")
    for name in report["not_run"]:
        print(f"{name} was not run: no time was left")
    if report["shape"] != "8b":
        print("This run's MFU is for a small shape: its hours only show that the command works.")


def print_stage(name: str, stage: dict[str, Any]) -> None:
    any_run = next(iter(stage["variants"].values()), None)
    if any_run is None:
        print(f"\n{name}: not even one sample fits")
        return
    print(
        f"\n{name}: rows of {any_run['mean_tokens']:,.0f} tokens, {any_run['mean_image_tokens']:,.0f} of them image "
        f"tokens, {any_run['mean_supervised_tokens']:.0f} supervised"
    )
    print(
        f"{'':9}{'micro':>6}{'s/step':>9}{'samples/s':>11}{'tokens/s':>10}{'superv./s':>11}{'padding':>9}"
        f"{'TFLOP/s':>9}{'MFU':>7}{'HFU':>7}{'memory':>11}{'over stock':>12}"
    )
    for variant, run in stage["variants"].items():
        ratio = f"{stage['ratios'][variant]:.2f}" if variant in stage["ratios"] else ""
        print(
            f"{variant:9}{run['micro_batch']:6}{run['seconds'][1]:9.2f}{run['samples_per_second']:11.2f}"
            f"{run['tokens_per_second']:10,.0f}{run['supervised_tokens_per_second']:11,.0f}{run['padding']:9.1%}"
            f"{run['matrix_peak'] / 1e12:9.2f}{run['mfu']:7.1%}{run['hfu']:7.1%}{run['memory'] / 2**30:7.1f} GiB"
            f"{ratio:>12}"
        )
    differences = ", ".join(f"{variant} {value:.1e}" for variant, value in stage["loss_difference"].items())
    print(f"largest relative difference of a step's loss from stock's: {differences or 'not known'}")
    differences = ", ".join(f"{variant} {value:.1e}" for variant, value in stage["norm_difference"].items())
    print(f"relative difference of the first gradient norm: {differences or 'not known'}")
    for variant, run in stage["variants"].items():
        for name, milliseconds in (run["breakdown"] or {}).items():
            print(f"{variant:9}{milliseconds:10.3f} ms  {name}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small shape; the default without a GPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    names = list(load_recipe(RECIPE).stages)
    parser.add_argument("--stages", nargs="+", choices=names, default=names)
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="warm-up steps before the timed ones")
    parser.add_argument("--samples-per-step", type=int, help="default: 32, like the card on 8 devices; 8 with --small")
    parser.add_argument("--micro-batch", type=int, help="largest to try; default: 8, or 4 with --small")
    parser.add_argument(
        "--optimizer", choices=("adamw", "adamw-8bit", "adamw-bf16"), default="adamw", help="8bit: through torchao"
    )
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="of the stage"
    )
    parser.add_argument("--breakdown", action="store_true", help="milliseconds by kernel")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no other variant starts")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the report, written after each variant")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    small = options.small or options.device == "cpu"
    options.shape = "small" if small else "8b"
    options.samples_per_step = options.samples_per_step or (8 if small else 32)
    options.micro_batch = min(options.micro_batch or (4 if small else 8), options.samples_per_step)
    return options


def main() -> int:
    """Returns 1 if a loss or gradient norm differs from stock Transformers', or a variant failed."""
    options = parse()
    if options.drive:
        try:
            print(json.dumps(drive(Settings(**json.loads(options.drive)))))
        except RuntimeError as error:
            if not is_of_device(error):
                raise
            return OUT_OF_MEMORY
        return 0
    with redirect_stdout(sys.stderr if options.json else sys.stdout):
        report = measure(options)
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        print_report(report)
    differences = [d for stage in report["stages"].values() for d in stage["loss_difference"].values()]
    norms = [d for stage in report["stages"].values() for d in stage["norm_difference"].values()]
    if report["failed"] or any(not difference <= NORM_TOLERANCE for difference in norms):
        return 1
    return int(any(not difference <= LOSS_TOLERANCE for difference in differences))


if __name__ == "__main__":
    sys.exit(main())
