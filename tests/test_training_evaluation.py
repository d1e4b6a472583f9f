"""Questions asked while a stage trains: what they find, and that training does not notice them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.loading import load_recipe


ASKING = {"eval_questions": 5, "eval_steps": 2}


@pytest.fixture
def recipe_path(tmp_path, recipe_content):
    """The recipe with one stage, which has dropout in its adapters' way of using random numbers."""
    stage = recipe_content["stages"]["instruct"]
    stage |= {"lora": {"r": 4, "alpha": 8.0, "dropout": 0.1}, "dataloader_workers": 1}
    recipe_content["stages"] = {"instruct": stage}
    recipe_content["evaluation"]["baselines"] = False
    path = tmp_path / "recipe.yaml"

    def write(**changes):
        stage.update(changes)
        path.write_text(yaml.safe_dump(recipe_content, sort_keys=False))
        return str(path)

    return write


def train(path: str, output: Path) -> Path:
    assert main(["train", path, "--output", str(output)]) == 0
    return output / "stages" / "1-instruct"


def history(stage: Path, step: int = 6) -> list[dict]:
    return json.loads((stage / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]


@pytest.mark.slow
def test_asking_leaves_training_as_it_was(recipe_path, tmp_path):
    silent = train(recipe_path(), tmp_path / "silent")
    asked = train(recipe_path(**ASKING), tmp_path / "asked")
    for name in ("trainable.safetensors", "optimizer.safetensors"):
        before, after = load_file(silent / "checkpoint-6" / name), load_file(asked / "checkpoint-6" / name)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    scores = {entry["step"]: entry["eval_accuracy"] for entry in history(asked) if "eval_accuracy" in entry}
    assert sorted(scores) == [2, 4, 6] and all(0 <= score <= 1 for score in scores.values())
    record = json.loads((asked / "final" / "stage.json").read_text())
    assert record["validation_accuracy"] == scores[6] and record["weights_of_step"] == 6
    rows = [json.loads(line) for line in (asked / "evaluation" / "step-4.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [1, 2, 3, 5, 6] and all(row["model"] == "step-4" for row in rows)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.usefixtures("fast_bfloat16")
def test_questions_are_answered_in_bfloat16(recipe_path, recipe_content, base_folder, tmp_path, lora):
    """Frozen groups are in bfloat16 then, adapters and trained groups in float32."""
    start = tmp_path / "start"
    shutil.copytree(base_folder, start)
    base = {name: tensor.bfloat16() for name, tensor in load_file(base_folder / "model.safetensors").items()}
    save_file(base, start / "model.safetensors", metadata={"format": "pt"})
    recipe_content["model"]["checkpoint"] = str(start)
    changes = {} if lora else {"lora": None}
    stage = train(recipe_path(**ASKING, precision="bfloat16", validation_fraction=0.1, **changes), tmp_path / "run")
    rows = [json.loads(line) for line in (stage / "evaluation" / "step-2.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and all(row["answer"] is not None for row in rows)


@pytest.mark.slow
def test_a_run_that_began_before_a_key_was_there_resumes(recipe_path, tmp_path):
    stage = train(recipe_path(), tmp_path / "run")
    begun = json.loads((tmp_path / "run" / "recipe.json").read_text())
    del begun["stages"]["instruct"]["keep"], begun["evaluation"]["preset"]
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(begun))
    (tmp_path / "run" / "summary.json").unlink()
    assert train(recipe_path(), tmp_path / "run") == stage


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "llava"}, "6 questions have none"),
        ({"baselines": True, "limit": 1}, "the blind baseline needs at least two images"),
    ],
)
def test_an_evaluation_that_cannot_be_stops_before_training(
    recipe_path, recipe_content, tmp_path, capsys, changes, message
):
    recipe_content["evaluation"] |= changes
    assert main(["train", recipe_path(), "--output", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("stages/*/checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "stops"),
    [
        pytest.param(True, False, id="lora in one go"),
        pytest.param(False, True, id="full resumed"),
        pytest.param(True, True, id="lora resumed", marks=pytest.mark.torture),
        pytest.param(False, False, id="full in one go", marks=pytest.mark.torture),
    ],
)
def test_the_best_weights_are_kept(recipe_path, tmp_path, monkeypatch, lora, stops):
    from llava_llama31.trainer.evaluation import in_training

    truth = in_training.score_answers
    scores = iter([0.2, 0.7, KeyboardInterrupt(), 0.4, 0.1] if stops else [0.2, 0.7, 0.4, 0.1])

    def scored(questions, rows):
        report = truth(questions, rows)
        score = next(scores)
        if isinstance(score, BaseException):
            raise score
        object.__setattr__(report.protocols_failed_as_zero["vlmevalkit-2024"], "accuracy", score)
        return report

    monkeypatch.setattr(in_training, "score_answers", scored)
    changes = {} if lora else {"lora": None}
    path = recipe_path(**ASKING, keep="best_accuracy", save_steps=1, save_total_limit=1, **changes)
    if stops:  # in the evaluation after the best one's
        assert main(["train", path, "--output", str(tmp_path / "run")]) == 130
    stage = train(path, tmp_path / "run")
    assert sorted(folder.name for folder in stage.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    record = json.loads((stage / "final" / "stage.json").read_text())
    assert record["weights_of_step"] == 4 and record["validation_accuracy"] == 0.7
    if not lora:
        best, last = (load_file(stage / f"checkpoint-{step}" / "model.safetensors") for step in (4, 6))
        final = load_file(stage / "final" / "model.safetensors")
        assert all(torch.equal(final[name], best[name]) for name in final)
        assert any(not torch.equal(final[name], last[name]) for name in final)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_questions": 5}, "eval_questions are never asked (fix: set eval_steps)"),
        ({"eval_steps": 2}, "eval_steps has nothing to evaluate"),
        (
            {"keep": "best_accuracy"},
            "keep: best_accuracy compares evaluations (fix: set eval_steps and eval_questions)",
        ),
        (ASKING | {"keep": "best_loss"}, "fix: set eval_steps and validation_fraction"),
        (ASKING | {"keep": "best_accuracy", "save_steps": 4}, "eval_steps 2 is not a multiple of save_steps 4"),
    ],
)
def test_evaluations_that_make_no_sense_are_refused(recipe_path, changes, message):
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_path(**changes))
    assert message in str(caught.value)
