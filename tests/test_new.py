"""`new`, shell completion, examples in every help, and guesses at what was meant."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from llava_llama31.trainer.cli import _COMMANDS, command_parser, main
from llava_llama31.trainer.commands import new
from llava_llama31.trainer.commands.examples import EXAMPLES
from llava_llama31.trainer.recipes.loading import load_recipe


def test_a_new_recipe_is_one_that_trains_on_the_rows(data_folder, base_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", str(data_folder / "rows.json"), "--model", str(base_folder), "--lora"]
    assert main(["new", "signs", *arguments, "--questions", str(data_folder / "questions.jsonl")]) == 0
    said = capsys.readouterr()
    assert said.out == "signs.yaml\n" and "44 rows in the format llava" in said.err
    assert "read as 0 images and 2 turns" in said.err and '"id": "r0"' in said.err
    assert "columns: id, " in said.err and "device: the CPU" in said.err
    assert "signs on 1 device" in said.err and "parameters" in said.err
    recipe = load_recipe("signs.yaml")
    stage = recipe.stages["instruct"]
    assert (recipe.name, recipe.model.checkpoint, stage.global_batch) == ("signs", str(base_folder), 2)
    assert stage.lora is not None and recipe.evaluation is not None
    assert main(["train", "signs.yaml", "--dry-run"]) == 0
    assert "44 of 44 records usable" in capsys.readouterr().err
    assert main(["new", "signs", *arguments]) == 2
    assert "signs.yaml: already exists" in capsys.readouterr().err


def test_a_new_recipe_is_for_the_gpus_of_the_machine(data_folder, base_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    gpus = new._Device(2, 80 * 10**9)
    monkeypatch.setattr(new, "_device", lambda: gpus)
    monkeypatch.setattr(new, "_look_at", lambda *_: 70)  # a twentieth is 3, no multiple of 2
    assert main(["new", "signs", "--data", str(data_folder / "rows.json"), "--model", str(base_folder)]) == 0
    assert "signs on 2 devices of 80 GB" in capsys.readouterr().err
    recipe = load_recipe("signs.yaml")
    assert recipe.stages["instruct"].global_batch == 2


def test_what_no_option_says_is_asked_in_a_terminal(data_folder, base_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base_folder, tmp_path / "run/export")
    answers = [str(data_folder / "rows.json"), "run", "", "y"]
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: answers.pop(0))
    assert main(["new", "signs"]) == 0
    recipe = load_recipe("signs.yaml")
    assert recipe.model.checkpoint == "run/export" and recipe.evaluation is None
    assert recipe.stages["instruct"].lora is not None and not answers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a/b", "--data", "x"], "NAME: 'a/b' is not a name"),
        (["a"], "--data: has no rows"),
        (["a", "--data", "gone.json"], "gone.json"),
        (["a", "--data", "{rows}", "--output", "no/a.yaml"], "no/a.yaml: No such file or directory"),
        (["a", "--data", "{rows}", "--model", "{model}"], "config.json: is not a LlavaNext model"),
    ],
)
def test_what_new_cannot_do_is_said(arguments, message, data_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    given = [argument.format(rows=data_folder / "rows.json", model=tmp_path / "other") for argument in arguments]
    assert main(["new", *given]) == 2
    assert message in capsys.readouterr().err and not list(Path().iterdir())


def test_hostile_names_of_files_stay_text(data_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = 'a: "b" #{c}.json'
    (tmp_path / name).write_bytes((data_folder / "rows.json").read_bytes())
    assert main(["new", "x", "--data", name, "--image-root", str(data_folder)]) == 0
    source = yaml.safe_load((tmp_path / "x.yaml").read_text())["stages"]["instruct"]["data"][0]
    assert source["path"] == name and source["image_root"] == str(data_folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command trian (fix: did you mean train?)"),
        (["zzz"], "unknown command zzz (fix: one of new, train, "),
        (["train", "--ouput", "x", "tiny"], "train has no option --ouput (fix: did you mean --output?)"),
        (["plan", "tiny", "other"], "plan: unexpected argument: other"),
        (["plan", "tiny", "--mfu", "0"], "--mfu: '0' is not a number above 0"),
        (["evaluate", "x", "--data", "y", "--limit", "0"], "--limit: '0' is not a whole number from 1 on"),
        (["chat", "x", "--dtype", "flot32"], "--dtype: there is no 'flot32' (fix: did you mean float32?)"),
        (["export"], "missing: RUN (fix: llava-llama31 export --help)"),
    ],
)
def test_what_is_mistyped_is_guessed(arguments, message, capsys):
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr()
    assert code == 2 and message in said.err and said.out == "" and said.err.count("\n") == 1


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 0
    assert "--version" in capsys.readouterr().out


def test_debug_may_stand_before_the_command(capsys):
    assert main(["--debug", "plan", "gone.yaml"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_every_command_has_examples_that_it_understands():
    assert EXAMPLES.keys() == _COMMANDS.keys()
    for command, lines in EXAMPLES.items():
        for line in lines:
            words = shlex.split(line.partition(" > ")[0])
            assert command_parser().parse_args([command, *words]).run is _COMMANDS[command].run


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_can_complete(shell, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "check-engine" in script and "--dry-run" in script


def test_an_error_on_a_terminal_has_its_fix_on_a_line_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["plan", "gone[red].yaml"]) == 2
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().err).splitlines()
    assert lines[0] == "error: gone[red].yaml: there is no such recipe" and lines[1].startswith(
        "fix: name a YAML file"
    )
