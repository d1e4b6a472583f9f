"""Folders that are complete or invisible, and training state without pickles."""

import shutil
import sys
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.model.adapters import TRAINABLE_WEIGHTS
from llava_llama31.trainer.training.portable_state import portable_state
from llava_llama31.trainer.training.stage_checkpoints import load_weights


@pytest.fixture
def whole(tmp_path):
    """Two published checkpoints, each with two files and a folder."""

    def make(step):
        final = tmp_path / f"checkpoint-{step}"
        staging = atomic_folders.staging_folder(final)
        (staging / "sub").mkdir()
        (staging / "a.bin").write_bytes(bytes([step]) * 100)
        (staging / "sub" / "b.txt").write_text(f"step {step}")
        assert not final.exists()
        atomic_folders.commit(staging, final, {"step": step})
        return final

    return [make(2), make(10)]


def test_the_newest_whole_one_is_found_by_its_step(whole, tmp_path):
    assert atomic_folders.newest_whole(tmp_path) == (whole[1], [])
    assert atomic_folders.read_manifest(whole[1])["step"] == 10
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2", "checkpoint-10"] or len(
        list(tmp_path.iterdir())
    ) == 2


DAMAGE = {
    "truncated": lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]),
    "emptied": lambda f: f.write_bytes(b""),
    "a flipped byte": lambda f: f.write_bytes(bytes([f.read_bytes()[0] ^ 1]) + f.read_bytes()[1:]),
    "grown": lambda f: f.write_bytes(f.read_bytes() + b"x"),
    "deleted": lambda f: f.unlink(),
    "swapped with another step": lambda f: shutil.copy(str(f).replace("checkpoint-10", "checkpoint-2"), f),
}


CASES = [(name, damage) for name in ("a.bin", "sub/b.txt") for damage in DAMAGE]
CASES += [("manifest.json", damage) for damage in ("truncated", "emptied", "deleted", "swapped with another step")]


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_every_damage_falls_back_to_the_one_before_and_is_named(whole, tmp_path, damage, name):
    DAMAGE[damage](whole[1] / name)
    found, skipped = atomic_folders.newest_whole(tmp_path)
    assert found == whole[0]
    assert skipped[0][0] == whole[1] and (name in skipped[0][1] or name == "manifest.json")


def test_rotation_keeps_the_newest(whole, tmp_path):
    atomic_folders.rotate(tmp_path, 1)
    assert atomic_folders.numbered(tmp_path) == [whole[1]]


def test_a_leftover_of_a_killed_save_is_not_seen_and_is_swept(whole, tmp_path):
    staging = atomic_folders.staging_folder(tmp_path / "checkpoint-12")
    (staging / "half").write_text("x")
    assert atomic_folders.newest_whole(tmp_path)[0] == whole[1]
    assert list(atomic_folders.staging_folder(tmp_path / "checkpoint-12").iterdir()) == []


def test_training_state_round_trips_without_pickle(tmp_path):
    torch.manual_seed(3)
    parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(2))]
    optimizer = torch.optim.AdamW([{"params": [parameters[0]], "lr": 1e-3}, {"params": [parameters[1]]}])
    sum(p.square().sum() for p in parameters).backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    tree = {
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "numpy": np.random.get_state(),
        "cpu": torch.get_rng_state(),
        "nested": {1: (1.5, None, [True, "é"]), "x": ()},
    }
    atomic_folders.save_tree(tmp_path / "state", tree)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    back = atomic_folders.load_tree(tmp_path / "state")
    assert back["nested"] == tree["nested"]
    assert torch.equal(back["cpu"], tree["cpu"])
    assert np.array_equal(back["numpy"][1], tree["numpy"][1]) and back["numpy"][0] == tree["numpy"][0]
    for index, state in tree["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(back["optimizer"]["state"][index][name], value)
    optimizer.load_state_dict(back["optimizer"])
    scheduler.load_state_dict(back["scheduler"])


def test_what_has_no_place_in_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(TypeError, match="contains a object"):
        atomic_folders.save_tree(tmp_path / "state", {"a": object()})
    with pytest.raises(ValueError, match="JSON compliant"):
        atomic_folders.write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("has_torchao", [True, False])
def test_a_moment_of_another_librarys_kind_is_refused(monkeypatch, has_torchao):
    if not has_torchao:
        monkeypatch.delitem(sys.modules, "torchao.optim.subclass_8bit", raising=False)
        monkeypatch.setitem(sys.modules, "torchao", None)
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    optimizer.state[parameter]["momentum_buffer"] = TwoTensor(torch.ones(2), torch.ones(2))
    with pytest.raises(TypeError, match="holds a TwoTensor, which has no place in a checkpoint"):
        portable_state(optimizer)


@pytest.fixture
def one_shard():
    """A process group of this process alone, in which FSDP2 shards all the same."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_save_gathers_sharded_moments_one_at_a_time(one_shard, monkeypatch):
    """At 8B they are 64 GB, which every device would hold beside its own shards."""
    model = torch.nn.Sequential(*[torch.nn.Linear(8, 8, bias=False) for _ in range(4)])
    for layer in model:
        fully_shard(layer, mesh=one_shard)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    gather, gathered, most = DTensor.full_tensor, [], 0

    def full_tensor(self):
        nonlocal most
        whole = gather(self).clone()
        gathered.append(weakref.ref(whole))
        most = max(most, sum(reference() is not None for reference in gathered))
        return whole

    monkeypatch.setattr(DTensor, "full_tensor", full_tensor)
    assert portable_state(optimizer, keep=False) is None
    assert (len(gathered), most) == (8, 1)
    kept = portable_state(optimizer)
    assert all(type(value) is torch.Tensor for state in kept["state"].values() for value in state.values())


class Made(TorchDispatchMode):
    """Numbers in the largest tensor that an operation made on the meta device."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (
            isinstance(out, torch.Tensor)
            and out.is_meta
            and not func.is_view
            and func is not torch.ops.aten.copy_.default
        ):
            self.largest = max(self.largest, out.numel())
        return out


def test_weights_are_restored_without_a_second_copy_on_the_device(tmp_path):
    model = torch.nn.Linear(8, 8, device="meta")
    save_file({"weight": torch.ones(8, 8), "bias": torch.ones(8)}, tmp_path / TRAINABLE_WEIGHTS)
    with Made() as made:
        load_weights(model, tmp_path, only_trainable=True)
    assert made.largest == 0
    on_host = torch.nn.Linear(8, 8)
    load_weights(on_host, tmp_path, only_trainable=True)
    assert on_host.weight.eq(1).all() and on_host.bias.eq(1).all()
