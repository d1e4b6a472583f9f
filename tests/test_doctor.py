"""The doctor's judgements on made-up machines, its probes on this one, and its questions to real ranks."""

import ast
import configparser
import http.server
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import threading
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.commands.doctor import report
from llava_llama31.trainer.costs.matrix_peak import CpuSpeed
from llava_llama31.trainer.doctor import checks, facts, gathering, ranks
from llava_llama31.trainer.doctor.facts import (
    AccelerateConfig,
    BuildLock,
    Compilers,
    Folder,
    Gpu,
    Gpus,
    Hub,
    Installations,
    Launch,
    Machine,
    Package,
)
from llava_llama31.trainer.doctor.probe import Outcome, Probes, all_reduce_commands


ROOT = Path(__file__).parents[1]
GB = 10**9

MACHINE = Machine("node1", "Linux", "3.11.7", 64, 512 * GB, None, 250 * GB, 65536, None, None, ())
TORCH = Package("torch", ">=2.12", "", "2.13.0+cu130", "2.13.0+cpu")
PEFT = Package("peft", ">=0.18", "peft", None, "0.21.2")
H100 = Gpu("NVIDIA H100", (9, 0), 85 * GB, 84 * GB)
MI300X = Gpu("AMD Instinct MI300X", (9, 4), 206 * GB, 205 * GB, "gfx942")
GPUS = Gpus((H100, H100), "12.8", ("sm_80", "sm_90"), None, "570.86.15", (12, 8), 2)
FOLDER = Folder("output", "/runs", "ext4", 900 * GB, None, None, None)
COMPILERS = Compilers("0.19.8", "/usr/bin/c++", "/usr/bin/ninja", "/usr/local/cuda/bin/nvcc", "12.8", ())
HUB = Hub(False, "https://huggingface.co", "HF_TOKEN", user="somebody")
ACCELERATE = AccelerateConfig("/home/me/default config.yaml", None, 8)
LAUNCH = Launch({}, 64, ("lo", "eth0", "ib0"), "10.0.0.1")
TWO_MACHINES = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "OMP_NUM_THREADS": "8", "MASTER_ADDR": "node1"}


def saved(**content) -> AccelerateConfig:
    return replace(ACCELERATE, content=content)


def with_variables(**variables) -> Launch:
    return replace(LAUNCH, variables=variables)


def of_two(**variables) -> Launch:
    return replace(LAUNCH, variables={**TWO_MACHINES, **variables})


def gpus(**changes) -> Gpus:
    return replace(GPUS, **changes)


NO_DEVICE = {"devices": ()}
# check, its facts, and what it must find: level and a part of the text; "ok" alone where nothing is wrong
CASES = [
    (checks.check_machine, (MACHINE, 8), "ok", "512 GB memory"),
    (checks.check_machine, (replace(MACHINE, memory_limit=64 * GB), 8), "ok", "64 GB memory (the control group's"),
    (checks.check_machine, (replace(MACHINE, memory_limit=16 * GB), 8), "warning", "16.0 GB for 8 process(es)"),
    (checks.check_machine, (replace(MACHINE, shared_memory=64 * 10**6), 1), "warning", "64 MB are free in /dev/shm"),
    (checks.check_machine, (replace(MACHINE, shared_memory=None), 1), "ok", "64 cores"),
    (checks.check_machine, (replace(MACHINE, open_files=1024), 1), "warning", "at most 1024 open files"),
    (checks.check_machine, (replace(MACHINE, address_space=8 * GB), 1), "warning", "limited to 8 GB"),
    (
        checks.check_machine,
        (replace(MACHINE, infiniband=("mlx5_0",), locked_memory=65536), 1),
        "warning",
        "64 KiB may be locked, and there is InfiniBand (mlx5_0)",
    ),
    (
        checks.check_processor,
        (CpuSpeed(2e9, 76e9, "x86_64, AVX2"), 0),
        "warning",
        "on a core of this CPU (x86_64, AVX2) bfloat16",
    ),
    (checks.check_processor, (CpuSpeed(2e9, 76e9, "x86_64, AVX2"), 1), "ok", "(x86_64, AVX2)"),
    (checks.check_processor, (CpuSpeed(200e9, 76e9, "x86_64, AVX512"), 0), "ok", "200 GFLOP/s, float32 products 76"),
    (checks.check_packages, ([TORCH, PEFT],), "ok", "1 packages"),
    (checks.check_packages, ([replace(TORCH, installed=None)],), "error", "torch is missing"),
    (checks.check_packages, ([replace(TORCH, installed="2.5.1")],), "error", "torch 2.5.1 is outside the supported"),
    (checks.check_packages, ([replace(PEFT, installed="0.1")],), "error", "peft 0.1 is outside"),
    (checks.check_packages, ([replace(TORCH, installed="2.14.0")],), "warning", "torch 2.14.0 (tested: 2.13.0"),
    (checks.check_packages, ([replace(TORCH, installed="2.13.1")],), "ok", "all in their tested series"),
    (checks.check_installations, (Installations(("/venv",), "/clone"),), "ok", "/clone"),
    (checks.check_installations, (Installations(("/a", "/b"), "/b/llava"),), "warning", "2 installations: /a, /b"),
    (checks.check_gpus, (GPUS,), "ok", "GPU 0, 1: NVIDIA H100, 85 GB, capability 9.0, bfloat16 and float8"),
    (checks.check_gpus, (GPUS,), "ok", "570.86.15, CUDA up to 12.8; torch uses 12.8"),
    (
        checks.check_gpus,
        (gpus(devices=(H100, replace(H100, free=20 * GB))),),
        "warning",
        "GPU 1: other processes hold",
    ),
    (
        checks.check_gpus,
        (
            gpus(
                devices=(H100, replace(H100, name="A100")),
            ),
        ),
        "warning",
        "the GPUs differ",
    ),
    (
        checks.check_gpus,
        (gpus(devices=(replace(H100, capability=(12, 0)),)),),
        "error",
        "not built for capability 12.0",
    ),
    (
        checks.check_gpus,
        (gpus(architectures=("sm_75",), devices=(replace(H100, capability=(7, 5)),)),),
        "warning",
        "has no bfloat16 matrix products",
    ),
    (checks.check_gpus, (gpus(devices=(replace(H100, capability=(8, 6)),)),), "ok", "8.6, bfloat16"),
    (checks.check_gpus, (Gpus((MI300X,), architectures=("gfx90a", "gfx942")),), "ok", "MI300X, 206 GB, gfx942"),
    (checks.check_gpus, (Gpus((MI300X,), architectures=("gfx90a",)),), "warning", "torch is not built for gfx942"),
    (checks.check_gpus, (gpus(**NO_DEVICE, torch_cuda="13.0"),), "error", "torch is built for CUDA 13.0, the driver"),
    (checks.check_gpus, (gpus(**NO_DEVICE, torch_cuda="12.9", error="broken"),), "error", "can't use them: broken"),
    (checks.check_gpus, (gpus(**NO_DEVICE, torch_cuda=None),), "error", "2 GPU(s) here, but torch is a CPU build"),
    (checks.check_gpus, (gpus(**NO_DEVICE, visible=""),), "warning", "CUDA_VISIBLE_DEVICES= hides all GPUs"),
    (checks.check_gpus, (Gpus(),), "ok", "none"),
    (checks.check_communication, ("gloo", [Outcome(None, 1.0), Outcome(None, 2.0)]), "ok", "2 processes of this"),
    (checks.check_communication, ("gloo", [Outcome(None), Outcome("no answer")]), "error", "process 1: no answer"),
    (
        checks.check_communication,
        ("nccl", [Outcome("refused")] * 2),
        "error",
        "process 0: refused; process 1: refused",
    ),
    (checks.check_folder, (FOLDER,), "ok", "/runs: 900 GB free, ext4"),
    (checks.check_folder, (replace(FOLDER, write_error="Read-only"),), "error", "/runs can't be written: Read-only"),
    (checks.check_folder, (replace(FOLDER, free=100 * GB),), "warning", "100.0 GB are free"),
    (checks.check_folder, (replace(FOLDER, free=GB // 2),), "error", "0.5 GB are free in /runs"),
    (checks.check_folder, (replace(FOLDER, role="Hub cache", free=0),), "error", "0.0 GB are free"),
    (checks.check_folder, (replace(FOLDER, role="temporary", free=GB),), "warning", "1.0 GB are free"),
    (checks.check_folder, (replace(FOLDER, filesystem="tmpfs"),), "warning", "/runs is tmpfs"),
    (checks.check_folder, (replace(FOLDER, role="temporary", filesystem="tmpfs"),), "ok", "tmpfs"),
    (checks.check_folder, (replace(FOLDER, lock_error="Function not implemented"),), "error", "no working flock"),
    (checks.check_folder, (replace(FOLDER, role="cache", lock_error="no"),), "warning", "no working flock: no"),
    (checks.check_folder, (replace(FOLDER, durable_error="Invalid"),), "error", "can't sync and rename: Invalid"),
    (checks.check_compilers, (COMPILERS,), "ok", "0.19.8"),
    (checks.check_compilers, (replace(COMPILERS, deepspeed=None, cpp=None),), "ok", "not installed"),
    (checks.check_compilers, (replace(COMPILERS, cpp=None, nvcc=None),), "warning", "a C++ compiler and nvcc missing"),
    (checks.check_compilers, (replace(COMPILERS, nvcc=None, torch_cuda=None),), "ok", "0.19.8"),
    (checks.check_compilers, (replace(COMPILERS, locks=(BuildLock("/x/lock", 90),)),), "error", "is 90 minutes old"),
    (checks.check_compilers, (replace(COMPILERS, locks=(BuildLock("/x/lock", 1),)),), "warning", "is 1 minutes old"),
    (checks.check_torchvision, (None,), "ok", "not installed"),
    (checks.check_torchvision, (Outcome(None),), "ok", "fits torch"),
    (checks.check_torchvision, (Outcome("no answer in 20 s", busy="a load of 9"),), "warning", "not checked"),
    (checks.check_torchvision, (Outcome("operator nms does not exist"),), "error", "operator nms does not exist"),
    (checks.check_torchao, (None, 1), "ok", "not installed"),
    (checks.check_torchao, (Outcome("no module"), 0), "error", "no module"),
    (checks.check_torchao, (Outcome(None, messages=("Failed to load _C.so: x",)), 1), "warning", "Failed to load _C"),
    (checks.check_torchao, (Outcome(None, messages=("Failed to load _C.so: x",)), 0), "ok", "can use it"),
    (checks.check_hub, (HUB,), "ok", "token from HF_TOKEN, of somebody"),
    (checks.check_hub, (replace(HUB, token_from=None, user=None),), "ok", "no token"),
    (checks.check_hub, (replace(HUB, offline=True, user=None),), "ok", "offline by HF_HUB_OFFLINE"),
    (checks.check_hub, (replace(HUB, error="ConnectError", user=None),), "warning", "can't be reached: ConnectError"),
    (checks.check_hub, (replace(HUB, refused=True, error="status 401", user=None),), "error", "refuses the token"),
    (checks.check_hub, (replace(HUB, token_from="/t", token_mode=0o644),), "warning", "/t is readable by others"),
    (checks.check_hub, (replace(HUB, token_from="/t", token_mode=0o600),), "ok", "token from /t"),
    (checks.check_accelerate_config, (ACCELERATE,), "ok", "no saved default"),
    (checks.check_accelerate_config, (saved(distributed_type="MULTI_GPU", num_processes=8),), "ok", "MULTI_GPU, 8"),
    (checks.check_accelerate_config, (saved(use_cpu=True),), "warning", "use_cpu: true leaves the GPUs idle"),
    (checks.check_accelerate_config, (saved(distributed_type="MULTI_CPU"),), "warning", "starts one process unless"),
    (checks.check_accelerate_config, (saved(distributed_type="FSDP"),), "warning", "FSDP shards every launch"),
    (checks.check_accelerate_config, (saved(distributed_type="NO"),), "warning", "NO starts one process"),
    (
        checks.check_accelerate_config,
        (saved(distributed_type="MULTI_GPU", num_processes=2),),
        "warning",
        "num_processes: 2 beside 8 GPUs",
    ),
    (checks.check_accelerate_config, (saved(num_machines=2),), "warning", "num_machines: 2 waits"),
    (checks.check_accelerate_config, (saved(compute_environment="AMAZON_SAGEMAKER"),), "warning", "AMAZON_SAGEMAKER"),
    (checks.check_variables, (LAUNCH,), "ok", "no variable"),
    (checks.check_variables, (with_variables(NCCL_P2P_DISABLE="0", NCCL_DEBUG="WARN"),), "ok", "no variable"),
    *(
        (checks.check_variables, (with_variables(**{name: value or "x"}),), "warning", f"{name}={value or 'x'}")
        for name, value, _, _ in checks._VARIABLES
    ),
    (checks.check_variables, (with_variables(NCCL_SOCKET_IFNAME="eth"),), "ok", "no variable"),
    (checks.check_variables, (with_variables(NCCL_SOCKET_IFNAME="^docker,lo"),), "ok", "no variable"),
    (
        checks.check_variables,
        (with_variables(NCCL_SOCKET_IFNAME="=eth"),),
        "error",
        "=eth: there is no such interface",
    ),
    (checks.check_variables, (with_variables(GLOO_SOCKET_IFNAME="ens3"),), "error", "GLOO_SOCKET_IFNAME=ens3: there"),
    (checks.check_variables, (of_two(NCCL_SOCKET_IFNAME="lo"),), "error", "NCCL_SOCKET_IFNAME=lo"),
    (checks.check_variables, (of_two(),), "ok", "no variable"),
    (checks.check_variables, (of_two(MASTER_ADDR="localhost"),), "warning", "MASTER_ADDR=localhost"),
    (checks.check_variables, (replace(of_two(), address="127.0.1.1"),), "warning", "name resolves to 127.0.1.1"),
    (checks.check_variables, (replace(of_two(), address=None),), "warning", "name resolves to nothing"),
    (checks.check_variables, (with_variables(LOCAL_WORLD_SIZE="8"),), "warning", "OMP_NUM_THREADS is not set"),
    (
        checks.check_variables,
        (with_variables(LOCAL_WORLD_SIZE="8", OMP_NUM_THREADS="64"),),
        "warning",
        "OMP_NUM_THREADS=64",
    ),
    (checks.check_ranks, (2, 1, {0: "a", 1: "b"}, {"gloo": {0: None, 1: None}}, "a:1"), "ok", "2 ranks on 2 machine"),
    (
        checks.check_ranks,
        (16, 8, {rank: "a" for rank in range(8)}, {}, "a:1"),
        "error",
        "of 16 ranks 8, 9, 10, 11, 12, 13, 14, 15 never reached a:1 (machine 1)",
    ),
    (
        checks.check_ranks,
        (2, 1, {0: "a", 1: "b"}, {"gloo": {0: None}}, "a:1"),
        "error",
        "gloo: rank 1 on b: no answer",
    ),
    (checks.check_ranks, (1, 1, {0: "a"}, {"nccl": {0: "refused"}}, "a:1"), "error", "nccl: rank 0 on a: refused"),
]


@pytest.mark.parametrize(("check", "arguments", "level", "text"), CASES)
def test_every_finding(check, arguments, level, text):
    found = check(*arguments)
    assert [finding for finding in found if finding.level == level and text in finding.what], found
    worse = [finding for finding in found if finding.level != "ok"]
    assert len(worse) == (level != "ok"), "one fault is told once, and no other is told beside it"


AGREED = ({0: {"torch": "2"}, 1: {"torch": "2"}}, {0: True, 1: True}, {0: True, 1: True}, {0: "a", 1: "b"}, Path("/o"))
# an argument that is something else, and what follows
CHANGES = [
    (0, AGREED[0], "ok", "the same versions"),
    (0, {0: {"torch": "2"}, 1: {"torch": "3"}}, "error", "torch 2 on a, but 3 on b"),
    (1, {0: True, 1: False}, "error", "b don't see what a writes to /o"),
    (2, {0: True, 1: False}, "ok", "b and a have separate caches"),
]


def agreement(place, value, *_):
    return [*AGREED[:place], value, *AGREED[place + 1 :]]


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_ranks_disagree_on(change):
    assert [(f.level, change[3] in f.what) for f in checks.check_agreement(*agreement(*change))] == [(change[2], True)]


def test_every_finding_has_a_case():
    tree = ast.parse(Path(checks.__file__).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    made = {call.lineno for call in calls if call.func.id == "DoctorFinding"}
    ran = set()

    def trace(frame, event, argument):
        ran.add(frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: trace if frame.f_code.co_filename == checks.__file__ else None)
    try:
        for check, arguments, *_ in CASES:
            check(*arguments)
        for change in CHANGES:
            checks.check_agreement(*agreement(*change))
    finally:
        sys.settrace(before)
    assert len(made) > 40 and made <= ran, sorted(made - ran)


# not of the library, or in no version beside the pinned fsspec
UNPINNED = ("dev", "docs", "upstream", "gs")


def test_the_tested_versions_are_those_that_ci_installs():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lists = [config["options"]["install_requires"]]
    lists += [lines for extra, lines in config["options.extras_require"].items() if extra not in UNPINNED]
    names = {re.split(r"[\[<>=]", line)[0].lower() for line in "\n".join(lists).split()}
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().lower().split())
    assert facts.tested_versions() == {name: pinned[name] for name in names}


def test_a_check_that_fails_is_a_finding():
    def broken():
        raise ZeroDivisionError("by [nothing]")

    found = gathering._run([("broken", broken), ("whole", lambda: checks.check_gpus(Gpus()))], debug=False)
    assert [f.level for f in found] == ["error", "ok"]
    assert found[0].what == "the check failed: ZeroDivisionError: by [nothing]"


def test_the_report_ends_with_errors_and_says_how_to_mend_them(capsys):
    report([*checks.check_gpus(gpus(devices=())), *checks.check_gpus(GPUS)], json_output=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok") and lines[-1] == "1 error, 0 warnings, 2 ok"
    assert [line.strip().partition(" ")[0] for line in lines[-4:-1]] == ["error", "why:", "fix:"]


# facts, where this machine can show that they are true


def test_the_file_system_is_the_innermost_mount():
    mounts = "1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:1 / /a\\040b rw shared:1 - nfs4 host:/x rw\n"
    mounts += "3 1 0:2 / /ab rw - tmpfs none rw\n"
    kinds = [facts.filesystem(Path(path), mounts) for path in ("/a b/c", "/abc", "/ab", "/")]
    assert kinds == ["nfs4", "ext4", "tmpfs", "ext4"]


def test_a_folder_is_tried_out_and_left_as_it_was(tmp_path):
    found = facts.folder("output", tmp_path / "new" / "run")
    assert found.write_error is found.lock_error is found.durable_error is None and found.free > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_nobody_may_write_to():
    found = facts.folder("output", Path("/proc/run"))
    assert found.write_error and found.filesystem == "proc"


def test_locks_of_builds_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "py311_cpu" / "fused_adam").mkdir(parents=True)
    (tmp_path / "py311_cpu" / "fused_adam" / "lock").touch()
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "lock").touch()
    os.utime(tmp_path / "cpu_adam" / "lock", (0, 0))
    found = checks.check_compilers(facts.compilers())
    assert sorted(f.level for f in found if f.check == "build lock") == ["error", "warning"]
    assert f"rm {tmp_path}/cpu_adam/lock" in [f.fix for f in found]


TOKEN = "hf_" + "x" * 30


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of our own that knows one token."""
    from huggingface_hub import constants

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.headers["Authorization"] == f"Bearer {TOKEN}"
            self.send_response(200 if known else 401)
            self.end_headers()
            self.wfile.write(b'{"name": "somebody"}' if known else b"{}")

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield monkeypatch
        server.shutdown()


def test_whose_the_token_is_and_never_the_token(hub, tmp_path):
    assert facts.hub(5).token_from is None and facts.hub(5).error is None
    hub.setenv("HF_TOKEN", "hf_other")
    assert facts.hub(5).refused
    hub.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o640)
    found = facts.hub(5)
    assert found.user == "somebody" and found.token_mode == 0o640 and found.token_from == str(tmp_path / "token")
    assert TOKEN not in repr(found)


def test_a_hub_that_is_not_there_costs_no_time(hub):
    from huggingface_hub import constants

    with socket.socket() as silent:  # takes the connection and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        hub.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert facts.hub(0.3).error


# real processes


@pytest.mark.slow
def test_the_doctor_on_this_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code = main(["doctor", "--output", str(tmp_path / "run"), "--json"])
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    by_name = {finding["check"]: finding for finding in answer["findings"]}
    assert code == (0 if answer["ok"] else 1) and answer["ok"] == (answer["num_errors"] == 0)
    assert by_name["gloo"]["level"] == "ok" and "2 processes" in by_name["gloo"]["what"]
    assert {"machine", "packages", "installation", "GPUs", "DeepSpeed", "output folder", "Hub"} <= set(by_name)
    assert not [finding for finding in answer["findings"] if "the check failed" in finding["what"]]
    assert TOKEN not in captured.out + captured.err and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_process_that_does_not_answer_is_named_in_time(tmp_path):
    first, _ = all_reduce_commands("gloo", 2, tmp_path, 8)
    with Probes([first, ["import", "no_such_module"]]) as probes:  # the second never comes
        first, second = probes.outcomes(60)  # it ends after 8 s; a busy machine starts it late
    assert first.error
    assert second.error == "ModuleNotFoundError: No module named 'no_such_module'"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def survey_of_rank(own: dict[str, str], folder: Path, limit: float) -> None:
    """In a fork with the variables of a rank: what the doctor does, but for this machine's own findings."""
    os.environ |= own
    found = ranks.survey(ranks.Place.of_environment(), [], folder, folder, limit)
    if found is not None:
        with (folder.parent / "answer").open("w") as file, redirect_stdout(file):
            report(found, json_output=True)


def survey(variables: dict[int, dict[str, str]], world_size: int, tmp_path: Path, limit: float = 10) -> list[dict]:
    """Findings of ranks, of which each has some variables of its own, as if each were a machine."""
    folder = tmp_path / "folder"
    folder.mkdir()
    shared = {"WORLD_SIZE": f"{world_size}", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_port()}", "PYTHONSAFEPATH": "1"}
    forking = multiprocessing.get_context("fork")
    jobs = [
        forking.Process(target=survey_of_rank, args=({**shared, "RANK": str(rank), **own}, folder, limit))
        for rank, own in variables.items()
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
    assert [job.exitcode for job in jobs] == [0] * len(jobs)
    assert list(folder.iterdir()) == []
    return json.loads((tmp_path / "answer").read_text())["findings"]


def test_a_folder_that_can_not_be_marked_is_no_new_trouble(tmp_path):
    marker = ranks._mark(tmp_path / "new" / "run")
    assert marker.parent == tmp_path and marker.is_file()
    assert ranks._mark(Path("/proc/run")) is None


@pytest.mark.slow
def test_the_rank_that_never_came_is_named(tmp_path):
    (found, _) = survey({0: {}, 1: {}}, 3, tmp_path)
    assert found["level"] == "error" and "of 3 ranks 2 never reached 127.0.0.1:" in found["what"]


@pytest.mark.slow
def test_the_rank_that_can_not_talk_is_named(tmp_path):
    found = survey({0: {}, 1: {"GLOO_SOCKET_IFNAME": "nosuch0"}}, 2, tmp_path)
    assert found[0]["level"] == "error" and f"rank 1 on {socket.gethostname()}" in found[0]["what"]


WELL = ["gloo: all-reduce across 2 ranks on 1 machine(s) works", "the same versions and the same folders everywhere"]


@pytest.mark.slow
def test_ranks_that_are_well_are_said_to_be(tmp_path):
    assert [finding["what"] for finding in survey({0: {}, 1: {}}, 2, tmp_path, 60)] == WELL


@pytest.mark.torture
def test_the_doctor_under_a_launcher(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no_python"]
    asked = [sys.executable, "-m", "llava_llama31.trainer.cli", "doctor", "--output", str(tmp_path), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    job = subprocess.run(
        [sys.executable, *launcher, *asked], env=environment, capture_output=True, text=True, timeout=200
    )
    answer = json.loads(job.stdout)
    assert job.returncode == (0 if answer["ok"] else 1), job.stderr
    assert [f["what"] for f in answer["findings"] if f["check"] == "ranks"] == WELL


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "two", "LOCAL_RANK": "0"}])
def test_half_a_launch_is_a_mistake(monkeypatch, capsys, variables):
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["doctor"]) == 2
    assert "RANK is set, but other variables of a launch are missing or wrong" in capsys.readouterr().err


@pytest.mark.parametrize("busy", ["", "a load of 12 on 2 cores"])
def test_no_answer_on_a_busy_machine_is_a_warning(busy):
    late = Outcome("no answer in 20 s", 20, busy=busy)
    found = [
        *checks.check_torchvision(late),
        *checks.check_torchao(late, 0),
        *checks.check_communication("gloo", [late, late]),
        *checks.check_communication("gloo", [late, Outcome("no such interface")]),
    ]
    assert [finding.level for finding in found] == ["warning" if busy else "error"] * 3 + ["error"]
    assert all((f"at {busy}" in finding.what) == bool(busy) for finding in found[:3])
