"""SIGTERM, SIGINT and SIGUSR1 for as long as a run lasts: noted while a stage trains, an exception anywhere else."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llava_llama31.trainer.errors import Interrupted


logger = logging.getLogger(__name__)

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Signals:
    """What was received; while it is not deferring, a signal ends the run at once, which loses no checkpoint."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._deferring = False

    @contextmanager
    def handled(self) -> Iterator["Signals"]:
        """Within it signals come here."""
        former = {number: signal.signal(number, self.receive) for number in HANDLED}
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Within it the first signal is noted, for the end of a step, and the second one stops at once."""
        self.received, self._deferring = None, True
        try:
            yield
        finally:
            self._deferring = False

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """What the interpreter calls on a signal.

        Raises:
            KeyboardInterrupt, Interrupted: outside of training.
        """
        if self._deferring and self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number)
        if not self._deferring:
            self.act()
        logger.warning("%s: saving at the end of this step; once more stops at once", self.received.name)

    def act(self) -> None:
        """Stop by what was received: where it came after the last step, nobody has acted on it yet."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise Interrupted(f"stopped by {self.received.name}; the same command goes on from the last checkpoint")
