"""The result of a check."""

from dataclasses import dataclass
from typing import Literal


Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class DoctorFinding:
    """One line of the doctor's report.

    Args:
        check: its name.
        level: an `error` stops or corrupts a run; a `warning` may.
        what: what was found.
        why: why it matters.
        fix: how to fix it.
        host: machine, if there are several.
    """

    check: str
    level: Level
    what: str
    why: str = ""
    fix: str = ""
    host: str = ""

    def __post_init__(self) -> None:
        assert self.level == "ok" or (self.why and self.fix), self
