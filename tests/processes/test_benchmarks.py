"""The benchmarks that wait for a GPU run end to end here, at a minimal size."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest


FOLDER = Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return load("gpu")


def test_gpu_benchmark_trains_all_variants_alike(gpu, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "matrix_peak", lambda dtype, device: 1e11)
    monkeypatch.setattr(gpu, "NUM_COUNTED", 64)
    monkeypatch.setattr(gpu, "DTYPE", gpu.torch.float32)  # few CPUs have instructions for bfloat16
    small = gpu.SHAPES["small"]
    text = small.text | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    monkeypatch.setitem(gpu.SHAPES, "small", gpu.Shape(text, small.vision | {"num_hidden_layers": 2}, 500))
    arguments = ["--small", "--device", "cpu", "--stages", "projector", "instruct", "--samples-per-step", "2"]
    arguments += ["--set", "activation_checkpointing=selective", "--breakdown", "--output", str(tmp_path / "gpu.json")]
    options = gpu.parse([*arguments, "--micro-batch", "2", "--warmup", "1", "--steps", "1"])
    report = json.loads(json.dumps(gpu.measure(options, run=gpu.drive)))
    assert json.loads((tmp_path / "gpu.json").read_text()) == report and not report["failed"] and not report["not_run"]
    assert {name: list(stage["variants"]) for name, stage in report["stages"].items()} == {
        "projector": ["packed", "stock"],
        "instruct": ["shared", "packed", "stock"],
    }
    for stage in report["stages"].values():
        assert set(stage["ratios"]) == set(stage["variants"]) - {"stock"}
        assert max(stage["loss_difference"].values()) < gpu.LOSS_TOLERANCE  # of both steps
        assert max(stage["norm_difference"].values()) < gpu.NORM_TOLERANCE
        assert all(max(run["breakdown"].values()) > 0 for run in stage["variants"].values())
    variants = report["stages"]["instruct"]["variants"]
    assert variants["packed"]["needed_flops_per_sample"] == variants["stock"]["needed_flops_per_sample"]
    assert variants["shared"]["needed_flops_per_sample"] < 0.8 * variants["packed"]["needed_flops_per_sample"]
    assert all(0 < run["mfu"] <= run["hfu"] for run in variants.values())
    gpu.print_report(report)
    assert "needed EFLOP" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gpu", "saving", "training"])
def test_json_is_alone_on_stdout(name, capsys, monkeypatch):
    """Whatever libraries print: importing DeepSpeed is enough for a line on stdout."""
    monkeypatch.syspath_prepend(FOLDER)
    benchmark = load(name)

    def measure(*arguments, **options):
        sys.stdout.write("[WARNING] Setting accelerator to CPU\n")
        if name != "training":
            return {"stages": {}, "failed": {}, "seconds": 1.0}
        done = benchmark.Run(1.0, 1.0, 1, 1, [1.0], 1, 1, 1)
        return benchmark.Measured(None, {"ours": [done]}, {}, 1.0)

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark.sys, "argv", [name, "--json", *(["--only", "ours"] if name == "training" else [])])
    assert benchmark.main() == 0
    said = capsys.readouterr()
    assert isinstance(json.loads(said.out), dict) and "Setting accelerator" in said.err


def test_gpu_benchmark_has_the_lengths_of_the_card(gpu):
    """At 8B size: about 2,340 tokens, 2,150 of them of the image, 135 supervised; captions 15 to 24."""
    rows = gpu.Workload(gpu.SHAPES["8b"], gpu.card_stage("instruct"), num_samples=200, samples_per_step=32)
    assert gpu.SHAPES["8b"].config.text_config.vocab_size == 128_320
    assert rows.lengths.num_tokens.mean() == pytest.approx(2340, rel=0.02)
    assert (rows.lengths.num_prefix_tokens - gpu.BEFORE_IMAGE).mean() == pytest.approx(2150, rel=0.02)
    assert rows.lengths.num_supervised_tokens.mean() == pytest.approx(135, rel=0.1)
    captions = gpu.Workload(gpu.SHAPES["8b"], gpu.card_stage("pretrain"), num_samples=50, samples_per_step=16)
    assert 15 <= captions.lengths.num_supervised_tokens.min() <= captions.lengths.num_supervised_tokens.max() <= 24


def test_gpu_benchmark_halves_the_micro_batch_until_it_fits(gpu):
    def run(settings):
        if settings.micro_batch > 2:
            raise gpu.torch.OutOfMemoryError("full")
        return {"micro_batch": settings.micro_batch}

    settings = gpu.Settings("small", "instruct", "stock", "cuda", 8, 8, 0, 1, "adamw")
    assert gpu.largest_that_fits(settings, run) == {"micro_batch": 2}


def test_gpu_benchmark_goes_on_where_a_variant_fails_and_ends_in_time(gpu, tmp_path, monkeypatch):
    def run(settings):
        if settings.variant == "packed":
            raise subprocess.CalledProcessError(139, "drive")
        return {"samples_per_second": 1.0, "losses": [1.0], "norms": [1.0], "micro_batch": 1}

    options = ["--small", "--device", "cpu", "--stages", "instruct", "--output", str(tmp_path / "gpu.json")]
    monkeypatch.setattr(gpu, "project", lambda *_: {})
    report = gpu.measure(gpu.parse(options), run=run)
    assert report["failed"] == {"instruct, packed": "exit code 139"}
    assert set(report["stages"]["instruct"]["variants"]) == {"shared", "stock"}
    assert json.loads((tmp_path / "gpu.json").read_text()) == report
    late = gpu.measure(gpu.parse([*options, "--seconds", "-1"]), run=run)
    assert late["not_run"] == ["instruct, shared", "instruct, packed", "instruct, stock"]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_head_memory_compares_the_same_loss(capsys, frozen):
    head_memory = load("head_memory")
    settings = head_memory.Settings("cpu", "float32", 512, 128, 0.05, 32, frozen)
    report = head_memory.measure(settings, run=head_memory.drive)  # in this process: its memory says nothing
    assert report["loss_difference"] < 1e-6
    gradients = 4 * (128 * 32 + (0 if frozen else 512 * 32))
    assert {result["gradients"] for result in report["results"].values()} == {gradients}
    head_memory.print_report(report)
    assert "% of stock" in capsys.readouterr().out


@pytest.mark.torture
def test_head_memory_in_processes_of_their_own():
    command = [sys.executable, str(FOLDER / "head_memory.py"), "--device", "cpu", "--json"]
    command += ["--vocabulary", "16384", "--positions", "1024", "--hidden-size", "64"]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    stock, ours = (report["results"][way] for way in ("stock", "ours"))
    assert ours["loss"] == pytest.approx(stock["loss"], rel=1e-4)
    # a copy of the logits in float32 at least
    assert stock["bytes"] > 1024 * 16384 * 4
    assert report["share"] < 0.3
