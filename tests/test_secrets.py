"""No token in any file, log, config dump, traceback or card: planted ones are looked for after real runs."""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.data.sources import remote_files
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.loading import load_recipe
from llava_llama31.trainer.redaction import SafeFormatter, redacted
from llava_llama31.trainer.runs import run


HUB = "hf_PlantedHubTokenXyz123456789"
CACHED = "hf_PlantedCachedTokenAbc98765432"
WANDB = "0123456789abcdef0123456789abcdefplanted"
PASSWORD = "planted-Pa55word"
URL = f"https://someone:{PASSWORD}@data.example/rows.json"
PLANTED = (HUB, CACHED, WANDB, PASSWORD)


@pytest.fixture
def planted(tmp_path, monkeypatch) -> Iterator[Path]:
    """Secrets in the environment and in the Hub's folder; returns the folder that everything is written under."""
    hub, work = tmp_path / "hub", tmp_path / "work"
    hub.mkdir()
    (hub / "token").write_text(CACHED)
    (hub / "stored_tokens").write_text(f"[mine]\nhf_token = {CACHED}\n")
    (work / "tmp").mkdir(parents=True)
    for name, value in (("HF_TOKEN", HUB), ("WANDB_API_KEY", WANDB), ("HF_HOME", hub), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("XDG_CACHE_HOME", str(work / "cache"))
    short = Path(tempfile.mkdtemp(), "s")  # a socket's path may have a hundred characters
    short.symlink_to(work / "tmp")
    monkeypatch.setenv("TMPDIR", str(short))
    monkeypatch.chdir(work)
    yield work
    shutil.rmtree(short.parent)


def launched(*command: str, code: int) -> str:
    """Output of a process of its own, in which no secret stands."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=280)
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    assert_none_planted(output.encode(), command)
    return output


def assert_none_planted(content: bytes, where: object) -> None:
    for secret in PLANTED:
        for form in (secret.encode(), secret.encode("utf-16-le"), secret[::-1].encode()):
            assert form not in content, where


def assert_no_file_holds_a_secret(folder: Path, at_least: int = 40) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= at_least
    for path in files:
        assert_none_planted(path.read_bytes(), path)
        assert_none_planted(str(path).encode(), path)


@pytest.fixture
def recipe(tmp_path, recipe_content) -> str:
    recipe_content["stages"]["projector"]["dataloader_workers"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_content, sort_keys=False))
    return str(tmp_path / "recipe.yaml")


@pytest.mark.slow
def test_a_whole_run_leaves_no_secret(planted, recipe, recipe_content, capfd):
    cli = ("-m", "llava_llama31.trainer.cli")
    questions = recipe_content["evaluation"]["data"]
    launched(*cli, "train", recipe, "--output", "run", "--debug", code=0)
    for arguments in (
        ["evaluate", "run/export", "--data", questions, "--output", "evaluation", "--json"],
        ["export", "run", "--output", "again", "--debug"],
        ["check-data", recipe, "--output", "checked", "--json"],
        ["plan", recipe, "--debug"],
    ):
        assert main(arguments) == 0
    assert_none_planted("".join(capfd.readouterr()).encode(), "output")
    assert_no_file_holds_a_secret(planted)


def test_runs_that_fail_show_no_secret(planted, tmp_path, recipe, recipe_content, capfd, monkeypatch):
    rows = Path(recipe_content["stages"]["projector"]["data"][0]["path"])
    bad = json.loads(rows.read_text())
    bad[0] |= {"id": f"see {URL}", "conversations": bad[0]["conversations"][:1]}
    bad[1]["image"] = URL
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    source = f"[{{name: rows, path: {tmp_path / 'bad.json'}, image_root: {rows.parent}}}]"
    set_data = f"stages.projector.data={source}"
    assert main(["train", recipe, "--output", "failed", "--debug", "--set", set_data]) == 2
    output = "".join(capfd.readouterr())
    assert "Traceback" in output and "see https://***@data.example" in output
    assert_none_planted(output.encode(), "a run on bad rows")

    def fail(*_, **__):
        raise RuntimeError(f"{os.environ['HF_TOKEN']} at {URL}")

    monkeypatch.setattr(run, "check_stages", fail)
    assert main(["train", recipe, "--output", "fault"]) == 1
    output = "".join(capfd.readouterr())
    assert "RuntimeError: *** at https://***@data.example" in output
    assert_none_planted(output.encode(), "a run with a fault")

    (rejects,) = planted.glob("failed/stages/*/rejects.jsonl")
    assert "see https://***@data.example" in rejects.read_text()
    assert '"image": "https://***@data.example' in rejects.read_text()
    assert_no_file_holds_a_secret(planted, at_least=5)


@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=["", "debug"])
def test_arguments_that_hold_a_secret_are_not_repeated(planted, recipe, recipe_content, capfd, debug, monkeypatch):
    monkeypatch.setattr(remote_files, "FIRST_WAIT_S", 0.0)
    for arguments in (
        ["check-data", URL],
        ["evaluate", URL, "--data", recipe_content["evaluation"]["data"]],
        ["evaluate", "gone", "--data", URL],
        ["assemble", "--vision-tower", URL, "--language-model", "gone", "--output", "x"],
        ["train", recipe, "--output", "other", "--set", f"stages.instruct.data.0.path={URL}"],
        ["train", recipe, "--output", "other", "--set", f"stages.instruct.trainer_args.hub_token={HUB}"],
        ["train", recipe, "--output", "other", "--set", f"stages.instruct.epochs={URL}"],
        ["train", URL],
        ["train", recipe, "--set", URL],
        ["export", URL],
        ["score", URL, "--annotations", URL],
    ):
        assert main([*arguments, *debug]) == 2
        out, err = capfd.readouterr()
        assert "error: " in err
        assert_none_planted((out + err).encode(), arguments)
    assert not (planted / "other").exists()


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("description", f"uses {HUB}", "the recipe: description holds"),
        ("description", f"uses {WANDB}", "the recipe: description holds"),
        (f"{URL}", 1, "a key of the recipe holds"),
        ("stages.projector.data.0.path", URL, "data.0.path holds"),
        ("stages.projector.init_from", f"https://{CACHED}@h/x", "stages.projector.init_from holds"),
        ("stages.projector.trainer_args", {"hub_token": "anything"}, "stages.projector.trainer_args: hub_token holds"),
        ("stages.projector.trainer_args", {"run_name": [HUB]}, "stages.projector.trainer_args.run_name.0 holds"),
        ("evaluation.image_root", URL, "evaluation.image_root holds"),
    ],
)
def test_a_recipe_that_holds_a_secret_is_refused_without_repeating_it(
    tmp_path, recipe_content, monkeypatch, key, value, named, capsys
):
    monkeypatch.setenv("WANDB_API_KEY", WANDB)
    *parents, last = key.split(".") if "/" not in key else [key]
    target = recipe_content
    for part in parents:
        target = target[int(part)] if part.isdigit() else target[part]
    target[last] = value
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_content))
    with pytest.raises(UserError, match=named) as caught:
        load_recipe(str(tmp_path / "recipe.yaml"))
    assert not any(secret in str(caught.value) for secret in PLANTED)
    assert main(["train", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run"), "--debug"]) == 2
    captured = capsys.readouterr()
    assert not any(secret in captured.out + captured.err for secret in PLANTED)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"token {HUB}!", "token ***!"),
        ("https://user:p@ss:w@host/x?y=a@b", "https://***@host/x?y=a@b"),
        ("https:/user:secret@host/x, //a@b", "https:/***@host/x, //a@b"),
        ("https://host/a@b and meta-llama/Llama@main", "https://host/a@b and meta-llama/Llama@main"),
        (f"{WANDB[:-1]} is not {WANDB}", f"{WANDB[:-1]} is not ***"),
        ("hf_internal_testing/tiny, hf_hub", "hf_internal_testing/tiny, hf_hub"),
    ],
)
def test_what_is_taken_out_of_text(monkeypatch, text, left):
    monkeypatch.setenv("WANDB_API_KEY", WANDB)
    monkeypatch.setenv("HF_TOKEN", "")
    assert redacted(text) == left == redacted(left)


def test_log_lines_are_clean(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", HUB)
    try:
        raise ValueError(f"\x1b[2J {URL}\nsecond line")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "%s\nforged line", (f"\x1b]0;{HUB}",), sys.exc_info())
    lines = SafeFormatter("%(levelname)s %(message)s").format(record).split("\n")
    assert lines[0] == "ERROR \\x1b]0;***\\nforged line"
    assert lines[1].startswith("Traceback") and lines[-2:] == [
        "ValueError: \\x1b[2J https://***@data.example/rows.json",
        "second line",
    ]
