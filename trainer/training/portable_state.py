"""How an optimizer's state goes into a checkpoint: plain tensors, the same ones however many processes share it.

torchao's 8-bit moments are codes, and a scale for each block of them. FSDP2 shards a parameter's rows, and torchao
quantizes each process's rows by themselves, where they are enough and fill whole blocks. If all processes' are, their
blocks are those of the whole tensor, and any number of processes can resume from it. If only some are, the checkpoint
keeps the parts as they are: the same number of processes resumes with the same bits, another one with float32 moments.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from llava_llama31.packed_llama_llava_llama31 import to_device
from llava_llama31.trainer.distributed.parameters import held_part, joined_parts, num_before, sharded_like, unsharded


# the fields of torchao's 8-bit tensor; bitsandbytes nests its own tensors in a mapping with other keys
_FIELDS = ("codes", "scale", "qmap", "signed")
_PARTS = "parts"


def portable_state(optimizer: torch.optim.Optimizer, *, keep: bool = True) -> dict[str, Any] | None:
    """An optimizer's `state_dict` of plain tensors in host memory: torchao's 8-bit ones are taken apart.

    Sharded tensors are gathered one at a time, so that no device holds more than one whole. Collective.

    Args:
        keep: this process writes the state; the others gather with it and return None.

    Raises:
        TypeError: the state holds a kind of tensor that has no place in a checkpoint.
    """
    content = optimizer.state_dict()
    in_parts = _shares_blocks(content["state"])
    state = {number: _on_host(entry, keep, in_parts) for number, entry in content["state"].items()}
    return {**content, "state": state} if keep else None


def load_portable_state(optimizer: torch.optim.Optimizer, content: dict[str, Any]) -> None:
    """Undo `portable_state`, on as many processes as there are now."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {name: _held(value, parameters[number]) for name, value in entry.items()}
        for number, entry in content["state"].items()
    }
    optimizer.load_state_dict({**content, "state": state})


def _shares_blocks(state: dict[int, dict[str, Any]]) -> bool:
    """Whether any process holds blocks of a sharded tensor: all have to gather it in the same way. Collective."""
    sharded = [value for entry in state.values() for value in entry.values() if isinstance(value, DTensor)]
    if not sharded:
        return False
    device = held_part(sharded[0]).device
    found = to_device([any(_in_blocks(held_part(value)) for value in sharded)], device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=sharded[0].device_mesh.get_group())
    return bool(found.item())


def _on_host(value: Any, keep: bool, in_parts: bool) -> Any:
    """Plain copies in host memory of the tensors in an entry of a state, where they are kept. Collective."""
    if isinstance(value, dict):
        return {name: _on_host(item, keep, in_parts) for name, item in value.items()}
    if in_parts and isinstance(value, DTensor):
        parts = _gathered(value, keep)
        return _one_of_parts(parts, value.shape) if keep else None
    value = unsharded(value)
    if not isinstance(value, torch.Tensor):
        return value
    if _in_blocks(value):
        return _on_host(_fields(value), keep, in_parts)
    if not _is_plain(value):
        raise TypeError(f"the optimizer's state holds a {type(value).__name__}, which has no place in a checkpoint")
    return value.cpu() if keep else None


def _is_plain(value: torch.Tensor) -> bool:
    return type(value) is torch.Tensor


def _in_blocks(value: Any) -> bool:
    """Whether a value is torchao's 8-bit tensor, whose module has been imported where there is one."""
    module = sys.modules.get("torchao.optim.subclass_8bit")
    return module is not None and isinstance(value, module.OptimState8bit)


def _fields(blocks: Any) -> dict[str, Any]:
    return dict(zip(_FIELDS, (blocks.codes, blocks.scale, blocks.qmap, blocks.signed), strict=True))


def _gathered(value: DTensor, keep: bool) -> list[Any]:
    """Every process's part of a sharded tensor on the host, in the order of its rows: plain, or fields. Collective."""
    part: Any = value.to_local()
    group, device = value.device_mesh.get_group(), part.device
    if _in_blocks(part):
        signed = torch.tensor([part.signed], dtype=torch.uint8, device=device)
        given = [part.codes, part.scale, part.qmap, signed, torch.empty(0, dtype=value.dtype, device=device)]
    else:  # nothing to give of the fields
        dtypes = (torch.uint8, torch.float32, torch.float32, torch.uint8)
        given = [*(torch.empty(0, dtype=dtype, device=device) for dtype in dtypes), part]
    columns = [joined_parts(tensor, group) for tensor in given]
    if not keep:
        return []
    shape, parts = (-1, *value.shape[1:]), []
    for codes, scale, qmap, signed, plain in zip(*columns, strict=True):
        if codes.numel():
            fields = (codes.view(shape).cpu(), scale.cpu(), qmap.cpu(), bool(signed))
            parts.append(dict(zip(_FIELDS, fields, strict=True)))
        else:
            parts.append(plain.view(shape).cpu())
    return parts


def _one_of_parts(parts: list[Any], shape: torch.Size) -> Any:
    """A whole tensor, plain or in blocks, where its parts are of one kind; else the parts."""
    filled = [part for part in parts if isinstance(part, dict) or part.numel()]
    plain = [part for part in filled if not isinstance(part, dict)]
    if not plain and filled:
        joined = {name: torch.cat([part[name] for part in filled]) for name in ("codes", "scale")}
        return {**joined, "qmap": filled[0]["qmap"], "signed": filled[0]["signed"]}
    return torch.cat(plain).view(shape) if len(plain) == len(filled) else {_PARTS: parts}


def _held(value: Any, parameter: torch.Tensor) -> Any:
    """What this process holds of a value in a checkpoint, whose parameter may be sharded."""
    in_blocks, in_parts = (isinstance(value, dict) and set(value) == set(names) for names in (_FIELDS, [_PARTS]))
    if not isinstance(parameter, DTensor):
        return _tensor(value) if in_blocks else _plain(value) if in_parts else value
    own, before = parameter.to_local(), num_before(parameter)
    part = None
    if in_parts:
        parts, rank = value[_PARTS], parameter.device_mesh.get_local_rank()
        if len(parts) == parameter.device_mesh.size() and _tensor(parts[rank]).shape == own.shape:
            part = _tensor(parts[rank])
    elif in_blocks:
        part = _rows_in_blocks(value, before, own.shape)
    if part is None:
        return sharded_like(_plain(value) if in_blocks or in_parts else value, parameter)
    return DTensor.from_local(
        part.to(own.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _rows_in_blocks(fields: dict[str, Any], before: int, shape: torch.Size) -> Any:
    """The rows of this shape after so many numbers, as blocks; None where they begin or end within one."""
    size, end = fields["codes"].numel() // fields["scale"].numel(), before + shape.numel()
    if before % size or end % size or before == end:
        return None
    codes = fields["codes"].view(-1)[before:end].view(shape).clone()  # not a view, which would keep the whole alive
    return _tensor({**fields, "codes": codes, "scale": fields["scale"][before // size : end // size].clone()})


def _tensor(part: Any) -> Any:
    """torchao's tensor of these fields; a plain one as it is."""
    if not isinstance(part, dict):
        return part
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit(*(part[name] for name in _FIELDS))


def _plain(value: dict[str, Any]) -> torch.Tensor:
    """float32 numbers of blocks or of parts."""
    parts = value.get(_PARTS, [value])
    return torch.cat([_tensor(part).dequantize() if isinstance(part, dict) else part.float() for part in parts])
