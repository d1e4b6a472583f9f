"""Tries in separate processes, with a time limit, what may hang or crash.

python -m llava_llama31.trainer.doctor.probe import torchvision
"""

import argparse
import importlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType


NUM_ELEMENTS = 1 << 16  # size of the summed tensor: more than one packet


@dataclass(frozen=True)
class Outcome:
    """Result of a process; `error` is None if it succeeded.

    Args:
        busy: it did not answer in time, on a machine with more work than cores; what that says of the machine.
    """

    error: str | None
    seconds: float = 0.0
    messages: tuple[str, ...] = ()
    busy: str = ""


class Probes:
    """Processes that run in parallel up to a common time limit; leaving the block kills those still running."""

    def __init__(self, commands: Sequence[Sequence[str]]):
        module = [sys.executable, "-m", __name__]
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}  # do not import from the current folder
        self.started = time.monotonic()
        self._processes = [
            subprocess.Popen(
                [*module, *command], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            for command in commands
        ]

    def __enter__(self) -> "Probes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    def outcomes(self, limit: float) -> list[Outcome]:
        """Wait for all; a process not done `limit` seconds after the start gets that as its error."""
        return [self._outcome(process, limit) for process in self._processes]

    def _outcome(self, process: "subprocess.Popen[str]", limit: float) -> Outcome:
        try:
            left = max(0.1, self.started + limit - time.monotonic())
            out, err = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            return Outcome(f"no answer in {limit:.0f} s", limit, busy=_busy())
        if process.returncode:
            lines = [line for line in err.splitlines() if line.strip()] or [f"exit code {process.returncode}"]
            return Outcome(lines[-1].strip())
        answer = json.loads(out.splitlines()[-1])
        return Outcome(None, answer["seconds"], tuple(answer["messages"]))


def _busy() -> str:
    """What is said of a machine with more work than cores; else nothing."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return f"a load of {load:.0f} on {cores} cores" if load > cores else ""


def all_reduce_commands(backend: str, num_processes: int, folder: Path, limit: float) -> list[list[str]]:
    """Commands for processes of this machine that sum a tensor; they meet in a file in `folder`."""
    shared = ["all-reduce", "--backend", backend, "--store", str(folder / backend), "--seconds", str(limit)]
    return [
        [*shared, "--world-size", str(num_processes), "--rank", str(rank), "--device", str(rank)]
        for rank in range(num_processes)
    ]


def _all_reduce(options: argparse.Namespace) -> list[str]:
    import torch
    import torch.distributed as dist

    limit = timedelta(seconds=options.seconds)
    if options.address:
        host, _, port = options.address.rpartition(":")
        client = dist.TCPStore(host, int(port), is_master=False, timeout=limit)
        store: dist.Store = dist.PrefixStore(f"{options.store}/{options.backend}", client)
    else:
        store = dist.FileStore(options.store, options.world_size)
    device = torch.device("cuda", options.device) if options.backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        options.backend, store=store, rank=options.rank, world_size=options.world_size, timeout=limit
    )
    numbers = torch.full((NUM_ELEMENTS,), float(options.rank + 1), device=device)
    dist.all_reduce(numbers)
    expected = options.world_size * (options.world_size + 1) / 2
    if not bool((numbers == expected).all()):
        raise ValueError(f"the sum is {numbers[0].item()}, not {expected}")
    dist.destroy_process_group()
    return []


def _import(options: argparse.Namespace) -> list[str]:
    """Import a module; returns the messages that it logs."""
    kept = _Messages(logging.WARNING)
    logging.getLogger().addHandler(kept)
    importlib.import_module("torch")
    importlib.import_module(options.module)
    return kept.messages


class _Messages(logging.Handler):
    def __init__(self, level: int):
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one probe, and print its seconds as JSON."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    reduce = commands.add_parser("all-reduce")
    reduce.add_argument("--backend", required=True)
    reduce.add_argument("--store", required=True, help="file, or prefix of the keys in the store at --address")
    reduce.add_argument("--address", help="HOST:PORT of a TCPStore")
    reduce.add_argument("--rank", type=int, required=True)
    reduce.add_argument("--world-size", type=int, required=True)
    reduce.add_argument("--device", type=int, required=True)
    reduce.add_argument("--seconds", type=float, required=True)
    reduce.set_defaults(run=_all_reduce)
    load = commands.add_parser("import")
    load.add_argument("module")
    load.set_defaults(run=_import)
    options = parser.parse_args(arguments)
    started = time.monotonic()
    messages = options.run(options)
    sys.stdout.write(json.dumps({"seconds": round(time.monotonic() - started, 2), "messages": messages}) + "\n")


if __name__ == "__main__":
    main()
