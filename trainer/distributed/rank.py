"""This process's rank, as its launcher sets it."""

import os


def rank() -> int:
    """0 without a launcher, and for the process that writes, prints and pushes."""
    return int(os.environ.get("RANK", "0"))
