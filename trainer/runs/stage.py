"""One stage, from its origin's weights to a published folder of weights: check data, freeze, train, hand over."""

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
from llava_llama31.trainer.fault_tolerance.stage_guard import Guard, StopRequests
from llava_llama31.trainer.fault_tolerance.step_health import Health
from llava_llama31.trainer.training.llava_trainer import LlavaTrainer
from llava_llama31.trainer.training.meter import Meter
from llava_llama31.trainer.model.module_groups import GroupReport
from llava_llama31.trainer.fault_tolerance.out_of_memory import advising
from llava_llama31.trainer.fault_tolerance.peers import Peers
from llava_llama31.trainer.publishing.pusher import Pusher, PushSaves
from llava_llama31.trainer.recipes.schema import Derived, Evaluation, Stage, derive
from llava_llama31.trainer.fault_tolerance.signals import Signals
from llava_llama31.trainer.data.batches.stage_rows import StageData, batch_order, load_stage_data, within_row_limit
from llava_llama31.trainer.model.stage_model import (
    base_model,
    freeze_groups,
    load_model,
    product_dtype,
    use_device_options,
)
from llava_llama31.trainer.training.training_args import training_arguments
from llava_llama31.trainer.fault_tolerance.watchdog import Watchdog, kill_workers


logger = logging.getLogger(__name__)

FINAL = "final"
RECORD = "stage.json"
# of a tower's configuration: what makes its features random in training
_DROPOUT = ("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob", "dropout", "drop_path_rate")


@dataclass(frozen=True)
class StageRun:
    """Where a stage runs and what it starts from."""

    name: str
    stage: Stage
    folder: Path
    origin: Path
    seed: int
    num_processes: int
    is_main: bool
    console: Console
    signals: Signals
    peers: Peers
    evaluation: Evaluation | None = None
    save_now: Path | None = None
    pusher: Pusher | None = None

    @property
    def final(self) -> Path:
        return self.folder / FINAL

    @property
    def where(self) -> str:
        """The stage, as messages and `--set` name it."""
        return f"stages.{self.name}"


def finished_record(folder: Path) -> dict[str, Any] | None:
    """The record of a stage whose weights are published and whole, or None."""
    final = folder / FINAL
    if not (final / RECORD).is_file():
        return None
    fault = atomic_folders.verify(final)
    if fault is not None:
        logger.warning("%s is damaged (%s): the stage goes on from its newest whole checkpoint", final, fault)
        return None
    return atomic_folders.read_json(final / RECORD)


def run_stage(run: StageRun) -> dict[str, Any]:
    """Train a stage to its end and publish its weights in `final/`; returns its record.

    Raises:
        Interrupted: when a signal came; while the stage trained, after a checkpoint.
        UserError: naming what to mend.
    """
    with advising(run.stage, run.where):
        return _run_stage(run)


def _run_stage(run: StageRun) -> dict[str, Any]:
    stage = run.stage
    processor = LlavaLlama31Processor.from_pretrained(run.origin)
    data = load_stage_data(stage, processor, run.folder, run.seed)
    stage = within_row_limit(stage, data.lengths, run.seed, run.num_processes)
    run = replace(run, stage=stage)
    derived = derive(stage, len(data.train_rows), run.num_processes, where=run.where)
    # before the model: DeepSpeed's configuration must be alive when the weights are loaded
    join_deepspeed(stage)
    args = training_arguments(stage, derived, output_dir=run.folder, seed=run.seed, where=run.where)
    transformers.set_seed(run.seed)
    model = load_model(run.origin, stage, seed=run.seed, where=run.where, quantized=True)
    report = freeze_groups(model, stage)
    use_device_options(base_model(model, stage), stage)
    print_stage_start(run.console, run.name, stage, derived, report, str(run.origin))
    features = _features(run, base_model(model, stage), processor, data, args.device)
    trainer = _trainer(run, model, args, processor, data, features)
    _train(run, trainer, derived)
    trainer.restore_best()
    record = _record(run, data, derived, report, trainer)
    _publish(run, trainer, record)
    _release(stage)
    return record


def _release(stage: Stage) -> None:
    """Forget what Accelerate and DeepSpeed hold of a stage; its model goes with the last name that it has."""
    AcceleratorState._reset_state(reset_partial_state=False)
    forget_deepspeed()
    if stage.compile:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _features(
    run: StageRun,
    model: LlavaLlama31ForConditionalGeneration,
    processor: LlavaLlama31Processor,
    data: StageData,
    device: torch.device,
) -> FeatureCache | None:
    """The features of the stage's pictures, as far as the quota reaches; each process of a machine makes its share.

    Raises:
        UserError: the tower would give other features in training than now.
    """
    stage, where = run.stage, f"{run.where}.feature_cache_gb"
    if stage.feature_cache_gb is None:
        return None
    if uses_fsdp():
        raise UserError("is not there yet under FSDP", where=where, fix="remove it")
    vision = model.config.vision_config.to_dict()
    if random := [name for name in _DROPOUT if vision.get(name)]:
        raise UserError(f"the vision tower has {random[0]} {vision[random[0]]}", where=where, fix="remove it")
    model.model.vision_tower.to(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=stage.precision != "float32")

    @torch.no_grad()
    def encode(tiles: torch.Tensor) -> torch.Tensor:
        with autocast:
            return model.model.tile_features(tiles.to(device))

    size = processor.tile_size
    blank = encode(torch.zeros(1, 3, size, size, dtype=product_dtype(stage)))
    key = cache_key(model, processor, device, product_dtype(stage), autocast=stage.precision != "float32")
    cache = FeatureCache(default_folder(), key, blank.shape[1:], blank.dtype, int(stage.feature_cache_gb * 1e9))
    state = PartialState()
    fill(
        cache,
        encode,
        StageDataset(data.stores, [*data.train_rows, *data.eval_rows], processor, product_dtype(stage)),
        share=(state.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))),
        wait_for_everyone=state.wait_for_everyone,
        num_workers=stage.dataloader_workers,
        console=run.console,
    )
    run.console.print(f"{len(cache):,} pictures' features are in {cache.features}")
    return cache


def _trainer(
    run: StageRun,
    model: PreTrainedModel,
    args: transformers.TrainingArguments,
    processor: LlavaLlama31Processor,
    data: StageData,
    features: FeatureCache | None,
) -> LlavaTrainer:
    stage = run.stage
    order = batch_order(stage, data.lengths, run.seed)
    pixel_dtype = product_dtype(stage)

    def rows_of(rows: list[tuple[int, int]]) -> StageDataset:
        return StageDataset(data.stores, rows, processor, pixel_dtype, features, stage.device_tiles)

    trainer = LlavaTrainer(
        model,
        args,
        collator=Collator(
            processor.tokenizer.pad_token_id,
            processor.image_token_id,
            packed=stage.packing,
            share_prefix=stage.packing and stage.share_prefix > 1,
            multiple_of=_row_multiple(stage, args),
        ),
        train_dataset=rows_of(data.train_rows),
        eval_dataset=rows_of(data.eval_rows),
        processor=processor,
        learning_rates=stage.learning_rates(),
        order=order,
        eval_lengths=data.eval_lengths,
        packed=stage.packing,
        device_tiles=DeviceTiles(processor, pixel_dtype) if stage.device_tiles else None,
        meter=_meter(base_model(model, stage), stage, processor, args.device),
        guard=_guard(run),
        bfloat16_moments=stage.optimizer == "adamw_bf16",
        decay_all_parameters="decay_all_parameters" in stage.quirks,
        only_trainable=stage.lora is not None,
        questions=_questions(run),
        callbacks=[StageProgress(run.console, run.name), *_pushes(run)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _pushes(run: StageRun) -> list[PushSaves]:
    return [PushSaves(run.pusher, run.name, run.stage, run.origin)] if run.pusher is not None else []


def _guard(run: StageRun) -> Guard:
    stage = run.stage
    return Guard(
        run.where,
        Health(on_nonfinite=stage.on_nonfinite, on_spike=stage.on_spike, can_skip=stage.deepspeed is None),
        StopRequests(run.signals, run.save_now),
        Watchdog(stage.step_timeout, run.where, run.peers.report),
        stage.loader_timeout,
    )


def _row_multiple(stage: Stage, args: transformers.TrainingArguments) -> int:
    if args.use_cpu and stage.precision != "float32":
        return 128  # CPU kernels for bfloat16 are built anew for every shape
    return FLOAT8_MULTIPLE if stage.fp8 else 1


def _meter(
    model: LlavaLlama31ForConditionalGeneration, stage: Stage, processor: LlavaLlama31Processor, device: torch.device
) -> Meter:
    def num_patch_features(sizes: Sequence[tuple[int, int]]) -> int:
        return int((model.model.feature_layout(sizes)[0] >= 0).sum())

    options: dict[str, Any] = {"checkpointing": int(stage.activation_checkpointing)}
    if stage.lora is not None:
        options |= {"lora_rank": stage.lora.r, "lora_targets": stage.lora.targets}
    return Meter(
        ModelShape.of(model.config),
        stage.trainable,
        processor.image_token_id,
        processor.tokenizer.pad_token_id,
        num_patch_features,
        processor.num_tiles,
        device,
        product_dtype(stage),
        options,
    )


def _questions(run: StageRun) -> TrainingQuestions | None:
    spec, limit = run.evaluation, run.stage.eval_questions
    if spec is None or limit is None:
        return None
    return TrainingQuestions(
        load_questions(spec.data, image_root=spec.image_root, limit=limit),
        preset=PRESETS[spec.preset],
        max_new_tokens=spec.max_new_tokens,
        batch_size=spec.batch_size,
        folder=run.folder / "evaluation",
    )


def _train(run: StageRun, trainer: LlavaTrainer, derived: Derived) -> None:
    checkpoint = _newest_checkpoint(run)
    if checkpoint is not None:
        manifest = atomic_folders.read_manifest(checkpoint)
        check_resumable(manifest, trainer.args, checkpoint)
        step = manifest["step"]
        run.console.print(f"going on from {checkpoint}, step {step} of {derived.steps}")
        if step >= derived.steps:  # Trainer would take one step more
            trainer.restore(checkpoint)
            return
    try:
        with run.signals.deferring():
            trainer.train(str(checkpoint) if checkpoint else None)
    except BaseException:
        kill_workers()  # one that is stuck would keep this process from ending
        raise
    if trainer.guard.requests.stopped:
        raise Interrupted(
            f"stage {run.name} stopped at step {trainer.state.global_step} of {derived.steps} and is saved; "
            "run the same command again to go on",
            agreed=True,
        )
    run.signals.act()


def _newest_checkpoint(run: StageRun) -> Path | None:
    """The main process looks, so that all agree; damaged ones are set aside and don't count in the rotation."""
    found: list[Path | None] = [None]
    if run.is_main:
        found[0], skipped = atomic_folders.newest_whole(run.folder)
        for path, fault in skipped:
            aside = path.with_name(f"damaged-{path.name}")
            atomic_folders.remove(aside)
            path.rename(aside)
            run.console.print(f"[yellow]{path} is not whole, it is set aside as {aside.name}: {fault}")
    if run.num_processes > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]


def _record(
    run: StageRun, data: StageData, derived: Derived, report: list[GroupReport], trainer: LlavaTrainer
) -> dict[str, Any]:
    """What the model card and the summary tell of the stage."""
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
        "num_processes": run.num_processes,
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


def _whole_adapted(run: StageRun, trainer: LlavaTrainer) -> PreTrainedModel:
    """On the main process the adapted model anew, whole, on the host and as exact as its origin; all call this."""
    trained = trainer.whole_weights()
    if not run.is_main:
        return trainer.model
    forget_deepspeed()  # it would spread the model over processes that don't take part
    model = load_model(run.origin, run.stage, seed=run.seed, where=run.where)
    if run.stage.lora.quantize:
        take_dequantized(model, trainer.model)
    _, unexpected = model.load_state_dict(trained, strict=False)
    assert not unexpected, unexpected
    return model


def _publish(run: StageRun, trainer: LlavaTrainer, record: dict[str, Any]) -> None:
    """Weights that a next stage, or anyone, opens; adapters are merged, and kept beside in PEFT's format."""
    weights = sum(num_elements(parameter) * parameter.element_size() for parameter in trainer.model.parameters())
    with atomic_folders.room(run.folder, weights) if run.is_main else contextlib.nullcontext():
        _write_final(run, trainer, record)


def _write_final(run: StageRun, trainer: LlavaTrainer, record: dict[str, Any]) -> None:
    if run.is_main:
        atomic_folders.sweep(run.folder)
    staging = atomic_folders.staging_folder(run.final) if run.is_main else run.final
    if run.stage.lora is not None:
        adapted = _whole_adapted(run, trainer)
        if run.is_main:
            adapted.save_pretrained(staging / "adapter")
            adapted.merge_and_unload().save_pretrained(staging)
            trainer.processing_class.save_pretrained(staging)
    else:
        trainer.save_model(str(staging))
    if run.is_main:
        atomic_folders.write_json(staging / RECORD, record)
        started = time.monotonic()
        atomic_folders.commit(staging, run.final, {"step": record["steps"], "num_processes": run.num_processes})
        logger.info("published %s in %.1f s", run.final, time.monotonic() - started)
    trainer.accelerator.wait_for_everyone()
