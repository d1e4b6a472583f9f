"""When one process of a run fails, all end quickly, with a single message.

The processes meet in a key-value store that the launcher or rank 0 keeps. A failing process writes its reason there; a
killed one can't, but the processes on its machine notice that it is gone. Without this, the others would wait in a
collective until the launcher ends them, or on other machines until the collective times out.

They meet there before the process group is made: its own rendezvous waits for as long as a collective may take, and no
signal reaches a process that waits in it.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils.environment import get_cpu_distributed_information

from llava_llama31.trainer.distributed.engine import COLLECTIVE_TIMEOUT
from llava_llama31.trainer.distributed.rank import is_launched
from llava_llama31.trainer.errors import (
    EXIT_FAULT,
    EXIT_HANG,
    EXIT_INTERRUPTED,
    EXIT_KEYBOARD,
    EXIT_LOST,
    EndedElsewhere,
    Interrupted,
    ProcessLost,
    UserError,
)
from llava_llama31.trainer.fault_tolerance.watchdog import dump_stacks, end_process
from llava_llama31.trainer.redaction import LONGEST_MESSAGE, printable, redacted, say


_FAILED = "llava-llama31/failed"
_POLL_SECONDS = 1.0
# between two looks for what rank 0 does meanwhile
_LOOK_SECONDS = 0.2
# how long a failed process may take to end by itself; how long to wait for another rank's reason before reporting ours
_GRACE_SECONDS, _REASON_SECONDS = 5.0, 3.0
# how long processes wait for each other at the start, as torch's default; when to say for whom
_MEETING_SECONDS, _ANNOUNCE_SECONDS = 1800.0, 60.0
_LOOK = "look for kill -9, a crash, or the system's out-of-memory killer (dmesg); then run again"


class Peers:
    """One process's view of all processes of a run.

    Args:
        rank: of this process.
        num_processes: of the run.
        store: where processes leave messages; None: there is only one process.
    """

    def __init__(self, rank: int = 0, num_processes: int = 1, store: dist.Store | None = None):
        self.rank, self.num_processes, self.store = rank, num_processes, store
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._neighbours: dict[int, int] = {}  # pids by rank, on this machine
        self._known: dict[str, Any] | None = None  # the first failure

    @classmethod
    def connect(cls, rank: int, num_processes: int, *, seconds: float = _MEETING_SECONDS) -> "Peers":
        """Open a connection to the store at MASTER_ADDR:MASTER_PORT, which rank 0 opens unless the launcher has.

        Raises:
            UserError: nothing answers there within `seconds`, or rank 0 cannot listen there.
        """
        if num_processes == 1:
            return cls()
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            fix = (
                "start it with `accelerate launch` or torchrun, or set the address and a free port of rank 0's machine"
            )
            raise UserError("not set, and the processes could not meet", where=" and ".join(missing), fix=fix)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if not keeps:
            _await_store(address, port, seconds)
        try:
            # multi_tenant: the process group's own rendezvous shares it
            store = dist.TCPStore(
                address, port, None, keeps, timedelta(minutes=5), wait_for_workers=False, multi_tenant=True
            )
        except dist.DistNetworkError as error:
            fix = (
                "another program may use the port: choose a free one, as with `accelerate launch --main_process_port`"
            )
            raise UserError(str(error).splitlines()[0], where=f"{address}:{port}", fix=fix) from error
        return cls(rank, num_processes, store)

    def meet(self, *, seconds: float = _MEETING_SECONDS) -> None:
        """Wait until all processes are here; call it in `together`.

        Raises:
            EndedElsewhere: a process has failed meanwhile.
            UserError: some have not come within `seconds`.
        """
        if self.store is None:
            return
        here = _machine()
        self.store.set(_process(self.rank), f"{os.getpid()} {here}")
        others = [rank for rank in range(self.num_processes) if rank != self.rank]

        def missing() -> list[int]:
            assert self.store is not None
            if self.store.check([_FAILED]):
                failure = self._failure()
                raise EndedElsewhere(failure["exit_code"], self._untold(failure))
            if self.store.check([_process(rank) for rank in others]):
                return []
            return [rank for rank in others if not self.store.check([_process(rank)])]

        absent = _wait(lambda: _ranks(missing()), f"at {_meeting_place()}", seconds, says=self.rank == 0)
        if absent:
            fix = "look at their machines' output, then run again"
            raise UserError(f"{absent} did not come within {seconds:,.0f} s", where=_meeting_place(), fix=fix)
        places = {rank: self.store.get(_process(rank)).decode().split(" ", 1) for rank in others}
        self._neighbours = {rank: int(pid) for rank, (pid, there) in places.items() if there == here}

    def await_main(self, what: str) -> None:
        """Wait until rank 0 has come here too, however long that takes.

        The others look at the store now and then: in a collective each would keep its device and a core busy.

        Args:
            what: rank 0 has done; once in a launch.

        Raises:
            EndedElsewhere: a process has failed meanwhile.
        """
        if self.store is None:
            return
        done = f"llava-llama31/done/{what}"
        if self.rank == 0:
            self.store.set(done, "")
        while not self.store.check([done]):
            if self.store.check([_FAILED]):
                failure = self._failure()
                raise EndedElsewhere(failure["exit_code"], self._untold(failure))
            time.sleep(_LOOK_SECONDS)

    @contextmanager
    def together(self) -> Iterator["Peers"]:
        """Context in which a failure of one process ends all.

        Raises:
            EndedElsewhere: instead of this process's exception, when another one failed first.
            ProcessLost: when that process was killed.
        """
        if self.store is None:
            yield self
            return
        self._thread.start()
        try:
            yield self
        except (Exception, Interrupted, KeyboardInterrupt) as error:
            if isinstance(error, Interrupted) and error.agreed:
                self._leave()
            else:
                self._join_failure(error)
            raise
        self._leave()

    def close(self) -> None:
        """Stop watching."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _leave(self) -> None:
        """Leave normally, without being reported as lost."""
        _ignore_launcher()
        self.close()
        with contextlib.suppress(dist.DistError):  # the store ended with its process
            self._part(60.0)

    def _part(self, seconds: float) -> None:
        """Sign off; rank 0, which may keep the store, waits until the others have signed off or are gone."""
        assert self.store is not None
        self.store.set(self._left(self.rank), "")
        deadline, others = time.monotonic() + seconds, set(range(1, self.num_processes))
        while self.rank == 0 and others and time.monotonic() < deadline:
            time.sleep(0.02)
            others = {rank for rank in others if not self.store.check([self._left(rank)])}
            others -= {rank for rank, pid in self._neighbours.items() if not _is_alive(pid)}

    def report(self, exit_code: int, message: str) -> bool:
        """Report that this process fails; returns whether it is the first to report, and so prints the message."""
        if self.store is None:
            return True
        word: dict[str, int | str] = {"rank": self.rank, "thread": threading.get_ident(), "exit_code": exit_code}
        word["message"] = printable(redacted(message), LONGEST_MESSAGE)  # other processes print it
        self._known = json.loads(self.store.compare_set(_FAILED, "", json.dumps(word)).decode())
        return self._known == word

    def _join_failure(self, error: BaseException) -> None:
        """Report this process's exception, unless it was caused by a failure elsewhere."""
        _ignore_launcher()
        lost, first = None, False
        try:
            if self._known is None:  # else the store may be gone, and a call would print its whole stack
                lost = self._awaited_reason() if isinstance(error, (RuntimeError, Interrupted)) else None
                first = self.report(_exit_code(lost or error), str(lost or error))
            self._part(_GRACE_SECONDS)
        except dist.DistError:  # the store ended with its process
            if self._known is None:
                raise self._lost_with_the_store() from error
        if not first:
            failure = self._failure()
            raise EndedElsewhere(failure["exit_code"], self._untold(failure)) from error
        if lost is not None:
            raise lost from error

    def _awaited_reason(self) -> ProcessLost | None:
        """Wait briefly for a failure elsewhere that may have caused this process's error, or for a lost process.

        A lost process causes a plain RuntimeError in a collective, or a SIGTERM from the launcher.
        """
        assert self.store is not None
        deadline = time.monotonic() + _REASON_SECONDS
        while time.monotonic() < deadline and not self.store.check([_FAILED]):
            time.sleep(0.1)
            if lost := self._lost():
                return lost
        return None

    def _watch(self) -> None:
        """End this process when another one has failed and this one does not end by itself."""
        assert self.store is not None
        try:
            while not self._stopped.wait(_POLL_SECONDS):
                if self.store.check([_FAILED]):
                    break
                if (lost := self._lost()) is not None:
                    if self.report(EXIT_LOST, str(lost)):
                        _say(str(lost))
                    break
            else:
                return
        except dist.DistError:  # the store ended with its process
            if self._stopped.is_set():
                return
            if self._known is None:
                _say(str(self._lost_with_the_store()))
                end_process(EXIT_LOST)
        failure = self._failure()
        if failure["exit_code"] == EXIT_HANG:
            dump_stacks()  # the first to report a hang may be a process that waits for the stuck one
        ours = (failure["rank"], failure["thread"]) == (self.rank, threading.main_thread().ident)
        # the main thread, which parts for as long from those that are stuck, must print what it has reported
        if not self._stopped.wait(_GRACE_SECONDS * (1 + ours)):
            if untold := failure["message"] if ours else self._untold(failure):
                _say(untold)
            end_process(failure["exit_code"])

    def _failure(self) -> dict[str, Any]:
        """The first failure; still known after the store is gone."""
        assert self.store is not None
        if self._known is None:
            self._known = json.loads(self.store.get(_FAILED).decode())
        return self._known

    def _untold(self, failure: dict) -> str:
        """Why a process on another machine failed, if this process is the first on its machine; else empty."""
        if failure["rank"] in {self.rank, *self._neighbours} or min(self._neighbours, default=self.rank) < self.rank:
            return ""
        return f"rank {failure['rank']}, on another machine: {failure['message']}"

    def _lost(self) -> ProcessLost | None:
        """A process of this machine that disappeared without reporting."""
        assert self.store is not None
        for rank, pid in self._neighbours.items():
            if not _is_alive(pid) and not self.store.check([self._left(rank)]) and not self.store.check([_FAILED]):
                return _disappeared(rank, pid)
        return None

    def _lost_with_the_store(self) -> ProcessLost:
        """Rank 0 of this machine if it has disappeared; its connections close a while before the process is gone."""
        deadline = time.monotonic() + _REASON_SECONDS
        while (pid := self._neighbours.get(0)) is not None and time.monotonic() < deadline:
            if not _is_alive(pid):
                return _disappeared(0, pid)
            time.sleep(0.02)
        return ProcessLost("the process that keeps the shared store is gone", fix=_LOOK)

    @staticmethod
    def _left(rank: int) -> str:
        return f"llava-llama31/left/{rank}"


@contextmanager
def launched_processes(*, cpu: bool) -> Iterator[tuple[PartialState, Peers]]:
    """Context of the processes of this launch, once all are here: when one fails in it, all end.

    Args:
        cpu: train or evaluate on the CPU, whatever devices there are.

    Raises:
        EndedElsewhere, ProcessLost: see `Peers.together`.
        UserError: the processes do not meet, or have no place on their machine.
    """
    launched = get_cpu_distributed_information()
    # accelerate reads MPI's variables on CPUs only
    num_processes = launched.world_size
    if num_processes > 1 and not cpu:
        _check_place(num_processes, launched.local_rank)
    if 1 < num_processes == launched.local_world_size:  # MPI names no place; accelerate's for one machine
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
    peers = Peers.connect(launched.rank, num_processes)
    try:
        with peers.together():  # at once: a signal from here on does not make this process lost to the others
            peers.meet()
            yield PartialState(cpu=cpu, timeout=COLLECTIVE_TIMEOUT), peers
    finally:
        # threads of the process group that outlive the interpreter abort it: another exit code, and a core dump
        if dist.is_initialized():
            PartialState().destroy_process_group()
        peers.close()


def _check_place(num_processes: int, local_rank: int) -> None:
    """Check that this process has a device of its own.

    Raises:
        UserError: it would work by itself, or share a device, or wait at a barrier on one that it doesn't see.
    """
    if not is_launched(cpu=False):
        fix = "start it on every machine with `accelerate launch` or torchrun"
        raise UserError(f"a launcher speaks of {num_processes} processes, but LOCAL_RANK is not set", fix=fix)
    if local_rank >= (number := torch.accelerator.device_count()):
        fix = "start one process for each GPU, and let each see all GPUs of its machine"
        raise UserError(f"LOCAL_RANK is {local_rank}, but this process sees {number} GPU(s)", fix=fix)


def _await_store(address: str, port: int, seconds: float) -> None:
    """Wait until something listens there: torch's own wait is deaf to signals and prints its stack at every try.

    Raises:
        UserError: nothing did.
    """
    why = ""

    def silent() -> str:
        nonlocal why
        try:
            socket.create_connection((address, port), timeout=5.0).close()
        except OSError as error:
            why = error.strerror or str(error)
            return "rank 0"
        return ""

    if _wait(silent, f"at {address}:{port}", seconds, says=os.environ.get("LOCAL_RANK", "0") == "0"):
        fix = "look at rank 0's output; check the address, the port and the firewall between the machines"
        raise UserError(f"rank 0 did not answer within {seconds:,.0f} s: {why}", where=f"{address}:{port}", fix=fix)


def _wait(absent: Callable[[], str], where: str, seconds: float, *, says: bool) -> str:
    """Wait until nobody is absent, and return who still is. A signal is handled between two looks."""
    began, who = time.monotonic(), absent()
    while who and (waited := time.monotonic() - began) < seconds:
        if says and waited > _ANNOUNCE_SECONDS:
            say(f"waiting for {who} {where}")
            says = False
        time.sleep(0.02)
        who = absent()
    return who


def _ranks(ranks: list[int]) -> str:
    """rank 3, or: ranks 1, 2, ... (40 in all)."""
    if not ranks:
        return ""
    shown, many = ", ".join(map(str, ranks[:8])), len(ranks) > 8
    return f"rank{'s' * (len(ranks) > 1)} {shown}{f', ... ({len(ranks)} in all)' * many}"


def _process(rank: int) -> str:
    return f"llava-llama31/process/{rank}"


def _meeting_place() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _machine() -> str:
    """Where a pid means the same process: containers may share a host name and have pids of their own."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _say(message: str) -> None:
    """Print a message from the watching thread; the main thread raises instead."""
    say(f"error: {message}")


def _ignore_launcher() -> None:
    """Ignore the launcher's SIGTERM to the remaining processes after one has ended."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, Interrupted):
        return EXIT_INTERRUPTED
    return EXIT_KEYBOARD if isinstance(error, KeyboardInterrupt) else EXIT_FAULT


def _disappeared(rank: int, pid: int) -> ProcessLost:
    return ProcessLost(f"the process of rank {rank} (pid {pid}) disappeared without an error", fix=_LOOK)


def _is_alive(pid: int) -> bool:
    """Whether a process is running; a zombie is not."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
