"""The one error that is meant for the person at the keyboard."""


class UserError(ValueError):
    """Something the user can mend: one line that says where, what and how to mend it; the command exits with 2.

    Args:
        what: what is wrong, with the offending value.
        where: file, record id, field or step.
        fix: what to do about it.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = ""):
        self.what, self.where, self.fix = what, where, fix
        line = f"{where}: {what}" if where else what
        super().__init__(" ".join(f"{line} (fix: {fix})".split()) if fix else " ".join(line.split()))
