"""Errors that are meant for the person at the keyboard, and the exit codes of the commands (docs/recipes.md)."""

EXIT_FAULT = 1  # ours, with its traceback
EXIT_USER = 2
# 3: evaluate and score, questions without an answer
EXIT_UNHEALTHY = 4
EXIT_HANG = 5
EXIT_MEMORY = 6
EXIT_LOST = 7
EXIT_UNPUBLISHED = 8
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h
EXIT_KEYBOARD = 130  # 128 + SIGINT, as shells say


class UserError(ValueError):
    """Something the user can mend: one line that says where, what and how to mend it; the command exits with 2.

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
    """A loss or gradient norm that is not finite, or a spike where the recipe stops at spikes."""

    exit_code = EXIT_UNHEALTHY


class Hang(UserError):
    """Nothing moved for longer than the recipe allows."""

    exit_code = EXIT_HANG


class OutOfMemory(UserError):
    """A device or the host has no memory left."""

    exit_code = EXIT_MEMORY


class ProcessLost(UserError):
    """A process of the run was killed or crashed."""

    exit_code = EXIT_LOST


class Unpublished(UserError):
    """The run is done and lies here whole; only its publication is outstanding."""

    exit_code = EXIT_UNPUBLISHED


class Interrupted(BaseException):
    """A signal stopped the run; running the same command again goes on from the last checkpoint.

    No Exception: code that swallows those must not swallow a signal.

    Args:
        agreed: all processes stop by this signal, after a checkpoint.
    """

    def __init__(self, message: str, *, agreed: bool = False):
        super().__init__(message)
        self.agreed = agreed


class EndedElsewhere(Exception):
    """Another process of the run failed first and has said why.

    Args:
        exit_code: that process's.
        untold: what is still to be said here; mostly nothing.
    """

    def __init__(self, exit_code: int, untold: str = ""):
        super().__init__(f"another process of the run failed with exit code {exit_code}")
        self.exit_code, self.untold = exit_code, untold
