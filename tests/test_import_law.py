"""Who may import whom, and what goes to the Hub."""

import ast
import configparser
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import tomllib

import llava_llama31
from llava_llama31.trainer.publishing.gate_code import MAX_CODE_FILES, code_problems


ROOT = Path(__file__).parents[1]
FOLDERS = {"modeling_llava_llama31": "llava_llama31", "processing": "processing", "trainer": "trainer"}
HUB_FILES = sorted(
    [*ROOT.glob("modeling_llava_llama31/*_llava_llama31.py"), *ROOT.glob("processing/*_llava_llama31.py")]
)
SOURCES = sorted(path for folder in (*FOLDERS, "model_card") for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> list[tuple[int, str, list[str]]]:
    """(level, module, names) of every import of a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", [alias.name for alias in node.names]))
    return found


def test_there_are_files_to_check():
    assert len(HUB_FILES) == MAX_CODE_FILES and len(SOURCES) > 20


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.name)
def test_hub_files_import_only_what_a_clean_machine_has(path):
    siblings = {file.stem for file in path.parent.glob("*_llava_llama31.py")}
    assert code_problems(path.read_text(), siblings) == []  # the law that the gate of `publish` keeps
    # the copier finds relative imports by a regular expression, in docstrings too
    found = re.findall(r"^\s*from\s+\.(\S+)\s+import", path.read_text(), flags=re.MULTILINE)
    assert set(found) <= siblings


def test_hub_files_have_names_of_their_own():
    assert len({path.name for path in HUB_FILES}) == len(HUB_FILES)


@pytest.mark.parametrize("folder", (*FOLDERS, "model_card"))
def test_layers_import_downwards_only(folder):
    forbidden = {
        "modeling_llava_llama31": ("llava_llama31.processing", "llava_llama31.trainer", "llava_llama31.model_card"),
        "processing": (
            "llava_llama31.trainer",
            "llava_llama31.model_card",
            "llava_llama31.modeling",
            "llava_llama31.assembly",
            "llava_llama31.checkpoint_parts",
        ),
        "trainer": (),
        "model_card": ("llava_llama31.processing", "llava_llama31.modeling", "torch"),
    }[folder]
    paths = {path for path in SOURCES if path.relative_to(ROOT).parts[0] == folder}
    if folder == "modeling_llava_llama31":
        paths -= {ROOT / folder / "__init__.py"}  # the public face names the processor for type checkers
    assert paths
    found = [(path, *one) for path in sorted(paths) for one in imports(path)]
    for path, level, module, names in found:
        full = [module, *(f"{module}.{name}" for name in names)]
        assert level <= 1 and not (level == 1 and not module), f"{path}: relative import"
        assert not any(name == bad or name.startswith(f"{bad}.") for name in full for bad in forbidden), (path, module)
        top = module.split(".")[0]
        assert top not in ("trainer", "processing", "modeling_llava_llama31", "model_card"), (path, module)


# an expression -> the one file that has it
OWNERS = {
    r'environ\.get\("RANK"': "trainer/distributed/rank.py",
    r'environ\.get\("XDG_CACHE_HOME"': "trainer/data/sources/user_cache.py",
    r'f"checkpoint-\{|"checkpoint-"': "trainer/checkpoint/atomic_folders.py",
    r'"vlmevalkit-2024"$': "trainer/evaluation/vqa_accuracy.py",
    r'= "predictions\.jsonl"|"predictions\.jsonl",|/ "predictions': "trainer/checkpoint/run_folder.py",
}


@pytest.mark.parametrize("what", OWNERS)
def test_a_fact_has_one_owner(what):
    found = {str(path.relative_to(ROOT)) for path in SOURCES if re.search(what, path.read_text(), re.MULTILINE)}
    assert found == {OWNERS[what]}


def test_the_page_of_the_architecture_has_every_room():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if re.match(r"\| \d \| ", line)]
    assert {name for row in rows for name in re.findall(r"`([\w.]+)`", row.split("|")[2])} >= {*FLOOR_OF}


def test_pools_of_processes_are_quiet_ones():
    """Others' workers print what libraries say as they are imported."""
    made = {path.stem for path in SOURCES for node in ast.walk(ast.parse(path.read_text())) if _makes_a_pool(node)}
    assert made == {"worker_pools"}


def _makes_a_pool(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("ProcessPoolExecutor", ".Pool"))


def test_setup_cfg_lists_every_package():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    mapping = dict(line.split(" = ") for line in config["options"]["package_dir"].strip().splitlines())
    found = set()
    for name, folder in mapping.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join([name, *parts]))
    assert listed == found


def test_the_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert project["version"] == cited[1] == llava_llama31.__version__


def test_the_readme_on_pypi_is_this_one_without_links_into_the_repository():
    here = (ROOT / "README.md").read_text(encoding="utf-8")
    there = (ROOT / "docs/readme-for-pypi.txt").read_text(encoding="utf-8")
    here = re.sub(r"\[([^]]+)\]\(\1\)", r"`\1`", here)  # as `make keys` writes it
    assert there == re.sub(r"\[([^]]+)\]\(([^):#]+)[^):]*\)", r"\1 (`\2`)", here)
    assert not re.search(r"\]\((?!https://)", there)


def test_examples_are_installed():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    installed = set()
    for target, patterns in config["options.data_files"].items():
        files = {path for pattern in patterns.split() for path in ROOT.glob(pattern)}
        assert all(
            path.is_file() and target == f"share/llava-llama31/{path.relative_to(ROOT).parent}" for path in files
        )
        installed |= files
    assert installed == {path for path in (ROOT / "examples").rglob("*") if path.is_file() and path.suffix != ".pyc"}


# what a fresh process runs -> modules that it then has not imported
LIGHT = {
    "import llava_llama31.trainer.cli": "torch transformers datasets pyarrow",
    "import llava_llama31.model_card.card": "torch transformers datasets pyarrow",
    "import llava_llama31.trainer.evaluation.vqa_accuracy": "torch transformers datasets pyarrow numpy PIL",
    "import llava_llama31.trainer.evaluation.metrics.choices, llava_llama31.trainer.evaluation.metrics.fields,"
    " llava_llama31.trainer.evaluation.metrics.numbers, llava_llama31.trainer.evaluation.metrics.text,"
    " llava_llama31.trainer.evaluation.metrics.yes_no": "torch transformers datasets pyarrow numpy PIL",
    "import llava_llama31.trainer.evaluation.task_answers, llava_llama31.trainer.evaluation.task_scoring": (
        "torch transformers datasets"
    ),
    "import llava_llama31.trainer.costs.flops": "torch",
    "import llava_llama31.trainer.data.sources.records": "torch datasets",
    "from llava_llama31.trainer.cli import main; main(['plan', 'llama31-8b-card', '--device-memory', '80'])": (
        "torch transformers datasets"
    ),
}
OTHERS = {
    "huge pages": "import os; from llava_llama31.trainer.cli import main; main(['recipes']);"
    " assert os.environ['THP_MEM_ALLOC_ENABLE'] == '1'",
    "own names": "import importlib.util as u;"
    " assert not [n for n in ('trainer', 'processing', 'model_card') if u.find_spec(n)]",
}
# each in a fork of a process that has imported nothing
IN_FORKS = """
import json, os, sys, traceback

codes = {}
for name, code in json.loads(sys.argv[1]).items():
    pid = os.fork()
    if not pid:
        try:
            exec(code, {})
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    codes[name] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(json.dumps(codes))
"""


@pytest.fixture(scope="session")
def fresh_processes(make_once) -> tuple[dict[str, int], str]:
    """Exit codes of all cases, and what they said."""
    folder = make_once("fresh-processes", run_in_forks)
    return json.loads((folder / "codes.json").read_text()), (folder / "said").read_text()


def run_in_forks(folder: Path) -> None:
    check = "; import sys; had = {names!r} & set(sys.modules); assert not had, had"
    cases = {code: code + check.format(names=set(names.split())) for code, names in LIGHT.items()} | OTHERS
    command = [sys.executable, "-I", "-c", IN_FORKS, json.dumps(cases)]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    (folder / "codes.json").write_text(done.stdout.splitlines()[-1])
    (folder / "said").write_text(done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*LIGHT, *OTHERS])
def test_what_a_fresh_process_imports_and_sets(fresh_processes, case):
    codes, said = fresh_processes
    assert codes[case] == 0, said


# --- the rooms of trainer/: imports go downwards, lazy ones included, and in no circle

TRAINER = ROOT / "trainer"
PACKAGE = "llava_llama31.trainer"
# lowest first: a file imports its own room, rooms of the floors below it, and rooms of its floor in one direction
FLOORS = (
    ("errors", "redaction", "terminal", "strict_json", "strict_yaml", "worker_pools"),
    ("recipes", "demo", "data.registry"),
    ("checkpoint", "costs", "distributed", "data.sources"),
    ("data.check", "fault_tolerance", "model"),
    ("data.batches", "data.contamination", "data.fetch", "data.shards", "evaluation", "export", "engines", "doctor"),
    ("training", "publishing", "planning", "chat", "report"),
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
    for name in names_imported(path.read_text(encoding="utf-8")):
        if name.startswith(f"{PACKAGE}."):
            inside = name.removeprefix(f"{PACKAGE}.")
            found.add(inside if inside in known else inside.rpartition(".")[0])
    return found


@cache
def names_imported(source: str) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


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
    assert faults(TRAINER) == []


def test_every_room_says_its_job_in_a_sentence():
    for module, path in modules_of(TRAINER).items():
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
        ("novelty/__init__.py", '"""A room without a line."""', "novelty is in no room"),
        ("stray.py", '"""A file without a room."""', "stray is in no room"),
    ],
)
def test_a_planted_fault_is_found(tmp_path, file, line, fault):
    root = tmp_path / "trainer"
    shutil.copytree(TRAINER, root, ignore=shutil.ignore_patterns("__pycache__", "*.yaml", "*.json"))
    planted = root / file
    planted.parent.mkdir(exist_ok=True)
    with planted.open("a", encoding="utf-8") as text:
        text.write(f"\n\n{line}\n")
    found = faults(root)
    assert (len(found) >= 1 and any(fault in line for line in found)) if fault else found == []


@pytest.mark.slow
def test_rooms_of_one_floor_import_each_other_one_way_only(tmp_path):
    root = tmp_path / "trainer"
    shutil.copytree(TRAINER, root, ignore=shutil.ignore_patterns("__pycache__", "*.yaml", "*.json"))
    for file, module in (
        ("evaluation/vqa_accuracy.py", "export.dialects"),
        ("export/provenance.py", "evaluation.ocr"),
    ):
        assert faults(root) == []
        with (root / file).open("a", encoding="utf-8") as text:
            text.write(f"\n\nfrom {PACKAGE}.{module} import name\n")
    (fault,) = faults(root)
    assert fault.startswith("a cycle of rooms: ")
