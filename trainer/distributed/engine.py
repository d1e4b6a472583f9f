"""What spreads a stage over devices: nothing or DDP, DeepSpeed's ZeRO, or PyTorch's FSDP2.

A stage's `deepspeed` decides; where it is silent, the configuration that `accelerate launch` was given.

Checkpoints of the first kind and of FSDP2 have one format and go from one to the other, and to any number of
processes. DeepSpeed's have its own, one file a process.
"""

import contextlib
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.schema import Stage


def uses_fsdp() -> bool:
    """Whether `accelerate launch` was told to shard by FSDP; known before anything is loaded."""
    return _is_set("ACCELERATE_USE_FSDP")


def uses_deepspeed(args: TrainingArguments) -> bool:
    return args.deepspeed_plugin is not None


def engine_of(args: TrainingArguments) -> str:
    """Name of the engine that decides a checkpoint's format: plain, fsdp2, or zero1 to zero3."""
    if uses_deepspeed(args):
        return f"zero{args.deepspeed_plugin.zero_stage}"
    return "fsdp2" if uses_fsdp() else "plain"


def as_launched(stage: Stage, where: str) -> Stage:
    """The stage with the DeepSpeed file that `accelerate launch` names, unless the stage has one of its own.

    To be asked before the first stage runs: the launcher's word does not outlive it.

    Raises:
        UserError: the launcher's configuration can't run the stage.
    """
    if _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise UserError(
            "context, sequence and tensor parallelism cut a row among devices, which its pictures do not survive",
            where=where,
            fix="remove parallelism_config from accelerate's file; max_row_tokens and ZeRO-3 save memory too",
        )
    if uses_fsdp():
        _check_fsdp(stage, where)
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
            "this is FSDP1, which PyTorch gives up", where=where, fix="set fsdp_version: 2 in accelerate's file"
        )
    if stage.lora is not None and stage.lora.quantize:
        raise UserError(
            "quantized weights under FSDP are not there yet", where=f"{where}.lora.quantize", fix="remove quantize"
        )
    if stage.precision == "bfloat16-weights":
        raise UserError(
            "under FSDP trained weights are float32", where=f"{where}.precision", fix="set precision: bfloat16"
        )
    if _is_set("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError(
            "the recipe says what is recomputed, not accelerate's configuration",
            where=where,
            fix=f"remove fsdp_activation_checkpointing there, and set {where}.activation_checkpointing",
        )


def fsdp_plugin(*, bfloat16: bool) -> FullyShardedDataParallelPlugin:
    """What `accelerate launch` was told, with weights gathered in bfloat16 but gradients added up in float32.

    Accelerate's own choice would add gradients up, and round the loss, in bfloat16.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bfloat16 else None,
        reduce_dtype=torch.float32 if bfloat16 else None,
        cast_forward_inputs=False,  # it would round rotary angles too
    )
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def join_deepspeed(stage: Stage) -> None:
    """Let DeepSpeed use the processes' communication before a model is loaded: its weights are spread at once.

    One process alone gets the environment that a launcher would give it.
    """
    if stage.deepspeed is None:
        return
    import deepspeed

    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if "RANK" not in os.environ:
        os.environ.update(alone)
    if not deepspeed.comm.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def forget_deepspeed() -> None:
    """Models that are loaded from here on are whole again, and stages run under what they ask for themselves.

    accelerate leaves its mark in the environment, where the next stage's TrainingArguments would find it.
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
        f"{args.world_size}: DeepSpeed's checkpoints cannot be spread anew",
        where=str(checkpoint),
        fix="go on as before until the stage ends, whose weights every engine takes; or remove the checkpoints",
    )


def whole_parameters(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], *, deepspeed: bool
) -> dict[str, torch.Tensor]:
    """Copies in host memory of named parameters, gathered from all processes, which call this together.

    Of bfloat16 weights that DeepSpeed trains these are the float32 originals. The main process has them; the others
    get an empty mapping.
    """
    is_main = PartialState().is_main_process
    whole = {}
    for name, parameter in parameters:
        with gathered(parameter):
            tensor = unsharded(parameter.detach())
            if deepspeed and parameter.requires_grad and parameter.dtype != torch.float32:
                from deepspeed.utils import safe_get_full_fp32_param

                tensor = safe_get_full_fp32_param(parameter)
            if is_main:
                whole[name] = tensor.cpu().clone().contiguous()
    return whole


def gathered(parameter: torch.nn.Parameter, *, changed: bool = False) -> AbstractContextManager[None]:
    """Within it a parameter is whole that ZeRO-3 has partitioned; any other one is so anyway.

    Args:
        changed: it is written to, by all processes alike.
    """
    if not is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([parameter], modifier_rank=0 if changed else None)


def num_elements(parameter: torch.nn.Parameter) -> int:
    """Numbers in a parameter, wherever they are; what ZeRO-3 has partitioned calls itself empty."""
    if parameter.dtype == torch.uint8:  # bitsandbytes keeps two in a byte
        return parameter.quant_state.shape.numel()
    return parameter.numel() or (parameter.ds_numel if is_deepspeed_zero3_enabled() else 0)


def num_held(parameter: torch.nn.Parameter) -> int:
    """Numbers of a parameter that this process keeps between steps."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel()
    return parameter.numel() or (parameter.ds_tensor.ds_numel if is_deepspeed_zero3_enabled() else 0)


def unsharded(value: Any) -> Any:
    """A tensor of all processes' shards, which call this together; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def sharded_like(value: Any, parameter: torch.Tensor) -> Any:
    """This process's part of a whole tensor of a parameter's shape, spread as the parameter is; else the value."""
    if not (isinstance(value, torch.Tensor) and isinstance(parameter, DTensor)) or value.shape != parameter.shape:
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")
