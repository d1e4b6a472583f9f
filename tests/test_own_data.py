"""docs/own-data.md as its reader walks it, from three rows to a model that has learnt them."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.recipes.loading import load_recipe
from llava_llama31.trainer.recipes.schema import Recipe


PAGE = (Path(__file__).parents[1] / "docs/own-data.md").read_text()
BLOCKS = re.findall(r"```(\w+) ?(\S*)\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def walked(base_folder, tmp_path, monkeypatch):
    """A folder in which all files of the page lie, with a tiny model where the demo leaves its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base_folder, tmp_path / "runs/tiny/export")
    for language, file, content in BLOCKS:
        if file:
            Path(file).parent.mkdir(exist_ok=True)
            Path(file).write_text(content)
        elif language == "python":
            exec(compile(content, "own-data.md", "exec"), {})


@pytest.mark.slow
def test_every_command_of_the_page(walked, capsys):
    printed = {}
    for line in "".join(content for language, _, content in BLOCKS if language == "bash").splitlines():
        program, command, *arguments = shlex.split(line)
        capsys.readouterr()
        assert program == "llava-llama31" and main([command, *arguments]) == 0, line
        printed[command] = capsys.readouterr()
        if arguments == ["mine/labels.jsonl"]:
            assert "labels: 2 of 2 records usable" in printed[command].out
    assert load_recipe("mine/own.yaml").evaluation.data == "mine/questions.jsonl"
    assert "signs: 3 of 3 records usable" in printed["check-data"].out
    assert printed["chat"].out == "STOP\n"
    assert "100.00" in printed["evaluate"].out


def test_the_recipe_for_a_gpu_is_one(walked):
    *_, (_, _, content) = (block for block in BLOCKS if block[0] == "yaml")
    recipe = Recipe.model_validate({"name": "gpu", **yaml.safe_load(content)})
    assert recipe.stages["instruct"].lora is not None
