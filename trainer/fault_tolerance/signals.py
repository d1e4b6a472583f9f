"""Handles SIGTERM, SIGINT and SIGUSR1 during a run: recorded while a stage trains, an exception anywhere else."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llava_llama31.trainer.errors import Interrupted


logger = logging.getLogger(__name__)

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Signals:
    """Signals received; unless deferring, a signal ends the run at once, which loses no checkpoint."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._deferring = False

    @contextmanager
    def handled(self) -> Iterator["Signals"]:
        """Context in which this object handles the signals."""
        former = {number: signal.signal(number, self.receive) for number in HANDLED}
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Context in which the first signal is recorded for the end of the step, and a second one stops at once."""
        self.received, self._deferring = None, True
        try:
            yield
        finally:
            self._deferring = False

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Signal handler.

        Raises:
            KeyboardInterrupt, Interrupted: outside of training.
        """
        if self._deferring and self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number)
        if not self._deferring:
            self.act()
        logger.warning("%s: saving at the end of this step; a second signal stops at once", self.received.name)

    def act(self) -> None:
        """Stop if a signal was received: one that came after the last step has not been handled yet.

        Raises:
            KeyboardInterrupt: on SIGINT.
            Interrupted: on the other signals.
        """
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise Interrupted(f"stopped by {self.received.name}")
