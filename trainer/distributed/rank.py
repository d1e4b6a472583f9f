"""This process's rank, as its launcher sets it."""

import os


def rank() -> int:
    """0 without a launcher, and for the process that writes, prints and pushes."""
    return int(os.environ.get("RANK", "0"))


def is_launched(*, cpu: bool) -> bool:
    """Whether a launcher has started this process and given it its place.

    On a GPU only one that gives its rank on this machine too. A cluster may set RANK and WORLD_SIZE for a whole
    machine, as Kubeflow's PyTorchJob does, and leave the processes on it to a launcher.
    """
    return ("RANK" if cpu else "LOCAL_RANK") in os.environ
