"""Starts vLLM for a folder and ends it: `vllm serve` as a process of its own, reached under its own address."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llava_llama31.trainer.errors import UserError


PATIENCE = 1800.0  # seconds: large weights come from slow disks
ENDING = 30.0
# as Python ends a traceback, and as vLLM prints one of another process, behind the place in brackets
_RAISED = re.compile(r"(?:^|\] )([A-Za-z_.]*(?:Error|Exception): .+)")


@contextmanager
def vllm_server(folder: Path, log: Path, options: Sequence[str] = (), patience: float = PATIENCE) -> Iterator[str]:
    """vLLM with a folder; yields its address when it answers, and ends it afterwards.

    Args:
        folder: what is served.
        log: gets what vLLM prints.
        options: further ones of `vllm serve`, e.g. `--tensor-parallel-size 2`.
        patience: seconds until it has to answer.

    Raises:
        UserError: there is no `vllm`, it ends, or it does not answer in time; names the log.
    """
    command = shutil.which("vllm")
    if command is None:
        fix = "install vLLM in an environment whose bin is on PATH, or start it elsewhere and name its --url"
        raise UserError("the command vllm is not on PATH", where="--engine", fix=fix)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [command, "serve", str(folder.resolve()), "--host", "127.0.0.1", "--port", str(port), *options]
    log.parent.mkdir(parents=True, exist_ok=True)
    # vLLM starts programs of its environment by name
    environment = os.environ | {"PATH": f"{Path(command).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    with log.open("wb") as output:
        server = subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    try:
        _wait(server, port, log, patience)
        yield f"http://127.0.0.1:{port}"
    finally:
        _end(server)


def _wait(server: "subprocess.Popen[bytes]", port: int, log: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        if server.poll() is not None:
            why = _reason(log.read_text(errors="replace"))
            raise UserError(f"vllm ended with {server.returncode}: {why}", where=str(log), fix="read the log")
        time.sleep(0.2)
    raise UserError(f"vllm does not answer after {patience:.0f} s", where=str(log), fix="read the log")


def _reason(printed: str) -> str:
    """The last line, or the first exception where the last one is that of the process that started the failed one."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    if not lines:
        return "it printed nothing"
    raised = [found[1] for line in lines[:-1] if (found := _RAISED.search(line))]
    return raised[0] if raised and "root cause above" in lines[-1] else lines[-1]


def _end(server: "subprocess.Popen[bytes]") -> None:
    """End the server with the processes that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if server.poll() is None:
            os.killpg(server.pid, number)
            try:
                server.wait(ENDING)
            except subprocess.TimeoutExpired:
                continue
