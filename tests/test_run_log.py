"""log.jsonl: what the Trainer itself recorded, every step once, whatever stopped the run."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.report.page import write_report
from llava_llama31.trainer.report.run_facts import entries
from llava_llama31.trainer.runs import run as run_room
from llava_llama31.trainer.training.llava_trainer import LlavaTrainer
from llava_llama31.trainer.training.source_losses import nested


TIMED = {"time", "seconds", "mfu", "hfu", "data_wait", "memory_gib", "epoch"}


@pytest.fixture
def train(recipe_content, tmp_path):
    del recipe_content["evaluation"]
    recipe_content["stages"]["instruct"]["validation_fraction"] = 0.2
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_content, sort_keys=False))

    def train(name: str) -> tuple[int, Path]:
        return main(["train", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / name)]), tmp_path / name

    return train


def steps(log: list[dict]) -> list[tuple[str, int]]:
    return [(entry["stage"], entry["step"]) for entry in log if "loss" in entry]


def without_times(log: list[dict]) -> list[dict]:
    return [
        {key: value for key, value in entry.items() if key not in TIMED and not key.endswith("_per_second")}
        for entry in log
        if "loss" in entry or "eval_loss" in entry
    ]


def crash_at(monkeypatch: pytest.MonkeyPatch, stage: str, step: int) -> None:
    original = LlavaTrainer.compute_loss

    def compute_loss(self, *arguments, **options):
        if stage in str(self.args.output_dir) and self.state.global_step == step - 1:
            raise KeyError("planted")
        return original(self, *arguments, **options)

    monkeypatch.setattr(LlavaTrainer, "compute_loss", compute_loss)


@pytest.mark.slow
def test_it_has_what_the_trainer_recorded(train, monkeypatch):
    original, early = atomic_folders.commit, []

    def commit(staging, final, facts):  # the log must not name a save that a kill could still undo
        if final.name.startswith("checkpoint-"):
            own = [entry for entry in entries(final.parents[2] / "log.jsonl") if entry["stage"] in final.parent.name]
            early.extend(entry for entry in own if entry.get("event") == "save" and entry["step"] == facts["step"])
        original(staging, final, facts)

    monkeypatch.setattr(atomic_folders, "commit", commit)
    code, run = train("run")
    assert code == 0 and not early
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert log == entries(run / "log.jsonl")
    for stage, number in (("projector", 1), ("instruct", 2)):
        folder = max(run.glob(f"stages/{number}-{stage}/checkpoint-*"), key=lambda path: int(path.name[11:]))
        recorded = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        # the checkpoint of the last step is saved before the Trainer's closing words
        logged = [entry for entry in log if entry["stage"] == stage and "event" not in entry][: len(recorded)]
        assert recorded and logged == [logged[i] | nested(former) for i, former in enumerate(recorded)]
        saves = [entry["step"] for entry in log if entry.get("event") == "save" and entry["stage"] == stage]
        assert saves == [2, 4, int(folder.name[11:])]
    rates = [entry["learning_rates"] for entry in log if entry["stage"] == "instruct" and "loss" in entry]
    assert all(rate["language_model"] == 2 * rate["multi_modal_projector"] for rate in rates)
    assert rates[0]["language_model"] != rates[-1]["language_model"]


@pytest.mark.slow
def test_a_run_that_crashed_twice_has_every_step_once(train, monkeypatch):
    _, whole = train("whole")
    for stage, step in (("1-projector", 4), ("2-instruct", 4)):
        with monkeypatch.context() as patch:
            crash_at(patch, stage, step)
            code, run = train("run")
        assert code == 1
        with (run / "log.jsonl").open("r+b") as file:  # as a kill in the middle of a write leaves it
            file.seek(-9, 2)
            file.truncate()
    monkeypatch.setattr(run_room, "write_report", write_report)  # which short runs leave out
    assert train("run")[0] == 0
    starts = [line for line in (run / "log.jsonl").read_text().splitlines() if '"event": "start"' in line]
    assert [json.loads(line)["step"] for line in starts] == [0, 2, 0, 2]
    log, expected = entries(run / "log.jsonl"), entries(whole / "log.jsonl")
    assert steps(log) == steps(expected)
    assert steps(log) == [("projector", n) for n in range(1, 7)] + [("instruct", n) for n in range(1, 6)]
    assert without_times(log) == without_times(expected)
    start = next(entry for entry in log if entry.get("event") == "start")
    assert [group["num_trainable"] > 0 for group in start["groups"]] == [False, True, False]
    assert start["data"][0]["usable"] == 44 and start["command"].startswith("llava-llama31 train ")
    report = (run / "report.html").read_text()
    assert ">finished<" in report and "resumed 2 times" in report and start["environment"]["torch"] in report


@pytest.mark.slow
def test_findings_are_logged_once_each(train, recipe_content, tmp_path, monkeypatch):
    recipe_content["stages"]["projector"]["on_nonfinite"] = "skip"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_content, sort_keys=False))
    original = LlavaTrainer.compute_loss

    def compute_loss(self, *arguments, **options):
        loss = original(self, *arguments, **options)
        is_third = "projector" in str(self.args.output_dir) and self.state.global_step == 2
        return loss * torch.nan if is_third else loss

    with monkeypatch.context() as patch:
        patch.setattr(LlavaTrainer, "compute_loss", compute_loss)
        crash_at(patch, "1-projector", 6)
        assert train("run")[0] == 1
    assert train("run")[0] == 0
    text = (tmp_path / "run" / "log.jsonl").read_text()
    log = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in text.splitlines()]
    findings = [entry for entry in log if entry.get("event") == "finding"]
    assert [(entry["step"], entry["action"]) for entry in findings] == [(3, "skip")]
    assert "loss is nan" in findings[0]["what"] and not math.isnan(log[0]["step"])
