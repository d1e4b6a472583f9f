"""Imports without a search for garbage."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Context for the imports of torch and Transformers, a fifth of whose time is a search for garbage.

    They make half a million objects that stay, and Python searches at every 700 new ones.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
