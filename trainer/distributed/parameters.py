"""Parameters that may be sharded: gathered, counted, and sharded again, the same under every engine."""

import contextlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled


def whole_parameters(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], *, deepspeed: bool
) -> dict[str, torch.Tensor]:
    """Copies of named parameters in host memory, gathered from all processes. Collective.

    For bfloat16 weights that DeepSpeed trains these are the float32 originals. Rank 0 gets them; the other ranks get
    an empty mapping.
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
    """Within it a parameter that ZeRO-3 has partitioned is whole, as any other one always is.

    Args:
        changed: all processes write the same values to it.
    """
    if not is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([parameter], modifier_rank=0 if changed else None)


def num_elements(parameter: torch.nn.Parameter) -> int:
    """Numbers in a parameter, on whatever rank; a parameter that ZeRO-3 has partitioned reports zero itself."""
    if parameter.dtype == torch.uint8:  # bitsandbytes keeps two in a byte
        quantized: Any = parameter
        return int(quantized.quant_state.shape.numel())
    return parameter.numel() or (_partitioned(parameter).ds_numel if is_deepspeed_zero3_enabled() else 0)


def num_held(parameter: torch.nn.Parameter) -> int:
    """Numbers of a parameter that this process keeps between steps."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel()
    return parameter.numel() or (_partitioned(parameter).ds_tensor.ds_numel if is_deepspeed_zero3_enabled() else 0)


def _partitioned(parameter: torch.nn.Parameter) -> Any:
    """The parameter with the attributes that DeepSpeed adds to it, which its type does not declare."""
    return parameter


def unsharded(value: Any) -> Any:
    """A tensor joined from all processes' shards (collective); any other value unchanged."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def joined_parts(part: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """All processes' parts of a tensor, each flat and of a length of its own, in the order of ranks. Collective."""
    size = torch.tensor([part.numel()], device=part.device)
    sizes = [torch.empty_like(size) for _ in range(group.size())]
    dist.all_gather(sizes, size, group=group)
    lengths = torch.cat(sizes).tolist()
    padded = part.new_zeros(max(lengths))
    padded[: part.numel()] = part.reshape(-1)
    whole = [torch.empty_like(padded) for _ in range(group.size())]
    if padded.numel():
        dist.all_gather(whole, padded, group=group)
    return [row[:length] for row, length in zip(whole, lengths, strict=True)]


def held_part(value: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def num_before(value: torch.Tensor) -> int:
    """Numbers of a tensor that lie before this process's part of it; it is whole, or its rows are sharded."""
    if not isinstance(value, DTensor):
        return 0
    rows, row = value.shape[0], value.numel() // max(1, value.shape[0])
    for dimension, placement in enumerate(value.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0, "FSDP2 shards rows"
            each = -(-rows // value.device_mesh.size(dimension))
            return min(rows, each * value.device_mesh.get_local_rank(dimension)) * row
    return 0


def sharded_like(value: Any, parameter: torch.Tensor) -> Any:
    """This process's part of a whole tensor, sharded as the parameter of the same shape; any other value unchanged."""
    if not (isinstance(value, torch.Tensor) and isinstance(parameter, DTensor)) or value.shape != parameter.shape:
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
