"""A recipe that asks to be published: checked beforehand, pushed beside the training, published at its end."""

import json
import shutil
import threading
import time
from pathlib import Path

import brief_finish
import pytest
import torch
import yaml
from hub_server import User, hub_of_this_process
from safetensors.torch import load_file
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.export.dialects import native_name
from llava_llama31.trainer.fault_tolerance.signals import Signals
from llava_llama31.trainer.publishing.beforehand import check_beforehand, check_strategy, provisional_record
from llava_llama31.trainer.publishing.doors import empty_cache, fetch, open_doors
from llava_llama31.trainer.publishing.gate import check_folder
from llava_llama31.trainer.publishing.interim import BRANCH, CHECKPOINT, JOB, push
from llava_llama31.trainer.publishing.pusher import Pusher
from llava_llama31.trainer.recipes.loading import load_recipe
from llava_llama31.trainer.recipes.schema import Publish, Recipe, Stage
from llava_llama31.trainer.runs.run import run_recipe


TOKEN = "hf_" + "r" * 34
REPO = "me/mine"


@pytest.fixture
def hub(monkeypatch):
    with hub_of_this_process(TOKEN, monkeypatch) as hub:
        yield hub


def recipe_of(content: dict, tmp_path: Path, **publish) -> Recipe:
    content["model"].setdefault("licence", "apache-2.0")
    content["publish"] = {"repo_id": REPO, **publish}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return load_recipe(str(tmp_path / "recipe.yaml"), output=tmp_path / "run")


def check(recipe: Recipe, *, begun: bool = False) -> list[str]:
    said: list[str] = []
    base = Path(recipe.model.checkpoint)
    check_beforehand(recipe, recipe.publish, base, command="train", begun=begun, say=said.append)
    return said


# --- before the first step


def test_before_publishing_a_run_reports_what_the_card_leaves_out(hub, recipe_content, tmp_path):
    (said,) = check(recipe_of(recipe_content, tmp_path))
    assert "base" in said and "rows" in said
    assert set(hub.counts()) == {"whoami", "validate_yaml", "model_info"} and not hub.repos


@pytest.mark.parametrize(
    ("licence", "publish", "message"),
    [
        (None, {}, "README.md: names no licence .fix: set `license:` here; before training: model.license"),
        ("mit", {}, "LICENSE: the text of 'mit' is not included"),
        ("llama3.1", {}, "the Llama 3.1 agreement must go with the model"),
        ("apache-2.0", {"repo_id": "me/a--b"}, "publish.repo_id"),
        ("apache-2.0", {"repo_id": "you/mine"}, "me cannot write to you"),
        ("apache-2.0", {"collection": "me/none-0123"}, "collection: the Hub answered 404"),
    ],
)
def test_what_would_fail_at_the_end_is_refused_at_once(hub, recipe_content, tmp_path, licence, publish, message):
    recipe_content["model"]["licence"] = licence
    with pytest.raises(UserError, match=message):
        check(recipe_of(recipe_content, tmp_path, **publish))
    assert not hub.repos


def test_llama_must_begin_the_name(hub, recipe_content, base_folder, tmp_path):
    base = Path(shutil.copytree(base_folder, tmp_path / "base"))
    (base / "LICENSE").write_text("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n")
    recipe_content["model"] |= {"checkpoint": str(base), "licence": "llama3.1"}
    with pytest.raises(UserError, match="must begin with 'Llama'"):
        check(recipe_of(recipe_content, tmp_path))
    check(recipe_of(recipe_content, tmp_path, repo_id="me/Llama-mine"))


def test_a_token_that_can_only_read(hub, recipe_content, tmp_path):
    hub.users[TOKEN] = User("me", role="read")
    with pytest.raises(UserError, match="the token can only read"):
        check(recipe_of(recipe_content, tmp_path))


def test_a_run_that_has_begun_continues_without_the_hub(hub, recipe_content, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    hub.faults = [("whoami", 503)] * 50
    recipe = recipe_of(recipe_content, tmp_path)
    with pytest.raises(UserError, match="the Hub answered 503"):
        check(recipe)
    check(recipe, begun=True)
    assert "could not be published" in caplog.text and TOKEN not in caplog.text


def test_no_space_for_the_download(hub, recipe_content, tmp_path, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match="free some space, or set TMPDIR"):
        check(recipe_of(recipe_content, tmp_path))


@pytest.mark.parametrize(
    ("stage", "strategy", "message"),
    [
        ({"lora": {"quantize": "nf4"}, "trainable": ["language_model"]}, "every_save", "4-bit"),
        ({"deepspeed": "zero2"}, "checkpoint", "DeepSpeed's pickled format"),
    ],
)
def test_pushes_that_a_stage_cannot_make(recipe_content, stage, strategy, message):
    content = recipe_content["stages"]["projector"] | {"learning_rate": 1e-3} | stage
    stages = {"one": Stage.model_validate(content)}
    with pytest.raises(UserError, match=message):
        check_strategy(Publish(repo_id=REPO, hub_strategy=strategy), stages)
    check_strategy(Publish(repo_id=REPO), stages)


@pytest.mark.parametrize("publish", [{"repo_id": "mine"}, {"hub_strategy": "all_checkpoints"}, {"token": "x"}])
def test_blocks_that_are_no_blocks(recipe_content, tmp_path, publish):
    with pytest.raises(UserError, match="publish"):
        recipe_of(recipe_content, tmp_path, **publish)


# --- beside the training


@pytest.fixture(scope="session")
def saves(make_once, base_folder, data_folder):
    """A run of a whole and an adapted stage with every save kept, and its recipe."""
    stage = {
        "data": [{"name": "rows", "path": str(data_folder / "rows.json")}],
        "global_batch": 8,
        "micro_batch": 4,
        "max_steps": 2,
        "precision": "float32",
        "dataloader_workers": 0,
        "save_steps": 2,
        "learning_rate": 1e-2,
    }
    content = {
        "name": "test",
        "model": {"checkpoint": str(base_folder), "dtype": "bfloat16", "licence": "apache-2.0"},
        "stages": {
            "whole": {**stage, "trainable": ["multi_modal_projector"]},
            "adapted": {**stage, "trainable": ["multi_modal_projector", "language_model"], "lora": {"r": 4}},
        },
    }

    def fill(folder: Path) -> None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        recipe = load_recipe(str(folder / "recipe.yaml"), output=folder / "run")
        with pytest.MonkeyPatch.context() as patch:
            brief_finish.shorten(patch.setattr)
            run_recipe(recipe, folder / "run", command="test", signals=Signals())

    folder = make_once("saves", fill)
    return folder / "run", load_recipe(str(folder / "recipe.yaml"), output=folder / "run")


def job_of(saves, folder: Path, stage_name: str, **facts) -> Path:
    run, recipe = saves
    number, origin = {"whole": (1, recipe.model.checkpoint), "adapted": (2, run / "stages/1-whole/final")}[stage_name]
    shutil.copytree(run / f"stages/{number}-{stage_name}/checkpoint-2", folder / CHECKPOINT)
    job = {"repo_id": REPO, "private": False, "with_state": False, "dtype": "bfloat16", "seed": recipe.seed}
    job |= {"record": provisional_record(recipe, Publish(repo_id=REPO), "train"), "resume": "run again"}
    job |= {"stage_name": stage_name, "step": 2, "origin": str(origin)}
    atomic_folders.write_json(folder / JOB, job | {"stage": recipe.stages[stage_name].model_dump(mode="json")} | facts)
    return folder


def native(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {native_name(name, "clip_vision_model"): tensor for name, tensor in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("stage_name", ["whole", "adapted"])
def test_each_revision_has_the_weights_of_its_step(hub, saves, tmp_path, stage_name, with_state):
    told = push(job_of(saves, tmp_path / "job", stage_name, with_state=with_state))
    repo = hub.repos[REPO]
    assert told["tag"].startswith(f"{stage_name}-step-2-") and repo.private
    assert repo.find(told["tag"]).oid == repo.find(BRANCH).oid == told["revision"]
    assert set(repo.find("main").files) == {".gitattributes"} and not repo.discussions
    (final,) = saves[0].glob(f"stages/*-{stage_name}/final/model.safetensors")  # of the same step
    with empty_cache() as cache:
        folder = fetch(REPO, told["tag"], cache)
        pushed, trained = native(load_file(folder / "model.safetensors")), load_file(final)
        assert pushed.keys() == trained.keys()
        assert all(torch.equal(pushed[name], trained[name].to(pushed[name].dtype)) for name in trained)
        assert "still training: stage" in (folder / "README.md").read_text()
        if with_state:
            assert atomic_folders.verify(folder) is None and (folder / "optimizer.safetensors").is_file()
            model, opened = LlavaNextForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
            assert not any(opened.values())  # no tensor is missing or unexpected, none has another shape
            assert all(torch.equal(tensor, pushed[name]) for name, tensor in native(model.state_dict()).items())
            assert isinstance(LlavaNextProcessor.from_pretrained(folder), LlavaNextProcessor)
        else:
            assert check_folder(folder, "mine", links_within=folder.parents[1]) == []
        if stage_name == "adapted" and not with_state:
            open_doors(REPO, cache, revision=told["tag"])
    calls = hub.counts()
    assert push(tmp_path / "job") == told  # nothing is done twice
    assert (hub.counts() - calls).keys().isdisjoint({"commit", "create_repo", "lfs_upload"})


@pytest.mark.slow
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.torture)])
def test_a_fault_at_each_call_of_an_interim_push(hub, saves, tmp_path, monkeypatch, every):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    job = job_of(saves, tmp_path / "job", "whole")
    push(job)
    calls = [kind for kind, _, _ in hub.calls]
    assert {"refs", "branch", "commit", "tag"} <= set(calls)
    for number, kind in enumerate(calls):
        is_first = number == calls.index(kind)
        for fault in (429, 500, 403, 412, "drop", "lost") if is_first or every else ("drop",):
            hub.repos.clear()
            hub.objects.clear()
            hub.faults = [(kind, None)] * calls[:number].count(kind) + [(kind, fault)]
            try:
                told = push(job)
            except UserError as error:
                assert TOKEN not in str(error)
                hub.faults.clear()
                told = push(job)
            repo = hub.repos[REPO]
            assert repo.find(told["tag"]).oid == told["revision"]
            assert len(repo.history(f"refs/heads/{BRANCH}")) == 2


def test_what_is_not_fit_is_not_pushed(hub, saves, tmp_path):
    job = job_of(saves, tmp_path / "job", "whole", with_state=True)
    (job / CHECKPOINT / "global_step2").mkdir()
    (job / CHECKPOINT / "global_step2" / "states.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"states.pt: is not a type of file that a model needs"):
        push(job)
    assert not hub.calls


class Slow:
    """Pushes that end when they are told to."""

    def __init__(self, monkeypatch):
        self.begun, self.end, self.error = threading.Semaphore(0), threading.Semaphore(0), ""
        monkeypatch.setattr(Pusher, "_run", lambda pusher, job: self.run(job))

    def run(self, job: Path) -> dict[str, str]:
        self.begun.release()
        self.end.acquire()
        if self.error:
            raise ValueError(self.error)
        return {"tag": job.name, "revision": "0" * 40}


@pytest.fixture
def stage(recipe_content):
    return Stage.model_validate(recipe_content["stages"]["projector"])


@pytest.fixture
def save(tmp_path, stage):
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "file").write_text("x")

    def save(pusher: Pusher, step: int) -> None:
        pusher.add(checkpoint, "s", step, stage, tmp_path)

    return save


def test_the_newest_waits_and_older_ones_are_skipped(tmp_path, monkeypatch, save):
    slow, said = Slow(monkeypatch), []
    pusher = Pusher(tmp_path / "interim", {"repo_id": REPO}, said.append)
    save(pusher, 1)
    slow.begun.acquire()
    for step in (2, 3, 4):
        save(pusher, step)
    for _ in range(2):
        slow.end.release()
    outcome = pusher.close(finish=True)
    assert list(outcome["pushed"]) == ["s-step-1", "s-step-4"] and outcome["skipped"] == ["s-step-2", "s-step-3"]
    assert not outcome["failed"] and "s-step-2 is not pushed: a newer save replaces it" in said
    assert [path.name for path in (tmp_path / "interim").iterdir()] == ["pushed.json"]


def test_what_failed_is_tried_again_at_the_end(tmp_path, monkeypatch, save):
    slow = Slow(monkeypatch)
    slow.error = f"no Hub, and a secret: {TOKEN}"
    pusher = Pusher(tmp_path / "interim", {"repo_id": REPO}, lambda line: None)
    save(pusher, 1)
    slow.end.release()
    slow.begun.acquire()
    while "s-step-1" not in pusher.outcome["failed"]:
        time.sleep(0.01)
    assert TOKEN not in json.dumps(pusher.outcome)
    slow.error = ""
    slow.end.release()
    assert list(pusher.close(finish=True)["pushed"]) == ["s-step-1"] and not pusher.outcome["failed"]


def test_what_an_interrupted_run_left_goes_up_with_the_next(tmp_path, monkeypatch, save):
    monkeypatch.setattr(Pusher, "_command", lambda pusher, job: [shutil.which("sleep"), "600"])
    pusher = Pusher(tmp_path / "interim", {"repo_id": REPO}, lambda line: None)
    save(pusher, 1)
    while pusher._process is None:
        time.sleep(0.01)
    assert "s-step-1" in pusher.close(finish=False)["failed"]  # ends the process at once
    slow = Slow(monkeypatch)
    slow.end.release()
    again = Pusher(tmp_path / "interim", {"repo_id": REPO}, lambda line: None)
    slow.begun.acquire()
    outcome = again.close(finish=True)
    assert list(outcome["pushed"]) == ["s-step-1"] and not outcome["failed"]


def test_a_disk_that_is_full_stops_no_training(tmp_path, monkeypatch, save):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    pusher = Pusher(tmp_path / "interim", {"repo_id": REPO}, lambda line: None)
    monkeypatch.setattr(shutil, "copytree", full)
    save(pusher, 1)
    assert "No space" in pusher.close(finish=True)["failed"]["s-step-1"]
