"""All processes of a launch meet, compare their environments and sum a tensor; rank 0 reports who did not."""

import json
import os
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch.distributed import TCPStore

from llava_llama31.trainer.doctor.checks import check_agreement, check_ranks
from llava_llama31.trainer.doctor.findings import DoctorFinding
from llava_llama31.trainer.doctor.probe import Probes
from llava_llama31.trainer.errors import UserError


_PACKAGES = ("llava-llama31", "torch", "transformers", "accelerate")


@dataclass(frozen=True)
class Place:
    """A process's place in a launch, from the variables that every launcher sets."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int

    @classmethod
    def of_environment(cls) -> "Place":
        """Read the launcher's variables.

        Raises:
            UserError: a variable is missing or not a number.
        """
        try:
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            local_rank = int(os.environ["LOCAL_RANK"])
            local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
            return cls(
                rank,
                world_size,
                local_rank,
                local_world_size,
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
            )
        except (KeyError, ValueError) as error:
            raise UserError(
                f"RANK is set, but other variables of a launch are missing or wrong: {error}",
                fix="start it with a launcher, or unset RANK",
            ) from None


def survey(
    place: Place, own: Sequence[DoctorFinding], output: Path, cache: Path, limit: float
) -> list[DoctorFinding] | None:
    """Meet the other ranks; returns the findings of all on rank 0, None on the others.

    Args:
        own: findings of this process's machine; empty except on each machine's first process.
        output: folder of the run.
        cache: folder of the findings about data.
        limit: seconds to wait for the others, each time.

    Raises:
        UserError: the meeting point doesn't answer.
    """
    meeting = _Meeting(place, limit)
    if place.rank:
        _answer(meeting, own)
        return None
    markers = [_mark(folder) for folder in (output, cache)]
    try:
        meeting.tell("markers", [str(marker) if marker else None for marker in markers])
        _introduce(meeting, own)
        reports = meeting.collect("here", range(place.world_size))
    finally:
        for marker in filter(None, markers):
            marker.unlink(missing_ok=True)
    complete = len(reports) == place.world_size
    backends = ["gloo", "nccl"] if all(report["gpu"] for report in reports.values()) else ["gloo"]
    meeting.tell("backends", backends if complete else [])
    outcomes = {}
    for backend in backends if complete else []:
        _sum(meeting, backend)
        outcomes[backend] = meeting.collect(backend, reports)
    meeting.collect("left", [rank for rank in reports if rank])  # the store may end with this process
    hosts = {rank: report["host"] for rank, report in reports.items()}
    found = [replace(finding, host=meeting.host) for finding in own]
    for rank, report in sorted(reports.items()):
        found += [DoctorFinding(**finding) for finding in report["findings"] if rank and finding["level"] != "ok"]
    found += check_ranks(place.world_size, place.local_world_size, hosts, outcomes, meeting.address)
    versions, sees_output, sees_cache = (
        {rank: report[key] for rank, report in reports.items()} for key in ("versions", "sees_output", "sees_cache")
    )
    return [*found, *check_agreement(versions, sees_output, sees_cache, hosts, output)]


def _answer(meeting: "_Meeting", own: Sequence[DoctorFinding]) -> None:
    """Rank 0's counterpart on the other ranks."""
    _introduce(meeting, own)
    for backend in meeting.ask("backends"):
        _sum(meeting, backend)
    meeting.tell(f"left/{meeting.place.rank}", True)


def _mark(folder: Path) -> Path | None:
    """Create an empty file in a folder or its nearest existing parent; None if that fails."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    marker = there / f".doctor-{uuid4().hex}"
    try:
        marker.touch()
    except OSError:  # the folder's own check reports it
        return None
    return marker


def _introduce(meeting: "_Meeting", own: Sequence[DoctorFinding]) -> None:
    sees = [marker is None or Path(marker).is_file() for marker in meeting.ask("markers")]
    report = {
        "host": meeting.host,
        "versions": {package: version(package) for package in _PACKAGES},
        "gpu": torch.cuda.device_count() > meeting.place.local_rank,
        "sees_output": sees[0],
        "sees_cache": sees[1],
        "findings": [asdict(replace(finding, host=meeting.host)) for finding in own],
    }
    meeting.tell(f"here/{meeting.place.rank}", report)


def _sum(meeting: "_Meeting", backend: str) -> None:
    place = meeting.place
    numbers = {"--rank": place.rank, "--world-size": place.world_size, "--device": place.local_rank}
    command = ["all-reduce", "--backend", backend, "--store", "doctor", "--address", meeting.address]
    command += [str(part) for pair in numbers.items() for part in pair] + ["--seconds", str(meeting.limit)]
    with Probes([command]) as probes:
        meeting.tell(f"{backend}/{place.rank}", probes.outcomes(meeting.limit)[0].error)


class _Meeting:
    """Messages between ranks in the launch's store."""

    def __init__(self, place: Place, limit: float):
        self.place, self.limit, self.host = place, limit, socket.gethostname()
        self.address = f"{place.address}:{place.port}"
        # torchrun's agent may keep the store already
        keeps = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            self._store = TCPStore(
                place.address,
                place.port,
                is_master=keeps,
                timeout=timedelta(seconds=2 * limit),  # rank 0 may wait for others before it answers
                wait_for_workers=False,
            )
        except RuntimeError as error:
            raise UserError(
                f"rank {place.rank} on {self.host} can't meet the others at {self.address}: {_first(error)}",
                fix="check that rank 0 has started, that its name resolves, and that no firewall blocks it",
            ) from None

    def tell(self, name: str, value: object) -> None:
        self._store.set(f"doctor/{name}", json.dumps(value))

    def ask(self, name: str) -> Any:
        """Wait for an answer.

        Raises:
            UserError: none came in time.
        """
        try:
            return json.loads(self._store.get(f"doctor/{name}"))
        except RuntimeError as error:
            raise UserError(
                f"rank {self.place.rank} on {self.host} got no answer from rank 0: {_first(error)}",
                fix="see what rank 0 says",
            ) from None

    def collect(self, name: str, ranks: Iterable[int]) -> dict[int, Any]:
        """The ranks' answers by the end of the time limit."""
        end, answers = time.monotonic() + self.limit, {}
        missing = set(ranks)
        while missing and time.monotonic() < end:
            for rank in sorted(missing):
                if self._store.check([f"doctor/{name}/{rank}"]):
                    answers[rank] = self.ask(f"{name}/{rank}")
            missing -= answers.keys()
            time.sleep(0.05)
        return answers


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0]
