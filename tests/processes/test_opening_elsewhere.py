"""export --check: clean processes open the folder through every door, elsewhere too; the card says so."""

import os
import shutil
import stat
import sys
from pathlib import Path

import pytest

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.engines import opening_elsewhere
from llava_llama31.trainer.engines.ask_folder import MARK
from llava_llama31.trainer.engines.opening_elsewhere import open_everywhere
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.export.export import export_again
from llava_llama31.trainer.publishing.gate import check_folder


# a stand-in for another environment: answers as the reference does, but for its first question
OTHER = """#!{python}
import json, sys
reference = json.load(open({reference!r}))["recorded"]
door = sys.argv[3]
result = {{"versions": {{"transformers": "4.52.4", "torch": "2.6", "vllm": "0.32.0"}}}}
if door != "versions":
    asked = len(json.load(open(sys.argv[5]))["conversations"])
    recorded = [item for item in reference if asked == len(reference) or item["id"] != "transparent image"]
    answers = [
        {{"prompt_ids": [token for token, times in item["prompt"] for _ in range(times)], "answer": item["answer"]}}
        for item in recorded
    ]
    if door == "vllm":
        answers[0]["answer"] += "!"
    result |= {{"answers": answers, "imports_our_package": False}}
print("{mark}" + json.dumps(result))
print("an engine that prints after all")
"""


@pytest.fixture(scope="module")
def run(lively_folder, tmp_path_factory):
    """A finished run of one stage, as far as `export` reads it."""
    folder = tmp_path_factory.mktemp("run")
    final = RunFolder(folder).stage("instruct", ["instruct"]).final
    shutil.copytree(lively_folder, final)
    base = {"role": "language_model", "id": "me/base", "licence": "apache-2.0", "folder": str(folder)}
    record = {"name": "mine", "licence": "apache-2.0", "base_models": [base], "stages": [{"name": "instruct"}]}
    record["recipe"] = {"model": {"dtype": "float32"}}
    atomic_folders.write_json(RunFolder(folder).record, record)
    export_again(RunFolder(folder))
    return folder


@pytest.mark.parametrize("stock", [False, pytest.param(True, marks=pytest.mark.torture)], ids=["", "by stock too"])
def test_an_export_is_opened_here_and_elsewhere_and_its_card_says_so(run, tmp_path, monkeypatch, capsys, stock):
    doors = opening_elsewhere._doors
    if not stock:  # a process less: that door here
        here = ["remote"]
        monkeypatch.setattr(
            opening_elsewhere, "_doors", lambda has: doors(has) if has["transformers"] == "4.52.4" else here
        )
    other = tmp_path / "python"
    other.write_text(OTHER.format(mark=MARK, python=sys.executable, reference=str(run / "export" / "reference.json")))
    other.chmod(other.stat().st_mode | stat.S_IXUSR)
    monkeypatch.chdir(tmp_path)  # the path is relative, as users write it
    assert main(["export", str(run), "--check", "--check-with", f"./{other.name}"]) == 3
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.partition(", ")[2] for line in lines] == [
        *(["stock classes: 13 of 13 answers are equal"] if stock else []),
        "trust_remote_code=True: 14 of 14 answers are equal",
        "stock classes: 13 of 13 answers are equal",
        "vLLM's own class: 13 of 14 answers are equal: differs first in 'grid 28x56'",
    ]
    card = (run / "export" / "README.md").read_text()
    assert "## Opened in" in card and "| vLLM 0.32.0 | vLLM's own class | 13 of 14 |" in card.replace("&#x27;", "'")
    assert "| Transformers 4.52.4 | stock classes | 13 of 13 |" in card
    assert atomic_folders.verify(run / "export") is None and check_folder(run / "export", "mine") == []
    assert main(["export", str(run)]) == 0
    assert "## Opened in" not in (run / "export" / "README.md").read_text()


# a stand-in for an environment in which a folder does not open
FAILING = """#!{python}
import sys
if sys.argv[3] == "versions":
    print('{mark}{{"versions": {{"transformers": "4.52.4"}}}}')
else:
    sys.exit("loading\\nOSError: no file model.safetensors in " + sys.argv[4])
"""


@pytest.mark.parametrize("here", [False, pytest.param(True, marks=pytest.mark.torture)], ids=["elsewhere", "here"])
def test_a_folder_that_does_not_open_is_reported(run, tmp_path, monkeypatch, here):
    folder = Path(shutil.copytree(run / "export", tmp_path / "export"))
    (folder / "model.safetensors").unlink()
    other = tmp_path / "python"
    other.write_text(FAILING.format(mark=MARK, python=sys.executable))
    other.chmod(other.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(
        opening_elsewhere, "_doors", lambda versions: ["stock"] * (here == (versions["transformers"] != "4.52.4"))
    )
    (found,) = open_everywhere(folder, [str(other)])
    assert not found.whole and found.equal == 0 and "does not open: " in found.note
    assert here or found.note == f"does not open: OSError: no file model.safetensors in {folder.resolve()}"


def test_the_cause_that_an_engines_processes_log_is_what_is_said():
    logged = "INFO up\n(Worker pid=3) ERROR 11-28 [executor.py:953] ValueError: Available memory is less\nTraceback"
    last = "Traceback (most recent call last):\nRuntimeError: Engine core failed. See root cause above."
    assert opening_elsewhere._reason(logged, last) == "ValueError: Available memory is less"
    assert opening_elsewhere._reason("loading\n", last).startswith("RuntimeError: Engine core failed")
    assert opening_elsewhere._reason("", "") == "it was killed"


@pytest.mark.parametrize("python", [os.devnull, "/nowhere/python"])
def test_an_interpreter_that_does_not_run_is_named(run, python, monkeypatch):
    monkeypatch.setattr(opening_elsewhere, "_doors", lambda versions: [])
    with pytest.raises(UserError, match=f"{python}: does not"):
        list(open_everywhere(run / "export", [python]))
