"""A run knows what it depends on: other contents stop a resume, another place of the same contents does not."""

import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml
from safetensors.torch import load_file

from llava_llama31.trainer.checkpoint.atomic_folders import read_manifest
from llava_llama31.trainer.checkpoint.run_folder import _differences
from llava_llama31.trainer.cli import main


def make_project(folder: Path, content: dict, data_folder: Path, base_folder: Path) -> None:
    """Data, base model and a recipe of one stage."""
    shutil.copytree(data_folder, folder / "data")
    shutil.copytree(base_folder, folder / "base")
    rows = [json.loads(line) for line in (folder / "data/questions.jsonl").read_text().splitlines()]
    for number, half in enumerate((rows[:3], rows[3:])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(half), folder / f"data/val-0000{number}.parquet")
    place(content, folder)


@pytest.fixture
def one_stage(recipe_content):
    """The recipe; its run keeps three checkpoints."""
    del recipe_content["stages"]["projector"]
    recipe_content["stages"]["instruct"]["save_total_limit"] = 3
    recipe_content["evaluation"]["baselines"] = False
    return recipe_content


@pytest.fixture
def project(stopped_once, tmp_path, one_stage):
    """A folder of its own, with a run that was stopped at step 2."""
    project = tmp_path / "project"
    shutil.copytree(stopped_once, project)
    recipe = project / "run/recipe.json"
    recipe.write_text(recipe.read_text().replace(f"{stopped_once}.part", str(project)))  # it was made there
    place(one_stage, project)
    return project


@pytest.fixture
def stopped_once(make_once, one_stage, data_folder, base_folder):
    """The project that all tests have copies of."""

    def fill(folder: Path) -> None:
        make_project(folder, one_stage, data_folder, base_folder)
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(one_stage, sort_keys=False))
        assert main(["train", str(recipe), "--output", str(folder / "run")]) == 0
        stop_at_step_2(folder / "run")

    return make_once("stopped-run", fill)


def place(content: dict, folder: Path) -> None:
    content["model"]["checkpoint"] = str(folder / "base")
    content["stages"]["instruct"]["data"][0]["path"] = str(folder / "data/rows.json")
    content["evaluation"] |= {"data": str(folder / "data/val-*"), "image_root": str(folder / "data")}


@pytest.fixture
def train(recipe_content, tmp_path):
    def run(output: Path | str) -> int:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(recipe_content, sort_keys=False))
        return main(["train", str(recipe), "--output", str(output)])

    return run


def stop_at_step_2(run: Path) -> None:
    """Leave what a run that was killed after its first checkpoint leaves."""
    stage = run / "stages/1-instruct"
    shutil.rmtree(stage / "final")
    for step in (4, 6):
        shutil.rmtree(stage / f"checkpoint-{step}", ignore_errors=True)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "evaluation")


@pytest.fixture
def stopped(project):
    return project / "run"


def other_rows(project: Path) -> None:
    file = project / "data/rows.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:20]))


def other_image(project: Path) -> None:
    image = next(path for path in sorted((project / "data").rglob("*.png")))
    os.utime(image, (1, 1))


def other_weights(project: Path) -> None:
    file = project / "base/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def other_template(project: Path) -> None:
    with (project / "base/tokenizer_config.json").open("a") as file:
        file.write("\n")


def other_questions(project: Path) -> None:
    shutil.copyfile(project / "data/val-00000.parquet", project / "data/val-00001.parquet")


CHANGES = {
    other_rows: "stages.instruct.data.rows (files: ",
    other_image: "stages.instruct.data.rows (images: ",
    other_weights: "model (weights: ",
    other_template: "model (settings: ",
    other_questions: "evaluation.data (files: ",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "record"),
    [(change, "the run's folder") for change in CHANGES]
    + [(change, "the checkpoint") for change in CHANGES if change is not other_questions],
)
def test_a_resume_on_other_contents_is_refused_with_both(project, stopped, train, capsys, change, record):
    if record == "the checkpoint":
        (stopped / "inputs.json").unlink()
    change(project)
    assert train(stopped) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    expected = CHANGES[change].replace(
        "model (", "stages.instruct.origin (" if record == "the checkpoint" else "model ("
    )
    assert "changed since this run began: " in error and expected in error, error
    assert " then, " in error and "choose another --output" in error


@pytest.mark.slow
def test_before_the_first_checkpoint_everything_may_change(project, stopped, train):
    shutil.rmtree(stopped / "stages")
    other_rows(project)
    assert train(stopped) == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["moved", "relative", "through a parent"])
def test_a_run_resumes_where_it_lies_now(project, stopped, train, recipe_content, monkeypatch, how):
    expected = load_file(stopped / "stages/1-instruct/checkpoint-2/model.safetensors")
    output: Path | str = stopped
    if how == "moved":
        moved = project.with_name("elsewhere")
        project.rename(moved)
        place(recipe_content, moved)
        output = moved / "run"
    elif how == "relative":
        monkeypatch.chdir(project)
        output = "run"
        recipe_content["stages"]["instruct"]["data"][0]["path"] = "data/rows.json"
    else:
        output = stopped / ".." / "run"
    assert train(output) == 0
    final = load_file(Path(output, "stages/1-instruct/final/model.safetensors"))
    assert final.keys() == expected.keys() and any((final[name] != expected[name]).any() for name in final)


@pytest.mark.slow
def test_a_resumed_run_that_was_moved_ends_with_the_same_bits(project, stopped, train, recipe_content):
    assert train(project / "whole") == 0
    moved = project.with_name("elsewhere")
    project.rename(moved)
    place(recipe_content, moved)
    assert train(moved / "run") == 0
    weights = [load_file(moved / run / "stages/1-instruct/final/model.safetensors") for run in ("whole", "run")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


@pytest.mark.slow
def test_inputs_are_in_the_folder_and_in_each_checkpoint(stopped):
    inputs = json.loads((stopped / "inputs.json").read_text())
    kept = read_manifest(stopped / "stages/1-instruct/checkpoint-2")["inputs"]
    assert kept["stages.instruct.data.rows"] == inputs["stages.instruct.data.rows"]
    assert kept["stages.instruct.origin"] == inputs["model"] and set(inputs["model"]) == {"weights", "settings"}


@pytest.mark.slow
def test_a_source_is_not_added_unseen(stopped, train, recipe_content, capsys):
    data = recipe_content["stages"]["instruct"]["data"]
    data.append(data[0] | {"name": "more"})
    assert train(stopped) == 2
    assert "this run began with another recipe: stages.instruct.data" in capsys.readouterr().err


def test_differences_name_the_key_of_a_list_that_differs():
    before = {"data": [{"path": "a", "sample": 1}, {"path": "b", "sample": 2}]}
    now = {"data": [{"path": "a", "sample": 1}, {"path": "b", "sample": 3}]}
    assert list(_differences(before, now)) == [("data.1.sample", 2, 3)]
