"""The suite's own launcher: exit codes, signals, timeouts and variables are those of real processes."""

import signal
import subprocess
import time

import psutil
import pytest
from forks import ROOT, launchers_variables


SCRIPT = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
print("rank", rank, "of", os.environ["WORLD_SIZE"], os.environ.get("OWN"), flush=True)
what = sys.argv[1 + rank]
if what == "sleep":
    time.sleep(1000)
if what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "raise":
    raise KeyError("planted")
sys.exit(int(what))
"""


@pytest.fixture
def start(forks, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)

    def start(*what: str, **case):
        return forks.start(*what, processes=len(what), script=str(tmp_path / "script.py"), **case)

    return start


@pytest.mark.parametrize(
    ("what", "codes"), [(["0", "3"], [0, 3]), (["kill", "75"], [-9, 75]), (["raise", "0"], [1, 0])]
)
def test_codes_and_output_are_those_of_the_ranks(start, what, codes):
    job = start(*what, variables={"OWN": "mine"})
    output, _ = job.communicate(timeout=30)
    assert job.codes == codes and job.returncode == next(filter(None, codes))
    assert "rank 0 of 2 mine\n" in output and "rank 1 of 2 mine\n" in output
    assert ("KeyError: 'planted'" in output) == ("raise" in what)


def test_a_case_that_takes_too_long_is_killed(start):
    job = start("sleep", "sleep")
    with pytest.raises(subprocess.TimeoutExpired):
        job.communicate(timeout=1)
    assert job.codes == [-9, -9] and not any(map(psutil.pid_exists, job.pids))


def test_signals_reach_every_rank(start):
    job = start("sleep", "sleep")
    while job.output().count("rank") < 2:
        time.sleep(0.01)
    assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=30)
    assert job.codes == [-15, -15]


def test_variables_are_those_of_accelerates_launcher():
    found = launchers_variables(f"--config_file {ROOT / 'examples/accelerate/fsdp2.yaml'}")
    assert found["ACCELERATE_USE_FSDP"] == "true" and found["FSDP_VERSION"] == "2"
    assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in found  # the Trainer names the layers of the model that it has
    plain = launchers_variables("--multi_gpu --mixed_precision no")
    assert plain and not [name for name in plain if "FSDP" in name or "DEEPSPEED" in name]
