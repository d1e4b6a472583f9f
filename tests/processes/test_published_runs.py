"""A run from its first step to the Hub, in processes of its own."""

import shutil
from pathlib import Path

import pytest
import yaml
from hub_server import hub_of_this_process
from transformers import AutoModelForImageTextToText

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.errors import Unpublished
from llava_llama31.trainer.fault_tolerance.signals import Signals
from llava_llama31.trainer.publishing.doors import empty_cache, fetch
from llava_llama31.trainer.recipes.loading import load_recipe
from llava_llama31.trainer.runs.run import run_recipe


UNOPENED = str(Path(__file__).with_name("unopened.py"))
TOKEN = "hf_" + "r" * 34
REPO = "me/mine"


@pytest.fixture
def hub(monkeypatch):
    with hub_of_this_process(TOKEN, monkeypatch) as hub:
        yield hub


def write_recipe(content: dict, path: Path, **publish) -> Path:
    content["model"].setdefault("licence", "apache-2.0")
    content["publish"] = {"repo_id": REPO, **publish}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.mark.timeout(900)
def test_a_run_of_two_processes_with_the_hub_down_and_up(hub, recipe_content, tmp_path, forks):
    del recipe_content["evaluation"], recipe_content["stages"]["projector"]
    recipe_content["stages"]["instruct"]["save_steps"] = 4  # and at its end
    path, run = write_recipe(recipe_content, tmp_path / "recipe.yaml", hub_strategy="every_save"), tmp_path / "run"
    arguments = ("train", path, "--output", run)
    # the checks pass, then nothing can be written
    hub.faults = [("create_repo", "drop")] * 1000
    output, _ = forks.start(*arguments, processes=2, script=UNOPENED, deadline=500.0).communicate(timeout=500)
    summary = atomic_folders.read_json(run / "summary.json")
    assert (run / "export" / "manifest.json").is_file() and not hub.repos
    assert not summary["publish"]["published"]
    assert summary["publish"]["resume"] == f"llava-llama31 publish {run} --repo-id {REPO}"
    assert summary["publish"]["resume"] in output and TOKEN not in output
    assert "the run has finished but is not yet published" in output
    saves = summary["saves"]
    assert not saves["pushed"] and "instruct-step-6" in saves["failed"]
    assert len(saves["skipped"]) + len(saves["failed"]) == 2
    # still no way: the code of a process without a launcher
    hub.faults = [("whoami", 403)]
    with pytest.raises(Unpublished) as caught:
        run_recipe(load_recipe(str(path), output=run), run, command="test", signals=Signals())
    assert caught.value.exit_code == 8 and "the Hub answered 403" in str(caught.value)
    # up: the same command publishes and trains nothing
    last = forks.start(*arguments, script=UNOPENED)
    output, _ = last.communicate(timeout=280)
    assert last.returncode == 0, output
    told = atomic_folders.read_json(run / "summary.json")["publish"]
    assert told["published"] and told["revision"] == hub.repos[REPO].find("main").oid and "stage " not in output


@pytest.mark.torture
@pytest.mark.timeout(900)
def test_a_run_with_the_hub_up(hub, recipe_content, tmp_path, forks):
    """Whatever the pace, each save is pushed or named as skipped, the first and the last one are pushed.

    Each revision opens, and the first one is trained on, in a folder that has nothing else, to the same bits.
    """
    for stage in recipe_content["stages"].values():
        stage["save_steps"] = 4
    path = write_recipe(recipe_content, tmp_path / "recipe.yaml", hub_strategy="checkpoint", private=True)
    run, again = tmp_path / "run", tmp_path / "again"
    job = forks.start("train", path, "--output", run, deadline=500.0)
    output, _ = job.communicate(timeout=500)
    assert job.returncode == 0 and TOKEN not in output, output
    summary = atomic_folders.read_json(run / "summary.json")
    repo, saves = hub.repos[REPO], summary["saves"]
    assert not saves["failed"] and len(saves["pushed"]) + len(saves["skipped"]) == 4
    assert any(tag.startswith("instruct-step-6-") for tag in saves["pushed"])
    assert summary["publish"]["published"] and repo.private and len(repo.history()) == 2
    for tag, revision in saves["pushed"].items():
        assert repo.find(tag).oid == revision
        with empty_cache() as cache:
            fetched = fetch(REPO, tag, cache)
            assert atomic_folders.verify(fetched) is None
            _, opened = AutoModelForImageTextToText.from_pretrained(fetched, output_loading_info=True)
            assert not opened["missing_keys"] and not opened["unexpected_keys"]
            if tag.startswith("projector-step-4-"):
                shutil.copytree(fetched, again / "stages/1-projector/checkpoint-4")
    output, _ = forks.start("train", path, "--output", again, deadline=500.0).communicate(timeout=500)
    assert "1-projector/checkpoint-4, step 4 of 6" in output, output
    assert (again / "export/model.safetensors").read_bytes() == (run / "export/model.safetensors").read_bytes()
