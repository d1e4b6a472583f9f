"""What the model card and the summary say about a stage."""

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


def stage_record(
    run: StageRun, data: StageData, derived: Derived, report: list[GroupReport], trainer: LlavaTrainer
) -> dict[str, Any]:
    """Data, steps, losses and settings of the finished stage."""
    stage, history = run.stage, trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    metrics = trainer.final_metrics()
    seconds = next((entry["seconds"] for entry in reversed(history) if "seconds" in entry), 0.0)
    tokens = int(trainer.trained(derived.steps)[1])
    return {
        "name": run.name,
        "trainable": [line.group for line in report if line.num_trainable],
        "groups": [asdict(line) for line in report],
        "learning_rate": stage.learning_rates(),
        "data": data.summary,
        "epochs": stage.epochs or round(derived.steps / derived.steps_per_epoch, 3),
        "steps": derived.steps,
        "global_batch": stage.global_batch,
        "micro_batch": stage.micro_batch,
        "gradient_accumulation": derived.gradient_accumulation,
        "num_processes": run.context.num_processes,
        "num_samples": derived.num_samples,
        "schedule": stage.schedule,
        "warmup_steps": derived.warmup_steps,
        "weight_decay": stage.weight_decay,
        "precision": stage.precision,
        "optimizer": stage.optimizer,
        "fp8": stage.fp8,
        "lora": stage.lora.model_dump() if stage.lora else None,
        "init_from": str(run.origin),
        "loss_first": losses[0] if losses else None,
        "loss": float(np.mean(losses[-5:])) if losses else None,
        "loss_curve": [(entry["step"], entry["loss"]) for entry in history if "loss" in entry],
        "validation_curve": [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry],
        "health": trainer.guard.health.summary(),
        "weights_of_step": trainer.state.best_global_step or derived.steps,
        "validation_loss": metrics.get("eval_loss"),
        "validation_accuracy": metrics.get("eval_accuracy"),
        "supervised_tokens": tokens,
        "supervised_tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "minutes": round(seconds / 60, 2),
    }
