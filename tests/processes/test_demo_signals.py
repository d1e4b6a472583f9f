"""A signal while the demo prepares ends it and its workers at once, and says truly what is kept."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "stopped"),
        pytest.param(signal.SIGTERM, 75, "stopped by SIGTERM", marks=pytest.mark.torture),
    ],
)
def test_a_signal_while_the_demo_prepares(tmp_path, number, code, line):
    command = [sys.executable, "-m", "llava_llama31.trainer.cli", "train", "tiny", "--output", str(tmp_path / "run")]
    job = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        give_up = time.monotonic() + 280
        while not any((tmp_path / "run").glob(".prepared-*/data/images/*.png")):
            assert job.poll() is None and time.monotonic() < give_up
            time.sleep(0.05)
        workers = psutil.Process(job.pid).children(recursive=True)
        if number == signal.SIGINT:
            os.killpg(job.pid, number)  # as a terminal sends Ctrl-C: the workers, which import torch, get it too
        else:
            job.send_signal(number)
        output, _ = job.communicate(timeout=280)
    finally:
        job.kill()
    assert job.returncode == code, output
    assert output.strip().splitlines()[-1] == (
        f"{line}; no checkpoint has been written yet: the same command starts from the beginning"
    )
    assert "Traceback" not in output
    assert len(workers) >= 3 and not psutil.wait_procs(workers, timeout=5)[1]
    assert not list((tmp_path / "run").glob(".prepared-*"))
