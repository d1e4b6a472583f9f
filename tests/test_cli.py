"""The command line: one JSON object on stdout where asked, one line and exit code 2 for what can be mended."""

import json

import pytest
import yaml

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.recipes.loading import SHIPPED


@pytest.fixture
def recipe_file(tmp_path, recipe_content):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_content, sort_keys=False))
    return path


def one_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


def test_plan_counts_rows_and_steps(recipe_file, capsys):
    assert main(["plan", str(recipe_file), "--devices", "2", "--json"]) == 0
    plan = one_json(capsys)
    assert [stage["name"] for stage in plan["stages"]] == ["projector", "instruct"]
    first = plan["stages"][0]
    assert (first["rows"], first["steps"], first["gradient_accumulation"]) == (44, 6, 1)
    assert main(["plan", str(recipe_file), "--devices", "3"]) == 2
    assert "not a multiple of micro_batch 4 x 3 devices" in capsys.readouterr().err


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_can_be_planned_and_copied_out(name, capsys, tmp_path):
    assert main(["plan", name, "--json", "--output", str(tmp_path)]) == 0
    assert one_json(capsys)["recipe"] == name
    assert main(["recipes", name]) == 0
    copy = tmp_path / "copy.yaml"
    copy.write_text(capsys.readouterr().out)
    assert main(["plan", str(copy), "--json"]) == 0


def test_recipes_lists_what_is_shipped(capsys):
    assert main(["recipes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(SHIPPED)


def test_check_data_on_a_recipe_is_one_object_with_a_report_per_stage(recipe_file, tmp_path, capsys):
    assert main(["check-data", str(recipe_file), "--output", str(tmp_path / "run"), "--json"]) == 0
    report = one_json(capsys)
    assert report["ok"] and list(report["stages"]) == ["projector", "instruct"]
    source = report["stages"]["projector"]["sources"][0]
    assert source["rows"] == source["usable"] == 44
    assert source["statistics"]["num_supervised_tokens"]["total"] > 0


def test_check_data_on_files_needs_no_model(data_folder, tmp_path, capsys):
    assert main(["check-data", str(data_folder / "rows.json"), "--json"]) == 0
    assert one_json(capsys)["usable"] == 44
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "x", "image": "gone.png", "conversations": []}\n')
    assert main(["check-data", str(bad), "--rejects", str(tmp_path / "rejects.jsonl")]) == 2
    assert "(fix: " in capsys.readouterr().err
    assert json.loads((tmp_path / "rejects.jsonl").read_text())["id"] == "x"


def test_evaluate_and_score_agree(base_folder, data_folder, tmp_path, capsys):
    questions = str(data_folder / "questions.jsonl")
    out = str(tmp_path / "scores")
    assert main(["evaluate", str(base_folder), "--data", questions, "--output", out, "--json"]) == 0
    evaluated = one_json(capsys)
    assert main(["score", f"{out}/predictions.jsonl", "--annotations", questions, "--json"]) == 0
    scored = one_json(capsys)
    assert scored["num_questions"] == 6 and scored["protocols"] == evaluated["protocols"]
    assert set(scored["protocols"]) == {"vlmevalkit-2024", "vlmevalkit-2025", "m4c"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "nowhere", "--data", "gone.jsonl"],
        ["score", "gone.jsonl", "--annotations", "gone.jsonl"],
        ["assemble", "--vision-tower", "gone", "--language-model", "gone", "--output", "x"],
        ["export", "gone"],
        ["check-data", "gone.json"],
        ["plan", "gone.yaml"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_is_not_there_is_one_line(arguments, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and "\n" not in captured.err.strip()
    assert main([*arguments, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
