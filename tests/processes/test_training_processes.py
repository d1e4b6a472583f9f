"""Runs of two processes end as runs of one, and a signal to a real process loses nothing."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file


@pytest.fixture
def recipe_file(tmp_path, recipe_content):
    del recipe_content["evaluation"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_content, sort_keys=False))
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_training(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], base: dict[str, torch.Tensor]):
    """Equal but for rounding, which Adam magnifies where a gradient is all but zero: 0.1 % of the way trained."""
    assert one.keys() == two.keys()
    moved = sum((one[name] - base[name]).square().sum() for name in one).sqrt()
    apart = sum((one[name] - two[name]).square().sum() for name in one).sqrt()
    assert moved > 0.1 and apart < 1e-3 * moved


def test_two_processes_end_with_the_weights_of_one(forks, recipe_file, tmp_path, base_folder):
    # every fourth row has no image, and micro-batches of 1 leave some ranks without any
    micro = ["--set", "stages.projector.micro_batch=1", "--set", "stages.instruct.micro_batch=1"]
    runs = {}
    for processes in (1, 2):
        runs[processes] = tmp_path / f"{processes}"
        job = forks.start("train", recipe_file, "--output", runs[processes], *micro, processes=processes)
        output, _ = job.communicate(timeout=240)
        assert not any(job.codes), output
    record = json.loads((runs[2] / "stages/2-instruct/final/stage.json").read_text())
    assert record["num_processes"] == 2 and record["gradient_accumulation"] == 4
    one, two = (weights(run / "stages/2-instruct/final") for run in (runs[1], runs[2]))
    assert_same_training(one, two, weights(base_folder))


COUNTED = """
import os, sys
from pathlib import Path
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.evaluation.predictions import PredictionsFile

append = PredictionsFile.append

def counted(self, rows):
    append(self, rows)
    with Path(os.environ["COUNTS"], os.environ["RANK"]).open("a") as file:
        file.write("x" * len(rows))

PredictionsFile.append = counted
sys.exit(main())
"""


def test_all_processes_answer_a_finished_runs_questions(forks, recipe_content, tmp_path):
    """The files of one process; each of two answers about half."""
    del recipe_content["stages"]["projector"]
    recipe_content["stages"]["instruct"] |= {"epochs": None, "max_steps": 2}
    recipe_content["evaluation"]["batch_size"] = 2
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(recipe_content, sort_keys=False))
    (tmp_path / "counted.py").write_text(COUNTED)
    arguments = ("train", recipe, "--output", run)
    job = forks.start(
        *arguments, processes=2, script=str(tmp_path / "counted.py"), variables={"COUNTS": str(tmp_path)}
    )
    output, _ = job.communicate(timeout=240)
    assert not any(job.codes), output

    def rows() -> list[dict]:
        """Of all files, in their order, without the seconds that each took."""
        files = [run / f"evaluation/{name}/predictions.jsonl" for name in ("before", "after", "blind")]
        found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return [{key: value for key, value in row.items() if key != "seconds"} for row in found]

    shared = rows()
    summary = json.loads((run / "summary.json").read_text())
    counts = [len((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    assert sum(counts) == len(shared) and min(counts) > 0.3 * sum(counts)

    shutil.rmtree(run / "evaluation")
    (run / "summary.json").unlink()
    job = forks.start(*arguments)
    output, _ = job.communicate(timeout=240)
    assert not any(job.codes) and "has already finished" in output, output
    assert rows() == shared
    again = json.loads((run / "summary.json").read_text())
    for key in ("accuracy_before", "accuracy_after", "accuracy_blind", "num_questions"):
        assert again[key] == summary[key]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_real_signal_loses_nothing(launch, forks, recipe_file, tmp_path, number):
    """SIGINT and SIGKILL come to a real process, SIGTERM to a fork; forks train what is left."""
    run = tmp_path / "run"
    arguments = [str(recipe_file), "--output", str(run)]
    for override in ("max_steps=60", "epochs=null", "save_steps=10", "logging_steps=20"):
        arguments += ["--set", f"stages.projector.{override}"]
    job = forks.start("train", *arguments) if number == signal.SIGTERM else launch("train.py", *arguments)
    while not list((run / "stages").glob("1-projector/checkpoint-*")):
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    job.send_signal(number)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == (-number if number == signal.SIGKILL else 75), output
    assert "Traceback" not in output
    again = forks.start("train", *arguments)
    output, _ = again.communicate(timeout=200)
    assert again.returncode == 0, output
    assert re.search(r"resuming from \S+, step [1-9]\d* of 60", output)


def test_two_processes_share_the_questions(forks, recipe_content, tmp_path):
    stage = recipe_content["stages"]["instruct"]
    stage |= {"dataloader_workers": 1, "eval_questions": 5, "eval_steps": 2, "micro_batch": 1}
    recipe_content["stages"] = {"instruct": stage}
    recipe_content["evaluation"]["baselines"] = False
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_content, sort_keys=False))
    answers = {}
    for processes in (1, 2):
        run = tmp_path / str(processes)
        job = forks.start("train", tmp_path / "recipe.yaml", "--output", run, processes=processes)
        output, _ = job.communicate(timeout=240)
        assert not any(job.codes), output
        lines = (run / "stages/1-instruct/evaluation/step-2.jsonl").read_text().splitlines()
        answers[processes] = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
    assert answers[1] == answers[2] and len(answers[1]) == 5


def test_two_processes_share_the_work_of_a_feature_cache_and_end_alike(forks, recipe_content, tmp_path, monkeypatch):
    del recipe_content["evaluation"], recipe_content["stages"]["instruct"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_content))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ends = []
    for name, options in (("plain", []), ("cached", ["--set", "stages.projector.feature_cache_gb=1.0"])):
        job = forks.start("train", recipe, "--output", tmp_path / name, *options, processes=2)
        output, _ = job.communicate(timeout=240)
        assert not any(job.codes), output
        ends.append(load_file(tmp_path / name / "stages/1-projector/final/model.safetensors"))
    assert "33 images' features are in" in output
    for name in ends[0]:
        assert torch.equal(ends[0][name], ends[1][name]), name


@pytest.mark.torture
def test_two_compiled_processes_end_as_one_that_is_not(launch, forks, tmp_path, recipe_content):
    del recipe_content["evaluation"], recipe_content["stages"]["projector"]
    recipe_content["stages"]["instruct"] |= {"max_steps": 2, "epochs": None, "micro_batch": 2}
    path, ends = tmp_path / "recipe.yaml", []
    path.write_text(yaml.safe_dump(recipe_content))
    compiled = ["--set", "stages.instruct.compile=true", "--set", "stages.instruct.activation_checkpointing=2"]
    for job, output in (
        (forks.start("train", path, "--output", tmp_path / "1"), tmp_path / "1"),
        # the compiler has processes of its own
        (launch("train.py", str(path), "--output", str(tmp_path / "2"), *compiled, processes=2), tmp_path / "2"),
    ):
        text, _ = job.communicate(timeout=280)
        assert job.returncode == 0, text
        ends.append(load_file(output / "stages/1-instruct/final/model.safetensors"))
    start = load_file(os.path.join(recipe_content["model"]["checkpoint"], "model.safetensors"))
    apart, moved = (
        sum((end[n] - other[n]).square().sum() for n in end) ** 0.5
        for end, other in ((ends[0], ends[1]), (ends[0], start))
    )
    assert apart < 1e-3 * moved


WORKER = """
import multiprocessing, sys
from llava_llama31.trainer.fault_tolerance.watchdog import start_fork_server

if __name__ == "__main__":
    start_fork_server(["wave"])
    look = "import sys; sys.exit(4 + ('wave' in sys.modules))"
    worker = multiprocessing.get_context("forkserver").Process(target=exec, args=(look,))
    worker.start()
    worker.join()
    assert "wave" not in sys.modules
    sys.exit(worker.exitcode)
"""


def test_data_workers_are_forks_that_have_imported_what_they_need(forks, tmp_path):
    """They start again for every epoch and evaluation, and would import torch each time."""
    (tmp_path / "script.py").write_text(WORKER)
    job = forks.start(script=str(tmp_path / "script.py"))
    assert job.codes == [5], job.output()
