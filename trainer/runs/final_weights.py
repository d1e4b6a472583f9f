"""A stage's weights, written so that a next stage, or anyone, opens them."""

import contextlib
import gc
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from accelerate import PartialState
from accelerate.state import AcceleratorState
from rich.console import Console
from transformers import PreTrainedModel, PrinterCallback

from llava_llama31 import LlavaLlama31ForConditionalGeneration
from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.model.adapters import take_dequantized
from llava_llama31.trainer.data.batches.collator import Collator
from llava_llama31.trainer.runs.console import StageProgress, print_stage_start
from llava_llama31.trainer.data.batches.dataset import StageDataset
from llava_llama31.trainer.model.device_options import FLOAT8_MULTIPLE
from llava_llama31.trainer.data.batches.device_tiles import DeviceTiles
from llava_llama31.trainer.distributed.engine import (
    check_resumable,
    forget_deepspeed,
    join_deepspeed,
    num_elements,
    uses_fsdp,
)
from llava_llama31.trainer.errors import Interrupted, UserError
from llava_llama31.trainer.evaluation.in_training import TrainingQuestions
from llava_llama31.trainer.evaluation.presets import PRESETS
from llava_llama31.trainer.evaluation.questions import load_questions
from llava_llama31.trainer.data.batches.feature_cache import FeatureCache, cache_key, default_folder, fill
from llava_llama31.trainer.costs.flops import ModelShape
from llava_llama31.trainer.fault_tolerance.stage_guard import Guard, Requests
from llava_llama31.trainer.fault_tolerance.step_health import Health
from llava_llama31.trainer.training.llava_trainer import LlavaTrainer
from llava_llama31.trainer.training.meter import Meter
from llava_llama31.trainer.model.module_groups import GroupReport
from llava_llama31.trainer.fault_tolerance.out_of_memory import explained
from llava_llama31.trainer.fault_tolerance.peers import Peers
from llava_llama31.trainer.publishing.pusher import Pusher, PushSaves
from llava_llama31.trainer.recipes.schema import Derived, Evaluation, Stage, derive
from llava_llama31.trainer.fault_tolerance.signals import Signals
from llava_llama31.trainer.data.batches.stage_rows import StageData, batch_order, load_stage_data, within_row_limit
from llava_llama31.trainer.model.stage_model import (
    base_model,
    freeze_groups,
    load_stage_model,
    product_dtype,
    use_device_options,
)
from llava_llama31.trainer.training.training_args import training_arguments
from llava_llama31.trainer.fault_tolerance.watchdog import Watchdog, kill_workers
from llava_llama31.trainer.checkpoint.run_folder import STAGE_RECORD, StageFolder
from llava_llama31.trainer.runs.context import StageRun


logger = logging.getLogger(__name__)


def write_final_weights(run: StageRun, trainer: LlavaTrainer, record: dict[str, Any]) -> None:
    """Write `final/`; adapters are merged, and kept beside in PEFT's format."""
    weights = sum(num_elements(parameter) * parameter.element_size() for parameter in trainer.model.parameters())
    with atomic_folders.room(run.folder.path, weights) if run.context.is_main else contextlib.nullcontext():
        _write_final(run, trainer, record)


def _write_final(run: StageRun, trainer: LlavaTrainer, record: dict[str, Any]) -> None:
    if run.context.is_main:
        atomic_folders.sweep(run.folder.path)
    staging = atomic_folders.stage(run.folder.final) if run.context.is_main else run.folder.final
    if run.stage.lora is not None:
        adapted = _whole_adapted(run, trainer)
        if run.context.is_main:
            adapted.save_pretrained(staging / "adapter")
            adapted.merge_and_unload().save_pretrained(staging)
            trainer.processing_class.save_pretrained(staging)
    else:
        trainer.save_model(str(staging))
    if run.context.is_main:
        atomic_folders.write_json(staging / STAGE_RECORD, record)
        started = time.monotonic()
        atomic_folders.publish(staging, run.folder.final, {"step": record["steps"], "num_processes": run.context.num_processes})
        logger.info("wrote %s in %.1f s", run.folder.final, time.monotonic() - started)
    trainer.accelerator.wait_for_everyone()


def _whole_adapted(run: StageRun, trainer: LlavaTrainer) -> PreTrainedModel:
    """Rebuild the adapted model unsharded on the host of rank 0, in the origin's precision. Collective."""
    trained = trainer.whole_weights()
    if not run.context.is_main:
        return trainer.model
    forget_deepspeed()  # it would shard the model over ranks that don't take part
    model = load_stage_model(run.origin, run.stage, seed=run.seed, where=run.where)
    if run.stage.lora.quantize:
        take_dequantized(model, trainer.model)
    _, unexpected = model.load_state_dict(trained, strict=False)
    assert not unexpected, unexpected
    return model
