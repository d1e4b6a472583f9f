"""Whole runs of small recipes, in this process and in real ones: stages, hand-over, resume, refusals."""

import hashlib
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_llama31 import LlavaLlama31ForConditionalGeneration
from llava_llama31.trainer.checkpoint.atomic_folders import load_tree
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.export.dialects import native_name
from llava_llama31.trainer.publishing.gate import check_folder
from llava_llama31.trainer.training.llava_trainer import LlavaTrainer, _assert_autocast


@pytest.fixture
def train(tmp_path, recipe_content):
    """Write a recipe, run it with the command line, return exit code and run folder."""

    def run(content=None, *, output="run", overrides=()):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content or recipe_content, sort_keys=False))
        folder = tmp_path / output
        sets = [argument for override in overrides for argument in ("--set", override)]
        return main(["train", str(path), "--output", str(folder), *sets]), folder

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.whole_finish
def test_a_recipe_trains_hands_over_scores_and_exports(train, base_folder, recipe_content, capsys):
    recipe_content["stages"]["instruct"]["weight_decay"] = 0.1
    code, run = train()
    assert code == 0
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["stages"]) == ["projector", "instruct"]
    for stage in summary["stages"].values():
        assert stage["steps"] == 6 and stage["loss"] > 0 and stage["supervised_tokens"] > 0
    assert summary["num_questions"] == 6
    for key in ("accuracy_before", "accuracy_after", "accuracy_blind"):
        assert 0 <= summary[key] <= 1
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert {row["question_id"] for row in rows} == {1, 2, 3, 5, 6, 7} and all("answer" in row for row in rows)
    assert (run / "export" / "README.md").read_text().startswith("---\n")
    assert summary["browser"] == str(run / "predictions.html") and (run / "predictions.html").is_file()

    groups = load_tree(run / "stages/2-instruct/checkpoint-6/optimizer")["optimizer"]["param_groups"]
    assert {(group["initial_lr"], group["weight_decay"]) for group in groups} == {
        (1e-3, 0.1),
        (1e-3, 0.0),
        (2e-3, 0.1),
        (2e-3, 0.0),
    }
    assert "optimizer and schedule are fresh" in capsys.readouterr().err

    base, first, second = (
        weights(base_folder),
        weights(run / "stages/1-projector/final"),
        weights(run / "stages/2-instruct/final"),
    )
    moved = {name for name in base if not torch.equal(base[name], first[name])}
    assert moved == {name for name in base if "projector" in name or name == "model.image_newline"}
    moved = {name for name in base if not torch.equal(first[name], second[name])}
    assert moved and not any("vision_tower" in name for name in moved)
    assert {"lm_head.weight", "model.image_newline", "model.language_model.norm.weight"} <= moved
    exported = {native_name(name, "clip_vision_model"): tensor for name, tensor in weights(run / "export").items()}
    assert exported.keys() == second.keys() and all(torch.equal(exported[name], second[name]) for name in second)
    names = {path.name for path in (run / "export").rglob("*")}
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in names)
    assert_card_of_the_run(run)


def assert_card_of_the_run(run: Path) -> None:
    """Images and answers that the card names are there, and what a person writes into it stays."""
    record, export = json.loads((run / "record.json").read_text()), run / "export"
    card = (export / "README.md").read_text()
    for number, stage in enumerate(record["stages"], start=1):
        assert [step for step, _ in stage["loss_curve"]] == [1, 2, 3, 4, 5, 6]
        assert stage["curve_image"] == f"curves/{number}-{stage['name']}.png" and stage["curve_image"] in card
        with Image.open(export / stage["curve_image"]) as curve:
            assert curve.format == "PNG" and curve.size == (1280, 640)
    answers = (export / "predictions.jsonl").read_bytes()
    assert record["evaluation"]["predictions"]["sha256"] == hashlib.sha256(answers).hexdigest()
    assert answers == (run / "predictions.jsonl").read_bytes() and len(record["samples"]) == 6
    assert all(sample["accuracy"] == 0 and sample["image"] in card for sample in record["samples"])
    assert record["commit"] in card and record["lock"]["sha256"] in card and "- energy (the recipe" in card
    (export / "README.md").write_text(card.replace("- set: ", "- my set: "))
    assert main(["export", str(run)]) == 0
    assert (export / "README.md").read_text() == card.replace("- set: ", "- my set: ")
    assert (export / "preprocessor_config.json").is_file() and (export / "reference.json").is_file()
    assert main(["export", str(run), "--dialect", "native"]) == 0
    assert not (run / "export-native" / "preprocessor_config.json").exists()
    assert check_folder(run / "export-native", "test") == check_folder(export, "test")


@pytest.fixture
def finished(finished_run, recipe_content, tmp_path) -> Path:
    """A copy of the finished run, where `train` runs its recipe again."""
    del recipe_content["evaluation"]
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def test_a_finished_run_says_so_and_a_changed_recipe_is_refused(train, finished, recipe_content, capsys):
    assert train()[0] == 0
    assert "test has already finished" in capsys.readouterr().err
    recipe_content["stages"]["instruct"]["epochs"] = 2
    assert train(recipe_content)[0] == 2
    error = capsys.readouterr().err
    assert "stages.instruct.epochs: 1.0 -> 2.0" in error and "Traceback" not in error


def assert_same_training(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], base: dict[str, torch.Tensor]):
    """Equal but for rounding, which Adam magnifies where a gradient is all but zero: 0.1 % of the way trained."""
    assert one.keys() == two.keys()
    moved = sum((one[name] - base[name]).square().sum() for name in one).sqrt()
    apart = sum((one[name] - two[name]).square().sum() for name in one).sqrt()
    assert moved > 0.1 and apart < 1e-3 * moved


def state(run: Path, stage: str) -> dict[str, torch.Tensor]:
    """Weights, and the optimizer's tensors of the newest checkpoint, of a stage."""
    newest = max((run / "stages" / stage).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return weights(run / "stages" / stage / "final") | load_file(newest / "optimizer.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(train, recipe_content, base_folder, lora):
    from llava_llama31.trainer.fault_tolerance.stage_guard import StopRequests

    del recipe_content["evaluation"]
    recipe_content["stages"]["instruct"] |= {
        "packing": False,
        "group_by_length": True,
        "epochs": 2,
        "dataloader_workers": 1,
    }
    if lora:
        recipe_content["stages"]["instruct"]["lora"] = {"r": 4, "alpha": 8.0, "dropout": 0.1}
        del recipe_content["stages"]["projector"]
    assert train(output="whole")[0] == 0

    # Ctrl-C three times in the first stage and once in the second
    with pytest.MonkeyPatch.context() as patch:
        for stop_at in (4,) if lora else (1, 3, 5, 4):

            def on_step_begin(self, args, state, control, _stop=stop_at, **kwargs):
                if state.global_step == _stop - 1:
                    signal.raise_signal(signal.SIGINT)

            with patch.context() as one:
                one.setattr(StopRequests, "on_step_begin", on_step_begin)
                code, run = train(output="stopped")
            assert code == 75, stop_at
        code, run = train(output="stopped")
    assert code == 0
    stages = ["1-instruct"] if lora else ["1-projector", "2-instruct"]
    final = run / "stages" / stages[-1] / "final"
    assert weights(final).keys() == weights(base_folder).keys()  # adapters are merged
    assert (final / "adapter/adapter_model.safetensors").is_file() == lora
    for stage in stages:
        assert_same(state(run.parent / "whole", stage), state(run, stage))


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [1, 8])
def test_accumulation_does_not_change_the_weights(train, recipe_content, base_folder, finished_run, micro_batch):
    """Those of the run that all tests share, whose steps take two micro-batches of 4."""
    del recipe_content["evaluation"]
    assert {stage["micro_batch"] for stage in recipe_content["stages"].values()} == {4}
    code, run = train(overrides=[f"stages.{stage}.micro_batch={micro_batch}" for stage in recipe_content["stages"]])
    assert code == 0
    four, other = (weights(folder / "stages/2-instruct/final") for folder in (finished_run, run))
    assert_same_training(four, other, weights(base_folder))


@pytest.mark.slow
def test_padded_rows_ask_for_supervised_positions_only(train, recipe_content, monkeypatch):
    del recipe_content["evaluation"]
    recipe_content["stages"] = {"only": recipe_content["stages"]["instruct"] | {"packing": False, "save_steps": 99}}
    forward, supervised = LlavaLlama31ForConditionalGeneration._forward_supervised, []

    def counted(model, arguments, labels, *others):
        output = forward(model, arguments, labels, *others)
        supervised.append(output.logits.shape[0] == int((labels[:, 1:] != -100).sum()))
        return output

    monkeypatch.setattr(LlavaLlama31ForConditionalGeneration, "_forward_supervised", counted)
    assert train()[0] == 0
    assert supervised == [True] * 11  # the 44 rows in micro-batches of 4


@pytest.mark.slow
def test_packing_does_not_change_the_weights_and_keeps_within_its_limit(train, recipe_content, base_folder, capsys):
    del recipe_content["evaluation"]
    stages = recipe_content["stages"].values()
    for stage in stages:
        stage["share_prefix"] = 1  # sharing brings other samples together
    ends, history = {}, {}
    for packing in (True, False):
        for stage in stages:
            stage["packing"] = packing
        code, run = train(output=str(packing))
        assert code == 0
        ends[packing] = weights(run / "stages/2-instruct/final")
        state = max((run / "stages/2-instruct").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        history[packing] = json.loads((state / "trainer_state.json").read_text())["log_history"]
    assert_same_training(ends[True], ends[False], weights(base_folder))
    for packed, padded in zip(history[True], history[False], strict=True):
        assert packed["padding"] == 0 < padded["padding"] and packed["mfu"] > 0
        assert packed["samples_per_second"] > 0 and packed["tokens_per_second"] > 0 and 0 <= packed["data_wait"] < 1

    for stage in stages:
        stage.update(packing=True, max_row_tokens=180, micro_batch=1, batch_by="supervised_tokens")
    code, run = train(output="limited")
    assert code == 0
    record = json.loads((run / "stages/2-instruct/final/stage.json").read_text())
    assert record["micro_batch"] in (2, 4)
    for stage in stages:
        stage["max_row_tokens"] = 20
    assert train(output="short")[0] == 2
    assert "too_long" in capsys.readouterr().err


def test_a_step_outside_autocast_is_noticed():
    with pytest.raises(AssertionError, match="float32 and not in bfloat16"):
        _assert_autocast(torch.nn.Identity(), (torch.zeros(1),))
    with torch.autocast("cpu", torch.bfloat16):
        _assert_autocast(torch.nn.Identity(), (torch.zeros(1),))


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.usefixtures("fast_bfloat16")
def test_bfloat16_keeps_frozen_weights_bit_by_bit(train, recipe_content, base_folder, tmp_path, rounded):
    start = tmp_path / "start"
    shutil.copytree(base_folder, start)
    base = {name: tensor.bfloat16().float() if rounded else tensor for name, tensor in weights(base_folder).items()}
    save_file(base, start / "model.safetensors", metadata={"format": "pt"})
    del recipe_content["evaluation"]
    recipe_content["model"]["checkpoint"] = str(start)
    for stage in recipe_content["stages"].values():
        stage |= {"precision": "bfloat16", "validation_fraction": 0.1}
    code, run = train()
    assert code == 0
    first = weights(run / "stages/1-projector/final")
    frozen = "model.language_model.layers.0.mlp.up_proj.weight"
    assert first[frozen].dtype == (torch.bfloat16 if rounded else torch.float32)
    assert torch.equal(first[frozen].float(), base[frozen])
    end = weights(run / "stages/2-instruct/final")
    assert all(torch.equal(end[name].float(), base[name]) for name in base if "vision_tower" in name)
    trained = end["model.multi_modal_projector.linear_1.weight"]
    assert trained.dtype == torch.float32 and not torch.equal(trained.bfloat16().float(), trained)


@pytest.fixture
def recipe_file(tmp_path, recipe_content):
    del recipe_content["evaluation"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_content, sort_keys=False))
    return path


BAD = [
    (["no-such-recipe"], "no-such-recipe: there is no such recipe"),
    (["RECIPE", "--set", "stages.projector.lerning_rate=1"], "stages.projector.lerning_rate: unknown key"),
    (["RECIPE", "--set", "stages.projector.data.0.path=gone.json"], "gone.json"),
    (["RECIPE", "--set", "model.checkpoint=nowhere"], "nowhere does not exist"),
    (["RECIPE", "--set", "stages.projector.micro_batch=3"], "not a multiple of micro_batch 3"),
    (["RECIPE", "--set", "stages.projector.trainer_args={learning_rate: 1.0}"], "set learning_rate instead"),
    (["RECIPE", "--set", "stages.projector.trainer_args={optimm: adafactor}"], "did you mean optim?"),
    (["RECIPE", "--set", "stages.instruct.init_from=/dev/null"], "/dev/null"),
    (["RECIPE", "--set", "evaluation.data=gone.jsonl"], "gone.jsonl"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(recipe_file, tmp_path, capsys, arguments, message):
    given = [str(recipe_file) if argument == "RECIPE" else argument for argument in arguments]
    assert main(["train", *given, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error and "(fix: " in error


@pytest.mark.slow
def test_the_last_loss_is_the_last_log_entry(train, recipe_content, capsys):
    """On the card, in the final table, and on the card of a run whose record is of an earlier version."""
    recipe_content["stages"] = {"one": recipe_content["stages"]["projector"]}
    recipe_content["evaluation"]["baselines"] = False
    code, run = train()
    shown = capsys.readouterr().err
    record = json.loads((run / "record.json").read_text())
    [stage] = record["stages"]
    first, last = stage["loss_curve"][0][1], stage["loss_curve"][-1][1]
    assert code == 0 and len({loss for _, loss in stage["loss_curve"]}) == 6
    assert (stage["loss_first"], stage["loss"]) == (first, last)
    [header, units, _] = shown[shown.index("logged loss,") :].splitlines()[:3]
    assert header.split()[2:] == ["supervised", "supervised"] and "first -> last" in units and "tokens/s" in units
    assert f"{first:.3f} -> {last:.3f}" in shown
    card = (run / "export" / "README.md").read_text()
    assert "training loss, first log entry" in card and "training loss, last log entry" in card
    stage["loss"] = 77.0
    (run / "record.json").write_text(json.dumps(record))
    assert main(["export", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'export'}\n"  # the result, which a script may use
    assert (run / "export" / "README.md").read_text() == card


@pytest.mark.slow
@pytest.mark.usefixtures("fast_bfloat16")
def test_a_stage_killed_between_its_last_checkpoint_and_its_end_is_finished(train, recipe_content):
    del recipe_content["evaluation"]
    for stage in recipe_content["stages"].values():
        stage |= {"precision": "bfloat16", "validation_fraction": 0.2, "logging_steps": 4}
    code, run = train()
    assert code == 0
    final = run / "stages/2-instruct/final"
    before, weights_before = json.loads((final / "stage.json").read_text()), weights(final)
    assert before["validation_loss"] > 0 and before["num_samples"] == 36 and before["loss"] > 0
    shutil.rmtree(final)
    (run / "summary.json").unlink()
    code, _ = train()
    assert code == 0
    after = json.loads((final / "stage.json").read_text())
    assert_same(weights_before, weights(final))
    for key in ("validation_loss", "loss", "supervised_tokens", "steps"):
        assert after[key] == before[key], key


def test_a_finished_run_leaves_alone_what_other_commands_stage_in_its_folder(train, finished, capsys):
    (finished / ".staging-export").mkdir()
    (finished / ".staging-elapsed.json").write_text("{")
    assert train()[0] == 0 and "has already finished" in capsys.readouterr().err
    assert (finished / ".staging-export").is_dir() and not (finished / ".staging-elapsed.json").exists()


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_set_aside(train, finished, finished_run, capsys):
    shutil.rmtree(finished / "stages/2-instruct/final")
    (finished / "summary.json").unlink()
    newest = finished / "stages/2-instruct/checkpoint-6/optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert train()[0] == 0
    assert "optimizer.safetensors is" in capsys.readouterr().err
    assert (finished / "stages/2-instruct/damaged-checkpoint-6").is_dir()
    assert_same(state(finished_run, "2-instruct"), state(finished, "2-instruct"))


def test_a_record_without_supervised_tokens_stops_the_run_before_its_first_step(
    train, recipe_content, tmp_path, capsys
):
    rows = [
        {"id": "good", "conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]},
        {"id": "mute", "conversations": [{"from": "human", "value": "a?"}]},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    recipe_content["stages"]["instruct"]["data"] = [{"name": "rows", "path": str(tmp_path / "rows.json")}]
    code, run = train()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and "no_supervised_token 1 (mute)" in error
    assert not list(run.glob("stages/*/checkpoint-*"))


def test_a_run_names_the_fields_that_it_does_not_read(train, recipe_content, tmp_path, capsys):
    talk = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"id": "x", "licence": "mit", "conversations": talk}]))
    (tmp_path / "mute.json").write_text(json.dumps([{"id": "x", "conversations": talk[:1]}]))
    for stage, name in (("projector", "rows"), ("instruct", "mute")):
        recipe_content["stages"][stage]["data"] = [{"name": name, "path": str(tmp_path / f"{name}.json")}]
    code, _ = train()  # which ends before its first step
    assert code == 2
    assert "stages.projector: rows: not read: licence 1 record\n" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "a tensor is missing"])
def test_an_unreadable_checkpoint_is_one_line(train, recipe_content, base_folder, tmp_path, damage, capsys):
    start = tmp_path / "start"
    shutil.copytree(base_folder, start)
    file = start / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        kept = {name: tensor for name, tensor in weights(base_folder).items() if name != "lm_head.weight"}
        save_file(kept, file, metadata={"format": "pt"})
    recipe_content["model"]["checkpoint"] = str(start)
    assert train()[0] == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and str(start) in error and "(fix: " in error
    assert "lm_head.weight" in error or damage == "truncated"


@pytest.mark.slow
def test_a_faulty_first_try_does_not_bind_the_folder(train, recipe_content):
    good = recipe_content["stages"]["instruct"]["data"][0]["path"]
    assert train(overrides=["stages.instruct.data.0.path=gone.json"])[0] == 2
    assert train(overrides=[f"stages.instruct.data.0.path={good}"])[0] == 0


def test_ddp_takes_gradients_for_its_buckets(recipe_content, run_recipe, tmp_path, monkeypatch):
    """Running engines are asked in `make torture`."""
    found, original = [], LlavaTrainer.get_train_dataloader

    def noted(self):
        found.append(self.accelerator.ddp_handler.gradient_as_bucket_view)
        return original(self)

    monkeypatch.setattr(LlavaTrainer, "get_train_dataloader", noted)
    del recipe_content["evaluation"], recipe_content["stages"]["instruct"]
    run_recipe(recipe_content, tmp_path / "run", epochs=None, max_steps=1)
    assert found == [True]
