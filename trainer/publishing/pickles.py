"""Detects pickles in bytes by reading opcodes, without running them."""

import io
import pickletools
import re


IMPORTS = frozenset(("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"))
# they run code as soon as they are reached, whatever follows
CALLS = frozenset(("REDUCE", "BUILD", "OBJ", "NEWOBJ", "NEWOBJ_EX", "INST"))


def holds_pickle(content: bytes, *, anywhere: bool) -> bool:
    """Whether a pickle begins at the start, or, with `anywhere`, at any protocol marker."""
    starts = {0} | ({match.start() for match in re.finditer(rb"\x80[\x02-\x05]", content)} if anywhere else set())
    return any(_is_pickle(content, start) for start in starts)


def _is_pickle(content: bytes, start: int) -> bool:
    """Whether loading would import and call something, or the bytes are a complete pickle with a protocol marker."""
    stream = io.BytesIO(content)
    stream.seek(start)
    imports = False
    stack: list[object] = []
    try:
        for opcode, _, position in pickletools.genops(stream):
            if not _applies(opcode, stack):
                return False
            imports |= opcode.name in IMPORTS
            if imports and opcode.name in CALLS:
                return True
            if opcode.name == "STOP":
                whole = content[start : start + 1] == b"\x80" and position == len(content) - 1
                return imports or whole
    except (ValueError, IndexError, OverflowError):  # pickletools: not a pickle
        return False
    return False


def _applies(opcode: pickletools.OpcodeInfo, stack: list[object]) -> bool:
    """Apply an opcode to the stack, if the stack has enough on it."""
    before = opcode.stack_before
    if pickletools.markobject in before:
        if pickletools.markobject not in stack:
            return False
        while stack.pop() is not pickletools.markobject:
            pass
        before = before[: before.index(pickletools.markobject)]
    if len(stack) < len(before):
        return False
    del stack[len(stack) - len(before) :]
    stack += opcode.stack_after
    return True
