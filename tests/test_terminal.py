"""What data, models, paths and recipes say is shown as it is: never as markup, never as a raw control character."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from tqdm import tqdm

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.commands import publish
from llava_llama31.trainer.commands.doctor import report
from llava_llama31.trainer.doctor.findings import DoctorFinding
from llava_llama31.trainer.runs import run as runs
from llava_llama31.trainer.terminal import Terminal, shown_size, styled, without_bars


TRAINER = Path(__file__).parents[1] / "trainer"
# what a model may answer -> how it is shown
HOSTILE = {
    "[/INST]": "[/INST]",
    "[red]hi": "[red]hi",
    ":smile: [link=x]a[/link]": ":smile: [link=x]a[/link]",
    "\x1b[31mred\x1b[2J": r"\x1b[31mred\x1b[2J",
    "a\x07\u202eb\rc": r"a\x07\u202eb\rc",
}


def rich_names(source: str) -> set[str]:
    """What a file takes from rich, as `module.name`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "rich"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rich":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_only_the_terminal_holds_a_console():
    """Tables get their cells read by the console that prints them, and only one kind of console is there."""
    files = [path for path in TRAINER.rglob("*.py") if path != TRAINER / "terminal.py"]
    fine = {"rich.progress.Progress", "rich.progress.TaskID"}
    found = {path: rich_names(path.read_text()) - fine for path in files}
    assert {path: names for path, names in found.items() if names} == {}
    bars = [path for path in files if re.search(r"\bProgress\(", path.read_text())]
    assert bars == []  # the type alone


@pytest.mark.parametrize("source", ["import rich", "from rich import print", "def f():\n from rich.text import Text"])
def test_a_planted_console_is_found(source):
    assert rich_names(source)


@pytest.mark.parametrize(("said", "shown"), HOSTILE.items())
def test_lines_cells_headers_and_rules_are_text(said, shown, capsys):
    terminal = Terminal()
    terminal.print(said)
    terminal.print(said, style="yellow")
    terminal.print(styled(("level", "bold red"), (said, "")))
    terminal.table([said], [[said]], numbers=[said])
    terminal.rule(said)
    out = capsys.readouterr().out
    assert out.count(shown) == 6 and all(c == "\n" or c.isprintable() for c in out)


def test_rows_of_a_table_are_whole_in_a_pipe(capsys):
    words = "word " * 60
    Terminal().table(
        ("name", "number", "words"), [("a", "1,000", words), ("long", "2", "x" * 300)], numbers=("number",)
    )
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "number", "words"]
    assert first.rstrip() == "a      1,000  " + words.rstrip() and second.rstrip() == "long       2  " + "x" * 300


def test_cells_of_a_table_wrap_at_words_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    Terminal().table(("name", "words"), [("a", "several words " * 9), ("b", "y" * 90)])
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 40 and len(lines) > 6
    cells = " ".join(line[3:].strip() for line in lines[1:])
    assert cells.startswith("several words " * 9 + "y") and cells.replace(" ", "").endswith("y" * 90)


def test_a_long_line_is_not_cut(capsys):
    Terminal().print("word " * 1000)
    assert capsys.readouterr().out.split() == ["word"] * 1000


def test_others_bars_are_left_out_and_their_words_are_not(capsys):
    with without_bars():
        for _ in tqdm(range(3), desc="no use", disable=False):
            sys.stderr.write("a warning\n")
    assert capsys.readouterr().err == "a warning\n" * 3


@pytest.mark.parametrize(("size", "shown"), [(0, "0 B"), (999.7, "1 kB"), (45_200, "45.2 kB"), (1.5e9, "1.5 GB")])
def test_a_size_has_three_digits(size, shown):
    assert shown_size(size) == shown


@pytest.mark.parametrize(("said", "shown"), HOSTILE.items())
def test_a_bar_is_text(said, shown):
    with Terminal(stderr=True, quiet=True).progress() as bar:
        bar.add_task(said, total=1)
        [description, *_] = bar.columns
        assert description.render(bar.tasks[0]).plain == shown


def test_findings_of_doctor_are_text(capsys):
    said = "[/INST] \x1b[2J"
    report([DoctorFinding("check", "warning", said, said, said)], json_output=False)
    assert capsys.readouterr().out.count(r"[/INST] \x1b[2J") == 3


def test_answers_that_publish_shows_are_text(capsys):
    samples = [{"question": said, "answer": said} for said in HOSTILE]
    publish._print({"checks": {"samples": samples}, "url": "u", "tag": "t"})
    lines = capsys.readouterr().out.splitlines()[2:-1]
    assert [line.split("  ")[0] for line in lines] == list(HOSTILE.values())


@pytest.fixture
def finished(tmp_path, recipe_content, run_recipe):
    """Recipe and folder of a finished run of one stage."""
    del recipe_content["stages"]["instruct"]
    recipe_content["evaluation"]["baselines"] = False
    return run_recipe(recipe_content, tmp_path / "run").with_suffix(".yaml"), tmp_path / "run"


@pytest.mark.slow
def test_a_run_whose_model_answers_with_markup_ends_and_shows_it(finished, capsys):
    recipe, run = finished
    answers = run / "evaluation" / "after" / "predictions.jsonl"
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    said = [*HOSTILE, *["plain"] * len(rows)]
    rows = [row | {"answer": answer} for row, answer in zip(rows, said, strict=False)]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "summary.json").unlink()
    capsys.readouterr()
    assert main(["train", str(recipe), "--output", str(run)]) == 0
    told = capsys.readouterr().err
    assert (run / "summary.json").is_file() and "\x1b" not in told
    assert all(shown in told for shown in HOSTILE.values())


@pytest.mark.slow
def test_a_run_that_cannot_print_its_end_is_finished(finished, capsys, monkeypatch):
    recipe, run = finished
    (run / "summary.json").unlink()

    def fails(*arguments: object) -> None:
        raise RuntimeError("the terminal is gone")

    with monkeypatch.context() as broken:
        broken.setattr(runs, "print_summary", fails)
        assert main(["train", str(recipe), "--output", str(run)]) == 1
    assert (run / "summary.json").is_file()
    capsys.readouterr()
    assert main(["train", str(recipe), "--output", str(run)]) == 0
    assert "has already finished" in capsys.readouterr().err


def test_score_and_browse_show_ids_as_text(data_folder, tmp_path, capsys):
    questions = [json.loads(line) for line in (data_folder / "questions.jsonl").read_text().splitlines()]
    ids = [question["question_id"] for question in questions] + list(HOSTILE)[:3] + ["x\x1b[31mRED\x1b[2J"]
    predictions = tmp_path / "[bold]predictions.jsonl"
    predictions.write_text("".join(json.dumps({"question_id": i, "answer": "red"}) + "\n" for i in ids))
    data = str(data_folder / "questions.jsonl")
    assert main(["score", str(predictions), "--annotations", data]) == 3
    assert main(["browse", str(predictions), "--data", data, "--output", str(tmp_path / "[red]x.html")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and out.count(r"x\x1b[31mRED\x1b[2J") == 2
    for shown in ("[/INST]", "[red]hi", ":smile: [link=x]a[/link]", "[bold]predictions.jsonl", "[red]x.html"):
        assert shown in out


def test_plan_shows_names_as_text(recipe_content, tmp_path, capsys):
    recipe_content["name"] = "[/INST]\x1b[2J"
    recipe_content["stages"]["projector"]["data"][0]["name"] = "[red]rows"
    recipe_content["stages"]["projector"]["data"][0]["path"] = str(tmp_path / "gone.json")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_content))
    assert main(["plan", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(r"[/INST]\x1b[2J on 1 device") and "[red]rows" in out and "\x1b" not in out
