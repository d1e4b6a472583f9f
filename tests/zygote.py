"""Starts many commands of ours quickly: everything is imported once, and each case is a fork of that.

python tests/zygote.py, then one case a line on stdin, as JSON; an answer a line on stdout. It trains nothing itself,
and so has no threads when it forks.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
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


def run(case: dict[str, Any], rank: int, port: int) -> None:
    """Become one process of a case; does not return."""
    import faults

    from llava_llama31.trainer.cli import main

    code = 1
    try:
        log = os.open(f"{case['log']}{rank or ''}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if case["processes"] > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case["processes"], "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
        if "fault" in case:
            kind, where, step = case["fault"]
            faults.plant(kind, where, step)
        if "steps" in case:
            count_steps(case["steps"])
        if rank == 0 and "folder" in case:
            count_operations(case)
        code = main(case["arguments"])
        if "modules" in case:
            Path(case["modules"]).write_text("\n".join(sorted(sys.modules)))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def answer(case: dict[str, Any]) -> dict[str, Any]:
    """Run a case's processes to their end: exit codes as subprocess gives them, seconds, and who got the signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began, pids = time.monotonic(), []
    for rank in range(case["processes"]):
        pid = os.fork()
        if pid == 0:
            run(case, rank, port)
        pids.append(pid)
    codes: dict[int, int] = {}
    signalled: list[int] = []
    due = case.get("after", DEADLINE_S)
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - began
        if seconds > due:
            number = case.get("signal", signal.SIGKILL) if due < DEADLINE_S else signal.SIGKILL
            for rank, pid in enumerate(pids):
                if pid not in codes:
                    os.kill(pid, number)
                    signalled.append(rank)
            due = DEADLINE_S if due < DEADLINE_S else seconds + 1
        time.sleep(0.005)
    return {"codes": [codes[pid] for pid in pids], "seconds": time.monotonic() - began, "signalled": signalled}


def serve() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    import faults  # noqa: F401
    import torch

    import llava_llama31.trainer.runs.finish
    import llava_llama31.trainer.runs.run  # noqa: F401
    from llava_llama31.trainer.training.meter import matrix_peak

    torch.set_num_threads(1)
    matrix_peak(torch.float32, torch.device("cpu"))  # measured once a process
    gc.freeze()  # a case's garbage collections need not go over all that
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries speak there when they are imported
    answers.write("ready\n")
    for line in sys.stdin:
        case = json.loads(line)
        answers.write(json.dumps(answer(case)) + "\n")
        if "modules" in case and os.path.exists(case["modules"]):  # what it imported while it ran
            for name in Path(case["modules"]).read_text().split("\n"):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
            gc.freeze()


if __name__ == "__main__":
    serve()
