"""What a stage trains with: features, Trainer, meters, guard and questions."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from transformers import PreTrainedModel, PrinterCallback

from llava_llama31 import LlavaLlama31ForConditionalGeneration
from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.costs.flops import ModelShape, adapter_ranks
from llava_llama31.trainer.data.batches.batch_order import batch_order
from llava_llama31.trainer.data.batches.collator import Collator
from llava_llama31.trainer.data.batches.dataset import StageDataset
from llava_llama31.trainer.data.batches.device_tiles import DeviceTiles
from llava_llama31.trainer.data.batches.feature_cache import FeatureCache, cache_key, default_folder
from llava_llama31.trainer.data.batches.feature_filling import fill
from llava_llama31.trainer.data.batches.stage_rows import StageData
from llava_llama31.trainer.distributed.engine import uses_fsdp
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.in_training import TrainingQuestions
from llava_llama31.trainer.export.provenance import commit, environment
from llava_llama31.trainer.fault_tolerance.stage_guard import Guard, StopRequests
from llava_llama31.trainer.fault_tolerance.step_health import Health
from llava_llama31.trainer.fault_tolerance.watchdog import Watchdog
from llava_llama31.trainer.model.device_options import FLOAT8_MULTIPLE
from llava_llama31.trainer.model.module_groups import GroupReport, layer_classes
from llava_llama31.trainer.model.stage_model import base_model, product_dtype
from llava_llama31.trainer.recipes.schema import Stage, slug
from llava_llama31.trainer.runs.console import StageProgress
from llava_llama31.trainer.runs.context import StageRun
from llava_llama31.trainer.runs.final_evaluation import question_set
from llava_llama31.trainer.runs.inputs import Inputs, checkpoint_digests
from llava_llama31.trainer.runs.run_log import RunLog, append_save
from llava_llama31.trainer.training.batch_loading import StageBatches
from llava_llama31.trainer.training.llava_trainer import LlavaTrainer, TrainerOptions
from llava_llama31.trainer.training.meter import Meter
from llava_llama31.trainer.training.plateau import StopOnPlateau


# of a tower's configuration: what makes its features random in training
_DROPOUT = ("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob", "dropout", "drop_path_rate")


def stage_features(
    run: StageRun,
    model: LlavaLlama31ForConditionalGeneration,
    processor: LlavaLlama31Processor,
    data: StageData,
    device: torch.device,
) -> FeatureCache | None:
    """Cached features of the stage's images, up to the quota; each rank of a machine computes its share.

    Raises:
        UserError: the tower's features in training would differ from these.
    """
    stage, where = run.stage, f"{run.where}.feature_cache_gb"
    if stage.feature_cache_gb is None:
        return None
    if uses_fsdp():
        raise UserError("is not supported under FSDP yet", where=where, fix="remove it")
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
        StageDataset(data.stores, [*data.train.places, *data.validation.places], processor, product_dtype(stage)),
        share=(state.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))),
        wait_for_everyone=state.wait_for_everyone,
        num_workers=stage.dataloader_workers,
        console=run.context.console,
    )
    run.context.console.print(f"{len(cache):,} images' features are in {cache.features}")
    return cache


def stage_trainer(
    run: StageRun,
    model: PreTrainedModel,
    args: transformers.TrainingArguments,
    processor: LlavaLlama31Processor,
    data: StageData,
    features: FeatureCache | None,
    report: Sequence[GroupReport],
) -> LlavaTrainer:
    stage, guard = run.stage, _guard(run)
    pixel_dtype = product_dtype(stage)

    def rows_of(rows: list[tuple[int, int]]) -> StageDataset:
        return StageDataset(data.stores, rows, processor, pixel_dtype, features, stage.device_tiles)

    trainer = LlavaTrainer(
        model,
        args,
        batches=StageBatches(
            training=rows_of(data.train.places),
            validation=rows_of(data.validation.places),
            collator=Collator(
                processor.tokenizer.pad_token_id,
                processor.image_token_id,
                packed=stage.packing,
                share_prefix=stage.packing and stage.share_prefix > 1,
                multiple_of=_row_multiple(stage, args),
                with_sources=True,
            ),
            order=batch_order(stage, data.train.lengths, run.seed),
            validation_lengths=data.validation.lengths,
            packed=stage.packing,
            device_tiles=DeviceTiles(processor, pixel_dtype) if stage.device_tiles else None,
            questions=_questions(run),
        ),
        processor=processor,
        meter=_meter(base_model(model, stage), stage, processor, args.device),
        guard=guard,
        options=TrainerOptions(
            learning_rates=stage.learning_rates(),
            bfloat16_moments=stage.optimizer == "adamw_bf16",
            decay_all_parameters="decay_all_parameters" in stage.quirks,
            only_trainable=stage.lora is not None,
            inputs=stage_inputs(run, data),
            sources=[source.name for source in stage.data],
            layers=layer_classes(base_model(model, stage)),
            committed=_committed(run),
        ),
        callbacks=[
            StageProgress(run.context.console, run.name),
            StopOnPlateau(stage),
            *_logs(run, guard, data, report),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def stage_inputs(run: StageRun, data: StageData) -> Inputs:
    """Digests of the stage's data and origin, on rank 0, which writes checkpoints."""
    if not run.context.is_main:
        return {}
    contents = {f"{run.where}.data.{source['name']}": source["content"] for source in data.summary}
    return contents | {f"{run.where}.origin": checkpoint_digests(run.origin)}


def _logs(run: StageRun, guard: Guard, data: StageData, report: Sequence[GroupReport]) -> list[RunLog]:
    if not run.context.is_main:
        return []
    facts = {
        "groups": [asdict(line) for line in report],
        "data": data.summary,
        "command": run.context.command,
        "commit": commit(),
        "environment": environment(),
    }
    return [RunLog(run.context.folder.log, run.name, run.stage, guard.health, facts)]


def _committed(run: StageRun) -> Callable[[Path, int], None]:
    """What happens with every complete checkpoint, on rank 0: the log gets it, and the pusher if there is one."""
    log, pusher = run.context.folder.log, run.context.pusher

    def committed(checkpoint: Path, step: int) -> None:
        append_save(log, run.name, step)
        if pusher is not None:
            pusher.add(checkpoint, run.name, step, run.stage, run.origin)

    return committed


def _guard(run: StageRun) -> Guard:
    stage = run.stage
    return Guard(
        run.where,
        Health(on_nonfinite=stage.on_nonfinite, on_spike=stage.on_spike, can_skip=stage.deepspeed is None),
        StopRequests(run.context.signals, run.context.folder.save_now if run.context.is_main else None),
        Watchdog(stage.step_timeout, run.where, run.context.peers.report),
        stage.loader_timeout,
    )


def _row_multiple(stage: Stage, args: transformers.TrainingArguments) -> int:
    if args.use_cpu and stage.precision != "float32":
        return 128  # CPU kernels for bfloat16 are rebuilt for every shape
    return FLOAT8_MULTIPLE if stage.fp8 else 1


def _meter(
    model: LlavaLlama31ForConditionalGeneration, stage: Stage, processor: LlavaLlama31Processor, device: torch.device
) -> Meter:
    def num_patch_features(sizes: Sequence[tuple[int, int]]) -> int:
        return int((model.model.feature_layout(sizes)[0] >= 0).sum())

    options = adapter_ranks(stage) | {"checkpointing": stage.recomputed}
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


def _questions(run: StageRun) -> list[TrainingQuestions]:
    """The sets that `eval_questions` names, in the order of the recipe; a number is of the first evaluation."""
    recipe, wanted = run.context.recipe, run.stage.eval_questions
    if wanted is None:
        return []
    limits = wanted if isinstance(wanted, dict) else {recipe.evaluations[0].name: wanted}
    sets: list[TrainingQuestions] = []
    for number, spec in enumerate(recipe.evaluations):
        if spec.name not in limits:
            continue
        found = question_set(spec, where=recipe.where_evaluation(number), limit=limits[spec.name])
        name = slug(spec.name).replace("-", "_") if sets else ""
        sets.append(
            TrainingQuestions(
                found.questions,
                preset=found.preset,
                max_new_tokens=found.max_new_tokens,
                batch_size=spec.batch_size,
                folder=run.folder.evaluation / name,
                name=name,
                task=found.task,
            )
        )
    return sets
