"""The rooms of `trainer/` import downwards, lazy imports included, and in no circle."""

import ast
import shutil
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1] / "trainer"
PACKAGE = "llava_llama31.trainer"
# lowest first: a file imports its own room, rooms of the floors below it, and rooms of its floor in one direction
FLOORS = (
    ("errors", "redaction"),
    ("recipes", "demo"),
    ("checkpoint", "costs", "distributed", "data.sources"),
    ("data.check", "fault_tolerance", "model"),
    ("data.batches", "evaluation", "export", "doctor"),
    ("training", "publishing", "planning"),
    ("runs",),
    ("commands",),
    ("cli",),
)
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}
FREE = ("", "data")  # packages that hold nothing but rooms


def modules_of(root: Path) -> dict[str, Path]:
    """Every module below `trainer/` by its dotted name there."""
    found = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str) -> str:
    """The longest listed name that the module is, or is inside of."""
    names = [room for room in FLOOR_OF if f"{module}.".startswith(f"{room}.")]
    return max(names, key=len, default="")


def imported(path: Path, modules: Iterable[str]) -> set[str]:
    """Modules of `trainer/` that a file imports anywhere, inside functions and for type checkers too."""
    known, found = set(modules), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith(f"{PACKAGE}."):
                inside = name.removeprefix(f"{PACKAGE}.")
                found.add(inside if inside in known else inside.rpartition(".")[0])
    return found


def faults(root: Path) -> list[str]:
    """What breaks the law, a line each."""
    modules = modules_of(root)
    lines = [f"{module} is in no room: give it a line in FLOORS" for module in modules if not _is_placed(module)]
    files: dict[str, set[str]] = {module: imported(path, modules) - {module} for module, path in modules.items()}
    rooms: dict[str, set[str]] = {}
    for module, targets in files.items():
        room = room_of(module)
        for target in targets:
            other = room_of(target)
            if room and other and room != other:
                rooms.setdefault(room, set()).add(other)
                if FLOOR_OF[other] > FLOOR_OF[room]:
                    lines.append(f"{module} imports {target}, which is on a floor above")
    for what, graph in (("files", files), ("rooms", rooms)):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            lines.append(f"a cycle of {what}: {' <- '.join(error.args[1])}")
    return lines


def _is_placed(module: str) -> bool:
    return module in FREE or bool(room_of(module))


def test_rooms_import_downwards_and_in_no_circle():
    assert faults(ROOT) == []


def test_every_room_says_its_job_in_a_sentence():
    for module, path in modules_of(ROOT).items():
        if path.name == "__init__.py":
            sentence = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            assert sentence and len(sentence.splitlines()) == 1 and sentence.endswith("."), module


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("costs/flops.py", f"from {PACKAGE}.training.meter import Meter", "is on a floor above"),
        ("costs/flops.py", f"def late():\n    from {PACKAGE}.runs import run", "is on a floor above"),
        ("errors.py", f"def late():\n    import {PACKAGE}.cli", "is on a floor above"),
        ("redaction.py", f"from {PACKAGE}.errors import UserError", None),
        ("checkpoint/atomic_folders.py", f"from {PACKAGE}.checkpoint.run_folder import RunFolder", "a cycle of files"),
        ("evaluation/vqa_accuracy.py", f"from {PACKAGE}.export.dialects import NATIVE", "a cycle of rooms"),
        ("novelty/__init__.py", '"""A room without a line."""', "novelty is in no room"),
        ("stray.py", '"""A file without a room."""', "stray is in no room"),
    ],
)
def test_a_planted_fault_is_found(tmp_path, file, line, fault):
    root = tmp_path / "trainer"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns("__pycache__", "*.yaml", "*.json"))
    planted = root / file
    planted.parent.mkdir(exist_ok=True)
    with planted.open("a", encoding="utf-8") as text:
        text.write(f"\n\n{line}\n")
    found = faults(root)
    assert (len(found) >= 1 and any(fault in line for line in found)) if fault else found == []
