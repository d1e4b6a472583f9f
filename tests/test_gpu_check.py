"""`make gpu-check` runs here on a CPU at a minimal size; every check fails for a planted fault."""

import importlib.util
import json
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.compiler import set_stance

from llava_llama31.trainer.costs.matrix_peak import CpuSpeed
from llava_llama31.trainer.distributed import devices
from llava_llama31.trainer.distributed.parameters import gathered, unsharded
from llava_llama31.trainer.evaluation.asker import Asker
from llava_llama31.trainer.evaluation.generation import GreedyAnswerer
from llava_llama31.trainer.model import device_options
from llava_llama31.trainer.runs import stage as stage_room
from llava_llama31.trainer.training import llava_trainer
from llava_llama31.trainer.training.llava_trainer import LlavaTrainer


FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    sys.path.append(str(FOLDER))
    spec = importlib.util.spec_from_file_location("gpu_check", FOLDER / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))


@pytest.fixture
def run(gpu_check, monkeypatch):
    gpu = gpu_check.full_size.gpu
    monkeypatch.setattr(gpu, "matrix_peak", lambda dtype, device: 1e12)
    # shallow, but wide for its rows as the true one is: the plan counts all that is large there
    small = gpu.SHAPES["small"]
    small = gpu.Shape(small.text | {"num_hidden_layers": 2}, small.vision | {"num_hidden_layers": 2}, 8000)
    monkeypatch.setitem(gpu.SHAPES, "small", small)
    place = gpu_check.Place(torch.device("cpu"), small=True)
    checks = {check.name: check for check in gpu_check.CHECKS}
    return lambda name: gpu_check.run_check(checks[name], place)


ON_CPU = ("facts", "attention", "step", "waits", "tiles", "head", "optimizers", "sharded", "profile", "speed")
ON_CPU += ("memory", "command", "evaluation")


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_CPU)
def test_a_check_passes(run, gpu_check, monkeypatch, short_runs, name):
    monkeypatch.setattr(gpu_check.runs, "train_apart", gpu_check.runs.train_here)
    monkeypatch.setattr(gpu_check.runs, "LONG_ENOUGH", {})
    entry = run(name)
    assert entry["passed"], entry["detail"]
    assert set(entry) == {"name", "passed", "seconds", "detail"} and json.dumps(entry)


def wrong_product(checks, patch):
    patch.setattr(torch.Tensor, "__matmul__", lambda a, b: torch.zeros(len(a), b.shape[1]))


def wrong_attention(checks, patch):
    packed = checks.kernels.packed
    right = packed.packed_attention
    patch.setattr(packed, "packed_attention", lambda *a: right(*a) * 1.001)


def attention_of_nan(checks, patch):
    packed = checks.kernels.packed
    right = packed.packed_attention
    patch.setattr(packed, "packed_attention", lambda *a: right(*a) * torch.tensor(float("nan")))


def autocast_off(checks, patch):
    moved = checks.steps._there

    def there(batch, device, dtype):
        given = moved(batch, device, dtype)
        return given | {"labels": given["labels"].roll(1)} if torch.is_autocast_enabled(device.type) else given

    patch.setattr(checks.steps, "_there", there)


def an_item(checks, patch):
    packed = checks.kernels.packed
    right = packed.to_device
    patch.setattr(packed, "to_device", lambda x, d: (right(x, d).sum().item(), right(x, d))[1])


def other_bits(checks, patch):
    right = checks.kernels.resized_by_products
    patch.setattr(checks.kernels, "resized_by_products", lambda image, h, w: right(image, h, w) ^ 1)


def wrong_loss(checks, patch):
    packed = checks.kernels.packed
    right = packed._cross_entropy
    patch.setattr(packed, "_cross_entropy", lambda *a: right(*a) * 1.01)


def lost_state(checks, patch):
    patch.setattr(checks.steps, "load_portable_state", lambda optimizer, state: None)


def wrong_gather(checks, patch):
    right = checks.shards.portable_state

    def state(optimizer):
        content = right(optimizer)
        content["state"][1]["exp_avg"] = content["state"][1]["exp_avg"] + 1
        return content

    patch.setattr(checks.shards, "portable_state", state)


def gathered_at_once(checks, patch):
    right = checks.shards.portable_state

    def state(optimizer):
        whole = [unsharded(value).clone() for entry in optimizer.state.values() for value in entry.values()]
        return right(optimizer) if whole else None

    patch.setattr(checks.shards, "portable_state", state)


def other_losses(checks, patch):
    losses = iter(np.linspace(1, 2, 100))
    right = torch.Tensor.item
    patch.setattr(torch.Tensor, "item", lambda self: next(losses) if self.requires_grad else right(self))


def wrong_gate(checks, patch):
    packed = checks.kernels.packed
    patch.setattr(packed, "PLAIN", packed.PLAIN._replace(gated=lambda gate, up: up * float("nan")))


def lost_loss(checks, patch):
    right = checks.full_size.gpu.train_step
    patch.setattr(checks.full_size.gpu, "train_step", lambda *a: right(*a) * float("nan"))


def more_memory(checks, patch):
    gpu = checks.full_size.gpu
    right = gpu.train_step

    def step(model, *others):
        copies = [parameter.detach().clone() for parameter in model.parameters()]
        return right(model, *others) if copies else None

    patch.setattr(gpu, "train_step", step)


def neighbours_in_an_answer(checks, patch):
    right = GreedyAnswerer.answer

    def answer(self, asked):
        return [ids[: max(1, 9 - len(asked))] for ids in right(self, asked)]

    patch.setattr(GreedyAnswerer, "answer", answer)


def no_answer(checks, patch):
    right = Asker._prompt

    def prompt(self, question, image):
        return "no kernel" if str(question.question_id) == "7" else right(self, question, image)

    patch.setattr(Asker, "_prompt", prompt)


def pretended(train, checks, patch, faulty=(), loss=1.0, layer=None):
    """Let a check's runs write files alone, which in some differ, and do no more than a layer's product."""
    layer = torch.nn.Linear(16, 16) if layer is None else layer
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=2, max_steps=3))

    def write(recipe, folder, stop_in):
        LlavaTrainer.training_step(trainer, layer, torch.ones(16, 16, requires_grad=True))
        wrong = 0.1 * (folder.name in faulty)
        for name in ("final/model", "checkpoint-3/optimizer"):
            file = folder / f"stages/1-instruct/{name}.safetensors"
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"weight": torch.ones(4) + wrong}, file)
        row = {"loss": loss if folder.name == "whole" else 1.0, "grad_norm": 1.0}
        (folder / "log.jsonl").write_text(json.dumps(row))
        LlavaTrainer._save_checkpoint(None, None, None)
        return (0 if stop_in is None else 75), "resuming from here"

    patch.setattr(LlavaTrainer, "_save_checkpoint", lambda *_: None)
    patch.setattr(LlavaTrainer, "training_step", lambda self, model, x: model(x).sum().backward())
    patch.setattr(checks, train, write)


def other_bits_after_a_resume(train, room="runs"):
    def plant(checks, patch):
        pretended(train, getattr(checks, room), patch, faulty=("stopped",))
        # whatever this machine lacks
        patch.setattr(checks.runs, "check_device_options", lambda stage, where: None)

    return plant


def no_narrow_layer(checks, patch):
    pretended("train_here", checks.runs, patch)
    patch.setattr(checks.runs, "check_device_options", lambda stage, where: None)


def float8_left_out_by_a_compiler(checks, patch):
    """The layers are there, and their products are those of wider types."""
    layer = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False))
    pytest.importorskip("torchao.float8").convert_to_float8_training(layer)
    no_narrow_layer(checks, patch)
    pretended("train_here", checks.runs, patch, layer=layer)
    patch.setattr(type(layer[0]), "forward", torch.nn.Linear.forward)


def weights_widened_beforehand(checks, patch):
    layer = pytest.importorskip("bitsandbytes").nn.Linear4bit(16, 16, quant_type="nf4")
    no_narrow_layer(checks, patch)
    pretended("train_here", checks.runs, patch, layer=layer)
    patch.setattr(type(layer), "forward", torch.nn.Linear.forward)


def other_loss_under_zero(checks, patch):
    pretended("train_here", checks.shards, patch, loss=1.1)


def saved_at_once(checks, patch):
    pretended("train_here", checks.shards, patch)
    patch.setattr(LlavaTrainer, "_save_checkpoint", lambda *_: torch.ones(10_000).clone())


PLANTED = {
    "facts": [wrong_product],
    "attention": [wrong_attention, attention_of_nan],
    "step": [autocast_off],
    "waits": [an_item],
    "tiles": [other_bits],
    "head": [wrong_loss],
    "optimizers": [lost_state],
    "sharded": [wrong_gather, gathered_at_once],
    "zero3": [other_bits_after_a_resume("train_here", "shards"), other_loss_under_zero, saved_at_once],
    "profile": [other_losses, wrong_gate],
    "speed": [lost_loss],
    "memory": [more_memory],
    "command": [other_bits_after_a_resume("train_apart")],
    "fp8": [other_bits_after_a_resume("train_here"), no_narrow_layer, float8_left_out_by_a_compiler],
    "nf4": [other_bits_after_a_resume("train_here"), no_narrow_layer, weights_widened_beforehand],
    "evaluation": [neighbours_in_an_answer, no_answer],
}


@pytest.mark.parametrize(("name", "plant"), [(n, plant) for n, plants in PLANTED.items() for plant in plants])
def test_a_check_fails_for_a_planted_fault(run, gpu_check, monkeypatch, short_runs, name, plant):
    with monkeypatch.context() as patch:
        plant(gpu_check, patch)
        entry = run(name)
    assert not entry["passed"] and entry["detail"]["error"].startswith("Failed: "), entry


def nothing(checks, patch):
    pass


def lost_moments(checks, patch):
    """A resume takes the weights alone."""
    patch.setattr(llava_trainer, "load_optimizer", lambda *_: None)


def lost_moments_under_zero(checks, patch):
    engine = pytest.importorskip("deepspeed").DeepSpeedEngine
    right = engine.load_checkpoint

    def load(self, *args, **keys):
        loaded = right(self, *args, **keys)
        for state in self.optimizer.optimizer.state.values():
            state["exp_avg"].zero_()
        return loaded

    patch.setattr(engine, "load_checkpoint", load)


def wrong_step_under_zero(checks, patch):
    right = LlavaTrainer.compute_loss

    def loss(self, *args, **keys):
        return right(self, *args, **keys) * (1.1 if self.is_deepspeed_enabled else 1)

    patch.setattr(LlavaTrainer, "compute_loss", loss)


def gathered_together_under_zero(checks, patch):
    pytest.importorskip("deepspeed")
    right = llava_trainer.whole_parameters

    def whole(parameters, *, deepspeed):
        named, together = list(parameters), []
        for _, parameter in named:
            with gathered(parameter):
                together.append(parameter.detach().clone())
        return right(named, deepspeed=deepspeed)

    patch.setattr(llava_trainer, "whole_parameters", whole)


def plain_weights(checks, patch):
    right = stage_room.load_stage_model
    patch.setattr(stage_room, "load_stage_model", lambda *args, **keys: right(*args, **{**keys, "quantized": False}))


def wide_products(checks, patch):
    """What a compiler does that leaves float8 out."""
    pytest.importorskip("torchao")
    patch.setattr("torchao.float8.float8_linear.Float8Linear.forward", torch.nn.Linear.forward)


def no_float8(checks, patch):
    patch.setattr("llava_llama31.trainer.model.stage_model.use_float8", lambda model: [])


REAL = {
    "command": [lost_moments],
    "nf4": [nothing, lost_moments, plain_weights],
    "fp8": [nothing, lost_moments, no_float8, wide_products],
    "zero3": [nothing, lost_moments_under_zero, wrong_step_under_zero, gathered_together_under_zero],
}


@pytest.mark.torture
@pytest.mark.parametrize(("name", "plant"), [(name, plant) for name, plants in REAL.items() for plant in plants])
def test_a_check_by_real_runs_fails_for_a_fault_in_the_product(run, gpu_check, monkeypatch, short_runs, name, plant):
    """Those whose faults above are in what runs leave behind; `fp8` as if this CPU were a GPU, not compiled."""
    monkeypatch.setattr(gpu_check.runs, "train_apart", gpu_check.runs.train_here)
    monkeypatch.setattr(gpu_check.runs, "LONG_ENOUGH", {})
    monkeypatch.setattr(device_options, "_check_fp8", lambda where: None)
    monkeypatch.setattr(CpuSpeed, "is_slow_in_bfloat16", False)
    with monkeypatch.context() as patch, set_stance("force_eager"):
        plant(gpu_check, patch)
        entry = run(name)
    if plant is nothing:
        assert entry["passed"], entry
    else:
        assert not entry["passed"] and entry["detail"]["error"].startswith("Failed: "), entry


def test_torchs_notice_of_what_it_misses_is_no_wait(gpu_check):
    """`set_sync_debug_mode` gives it once a process, in words of its own, within the check."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        notice = (
            "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
        )
        warnings.warn(notice, UserWarning, stacklevel=1)
        assert not gpu_check.steps.lines_that_wait(caught)
        warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
    assert list(gpu_check.steps.lines_that_wait(caught).values()) == [1]


def test_every_check_has_a_planted_fault_and_all_have_their_time(gpu_check):
    assert {check.name for check in gpu_check.CHECKS} == set(PLANTED)
    assert sum(check.estimate for check in gpu_check.CHECKS) <= 600


def test_a_run_that_ends_otherwise_is_a_finding(run, gpu_check, monkeypatch):
    """The command line itself: here one that fails."""
    monkeypatch.setattr(sys, "executable", "false")
    entry = run("command")
    assert not entry["passed"] and "whole: exit code 1" in entry["detail"]["error"]


def test_what_a_device_cannot_do_is_said(run, gpu_check, monkeypatch, capsys):
    place = gpu_check.Place(torch.device("cpu"), small=True)
    report = gpu_check.run_all(gpu_check.CHECKS[:1], place, None, 60, lambda *_: run("fp8"))
    (entry,) = report["checks"]
    assert entry["passed"] is None and "fp8 needs a GPU" in entry["detail"]["not_on_this_device"]
    assert "NOT HERE" in capsys.readouterr().out
    monkeypatch.setattr(gpu_check.shards, "find_spec", lambda name: None)
    assert "pip install" in run("zero3")["detail"]["not_on_this_device"]


def test_the_report_is_useful_wherever_it_ends(gpu_check, tmp_path, capsys):
    file, seen = tmp_path / "gpu-check.json", []

    def run(check, place, seconds):
        seen.append(json.loads(file.read_text()) if file.exists() else None)
        return {"name": check.name, "passed": check.name != "step", "seconds": 1.0, "detail": {}}

    place = gpu_check.Place(torch.device("cpu"), small=True)
    report = gpu_check.run_all(gpu_check.CHECKS[:3], place, file, 60, run)
    assert [entry["passed"] for entry in report["checks"]] == [True, True, False] and report["not_run"] == []
    assert json.loads(file.read_text()) == report
    assert seen[0] is None and [len(before["checks"]) for before in seen[1:]] == [1, 2]
    late = gpu_check.run_all(gpu_check.CHECKS[:3], place, file, -1, run)
    assert late["checks"] == [] and late["not_run"] == ["facts", "attention", "step"]
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [("cuda", None, "0"), ("cuda:3", None, "3"), ("cuda", "4,5", "4"), ("cuda:1", "GPU-a,GPU-b", "GPU-b")],
)
def test_a_check_sees_one_gpu_of_a_machine(gpu_check, device, visible, expected):
    """`train`, which some of them start, refuses several in one process."""
    place = gpu_check.Place(torch.device(device), small=False)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert gpu_check.own_variables(place, environment) == {"CUDA_VISIBLE_DEVICES": expected}


def test_a_gpu_that_torch_cannot_use_is_no_small_run_on_the_cpu(gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(devices, "num_installed_gpus", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(gpu_check, "run_all", lambda *_: {"checks": [], "not_run": []})
    with pytest.raises(SystemExit) as ended:
        gpu_check.main([])
    assert ended.value.code == 2 and "1 NVIDIA GPU(s), but torch" in capsys.readouterr().err
    assert gpu_check.main(["--device", "cpu"]) == 0


def test_what_a_library_says_at_the_end_is_no_entry(gpu_check, monkeypatch, tmp_path):
    place = gpu_check.Place(torch.device("cpu"), small=True)
    monkeypatch.setattr(gpu_check, "__file__", str(tmp_path / "check.py"))
    entry = {"name": "facts", "passed": True, "seconds": 1.0, "detail": {}}
    (tmp_path / "check.py").write_text(f"print({json.dumps(entry)!r})\nprint('NCCL INFO comm destroyed')")
    assert gpu_check.in_own_process(gpu_check.CHECKS[0], place, 60) == entry
    (tmp_path / "check.py").write_text("print('NCCL INFO comm destroyed')")
    assert gpu_check.in_own_process(gpu_check.CHECKS[0], place, 60)["passed"] is False


def test_a_check_that_breaks_its_process_or_hangs_is_its_own_failure(gpu_check, monkeypatch, tmp_path):
    place = gpu_check.Place(torch.device("cpu"), small=True)
    script = tmp_path / "broken.py"
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    script.write_text("import os\nos.abort()")
    entry = gpu_check.in_own_process(gpu_check.CHECKS[0], place, 60)
    assert not entry["passed"] and "ended with -6" in entry["detail"]["error"]
    # what it started must not outlive it: it would hold the device
    script.write_text("import subprocess\nsubprocess.run(['sleep', '60'])")
    entry = gpu_check.in_own_process(gpu_check.CHECKS[0], place, 0.5)
    assert not entry["passed"] and "no end in" in entry["detail"]["error"]
