"""Starts commands of ours quickly: everything is imported once, and every process of a case is a fork of that.

python tests/processes/zygote.py SOCKET, which takes one case per line, as JSON, from every client that connects, and
ends with the last of them. The zygote trains nothing itself, and so has no threads when it forks. `forks.py` is the
tests' side.

A case has:
    arguments: of the command line; or of script, a Python file.
    processes: how many ranks.
    log: where ranks write: LOG0, LOG1, ...; LOG.pids and LOG.result hold their pids and how they ended.
    environment: all variables of the ranks; cwd: their folder.
    engines: run under cpu_engines.py. fault: what faults.py plants. hub: endpoint of the tests' own Hub.
    after, signal: seconds until the ranks get a signal, SIGKILL unless named; kill_at, folder: see count_operations.
    steps: see count_steps.
    whole_finish: with reference answers and a report at its end, see brief_finish.py.
"""

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import runpy
import select
import selectors
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any


WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.move")
DEADLINE_S = 300.0


def count_operations(case: dict[str, Any]) -> None:
    """Kill this process before the `kill_at`th operation that changes a file of the run; write their number down."""
    folder, number = case["folder"], 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal number
        if event != "open" and event not in CHANGES:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING):
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        # what rmtree removes has a name relative to an open folder
        if not path.startswith(folder) and not (event in ("os.remove", "os.rmdir") and not os.path.isabs(path)):
            return
        number += 1
        if number == case.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        os.pwrite(operations, b"%d" % number, 0)

    operations = os.open(case["log"] + ".operations", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.addaudithook(hook)


def count_steps(file: str) -> None:
    """A byte in `file` for every step that was begun."""
    from llava_llama31.trainer.training.llava_trainer import LlavaTrainer

    steps, original = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), LlavaTrainer.get_batch_samples

    def counted(self, *args, **kwargs):
        os.write(steps, b"x")
        return original(self, *args, **kwargs)

    LlavaTrainer.get_batch_samples = counted


def become_a_rank(case: dict[str, Any], rank: int, port: int) -> None:
    """Streams, session and variables as a launcher gives them."""
    gc.set_threshold(700, 10, 10)  # as Python starts, in place of quick_start
    os.setsid()
    log = os.open(f"{case['log']}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(case["environment"])
    os.chdir(case["cwd"])
    if case["processes"] > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "MASTER_PORT": port}
        names |= {"WORLD_SIZE": case["processes"], "LOCAL_WORLD_SIZE": case["processes"]}
        os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")


def run_script(case: dict[str, Any]) -> int:
    sys.argv = [case["script"], *case["arguments"]]
    runpy.run_path(case["script"], run_name="__main__")
    return 0


def run(case: dict[str, Any], rank: int, port: int) -> None:
    """Become one process of a case; does not return."""
    import brief_finish
    import cpu_engines
    import faults
    import forked_server

    from llava_llama31.trainer.cli import main

    code = 1
    try:
        become_a_rank(case, rank, port)
        if not case.get("whole_finish"):
            brief_finish.shorten()
        if "hub" in case:
            import hub_server

            hub_server.adopt(case["hub"])
        if "fault" in case:
            faults.plant(*case["fault"])
        if "steps" in case:
            count_steps(case["steps"])
        if "script" not in case:
            forked_server.use()
        if rank == 0 and "folder" in case:
            count_operations(case)
        with cpu_engines.as_asked() if case.get("engines") else contextlib.nullcontext():
            code = run_script(case) if "script" in case else main(case["arguments"])
        if rank == 0:
            Path(f"{case['log']}.modules").write_text("\n".join(sorted(sys.modules)))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def watch(pids: list[int], case: dict[str, Any], began: float) -> dict[str, Any]:
    """Wait for a case's processes: exit codes as subprocess gives them, seconds, and who got the signal."""
    codes: dict[int, int] = {}
    signalled: list[int] = []
    deadline = case.get("deadline", DEADLINE_S)
    due = case.get("after", deadline)
    ended = select.poll()
    for pid in pids:
        ended.register(os.pidfd_open(pid), select.POLLIN)
    while len(codes) < len(pids):
        for fd, _ in ended.poll(1000 * max(0.0, due - (time.monotonic() - began))):
            ended.unregister(fd)
        for pid in set(pids) - codes.keys():
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - began
        if seconds > due:
            number = case.get("signal", signal.SIGKILL) if due < deadline else signal.SIGKILL
            for rank, pid in enumerate(pids):
                if pid not in codes:
                    os.kill(pid, number)
                    signalled.append(rank)
            due = deadline if due < deadline else seconds + 1
    return {"codes": [codes[pid] for pid in pids], "seconds": time.monotonic() - began, "signalled": signalled}


def put(content: Any, file: str) -> None:
    """Whole, or not there."""
    Path(f"{file}.part").write_text(json.dumps(content))
    os.rename(f"{file}.part", file)


def supervise(case: dict[str, Any]) -> None:
    """Run a case's processes to their end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began, pids = time.monotonic(), []
    for rank in range(case["processes"]):
        pid = os.fork()
        if pid == 0:
            run(case, rank, port)
        pids.append(pid)
    put(pids, f"{case['log']}.pids")
    put(watch(pids, case, began), f"{case['log']}.result")


def preload(logs: list[str]) -> None:
    """Import what former cases imported while they ran."""
    for file in [Path(f"{log}.modules") for log in logs]:
        if file.is_file():
            logs.remove(str(file.with_suffix("")))
            for name in set(file.read_text().split("\n")) - sys.modules.keys():
                with contextlib.suppress(Exception):
                    importlib.import_module(name)


def import_all() -> None:
    import cpu_engines  # noqa: F401
    import faults  # noqa: F401
    import hub_server  # noqa: F401
    import torch
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import llava_llama31.trainer.runs.finish
    import llava_llama31.trainer.runs.run  # noqa: F401
    from llava_llama31.trainer.training.meter import matrix_peak

    torch.set_num_threads(1)
    matrix_peak(torch.float32, torch.device("cpu"))  # measured once a process
    get_checkpoint_conversion_mapping("llava_next")  # made once a process, for all models


def lines_of_all(listener: socket.socket) -> Iterator[str]:
    """What clients send, line by line, until the last of them is gone."""
    parts: dict[socket.socket, bytes] = {}
    patience = None
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select(patience):
                if key.fileobj is listener:
                    client, _ = listener.accept()
                    client.sendall(b"ready\n")
                    selector.register(client, selectors.EVENT_READ)
                    parts[client] = b""
                    continue
                client, received = key.fileobj, b""
                with contextlib.suppress(ConnectionResetError):  # by one that never asked for anything
                    received = client.recv(1 << 20)
                if not received:
                    selector.unregister(client)
                    client.close()
                    del parts[client]
                    continue
                *lines, parts[client] = (parts[client] + received).split(b"\n")
                for line in lines:
                    yield line.decode()
            if parts:
                patience = None
            elif patience is None:  # nobody connects any more; is there one who just has?
                shutil.rmtree(Path(listener.getsockname()).parent, ignore_errors=True)
                patience = 0
            else:
                return


def serve(listener: socket.socket) -> None:
    os.dup2(2, 1)  # libraries speak there when they are imported
    import_all()
    logs: list[str] = []
    for line in lines_of_all(listener):
        case = json.loads(line)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if case.get("engines") and importlib.util.find_spec("deepspeed"):
            import deepspeed  # noqa: F401
        preload(logs)
        logs.append(case["log"])
        gc.freeze()  # a case's garbage collections need not go over all that
        if os.fork() == 0:
            try:
                supervise(case)
            finally:
                os._exit(0)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a case here
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    with socket.socket(socket.AF_UNIX) as place:
        place.bind(sys.argv[1])
        place.listen()
        serve(place)
