"""What a GPU has to show before this code is trusted on it; `make gpu-check`.

Checks in the order of what they settle, each in a process of its own with a time limit: a kernel that hangs or breaks
the device ends its own check only. The JSON file is written after each, so that a loan that ends early leaves what was
found.
On a CPU the same checks run small, to see that they work.

python benchmarks/gpu_check.py [--device cuda|cpu] [--seconds 600] [--only NAME ...] [--json FILE]
"""

import argparse
import atexit
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_checks import full_size, kernels, runs, shards, steps
from gpu_checks.place import Detail, NotHere, Place

from llava_llama31.trainer.checkpoint.atomic_folders import write_json
from llava_llama31.trainer.distributed.devices import default_device, refuse_unused_gpus
from llava_llama31.trainer.errors import UserError


# how the line begins that a check's process prints
_ENTRY = '{"name": '


@dataclass(frozen=True)
class Check:
    """A check, and the seconds that it should take on an H100, its process's start included: estimates."""

    run: Callable[[Place], Detail]
    estimate: float

    @property
    def name(self) -> str:
        return self.run.__name__

    def limit(self, place: Place) -> float:
        """Seconds after which it is ended."""
        return (30 + 3 * self.estimate) * (3 if place.small else 1)


CHECKS = (
    Check(kernels.facts, 8),
    Check(kernels.attention, 20),
    Check(steps.step, 15),
    Check(steps.waits, 12),
    Check(kernels.tiles, 12),
    Check(kernels.head, 12),
    Check(steps.optimizers, 45),
    Check(runs.command, 75),
    Check(runs.nf4, 30),
    Check(runs.fp8, 55),
    Check(steps.profile, 60),
    Check(full_size.speed, 75),
    Check(full_size.memory, 70),
    Check(shards.sharded, 12),
    Check(shards.zero3, 40),
    Check(runs.evaluation, 35),
)


def run_check(check: Check, place: Place) -> dict[str, Any]:
    """The entry of a check, run in this process: `passed` says whether its finding is what it should be.

    Where the device can't be asked, `passed` is None and the detail says why.
    """
    started = time.monotonic()
    passed: bool | None
    try:
        detail, passed = check.run(place), True
    except NotHere as error:
        detail, passed = {"not_on_this_device": str(error)}, None
    except Exception as error:  # whatever a device raises is the check's finding
        detail, passed = {"error": f"{type(error).__name__}: {str(error)[:500]}"}, False
    return {"name": check.name, "passed": passed, "seconds": round(time.monotonic() - started, 2), "detail": detail}


def in_own_process(check: Check, place: Place, seconds: float) -> dict[str, Any]:
    """`run_check` in a fresh process, ended after `seconds`."""
    started = time.monotonic()
    run = [sys.executable, __file__, "--device", place.device.type, "--check", check.name]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(
            run,
            stdout=said,
            stderr=complaints,
            env=os.environ | own_variables(place, os.environ),
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
            said.seek(0), complaints.seek(0)
            # a library may say something as the process ends, as NCCL does with NCCL_DEBUG
            entries = [line for line in said.read().splitlines() if line.startswith(_ENTRY)]
            if code == 0 and entries:
                return json.loads(entries[-1])
            error = f"the process ended with {code}: {complaints.read()[-500:]}"
        except subprocess.TimeoutExpired:
            error = f"no end in {seconds:.0f} s"
        finally:
            end_with_children(process)
    spent = round(time.monotonic() - started, 2)
    return {"name": check.name, "passed": False, "seconds": spent, "detail": {"error": error}}


def own_variables(place: Place, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of a check's process: it sees one GPU, for `train` refuses several in one process."""
    if place.small:  # small sizes are no faster with threads, which wait for each other's cores
        return {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    if place.device.type != "cuda":
        return {}
    index, visible = place.device.index or 0, environment.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[index] if visible else str(index)}


def end_with_children(process: subprocess.Popen) -> None:
    """End what is left of a check, which would hold the device."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(
    checks: Sequence[Check],
    place: Place,
    file: Path | None,
    seconds: float,
    run: Callable[[Check, Place, float], dict[str, Any]] = in_own_process,
) -> dict[str, Any]:
    """Run the checks; the report is written after each. What there was no time for is in `not_run`."""
    end = time.monotonic() + seconds
    report: dict[str, Any] = {"device": str(place.device), "checks": [], "not_run": [check.name for check in checks]}
    for check in checks:
        left = end - time.monotonic()
        if left <= 0:
            break
        entry = run(check, place, min(left, check.limit(place)))
        report["checks"].append(entry)
        report["not_run"].remove(check.name)
        if file is not None:
            write_json(file, report)
        found = {True: "ok", None: "NOT HERE", False: "FAILED"}[entry["passed"]]
        print(f"{entry['name']:12}{found:9}{entry['seconds']:7.1f} s  {json.dumps(entry['detail'])}", flush=True)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a check failed or there was no time for it; one that this device can't be asked is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=None, help="default: the accelerator, else the CPU")
    parser.add_argument("--seconds", type=float, default=600, help="for all checks together")
    parser.add_argument("--only", nargs="+", choices=[check.name for check in CHECKS], metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after each check")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device is None:
        try:
            refuse_unused_gpus()  # else a driver that is too old for this torch would end in a small run on the CPU
        except UserError as error:
            parser.error(f"{error}; here: --device cpu")
    device = options.device or default_device()
    place = Place(device, small=device.type == "cpu")
    if options.check:
        atexit.register(gc.freeze)  # Python's last search for garbage takes seconds among all that is imported
        (check,) = (check for check in CHECKS if check.name == options.check)
        print(json.dumps(run_check(check, place)))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the running check ends too
    chosen = [check for check in CHECKS if not options.only or check.name in options.only]
    report = run_all(chosen, place, options.json, options.seconds)
    return int(bool(report["not_run"]) or any(entry["passed"] is False for entry in report["checks"]))


if __name__ == "__main__":
    sys.exit(main())
