"""A long job for a pool's workers, which import it by name."""

import time


def asleep(*_: object) -> None:
    time.sleep(100)
