"""Ends a process that has hung, with the stacks of all its threads; names a data worker that is stuck or gone."""

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

from llava_llama31.trainer.checkpoint.background import wait_for_background
from llava_llama31.trainer.distributed.rank import rank
from llava_llama31.trainer.errors import Hang, ProcessLost, UserError
from llava_llama31.trainer.redaction import say


# time for a data worker to write its stack before the next one writes its own
_TURN_SECONDS = 0.3
# exit codes of a worker that is not lost; 255: its fork server is gone, and it may run without it
_NORMAL = (0, 255)
# longest wait for a commit; a launcher may end this process before
_COMMIT_SECONDS = 120.0
# time for other processes to read why this one ends
_GRACE_SECONDS = 2.0


class WorkerContext(ForkServerContext):
    """Starts data workers by the fork server and keeps hold of them.

    `multiprocessing.active_children()` forgets a process that has ended, so a periodic look misses a
    worker that lived only between two looks.
    """

    def __init__(self) -> None:
        self.workers: set[ForkServerProcess] = set()

    def Process(self, *args: Any, **kwargs: Any) -> ForkServerProcess:  # type: ignore[override]
        worker = ForkServerProcess(*args, **kwargs)
        self.workers.add(worker)
        return worker


class Watchdog:
    """Watches that the process makes progress and that its data workers are alive.

    Data workers are children of the fork server. torch is only notified of its own children, so it would wait for a
    dead worker as long as for a slow one.

    Args:
        seconds: longest allowed time without a beat.
        where: prefix of the message, e.g. the stage.
        report: called with exit code and message before the process ends; returns whether to print the message.
    """

    def __init__(self, seconds: float, where: str, report: Callable[[int, str], bool]):
        self.seconds, self.where, self.report = seconds, where, report
        self._since, self._doing = time.monotonic(), "starting"
        self._stopped = threading.Event()
        self.worker_context = WorkerContext()

    def beat(self, doing: str) -> None:
        """Record progress; `doing` begins now."""
        self._since, self._doing = time.monotonic(), doing

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context in which the process is watched."""
        self.beat("starting")
        self._stopped.clear()
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(min(5.0, self.seconds / 4)):
            if time.monotonic() - self._since > self.seconds:
                what = f"rank {rank()} has made no progress for {self.seconds:g} s; it was {self._doing}"
                fix = f"see the stacks below, or raise {self.where}.step_timeout"
                self._end(Hang(what, where=self.where, fix=fix))
            ended = self._ended_workers()
            # not while this process ends: it stops the watch and kills its workers itself; and only after the main
            # thread has read the exit codes of those that it has ended, for a code can be read once
            if ended and not self._stopped.wait(1.0):
                for worker in ended:
                    if worker.exitcode not in _NORMAL:
                        self._end(self._lost(worker))

    def _ended_workers(self) -> list[ForkServerProcess]:
        """Those that have ended since the last look."""
        workers = self.worker_context.workers
        ended = [worker for worker in list(workers) if _has_ended(worker)]
        workers.difference_update(ended)
        return ended

    def _lost(self, worker: ForkServerProcess) -> ProcessLost:
        code = worker.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        what = f"data worker {worker.pid} of rank {os.environ.get('RANK', '0')} {how}"
        fix = f"if the machine ran out of memory, lower {self.where}.dataloader_workers"
        return ProcessLost(what, where=self.where, fix=fix)

    def _end(self, error: Hang | ProcessLost) -> None:
        if self.report(error.exit_code, str(error)):
            say(f"error: {error}")
        if isinstance(error, Hang):
            dump_stacks()
        else:
            time.sleep(_GRACE_SECONDS)
        end_process(error.exit_code)


def _has_ended(worker: ForkServerProcess) -> bool:
    try:
        return bool(connection.wait([worker.sentinel], timeout=0))
    except ValueError:  # it is being started
        return False


def dump_stacks() -> None:
    """Write the stacks of all threads of this process and of its data workers to stderr."""
    say(f"stacks of rank {rank()}, pid {os.getpid()}:")
    faulthandler.dump_traceback(file=2, all_threads=True)
    for worker in multiprocessing.active_children():
        if worker.pid is not None:
            os.kill(worker.pid, signal.SIGUSR2)
            time.sleep(_TURN_SECONDS)
    time.sleep(_GRACE_SECONDS)


def end_process(exit_code: int) -> None:
    """End together with the data workers, which might never end by themselves, but after a checkpoint's commit."""
    kill_workers()
    wait_for_background(_COMMIT_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def kill_workers() -> None:
    """Send SIGKILL to this process's data workers: they ignore SIGTERM, which reaches the whole process group."""
    for worker in multiprocessing.active_children():
        worker.kill()


def start_fork_server(modules: Sequence[str]) -> None:
    """Start the fork server of data workers, ignoring the signals to the process group that would end it.

    Args:
        modules: imported there once, in parallel to this process; a worker is then a fork that starts in milliseconds
            and shares their memory, where it would import torch and Transformers for every epoch and evaluation.
    """
    multiprocessing.set_forkserver_preload(["__main__", *modules])
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
    former = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        forkserver.ensure_running()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def set_up_worker(worker_id: int) -> None:
    """Runs in each data worker: ignores signals, dumps its stack on SIGUSR2."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)


def loader_failure(error: Exception, worker: int, records: list[str], where: str, timeout: float) -> UserError:
    """Error for a data worker that returned no micro-batch; its stack goes to stderr if it is still alive.

    Args:
        error: torch's RuntimeError, which covers every cause, or a connection's error.
        worker: number of the worker whose turn it was.
        records: ids of the micro-batch.
    """
    asked = f"data worker {worker} was asked for records {', '.join(records)}"
    if "timed out" not in str(error):
        return ProcessLost(
            f"{asked} and is gone: {' '.join(str(error).split()) or type(error).__name__}",
            where=where,
            fix=f"if the machine ran out of memory, lower {where}.dataloader_workers",
        )
    dump_stacks()
    kill_workers()
    return Hang(
        f"{asked} and returned nothing for {timeout:g} s",
        where=where,
        fix=f"see its stack above; look at these records and at the disk, or raise {where}.loader_timeout",
    )
