"""Engines that shard, with this device alone: their steps, saves and the memory of a save."""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import PartialState

from gpu_checks.place import Detail, NotHere, Place, expect, held_at_most
from gpu_checks.small_runs import check_resume, first_step, make_recipe, train_here
from llava_llama31.trainer.training.llava_trainer import LlavaTrainer
from llava_llama31.trainer.training.portable_state import load_portable_state, portable_state


# tensors of the largest one's size that a save may hold on the device: gathered, and as float32
WHOLE_AT_ONCE = 2


def sharded(place: Place) -> Detail:
    """FSDP2 on this device alone: a step, its state gathered for a save one by one, and loaded again."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    backend, width = dist.get_default_backend_for_device(place.device), 64 if place.small else 1024
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(place.device.type, (1,))
        torch.manual_seed(0)
        model = torch.nn.Sequential(*[torch.nn.Linear(width, width, False, place.device) for _ in range(8)])
        plain = [layer.weight.detach().clone().requires_grad_() for layer in model]
        for layer in model:
            fully_shard(layer, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        x = torch.randn(8, width, device=place.device)
        model(x).square().sum().backward()
        optimizer.step()
        alone = torch.optim.AdamW(plain, lr=1e-2)
        y = x
        for weight in plain:
            y = y @ weight.T
        y.square().sum().backward()
        alone.step()
        with held_at_most(place) as held:
            state = portable_state(optimizer)
        assert state is not None
        for number, weight in enumerate(plain):
            wanted = alone.state[weight]["exp_avg"].cpu()
            close = torch.allclose(state["state"][number]["exp_avg"], wanted, rtol=1e-3, atol=1e-5)
            expect(close, "a gathered moment differs from that of one device")
        moments = [value for entry in state["state"].values() for value in entry.values()]
        expect_one_by_one(held[0], moments)
        load_portable_state(optimizer, state)
        return {"backend": backend, "save": held[0]}
    finally:
        dist.destroy_process_group()


def expect_one_by_one(held: int, saved: Sequence[torch.Tensor], kept: int = 0) -> None:
    """Whether a save held no more than the largest of its tensors, twice.

    Args:
        kept: bytes of copies that stay until all are written; on the host, and so on a CPU's device.
    """
    most = WHOLE_AT_ONCE * max(tensor.nbytes for tensor in saved) + kept
    expect(held <= most, f"a save took {held:,} bytes at once, and one by one its tensors take {most:,}")


def zero3(place: Place) -> Detail:
    """ZeRO-3 by the shipped file, with this device alone: steps, saves and a resume of `train`."""
    if find_spec("deepspeed") is None:
        raise NotHere("ZeRO needs DeepSpeed: pip install 'llava-llama31[deepspeed]'")
    import deepspeed  # noqa: F401

    if place.device.type == "cpu":  # its own reduction for CPUs, which it would compile
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    # DeepSpeed remembers the group of the first run: all of this process keep it
    keeps_group = mock.patch.object(PartialState, "destroy_process_group", lambda state, group=None: None)
    with keeps_group, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = []
        for keys in ({}, {"deepspeed": "zero3"}):
            recipe = make_recipe(folder, place, **keys)
            with measured_saves(place) as held:
                if not keys:
                    code, said = train_here(recipe, folder / "plain", None)
                    expect(code == 0, f"without DeepSpeed: exit code {code}: {said[-400:]}")
                else:
                    tensors = check_resume(train_here, recipe, folder)
            steps.append(first_step(folder / ("whole" if keys else "plain")))
        (loss, norm), (other, other_norm) = steps
        close = abs(other - loss) <= 2e-2 * loss and abs(other_norm - norm) <= 5e-2 * norm
        expect(close, f"loss and gradient norm are {other, other_norm}, and without DeepSpeed {loss, norm}")
        kept = sum(tensor.nbytes for tensor in tensors.values())
        expect_one_by_one(max(held), list(tensors.values()), kept if place.device.type == "cpu" else 0)
        return {"first_step": steps[1], "save": max(held)}


@contextmanager
def measured_saves(place: Place) -> Iterator[list[int]]:
    """Context; the list then has the bytes of each save of a checkpoint."""
    original, found = LlavaTrainer._save_checkpoint, []

    def measured(self: LlavaTrainer, model: Any, trial: Any) -> None:
        with held_at_most(place) as held:
            original(self, model, trial)
        found.extend(held)

    with mock.patch.object(LlavaTrainer, "_save_checkpoint", measured):
        yield found
