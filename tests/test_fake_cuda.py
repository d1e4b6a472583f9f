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


MORE = ("projector", "features", "unfused", "before ampere")  # in `make torture`
STEPS = (
    *("weights", "autocast", "lora", "pixels", "selective"),
    *(pytest.param(name, marks=pytest.mark.torture) for name in MORE),
)
RANKS = ("rank 0", "rank 1")  # of two under FSDP2
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
def traces(make_once):
    """Traces of small steps by scenario and phase, made in a process that has the device; see scenarios.py."""
    if (lack := library.missing()) is not None:
        assert not os.environ.get("CI"), f"{lack}, and CI has to run these tests"
        pytest.skip(lack)

    def fill(folder: Path) -> None:
        command = [sys.executable, str(FOLDER / "scenarios.py"), str(folder / "traces.json")]
        command += ["all"] if "TORTURE" in os.environ else []
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    return json.loads((make_once("fake_cuda", fill) / "traces.json").read_text())


def waits(phases, *, but=()):
    return {name: trace["waits"] for name, trace in phases.items() if trace["waits"] and name not in but}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_waits_for_nothing(traces, name):
    """But for the judgement of the step, which needs its loss and gradient norm."""
    phases = traces[name]
    assert set(phases) == {"inputs", "forward", "backward", "clip", "judge", "optimizer", "save"}
    assert waits(phases, but=("judge", "save")) == {}
    # one copy of four numbers to the host, which a FakeTensor's tolist() makes one by one
    assert sum(phases["judge"]["waits"].values()) == 4
    assert all(line.startswith("item at step_health.py:") for line in phases["judge"]["waits"])


def test_a_planted_wait_is_found(traces):
    assert list(waits(traces["planted"], but=("judge", "save"))) == ["forward"]
    assert sum(traces["planted"]["forward"]["waits"].values()) == 1


@pytest.mark.parametrize("name", STEPS)
def test_a_save_waits_for_the_copy_of_each_moment_and_runs_nothing_else(traces, name):
    save = traces[name]["save"]
    ((line, number),) = save["waits"].items()
    assert line.startswith("copy to the host at portable_state.py:") and save["kernels"] == {}
    assert number and number % 3 == 0  # two moments and the step of each parameter


@pytest.mark.parametrize("name", RANKS)
def test_a_step_under_fsdp2_waits_for_nothing(traces, name):
    phases = traces[name]
    assert set(phases) == {"inputs", "forward", "backward", "clip", "optimizer", "moments", "weights"}
    assert waits(phases, but=("moments", "weights")) == {}
    # three layers and what is left of the model, and the layers again for their gradients
    assert phases["forward"]["kernels"]["_allgather_base_"] == 4
    assert phases["backward"]["kernels"]["_reduce_scatter_base_"] == 3


@pytest.mark.parametrize("name", RANKS)
def test_a_save_under_fsdp2_gathers_tensors_one_by_one_and_waits_only_for_what_it_writes(traces, name):
    """And once for what the ranks hold, before they gather it."""
    moments, weights = traces[name]["moments"], traces[name]["weights"]
    asked = {line for line in moments["waits"] if not line.startswith("copy to the host")}
    assert len(asked) == 1 and asked.pop().startswith("item at portable_state.py:")
    assert all(line.startswith("copy to the host at parameters.py:") for line in weights["waits"])
    number, of_moments = (found["kernels"]["all_gather_into_tensor"] for found in (weights, moments))
    assert 2 * number > of_moments > 0  # two of each trained parameter
    writes, steps = name == "rank 0", of_moments // 2  # of each parameter, which are whole
    assert sum(weights["waits"].values()) == writes * number
    assert sum(moments["waits"].values()) == 1 + writes * (of_moments + steps)


@pytest.mark.parametrize("name", [*STEPS, *RANKS, "answers"])
def test_nothing_is_copied_from_pageable_memory(traces, name):
    assert {line: size for trace in traces[name].values() for line, size in trace["pageable"].items()} == {}


def test_answers_wait_for_the_words_alone_every_fourth_token(traces):
    ((line, number),) = traces["answers"]["answer"]["waits"].items()
    assert line.startswith("item at generation.py:")
    assert number == 4 * 6  # two copies, which a FakeTensor's tolist() makes number by number


@pytest.mark.parametrize("name", ["weights", "autocast", "lora"])
def test_packed_rows_run_the_varlen_kernel(traces, name):
    kernels = traces[name]["forward"]["kernels"]
    assert kernels["_varlen_attn"] == 2 and not {kernel for kernel in kernels if "scaled_dot_product" in kernel}


@pytest.mark.torture
def test_a_device_before_ampere_runs_no_varlen_kernel(traces):
    before = traces["before ampere"]["forward"]["kernels"]
    assert "_varlen_attn" not in before


def test_device_tiles_run_in_ten_kernels_an_image(traces):
    """Besides what runs once a micro-batch, with one copy for the filters of all its images."""
    kernels = traces["pixels"]["inputs"]["kernels"]
    images, more = divmod(kernels["bmm"], 3)  # one before, for both resizes, and one after for each
    assert images == 2 and not more
    own = sum(kernels.values()) - kernels["copy to the device"]
    assert own <= 10 * images + 6
    others = traces["weights"]["inputs"]["kernels"]["copy to the device"]  # of tiles; here the images themselves
    assert kernels["copy to the device"] <= others + images


def totals(phases):
    chosen = [phases[name] for name in ("inputs", "forward", "backward")]
    return [sum(sum(trace[key].values()) for trace in chosen) for key in ("kernels", "bytes")]


@pytest.mark.torture
def test_fused_kernels_are_fewer_and_move_less(traces):
    kernels, size = totals(traces["weights"])
    eager_kernels, eager_size = totals(traces["unfused"])
    assert kernels < 0.75 * eager_kernels and size < 0.9 * eager_size
    assert "silu" in traces["unfused"]["forward"]["kernels"]


def test_nothing_that_is_fused_runs_in_eager_kernels_besides(traces):
    """As the vision tower's activation and norms do."""
    forward = traces["weights"]["forward"]["kernels"]
    assert {name for name in forward if name.startswith("fused")} == {
        f"fused {name}" for name in ("norm", "sum_norm", "rotate", "gated")
    }
    assert "silu" not in forward


def test_selective_checkpointing_repeats_no_product(traces):
    """It makes norms and gated products again, of two layers each."""
    selective, every = (traces[name]["backward"]["kernels"] for name in ("selective", "weights"))
    assert (
        selective["mm"] < every["mm"] and selective["_varlen_attn_backward"] == 2 and "_varlen_attn" not in selective
    )
    assert (selective["fused norm_again"], selective["fused gated"]) == (4, 2)


def test_a_compiled_function_is_one_kernel_and_moves_what_it_must(traces):
    """By Inductor's own schedule for an H100; gradients of a norm's weight are sums over parts of the positions."""
    for name, (sizes, least) in traces["schedules"].items():
        assert len(sizes) <= (2 if name == "norm_gradient" else 1), name
        assert sum(sizes) <= 1.05 * least, name


def test_the_roofline_prints_one_json_object(traces):
    found = json.loads(traces["roofline"])
    assert set(found) == {"waits", "kernels", "gigabytes", "seconds", "mfu"} and found["waits"] == 0
    assert found["kernels"] > 100 and found["seconds"] > 0 and 0 < found["mfu"] < 1


PREDICT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import roofline
step = roofline.Step(roofline.gpu.SHAPES["8b"], "instruct", micro_batch=8, checkpointing="selective")
print(json.dumps(roofline.predict(step, roofline.ACCELERATORS["h100"])))
"""


@pytest.mark.skipif("TRACE_8B" not in os.environ, reason="takes minutes: make trace-8b")
@pytest.mark.timeout(1200)
def test_the_8b_step_is_within_its_goals():
    """As `benchmarks/roofline.py` has it by default. Memory: tests/test_plan.py."""
    command = [sys.executable, "-c", PREDICT, str(FOLDER.parents[1] / "benchmarks")]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert found["waits"] == 0 and found["kernels"] <= 4500 and found["gigabytes"] <= 700 and found["mfu"] >= 0.5
    assert found["pageable"] <= LARGEST_PAGEABLE


@pytest.mark.parametrize("name", STEPS)
def test_a_step_has_deterministic_kernels(traces, name):
    """As `deterministic: true` needs: FakeTensors don't raise where a GPU would."""
    assert not NOT_DETERMINISTIC & {kernel for trace in traces[name].values() for kernel in trace["kernels"]}
