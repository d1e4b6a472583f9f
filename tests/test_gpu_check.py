"""`make gpu-check` runs here on a CPU at a minimal size; every check fails for a planted fault."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch


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
    monkeypatch.setattr(gpu_check.gpu, "matrix_peak", lambda dtype, device: 1e12)
    place = gpu_check.Place(torch.device("cpu"), small=True)
    checks = {check.name: check for check in gpu_check.CHECKS}
    return lambda name: gpu_check.run_check(checks[name], place)


ON_CPU = ("facts", "attention", "step", "waits", "tiles", "head", "optimizers", "sharded", "profile", "speed")


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_CPU)
def test_a_check_passes(run, name):
    entry = run(name)
    assert entry["passed"], entry["detail"]
    assert set(entry) == {"name", "passed", "seconds", "detail"} and json.dumps(entry)


def wrong_product(module, patch):
    patch.setattr(torch.Tensor, "__matmul__", lambda a, b: torch.zeros(len(a), b.shape[1]))


def wrong_attention(module, patch):
    right = module.packed.packed_attention
    patch.setattr(module.packed, "packed_attention", lambda *a: right(*a) * 1.001)


def attention_of_nan(module, patch):
    right = module.packed.packed_attention
    patch.setattr(module.packed, "packed_attention", lambda *a: right(*a) * torch.tensor(float("nan")))


def autocast_off(module, patch):
    moved = module._there

    def there(batch, device, dtype):
        given = moved(batch, device, dtype)
        return given | {"labels": given["labels"].roll(1)} if torch.is_autocast_enabled(device.type) else given

    patch.setattr(module, "_there", there)


def an_item(module, patch):
    right = module.packed.to_device
    patch.setattr(module.packed, "to_device", lambda x, d: (right(x, d).sum().item(), right(x, d))[1])


def other_bits(module, patch):
    right = module.resized_by_products
    patch.setattr(module, "resized_by_products", lambda image, h, w: right(image, h, w) ^ 1)


def wrong_loss(module, patch):
    right = module.packed._cross_entropy
    patch.setattr(module.packed, "_cross_entropy", lambda *a: right(*a) * 1.01)


def lost_state(module, patch):
    patch.setattr(module, "load_portable_state", lambda optimizer, state: None)


def wrong_gather(module, patch):
    right = module.portable_state

    def state(optimizer):
        content = right(optimizer)
        content["state"][1]["exp_avg"] = content["state"][1]["exp_avg"] + 1
        return content

    patch.setattr(module, "portable_state", state)


def other_losses(module, patch):
    losses = iter(np.linspace(1, 2, 100))
    right = torch.Tensor.item
    patch.setattr(torch.Tensor, "item", lambda self: next(losses) if self.requires_grad else right(self))


def wrong_gate(module, patch):
    patch.setattr(module.packed, "PLAIN", module.packed.PLAIN._replace(gated=lambda gate, up: up * float("nan")))


def lost_loss(module, patch):
    right = module.gpu.train_step
    patch.setattr(module.gpu, "train_step", lambda *a: right(*a) * float("nan"))


PLANTED = {
    "facts": [wrong_product],
    "attention": [wrong_attention, attention_of_nan],
    "step": [autocast_off],
    "waits": [an_item],
    "tiles": [other_bits],
    "head": [wrong_loss],
    "optimizers": [lost_state],
    "sharded": [wrong_gather],
    "profile": [other_losses, wrong_gate],
    "speed": [lost_loss],
}


@pytest.mark.parametrize(("name", "plant"), [(n, plant) for n, plants in PLANTED.items() for plant in plants])
def test_a_check_fails_for_a_planted_fault(run, gpu_check, monkeypatch, name, plant):
    with monkeypatch.context() as patch:
        plant(gpu_check, patch)
        entry = run(name)
    assert not entry["passed"] and entry["detail"]["error"].startswith("Failed: "), entry


def test_the_command_line_is_a_check_too(gpu_check, monkeypatch):
    """It trains the demo recipe, which takes minutes here: its failure alone is looked at."""
    assert {check.name for check in gpu_check.CHECKS} == {*ON_CPU, "command"} and set(PLANTED) == set(ON_CPU)
    monkeypatch.setattr(gpu_check.sys, "executable", "false")
    entry = gpu_check.run_check(gpu_check.CHECKS[-1], gpu_check.Place(torch.device("cpu"), small=True))
    assert not entry["passed"] and "exit code 1" in entry["detail"]["error"]


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


def test_a_check_that_breaks_its_process_or_hangs_is_its_own_failure(gpu_check, monkeypatch, tmp_path):
    place = gpu_check.Place(torch.device("cpu"), small=True)
    script = tmp_path / "broken.py"
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    script.write_text("import os\nos.abort()")
    entry = gpu_check.in_own_process(gpu_check.CHECKS[0], place, 60)
    assert not entry["passed"] and "ended with -6" in entry["detail"]["error"]
    script.write_text("import time\ntime.sleep(60)")
    entry = gpu_check.in_own_process(gpu_check.CHECKS[0], place, 0.5)
    assert not entry["passed"] and "no end in" in entry["detail"]["error"]
