"""A run whose recipe has several evaluations: asked together, and in summary, card, pages and logs each by itself."""

import hashlib
import json

import pytest
import yaml

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.loading import load_recipe


IMAGES = (1, 2, 3, 5, 6, 7)


@pytest.fixture
def recipe(recipe_content, data_folder, tmp_path):
    """One stage that asks two of three evaluations as it trains."""
    draws = [("yes", "A"), ("no", "B"), ("no", "A")] * 2
    rows = [
        {"question_id": f"coco/{i}", "image": f"{i}.png", "question": f"Is it {i}?", "answer": said, "category": "a,b"}
        for i, (said, _) in zip(IMAGES, draws, strict=True)
    ]
    (tmp_path / "pope.jsonl").write_text(
        "".join(json.dumps(row | {"index": row["question_id"]}) + "\n" for row in rows)
    )
    lines = [f"{i}.png,What is {i}?,red,blue,{letter},choice" for i, (_, letter) in zip(IMAGES, draws, strict=True)]
    (tmp_path / "own table.csv").write_text("\n".join(["image,question,A,B,answer,metric", *lines]))
    common = {"image_root": str(data_folder), "max_new_tokens": 3, "baselines": True}
    recipe_content["evaluation"] = [
        recipe_content["evaluation"],
        {"task": "pope", "data": str(tmp_path / "pope.jsonl"), **common},
        {"task": str(tmp_path / "own table.csv"), "name": "Our choices", **common, "baselines": False},
    ]
    recipe_content["stages"] = {"instruct": recipe_content["stages"]["instruct"]}
    return recipe_content


@pytest.mark.slow
def test_every_task_of_a_recipe_is_reported(recipe, run_recipe, tmp_path, capsys):
    asked = {"validation": 2, "pope": 4}
    run = run_recipe(recipe, tmp_path / "run", eval_steps=6, eval_questions=asked, max_steps=6, epochs=None)
    summary, record = (json.loads((run / f"{name}.json").read_text()) for name in ("summary", "record"))
    assert [entry["name"] for entry in summary["evaluations"]] == ["validation", "pope", "Our choices"]
    main_entry, pope, own = summary["evaluations"]
    assert main_entry["value"] == 100 * summary["accuracy_after"] and main_entry["num_questions"] == 6
    assert (pope["task"], pope["protocol"], pope["headline"]) == ("pope", "llava", "f1")
    assert pope["low"] <= pope["value"] <= pope["high"] and {"before", "blind"} <= pope.keys()
    assert (own["headline"], own["task"]) == ("score", "own table") and not {"before", "blind"} & own.keys()
    for entry in summary["evaluations"]:
        assert entry["failed"] == entry["missing"] == 0 and entry["cut"] >= 0
        assert (run / entry["predictions"]).is_file() and entry["browser"].endswith(".html")
        page = (run / entry["predictions"]).with_suffix(".html")
        assert str(page) == entry["browser"] and page.is_file()
    card = (run / "export" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    results = front["model-index"][0]["results"]
    datasets = [result["dataset"] for result in results]
    assert {"name": "POPE, COCO", "type": "lmms-lab/POPE"} in datasets
    assert {"name": "own table.csv", "type": "our-choices"} in datasets
    assert [len(result["metrics"]) for result in results] == [3, 4, 1]
    (headline,) = [
        metric
        for result in results
        for metric in result["metrics"]
        if result["dataset"]["name"] == "POPE, COCO" and metric["args"]["protocol"] == "llava"
    ]
    assert headline["type"] == "f1" and headline["value"] == round(pope["value"], 3)
    answers = (run / "export" / headline["args"]["predictions"]).read_bytes()
    assert hashlib.sha256(answers).hexdigest() == headline["args"]["predictions_sha256"]
    assert "## Other evaluations" in card and "Prompt of POPE, COCO" in card and str(tmp_path) not in card
    log = json.loads((run / "stages/1-instruct/final/stage.json").read_text())["validation_metrics"]
    assert {"eval_accuracy", "eval_pope_accuracy", "eval_pope_f1", "eval_pope_unanswered"} <= log.keys()
    told = capsys.readouterr().err
    assert "pope accuracy" in told and "Our choices: score" in told and f"pope: f1 {pope['value']:.1f} (" in told
    assert len((run / "stages/1-instruct/evaluation/pope/step-6.jsonl").read_text().splitlines()) == 4
    assert record["tasks"][0]["predictions"]["file"] == "predictions-pope.jsonl"
    assert main(["export", str(run)]) == 0
    assert (run / "export" / "README.md").read_text() == card
    # scored again by `score`
    options = ["--task", "pope", "--annotations", str(tmp_path / "pope.jsonl"), "--protocol", "llava", "--json"]
    capsys.readouterr()
    assert main(["score", str(run / "predictions-pope.jsonl"), *options]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["f1"] == pytest.approx(pope["value"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "popo"}, "no task is named 'popo'"),
        ({"task": "nowhere.yaml"}, "evaluation.1.task: "),
        ({"data": "nowhere.jsonl"}, "evaluation.1.data: "),
        ({"preset": "vlmevalkit", "task": "scienceqa-img"}, "these are not questions of scienceqa-img"),
        ({"limit": 1}, "the blind baseline needs at least two images"),
    ],
)
def test_tasks_that_cannot_be_asked_stop_a_run_before_training(recipe, tmp_path, capsys, change, message):
    recipe["evaluation"][1] |= change
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["train", str(path), "--output", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("stages/*/checkpoint-*"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "evaluation: List should have at least 1 item"),
        ({"limit": 3}, "evaluation: there are no questions (fix: give data, a file of questions)"),
        ([{"task": "pope", "dta": 1}], "evaluation.0.dta: unknown key (fix: did you mean data?)"),
        ([{"task": "pope"}, {"task": "POPE"}], "two evaluations are called 'POPE'"),
        (
            [{"data": "a"}, {"data": "b", "name": "b"}],
            "two evaluations have no task (fix: give one of them task: textvqa)",
        ),
        ({"data": "a", "preset": "vlmevalkit"}, "vlmevalkit's prompt for TextVQA is that of card"),
    ],
)
def test_evaluations_that_make_no_sense_are_refused(pristine_recipe, tmp_path, value, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**pristine_recipe, "evaluation": value}))
    with pytest.raises(UserError) as caught:
        load_recipe(str(path))
    assert message in str(caught.value)


def test_questions_while_training_are_of_evaluations_that_there_are(pristine_recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(pristine_recipe))
    asking = ["stages.instruct.eval_steps=2", "stages.instruct.eval_questions={mme: 3}"]
    with pytest.raises(UserError) as caught:
        load_recipe(str(path), overrides=asking)
    assert "stage instruct has eval_questions of 'mme' (fix: name evaluations: validation)" in str(caught.value)
