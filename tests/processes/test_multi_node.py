"""Two launchers of one process each, as on two machines, with caches of their own; and the Slurm script's promises."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from forks import Forks, Job
from safetensors.torch import load_file


ROOT = Path(__file__).parents[2]
TORCHRUN = (
    "torch.distributed.run --nnodes 2 --nproc_per_node 1 --rdzv_backend c10d"
    " --rdzv_endpoint 127.0.0.1:{port} --rdzv_id job"
)
FINAL = "stages/2-instruct/final"


@pytest.fixture
def recipe_file(tmp_path, recipe_content):
    del recipe_content["evaluation"]
    for stage in recipe_content["stages"].values():
        stage |= {"epochs": None, "max_steps": 3}
    # the images' features are kept in a cache too, which the machines don't share
    recipe_content["stages"]["projector"]["feature_cache_gb"] = 0.01
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_content, sort_keys=False))
    return path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", **variables}


def start(command: list[str], **variables: str) -> subprocess.Popen:
    """A job in a session of its own, with its output in one pipe."""
    return subprocess.Popen(
        command,
        env=environment(**variables),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@contextmanager
def two_machines(folder: Path, *arguments: str) -> Iterator[list[subprocess.Popen]]:
    """Jobs of two launchers, which share all but the cache."""
    port = free_port()
    jobs = []
    for node in (0, 1):
        command = [
            sys.executable,
            "-m",
            *TORCHRUN.format(port=port).split(),
            "tests/processes/brief_train.py",
            *arguments,
        ]
        jobs.append(start(command, XDG_CACHE_HOME=str(folder / f"cache-{node}")))
    try:
        yield jobs
    finally:
        for job in jobs:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
            job.communicate()


def forked_machines(forks: Forks, folder: Path, *arguments: str) -> list[Job]:
    """The same without launchers; {node} in an argument becomes 0 and 1."""
    port = f"{free_port()}"
    shared = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": port}
    jobs = []
    for node in (0, 1):
        own = {"RANK": f"{node}", "GROUP_RANK": f"{node}", "XDG_CACHE_HOME": str(folder / f"cache-{node}")}
        given = [argument.format(node=node) for argument in arguments]
        jobs.append(forks.start("train", *given, variables={**shared, **own, "MASTER_ADDR": "127.0.0.1"}))
    return jobs


def assert_each_filled_its_own_cache(folder: Path) -> None:
    for node in (0, 1):
        assert list((folder / f"cache-{node}" / "llava-llama31").glob("features/*.features"))
        assert list((folder / f"cache-{node}" / "llava-llama31").glob("check-data/*.json"))


def test_two_machines_end_with_the_weights_of_one(forks, recipe_file, tmp_path):
    """Under torchrun, with the bits of forks of one machine."""
    job = forks.start("train", recipe_file, "--output", tmp_path / "one", processes=2)
    with two_machines(tmp_path, str(recipe_file), "--output", str(tmp_path / "run")) as jobs:
        outputs = [started.communicate(timeout=200)[0] for started in jobs]
    assert [started.returncode for started in jobs] == [0, 0], outputs
    output, _ = job.communicate(timeout=200)
    assert job.codes == [0, 0], output
    found, expected = (load_file(tmp_path / name / FINAL / "model.safetensors") for name in ("run", "one"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert_each_filled_its_own_cache(tmp_path)


def test_machines_that_see_different_things_are_refused(forks, recipe_content, data_folder, tmp_path):
    """Another folder for the run, and an image that one machine lacks, under a policy that skips it."""
    del recipe_content["evaluation"]
    for node in (0, 1):
        shutil.copytree(data_folder, tmp_path / f"data-{node}")
        for stage in recipe_content["stages"].values():
            stage["data"] = [{"name": "rows", "path": str(tmp_path / f"data-{node}" / "rows.json")}]
            stage["on_bad_record"] = {"default": "skip"}
        (tmp_path / f"recipe-{node}.yaml").write_text(yaml.safe_dump(recipe_content, sort_keys=False))
    (tmp_path / "data-1" / "5.png").unlink()
    recipe = str(tmp_path / "recipe-{node}.yaml")
    for output, message in (("run-{node}", "not the same folder on"), ("run", "44 to train on, ")):
        jobs = forked_machines(forks, tmp_path, recipe, "--output", str(tmp_path / output))
        outputs = [job.communicate(timeout=150)[0] for job in jobs]
        assert all(job.returncode for job in jobs)
        assert sorted(text.count(message) for text in outputs) == [0, 1], outputs


def test_a_machine_without_the_questions_is_refused_before_training(forks, recipe_content, tmp_path):
    """All processes answer them at the end of the run."""
    questions = Path(recipe_content["evaluation"]["data"])
    for node in (0, 1):
        recipe_content["evaluation"]["data"] = str(questions if node == 0 else tmp_path / "none.jsonl")
        (tmp_path / f"recipe-{node}.yaml").write_text(yaml.safe_dump(recipe_content, sort_keys=False))
    arguments = (str(tmp_path / "recipe-{node}.yaml"), "--output", str(tmp_path / "run"))
    jobs = forked_machines(forks, tmp_path, *arguments)
    outputs = [job.communicate(timeout=200)[0] for job in jobs]
    assert jobs[1].returncode == 2 and "none.jsonl" in outputs[1], outputs
    assert jobs[0].returncode and not list((tmp_path / "run").glob("stages/*/checkpoint-*"))


# What the script calls of Slurm: tasks in sessions of their own, with its variables; the highest exit code.
SRUN = """#!{python}
import os, subprocess, sys
from pathlib import Path

command = sys.argv[next(i for i, word in enumerate(sys.argv) if i and not word.startswith("--")):]
nodes, tasks = int(os.environ["SLURM_JOB_NUM_NODES"]), int(os.environ["SLURM_NTASKS"])
jobs = []
for task in range(tasks):
    variables = {{"SLURM_PROCID": f"{{task}}", "SLURM_LOCALID": f"{{task % (tasks // nodes)}}", "SLURM_STEP_ID": "0"}}
    jobs.append(subprocess.Popen(command, env={{**os.environ, **variables}}, start_new_session=True))
Path("{folder}", "tasks").write_text(" ".join(str(job.pid) for job in jobs))
codes = [job.wait() for job in jobs]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo 127.0.0.1; echo other; else echo "$@" >> "{folder}/requeued"; fi
"""
PYTHON = """#!/bin/sh
exec {python} "$@"
"""
SCANCEL = """#!/bin/sh
echo "$@" >> "{folder}/cancelled"
# from outside of the tasks: the one that calls it is among them
exec setsid sh -c 'for task in $(cat "{folder}/tasks"); do kill -9 "-$task"; done'
"""


@pytest.fixture
def sbatch(tmp_path):
    """Run the script as Slurm would, on this many machines of one task each."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL, "python": PYTHON}.items():
        (programs / name).write_text(text.format(python=sys.executable, folder=tmp_path))
        (programs / name).chmod(0o755)

    def run(nodes: int, *arguments: str) -> subprocess.Popen:
        variables = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SLURM_JOB_ID": str(free_port()),
            "SLURM_JOB_NODELIST": "a,b",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_NTASKS": str(nodes),
            "SLURM_CPUS_PER_TASK": "1",
        }
        return start(["bash", "examples/slurm/train.sbatch", *arguments], **variables)

    return run


def test_slurm_saves_requeues_and_resumes_on_other_machines(sbatch, forks, recipe_file, tmp_path):
    run = tmp_path / "run"
    arguments = [str(recipe_file), "--output", str(run)]
    for override in ("max_steps=60", "save_steps=10", "logging_steps=20"):
        arguments += ["--set", f"stages.projector.{override}"]
    job = sbatch(2, *arguments)
    try:
        while not list((run / "stages").glob("1-projector/checkpoint-*")):
            assert job.poll() is None, job.stdout.read()
            time.sleep(0.05)
        for task in (tmp_path / "tasks").read_text().split():
            os.killpg(int(task), signal.SIGTERM)  # everything in a task gets it
        output, _ = job.communicate(timeout=100)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 75 and "is saved" in output, output
    assert (tmp_path / "requeued").read_text().startswith("requeue ") and not (tmp_path / "cancelled").exists()

    again = forks.start("train", *arguments)  # the same line on one machine
    output, _ = again.communicate(timeout=200)
    assert again.returncode == 0 and "resuming from" in output, output
    assert json.loads((run / FINAL / "stage.json").read_text())["num_processes"] == 1


# exit codes of two tasks, None for one that waits -> files that the script's calls of Slurm leave
ENDINGS = {(0, 0): [], (2, None): ["cancelled"], (75, 75): ["requeued"]}


@pytest.mark.parametrize("codes", ENDINGS)
def test_slurm_ends_all_tasks_when_one_fails_and_requeues_what_was_saved_alone(sbatch, tmp_path, codes):
    """Tasks stand in for training, whose exit codes other tests hold."""
    tasks = [f"exit {code}" if code is not None else "exec sleep 100" for code in codes]
    program = tmp_path / "bin/python"
    started = f"until [ -s {tmp_path}/tasks ]; do sleep 0.01; done"
    program.write_text(f'#!/bin/sh\n{started}\nif [ "$RANK" = 0 ]; then {tasks[0]}; fi\n{tasks[1]}\n')
    began = time.monotonic()
    job = sbatch(2, "recipe.yaml")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == max(137 if code is None else code for code in codes), output
    assert time.monotonic() - began < 50
    assert sorted(name for name in ("cancelled", "requeued") if (tmp_path / name).exists()) == ENDINGS[codes]
    if "cancelled" in ENDINGS[codes]:
        assert (tmp_path / "cancelled").read_text().split()[0].endswith(".0")
