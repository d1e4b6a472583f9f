"""Loss by source: a partition of the loss, however rows are packed, accumulated and spread."""

import copy
import json

import pytest
import torch

from llava_llama31 import LlavaLlama31ForConditionalGeneration
from llava_llama31.trainer.recipes.schema import Stage
from llava_llama31.trainer.report.run_facts import entries
from llava_llama31.trainer.training.plateau import is_flat
from llava_llama31.trainer.training.source_losses import SourceLosses, nested


CPU = torch.device("cpu")
NAMES = ["wide", "other", "none"]


def rows_of_sources(samples):
    return [sample._replace(source=0 if sample.images[:1] == ("wide",) else 1) for sample in samples]


def read(model, batches):
    """What one step over these micro-batches logs, and the model's own sum of losses."""
    sources, total = SourceLosses(NAMES, CPU), 0.0
    for batch in batches:
        inputs = sources.ask(dict(batch), torch.float64)
        if "packing" not in inputs:
            inputs["supervised_only"] = True
        total += model(**inputs, num_items_in_batch=1).loss.item()
    sources.keep(taken=True)
    return sources.read(), total


@pytest.fixture
def exact(tiny_config):
    torch.manual_seed(0)
    return LlavaLlama31ForConditionalGeneration(tiny_config, packable=True).double()


@pytest.mark.parametrize("parts", [1, 4], ids=["one batch", "accumulated"])
@pytest.mark.parametrize(
    "options",
    [{}, {"packed": True}, {"packed": True, "share_prefix": True, "multiple_of": 64}],
    ids=["padded", "packed", "shared"],
)
def test_sources_add_up_to_the_loss_and_are_those_of_each_source_alone(exact, samples, collate, options, parts):
    rows = rows_of_sources(samples)
    batches = [collate(rows[i::parts], with_sources=True, **options) for i in range(parts)]
    logs, total = read(exact, batches)
    found = nested(logs)["loss_by_source"]
    tokens = {name: values["tokens"] for name, values in found.items()}
    assert list(found) == ["wide", "other"] and sum(tokens.values()) == sum(
        sum(label != -100 for label in row.labels) for row in rows
    )
    weighted = sum(values["loss"] * values["tokens"] for values in found.values())
    assert weighted == pytest.approx(total, rel=1e-12)
    assert weighted / sum(tokens.values()) == pytest.approx(logs["token_loss"], rel=1e-12)
    for number, name in enumerate(["wide", "other"]):
        own = [row for row in rows if row.source == number]
        alone = [exact(**collate([row]), supervised_only=True) for row in own]
        labels = [torch.tensor([label for label in row.labels if label != -100]) for row in own]
        hits = sum(int((o.logits.argmax(dim=1) == target).sum()) for o, target in zip(alone, labels, strict=True))
        losses = sum(o.loss.item() * len(target) for o, target in zip(alone, labels, strict=True))
        assert found[name]["loss"] == pytest.approx(losses / tokens[name], rel=1e-12)
        assert found[name]["accuracy"] == hits / tokens[name]


def test_a_skipped_step_counts_in_no_source_and_a_row_without_loss_counts_nothing(exact, samples, collate):
    sources = SourceLosses(NAMES, CPU)
    batch = collate(rows_of_sources(samples), packed=True, with_sources=True)
    exact(**sources.ask(dict(batch), torch.float64), num_items_in_batch=1)
    sources.keep(taken=False)
    assert sources.read() == {}
    silent = [sample._replace(labels=[-100] * len(sample.labels)) for sample in samples]
    inputs = sources.ask(collate(silent, packed=True, with_sources=True), torch.float64)
    assert "token_scores" not in inputs
    exact(**inputs, num_items_in_batch=1)
    sources.keep(taken=True)
    assert sources.read() == {}


def test_scores_do_not_change_the_loss_and_have_no_place_elsewhere(tiny_model, samples, collate):
    single = [s._replace(pixel_values=None if s.pixel_values is None else s.pixel_values.float()) for s in samples]
    batch = collate(single, packed=True)
    scores = torch.zeros(2, len(batch["supervised_positions"]))
    assert torch.equal(tiny_model(**batch, token_scores=scores).loss, tiny_model(**batch).loss)
    assert scores[0].min() > 0 and set(scores[1].tolist()) <= {0.0, 1.0}
    with pytest.raises(ValueError, match="token_scores"):
        tiny_model(**collate(single), token_scores=scores)


@pytest.fixture
def two_sources(recipe_content, data_folder, tmp_path):
    """The recipe's first stage on two files."""
    rows = json.loads((data_folder / "rows.json").read_text())
    stage = copy.deepcopy(recipe_content["stages"]["instruct"])
    stage["data"] = []
    for name, part in (
        ("images", [r for r in rows if "image" in r]),
        ("texts", [r for r in rows if "image" not in r]),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
        stage["data"].append({"name": name, "path": str(tmp_path / f"{name}.json"), "image_root": str(data_folder)})
    recipe_content["stages"] = {"instruct": stage | {"max_steps": 4, "epochs": None}}
    del recipe_content["evaluation"]
    return recipe_content


@pytest.mark.slow
def test_a_run_tells_them_in_log_record_summary_and_card(two_sources, tmp_path, run_recipe):
    keys = {"micro_batch": 2, "validation_fraction": 0.2, "eval_steps": 2}
    run = run_recipe(two_sources, tmp_path / "run", **keys)
    log = [entry for entry in entries(run / "log.jsonl") if "loss_by_source" in entry]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    for entry in log:
        found = entry["loss_by_source"].values()
        tokens = sum(source["tokens"] for source in found)
        assert sum(s["loss"] * s["tokens"] for s in found) / tokens == pytest.approx(entry["token_loss"], rel=1e-12)
        assert entry["token_loss"] == pytest.approx(entry["loss"], rel=1e-5)  # one step; the logged one is float32
    evaluated = [entry for entry in entries(run / "log.jsonl") if "eval_loss" in entry]
    for entry in evaluated:
        assert set(entry["eval_loss_by_source"]) == {"images", "texts"}
        assert entry["eval_token_loss"] == pytest.approx(entry["eval_loss"], rel=1e-5)
    stage = json.loads(next(run.glob("stages/*/final/stage.json")).read_text())
    assert stage["loss_by_source"]["texts"] == {
        "loss_first": log[0]["loss_by_source"]["texts"]["loss"], **log[-1]["loss_by_source"]["texts"]
    }  # fmt: skip
    assert set(stage["validation_by_source"]) == {"images", "texts"}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["stages"]["instruct"]["loss_by_source"] == stage["loss_by_source"]
    card = (run / "export" / "README.md").read_text()
    assert "loss and accuracy on texts, last log entry" in card and "; validation " in card


@pytest.mark.slow
def test_a_stage_ends_on_a_plateau_of_its_validation_loss(two_sources, tmp_path, run_recipe):
    """At a learning rate that is far too high, the loss only rises after the first evaluations."""
    keys = {"validation_fraction": 0.2, "eval_steps": 1, "save_steps": 1, "stop_on_plateau": 2, "max_steps": 30}
    run = run_recipe(two_sources, tmp_path / "run", **keys, learning_rate=0.3, schedule="constant", warmup_ratio=0.0)
    losses = [entry["eval_loss"] for entry in entries(run / "log.jsonl") if "eval_loss" in entry]
    stage = json.loads(next(run.glob("stages/*/final/stage.json")).read_text())
    best = losses.index(min(losses))
    assert stage["steps"] == best + 3 < 30
    assert min(losses[best + 1 : best + 3]) >= losses[best]


def test_a_plateau_is_judged_from_the_log_alone(two_sources):
    fields = next(iter(two_sources["stages"].values()))
    stage = Stage.model_validate({**fields, "validation_fraction": 0.2, "eval_steps": 1, "stop_on_plateau": 2})
    logged = [{"loss": 9.0}, *({"eval_loss": value} for value in (3.0, 2.0, 2.5, 2.0))]
    assert [is_flat(logged[:n], stage) for n in range(1, 6)] == [False, False, False, False, True]
    with pytest.raises(ValueError, match="stop_on_plateau"):
        Stage.model_validate({**fields, "stop_on_plateau": 2})
