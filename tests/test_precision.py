"""A CPU that emulates bfloat16: found in milliseconds; runs train in float32 there, also after a resume."""

import json
import os
import platform
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.costs import matrix_peak
from llava_llama31.trainer.costs.matrix_peak import CpuSpeed, measure_cpu_speed, measure_matrix_peak
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation import precision as answering
from llava_llama31.trainer.evaluation.precision import answers_in_float32
from llava_llama31.trainer.model.opening import open_model
from llava_llama31.trainer.recipes.schema import Recipe
from llava_llama31.trainer.runs import final_evaluation
from llava_llama31.trainer.runs import run as runs
from llava_llama31.trainer.runs.precision import at_precision, settle_precision


SLOW, FAST = CpuSpeed(2e9, 76e9, "x86_64, AVX2"), CpuSpeed(240e9, 76e9, "x86_64, AVX512, AVX512-BF16")
SAID = "on a core of this CPU (x86_64, AVX2) bfloat16 products reach 2 GFLOP/s, float32 products 76"
TIMED = """
import json, time, torch
from llava_llama31.trainer.costs.matrix_peak import measure_cpu_speed
started = time.process_time()
speed = measure_cpu_speed()
print(json.dumps([time.process_time() - started, speed.is_slow_in_bfloat16, speed.instructions]))
"""


def never() -> CpuSpeed:
    raise AssertionError("measured, though nothing depends on it")


@pytest.fixture
def recipe_of(recipe_content):
    """A recipe whose stages have these precisions; None leaves the key out."""

    def recipe(projector: str | None, instruct: str | None) -> Recipe:
        for name, precision in (("projector", projector), ("instruct", instruct)):
            recipe_content["stages"][name].pop("precision", None)
            if precision is not None:
                recipe_content["stages"][name]["precision"] = precision
        return Recipe.model_validate(recipe_content)

    return recipe


@pytest.fixture
def settle(tmp_path):
    """Settle in a folder, on a CPU; returns the precisions and what was said."""

    def settled(recipe, measure, *, on_cpu=True):
        said = []
        return settle_precision(recipe, RunFolder(tmp_path), on_cpu=on_cpu, say=said.append, measure=measure), said

    return settled


def begin(folder):
    (folder / "stages" / "1-projector" / "checkpoint-2").mkdir(parents=True)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variables are those of x86")
def test_emulated_bfloat16_is_found_in_a_moment():
    emulated = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", TIMED], env=emulated, capture_output=True, text=True, check=True)
    seconds, is_slow, instructions = json.loads(done.stdout.splitlines()[-1])
    assert is_slow and instructions == "x86_64, AVX2" and seconds < 3  # CPU seconds of all cores
    assert platform.machine() in measure_cpu_speed().instructions


@pytest.fixture
def products(monkeypatch):
    """Matrix products on a CPU of these FLOP/s, by a clock that they alone move; lists (type, m, k, n)."""
    done, now = [], [0.0]
    speeds = {torch.bfloat16: 1.3e9, torch.float32: 76e9}

    def mm(left, right, *, out):
        done.append((left.dtype, *left.shape, right.shape[1]))
        now[0] += 2 * left.shape[0] * left.shape[1] * right.shape[1] / speeds[left.dtype]

    monkeypatch.setattr(matrix_peak.torch, "mm", mm)
    return done, lambda: now[0], speeds


def test_the_matrix_peak_is_bounded_in_time_where_products_are_slow(products):
    done, clock, speeds = products
    assert measure_matrix_peak(torch.bfloat16, "cpu", clock=clock) == pytest.approx(1.3e9)
    assert set(done) == {(torch.bfloat16, 256, 256, 256)}  # four of the next size would take 7 seconds
    assert clock() < 0.4
    for speed, sizes in ((76e9, {256, 1024}), (1e12, {256, 1024, 2048})):
        speeds[torch.float32], spent = speed, clock()
        done.clear()
        assert measure_matrix_peak(torch.float32, "cpu", clock=clock) == pytest.approx(speed)
        assert {m for _, m, _, _ in done} == sizes and clock() - spent < 0.8
    # slower than any CPU is: still no more than the least number of repeats of the first size
    speeds[torch.bfloat16], spent = 1e8, clock()
    measure_matrix_peak(torch.bfloat16, "cpu", clock=clock)
    assert clock() - spent < 2


def test_whether_bfloat16_is_slow_is_measured_in_tenths_of_a_second(products, monkeypatch):
    done, clock, _ = products
    monkeypatch.setattr(matrix_peak.time, "thread_time", clock)
    speed = measure_cpu_speed()
    assert clock() < 0.4 and {shape[1:] for shape in done} == {(256, 256, 256)}
    assert CpuSpeed(speed.bfloat16, speed.float32, "x86_64, AVX2").is_slow_in_bfloat16


def test_a_stage_that_leaves_precision_out_gets_float32_and_one_line_says_so(recipe_of, settle, tmp_path):
    settled, said = settle(recipe_of(None, None), lambda: SLOW)
    assert settled == {"projector": "float32", "instruct": "float32"}
    assert said == [f"stages projector, instruct compute in float32: {SAID}"]
    assert json.loads((tmp_path / "precision.json").read_text()) == settled
    recipe = at_precision(recipe_of(None, None), settled)
    assert {stage.precision for stage in recipe.stages.values()} == {"float32"}


def test_a_fast_cpu_and_a_gpu_compute_as_the_recipe_says(recipe_of, settle):
    expected = {"projector": "bfloat16", "instruct": "bfloat16-weights"}
    assert settle(recipe_of(None, "bfloat16-weights"), lambda: FAST) == (expected, [])
    assert settle(recipe_of(None, "bfloat16-weights"), never, on_cpu=False) == (expected, [])
    everywhere = {"projector": "float32", "instruct": "float32"}
    assert settle(recipe_of("float32", "float32"), never) == (everywhere, [])


@pytest.mark.parametrize("precision", ["bfloat16", "bfloat16-weights"])
def test_a_recipe_that_insists_is_refused_with_a_fix(recipe_of, settle, tmp_path, precision):
    with pytest.raises(UserError) as refused:
        settle(recipe_of("float32", precision), lambda: SLOW)
    assert str(refused.value) == (
        f"stages.instruct.precision: {precision} is emulated here: {SAID} (fix: --set "
        "stages.instruct.precision=float32, or train on a GPU, or a CPU with AVX512-BF16 or AMX)"
    )
    assert not (tmp_path / "precision.json").exists()


@pytest.mark.parametrize(("first", "later"), [(SLOW, FAST), (FAST, SLOW)])
def test_a_run_resumes_as_it_began(recipe_of, settle, tmp_path, first, later):
    began, _ = settle(recipe_of(None, None), lambda: first)
    begin(tmp_path)
    again, said = settle(recipe_of(None, None), lambda: later)
    assert again == began
    assert said == [] if later is FAST else said[0].startswith("warning: stages projector, instruct compute in bf")
    assert settle(recipe_of(None, None), never, on_cpu=False)[0] == began


def test_a_run_of_before_resumes_in_its_recipes_precision(recipe_of, settle, tmp_path):
    begin(tmp_path)
    settled, said = settle(recipe_of(None, "float32"), lambda: SLOW)
    assert settled == {"projector": "bfloat16", "instruct": "float32"}
    assert said[0].startswith("warning: stage projector computes in bfloat16, as this run began")


def test_another_precision_than_the_run_began_with_is_refused(recipe_of, settle, tmp_path):
    settle(recipe_of(None, None), lambda: SLOW)
    begin(tmp_path)
    with pytest.raises(UserError, match="stages.projector.precision: this run began in float32"):
        settle(recipe_of("bfloat16", None), lambda: FAST)


def test_until_the_first_checkpoint_it_is_settled_again(recipe_of, settle):
    assert settle(recipe_of(None, None), lambda: SLOW)[0]["projector"] == "float32"
    assert settle(recipe_of(None, None), lambda: FAST)[0]["projector"] == "bfloat16"


@pytest.mark.slow
def test_a_run_records_the_precision_and_resumes_in_it(recipe_of, recipe_content, run_recipe, tmp_path, monkeypatch):
    recipe_of(None, None)
    del recipe_content["stages"]["instruct"]
    del recipe_content["evaluation"]
    with monkeypatch.context() as slow:
        slow.setattr(runs, "settle_precision", partial(settle_precision, measure=lambda: SLOW))
        run = run_recipe(recipe_content, tmp_path / "run")
    record = json.loads((run / "record.json").read_text())
    assert record["stages"][0]["precision"] == "float32"
    weights = (run / "stages/1-projector/final/model.safetensors").read_bytes()
    (run / "summary.json").unlink()
    for folder in ("final", "checkpoint-6"):
        (run / "stages" / "1-projector" / folder).rename(tmp_path / folder)
    monkeypatch.setattr(runs, "settle_precision", partial(settle_precision, measure=lambda: FAST))
    assert main(["train", str(run.with_suffix(".yaml")), "--output", str(run)]) == 0
    assert (run / "stages/1-projector/final/model.safetensors").read_bytes() == weights


# evaluation


@pytest.fixture
def narrow_folder(base_folder, tmp_path):
    """A model whose file says bfloat16."""
    model, processor = open_model(base_folder, dtype="bfloat16")
    model.save_pretrained(tmp_path / "narrow")
    processor.save_pretrained(tmp_path / "narrow")
    return tmp_path / "narrow"


def test_a_model_answers_in_float32_where_bfloat16_is_emulated(base_folder):
    narrow, wide = (open_model(base_folder, dtype=dtype)[0] for dtype in ("bfloat16", "float32"))
    said = []
    assert answers_in_float32(narrow, said.append, measure=lambda: SLOW)
    assert said == [f"answering in float32: {SAID}"]
    assert not answers_in_float32(narrow, said.append, insists=True, measure=lambda: SLOW)
    assert said[1] == f"warning: answering in bfloat16, and {SAID}"
    assert not answers_in_float32(narrow, said.append, measure=lambda: FAST)
    assert not answers_in_float32(wide, said.append, measure=never) and len(said) == 2


@pytest.mark.parametrize(("options", "dtype"), [([], "float32"), (["--dtype", "bfloat16"], "bfloat16")])
def test_evaluate_answers_in_float32_unless_asked(narrow_folder, data_folder, tmp_path, capsys, options, dtype):
    slow = partial(answers_in_float32, measure=lambda: SLOW)
    out = tmp_path / "out"
    command = ["evaluate", str(narrow_folder), "--data", str(data_folder / "questions.jsonl"), "--output", str(out)]
    with mock.patch.object(answering, "answers_in_float32", slow):
        assert main([*command, "--limit", "2", "--device", "cpu", *options]) == 0
    assert f"answering in {dtype}" in " ".join(capsys.readouterr().err.split())
    assert json.loads((out / "settings.json").read_text())["dtype"] == dtype


class Asked(Exception):
    """The final evaluation was asked for."""


def test_a_runs_final_evaluation_answers_in_float32_from_the_exported_weights(
    base_folder, recipe_content, tmp_path, monkeypatch
):
    model, processor = open_model(base_folder, dtype="bfloat16")
    expected = [tensor.clone() for tensor in model.state_dict().values()]

    def answer_together(asked, *_, processes):
        assert asked is not model
        for tensor, stored in zip(asked.state_dict().values(), expected, strict=True):
            assert tensor.dtype == torch.float32 and torch.equal(tensor, stored.float())
        raise Asked

    monkeypatch.setattr(final_evaluation, "answer_together", answer_together)
    monkeypatch.setattr(final_evaluation, "answers_in_float32", partial(answers_in_float32, measure=lambda: SLOW))
    recipe_content["model"]["dtype"] = "bfloat16"
    said = []
    console = SimpleNamespace(print=said.append)
    recipe = Recipe.model_validate(recipe_content)
    run = SimpleNamespace(recipe=recipe, folder=RunFolder(tmp_path), console=console, num_processes=1, is_main=True)
    sets = final_evaluation.question_sets(recipe)
    with pytest.raises(Asked):
        final_evaluation.ask_all(run, base_folder, sets, model, processor)
    assert said == [f"answering in float32: {SAID}"]
    assert all(torch.equal(*pair) for pair in zip(model.state_dict().values(), expected, strict=True))
