"""Text ability: a planted forgetting run is seen, logged, stopped where the recipe says so, and not asked twice."""

import json
from pathlib import Path

import pytest
import yaml

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.report.run_facts import entries


KNOWN = {
    "capital of France?": "Paris",
    "two and two?": "four",
    "colour of grass?": "green",
    "opposite of hot?": "cold",
}


@pytest.fixture(scope="session")
def texts(make_once):
    """Text-only rows and the questions about them, and rows that answer the same with other words."""
    return make_once("texts", write_texts)


def write_texts(folder: Path) -> None:
    for name, answers in (("right", list(KNOWN.values())), ("wrong", ["no"] * len(KNOWN))):
        rows = [
            {"id": f"{name}{i}", "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
            for i, (q, a) in enumerate(zip(KNOWN, answers, strict=True))
        ]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    questions = [{"id": i, "question": q, "answer": a, "metric": "exact"} for i, (q, a) in enumerate(KNOWN.items())]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))


def recipe(checkpoint, texts, rows, **keys):
    stage = {
        "trainable": ["language_model"], "learning_rate": 5e-3,
        "data": [{"name": rows, "path": str(texts / f"{rows}.json")}],
        "global_batch": 4, "micro_batch": 4, "max_steps": 40, "precision": "float32", "dataloader_workers": 0,
        "schedule": "constant", "warmup_ratio": 0.0, "save_steps": 100,
    }  # fmt: skip
    asked = {"data": str(texts / "questions.jsonl"), "max_new_tokens": 8, **keys}
    model = {"checkpoint": str(checkpoint), "dtype": "float32"}
    return {"name": "text", "model": model, "stages": {rows: stage}, "text_questions": asked}


@pytest.fixture
def taught(base_folder, texts, make_once, short_runs) -> Path:
    """A run in which the tiny model learns the answers."""

    def fill(folder: Path) -> None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(base_folder, texts, "right")))
        assert main(["train", str(folder / "recipe.yaml"), "--output", str(folder / "run")]) == 0

    return make_once("taught", fill) / "run"


@pytest.mark.slow
def test_what_is_learnt_is_in_log_summary_and_card(taught):
    summary = json.loads((taught / "summary.json").read_text())
    assert summary["text_ability"] == {"before": 0.0, "right": 1.0}
    log = [entry for entry in entries(taught / "log.jsonl") if entry.get("event") == "text"]
    assert [(entry["step"], entry["text_accuracy"]) for entry in log] == [(0, 0.0), (40, 1.0)]
    answers = [json.loads(line) for line in (taught / "text_ability" / "1-right.jsonl").read_text().splitlines()]
    assert [answer["answer"] for answer in answers] == list(KNOWN.values())
    card = (taught / "export" / "README.md").read_text()
    assert "| after right | 100.0% | 4 |" in card and "Text-only questions" in card


@pytest.mark.slow
def test_a_run_that_forgets_is_stopped_after_its_stage(taught, texts, tmp_path, capsys, monkeypatch):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(taught / "stages" / "1-right" / "final", texts, "wrong", max_drop=0.25)))
    command = ["train", str(file), "--output", str(tmp_path / "run")]
    assert main(command) == 4
    assert "text accuracy fell from 100.0% to 0.0% in stage wrong" in " ".join(capsys.readouterr().err.split())
    # resumed, it stops again, from what it found the first time
    monkeypatch.setattr("llava_llama31.trainer.runs.text_ability.ask_text", None)
    assert main(command) == 4


def test_questions_with_images_or_without_a_metric_are_refused(taught, texts, tmp_path, capsys):
    for row, message in (
        ({"image": "a.png", "question": "?", "answer": "a", "metric": "exact"}, "text-only questions have no image"),
        ({"question": "?", "answer": "a"}, "no metric"),
    ):
        (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
        content = recipe(taught / "stages" / "1-right" / "final", texts, "wrong", data=str(tmp_path / "q.jsonl"))
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
        assert main(["train", str(tmp_path / "r.yaml"), "--output", str(tmp_path / "run")]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
