"""The processes of a run end together, soon and with one message, when one of them fails.

Each knows the others by a key-value store that the launcher or rank 0 keeps. A process that fails writes why; one that
is killed can't, but those on its machine see that it is gone. Without this, the others wait in a collective until the
launcher ends them, and on other machines for as long as the communication allows.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

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
from llava_llama31.trainer.redaction import LONGEST_MESSAGE, printable, redacted


_FAILED = "llava-llama31/failed"
_POLL_SECONDS = 1.0
# for a failed process to end by itself, and for a reason to come in before one's own is taken for it
_GRACE_SECONDS, _REASON_SECONDS = 10.0, 3.0
_NO_STORE = "the process that the others met by is gone"
_LOOK = "look for kill -9, a crash, or the system's out-of-memory killer (dmesg); then run again"


class Peers:
    """The processes of a run, as one of them sees them.

    Args:
        rank: of this process.
        store: where they leave word; None: there is one process only.
    """

    def __init__(self, rank: int = 0, num_processes: int = 1, store: dist.Store | None = None):
        self.rank, self.num_processes, self.store = rank, num_processes, store
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._neighbours: dict[int, int] = {}  # pids by rank, on this machine
        self._known: dict[str, Any] | None = None  # the first failure

    @classmethod
    def connect(cls, rank: int, num_processes: int) -> "Peers":
        """A connection of its own to the store that the processes met by; all of them call this."""
        if num_processes == 1:
            return cls()
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(minutes=5), wait_for_workers=False)
        peers = cls(rank, num_processes, store)
        store.set(f"llava-llama31/process/{rank}", f"{os.getpid()} {socket.gethostname()}")
        for other in range(num_processes):
            pid, host = store.get(f"llava-llama31/process/{other}").decode().split(" ", 1)
            if other != rank and host == socket.gethostname():
                peers._neighbours[other] = int(pid)
        return peers

    @contextmanager
    def together(self) -> Iterator["Peers"]:
        """Within it a failure of one process ends all.

        Raises:
            EndedElsewhere: instead of this process's exception, when another one failed first.
            ProcessLost: when it is a process that was killed.
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
        """Watch no more."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _leave(self) -> None:
        """End by consent, which is no failure for the others."""
        _ignore_launcher()
        self.close()
        with contextlib.suppress(dist.DistError):  # the store ended with the process that kept it
            self._part(60.0)

    def _part(self, seconds: float) -> None:
        """Need the others no more; rank 0, which may keep the store, stays until they have said so, or are gone."""
        assert self.store is not None
        self.store.set(self._left(self.rank), "")
        deadline, others = time.monotonic() + seconds, set(range(1, self.num_processes))
        while self.rank == 0 and others and time.monotonic() < deadline:
            time.sleep(0.02)
            others = {rank for rank in others if not self.store.check([self._left(rank)])}
            others -= {rank for rank, pid in self._neighbours.items() if not _is_alive(pid)}

    def report(self, exit_code: int, message: str) -> bool:
        """Leave word that this process fails; whether it is the first word, and so to be printed."""
        if self.store is None:
            return True
        word = {"rank": self.rank, "thread": threading.get_ident(), "exit_code": exit_code}
        word["message"] = printable(redacted(message), LONGEST_MESSAGE)  # other processes print it
        self._known = json.loads(self.store.compare_set(_FAILED, "", json.dumps(word)).decode())
        return self._known == word

    def _join_failure(self, error: BaseException) -> None:
        """Make an exception of this process known, unless it follows from a failure elsewhere."""
        _ignore_launcher()
        lost, first = None, False
        try:
            lost = self._awaited_reason() if isinstance(error, (RuntimeError, Interrupted)) else None
            first = self.report(_exit_code(lost or error), str(lost or error))
            self._part(_GRACE_SECONDS)
        except dist.DistError:  # the store ended with the process that kept it
            if self._known is None:
                raise ProcessLost(_NO_STORE, fix=_LOOK) from error
        if not first:
            failure = self._failure()
            raise EndedElsewhere(failure["exit_code"], self._untold(failure)) from error
        if lost is not None:
            raise lost from error

    def _awaited_reason(self) -> ProcessLost | None:
        """Wait a moment for the failure that an error of this process may follow from, or for a process to be gone.

        From a process that is gone follow a collective's RuntimeError, like many another, and the launcher's SIGTERM.
        """
        assert self.store is not None
        deadline = time.monotonic() + _REASON_SECONDS
        while time.monotonic() < deadline and not self.store.check([_FAILED]):
            time.sleep(0.1)
            if lost := self._lost():
                return lost
        return None

    def _watch(self) -> None:
        """End this process when another one has failed, or if it can't end by itself."""
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
        except dist.DistError:  # the store ended with the process that kept it
            if self._stopped.is_set():
                return
            if self._known is None:
                _say(str(ProcessLost(_NO_STORE, fix=_LOOK)))
                end_process(EXIT_LOST)
        failure = self._failure()
        if failure["exit_code"] == EXIT_HANG:
            dump_stacks()  # a process that waits for the one that is stuck may be the first to say so
        if not self._stopped.wait(_GRACE_SECONDS):
            if untold := self._untold(failure):
                _say(untold)
            end_process(failure["exit_code"])

    def _failure(self) -> dict[str, Any]:
        """The first one, which is also known when the store is gone."""
        assert self.store is not None
        if self._known is None:
            self._known = json.loads(self.store.get(_FAILED).decode())
        return self._known

    def _untold(self, failure: dict) -> str:
        """Why another machine's process failed, for the first process of this one to say; else nothing."""
        if failure["rank"] in {self.rank, *self._neighbours} or min(self._neighbours, default=self.rank) < self.rank:
            return ""
        return f"rank {failure['rank']}, on another machine: {failure['message']}"

    def _lost(self) -> ProcessLost | None:
        """A process of this machine that is gone without a word."""
        assert self.store is not None
        for rank, pid in self._neighbours.items():
            if not _is_alive(pid) and not self.store.check([self._left(rank)]) and not self.store.check([_FAILED]):
                return ProcessLost(f"the process of rank {rank} (pid {pid}) is gone without a word", fix=_LOOK)
        return None

    @staticmethod
    def _left(rank: int) -> str:
        return f"llava-llama31/left/{rank}"


def _say(message: str) -> None:
    """For the thread that watches; the main one raises."""
    print(f"error: {message}", file=sys.stderr, flush=True)  # noqa: T201


def _ignore_launcher() -> None:
    """It sends SIGTERM to those that are left when one has ended."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, Interrupted):
        return EXIT_INTERRUPTED
    return EXIT_KEYBOARD if isinstance(error, KeyboardInterrupt) else EXIT_FAULT


def _is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
