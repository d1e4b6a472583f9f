"""`llava-llama31 plan`: exact where the data was counted, named assumptions where not, and what fits."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.costs.accelerators import ACCELERATORS
from llava_llama31.trainer.costs.memory import ENGINES
from llava_llama31.trainer.planning import fastest as fastest_module
from llava_llama31.trainer.planning import memory_page
from llava_llama31.trainer.planning.fastest import fastest, timed
from llava_llama31.trainer.planning.plan import USABLE, Machine, cases_of
from llava_llama31.trainer.recipes.loading import SHIPPED, load_recipe
from llava_llama31.trainer.recipes.schema import Stage
from llava_llama31.trainer.training import meter as meter_module
from llava_llama31.trainer.training.meter import matrix_peak


def planned(capsys, *arguments: str) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


PHASES = ("forward", "backward", "step", "save")
MEMORY = {"weights", "gradients", "optimizer", "activations", "host", "host_save", "peak", *PHASES}


@pytest.mark.parametrize("arguments", [("--devices", "8", "--device-memory", "80"), ("--device-memory", "141")])
def test_the_cards_recipe_is_planned_without_its_data_and_parts(arguments, capsys):
    plan = planned(capsys, "llama31-8b-card", *arguments)
    assert [stage["name"] for stage in plan["stages"]] == ["projector", "pretrain", "instruct"]
    for stage in plan["stages"]:
        assert set(stage["memory"]) == MEMORY
        assert all(stage[name] > 0 for name in ("steps", "tokens", "tiles", "flops"))
        assert stage["hours"] is None and stage["assumed"]
        assert stage["memory"]["peak"] == max(stage["memory"][name] for name in PHASES)
    total = sum(group["total"] for group in plan["stages"][0]["parameters"].values())
    assert total == 8_355_276_800
    fits = [stage["fits"] for stage in plan["stages"]]
    assert fits == ([True] * 3 if "80" in arguments else [True, False, True])


def test_hours_and_cost_follow_from_a_given_mfu(capsys):
    options = ("--devices", "8", "--mfu", "0.5", "--peak-tflops", "1000", "--price", "2")
    plan = planned(capsys, "llama31-8b", *options)
    stage = plan["stages"][1]
    assert stage["hours"] == pytest.approx(stage["flops"] / (0.5 * 1e15 * 8) / 3600)
    assert stage["cost"] == pytest.approx(stage["hours"] * 16)
    assert plan["hours_from"] == "--mfu 0.5 of --peak-tflops 1000 a device, as given"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
@pytest.mark.parametrize("memory", ["48", "80", "141"])
def test_the_named_setting_fits(engine, memory, capsys):
    options = ("--devices", "8", "--device-memory", memory)
    asked = (*options, "--engine", engine, "--set", "stages.instruct.activation_checkpointing=false")
    stage = planned(capsys, "llama31-8b", *asked)["stages"][2]
    if stage["fits"]:
        assert stage["fix"] is None
        return
    fix = stage["fix"]
    sets = [argument for text in fix["set"] for argument in text.split(" ", 1)]
    again = planned(capsys, "llama31-8b", *asked[:4], "--engine", fix["engine"], *asked[6:], *sets)["stages"][2]
    assert again["fits"] and again["memory"]["peak"] == pytest.approx(fix["peak"], rel=0.02)


@pytest.mark.slow
def test_a_stage_that_nothing_makes_fit_says_so(capsys):
    assert main(["plan", "llama31-8b", "--devices", "1", "--device-memory", "2"]) == 0
    assert "no setting that was tried fits" in capsys.readouterr().out


TIMED = {"micro_batch", "activation_checkpointing", "optimizer", "engine", "lora", "seconds_per_step", "hours", "peak"}
TIMED |= {"set", "accelerate"}


@pytest.mark.slow
def test_a_named_gpu_gives_hours_cost_and_the_fastest_settings(capsys):
    plan = planned(capsys, "llama31-8b", "--devices", "8", "--device", "h100", "--price", "3")
    assert plan["hours"] == pytest.approx(sum(found["hours"] for found in plan["fastest"].values()))
    assert plan["cost"] == pytest.approx(plan["hours"] * 8 * 3)
    assert plan["verdict"].startswith("fits on 8 x h100 in ") and plan["device_memory"] == pytest.approx(84.9, abs=0.1)
    assert set(plan["fastest"]) == {"projector", "pretrain", "instruct"}
    for found in plan["fastest"].values():
        assert set(found) == TIMED and found["lora"] is None
        assert found["peak"] <= USABLE * plan["device_memory"]


def test_the_fastest_is_that_of_an_exhaustive_search(tmp_path):
    """Its own loops over all that a stage can be, over the same model of time and memory."""
    machine = Machine(num_devices=8, device_memory=60e9, price=None)
    recipe = load_recipe("llama31-8b", output=tmp_path, overrides=[])
    case = cases_of(recipe, tmp_path, machine)[2]
    gpu = ACCELERATORS["a100-80"]
    best = (float("inf"), None)
    for size in (1, 2, 4, 8, 16, 32, 64):
        for every in (True, 2, "selective", 3, False):
            for optimizer in ("adamw_bf16", "adamw_8bit", "adamw"):
                for name, file in (
                    ("zero3", "zero3"),
                    ("zero2", "zero2"),
                    ("zero1", "zero1"),
                    ("fsdp2", None),
                    ("ddp", None),
                ):
                    changes = {"micro_batch": size, "activation_checkpointing": every, "optimizer": optimizer}
                    try:
                        stage = Stage.model_validate(case.stage.model_dump() | changes | {"deepspeed": file})
                    except ValidationError:
                        continue
                    found = timed(replace(case, stage=stage, engine=ENGINES[name]), gpu)
                    if found is not None and found.peak <= USABLE * 60e9:
                        best = min(best, (found.step, (size, every, optimizer, name)))
    chosen = fastest(case, gpu)
    assert chosen.step == best[0] < float("inf")
    chosen_stage = chosen.stage
    assert (chosen_stage.micro_batch, chosen_stage.activation_checkpointing, chosen_stage.optimizer) == best[1][:3]
    assert chosen.engine.name == best[1][3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "device"), [pytest.param("8", "h100", marks=pytest.mark.torture), ("1", "rtx4090")]
)
def test_a_written_recipe_has_the_fastest_settings(capsys, tmp_path, devices, device):
    """It loads, and its own plan finds nothing to change."""
    options, file = ("--devices", devices, "--device", device), tmp_path / "fast.yaml"
    plan = planned(capsys, "llama31-8b", *options, "--set", "stages.instruct.epochs=2", "--write", str(file))
    assert plan["written"] == str(file) and any(found["set"] for found in plan["fastest"].values())
    recipe = load_recipe(str(file))
    for name, found in plan["fastest"].items():
        stage = recipe.stages[name]
        assert (stage.micro_batch, stage.activation_checkpointing, stage.optimizer) == (
            found["micro_batch"],
            found["activation_checkpointing"],
            found["optimizer"],
        )
    assert recipe.stages["instruct"].epochs == 2 and "accelerate launch" in file.read_text()
    again = planned(capsys, str(file), *options)
    assert again["hours"] == pytest.approx(plan["hours"])
    for name, found in again["fastest"].items():
        assert found == plan["fastest"][name] | {"set": []}
    assert main(["plan", "llama31-8b", *options, "--write", str(file)]) == 2
    assert "exists already" in capsys.readouterr().err
    if device == "rtx4090":  # of 24 GB: adapters and no disk
        found = plan["fastest"]["instruct"]
        assert found["lora"] is not None and found["engine"] in ("ddp", "zero1", "zero2", "zero3")
        assert "does not fit on 1 x rtx4090 whole" in plan["verdict"] and "LoRA it does in" in plan["verdict"]
        assert not any(
            "nvme" in word or "offload" in word for stage in plan["fastest"].values() for word in stage["set"]
        )
        assert found["peak"] <= USABLE * plan["device_memory"] and plan["cost"] is None
    # a launch with FSDP is one for all stages
    assert len({found["engine"] == "fsdp2" for found in plan["fastest"].values()}) == 1


def test_nothing_is_written_where_nothing_fits(capsys, tmp_path, monkeypatch):
    file = tmp_path / "fast.yaml"
    found = {"fastest": {"instruct": None}, "verdict": "does not fit", "hours": None, "cost": None}
    monkeypatch.setattr(fastest_module, "timed_plan", lambda *_: found)
    assert main(["plan", "tiny", "--device", "t4", "--write", str(file)]) == 2
    assert f"--write {file}: does not fit (fix: see the plan without --write)" in capsys.readouterr().err
    assert not file.exists()


def test_the_roofline_s_step_fits_8_gpus_under_fsdp2(capsys):
    """Eight samples a micro-batch, as in benchmarks/roofline.py."""
    keys = ("micro_batch=8", "activation_checkpointing=selective", "deepspeed=null")
    sets = [word for key in keys for word in ("--set", f"stages.instruct.{key}")]
    options = ("--devices", "8", "--device-memory", "84.9", "--engine", "fsdp2")
    stage = planned(capsys, "llama31-8b-card", *options, *sets)["stages"][2]
    assert stage["fits"] and stage["longest_micro_batch"] > 9000


def test_assumed_rows_can_be_given(capsys, tmp_path):
    options = ("--rows", "captions=1600", "--rows", "questions=320", "--tokens-per-row", "1000")
    plan = planned(capsys, "tiny", "--output", str(tmp_path), *options)
    stage = plan["stages"][1]
    assert (stage["rows"], stage["steps"], stage["tokens"]) == (1600, 100, 1_600_000)
    assert stage["row_tokens"] == {"p5": 1000, "p50": 1000, "p95": 1000, "max": 1000}
    assert stage["memory"] is None  # the demo's parts are not made yet
    unknown = planned(capsys, "tiny", "--output", str(tmp_path))["stages"][1]
    assert unknown["steps"] is None and unknown["tokens"] is None
    assert "--rows captions=N" in unknown["assumed"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "zero4"], "unknown engine 'zero4' (fix: one of ddp, zero1"),
        (["--mfu", "0.4"], "give both"),
        (["--write", "fast.yaml"], "give --device too"),
        (["--device", "h101"], "no figures of a GPU 'h101' (fix: one of a100-80"),
        (["--rows", "captions"], "'captions' is not NAME=N"),
        (["--set", "stages.pretrain.deepspeed=gone"], "there is no DeepSpeed file 'gone'"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message, capsys):
    assert main(["plan", "llama31-8b-card", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_plan_of_counted_rows_is_what_the_run_does(recipe_content, tmp_path, capsys, monkeypatch):
    """Steps and FLOPs as the meter counts them, and the run's seconds from its MFU."""
    recipe_batch = 8  # logged at every step
    recipe_content["stages"]["instruct"]["data"][0]["weight"] = 1.5
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(yaml.safe_dump(recipe_content))
    needed = []
    count = meter_module.needed_flops

    def counting(*arguments, **options):
        flops = count(*arguments, **options)
        needed.append(flops.total.needed)
        return flops

    monkeypatch.setattr(meter_module, "needed_flops", counting)
    run = tmp_path / "run"
    assert main(["train", str(recipe_file), "--output", str(run)]) == 0
    capsys.readouterr()
    plan = planned(capsys, str(recipe_file), "--output", str(run))
    assert all(stage["assumed"] == [] and not stage["sampled"] for stage in plan["stages"])
    # supervised tokens are taken to be the last ones of a row: a last layer's attention may differ
    assert sum(stage["flops"] for stage in plan["stages"]) == pytest.approx(sum(needed), rel=0.02)
    peak = matrix_peak(torch.float32, torch.device("cpu"))
    for number, stage in enumerate(plan["stages"], 1):
        folder = run / "stages" / f"{number}-{stage['name']}"
        record = json.loads((folder / "final" / "stage.json").read_text())
        log = json.loads((max(folder.glob("checkpoint-*")) / "trainer_state.json").read_text())["log_history"]
        log = [entry for entry in log if "mfu" in entry]
        assert stage["steps"] == record["steps"]
        assert stage["parameters"] == {
            line["group"]: {"total": line["num_parameters"], "trainable": line["num_trainable"]}
            for line in record["groups"]
        }
        # of each log's window, without the time that checkpoints took
        seconds = np.array([recipe_batch / entry["samples_per_second"] for entry in log])
        mfu = float(np.average([entry["mfu"] for entry in log], weights=seconds))
        options = ("--mfu", str(mfu), "--peak-tflops", str(peak / 1e12))
        again = planned(capsys, str(recipe_file), "--output", str(run), *options)["stages"][number - 1]
        share = len(log) / stage["steps"]
        rounding = 1e-4 / mfu  # of the logged figure
        assert again["hours"] * 3600 * share == pytest.approx(seconds.sum(), rel=0.1 + rounding)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gpu", "devices"), [("llava16-lora-24gb", "rtx4090", 1), ("llama32-1b", "t4", 8)])
def test_the_page_of_memory_and_hours_is_what_plan_says(name, gpu, devices, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs/memory.md").read_text()
    monkeypatch.chdir(tmp_path)  # none of the recipe's data is here
    lines = page[page.index(f"## {devices} GPU") :].splitlines()
    assert lines[2:4] == memory_page.head().splitlines()
    listed = list(itertools.takewhile(lambda line: line.startswith("| `"), lines[4:]))
    assert [line.split("`")[1] for line in listed] == [
        one for one in SHIPPED if one not in ("tiny", "tiny-siglip", "smol")
    ]
    cells = next(line for line in listed if f"`{name}`" in line).split(" | ")[1:]
    found = cells[list(ACCELERATORS).index(gpu)].removesuffix(" |")
    assert found == memory_page.cell(name, ACCELERATORS[gpu], devices), "run `make memory-page`"


def test_a_recipe_whose_parts_are_made_has_no_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert memory_page.cell("tiny", ACCELERATORS["h100"], 1) is None
