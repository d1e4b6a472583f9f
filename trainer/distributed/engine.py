"""The engine that spreads a stage over devices: none or DDP, DeepSpeed's ZeRO, or PyTorch's FSDP2.

A stage's `deepspeed` decides; without it, the configuration that `accelerate launch` was given.

Checkpoints of plain training, DDP and FSDP2 share one format: each of these resumes the others' checkpoints, with any
number of processes. DeepSpeed has a format of its own, with one file per process.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from llava_llama31.trainer.distributed.devices import default_device, is_asked_for_cpu
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.schema import Stage


# how long a collective may take: rank 0 may read images by OCR for hours while the others wait
COLLECTIVE_TIMEOUT = timedelta(hours=24)


def uses_fsdp() -> bool:
    """Whether `accelerate launch` was set to shard by FSDP; known before anything is loaded."""
    return _is_set("ACCELERATE_USE_FSDP")


def uses_deepspeed(args: TrainingArguments) -> bool:
    return args.deepspeed_plugin is not None


def engine_of(args: TrainingArguments) -> str:
    """Name of the engine that decides a checkpoint's format: plain, fsdp2, or zero1 to zero3."""
    if args.deepspeed_plugin is not None:
        return f"zero{args.deepspeed_plugin.zero_stage}"
    return "fsdp2" if uses_fsdp() else "plain"


def as_launched(stage: Stage, where: str) -> Stage:
    """The stage with the DeepSpeed file that `accelerate launch` names, unless the stage has one of its own.

    Call it before the first stage; the launcher's settings are cleared afterwards.

    Raises:
        UserError: the launcher's configuration can't run the stage.
    """
    if _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise UserError(
            "context, sequence and tensor parallelism split a row across devices, which breaks its images",
            where=where,
            fix="remove parallelism_config from accelerate's file; max_row_tokens and ZeRO-3 save memory too",
        )
    if uses_fsdp():
        _check_fsdp(stage, where)
    if is_asked_for_cpu() and (stage.deepspeed is not None or _is_set("ACCELERATE_USE_DEEPSPEED")):
        raise UserError(
            "Accelerate trains without DeepSpeed when told to use the CPU",
            where=f"{where}.deepspeed",
            fix=f"add --set {where}.deepspeed=null, or instead of --cpu hide the GPUs: CUDA_VISIBLE_DEVICES=",
        )
    if stage.deepspeed is not None or not _is_set("ACCELERATE_USE_DEEPSPEED"):
        return stage
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file == "none":
        raise UserError(
            "accelerate's configuration asks for DeepSpeed without naming its file",
            where=where,
            fix="write deepspeed_config_file into it, e.g. examples/deepspeed/zero3.json",
        )
    try:
        return Stage.model_validate({**stage.model_dump(), "deepspeed": file})
    except ValueError as error:
        raise UserError(f"DeepSpeed can't run this stage: {error}", where=where) from None


def _check_fsdp(stage: Stage, where: str) -> None:
    if stage.deepspeed is not None:
        raise UserError(
            f"the stage asks for DeepSpeed ({stage.deepspeed}), accelerate's configuration for FSDP",
            where=f"{where}.deepspeed",
            fix=f"add --set {where}.deepspeed=null, or launch without FSDP",
        )
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "this is FSDP1, which PyTorch deprecates", where=where, fix="set fsdp_version: 2 in accelerate's file"
        )
    if stage.lora is not None and stage.lora.quantize:
        raise UserError(
            "quantized weights are not supported under FSDP yet", where=f"{where}.lora.quantize", fix="remove quantize"
        )
    if stage.precision == "bfloat16-weights":
        raise UserError(
            "under FSDP trained weights are float32", where=f"{where}.precision", fix="set precision: bfloat16"
        )
    if _is_set("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError(
            "the recipe decides what is recomputed, not accelerate's configuration",
            where=where,
            fix=f"remove fsdp_activation_checkpointing there, and set {where}.activation_checkpointing",
        )


def fsdp_plugin(*, bfloat16: bool, layers: Sequence[str] = ()) -> FullyShardedDataParallelPlugin:
    """The launcher's plugin, with weights gathered in bfloat16 but gradients added up in float32.

    Accelerate's own choice would add gradients up, and round the loss, in bfloat16.

    Args:
        layers: classes that are sharded one by one, unless the launcher's file names others.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bfloat16 else None,
        reduce_dtype=torch.float32 if bfloat16 else None,
        cast_forward_inputs=False,  # it would round rotary angles too
    )
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    return FullyShardedDataParallelPlugin(
        mixed_precision_policy=policy,
        transformer_cls_names_to_wrap=named.split(",") if named else list(layers) or None,
    )


def join_deepspeed(stage: Stage) -> None:
    """Initialise DeepSpeed's communication before a model is loaded: ZeRO-3 shards weights while they load.

    A single process gets the environment that a launcher would set.
    """
    if stage.deepspeed is None:
        return
    import deepspeed

    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if "RANK" not in os.environ:
        os.environ.update(alone)
    if not deepspeed.comm.is_initialized():
        backend = torch.distributed.get_default_backend_for_device(default_device())
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    _allow_waiting()


def _allow_waiting() -> None:
    """Give DeepSpeed's own group of all processes the time that the others have.

    It is made with PyTorch's default, 10 minutes under NCCL, which then aborts every process; a data worker or a step
    may take longer (`loader_timeout`, `step_timeout`).
    """
    from deepspeed.utils import groups
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _set_pg_timeout(COLLECTIVE_TIMEOUT, groups._get_data_parallel_group())


def forget_deepspeed() -> None:
    """Load models unsharded from here on, and let the next stage choose its engine itself.

    Accelerate leaves a variable in the environment, which the next stage's TrainingArguments would read.
    """
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def check_resumable(manifest: dict[str, Any], args: TrainingArguments, checkpoint: Path) -> None:
    """Refuse a checkpoint that this engine can't read.

    Raises:
        UserError: naming the engine and the number of processes that can.
    """
    engine, before = engine_of(args), manifest.get("engine", "plain")
    same = engine == before and args.world_size == manifest["num_processes"]
    if same or not any(name.startswith("zero") for name in (engine, before)):
        return
    raise UserError(
        f"written under {before} by {manifest['num_processes']} processes, and this is {engine} with "
        f"{args.world_size}: DeepSpeed's checkpoints cannot be sharded differently",
        where=str(checkpoint),
        fix="resume as before until the stage ends, whose weights every engine loads; or remove the checkpoints",
    )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")
