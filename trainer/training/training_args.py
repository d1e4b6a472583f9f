"""A stage as Transformers' TrainingArguments."""

import dataclasses
import difflib
import math
import typing
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from llava_llama31.trainer.distributed.devices import uses_cpu
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.model.device_options import optim_name
from llava_llama31.trainer.recipes.deepspeed_files import deepspeed_content, deepspeed_file
from llava_llama31.trainer.recipes.derived import Derived
from llava_llama31.trainer.recipes.schema import Stage


# every field of TrainingArguments is in one of three tables (test_device_options.py)
# decided by the stage -> what to set instead
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
    "load_best_model_at_end": "keep",
    "metric_for_best_model": "keep",
    "greater_is_better": "keep",
    "auto_find_batch_size": "micro_batch",
    "fsdp": "accelerate's configuration",
    "parallelism_config": "max_row_tokens: rows with images are not cut among devices",
    "bf16_full_eval": "precision",
    "fp16_full_eval": "precision",
    "dataloader_prefetch_factor": "dataloader_workers",
    "dataloader_persistent_workers": "dataloader_workers",
    "logging_strategy": "logging_steps",
    "eval_on_start": "eval_steps",
    "hub_model_id": "publish.repository",
    "hub_strategy": "publish",
    "hub_token": "the variable HF_TOKEN",
    "hub_private_repo": "publish",
    "hub_always_push": "publish",
    "hub_revision": "publish",
    "use_cpu": "the variable CUDA_VISIBLE_DEVICES",
    "accelerator_config": "global_batch and micro_batch",
    "fsdp_config": "accelerate's configuration",
    "ddp_timeout": "step_timeout",
    "ddp_backend": "the launcher's options",
    "local_rank": "the launcher's options",
    "resume_from_checkpoint": "--output: the same command resumes a run",
}
# without effect here, or with another meaning -> why
REFUSED = {
    "remove_unused_columns": "the collator names what the model gets",
    "label_names": "the labels come from the processor",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "save_only_model": "a checkpoint is complete",
    "push_to_hub": "a run is published from its export",
    "ignore_data_skip": "a resumed run sees the samples that are left",
    "save_on_each_node": "one process writes",
    "average_tokens_across_devices": "the loss is that of the global batch",
    "label_smoothing_factor": "the Trainer's smoothing expects labels that are shifted already",
    "use_cache": "a training row is read once",
    "eval_delay": "a stage validates from its first eval_steps on",
    "prediction_loss_only": "validation has its own loop",
    "eval_do_concat_batches": "validation has its own loop",
    "eval_use_gather_object": "validation has its own loop",
    "eval_accumulation_steps": "validation has its own loop",
    "include_for_metrics": "validation has its own loop",
    "batch_eval_metrics": "validation has its own loop",
    "enable_jit_checkpoint": "a signal saves already",
    "restore_callback_states_from_checkpoint": "checkpoints hold what callbacks need",
    "dataloader_multiprocessing_context": "data workers come from a fork server",
    "dataloader_in_order": "micro-batches keep their order",
    "length_column_name": "the check of the data gives the lengths",
    "do_train": "the command decides",
    "do_eval": "the command decides",
    "do_predict": "the command decides",
}
PASSED_THROUGH = {
    "ddp_broadcast_buffers",
    "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters",
    "ddp_static_graph",
    "dataloader_pin_memory",
    "debug",
    "disable_tqdm",
    "full_determinism",
    "include_num_input_tokens_seen",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "logging_first_step",
    "lr_scheduler_kwargs",
    "neftune_noise_alpha",
    "project",
    "report_to",
    "run_name",
    "skip_memory_metrics",
    "tf32",
    "torch_empty_cache_steps",
    "trackio_bucket_id",
    "trackio_space_id",
    "trackio_static_space_id",
}


# values that their fields take and do not list themselves
_VALUES = {"include_num_input_tokens_seen": ("all", "non_padding", "no")}
# of which `get_scheduler` drops the options
_WITHOUT_OPTIONS = ("constant", "constant_with_warmup")


def training_arguments(
    stage: Stage, derived: Derived, *, output_dir: Path, seed: int, where: str
) -> TrainingArguments:
    """TrainingArguments of a stage, with its `trainer_args` passed through.

    Raises:
        UserError: `trainer_args` has a key or a value that is not allowed.
    """
    check_trainer_args(stage.trainer_args, where, packing=stage.packing)
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
            use_cpu=uses_cpu(),
            # `tf32` is for `numerical_settings`
            **{"disable_tqdm": True, "ddp_find_unused_parameters": False, **stage.trainer_args, "tf32": None},
        )
    except (TypeError, ValueError) as error:
        fix = "see Transformers' TrainingArguments"
        raise UserError(f"TrainingArguments rejects it: {error}", where=f"{where}.trainer_args", fix=fix) from error


def check_trainer_args(trainer_args: dict[str, Any], where: str, *, packing: bool = False) -> None:
    """Check the names of the fields, the types of their values, and that the trackers they name are installed.

    Raises:
        UserError: naming the key, and what to set instead.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for key in trainer_args:
        place = f"{where}.trainer_args.{key}"
        if key in OWNED_BY_STAGE:
            raise UserError("the stage owns this", where=place, fix=f"set {OWNED_BY_STAGE[key]} instead")
        if key in REFUSED:
            raise UserError(f"is not supported: {REFUSED[key]}", where=place, fix="remove it")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            fix = f"did you mean {near[0]}?" if near else "see Transformers' TrainingArguments"
            raise UserError("TrainingArguments has no such field", where=place, fix=fix)
        if key not in PASSED_THROUGH:
            raise UserError("is newer than this package, which does not know its effect", where=place, fix="remove it")
        if key != "report_to":  # below
            _check_value(key, trainer_args[key], place)
    if packing and trainer_args.get("neftune_noise_alpha"):
        raise UserError(
            "its noise depends on a row's length, and a packed row holds several samples",
            where=f"{where}.trainer_args.neftune_noise_alpha",
            fix=f"set {where}.packing=false, or remove it",
        )
    _check_trackers(trainer_args.get("report_to"), f"{where}.trainer_args.report_to")


def _check_value(key: str, value: Any, where: str) -> None:
    """Check a value by its field's type and choices: TrainingArguments itself takes anything."""
    (field,) = (field for field in dataclasses.fields(TrainingArguments) if field.name == key)
    taken = typing.get_type_hints(TrainingArguments)[key]
    try:
        TypeAdapter(taken, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
    except ValidationError as error:
        what = f"{ascii(value)[:80]} is of another type: {error.errors()[0]['msg'].lower()}"
        raise UserError(what, where=where, fix=f"give {_type_name(taken)}") from None
    choices = _VALUES.get(key, field.metadata.get("choices"))
    if choices is not None and isinstance(value, str) and value not in choices:
        raise UserError(
            f"{ascii(value)[:80]} is not one of its values", where=where, fix=f"one of {', '.join(choices)}"
        )
    if isinstance(value, int | float) and value < 0:
        raise UserError(f"{value} is negative", where=where, fix="give a positive number, or remove it")


def _type_name(taken: Any) -> str:
    names = [getattr(part, "__name__", str(part)) for part in typing.get_args(taken) or (taken,)]
    return " or ".join({"NoneType": "null", "str": "text", "bool": "true or false"}.get(name, name) for name in names)


def _check_trackers(report_to: Any, where: str) -> None:
    names = [report_to] if isinstance(report_to, str) else report_to or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{report_to!r} is not a list of trackers", where=where, fix="give names, e.g. [tensorboard]")
    installed = set(get_available_reporting_integrations())
    for name in names:
        if name in ("none", "all") or name in installed:
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            near = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            fix = f"did you mean {near[0]}?" if near else f"one of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            raise UserError(f"there is no tracker {name!r}", where=where, fix=fix)
        raise UserError(f"{name} is not installed", where=where, fix=f"install {name}, or remove it")


def check_training_arguments(stage: Stage, derived: Derived, *, where: str) -> None:
    """Build what the stage will be trained with, so that a wrong value is found before any stage runs.

    Raises:
        UserError: TrainingArguments or the schedule rejects a value.
    """
    alone = stage.model_copy(update={"deepspeed": None})  # which would start its engine
    args = training_arguments(alone, derived, output_dir=Path("unused"), seed=0, where=where)
    _check_schedule(stage, args, derived, f"{where}.trainer_args.lr_scheduler_kwargs")


def _check_schedule(stage: Stage, args: TrainingArguments, derived: Derived, where: str) -> None:
    """Make the schedule and ask it for learning rates along the stage.

    Raises:
        UserError: it rejects its options, drops them, or gives a rate that is none.
    """
    options, fix = args.lr_scheduler_kwargs, f"see Transformers' schedule {stage.schedule}"
    if options and not isinstance(options, dict):
        raise UserError(f"{ascii(options)[:80]} is not a mapping of options", where=where, fix=fix)
    if options and stage.schedule in _WITHOUT_OPTIONS:
        raise UserError(f"schedule {stage.schedule} takes no options", where=where, fix="remove it")
    if options and "last_epoch" in options:
        raise UserError(
            "last_epoch is not an option: a resumed stage finds its step itself", where=where, fix="remove it"
        )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    try:
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=derived.warmup_steps,
            num_training_steps=derived.steps,
            scheduler_specific_kwargs=options or None,
        )
        rates = [
            share(step)
            for share in (schedule.lr_lambdas if isinstance(schedule, LambdaLR) else ())
            for step in {0, derived.warmup_steps, (derived.warmup_steps + derived.steps) // 2, derived.steps}
        ]
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"the schedule rejects it: {error}", where=where, fix=fix) from None
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        raise UserError(
            f"the schedule gives a learning rate of {min(rates):g} times the stage's", where=where, fix=fix
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
