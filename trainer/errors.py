"""Errors addressed to the user, and the commands' exit codes (docs/recipes.md)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


EXIT_FAULT = 1  # a bug of ours, with its traceback
EXIT_USER = 2
# 3: evaluate and score found questions without an answer
EXIT_UNHEALTHY = 4
EXIT_HANG = 5
EXIT_MEMORY = 6
EXIT_LOST = 7
EXIT_UNPUBLISHED = 8
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h
EXIT_UNREAD = 141  # 128 + SIGPIPE: whoever read stdout has gone
EXIT_KEYBOARD = 130  # 128 + SIGINT, as shells say


class UserError(ValueError):
    """Something the user can fix: one line says where, what and how to fix it; the command exits with 2.

    Args:
        what: what is wrong, with the offending value.
        where: file, record id, field or step.
        fix: what to do about it.
    """

    exit_code = EXIT_USER

    def __init__(self, what: str, *, where: str = "", fix: str = ""):
        self.what, self.where, self.fix = what, where, fix
        line = f"{where}: {what}" if where else what
        super().__init__(" ".join(f"{line} (fix: {fix})".split()) if fix else " ".join(line.split()))


class Unhealthy(UserError):
    """A loss or gradient norm that is not finite, or a spike if the recipe stops at spikes."""

    exit_code = EXIT_UNHEALTHY


class Hang(UserError):
    """No progress for longer than the recipe allows."""

    exit_code = EXIT_HANG


class OutOfMemory(UserError):
    """A device or the host is out of memory."""

    exit_code = EXIT_MEMORY


class ProcessLost(UserError):
    """A process of the run was killed or crashed."""

    exit_code = EXIT_LOST


class Unpublished(UserError):
    """The run is complete on this machine but not yet published."""

    exit_code = EXIT_UNPUBLISHED


class Interrupted(BaseException):
    """A signal stopped the run; running the same command again resumes from the last checkpoint.

    Not an Exception: code that swallows exceptions must not swallow a signal.

    Args:
        agreed: all processes stop for this signal, after saving a checkpoint.
    """

    def __init__(self, message: str, *, agreed: bool = False):
        super().__init__(message)
        self.agreed = agreed


class EndedElsewhere(Exception):
    """Another process of the run failed first and reported why.

    Args:
        exit_code: of that process.
        untold: what this process must still print; usually nothing.
    """

    def __init__(self, exit_code: int, untold: str = ""):
        super().__init__(f"another process of the run failed with exit code {exit_code}")
        self.exit_code, self.untold = exit_code, untold


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context that puts `path` into an OSError that names no file, as on a full disk: an open file's write raises it.

    Raises:
        OSError: the same, with `path` as its filename.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
