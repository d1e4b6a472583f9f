"""How long training waits for a checkpoint, and how long its commit takes in the background, in one process.

python benchmarks/saving.py [--gigabytes 4] [--folder DIR] [--json]

Training is matrix products here: how much slower they are during the commit is printed too.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerState, TrainingArguments

from llava_llama31.trainer.fault_tolerance.signals import Signals
from llava_llama31.trainer.fault_tolerance.stage_guard import Guard, StopRequests
from llava_llama31.trainer.fault_tolerance.step_health import Health
from llava_llama31.trainer.fault_tolerance.watchdog import Watchdog
from llava_llama31.trainer.training.stage_checkpoints import StageSaves


NUM_FILES = 4
WIDTH = 1024  # of the matrices
ALONE_S = 2.0


def products_per_second(is_running: Callable[[], bool]) -> float:
    """Matrix products in a second, for as long as `is_running`."""
    matrix, number, started = torch.randn(WIDTH, WIDTH), 0, time.perf_counter()
    while is_running():
        matrix @ matrix
        number += 1
    return number / (time.perf_counter() - started)


def measure(gigabytes: float, folder: Path) -> dict[str, float]:
    """Seconds that a save takes before and after training resumes, and the products' speed during the second part."""
    args = TrainingArguments(str(folder), use_cpu=True, report_to=[], save_total_limit=2)
    requests, watchdog = StopRequests(Signals(), None), Watchdog(3600, "saving", lambda code, message: True)
    guard = Guard("saving", Health(on_nonfinite="stop", on_spike="log"), requests, watchdog, 0)
    committed = threading.Event()
    saves = StageSaves(
        args, guard, inputs={}, only_trainable=False, committed=lambda checkpoint, step: committed.set()
    )
    files = [torch.randn(round(gigabytes * 1e9 / 4 / NUM_FILES)) for _ in range(NUM_FILES)]
    end = time.perf_counter() + ALONE_S
    alone = products_per_second(lambda: time.perf_counter() < end)
    started = time.perf_counter()
    with saves.completed():
        with saves.staged(TrainerState(global_step=1), torch.nn.Linear(1, 1)) as parent:
            (parent / "checkpoint-1").mkdir(exist_ok=True)
            for number, tensor in enumerate(files):
                save_file({"weight": tensor}, parent / f"checkpoint-1/model-{number}.safetensors")
        written = time.perf_counter()
        beside = products_per_second(lambda: not committed.is_set())
    return {
        "gigabytes": gigabytes,
        "waited_s": written - started,
        "in_background_s": time.perf_counter() - written,
        "speed_meanwhile": beside / alone,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the checkpoint; default: 4")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the folder of temporary files")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    with (
        redirect_stdout(sys.stderr if options.json else sys.stdout),
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
    ):
        found = measure(options.gigabytes, Path(folder))
    if options.json:
        print(json.dumps(found))
    else:
        print(
            f"{found['gigabytes']:g} GB: training waits {found['waited_s']:.1f} s, then runs during the "
            f"{found['in_background_s']:.1f} s of flushing and hashing at {found['speed_meanwhile']:.0%} of its speed"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
