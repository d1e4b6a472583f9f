"""The command line: one JSON object on stdout where asked, one line and exit code 2 for what the user can fix."""

import errno
import json
import logging
import os
import subprocess
import sys

import pytest
import yaml

from llava_llama31.trainer import cli
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.errors import Interrupted
from llava_llama31.trainer.publishing.published import is_outstanding
from llava_llama31.trainer.recipes.loading import SHIPPED
from llava_llama31.trainer.recipes.schema import Publish


@pytest.fixture
def recipe_file(tmp_path, recipe_content):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_content, sort_keys=False))
    return path


def one_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("former", [None, "max_split_size_mb:512"])
def test_a_gpu_s_memory_grows_in_segments_unless_the_user_says_otherwise(monkeypatch, capsys, former):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    if former is not None:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", former)
    assert main(["recipes"]) == 0
    assert os.environ.get("PYTORCH_ALLOC_CONF") == (None if former else "expandable_segments:True")


def test_plan_counts_rows_and_steps(recipe_file, capsys):
    assert main(["plan", str(recipe_file), "--devices", "2", "--json"]) == 0
    plan = one_json(capsys)
    assert [stage["name"] for stage in plan["stages"]] == ["projector", "instruct"]
    first = plan["stages"][0]
    assert (first["rows"], first["steps"], first["gradient_accumulation"]) == (44, 6, 1)
    assert main(["plan", str(recipe_file), "--devices", "3"]) == 2
    assert "not a multiple of micro_batch 4 x 3 devices" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_can_be_planned_and_copied_out(name, capsys, tmp_path):
    assert main(["plan", name, "--json", "--output", str(tmp_path)]) == 0
    assert one_json(capsys)["recipe"] == name
    assert main(["recipes", name]) == 0
    copy = tmp_path / "copy.yaml"
    copy.write_text(capsys.readouterr().out)
    assert main(["plan", str(copy), "--json"]) == 0


def test_recipes_lists_what_is_shipped(capsys):
    assert main(["recipes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(SHIPPED)


def test_check_data_on_a_recipe_is_one_object_with_a_report_per_stage(recipe_file, tmp_path, capsys):
    assert main(["check-data", str(recipe_file), "--output", str(tmp_path / "run"), "--json"]) == 0
    report = one_json(capsys)
    assert report["ok"] and list(report["stages"]) == ["projector", "instruct"]
    source = report["stages"]["projector"]["sources"][0]
    assert source["rows"] == source["usable"] == 44
    assert source["statistics"]["num_supervised_tokens"]["total"] > 0


def test_check_data_on_files_needs_no_model(data_folder, tmp_path, capsys):
    assert main(["check-data", str(data_folder / "rows.json"), "--json"]) == 0
    assert one_json(capsys)["usable"] == 44
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "x", "image": "gone.png", "conversations": []}\n')
    assert main(["check-data", str(bad), "--rejects", str(tmp_path / "rejects.jsonl")]) == 2
    assert "(fix: " in capsys.readouterr().err
    assert json.loads((tmp_path / "rejects.jsonl").read_text())["id"] == "x"


def test_evaluate_and_score_agree(base_folder, data_folder, tmp_path, capsys):
    questions = str(data_folder / "questions.jsonl")
    out = str(tmp_path / "scores")
    assert main(["evaluate", str(base_folder), "--data", questions, "--output", out, "--json"]) == 0
    evaluated = one_json(capsys)
    assert main(["score", f"{out}/predictions.jsonl", "--annotations", questions, "--json"]) == 0
    scored = one_json(capsys)
    assert scored["num_questions"] == 6 and scored["protocols"] == evaluated["protocols"]
    assert set(scored["protocols"]) == {"vlmevalkit-2024", "vlmevalkit-2025", "m4c"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "nowhere", "--data", "gone.jsonl"],
        ["score", "gone.jsonl", "--annotations", "gone.jsonl"],
        ["assemble", "--vision-tower", "gone", "--language-model", "gone", "--output", "x"],
        ["export", "gone"],
        ["check-data", "gone.json"],
        ["plan", "gone.yaml"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_is_not_there_is_one_line(arguments, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and "\n" not in captured.err.strip()
    assert main([*arguments, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


HEAVY = {"torch", "transformers", "datasets", "pyarrow"}
TRAIN = f"""
import sys
from llava_llama31.trainer import cli
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.errors import Interrupted
assert main(sys.argv[1:]) == 0
assert not {HEAVY} & set(sys.modules)
"""


def test_a_finished_run_says_so_without_the_heavy_libraries(recipe_file, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "summary.json").write_text("{}")
    arguments = ["train", str(recipe_file), "--output", str(run)]
    done = subprocess.run([sys.executable, "-c", TRAIN, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().endswith(f"has already finished: {run / 'summary.json'}")
    (run / "stages" / "1-projector" / "final").mkdir(parents=True)
    assert main([*arguments, "--set", "seed=77"]) == 2
    assert "this run began with another recipe: seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recorded", "outstanding"),
    [
        ({}, True),
        ({"publish": {"repo": "me/Llama-x", "published": False}}, True),
        ({"publish": {"repo": "me/Llama-y", "published": True}}, True),
        ({"publish": {"repo": "me/Llama-x", "published": True}}, False),
    ],
)
def test_a_publication_is_outstanding_until_the_summary_records_it(recorded, outstanding):
    assert is_outstanding(Publish(repo_id="me/Llama-x"), recorded) == outstanding
    assert not is_outstanding(None, recorded)


COMMAND = [sys.executable, "-m", "llava_llama31.trainer.cli"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["recipes"], ["recipes", "llama31-8b-card"], ["plan", "llama31-8b-card"], ["train", "--help"]]
)
def test_a_reader_that_leaves_is_no_fault(arguments):
    read, write = os.pipe()
    os.close(read)
    # argparse ignores it where its output is not buffered
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [*COMMAND, *arguments], stdout=write, stderr=subprocess.PIPE, text=True, check=False, env=environment
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_pipe_that_breaks_elsewhere_is_reported(monkeypatch, capsys):
    def breaks(options: object) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(cli.recipes, "run", breaks)
    assert main(["recipes"]) == 2
    assert capsys.readouterr().err == "error: a file: Broken pipe\n"


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (
            ("/data/answers.jsonl",),
            "/data/answers.jsonl: No space left on device (fix: free space there and run again)",
        ),
        ((), "a file: No space left on device (fix: free space where the command writes and in /spare; --debug"),
    ],
)
def test_a_full_disk_is_reported_with_the_place_to_free(monkeypatch, capsys, named, message):
    def write(options: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *named)

    monkeypatch.setattr(cli.tempfile, "tempdir", "/spare")
    monkeypatch.setattr(cli.recipes, "run", write)
    assert main(["recipes"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize("command", [[], *([name] for name in cli._COMMANDS)])
def test_help_is_plain_ascii(command, capsys):
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    assert capsys.readouterr().out.isascii()


KEPT = {
    "train": "no checkpoint has been written yet: the same command starts from the beginning",
    "train, begun": "run the same command to resume from the last checkpoint",
    "evaluate": "answered batches are kept: run the same command to ask the others",
    "publish": "run the same command to continue: it does only what is missing on the Hub",
    "score": "",
}


@pytest.mark.parametrize("command", KEPT)
@pytest.mark.parametrize(
    ("signal", "code", "said"),
    [(KeyboardInterrupt(), 130, "stopped"), (Interrupted("stopped by SIGTERM"), 75, "stopped by SIGTERM")],
    ids=["SIGINT", "SIGTERM"],
)
def test_a_signal_says_what_the_command_keeps(recipe_file, tmp_path, monkeypatch, capsys, command, signal, code, said):
    def stopped(options):
        raise signal

    name = command.partition(",")[0]
    monkeypatch.setattr(cli._COMMANDS[name], "run", stopped)
    if command == "train, begun":
        (tmp_path / "run/stages/1-projector/checkpoint-2").mkdir(parents=True)
    rest = {
        "train": [str(recipe_file), "--output", str(tmp_path / "run")],
        "evaluate": ["model", "--data", "questions.jsonl"],
        "publish": ["run", "--repo", "owner/name"],
        "score": ["answers.jsonl", "--annotations", "questions.jsonl"],
    }[name]
    assert main([name, *rest]) == code
    assert capsys.readouterr().err.splitlines() == [f"{said}; {KEPT[command]}" if KEPT[command] else said]


def test_what_the_locale_cannot_encode_is_escaped(data_folder, tmp_path):
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text('{"question_id": "Grüße", "answer": "x"}\n{"question_id": 1, "answer": "x"}\n')
    command = [*COMMAND, "score", str(predictions), "--annotations", str(data_folder / "questions.jsonl")]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=ascii_only, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert r"not annotated: 1: Gr\xfc\xdfe" in done.stdout


def test_rejects_in_a_folder_are_refused(data_folder, capsys):
    assert main(["check-data", str(data_folder / "rows.json"), "--rejects", "."]) == 2
    assert capsys.readouterr().err == "error: --rejects .: is a folder (fix: name a file of JSON lines in it)\n"


def test_every_option_is_explained():
    (commands,) = (action for action in cli.command_parser()._actions if isinstance(action.choices, dict))
    for name, parser in commands.choices.items():
        assert [action.dest for action in parser._actions if not action.help] == [], name


def test_libraries_that_are_imported_and_not_used_say_nothing(monkeypatch, capsys):
    monkeypatch.setenv("TQDM_DISABLE", "")  # so that it is restored
    monkeypatch.delenv("TQDM_DISABLE")
    assert main(["recipes"]) == 0
    assert os.environ["TQDM_DISABLE"] == "1"
    deepspeed = logging.getLogger("DeepSpeed")
    handler = logging.StreamHandler()
    deepspeed.addHandler(handler)  # as its import does
    deepspeed.warning("of no use to the reader")
    deepspeed.removeHandler(handler)
    for name in (
        "torchao.quantization",
        "torch.utils._pytree",
        "torch.utils.cpp_extension",
        "bitsandbytes.backends.cpu.ops",
    ):
        logging.getLogger(name).warning("of no use to the reader")
    assert "of no use" not in capsys.readouterr().err
