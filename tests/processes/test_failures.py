"""What people leave alone for days, in real processes: a fault on one of two ends both soon, with one message."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from forks import Forks
from safetensors.torch import load_file

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.errors import EndedElsewhere, UserError
from llava_llama31.trainer.fault_tolerance.peers import Peers, launched_processes
from llava_llama31.trainer.fault_tolerance.watchdog import loader_failure


ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path, recipe_content):
    del recipe_content["evaluation"], recipe_content["stages"]["instruct"]
    recipe_content["stages"]["projector"] |= {"micro_batch": 2}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_content, sort_keys=False))
    return ["train", str(path), "--output", str(tmp_path / "run")]


CASES = {
    "nan,1,3": ([4, 4], "stages.projector, step 3: loss is nan, gradient norm is nan; rank 1: records r"),
    "kill,1,3": ([7, -9], r"the process of rank 1 \(pid \d+\) disappeared without an error"),
    "kill,0,3": ([-9, 7], r"the process of rank 0 \(pid \d+\) disappeared without an error"),
    "user:_save_rng_state,1,1": ([2, 2], "error: planted"),
    "hang,1,3": ([5, 5], r"rank \d has made no progress for 3 s; it was training on micro-batch \d of step 3"),
}


def sets(*keys: str) -> list[str]:
    return [word for each in keys for word in ("--set", f"stages.projector.{each}")]


def planted(fault: str) -> list:
    kind, rank, step = fault.split(",")
    return [kind, int(rank), int(step)]


@pytest.mark.parametrize("fault", CASES)
def test_a_fault_on_one_rank_ends_both_soon_and_is_reported_once(forks, recipe, fault):
    options = sets("validation_fraction=0.1", "eval_steps=2")
    if fault.startswith("hang"):
        options += sets("step_timeout=3")
    job = forks.start(*recipe, *options, processes=2, fault=planted(fault))
    output, _ = job.communicate(timeout=150)
    expected, message = CASES[fault]
    assert job.codes == expected, output
    assert len(re.findall(message, output)) == 1, output
    if fault.startswith("hang"):
        assert "stacks of rank 0" in output and "stacks of rank 1" in output
        assert re.search(r'faults.py", line \d+ in crash', output)


def run_under(forks: Forks, engine: str, fault: str, recipe: list[str], *keys: str) -> tuple[str, list[int]]:
    """Output and exit codes."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    launcher = f"--config_file {ROOT}/examples/accelerate/{engine}.yaml"
    job = forks.start(*recipe, *sets(*keys), processes=2, launcher=launcher, fault=planted(fault))
    output, _ = job.communicate(timeout=150)
    return output, job.codes


@pytest.mark.parametrize(("engine", "policy"), [("fsdp2", "skip"), ("zero3", "stop")])
def test_sharded_engines_see_a_nan_of_one_rank(forks, recipe, tmp_path, engine, policy):
    keys = f"on_nonfinite={policy}", "save_steps=1", "save_total_limit=9"
    output, codes = run_under(forks, engine, "nan,1,3", recipe, *keys)
    stage = tmp_path / "run/stages/1-projector"
    assert len(re.findall("loss is nan, gradient norm is (nan|inf); rank 1: records r", output)) == 1, output
    if policy == "stop":
        assert codes == [4, 4] and not (stage / "checkpoint-3").exists()
        return
    assert codes == [0, 0]
    two, three, four = (load_file(stage / f"checkpoint-{step}/model.safetensors") for step in (2, 3, 4))
    assert all(torch.equal(two[name], three[name]) for name in two)
    assert any(not torch.equal(three[name], four[name]) for name in two)


@pytest.mark.parametrize(("engine", "rank"), [("zero2", 1), ("zero3", 0)])
def test_a_disk_that_gets_full_under_deepspeed_leaves_the_former_checkpoint(forks, recipe, tmp_path, engine, rank):
    keys = "save_steps=1", "save_total_limit=9"
    output, codes = run_under(forks, engine, f"full:_save_checkpoint,{rank},3", recipe, *keys)
    stage = tmp_path / "run/stages/1-projector"
    assert codes == [2, 2], output
    assert len(re.findall(rf"error: {stage}: saving [\d,]+ bytes failed, with [\d,]+ free", output)) == 1, output
    assert "torch/serialization.py" not in output
    folders = sorted(stage.glob("checkpoint-*"))
    assert [folder.name for folder in folders] == ["checkpoint-1"]
    assert all(atomic_folders.verify(folder) is None for folder in folders)


def test_a_data_worker_that_is_stuck_is_named_with_its_records_and_killed(forks, recipe):
    options = sets("loader_timeout=3", "dataloader_workers=2")
    job = forks.start(*recipe, *options, fault=["worker", 0, 14])
    output, _ = job.communicate(timeout=150)
    assert job.returncode == 5, output
    named = re.search(
        r"error: stages.projector: data worker \d was asked for records (.*) and returned nothing for 3 s", output
    )
    assert named is not None and "r14" in named[1], output
    assert re.search(r'faults.py", line \d+ in crash', output), output


@pytest.mark.parametrize("record", [14, pytest.param(18, marks=pytest.mark.torture)])
def test_a_killed_data_worker_of_one_rank_ends_both_soon(forks, recipe, record):
    """Long before loader_timeout, whether the worker has given a micro-batch before or not (r18 is in the first)."""
    job = forks.start(*recipe, *sets("dataloader_workers=2"), processes=2, fault=["killed-worker", 0, record])
    output, _ = job.communicate(timeout=60)
    assert job.codes == [7, 7], output
    # which of the two it is depends on what rank 0 waits for
    message = r"error: stages.projector: data worker (\d+ of rank \d was killed by SIGKILL|\d was asked for records r)"
    assert len(re.findall(message, output)) == 1, output


def test_usr1_to_the_whole_process_group_saves_and_the_run_continues(forks, recipe, tmp_path):
    """As Slurm sends it: to the main process, its data workers and their fork server."""
    job = forks.start(*recipe, *sets("max_steps=400", "epochs=null", "dataloader_workers=2", "save_steps=5"))
    while not list((tmp_path / "run/stages").glob("1-projector/checkpoint-*")):
        assert job.poll() is None, job.output()
        time.sleep(0.05)
    os.killpg(job.pids[0], signal.SIGUSR1)
    output, _ = job.communicate(timeout=100)
    assert job.returncode == 75 and "Traceback" not in output, output
    step = re.search(r"stopped at step (\d+) of 400 and is saved", output)[1]
    assert (tmp_path / f"run/stages/1-projector/checkpoint-{step}/manifest.json").is_file()


def test_a_worker_that_is_gone_is_distinguished_from_one_that_is_stuck():
    error = RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly")
    failure = loader_failure(error, 0, ["r5"], "stages.x", 3)
    assert failure.exit_code == 7 and "worker 0 was asked for records r5 and is gone: DataLoader" in str(failure)


def alone(port: int) -> dict[str, str]:
    """Variables of rank 0 of two, the other of which never comes."""
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return {**names, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def test_a_process_that_waits_for_one_that_died_at_its_start_heeds_sigterm(forks, recipe):
    """It was deaf in the process group's rendezvous, which waited for a day."""
    job = forks.start(*recipe, variables=alone(free_port()), after=3.0, signal=signal.SIGTERM, deadline=60.0)
    output, _ = job.communicate(timeout=70)
    assert job.codes == [75] and "Traceback" not in output, output


def test_ranks_that_do_not_meet_are_named(monkeypatch, capsys):
    for name, value in alone(free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("llava_llama31.trainer.fault_tolerance.peers._ANNOUNCE_SECONDS", 0.1)
    place = f"127.0.0.1:{os.environ['MASTER_PORT']}"
    with pytest.raises(UserError, match=rf"^{place}: rank 0 did not answer within 0 s: Connection refused .fix: look"):
        Peers.connect(1, 2, seconds=0.3)
    assert capsys.readouterr().err == f"waiting for rank 0 at {place}\n"
    peers = Peers.connect(0, 3)
    with pytest.raises(UserError, match=rf"^{place}: ranks 1, 2 did not come within 0 s"):
        peers.meet(seconds=0.3)
    assert capsys.readouterr().err == f"waiting for ranks 1, 2 at {place}\n"
    peers.report(4, "no")  # as another rank would
    with pytest.raises(EndedElsewhere) as ended:
        peers.meet()
    assert ended.value.exit_code == 4
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(UserError, match="MASTER_ADDR: not set"):
        Peers.connect(0, 2)


def test_mpi_on_one_machine_meets_where_accelerate_would(monkeypatch):
    """mpirun sets no address; the place is refused as missing only where there are several machines."""
    for name, value in {"PMI_SIZE": "2", "PMI_RANK": "0", "MPI_LOCALNRANKS": "2"}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    places = []
    monkeypatch.setattr(Peers, "connect", lambda *_: places.append(os.environ.get("MASTER_PORT")) or Peers())
    monkeypatch.setattr("llava_llama31.trainer.fault_tolerance.peers.PartialState", lambda **_: None)
    with launched_processes(cpu=True):
        pass
    assert places == ["29500"]


def test_a_port_that_is_taken_is_named(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        for name, value in alone(other.getsockname()[1]).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=r"EADDRINUSE.*--main_process_port"):
            Peers.connect(0, 2)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


MEETING = """
import os
import sys
from datetime import timedelta

import torch.distributed as dist

from llava_llama31.trainer.fault_tolerance.peers import Peers

rank = int(sys.argv[1])
if rank == 0:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=100))
    print(store.port, flush=True)
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2] if rank else str(store.port)}
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store is there
peers = Peers.connect(rank, 2)
with peers.together():
    peers.meet()
    assert peers._lost() is None
print("neighbours", sorted(peers._neighbours), flush=True)
"""


@pytest.mark.parametrize("apart", [True, pytest.param(False, marks=pytest.mark.torture)])
def test_a_pid_means_nothing_in_another_containers_namespace(apart):
    """Containers with one host name (hostNetwork): a healthy rank was reported as gone and the run ended."""
    prefix = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"] if apart else []
    if apart and (shutil.which("unshare") is None or subprocess.run([*prefix, "true"]).returncode):
        pytest.skip("this machine forbids namespaces")
    command = [*prefix, sys.executable, "-c", MEETING]
    first = subprocess.Popen([*command, "0"], stdout=subprocess.PIPE, text=True)
    port = first.stdout.readline().strip()
    second = subprocess.run([*command, "1", port], stdout=subprocess.PIPE, text=True, timeout=100)
    expected = ["neighbours []"] * 2 if apart else ["neighbours [1]", "neighbours [0]"]
    assert [first.communicate(timeout=100)[0].strip(), second.stdout.strip()] == expected
    assert (first.returncode, second.returncode) == (0, 0)


@pytest.mark.parametrize(
    ("rank", "neighbours", "failed", "says"),
    [(2, {3: 1}, 0, True), (3, {2: 1}, 0, False), (2, {3: 1}, 3, False), (1, {}, 0, True)],
)
def test_what_failed_on_another_machine_is_said_once_on_this_one(rank, neighbours, failed, says):
    peers = Peers(rank, 4)
    peers._neighbours = neighbours
    assert peers._untold({"rank": failed, "message": "why"}) == says * f"rank {failed}, on another machine: why"
