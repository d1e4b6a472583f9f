"""Steps on a fake CUDA device (tests/fake_cuda): a GPU's code runs, and the host never waits for the device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).parent / "fake_cuda"
sys.path.append(str(FOLDER))

import library  # noqa: E402


STEPS = ("weights", "autocast", "projector", "lora", "features", "pixels", "before ampere")
LARGEST_PAGEABLE = 64 * 1024  # of more, the driver makes the host wait
# which torch raises on under use_deterministic_algorithms(True) on CUDA, of those that could be ours
NOT_DETERMINISTIC = {
    "scatter_add",
    "scatter_add_",
    "scatter_reduce",
    "put_",
    "bincount",
    "kthvalue",
    "histc",
    "median",
}


@pytest.fixture(scope="session")
def traces(tmp_path_factory):
    """Traces of small steps by scenario and phase, made in a process that has the device; see scenarios.py."""
    if (lack := library.missing()) is not None:
        assert not os.environ.get("CI"), f"{lack}, and CI has to run these tests"
        pytest.skip(lack)
    output = tmp_path_factory.mktemp("fake_cuda") / "traces.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(FOLDER / "scenarios.py"), str(output)], check=True, env=environment)
    return json.loads(output.read_text())


def waits(phases, *, but=()):
    return {name: trace["waits"] for name, trace in phases.items() if trace["waits"] and name not in but}


@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_waits_for_nothing(traces, name):
    """But for the judgement of the step, which needs its loss and gradient norm."""
    phases = traces[name]
    assert set(phases) == {"inputs", "forward", "backward", "clip", "judge", "optimizer"}
    assert waits(phases, but=("judge",)) == {}
    # one copy of four numbers to the host, which a FakeTensor's tolist() makes one by one
    assert sum(phases["judge"]["waits"].values()) == 4
    assert all(line.startswith("item at step_health.py:") for line in phases["judge"]["waits"])


def test_a_planted_wait_is_found(traces):
    assert list(waits(traces["planted"], but=("judge",))) == ["forward"]
    assert sum(traces["planted"]["forward"]["waits"].values()) == 1


@pytest.mark.parametrize("name", [*STEPS, "answers"])
def test_nothing_is_copied_from_pageable_memory(traces, name):
    assert {line: size for trace in traces[name].values() for line, size in trace["pageable"].items()} == {}


def test_answers_wait_only_to_see_whether_all_have_ended_and_for_the_words(traces):
    found = traces["answers"]["answer"]["waits"]
    assert all(line.startswith("item at generation.py:") for line in found)
    ends, words = sorted(found.values())
    assert ends == 1  # of six tokens, asked every fourth
    assert words == 4 * 6  # one copy, which a FakeTensor's tolist() makes number by number


@pytest.mark.parametrize("name", ["weights", "autocast", "lora"])
def test_packed_rows_run_the_varlen_kernel(traces, name):
    kernels = traces[name]["forward"]["kernels"]
    assert kernels["_varlen_attn"] == 2 and not {kernel for kernel in kernels if "scaled_dot_product" in kernel}
    before = traces["before ampere"]["forward"]["kernels"]
    assert "_varlen_attn" not in before


def test_device_tiles_run_in_fifteen_kernels_a_pass(traces):
    """Sums over a filter's weights were hundreds, with a copy for each filter."""
    kernels = traces["pixels"]["inputs"]["kernels"]
    passes = kernels["addmm"]
    assert passes % 4 == 0 and kernels["copy to the device"] <= passes + 20
    assert sum(kernels.values()) <= 15 * passes + 20


@pytest.mark.skipif("TRACE_8B" not in os.environ, reason="takes minutes: make trace-8b")
def test_the_8b_step_waits_for_nothing_and_is_predicted():
    """Kernels and bytes have no target yet: norms, activations and rotary embeddings are not fused."""
    command = [sys.executable, str(FOLDER.parents[1] / "benchmarks/roofline.py"), "--json"]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert set(found) == {"waits", "kernels", "gigabytes", "seconds", "mfu"}
    assert found["waits"] == 0 and found["kernels"] < 7000 and found["gigabytes"] < 1300 and found["mfu"] > 0.35


@pytest.mark.parametrize("name", STEPS)
def test_a_step_has_deterministic_kernels(traces, name):
    """As `deterministic: true` needs: FakeTensors don't raise where a GPU would."""
    assert not NOT_DETERMINISTIC & {kernel for trace in traces[name].values() for kernel in trace["kernels"]}
