"""Trackers: TensorBoard for real, one run a stage, continued by a resumed stage, and nothing after the end."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from transformers.integrations import WandbCallback

from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.recipes.schema import Recipe
from llava_llama31.trainer.runs.trackers import continue_trackers, end_trackers, with_trackers
from llava_llama31.trainer.training.llava_trainer import LlavaTrainer


def test_a_stage_is_a_run_named_after_recipe_and_stage(recipe_content):
    recipe_content["stages"]["instruct"]["trainer_args"] = {"run_name": "mine"}
    quiet = Recipe.model_validate(recipe_content)
    assert all(with_trackers(quiet, name, stage) == stage for name, stage in quiet.stages.items())
    recipe = Recipe.model_validate(recipe_content | {"report_to": ["trackio"]})
    arguments = {name: with_trackers(recipe, name, stage).trainer_args for name, stage in recipe.stages.items()}
    assert arguments["projector"] == {"report_to": ["trackio"], "run_name": "test/projector", "project": "test"}
    assert arguments["instruct"] == {"report_to": ["trackio"], "run_name": "mine", "project": "test"}


def test_wandb_has_one_run_a_stage_which_a_resume_continues(recipe_content, tmp_path, monkeypatch):
    calls = []
    stand_in = ModuleType("wandb")
    stand_in.init = lambda **options: calls.append(options)
    stand_in.finish = lambda: calls.append("finish")
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    recipe, folder = Recipe.model_validate(recipe_content), RunFolder(tmp_path)
    handler = SimpleNamespace(callbacks=[object.__new__(WandbCallback)])
    removed = []
    trainer = SimpleNamespace(
        callback_handler=handler, args=SimpleNamespace(run_name="test/a"), remove_callback=removed.append
    )

    def start(name, step, is_main=True):
        context = SimpleNamespace(recipe=recipe, folder=folder, is_main=is_main)
        run = SimpleNamespace(context=context, name=name, folder=folder.stage(name, recipe.stages))
        continue_trackers(run, trainer, step)
        end_trackers(trainer)

    for name, step in (("projector", 0), ("projector", 3), ("instruct", 0), ("instruct", 0)):
        start(name, step)
    assert calls[1::2] == ["finish"] * 4 and WandbCallback in removed
    first, again, other, restarted = calls[::2]
    assert first == again and first["resume"] == "allow" and (first["project"], first["name"]) == ("test", "test/a")
    assert len({first["id"], other["id"], restarted["id"]}) == 3 and first["dir"] == str(tmp_path)
    start("projector", 3, is_main=False)
    assert calls[8:] == ["finish"]


def test_an_unknown_tracker_is_refused_beforehand(recipe_content, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_content | {"report_to": ["tensorbord"]}, sort_keys=False))
    assert main(["train", str(recipe), "--output", str(tmp_path / "run")]) == 2
    assert "did you mean tensorboard?" in capsys.readouterr().err


@pytest.mark.slow
def test_tensorboard_has_every_step_once(recipe_content, tmp_path, monkeypatch):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    del recipe_content["evaluation"]
    recipe_content["report_to"] = ["tensorboard"]
    recipe_content["stages"]["instruct"] |= {"validation_fraction": 0.2, "eval_steps": 2}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_content, sort_keys=False))
    original = LlavaTrainer.compute_loss

    def compute_loss(self, *arguments, **options):
        if "instruct" in str(self.args.output_dir) and self.state.global_step == 3:
            raise KeyError("planted")
        return original(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LlavaTrainer, "compute_loss", compute_loss)
        assert main(["train", str(recipe), "--output", str(tmp_path / "run")]) == 1
    assert main(["train", str(recipe), "--output", str(tmp_path / "run")]) == 0
    found = {path.parent.relative_to(tmp_path / "run").as_posix() for path in tmp_path.rglob("events.out.tfevents*")}
    assert found == {"tensorboard/projector", "tensorboard/instruct"}
    for stage, steps in (("projector", range(1, 7)), ("instruct", range(1, 6))):
        events = accumulators.EventAccumulator(str(tmp_path / "run/tensorboard" / stage))
        events.Reload()
        assert [event.step for event in events.Scalars("train/loss")] == list(steps)
        if stage == "instruct":
            assert [event.step for event in events.Scalars("eval/loss")] == [2, 4, 5]
