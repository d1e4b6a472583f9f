"""One piece of work in the background, whose failure is not lost."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


# of this process; work that has ended is taken out
_running: set[Future[None]] = set()


def wait_for_background(seconds: float) -> None:
    """Wait for what runs in the background of this process, which is about to end without its main thread."""
    wait(set(_running), timeout=seconds)


class Background:
    """Runs one function at a time in a thread.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str):
        self._thread = ThreadPoolExecutor(1, name)
        self._work: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Run `work`; what was started before must have been finished."""
        assert self._work is None, "the previous work has not been waited for"
        self._work = self._thread.submit(work)
        _running.add(self._work)
        self._work.add_done_callback(_running.discard)

    def check(self) -> None:
        """Raise what the work has raised, if it has failed by now; never waits."""
        if self._work is not None and self._work.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the work; raises what it raised, once."""
        work, self._work = self._work, None
        if work is not None:
            work.result()
