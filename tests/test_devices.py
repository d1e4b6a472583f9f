"""Which device a command computes on: torch's accelerator of whatever make, never the CPU by mistake."""

import ast
import os
import platform
import resource
import sys
import types
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml

from llava_llama31.trainer.cli import _parsed, main
from llava_llama31.trainer.commands import doctor, train
from llava_llama31.trainer.distributed import devices, engine
from llava_llama31.trainer.doctor import gathering
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.fault_tolerance import peers
from llava_llama31.trainer.fault_tolerance.signals import Signals
from llava_llama31.trainer.fault_tolerance.step_health import summed
from llava_llama31.trainer.model import opening
from llava_llama31.trainer.recipes.schema import Recipe
from llava_llama31.trainer.runs import run


ROOT = Path(__file__).parents[1]
# what knows one make's GPUs and is meant to: facts about them, and kernels that only they have
OF_CUDA = {"trainer/distributed/devices.py", "trainer/doctor/facts.py", "trainer/doctor/probe.py"}
OF_CUDA |= {"trainer/doctor/ranks.py", "trainer/model/device_options.py", "trainer/model/flash_attention.py"}


@pytest.fixture
def unused_gpus(monkeypatch, tmp_path):
    """Two GPUs that the driver knows and this CPU build of torch can't use."""
    for number in range(2):
        (tmp_path / "gpus" / f"0000:0{number}:00.0").mkdir(parents=True)
    monkeypatch.setattr(devices, "_DRIVERS_GPUS", tmp_path / "gpus")
    monkeypatch.setattr(devices, "_DEVICES", tmp_path / "dev")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")


def test_a_gpu_that_torch_cannot_use_is_no_silent_cpu_run(unused_gpus, recipe_content, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_content))
    command = ["train", str(recipe), "--output", str(tmp_path / "run")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "2 NVIDIA GPU(s), but torch" in error and "train --cpu" in error and "doctor" in error
    assert not (tmp_path / "run").exists()


def test_evaluate_refuses_it_too(unused_gpus, base_folder, data_folder, tmp_path, capsys):
    command = ["evaluate", str(base_folder), "--data", str(data_folder / "questions.jsonl"), "--limit", "1"]
    command += ["--max-new-tokens", "1", "--no-browser", "--output", str(tmp_path / "answers")]
    assert main(command) == 2 and "evaluate --device cpu" in capsys.readouterr().err
    assert main([*command, "--device", "cpu"]) == 0


@pytest.mark.parametrize("how", ["hidden", "-1", "asked", "none"])
def test_a_cpu_run_that_is_meant_is_not_refused(unused_gpus, monkeypatch, tmp_path, how):
    if how in ("hidden", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "" if how == "hidden" else how)
    elif how == "asked":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "false")  # undone behind the test
        devices.ask_for_cpu()
    else:
        monkeypatch.setattr(devices, "_DRIVERS_GPUS", tmp_path / "none")
    devices.refuse_unused_gpus()


def test_a_container_is_given_device_nodes(unused_gpus, monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "_DRIVERS_GPUS", tmp_path / "none")
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert devices.num_installed_gpus() == 2
    with pytest.raises(UserError, match="2 NVIDIA GPU"):
        devices.refuse_unused_gpus()


@pytest.mark.parametrize(("capability", "has_kernels"), [((7, 0), False), ((7, 5), True), ((8, 9), True)])
def test_a_gpu_that_torch_has_no_kernels_for_is_named(monkeypatch, capability, has_kernels):
    """A V100 under builds for CUDA 13: its first kernel would end the run in a traceback."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_86", "sm_90"])
    refused = pytest.raises(UserError, match=r"no kernels for Tesla, capability 7\.0: it is built for sm_75, sm_80")
    with nullcontext() if has_kernels else refused:
        devices.refuse_unbuilt_gpu(torch.device("cuda", 0))


def test_no_model_and_no_run_begins_on_such_a_gpu(monkeypatch, base_folder, recipe_content, tmp_path):
    def refuse(device):
        raise UserError("no kernels", fix=str(device))

    monkeypatch.setattr(opening, "refuse_unbuilt_gpu", refuse)
    monkeypatch.setattr(run, "refuse_unbuilt_gpu", refuse)
    with pytest.raises(UserError, match="no kernels.*cpu"):
        opening.open_model(base_folder)
    with pytest.raises(UserError, match="no kernels.*cpu"):
        run.run_recipe(Recipe.model_validate(recipe_content), tmp_path / "run", command="", signals=Signals())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("make", ["mps", "xpu", "hpu", "cuda"])
def test_the_accelerator_is_used_whatever_its_make(monkeypatch, make):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(make))
    assert devices.default_device() == torch.device(make) and not devices.uses_cpu()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert devices.default_device() == torch.device("cpu") and devices.uses_cpu()


def test_nothing_else_asks_for_cuda():
    """Asked so, Apple's, Intel's, Huawei's and Habana's accelerators stood idle without a word."""
    found = set()
    for path in sorted((ROOT / "trainer").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda":
                found.add(str(path.relative_to(ROOT)))
    assert found <= OF_CUDA


@pytest.mark.parametrize("has_it", [False, True])
def test_intels_gpus_sum_in_a_type_that_they_have(monkeypatch, has_it):
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: types.SimpleNamespace(has_fp64=has_it))
    assert devices.widest_float(torch.device("xpu", 0)) == (torch.float64 if has_it else torch.float32)


@pytest.fixture
def gpus(monkeypatch):
    """A machine with so many GPUs, in a process that nobody launched."""

    def pretend(number):
        monkeypatch.setattr(run, "uses_cpu", lambda: False)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: number)

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return pretend


class Started(Exception):
    """A run has begun."""


@pytest.mark.parametrize(
    ("number", "variables", "refusal"),
    [
        (1, {}, None),
        (8, {}, "8 GPUs are visible to one process"),
        (8, {"RANK": "0", "WORLD_SIZE": "1"}, "8 GPUs are visible to one process"),
        (8, {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}, None),
    ],
)
def test_a_machines_rank_is_no_launched_process(
    gpus, monkeypatch, recipe_content, tmp_path, number, variables, refusal
):
    """Kubeflow sets it for a machine: Transformers would share micro-batches among the GPUs of one process."""
    gpus(number)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def launched_processes(cpu):
        raise Started

    monkeypatch.setattr(run, "launched_processes", launched_processes)
    recipe = Recipe.model_validate(recipe_content)
    with pytest.raises(UserError, match=refusal) if refusal else pytest.raises(Started):
        run.run_recipe(recipe, tmp_path, command="", signals=Signals())


@pytest.mark.parametrize("variables", [{"RANK": "1", "WORLD_SIZE": "2"}, {"PMI_RANK": "1", "PMI_SIZE": "2"}], ids=str)
def test_processes_without_a_place_on_their_machine_are_refused(gpus, monkeypatch, variables):
    """Each would train by itself, all into the same folder."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused = pytest.raises(UserError, match="a launcher speaks of 2 processes, but LOCAL_RANK is not set")
    with refused, peers.launched_processes(cpu=False):
        pass


@pytest.mark.parametrize(("number", "local_rank", "refused"), [(1, 3, True), (4, 4, True), (4, 3, False)])
def test_each_process_has_a_gpu_of_its_own(gpus, monkeypatch, number, local_rank, refused):
    """Accelerate takes ranks modulo the GPUs, but waits at barriers on the GPU of the rank's own number."""
    gpus(number)
    for name, value in {"RANK": local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))

    def connect(*arguments):
        raise Started

    monkeypatch.setattr(peers.Peers, "connect", connect)
    what = f"LOCAL_RANK is {local_rank}, but this process sees {number} GPU"
    ended = pytest.raises(UserError, match=what) if refused else pytest.raises(Started)
    with ended, peers.launched_processes(cpu=False):
        pass


def test_one_machine_of_several_starts_no_run_of_its_own(gpus, monkeypatch, capsys):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "tiny", "--devices", "2"]) == 2
    assert "starts processes on one machine, and WORLD_SIZE is 2" in capsys.readouterr().err


@pytest.mark.parametrize(("variables", "launches"), [({"RANK": "0"}, True), ({"RANK": "0", "LOCAL_RANK": "0"}, False)])
def test_devices_are_started_on_a_machine_with_a_rank(gpus, monkeypatch, tmp_path, variables, launches):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def started(*others, **more):
        raise Started

    monkeypatch.setattr(train, "_launch", started)
    monkeypatch.setattr(run, "run_recipe", lambda *others, **more: None)
    command = ["train", "tiny", "--devices", "2", "--output", str(tmp_path)]
    with pytest.raises(Started) if launches else nullcontext():
        assert train.run(_parsed(command)) == 0


@pytest.mark.parametrize("keys", [{"deterministic": True}, {"trainer_args": {"full_determinism": True}}])
def test_cublas_is_told_of_a_later_stage_before_any_product(gpus, monkeypatch, recipe_content, tmp_path, keys):
    """Torch reads the variable at the first product only, and refuses those of a deterministic stage after it."""
    gpus(1)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # undone behind the test
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    recipe_content["stages"]["instruct"] |= keys
    told = []

    def launched_processes(cpu):
        told.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        raise Started

    monkeypatch.setattr(run, "launched_processes", launched_processes)
    with pytest.raises(Started):
        run.run_recipe(Recipe.model_validate(recipe_content), tmp_path, command="", signals=Signals())
    assert told == [":4096:8"]


def test_deepspeeds_own_group_waits_as_long_as_the_others(monkeypatch):
    """Its default ends every process after 10 minutes under NCCL, while `loader_timeout` and `step_timeout` last."""
    groups = pytest.importorskip("deepspeed.utils.groups")
    # its own reduction for CPUs, which it would compile
    monkeypatch.setattr(sys.modules["deepspeed.comm.torch"], "build_shm_op", lambda: None)
    monkeypatch.setattr(sys.modules["deepspeed.comm.comm"], "cdb", None)
    monkeypatch.setattr(groups, "_WORLD_GROUP", None)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        engine.join_deepspeed(types.SimpleNamespace(deepspeed="zero3"))
        backend = groups._get_data_parallel_group()._get_backend(torch.device("cpu"))
        assert backend.options._timeout == engine.COLLECTIVE_TIMEOUT
    finally:
        torch.distributed.destroy_process_group()


def test_apples_gpus_sum_in_a_type_that_they_have(monkeypatch):
    asked = []
    full = torch.full

    def on_host(size, value, dtype, device):
        asked.append(dtype)
        return full(size, value, dtype=dtype)

    monkeypatch.setattr(torch, "full", on_host)
    assert summed([1.0, 2.0], torch.device("mps")) == [1.0, 2.0] and set(asked) == {torch.float32}


def test_processes_may_import_torch_before_they_have_to_answer(monkeypatch):
    """Eight of them on a network file system take longer than 20 seconds to import it."""
    limits = []
    monkeypatch.setattr(gathering, "all_reduce_commands", lambda *arguments: limits.append(arguments[3]) or [])
    monkeypatch.setattr(gathering.facts, "gpus", lambda: types.SimpleNamespace(devices=(1, 2)))
    monkeypatch.setattr(gathering.checks, "check_communication", lambda backend, outcomes: [])
    gathering._check_nccl(Path("unused"))
    assert limits and min(*limits, doctor._RANKS_SECONDS) >= 120


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's options")
def test_memory_that_tensors_give_back_is_kept_for_the_next():
    def faults() -> int:
        for _ in range(2):
            tensors = [torch.zeros(4_000_000) for _ in range(4)]
            tensors.clear()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            tensors = [torch.zeros(4_000_000) for _ in range(4)]
            tensors.clear()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    child = os.fork()  # the setting is the process's
    if child == 0:
        before = faults()
        devices.keep_freed_memory()
        os._exit(0 if faults() * 10 < before else 1)
    assert os.waitpid(child, 0)[1] == 0
