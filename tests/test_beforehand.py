"""What can be said without a run: `train --dry-run`, `train --devices`, `recipes --check` and `--diff`."""

import json
import os
import runpy
import sys

import pytest
import yaml
from torch.distributed import run as torchrun

from llava_llama31.trainer.cli import command_parser, main
from llava_llama31.trainer.commands import train
from llava_llama31.trainer.recipes.loading import SHIPPED


@pytest.fixture
def recipe_file(tmp_path, recipe_content):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_content, sort_keys=False))
    return path


def changed(path, change) -> str:
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))
    return str(path)


def dry_run(recipe, folder, *more) -> int:
    return main(["train", str(recipe), "--output", str(folder), "--dry-run", *more])


def test_a_dry_run_says_what_a_run_would_do_and_writes_nothing(recipe_file, tmp_path, capsys):
    assert dry_run(recipe_file, tmp_path / "run") == 0
    said = capsys.readouterr()
    assert "stages.projector: rows: 44 of 44 records usable" in said.err and "nothing was written" in said.err
    assert "6 of 8 = 4 x 2 accumulated x 1 device;" in said.out
    assert not (tmp_path / "run").exists()
    assert dry_run(recipe_file, tmp_path / "run", "--devices", "2") == 0
    assert "6 of 8 = 4 x 1 accumulated x 2 devices" in capsys.readouterr().out


def test_a_dry_run_of_parts_assembles_nothing(recipe_file, base_folder, tmp_path, capsys):
    model = {"vision_tower": str(base_folder), "language_model": str(base_folder), "dtype": "float32"}
    path = changed(recipe_file, lambda content: content.update(model=model))
    assert dry_run(path, tmp_path / "run") == 0
    assert "44 of 44 records usable" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_dry_run_of_the_demo_says_what_it_does_not_check(tmp_path, capsys):
    assert dry_run("tiny", tmp_path / "run") == 0
    assert "not checked: the data and the model's parts, which the run makes itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["evaluation"].update(data="gone.jsonl"), "gone.jsonl does not exist"),
        (
            lambda r: r["stages"]["instruct"].update(trainer_args={"report_to": ["tensorbord"]}),
            "did you mean tensorboard",
        ),
        (lambda r: r["stages"]["instruct"].update(max_tokens=3), "too_long"),
        (lambda r: r["stages"]["instruct"].update(micro_batch=3, global_batch=9, max_row_tokens=0), "max_row_tokens"),
    ],
)
def test_a_dry_run_finds_what_would_stop_a_run(recipe_file, tmp_path, change, message, capsys):
    assert dry_run(changed(recipe_file, change), tmp_path / "run") == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_refuses_a_folder_of_another_recipe(recipe_file, recipe_content, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "stages/1-projector/final").mkdir(parents=True)
    (run / "recipe.json").write_text(json.dumps(recipe_content | {"seed": 5}))
    assert dry_run(recipe_file, run) == 2
    assert "this run began with another recipe: seed" in capsys.readouterr().err


def test_devices_start_the_launcher_with_the_same_options(recipe_file, monkeypatch):
    started = []
    monkeypatch.setattr(train.os, "execv", lambda program, command: started.append((program, command)) or sys.exit(0))
    monkeypatch.delenv("RANK", raising=False)
    arguments = [str(recipe_file), "--devices", "2", "--cpu", "--set", "description=-x", "--output", "-odd run"]
    with pytest.raises(SystemExit):
        main(["train", *arguments[:-2], f"--output={arguments[-1]}"])
    ((program, command),) = started
    options = torchrun.parse_args(command[3:])
    assert program == sys.executable and command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert (options.nproc_per_node, options.nnodes, options.module) == ("2", "1:1", True)
    assert options.training_script == "llava_llama31.trainer.cli"
    ours = command_parser().parse_args(options.training_script_args)
    assert (ours.recipe, ours.overrides, ours.output, ours.cpu) == (
        str(recipe_file),
        ["description=-x"],
        "-odd run",
        True,
    )


def test_devices_that_are_not_there_are_refused(recipe_file, tmp_path, capsys):
    assert main(["train", str(recipe_file), "--output", str(tmp_path / "run"), "--devices", "2"]) == 2
    assert "--devices: 2, but this machine has 0 GPUs (fix: add --cpu)" in capsys.readouterr().err


def test_recipes_are_checked(recipe_file, capsys):
    assert main(["recipes", "--check", str(recipe_file)]) == 0
    assert capsys.readouterr().out == f"{recipe_file}: a recipe with 2 stages: projector, instruct\n"
    changed(recipe_file, lambda content: content.update(sed=1))
    assert main(["recipes", "--check", str(recipe_file)]) == 2
    assert "sed: unknown key (fix: did you mean seed?)" in capsys.readouterr().err


def test_recipes_are_compared(recipe_file, recipe_content, tmp_path, capsys):
    other = tmp_path / "other.yaml"
    recipe_content["stages"]["instruct"]["epochs"] = 2
    recipe_content["stages"]["instruct"]["learning_rate"] = 0.5
    recipe_content["stages"]["more"] = recipe_content["stages"].pop("projector")
    other.write_text(yaml.safe_dump(recipe_content))
    assert main(["recipes", "--diff", str(recipe_file), str(other)]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["stages.instruct.epochs"] == "1.0 -> 2.0" and "seed" not in lines
    rates = "{multi_modal_projector: 0.001, language_model: 0.002}"  # as in a recipe
    assert lines["stages.instruct.learning_rate"] == f"{rates} -> 0.5"
    assert lines["stages.projector.global_batch"] == "8 -> not there"
    assert lines["stages.more.global_batch"] == "not there -> 8"
    assert main(["recipes", "--diff", SHIPPED[0], SHIPPED[0]]) == 0
    assert capsys.readouterr().out == "all keys have the same values\n"


def test_the_package_runs_as_a_module(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [os.fspath("llava_llama31"), "recipes"])
    monkeypatch.delitem(sys.modules, "llava_llama31.trainer.cli")
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("llava_llama31", run_name="__main__")
    assert capsys.readouterr().out.startswith("tiny ")
