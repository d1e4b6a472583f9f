"""Folders that are complete or invisible, and training state without pickles."""

import shutil

import numpy as np
import pytest
import torch

from llava_llama31.trainer.checkpoint import atomic_folders


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
