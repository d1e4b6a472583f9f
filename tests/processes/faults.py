"""The command line with a planted fault, e.g. FAULT=nan,1,3: what, on which rank, in which step.

FAULT=KIND,RANK,STEP accelerate launch tests/processes/faults.py train RECIPE ...

ENGINE=1 runs it under the engines of cpu_engines.py. Data workers import this file too, and so have the fault.
"""

import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path

import torch

from llava_llama31.trainer.data.batches.dataset import StageDataset
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.training.llava_trainer import LlavaTrainer


FACTORS = ("nan", "inf", "1e9")  # of the loss


def crash(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        time.sleep(1000)
    if kind == "full":  # as a disk: what is written from now on has no room, but for the output, which may be a file
        limit = 20_000 + os.fstat(sys.stderr.fileno()).st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return
    if kind == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")
    raise UserError("planted") if kind == "user" else KeyError("planted")


def plant(kind: str, rank: int, step: int) -> None:
    if kind in ("worker", "killed-worker"):  # the step is the number in the record's id
        original = StageDataset._sample

        def sample(self, index, known):
            if self.record_id(index) == f"r{step}":
                crash("kill" if kind == "killed-worker" else "hang")
            return original(self, index, known)

        StageDataset._sample = sample
        return
    kind, _, method = kind.partition(":")
    method = method or "compute_loss"
    original = getattr(LlavaTrainer, method)

    def faulty(self, *args, **kwargs):
        due = self.args.process_index == rank and self.state.global_step >= step - 1
        if due and kind not in FACTORS:
            crash(kind)
        result = original(self, *args, **kwargs)
        return result * float(kind) if due and self.state.global_step == step - 1 else result

    setattr(LlavaTrainer, method, faulty)


if "FAULT" in os.environ:
    what, rank, step = os.environ["FAULT"].split(",")
    plant(what, int(rank), int(step))

if __name__ == "__main__":
    if "ENGINE" in os.environ:
        runpy.run_path(str(Path(__file__).with_name("cpu_engines.py")), run_name="__main__")
    from llava_llama31.trainer.cli import main

    sys.exit(main())
