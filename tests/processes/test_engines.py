"""The same recipe under every engine: losses, answers, weights and checkpoints, on two CPU processes."""

import copy
import functools
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from forks import Job
from hub_server import hub_of_this_process
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from llava_llama31 import LlavaLlama31ForConditionalGeneration
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.distributed.engine import as_launched
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.planning import row_lengths
from llava_llama31.trainer.publishing.doors import empty_cache, fetch, open_doors
from llava_llama31.trainer.recipes.schema import Stage
from llava_llama31.trainer.training.meter import matrix_peak


ROOT = Path(__file__).parents[2]
DDP = "--multi_gpu --mixed_precision no"
FSDP2 = f"--config_file {ROOT / 'examples/accelerate/fsdp2.yaml'}"
# of every stage where it is set; the least that a stage has otherwise keeps the tests within minutes
STEPS = int(os.environ.get("ENGINE_STEPS", "0"))
ENGINES = ["zero3", "fsdp2"]
MORE_ENGINES = ["ddp", "zero1", "zero2", "zero3-offload-params", "zero3-offload", "fsdp2-offload"]
NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


def at_length(*cases: object) -> list[object]:
    """Cases that `make torture` runs alone; shorter ones hold the same."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.torture) for case in cases]


def engine_options(engine: str, folder: Path) -> tuple[str, str | None]:
    """Options of `accelerate launch`, and the stages' DeepSpeed file: the shipped ones, strict for a tiny model."""
    if engine.startswith("fsdp2"):
        content = yaml.safe_load((ROOT / "examples/accelerate/fsdp2.yaml").read_text())
        content["fsdp_config"]["fsdp_offload_params"] = engine == "fsdp2-offload"
        file = folder / f"{engine}.yaml"
        file.write_text(yaml.safe_dump(content))
        return f"--config_file {file}", None
    if engine == "ddp":
        return DDP, None
    content = json.loads((ROOT / f"examples/deepspeed/{engine}.json").read_text())
    if content["zero_optimization"]["stage"] == 3:
        content["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # small weights would stay whole
        content["zero_optimization"]["reduce_bucket_size"] = "auto"  # several buckets
    content["zero_force_ds_cpu_optimizer"] = False  # DeepSpeed's own for the host takes minutes to compile
    file = folder / f"{engine}.json"
    file.write_text(json.dumps(content))
    return DDP, str(file)


@pytest.fixture
def start(forks):
    """`train` in one process, or in two as accelerate with the options would launch them."""

    def start(options: str | None, *arguments: str | Path) -> Job:
        if options is None:
            return forks.start("train", *arguments, engines=True)
        return forks.start("train", *arguments, processes=2, launcher=options)

    return start


def launch(engine: str, *arguments: str | Path) -> str:
    """What a real `accelerate launch` of two processes with the shipped file of an engine prints."""
    options = f"--config_file {ROOT / 'examples/accelerate' / f'{engine}.yaml'}"
    fixed = "--num_machines 1 --num_processes 2 --main_process_port 0 --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), *fixed.split()]
    command += [str(ROOT / "tests/processes/cpu_engines.py"), "train", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "DS_ACCELERATOR": "cpu"}
    environment["BRIEF_FINISH"] = "1"
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def finish(job: Job, timeout: float = 200) -> str:
    output, _ = job.communicate(timeout=timeout)
    assert not any(job.codes), output
    return output


def kill_when(job: Job, path: Path) -> None:
    """kill -9 of all processes as soon as a folder is there."""
    deadline = time.monotonic() + 150
    while not path.exists():
        assert job.poll() is None and time.monotonic() < deadline, job.output()
        time.sleep(0.02)
    job.kill()


def write(content: dict, path: Path, deepspeed: str | None = None) -> Path:
    stages = {name: {**stage, "deepspeed": deepspeed} for name, stage in content["stages"].items()}
    path.write_text(yaml.safe_dump({**content, "stages": stages}, sort_keys=False))
    return path


def history(run: Path, stage: str) -> list[dict]:
    newest = max((run / "stages" / stage).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((newest / "trainer_state.json").read_text())["log_history"]


def weights(run: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(run / "stages" / stage / "final/model.safetensors")


def assert_partition(logged: dict) -> None:
    """What a line says of its sources, weighted by their tokens, is what it says of all."""
    for prefix in ("", "eval_"):
        tokens = {key: logged[key] for key in logged if key.startswith(f"{prefix}tokens_by_source/")}
        losses = [logged[key.replace("tokens", "loss", 1)] * number for key, number in tokens.items()]
        if tokens:
            assert sum(losses) / sum(tokens.values()) == pytest.approx(logged[f"{prefix}token_loss"], rel=1e-12)


def assert_same_run(run: Path, reference: Path, tolerance: float = 1e-5) -> None:
    """Losses, gradient norms, evaluations, answers and weights of every stage; within float32's rounding."""
    stages = sorted(path.name for path in (reference / "stages").iterdir())
    assert stages == sorted(path.name for path in (run / "stages").iterdir())
    for stage in stages:
        ours, expected = history(run, stage), history(reference, stage)
        assert len(ours) == len(expected)
        for entry, wanted in zip(ours, expected, strict=True):
            assert_partition(entry)
            by_source = [key for key in {**entry, **wanted} if "_by_source/" in key]
            for key in ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy", *by_source):
                assert (key in entry) == (key in wanted)
                if key in wanted:
                    assert entry[key] == pytest.approx(wanted[key], abs=tolerance, rel=tolerance), (stage, key)
        ours, expected = weights(run, stage), weights(reference, stage)
        assert ours.keys() == expected.keys()
        for name in expected:
            assert ours[name].dtype == expected[name].dtype
            torch.testing.assert_close(ours[name], expected[name], atol=tolerance, rtol=0, msg=f"{stage} {name}")
        for answers in (reference / "stages" / stage).glob("evaluation/*.jsonl"):
            found, wanted = (
                [json.loads(line)["token_ids"] for line in (folder / answers.name).read_text().splitlines()]
                for folder in (run / "stages" / stage / "evaluation", answers.parent)
            )
            assert found == wanted


@pytest.fixture(scope="session")
def all_stages(forks, base_folder, data_folder, make_once):
    """Frozen and trained tower, with and without activation checkpointing, adapters; and its run by one process.

    Two samples a step for each of two processes, one in four of them without an image.
    """
    rows = json.loads((data_folder / "rows.json").read_text())

    def split(folder: Path) -> None:
        (folder / "images.json").write_text(json.dumps([row for row in rows if "image" in row]))
        (folder / "texts.json").write_text(json.dumps([row for row in rows if "image" not in row]))

    folder = make_once("engines-data", split)
    sources = [{"name": name, "path": str(folder / f"{name}.json")} for name in ("images", "texts")]
    stage = {
        "data": [source | {"image_root": str(data_folder)} for source in sources],
        "global_batch": 4,
        "micro_batch": 1,
        "max_steps": STEPS or 8,
        "precision": "float32",
        "logging_steps": 1,
        "save_steps": STEPS or 8,
        "dataloader_workers": 0,
    }
    both = ["multi_modal_projector", "language_model"]
    evaluated = {"validation_fraction": 0.2, "eval_steps": STEPS or 8, "eval_questions": 6}
    content = {
        "name": "engines",
        "seed": 1,
        "model": {"checkpoint": str(base_folder), "dtype": "float32"},
        "stages": {
            "projector": {**stage, "trainable": both[:1], "learning_rate": 1e-3, "max_steps": STEPS or 4},
            "checkpointed": {
                **stage,
                "trainable": both,
                "learning_rate": 1e-4,
                "activation_checkpointing": True,
                **evaluated,
            },
            "tower": {
                **stage,
                "trainable": ["vision_tower", *both],
                "learning_rate": 1e-4,
                "micro_batch": 2,
                "activation_checkpointing": "selective",
                **evaluated,
                "keep": "best_loss",
            },
            "tower_checkpointed": {
                **stage,
                "trainable": ["vision_tower", *both],
                "learning_rate": 1e-4,
                "activation_checkpointing": True,
                "packing": False,
                "max_steps": STEPS or 4,
            },
            "adapters": {
                **stage,
                "trainable": both,
                "learning_rate": 1e-3,
                "lora": {"r": 4, "alpha": 8},
                "max_steps": STEPS or 4,
            },
        },
        # of the stages alone: the run's own is in test_training_processes.py and test_sharded_evaluation.py
        "evaluation": {"data": str(data_folder / "questions.jsonl"), "max_new_tokens": 4, "baselines": False},
    }

    def fill(folder: Path) -> None:
        arguments = (write(content, folder / "recipe.yaml"), "--output", folder / "single")
        finish(forks.start("train", *arguments, engines=True))

    return content, make_once("engines", fill) / "single"


@pytest.mark.parametrize("engine", [*ENGINES, *at_length(*MORE_ENGINES)])
def test_every_engine_trains_as_one_process_does(start, all_stages, tmp_path, engine):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    content, single = all_stages
    options, deepspeed = engine_options(engine, tmp_path)
    recipe, run = write(content, tmp_path / "recipe.yaml", deepspeed), tmp_path / "run"
    output = finish(start(options, recipe, "--output", run))
    kept = re.findall(r"(\w+): each of 2 devices keeps ([\d,]+) of ([\d,]+)", output)
    assert len(kept) == len(content["stages"])
    for name, held, total in kept:
        assert name == {"ddp": "plain"}.get(engine, engine.split("-")[0])
        sharded = engine.startswith(("zero3", "fsdp2"))
        share = int(held.replace(",", "")) / int(total.replace(",", ""))
        assert share == pytest.approx(0.5 if sharded else 1, abs=1e-3)
    assert_same_run(run, single)
    assert any("loss_by_source/texts" in entry for entry in history(tmp_path / "run", "1-projector"))
    records = [json.loads((run / "summary.json").read_text())["stages"] for run in (tmp_path / "run", single)]
    for ours, expected in zip(records[0].values(), records[1].values(), strict=True):
        assert ours["groups"] == expected["groups"]


def test_a_tied_head_trains_and_resumes_under_fsdp2_as_in_one_process(
    start, forks, recipe_content, pristine_config, processor, tmp_path
):
    """Llama 3.2 1B and 3B have one: it is one parameter, sharded once, and saved once."""
    config = copy.deepcopy(pristine_config)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    torch.manual_seed(0)
    LlavaLlama31ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    del recipe_content["evaluation"], recipe_content["stages"]["projector"]
    recipe_content["model"] = {"checkpoint": str(tmp_path / "base"), "dtype": "float32"}
    changes = {"precision": "float32", "logging_steps": 1, "max_steps": 4, "epochs": None, "save_steps": 2}
    recipe_content["stages"]["instruct"] |= changes | {"activation_checkpointing": True, "save_total_limit": 4}
    options, _ = engine_options("fsdp2", tmp_path)
    recipe = write(recipe_content, tmp_path / "recipe.yaml")
    single, sharded = (forks.start("train", recipe, "--output", tmp_path / "one", engines=True), tmp_path / "run")
    finish(single)
    finish(start(options, recipe, "--output", sharded))
    assert_same_run(sharded, tmp_path / "one")
    assert "lm_head.weight" not in weights(sharded, "1-instruct")
    stage = sharded / "stages/1-instruct"
    for folder in (stage / "final", stage / "checkpoint-4", sharded / "export"):
        shutil.rmtree(folder)
    (sharded / "summary.json").unlink()
    assert "checkpoint-2" in finish(start(options, recipe, "--output", sharded))
    assert_same_run(sharded, tmp_path / "one")


@pytest.mark.torture
@pytest.mark.parametrize(
    ("engine", "changes", "tolerance"),
    [
        ("ddp", {"compile": True}, 1e-5),
        ("fsdp2", {"compile": True}, 1e-5),
        ("fsdp2", {"optimizer": "adamw_bf16"}, 1e-2),
        ("fsdp2", {"optimizer": "adamw_8bit"}, 1e-2),
    ],
    ids=["ddp-compile", "fsdp2-compile", "fsdp2-adamw_bf16", "fsdp2-adamw_8bit"],
)
def test_options_under_an_engine_train_as_one_process_without_them(
    start, forks, recipe_content, tmp_path, engine, changes, tolerance
):
    del recipe_content["evaluation"], recipe_content["stages"]["projector"]
    recipe_content["stages"]["instruct"] |= {"precision": "float32", "logging_steps": 1}
    plain = write(recipe_content, tmp_path / "plain.yaml")
    finish(forks.start("train", plain, "--output", tmp_path / "plain", engines=True))
    recipe_content["stages"]["instruct"] |= changes
    options, _ = engine_options(engine, tmp_path)
    finish(start(options, write(recipe_content, tmp_path / "recipe.yaml"), "--output", tmp_path / "run"))
    losses = [losses_of(tmp_path / name) for name in ("plain", "run")]
    assert losses[1] == pytest.approx(losses[0], rel=tolerance) and len(losses[0]) >= 4


def losses_of(run: Path) -> list[float]:
    lines = (run / "log.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.mark.torture
@pytest.mark.usefixtures("fast_bfloat16")
def test_float8_under_fsdp2_trains_as_in_one_process(start, forks, recipe_content, tmp_path, monkeypatch):
    """Products in wider types, on float8's numbers: a CPU has none in float8. Not compiled, which takes minutes."""
    pytest.importorskip("torchao")
    monkeypatch.setenv("EMULATE_FLOAT8", "1")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    del recipe_content["evaluation"], recipe_content["stages"]["projector"]
    recipe_content["stages"]["instruct"] |= {"compile": True, "precision": "bfloat16", "logging_steps": 1}
    options, _ = engine_options("fsdp2", tmp_path)
    for name, fp8, how in (("wide", False, None), ("single", True, None), ("run", True, options)):
        recipe_content["stages"]["instruct"]["fp8"] = fp8
        recipe = write(recipe_content, tmp_path / f"{name}.yaml")
        finish(start(how, recipe, "--output", tmp_path / name))
    wide, single, run = (losses_of(tmp_path / name) for name in ("wide", "single", "run"))
    assert len(single) >= 4 and single == pytest.approx(wide, rel=5e-2) and single != wide
    assert run == pytest.approx(single, rel=1e-2)


READ = """
import json, os, sys
from pathlib import Path
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.training.llava_trainer import LlavaTrainer

restore_best = LlavaTrainer.restore_best  # what follows a stage's training

def read(self):
    engine = self.model_wrapped
    if self.is_deepspeed_enabled:
        found = {
            "sums": str(engine.get_data_types()[1]),
            "reduce": engine.zero_reduce_bucket_size(),
            "allgather": engine.zero_allgather_bucket_size(),
            "prefetch": engine.zero_prefetch_bucket_size(),
            "overlap": engine.zero_overlap_comm(),
        }
    else:
        found = {"views": engine.gradient_as_bucket_view, "static": engine.static_graph}
    Path(os.environ["FOUND"] + os.environ["RANK"]).write_text(json.dumps(found))
    restore_best(self)

LlavaTrainer.restore_best = read
sys.exit(main())
"""
ZERO = {"sums": "torch.float32", "reduce": 5e8, "allgather": 5e8, "overlap": True}
SET = {
    "ddp": {"views": True, "static": False},
    "zero1": {**ZERO, "sums": "torch.bfloat16"},
    "zero2": ZERO,
    "zero3": {**ZERO, "reduce": 2e8, "prefetch": 1e8},
}


@pytest.mark.usefixtures("fast_bfloat16")
@pytest.mark.parametrize("engine", at_length(*SET))
def test_an_engine_has_the_settings_of_its_file_and_trains_as_one_process(forks, recipe_content, tmp_path, engine):
    """In bfloat16, whose gradients add up in float32 where the file says so."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    del recipe_content["evaluation"], recipe_content["stages"]["projector"]
    keys = {"precision": "bfloat16", "logging_steps": 1, "micro_batch": 1, "max_steps": 4, "epochs": None}
    recipe_content["stages"]["instruct"] |= keys
    plain = write(recipe_content, tmp_path / "plain.yaml")
    finish(forks.start("train", plain, "--output", tmp_path / "plain", engines=True))
    recipe = write(recipe_content, tmp_path / "recipe.yaml", engine if engine.startswith("zero") else None)
    (tmp_path / "read.py").write_text(READ)
    arguments = ("train", recipe, "--output", tmp_path / "run")
    variables = {"FOUND": str(tmp_path / "found")}
    script = str(tmp_path / "read.py")
    finish(forks.start(*arguments, processes=2, launcher=DDP, script=script, variables=variables))
    for rank in (0, 1):
        found = json.loads((tmp_path / f"found{rank}").read_text())
        assert {key: found[key] for key in SET[engine]} == SET[engine]
    losses = [losses_of(tmp_path / name) for name in ("plain", "run")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2) and len(losses[0]) == 4


def test_sharded_8_bit_moments_in_a_checkpoint(forks, tmp_path):
    """Two ranks save, load and train on with the same bits; one process resumes from two, and two from one."""
    pytest.importorskip("torchao")
    script = Path(__file__).with_name("sharded_state.py")
    finish(forks.start(tmp_path, processes=2, script=str(script)))


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_accelerates_own_launcher_ends_with_the_bits_of_forks(forks, recipe_content, tmp_path, engine):
    """With the shipped files: a real `accelerate launch`, of which the forks of the other tests are an image."""
    if engine == "zero3":
        pytest.importorskip("deepspeed")
    del recipe_content["evaluation"], recipe_content["stages"]["projector"]
    recipe_content["stages"]["instruct"] |= {"max_steps": 3, "epochs": None}  # the second one saves
    recipe = write(recipe_content, tmp_path / "recipe.yaml")
    options = f"--config_file {ROOT / 'examples/accelerate' / f'{engine}.yaml'}"
    finish(forks.start("train", recipe, "--output", tmp_path / "forks", processes=2, launcher=options))
    output = launch(engine, recipe, "--output", tmp_path / "run")
    (kept,) = re.findall(r"(\w+): each of 2 devices keeps", output)
    assert kept == {"ddp": "plain"}.get(engine, engine)
    ours, expected = weights(tmp_path / "forks", "1-instruct"), weights(tmp_path / "run", "1-instruct")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.fixture(scope="session")
def long_rows(tmp_path_factory, pristine_config, processor, data_folder):
    """A recipe whose steps take memory for weights and activations alike, and more than for anything else."""
    folder = tmp_path_factory.mktemp("long")
    config = copy.deepcopy(pristine_config)
    for name, value in {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "head_dim": 64}.items():
        setattr(config.text_config, name, value)
    torch.manual_seed(0)
    LlavaLlama31ForConditionalGeneration(config).save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    rows = json.loads((data_folder / "rows.json").read_text())
    rows = [row for row in rows if "image" in row]
    for number, row in enumerate(rows):  # more keys than the blocks of a CPU's own attention take
        words = " ".join(f"{number * 977 + i * 31 % 1009:04}" for i in range(260))
        row["conversations"][0]["value"] += f" {words}"
    (folder / "rows.json").write_text(json.dumps(rows))
    stage = {
        "data": [{"name": "rows", "path": str(folder / "rows.json"), "image_root": str(data_folder)}],
        "trainable": ["multi_modal_projector", "language_model"],
        "learning_rate": 1e-4,
        "global_batch": 4,
        "micro_batch": 2,
        "max_steps": 2,  # from the second one on the optimizer has its moments
        "logging_steps": 1,
        "dataloader_workers": 0,
    }
    model = {"checkpoint": str(folder / "base"), "dtype": "float32"}
    return {"name": "long", "seed": 1, "model": model, "stages": {"instruct": stage}}


@pytest.fixture(scope="session")
def has_fast_bfloat16() -> bool:
    """A CPU without instructions for it takes minutes for what others do in a second."""
    peaks = [matrix_peak(dtype, torch.device("cpu")) for dtype in (torch.bfloat16, torch.float32)]
    return peaks[0] > peaks[1] / 4


PEAKS = {"kept": (False, "bfloat16"), "checkpointed": (True, "float32"), "checkpointed-bfloat16": (True, "bfloat16")}
SHORT_PEAKS = [("single", "kept"), ("zero3", "checkpointed"), ("fsdp2", "kept")]
LONG_PEAKS = itertools.product(["single", "zero3", "fsdp2", "ddp", "zero1", "zero2"], PEAKS)


@pytest.mark.parametrize(
    ("engine", "kind"), [*SHORT_PEAKS, *at_length(*(peak for peak in LONG_PEAKS if peak not in SHORT_PEAKS))]
)
def test_the_planned_peak_is_that_of_a_run(
    start, long_rows, tmp_path, capsys, monkeypatch, engine, kind, has_fast_bfloat16
):
    checkpointing, precision = PEAKS[kind]
    if precision == "bfloat16" and not has_fast_bfloat16:
        pytest.skip("this CPU has no instructions for bfloat16")
    monkeypatch.setenv("PEAK_MEMORY", str(tmp_path))
    content = copy.deepcopy(long_rows)
    content["stages"]["instruct"] |= {"activation_checkpointing": checkpointing, "precision": precision}
    options, deepspeed = (None, None) if engine == "single" else engine_options(engine, tmp_path)
    recipe = write(content, tmp_path / "recipe.yaml", deepspeed)
    finish(start(options, recipe, "--output", tmp_path / "run"))
    measured = [json.loads(path.read_text()) for path in tmp_path.glob("[01].json")]
    devices = 1 if engine == "single" else 2
    assert [len(peaks) for peaks in measured] == [2] * devices
    planned = "ddp" if engine == "single" else engine
    # what was measured ran on a CPU
    on_cpu = functools.partial(row_lengths.MicroBatch, fuses=False, head_rows=256, softmax_rows=64)
    monkeypatch.setattr(row_lengths, "MicroBatch", on_cpu)
    command = ["plan", str(recipe), "--output", str(tmp_path / "run"), "--devices", str(devices), "--json"]
    assert main([*command, "--engine", planned]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    peak = max(map(max, measured))
    assert stage["assumed"] == [] and stage["memory"]["peak"] * 1e9 == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("engine", ["zero3", *at_length("fsdp2")])
def test_a_process_without_images_breaks_the_run_if_it_skips_the_tower(
    start, all_stages, tmp_path, engine, monkeypatch
):
    """Proves that the test above would see a missing pass over a blank tile."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    monkeypatch.setenv("WITHOUT_BLANK_TILE", "1")
    content, _ = all_stages
    stage = {**content["stages"]["checkpointed"], "step_timeout": 5}  # ends ranks that wait for each other
    content = {**content, "stages": {"checkpointed": stage}}
    options, deepspeed = engine_options(engine, tmp_path)
    job = start(options, write(content, tmp_path / "recipe.yaml", deepspeed), "--output", tmp_path / "run")
    output, _ = job.communicate(timeout=100)
    assert all(job.codes) and not (tmp_path / "run/stages/1-checkpointed/final").exists(), output


@pytest.mark.parametrize(
    ("engine", "optimizer"),
    [
        ("zero3", "adamw"),
        *at_length(("zero2", "adamw"), ("fsdp2", "adamw"), ("fsdp2", "adamw_8bit"), ("fsdp2", "adamw_bf16")),
    ],
)
def test_a_killed_run_resumes_under_its_engine(start, recipe_content, tmp_path, engine, optimizer):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    del recipe_content["evaluation"]
    for stage in recipe_content["stages"].values():
        stage["optimizer"] = optimizer
    options, deepspeed = engine_options(engine, tmp_path)
    recipe = write(recipe_content, tmp_path / "recipe.yaml", deepspeed)
    for name in ("whole", "killed"):
        process = start(options, recipe, "--output", tmp_path / name)
        if name == "killed":
            kill_when(process, tmp_path / "killed/stages/2-instruct/checkpoint-2")
            output = finish(start(options, recipe, "--output", tmp_path / name))
            assert re.search(r"resuming from .*checkpoint-[24], step [24] of 6", output)
        else:
            finish(process)
    for stage in ("1-projector", "2-instruct"):
        whole, killed = weights(tmp_path / "whole", stage), weights(tmp_path / "killed", stage)
        assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["zero3", *at_length("fsdp2")])
def test_saves_of_a_sharded_run_are_pushed_whole(forks, recipe_content, tmp_path, monkeypatch, engine):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    options, deepspeed = engine_options(engine, tmp_path)
    del recipe_content["evaluation"], recipe_content["stages"]["projector"]
    recipe_content["model"]["licence"] = "apache-2.0"
    recipe_content["stages"]["instruct"] |= {"max_steps": 4, "epochs": None, "save_steps": 4}
    recipe_content["publish"] = {"repo_id": "me/mine", "private": True, "hub_strategy": "every_save"}
    recipe = write(recipe_content, tmp_path / "recipe.yaml", deepspeed)
    with hub_of_this_process("hf_" + "s" * 34, monkeypatch) as hub:
        arguments, unopened = ("train", recipe, "--output", tmp_path / "run"), ROOT / "tests/processes/unopened.py"
        finish(forks.start(*arguments, processes=2, launcher=options, script=str(unopened)), timeout=500)
        summary = json.loads((tmp_path / "run/summary.json").read_text())
        assert summary["publish"]["published"] and not summary["saves"]["failed"]
        (tag,) = (tag for tag in summary["saves"]["pushed"] if tag.startswith("instruct-step-4-"))
        with empty_cache() as cache:
            fetched = load_file(fetch("me/mine", tag, cache) / "model.safetensors")
            exported = load_file(tmp_path / "run/export/model.safetensors")
            assert fetched.keys() == exported.keys()
            assert all(torch.equal(fetched[name], exported[name]) for name in exported)
            if engine == "zero3":
                assert open_doors("me/mine", cache, revision=tag) == open_doors(tmp_path / "run/export", cache)
        assert hub.repos["me/mine"].find(tag).oid == summary["saves"]["pushed"][tag]


@NEEDS_DEEPSPEED
def test_stages_go_from_engine_to_engine_and_the_export_opens_through_both_doors(
    start, recipe_content, tmp_path, samples
):
    """ZeRO-3 on two processes, one process, FSDP2 on two, which goes on from one process's checkpoint."""
    recipe_content["stages"]["last"] = recipe_content["stages"]["instruct"]
    for stage in ("instruct", "last"):
        recipe_content["stages"][stage]["save_steps"] = 6
    recipe_content["stages"]["last"] = {**recipe_content["stages"]["last"], "save_steps": 2}
    _, deepspeed = engine_options("zero3", tmp_path)
    recipe = write(recipe_content, tmp_path / "recipe.yaml")
    finish(start(None, recipe, "--output", tmp_path / "single"))
    run, launched = tmp_path / "run", tmp_path / "zero3.yaml"
    content = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": deepspeed}}
    launched.write_text(yaml.safe_dump(content))
    kill_when(start(f"--config_file {launched}", recipe, "--output", run), run / "stages/1-projector/final")
    kill_when(start(None, recipe, "--output", run), run / "stages/3-last/checkpoint-2")
    output = finish(start(engine_options("fsdp2", tmp_path)[0], recipe, "--output", run))
    assert "resuming from" in output and "keeps 91,264 of 182,496" in output
    manifests = [json.loads(file.read_text()) for file in sorted(run.glob("stages/*/checkpoint-*/manifest.json"))]
    assert [manifest["engine"] for manifest in manifests] == ["zero3", "zero3", "plain", "fsdp2", "fsdp2"]
    for stage in ("1-projector", "2-instruct", "3-last"):
        ours, expected = weights(run, stage), weights(tmp_path / "single", stage)
        assert ours.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(ours[name], expected[name], atol=1e-5, rtol=0)
    stock = AutoModelForImageTextToText.from_pretrained(run / "export")
    own = LlavaLlama31ForConditionalGeneration.from_pretrained(run / "export")
    input_ids = torch.tensor([samples[9].input_ids])
    assert type(stock) is not type(own)
    with torch.no_grad():
        torch.testing.assert_close(stock(input_ids).logits, own(input_ids).logits, atol=1e-5, rtol=0)


@NEEDS_DEEPSPEED
def test_every_stage_of_a_run_has_its_own_engine(start, recipe_content, tmp_path):
    """DeepSpeed's marks in the process do not reach the stage after it."""
    del recipe_content["evaluation"]
    finish(start(None, write(recipe_content, tmp_path / "single.yaml"), "--output", tmp_path / "single"))
    for stage, deepspeed in (("projector", engine_options("zero3", tmp_path)[1]), ("instruct", None)):
        recipe_content["stages"][stage]["deepspeed"] = deepspeed
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_content, sort_keys=False))
    output = finish(start(DDP, tmp_path / "recipe.yaml", "--output", tmp_path / "run"))
    assert re.findall(r"(\w+): each of 2 devices", output) == ["zero3", "plain"]
    assert_same_run(tmp_path / "run", tmp_path / "single")


@NEEDS_DEEPSPEED
def test_deepspeeds_checkpoints_are_not_for_other_engines(start, recipe_content, tmp_path):
    del recipe_content["evaluation"]
    arguments = (write(recipe_content, tmp_path / "recipe.yaml"), "--output", tmp_path / "run")
    zero2 = f"--config_file {ROOT / 'examples/accelerate/zero2.yaml'}"
    kill_when(start(zero2, *arguments), tmp_path / "run/stages/1-projector/checkpoint-2")
    job = start(DDP, *arguments)
    output, _ = job.communicate(timeout=100)
    assert all(job.codes)
    assert output.count("written under zero2 by 2 processes, and this is plain with 2") == 1 and "Trace" not in output


@NEEDS_DEEPSPEED
def test_the_cards_own_deepspeed_files_run(start, recipe_content, tmp_path):
    """Their optimizer is compiled for minutes, so it is left out here, and with it the schedule that needs it."""
    del recipe_content["evaluation"], recipe_content["stages"]["projector"]
    recipe_content["stages"]["instruct"] |= {"max_steps": 2, "epochs": None}
    for name in ("card_zero3", "card_zero3_offload"):
        content = json.loads((ROOT / f"examples/deepspeed/{name}.json").read_text())
        assert content.pop("optimizer")["type"] == "AdamW" and content["scheduler"]["type"] == "WarmupCosineLR"
        del content["scheduler"]
        (tmp_path / f"{name}.json").write_text(json.dumps({**content, "zero_force_ds_cpu_optimizer": False}))
        recipe = write(recipe_content, tmp_path / f"{name}.yaml", str(tmp_path / f"{name}.json"))
        output = finish(start(DDP, recipe, "--output", tmp_path / name))
        assert "zero3: each of 2 devices" in output


def test_shipped_files_have_one_owner_each():
    links = sorted((ROOT / "examples/deepspeed").iterdir())
    assert [link.name for link in links] == sorted(file.name for file in (ROOT / "trainer/recipes").glob("*.json"))
    assert all(link.resolve().parent == ROOT / "trainer/recipes" for link in links)
    for file in (ROOT / "examples/accelerate").glob("*.yaml"):
        content = yaml.safe_load(file.read_text())
        if content["distributed_type"] == "DEEPSPEED":
            assert (ROOT / content["deepspeed_config"]["deepspeed_config_file"]).is_file()


@pytest.mark.parametrize(
    "launched, stage, message",
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "FSDP1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {"deepspeed": "zero3"}, "s.deepspeed=null"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {"precision": "bfloat16-weights"}, "float32"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {},
            "activation_checkpointing",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "deepspeed_config_file"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "x.json"},
            {"optimizer": "adamw_bf16"},
            "optimizer under DeepSpeed",
        ),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "parallelism_config"),
        ({"ACCELERATE_USE_CPU": "true"}, {"deepspeed": "zero2"}, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_launch_that_cannot_run_a_stage_is_refused(recipe_content, monkeypatch, launched, stage, message):
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    given = Stage.model_validate({**recipe_content["stages"]["instruct"], **stage})
    with pytest.raises(UserError, match=message):
        as_launched(given, "stages.s")


def test_a_stages_own_deepspeed_file_comes_before_the_launchers(recipe_content, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "launched.json")
    stage = Stage.model_validate(recipe_content["stages"]["instruct"])
    assert as_launched(stage, "s").deepspeed == "launched.json"
    assert as_launched(stage.model_copy(update={"deepspeed": "zero3"}), "s").deepspeed == "zero3"
