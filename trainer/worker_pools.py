"""Pools of spawned processes, as quiet as the process that starts them."""

import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

from llava_llama31.trainer.redaction import quiet_libraries


def spawned_pool(num_workers: int, start: Callable[..., None] | None = None, *given: object) -> ProcessPoolExecutor:
    """Processes that have called `start(*given)`.

    They are spawned, since a fork of a process with tokenizer or CUDA threads may hang. A spawned process unpickles
    what it is given before it runs anything, and that imports the libraries; so it is given bytes.
    """
    payload = pickle.dumps((start, given))
    return ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _start_quietly, (payload,))


def _start_quietly(payload: bytes) -> None:
    quiet_libraries()
    start, given = pickle.loads(payload)
    if start is not None:
        start(*given)
