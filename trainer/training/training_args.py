"""A stage as Transformers' TrainingArguments."""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.model.device_options import optim_name
from llava_llama31.trainer.recipes.deepspeed_files import deepspeed_content, deepspeed_file
from llava_llama31.trainer.recipes.derived import Derived
from llava_llama31.trainer.recipes.schema import Stage


# TrainingArguments that the stage decides -> the key of the stage that decides them
OWNED_BY_STAGE = {
    "output_dir": "--output",
    "seed": "the recipe's seed",
    "data_seed": "the recipe's seed",
    "max_steps": "max_steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "micro_batch",
    "per_device_eval_batch_size": "micro_batch",
    "gradient_accumulation_steps": "global_batch",
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup_ratio",
    "weight_decay": "weight_decay",
    "adam_beta1": "adam_beta1",
    "adam_beta2": "adam_beta2",
    "adam_epsilon": "adam_epsilon",
    "max_grad_norm": "max_grad_norm",
    "optim": "optimizer",
    "optim_args": "optimizer",
    "optim_target_modules": "optimizer",
    "torch_compile": "compile",
    "torch_compile_backend": "compile",
    "torch_compile_mode": "compile",
    "use_liger_kernel": "compile",
    "liger_kernel_config": "compile",
    "bf16": "precision",
    "fp16": "precision",
    "activation_checkpointing": "activation_checkpointing",
    "activation_checkpointing_kwargs": "activation_checkpointing",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing",
    "deepspeed": "deepspeed",
    "eval_strategy": "eval_steps",
    "eval_steps": "eval_steps",
    "save_strategy": "save_steps",
    "save_steps": "save_steps",
    "save_total_limit": "save_total_limit",
    "logging_steps": "logging_steps",
    "dataloader_num_workers": "dataloader_workers",
    "train_sampling_strategy": "group_by_length",
    "dataloader_drop_last": "last_batch",
    "remove_unused_columns": "nothing: the collator names what the model gets",
    "label_names": "nothing: the labels come from the processor",
    "logging_nan_inf_filter": "nothing: a loss that is not finite stops the run",
    "save_only_model": "nothing: a checkpoint is complete",
    "load_best_model_at_end": "keep",
    "metric_for_best_model": "keep",
    "greater_is_better": "keep",
    "push_to_hub": "nothing: a run is published from its export",
    "auto_find_batch_size": "micro_batch",
    "ignore_data_skip": "nothing: a resumed run sees the samples that are left",
    "save_on_each_node": "nothing: one process writes",
    "fsdp": "accelerate's configuration",
    "parallelism_config": "max_row_tokens: rows with images are not cut among devices",
    "bf16_full_eval": "precision",
    "fp16_full_eval": "precision",
    "dataloader_prefetch_factor": "dataloader_workers",
    "dataloader_persistent_workers": "dataloader_workers",
    "average_tokens_across_devices": "nothing: the loss is that of the global batch",
}


def training_arguments(
    stage: Stage, derived: Derived, *, output_dir: Path, seed: int, where: str
) -> TrainingArguments:
    """TrainingArguments of a stage, with its `trainer_args` passed through.

    Raises:
        UserError: when `trainer_args` has an unknown key, or one that the stage owns.
    """
    check_trainer_args(stage.trainer_args, where)
    deepspeed = str(deepspeed_file(stage.deepspeed, where)) if stage.deepspeed else None
    optim = optim_name(stage, where)
    try:
        return TrainingArguments(
            output_dir=str(output_dir),
            seed=seed,
            data_seed=seed,
            max_steps=derived.steps,
            per_device_train_batch_size=stage.micro_batch,
            per_device_eval_batch_size=stage.micro_batch,
            gradient_accumulation_steps=derived.gradient_accumulation,
            learning_rate=max(stage.learning_rates().values()),
            lr_scheduler_type=stage.schedule,
            warmup_steps=derived.warmup_steps,
            weight_decay=stage.weight_decay,
            adam_beta1=stage.adam_beta1,
            adam_beta2=stage.adam_beta2,
            adam_epsilon=stage.adam_epsilon,
            max_grad_norm=stage.max_grad_norm,
            bf16=stage.precision != "float32",
            optim=optim,
            deepspeed=deepspeed,
            eval_strategy="steps" if stage.eval_steps else "no",
            eval_steps=stage.eval_steps,
            metric_for_best_model={"best_loss": "eval_loss", "best_accuracy": "eval_accuracy"}.get(stage.keep),
            save_strategy="steps",
            save_steps=stage.save_steps,
            save_total_limit=stage.save_total_limit,
            logging_steps=stage.logging_steps,
            dataloader_num_workers=stage.dataloader_workers,
            remove_unused_columns=False,
            prediction_loss_only=True,
            label_names=["labels"],
            logging_nan_inf_filter=False,
            use_cpu=not torch.cuda.is_available(),
            **{"disable_tqdm": True, "ddp_find_unused_parameters": False, **stage.trainer_args},
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"TrainingArguments rejects it: {error}", where=f"{where}.trainer_args") from error


def check_trainer_args(trainer_args: dict[str, Any], where: str) -> None:
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for key in trainer_args:
        if key in OWNED_BY_STAGE:
            raise UserError(
                "the stage owns this", where=f"{where}.trainer_args.{key}", fix=f"set {OWNED_BY_STAGE[key]} instead"
            )
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UserError(
                "TrainingArguments has no such field",
                where=f"{where}.trainer_args.{key}",
                fix=f"did you mean {near[0]}?" if near else "see Transformers' TrainingArguments",
            )


def check_deepspeed(stage: Stage, where: str) -> None:
    """Refuse a DeepSpeed file whose own optimizer would undo what the stage says.

    Raises:
        UserError: naming the key.
    """
    file = deepspeed_file(stage.deepspeed or "", where)
    if "optimizer" not in deepspeed_content(str(file), where):
        return
    if len(set(stage.learning_rates().values())) > 1:
        raise UserError(
            f"{file.name} has an optimizer of its own, with one learning rate for all groups",
            where=f"{where}.learning_rate",
            fix="give one rate, or a DeepSpeed file without optimizer",
        )
    if "decay_all_parameters" not in stage.quirks:
        raise UserError(
            f"{file.name} has an optimizer of its own, which decays norms and biases too",
            where=f"{where}.quirks",
            fix="add decay_all_parameters, or give a DeepSpeed file without optimizer",
        )
