"""A run uses each of the Hub's repositories at one revision, whatever their branches do meanwhile."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import yaml
from hub_server import MAIN, Blob, Repo, hub_of_this_process
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file

from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.data.sources.dataset_rows import DatasetRows
from llava_llama31.trainer.recipes.schema import Recipe
from llava_llama31.trainer.runs import run as run_module
from llava_llama31.trainer.runs.origins import at_revisions, resolve_revisions
from llava_llama31.trainer.training.llava_trainer import LlavaTrainer


@pytest.fixture
def repo(monkeypatch, tmp_path, base_folder):
    """me/base on a Hub of the test, with its cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    with hub_of_this_process("hf_" + "o" * 34, monkeypatch) as hub:
        repo = hub.create("me/base", private=False)
        move(repo, base_folder)
        yield repo


def move(repo: Repo, folder: Path, scale: float = 1.0) -> str:
    """Commit a checkpoint's files to main, its MLPs scaled; returns the commit."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    tensors = load_file(folder / "model.safetensors")
    scaled = {name: tensor * (scale if "mlp" in name else 1) for name, tensor in tensors.items()}
    copy_of_weights = folder.parent / "moved.safetensors"
    save_file(scaled, copy_of_weights, metadata={"format": "pt"})
    files["model.safetensors"] = copy_of_weights.read_bytes()
    return repo.commit(MAIN, f"x{scale}", {name: Blob(content) for name, content in files.items()}).oid


@pytest.fixture
def train(recipe_content, tmp_path):
    def run(name: str, **instruct) -> tuple[int, Path]:
        content = copy.deepcopy(recipe_content)
        del content["evaluation"]
        content["model"]["checkpoint"] = "me/base"
        content["stages"]["instruct"] |= instruct
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return main(["train", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / name)]), tmp_path / name

    return run


def assert_same_weights(run: Path, reference: Path) -> None:
    ours, expected = (load_file(folder / "export/model.safetensors") for folder in (run, reference))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_branch_that_moves_between_two_stages_is_not_followed(train, repo, base_folder, monkeypatch):
    first = repo.refs[MAIN]
    code, reference = train("reference", init_from="me/base")
    assert code == 0
    run_stage = run_module.run_stage

    def moving(stage):
        record = run_stage(stage)
        move(repo, base_folder, scale=2.0)
        return record

    monkeypatch.setattr(run_module, "run_stage", moving)
    code, run = train("run", init_from="me/base")
    assert code == 0 and repo.refs[MAIN] != first
    assert json.loads((run / "origins.json").read_text()) == {"me/base": first}
    record = json.loads((run / "record.json").read_text())
    assert [Path(stage["init_from"]).name for stage in record["stages"]] == [first, first]
    (base,) = record["base_models"]
    assert (base["id"], base["revision"], Path(base["folder"]).name) == ("me/base", first, first)
    assert f"me/base at {first}" in (run / "export/README.md").read_text()
    assert_same_weights(run, reference)


@pytest.mark.slow
def test_a_resume_under_lora_keeps_its_base_and_says_that_the_branch_moved(
    train, repo, base_folder, monkeypatch, capsys
):
    first, options = repo.refs[MAIN], {"init_from": "me/base", "lora": {"r": 4, "alpha": 8}}
    code, reference = train("reference", **options)
    assert code == 0 and "has moved" not in capsys.readouterr().err
    original = LlavaTrainer.training_step

    def failing(self, *args, **kwargs):
        if self.state.global_step == 4 and "instruct" in self.args.output_dir:
            raise KeyError("planted")
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LlavaTrainer, "training_step", failing)
        assert train("run", **options)[0] == 1
    moved = move(repo, base_folder, scale=2.0)
    capsys.readouterr()
    code, run = train("run", **options)
    said = capsys.readouterr().err
    assert code == 0 and "checkpoint-4, step 4 of 6" in said
    assert f"model.checkpoint: me/base has moved to {moved} since this run began; the run stays at {first}" in said
    assert_same_weights(run, reference)


def test_a_data_set_is_loaded_at_the_revision_that_the_run_began_with(monkeypatch, tmp_path, recipe_content):
    commits, loaded = ["a" * 40, "b" * 40], []
    monkeypatch.setattr(HfApi, "repo_info", lambda *_, **options: SimpleNamespace(sha=commits[0]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, **options: loaded.append((name, options["revision"])))
    for stage, path in zip(recipe_content["stages"].values(), ("me/rows", "me/rows:small"), strict=True):
        stage["data"] = [{**stage["data"][0], "path": path}]
    recipe, folder, said = Recipe.model_validate(recipe_content), RunFolder(tmp_path), []
    first = resolve_revisions(recipe, folder, said.append)
    assert first == {"datasets/me/rows": "a" * 40, "datasets/me/rows:small": "a" * 40} and not said
    commits.pop(0)
    again = at_revisions(recipe, resolve_revisions(recipe, folder, said.append))
    paths = [stage.data[0].path for stage in again.stages.values()]
    assert paths == [f"me/rows@{'a' * 40}", f"me/rows:small@{'a' * 40}"]
    assert len(said) == 2 and f"has moved to {'b' * 40}" in said[0] and "stages.projector.data.0" in said[0]
    for path in paths:
        with pytest.raises(AttributeError):  # of the None that the stand-in loads
            DatasetRows(path, "train")
    assert loaded == [(("me/rows", None), "a" * 40), (("me/rows", "small"), "a" * 40)]
