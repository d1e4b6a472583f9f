"""Sharded 8-bit moments in a checkpoint, on two ranks of gloo: the same bits after a save and a load.

The parameters' rows give whole blocks on both ranks, on one of them, on none, and parts that end within the blocks of
the whole tensor.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.compiler import set_stance
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torchao.optim import AdamW8bit

from llava_llama31.trainer.checkpoint.atomic_folders import load_tree, save_tree
from llava_llama31.trainer.distributed.parameters import unsharded
from llava_llama31.trainer.training.portable_state import load_portable_state, portable_state


SHAPES = {"both": (128, 96), "one": (63, 128), "none": (64, 96), "within": (64, 100), "row": (1, 7), "bias": (7,)}


class Parameters(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape, generator=generator)))


def made(*, sharded: bool) -> tuple[Parameters, AdamW8bit]:
    module = Parameters()
    if sharded:
        fully_shard(module)
    return module, AdamW8bit(module.parameters(), lr=1e-2)


def train(module: Parameters, optimizer: AdamW8bit, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.grad = parameter.detach() + noise
        optimizer.step()


def moments(module: Parameters, optimizer: AdamW8bit) -> dict[str, torch.Tensor]:
    """All moments as float32 numbers of whole tensors. Collective where they are sharded."""
    found = {}
    for name, parameter in module.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            value = optimizer.state[parameter][key]
            if isinstance(value, DTensor):
                part = value.to_local()
                part = part if type(part) is torch.Tensor else part.dequantize()
                value = DTensor.from_local(
                    part, value.device_mesh, value.placements, shape=value.shape, stride=value.stride()
                )
            value = unsharded(value)
            found[f"{name}.{key}"] = value if type(value) is torch.Tensor else value.dequantize()
    return found


def resumed(folder: Path, module: Parameters, *, sharded: bool) -> tuple[Parameters, AdamW8bit]:
    """A module with the weights of another one, and an optimizer with the state in a folder."""
    again, optimizer = made(sharded=sharded)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            whole = parameter if sharded == isinstance(parameter, DTensor) else unsharded(parameter)
            again.get_parameter(name).copy_(whole)
    load_portable_state(optimizer, load_tree(folder))
    return again, optimizer


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    module, optimizer = made(sharded=True)
    train(module, optimizer, seed=1)
    kinds = [type(optimizer.state[p]["exp_avg"].to_local()) is not torch.Tensor for p in module.parameters()]
    assert kinds == [[True, True, False, False, False, False], [True] + [False] * 5][rank], kinds
    state = portable_state(optimizer, keep=rank == 0)
    assert (state is None) == (rank == 1)
    if state is not None:
        save_tree(folder / "two", state)
    dist.barrier()

    again, other = resumed(folder / "two", module, sharded=True)
    for one, two in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(type(one[key].to_local()) is type(two[key].to_local()) for key in ("exp_avg", "exp_avg_sq"))
    before = moments(module, optimizer)
    train(module, optimizer, seed=2)
    train(again, other, seed=2)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.to_local(), again.get_parameter(name).to_local()), name
    ours, theirs = moments(module, optimizer), moments(again, other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    # one process resumes from what two have written, and two from what one has
    alone, single = made(sharded=False)
    load_portable_state(single, load_tree(folder / "two"))
    found = moments(alone, single)
    assert all(torch.equal(found[name], before[name]) for name in before)
    train(alone, single, seed=3)
    if rank == 0:
        save_tree(folder / "one", portable_state(single))
    dist.barrier()
    again, other = made(sharded=True)
    load_portable_state(other, load_tree(folder / "one"))
    found, expected = moments(again, other), moments(alone, single)
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    # without a checkpoint between: whole blocks are those of one process
    alone, single = made(sharded=False)
    train(alone, single, seed=1)
    expected = moments(alone, single)
    assert all(torch.equal(before[name], expected[name]) for name in before if name.startswith(("both", "bias")))
    dist.destroy_process_group()


if __name__ == "__main__":
    with set_stance("force_eager"):
        main(Path(sys.argv[1]))
