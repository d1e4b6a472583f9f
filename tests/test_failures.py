"""What people leave alone for days, in real processes: a fault on one of two ends both soon, with one message."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.fault_tolerance.peers import Peers
from llava_llama31.trainer.fault_tolerance.watchdog import loader_failure


ROOT = Path(__file__).parents[1]
FAULTS = "../tests/faults.py"


@pytest.fixture
def recipe(tmp_path, recipe_content):
    del recipe_content["evaluation"], recipe_content["stages"]["instruct"]
    recipe_content["stages"]["projector"] |= {"micro_batch": 2}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_content, sort_keys=False))
    return ["train", str(path), "--output", str(tmp_path / "run")]


def ended(job: subprocess.Popen) -> tuple[str, list[int]]:
    """Output, and the exit codes of rank 0 and 1 as torchelastic tells them."""
    output, _ = job.communicate(timeout=150)
    codes = dict(re.findall(r"rank +: (\d) .*\n +exitcode +: (-?\d+)", output))
    return output, [int(codes.get(rank, 0)) for rank in ("0", "1")]


CASES = {
    "nan,1,3": ([4, 4], "stages.projector, step 3: loss is nan, gradient norm is nan; rank 1: records r"),
    "kill,1,3": ([7, -9], r"the process of rank 1 \(pid \d+\) disappeared without an error"),
    "user:_save_rng_state,1,1": ([2, 2], "error: planted"),
    "hang,1,3": ([5, 5], r"rank \d has made no progress for 8 s; it was training on micro-batch \d of step 3"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", CASES)
def test_a_fault_on_one_rank_ends_both_soon_and_is_told_once(launch, recipe, monkeypatch, fault):
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # the launcher's kill -9 would hide what hangs
    stage = "stages.projector"
    options = ["--set", f"{stage}.validation_fraction=0.1", "--set", f"{stage}.eval_steps=2"]
    if fault.startswith("hang"):
        options += ["--set", f"{stage}.step_timeout=8"]
    output, codes = ended(launch(FAULTS, *recipe, *options, processes=2))
    expected, message = CASES[fault]
    # at its very end the second one may be ended by the launcher's SIGTERM
    assert all(code in (wanted, -signal.SIGTERM) for code, wanted in zip(codes, expected, strict=True)), output
    assert any(code == wanted for code, wanted in zip(codes, expected, strict=True)), output
    assert len(re.findall(message, output)) == 1, output
    if fault.startswith("hang"):
        assert "stacks of rank 0" in output and "stacks of rank 1" in output
        assert re.search(r'faults.py", line \d+ in crash', output)


def run_under(engine: str, fault: str, recipe: list[str], *sets: str) -> tuple[str, list[int], int]:
    """Output, exit codes of rank 0 and 1, and the launcher's."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "DS_ACCELERATOR": "cpu"}
    environment |= {"FAULT": fault, "ENGINE": "1"}
    options = f"-m accelerate.commands.launch --config_file {ROOT}/examples/accelerate/{engine}.yaml --num_machines 1 "
    options += "--num_processes 2 --main_process_port 0 --dynamo_backend no"
    overrides = [word for each in sets for word in ("--set", f"stages.projector.{each}")]
    job = subprocess.Popen(
        [sys.executable, *options.split(), str(ROOT / "tests/faults.py"), *recipe, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    output, codes = ended(job)
    return output, codes, job.returncode


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "policy"), [("fsdp2", "skip"), ("zero3", "stop")])
def test_sharded_engines_see_a_nan_of_one_rank(recipe, tmp_path, engine, policy):
    sets = f"on_nonfinite={policy}", "save_steps=1", "save_total_limit=9"
    output, codes, code = run_under(engine, "nan,1,3", recipe, *sets)
    stage = tmp_path / "run/stages/1-projector"
    assert len(re.findall("loss is nan, gradient norm is (nan|inf); rank 1: records r", output)) == 1, output
    if policy == "stop":
        assert set(codes) <= {4, -signal.SIGTERM} and 4 in codes and not (stage / "checkpoint-3").exists()
        return
    assert code == 0
    two, three, four = (load_file(stage / f"checkpoint-{step}/model.safetensors") for step in (2, 3, 4))
    assert all(torch.equal(two[name], three[name]) for name in two)
    assert any(not torch.equal(three[name], four[name]) for name in two)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "rank"), [("zero2", 1), ("zero3", 0)])
def test_a_disk_that_gets_full_under_deepspeed_leaves_the_former_checkpoint(recipe, tmp_path, engine, rank):
    sets = "save_steps=1", "save_total_limit=9"
    output, codes, _ = run_under(engine, f"full:_save_checkpoint,{rank},3", recipe, *sets)
    stage = tmp_path / "run/stages/1-projector"
    assert set(codes) <= {2, -signal.SIGTERM} and 2 in codes, output
    assert len(re.findall(rf"error: {stage}: saving [\d,]+ bytes failed, with [\d,]+ free", output)) == 1, output
    assert "torch/serialization.py" not in output
    folders = sorted(stage.glob("checkpoint-*"))
    assert [folder.name for folder in folders] == ["checkpoint-1"]
    assert all(atomic_folders.verify(folder) is None for folder in folders)


@pytest.mark.slow
def test_a_data_worker_that_is_stuck_is_named_with_its_records_and_killed(launch, recipe, monkeypatch):
    monkeypatch.setenv("FAULT", "worker,0,14")
    stage = "stages.projector"
    options = ["--set", f"{stage}.loader_timeout=20", "--set", f"{stage}.dataloader_workers=2"]
    job = launch(FAULTS, *recipe, *options)
    output, _ = job.communicate(timeout=150)
    assert job.returncode == 5, output
    named = re.search(
        r"error: stages.projector: data worker \d was asked for records (.*) and returned nothing for 20 s", output
    )
    assert named is not None, output
    if "projector      2/6" in output:  # else the worker needed longer to start, and was rightly named for that
        assert "r14" in named[1] and re.search(r'faults.py", line \d+ in crash', output), output


@pytest.mark.slow
def test_a_killed_data_worker_of_one_rank_ends_both(launch, recipe, monkeypatch):
    monkeypatch.setenv("FAULT", "killed-worker,0,14")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    output, codes = ended(launch(FAULTS, *recipe, "--set", "stages.projector.dataloader_workers=2", processes=2))
    assert set(codes) <= {7, -signal.SIGTERM} and 7 in codes, output
    # which of the two it is depends on what rank 0 waits for
    message = r"error: stages.projector: data worker (\d+ of rank \d was killed by SIGKILL|\d was asked for records r)"
    assert len(re.findall(message, output)) == 1, output


@pytest.mark.slow
def test_usr1_to_the_whole_process_group_saves_and_the_run_goes_on(launch, recipe, tmp_path):
    """As Slurm sends it: to the main process, its data workers and their fork server."""
    stage = "stages.projector"
    sets = (f"{stage}.max_steps=400", f"{stage}.epochs=null", f"{stage}.dataloader_workers=2", f"{stage}.save_steps=5")
    options = [argument for each in sets for argument in ("--set", each)]
    command = [sys.executable, str(ROOT / "examples/train.py"), *recipe[1:], *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    job = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    while not list((tmp_path / "run/stages").glob("1-projector/checkpoint-*")):
        assert job.poll() is None, job.stdout.read()
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGUSR1)
    output, _ = job.communicate(timeout=100)
    assert job.returncode == 75 and "Traceback" not in output, output
    step = re.search(r"stopped at step (\d+) of 400 and is saved", output)[1]
    assert (tmp_path / f"run/stages/1-projector/checkpoint-{step}/manifest.json").is_file()


def test_a_worker_that_is_gone_is_told_from_one_that_is_stuck():
    error = RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly")
    failure = loader_failure(error, 0, ["r5"], "stages.x", 3)
    assert failure.exit_code == 7 and "worker 0 was asked for records r5 and is gone: DataLoader" in str(failure)


@pytest.mark.parametrize(
    ("rank", "neighbours", "failed", "says"),
    [(2, {3: 1}, 0, True), (3, {2: 1}, 0, False), (2, {3: 1}, 3, False), (1, {}, 0, True)],
)
def test_what_failed_on_another_machine_is_said_once_on_this_one(rank, neighbours, failed, says):
    peers = Peers(rank, 4)
    peers._neighbours = neighbours
    assert peers._untold({"rank": failed, "message": "why"}) == says * f"rank {failed}, on another machine: why"
