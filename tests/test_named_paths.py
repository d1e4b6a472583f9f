"""Every path that a recipe names is looked for before anything is downloaded, assembled or asked at the Hub."""

import json
import sys
from pathlib import Path

import huggingface_hub
import pytest
import yaml

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.recipes.loading import load_recipe
from llava_llama31.trainer.runs import base_model, origins
from llava_llama31.trainer.runs.named_paths import missing_paths


@pytest.fixture
def recipe(recipe_content, tmp_path, monkeypatch):
    """Write a recipe with changed values; what would look beyond this machine fails."""
    for module, name in ((origins, "local_checkpoint"), (base_model, "assemble"), (huggingface_hub, "HfApi")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("looked beyond this machine"))

    recipe_content = json.loads(json.dumps(recipe_content))  # its stages share their list of data

    def write(**changes: object) -> str:
        for key, value in changes.items():
            *parents, last = key.split("__")
            target = recipe_content
            for parent in parents:
                target = target[int(parent)] if isinstance(target, list) else target[parent]
            target[last] = value
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(recipe_content, sort_keys=False))
        return str(path)

    return write


MISSING = {
    "data": ("stages__projector__data__0__path", "data/nosuch.json", "does not exist"),
    "a tar": ("stages__instruct__data__0__path", "data/nosuch.TAR", "does not exist"),
    "image_root": ("stages__projector__data__0__image_root", "no/where", "does not exist"),
    "questions": ("evaluation__data", "data/nosuch.jsonl", "does not exist"),
    "a pattern": ("evaluation__data", "data/validation-*", "no file matches"),
    "their images": ("evaluation__image_root", "no/where/else", "does not exist"),
    "the checkpoint": ("model__checkpoint", "/no/base", "does not exist"),
    "weights": ("model__checkpoint", "some/model.safetensors", "does not exist"),
    "the start": ("stages__instruct__init_from", "./none", "does not exist"),
    "a URL of questions": ("evaluation__data", "s3://bucket/q.jsonl", "s3://bucket/q.jsonl: a URL is not read here"),
    "a URL of their images": ("evaluation__image_root", "http://host/val", "http://host/val: a URL is not read here"),
    "a URL of data": ("stages__instruct__data__0__path", "file:///d.json", "file:///d.json: a path is wanted"),
    "deepspeed": ("stages__instruct__deepspeed", "none.json", "there is no DeepSpeed file"),
}


@pytest.mark.parametrize("command", ["train", "check-data"])
@pytest.mark.parametrize("case", MISSING)
def test_a_path_that_does_not_exist_is_named_by_its_key_first(recipe, tmp_path, capsys, case, command):
    key, value, message = MISSING[case]
    path = recipe(**{key: value})
    assert main([command, path, "--output", str(tmp_path / "run")]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert f"error: {key.replace('__', '.')}: " in said and message in said and "(fix: " in said
    assert case == "deepspeed" or "://" in value or str(Path(value).absolute()) in said
    assert not (tmp_path / "run" / "base").exists() and not (tmp_path / "run" / "origins.json").exists()


@pytest.mark.parametrize("command", ["train", "train --dry-run", "check-data"])
def test_a_missing_path_is_named_before_torch_is_imported(recipe, tmp_path, monkeypatch, capsys, command):
    for module in ("torch", "transformers", "datasets", "llava_llama31.trainer.runs.run"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it is an error
    path = recipe(stages__projector__data__0__path="data/nosuch.json")
    assert main([*command.split(), path, "--output", str(tmp_path / "run")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_all_missing_paths_are_counted(recipe, tmp_path, capsys):
    path = recipe(stages__projector__data__0__path="none.json", evaluation__data="none.jsonl")
    assert main(["train", path, "--output", str(tmp_path / "run")]) == 2
    assert "(and 1 more: evaluation.data)" in capsys.readouterr().err


def test_plan_says_that_a_path_does_not_exist(recipe, tmp_path, capsys):
    path = recipe(stages__projector__data__0__path="data/nosuch.json")
    arguments = ["plan", path, "--output", str(tmp_path / "run")]
    assert main(arguments) == 0
    where = Path("data/nosuch.json").absolute()
    assert f"not here: stages.projector.data.0.path: {where} does not exist" in " ".join(
        capsys.readouterr().out.split()
    )
    assert main([*arguments, "--json"]) == 0
    missing = json.loads(capsys.readouterr().out)["missing"]
    assert missing == {"stages.projector.data.0.path": f"{where} does not exist"}


def test_plan_says_why_data_that_is_here_is_not_counted(recipe, tmp_path, capsys):
    (tmp_path / "x.json").write_text("[")
    path = recipe(stages__projector__data__0__path=str(tmp_path / "x.json"))
    assert main(["plan", path, "--output", str(tmp_path / "run"), "--json"]) == 0
    assumed = json.loads(capsys.readouterr().out)["stages"][0]["assumed"]
    assert any("can't be read (" in note and "breaks off at byte 1" in note for note in assumed)


def test_what_the_demo_makes_itself_and_what_the_hub_has_is_not_missing(tmp_path, capsys):
    assert main(["plan", "tiny", "--output", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing"] == {}
    assert main(["plan", "llama31-8b", "--json"]) == 0
    missing = json.loads(capsys.readouterr().out)["missing"]
    assert not any(key.startswith("model.") for key in missing) and "evaluation.data" in missing


def test_the_parts_of_a_model_that_the_run_has_assembled_are_no_longer_needed(recipe, tmp_path):
    path = recipe(model={"vision_tower": "/gone/tower", "language_model": "/gone/llama"})
    loaded = load_recipe(path, output=tmp_path / "run")
    assert list(missing_paths(loaded, tmp_path / "run")) == ["model.vision_tower", "model.language_model"]
    (tmp_path / "run/base").mkdir(parents=True)
    assert missing_paths(loaded, tmp_path / "run") == {}
