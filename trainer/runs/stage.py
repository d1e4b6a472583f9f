"""One stage, from its origin to its final weights: check data, freeze, train, hand over."""

import gc
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState
from transformers.trainer import TRAINER_STATE_NAME

from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.data.batches.batch_order import within_row_limit
from llava_llama31.trainer.data.batches.stage_rows import load_stage_data
from llava_llama31.trainer.distributed.devices import default_device, release_cached_memory
from llava_llama31.trainer.distributed.engine import check_resumable, forget_deepspeed, join_deepspeed
from llava_llama31.trainer.errors import Interrupted
from llava_llama31.trainer.fault_tolerance.out_of_memory import advising
from llava_llama31.trainer.fault_tolerance.watchdog import kill_workers
from llava_llama31.trainer.model.device_options import numerical_settings
from llava_llama31.trainer.model.flash_attention import faster_attention
from llava_llama31.trainer.model.stage_model import (
    base_model,
    check_attention,
    freeze_groups,
    load_stage_model,
    use_device_options,
)
from llava_llama31.trainer.recipes.derived import Derived, check_evaluations, derive
from llava_llama31.trainer.recipes.schema import Stage
from llava_llama31.trainer.runs.console import print_stage_start
from llava_llama31.trainer.runs.context import StageRun
from llava_llama31.trainer.runs.final_weights import write_final_weights
from llava_llama31.trainer.runs.inputs import refuse_changes
from llava_llama31.trainer.runs.stage_parts import stage_features, stage_trainer
from llava_llama31.trainer.runs.stage_record import stage_record
from llava_llama31.trainer.runs.trackers import continue_trackers, end_trackers
from llava_llama31.trainer.training.llava_trainer import LlavaTrainer
from llava_llama31.trainer.training.plateau import is_flat, metric_of
from llava_llama31.trainer.training.training_args import training_arguments


def run_stage(run: StageRun) -> dict[str, Any]:
    """Train a stage to its end and write its weights to `final/`; returns its record.

    Raises:
        Interrupted: when a signal came; while the stage trained, after a checkpoint.
        UserError: naming what to fix.
    """
    with advising(run.stage, run.where), numerical_settings(run.stage), faster_attention(default_device()):
        return _run_stage(run)


def _run_stage(run: StageRun) -> dict[str, Any]:
    stage = run.stage
    processor = LlavaLlama31Processor.from_pretrained(run.origin)
    data = load_stage_data(stage, processor, run.folder.rejects, run.seed)
    stage = within_row_limit(stage, data.train.lengths, run.seed, run.context.num_processes)
    run = replace(run, stage=stage)
    derived = derive(stage, len(data.train), run.context.num_processes, where=run.where)
    check_evaluations(stage, derived.steps, where=run.where)
    # before the model: DeepSpeed's configuration must be alive when the weights are loaded
    join_deepspeed(stage)
    args = training_arguments(stage, derived, output_dir=run.folder.path, seed=run.seed, where=run.where)
    transformers.set_seed(run.seed)
    model = load_stage_model(run.origin, stage, seed=run.seed, where=run.where, quantized=True)
    report = freeze_groups(model, stage)
    use_device_options(base_model(model, stage), stage, args.device)
    check_attention(base_model(model, stage), stage, args.device)
    print_stage_start(run.context.console, run.name, stage, derived, report, str(run.origin))
    features = stage_features(run, base_model(model, stage), processor, data, args.device)
    trainer = stage_trainer(run, model, args, processor, data, features, report)
    _train(run, trainer, derived)
    trainer.restore_best()
    end_trackers(trainer)
    record = stage_record(run, data, derived, report, trainer)
    write_final_weights(run, trainer, record)
    _release(stage)
    return record


def _train(run: StageRun, trainer: LlavaTrainer, derived: Derived) -> None:
    checkpoint, step = _newest_checkpoint(run), 0
    if checkpoint is not None:
        manifest = atomic_folders.read_manifest(checkpoint)
        check_resumable(manifest, trainer.args, checkpoint)
        if run.context.is_main:  # the digests are kept by the rank that writes them
            refuse_changes(
                manifest.get("inputs", trainer.options.inputs), trainer.options.inputs, where=str(checkpoint)
            )
        step = manifest["step"]
        run.context.console.print(f"resuming from {checkpoint}, step {step} of {derived.steps}")
        ended = is_flat(atomic_folders.read_json(checkpoint / TRAINER_STATE_NAME)["log_history"], run.stage)
        if step >= derived.steps or ended:  # Trainer would take one more step
            trainer.restore(checkpoint)
            return
    continue_trackers(run, trainer, step)
    try:
        with run.context.signals.deferring():
            trainer.train(str(checkpoint) if checkpoint else None)
    except BaseException:
        kill_workers()  # a stuck worker would keep this process from ending
        raise
    if trainer.guard.requests.stopped:
        raise Interrupted(
            f"stage {run.name} stopped at step {trainer.state.global_step} of {derived.steps} and is saved; "
            "run the same command to resume",
            agreed=True,
        )
    run.context.signals.act()
    if trainer.state.global_step < derived.steps:
        run.context.console.print(
            f"stage {run.name} ends at step {trainer.state.global_step} of {derived.steps}: no better "
            f"{metric_of(run.stage)} in the last {run.stage.stop_on_plateau} evaluations"
        )


def _newest_checkpoint(run: StageRun) -> Path | None:
    """Rank 0 decides, so that all ranks agree; damaged checkpoints are set aside and don't count in the rotation."""
    found: list[Path | None] = [None]
    if run.context.is_main:
        found[0], skipped = atomic_folders.newest_whole(run.folder.path)
        for path, fault in skipped:
            aside = path.with_name(f"damaged-{path.name}")
            atomic_folders.remove(aside)
            path.rename(aside)
            run.context.console.print(f"{path} is incomplete and set aside as {aside.name}: {fault}", style="yellow")
    if run.context.num_processes > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]


def _release(stage: Stage) -> None:
    """Clear what Accelerate and DeepSpeed hold of a stage; the model is freed with its last reference."""
    AcceleratorState._reset_state(reset_partial_state=False)
    forget_deepspeed()
    if "torch._dynamo" in sys.modules:  # something was compiled
        torch.compiler.reset()
    gc.collect()
    release_cached_memory()
