"""The notebook of the first hour: its cells are code and commands; the files it writes are those of docs/own-data.md.

The whole notebook, which trains `tiny`, is run by `make torture`.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llava_llama31.trainer.cli import command_parser, main


ROOT = Path(__file__).parents[1]
NOTEBOOK = json.loads((ROOT / "examples/first_hour.ipynb").read_text(encoding="utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
PROGRAM = "llava-llama31"


def command_of(cell: dict) -> list[str] | None:
    """The arguments of a cell that is one command; None: it is Python."""
    source = "".join(cell["source"])
    if not source.startswith("!"):
        return None
    program, *arguments = shlex.split(source[1:])
    assert program == PROGRAM
    return arguments


def test_every_cell_is_code_or_a_command():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    for cell in CELLS:
        arguments = command_of(cell)
        if arguments is None:
            compile("".join(cell["source"]), cell["id"], "exec")
        else:
            command_parser().parse_args(arguments)


def test_links_of_the_notebook_lead_somewhere():
    text = "".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown")
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets and all((ROOT / "examples" / target).is_file() for target in targets)


def test_cheap_cells_write_the_files_of_the_page_on_own_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in CELLS:
        if "cheap" not in cell["metadata"].get("tags", ()):
            continue
        arguments = command_of(cell)
        if arguments is None:
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        else:
            assert main(arguments) == 0
    page = (ROOT / "docs/own-data.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"```\w+ (mine/\S+)\n(.*?)```", page, re.DOTALL))
    del files["mine/labels.csv"]  # another way to the rows that the notebook writes
    assert len(files) == 3 and {name: Path(name).read_text() for name in files} == files
    assert len(list(Path("mine/images").iterdir())) == 3 and "llama31-8b" in capsys.readouterr().out


@pytest.mark.torture
@pytest.mark.timeout(7200)
def test_the_whole_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {"display": repr}
    for cell in CELLS:
        arguments = command_of(cell)
        if arguments is None:
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
            continue
        done = subprocess.run([sys.executable, "-m", "llava_llama31", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        if arguments[0] == "chat":
            assert done.stdout == "STOP\n"
    assert Path("compared.html").is_file() and "->" in capsys.readouterr().out
