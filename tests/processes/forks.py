"""The tests' side of zygote.py: commands of ours in forks of a process that has imported everything."""

import fcntl
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env


ROOT = Path(__file__).parents[2]


def launchers_variables(options: str, processes: int = 2) -> dict[str, str]:
    """What `accelerate launch` with these options adds to the environment, by accelerate's own functions."""
    fixed = f"--num_machines 1 --num_processes {processes} --main_process_port 0 --dynamo_backend no x.py"
    arguments = launch_command_parser().parse_args([*options.split(), *fixed.split()])
    arguments, defaults, mixed_precision_from_file = _validate_launch_command(arguments)
    if arguments.use_deepspeed:
        fields = list(defaults.deepspeed_config) + ["mixed_precision"] * mixed_precision_from_file
        arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)
        _, environment = prepare_deepspeed_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments)
    # its own, even where this process has them already, and what else it changes
    added = {
        name: value
        for name, value in environment.items()
        if name.startswith(("ACCELERATE_", "FSDP_")) or os.environ.get(name) != value
    }
    return {name: value for name, value in added.items() if name != "PYTHONPATH"}


class Job:
    """A command in its ranks, to be used like a subprocess.Popen of a launcher.

    No launcher ends the second rank when the first one fails: what it does, it does by itself.
    """

    def __init__(self, log: Path, processes: int):
        self.log, self.processes = log, processes
        self._result: dict[str, Any] | None = None

    def _read(self, suffix: str) -> Any:
        with suppress(FileNotFoundError):
            return json.loads(Path(f"{self.log}.{suffix}").read_text())

    @property
    def pids(self) -> list[int]:
        while (pids := self._read("pids")) is None:
            time.sleep(0.005)
        return pids

    @property
    def codes(self) -> list[int]:
        """Of all ranks, as subprocess gives them."""
        return self.wait()["codes"]

    @property
    def returncode(self) -> int:
        """The first code that is not 0."""
        return next((code for code in self.codes if code), 0)

    def _has_ended(self) -> bool:
        self._result = self._result or self._read("result")
        return self._result is not None

    def poll(self) -> int | None:
        return self.returncode if self._has_ended() else None

    def output(self) -> str:
        """What the ranks have said by now, rank by rank."""
        files = [Path(f"{self.log}{rank}") for rank in range(self.processes)]
        return "".join(file.read_text(errors="replace") for file in files if file.is_file())

    def wait(self, timeout: float = 200) -> dict[str, Any]:
        """How it ended; what takes longer is killed."""
        deadline = time.monotonic() + timeout
        while not self._has_ended():
            if time.monotonic() > deadline:
                self.kill()
                raise subprocess.TimeoutExpired("zygote", timeout, self.output())
            time.sleep(0.01)
        assert self._result is not None
        return self._result

    def communicate(self, timeout: float = 200) -> tuple[str, None]:
        self.wait(timeout)
        return self.output(), None

    def send_signal(self, number: int) -> None:
        """To every rank, not to its data workers."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """kill -9 of all ranks, which lead sessions of their own, and of what they started."""
        family = set()
        for pid in self.pids:
            with suppress(psutil.NoSuchProcess):
                family |= {psutil.Process(pid), *psutil.Process(pid).children(recursive=True)}
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        while self._read("result") is None:
            time.sleep(0.01)


class Forks:
    """One zygote, which all workers of a test run share.

    Args:
        folder: of this worker, for logs.
        shared: of all workers.
    """

    def __init__(self, folder: Path, shared: Path):
        self._folder, self._number = folder, 0
        self._errors = shared / "zygote.log"
        with (shared / "zygote.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._connection = socket.socket(socket.AF_UNIX)
            self.is_new = not self._is_connected(shared / "zygote.place")
        self._ready = False

    def _is_connected(self, file: Path) -> bool:
        """Connect to the zygote that another worker started; start one, and return False, where there is none."""
        with suppress(OSError):
            self._connection.connect(file.read_text())
            return True
        place = Path(tempfile.mkdtemp(prefix="zygote-"), "socket")  # whose path may have a hundred characters
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "DS_ACCELERATOR": "cpu"}
        environment["HIDDEN_PACKAGES"] = ""
        command = [sys.executable, str(Path(__file__).with_name("zygote.py")), str(place)]
        with self._errors.open("w") as errors:
            zygote = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )
        while True:
            with suppress(OSError):
                self._connection.connect(str(place))
                break
            assert zygote.poll() is None, self._errors.read_text()
            time.sleep(0.01)
        file.write_text(str(place))
        return False

    def start(
        self,
        *arguments: str | Path,
        processes: int = 1,
        launcher: str = "",
        variables: Mapping[str, str] | None = None,
        **case: Any,
    ) -> Job:
        """Start a command in `processes` ranks.

        Args:
            launcher: options of the `accelerate launch` that would start them, under the engines of cpu_engines.py.
            variables: more of the environment, which otherwise is that of this process.
            case: see zygote.py.
        """
        if not self._ready:  # it is, as soon as it has imported everything
            self._ready = self._connection.recv(16) == b"ready\n"
            assert self._ready, self._errors.read_text()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "DS_ACCELERATOR": "cpu"}
        if launcher:
            environment |= launchers_variables(launcher, processes)
            case["engines"] = True
        if os.environ.get("HF_HUB_OFFLINE") == "0":  # hub_server's
            case["hub"] = os.environ["HF_ENDPOINT"]
        self._number += 1
        log = self._folder / str(self._number)
        case |= {"arguments": [str(argument) for argument in arguments], "processes": processes, "log": str(log)}
        case |= {"environment": {**environment, **(variables or {})}, "cwd": str(case.get("cwd", ROOT))}
        self._connection.sendall(json.dumps(case).encode() + b"\n")
        return Job(log, processes)

    def close(self) -> None:
        """The zygote ends with its last client."""
        self._connection.close()
