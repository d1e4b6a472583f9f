"""Checks as pure functions: facts in, findings out. Every check returns at least one finding."""

import shlex
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from llava_llama31.trainer.distributed.gpu_architectures import is_built_for
from llava_llama31.trainer.doctor.facts import (
    AccelerateConfig,
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
from llava_llama31.trainer.doctor.findings import DoctorFinding
from llava_llama31.trainer.doctor.probe import Outcome


if TYPE_CHECKING:
    from llava_llama31.trainer.costs.matrix_peak import CpuSpeed


GB = 10**9
# Bytes that folders need: below the first number nothing runs, below the second no 8B stage does.
# A checkpoint with 8.4e9 weights and Adam's two moments in 4 bytes each is 100 GB; Llama-3.1-8B in bfloat16 is 16 GB.
NEEDS = {
    "output": (GB, 200 * GB),
    "cache": (GB // 10, 5 * GB),
    "Hub cache": (GB // 10, 20 * GB),
    "temporary": (GB // 10, 5 * GB),
}
_MOVE = {
    "output": "choose another --output",
    "cache": "set XDG_CACHE_HOME",
    "Hub cache": "set HF_HOME",
    "temporary": "set TMPDIR",
}
_WHY_SPACE = {
    "output": "a checkpoint of an 8B stage with its optimizer is 100 GB, and the next is written before the last is "
    "removed; small recipes need less",
    "cache": "findings about data, and feature_cache_gb, are kept there",
    "Hub cache": "Llama-3.1-8B is 16 GB, and a download that doesn't fit fails the run",
    "temporary": "libraries and compilers write there",
}
BFLOAT16, FLOAT8 = (8, 0), (8, 9)  # first compute capability with such matrix products
_USED_BY_OTHERS = 2 * GB  # more than our own CUDA context takes
_SHARED_MEMORY = GB
_MEMORY_PER_PROCESS = 4 * GB
_OPEN_FILES = 4096
_STALE_MINUTES = 10  # longer than any operator takes to build
_VOLATILE = ("tmpfs", "ramfs")


def check_machine(machine: Machine, num_processes: int) -> list[DoctorFinding]:
    memory = min(machine.memory, machine.memory_limit or machine.memory)
    limited = " (the control group's limit)" if memory < machine.memory else ""
    what = f"{machine.system}, Python {machine.python}, {machine.cores} cores, {memory / GB:.0f} GB memory{limited}"
    found = [DoctorFinding("machine", "ok", what)]
    if memory < _MEMORY_PER_PROCESS * num_processes:
        found.append(
            DoctorFinding(
                "memory",
                "warning",
                f"{memory / GB:.1f} GB for {num_processes} process(es)",
                "libraries, data workers and weights in transit to the device need more",
                "ask for more memory, or start fewer processes",
            )
        )
    if machine.shared_memory is not None and machine.shared_memory < _SHARED_MEMORY:
        found.append(
            DoctorFinding(
                "shared memory",
                "warning",
                f"{machine.shared_memory / 1e6:.0f} MB are free in /dev/shm",
                "data workers and NCCL communicate through it: runs die with a bus error",
                "start the container with --shm-size=16g or --ipc=host, or set dataloader_workers: 0",
            )
        )
    return found + _check_limits(machine)


def check_processor(speed: "CpuSpeed", num_gpus: int) -> list[DoctorFinding]:
    """Which instructions the CPU has, and whether it is slow in bfloat16 where it has to train."""
    if num_gpus or not speed.is_slow_in_bfloat16:
        return [DoctorFinding("CPU", "ok", str(speed))]
    why = "precision: bfloat16 is emulated; stages that leave `precision` out train in float32 here"
    fix = "set precision: float32, or use a GPU, or a CPU with AVX512-BF16 or AMX"
    return [DoctorFinding("CPU", "warning", str(speed), why, fix)]


def _check_limits(machine: Machine) -> list[DoctorFinding]:
    found = []
    if machine.open_files < _OPEN_FILES:
        found.append(
            DoctorFinding(
                "open files",
                "warning",
                f"at most {machine.open_files} open files",
                "data workers pass each tensor as an open file: runs die with 'Too many open files' after hours",
                "ulimit -n 65536",
            )
        )
    if machine.address_space is not None:
        found.append(
            DoctorFinding(
                "address space",
                "warning",
                f"limited to {machine.address_space / GB:.0f} GB",
                "CUDA and memory-mapped weights need far more address space than memory",
                "ulimit -v unlimited",
            )
        )
    if machine.infiniband and machine.locked_memory is not None and machine.locked_memory < GB:
        found.append(
            DoctorFinding(
                "locked memory",
                "warning",
                f"{machine.locked_memory // 1024} KiB may be locked, and there is InfiniBand "
                f"({', '.join(machine.infiniband)})",
                "NCCL can't register its buffers: it fails, or falls back to TCP",
                "ulimit -l unlimited, in Slurm PropagateResourceLimitsExcept=MEMLOCK, in Docker --ulimit memlock=-1",
            )
        )
    return found


def check_packages(packages: Sequence[Package]) -> list[DoctorFinding]:
    found, other = [], []
    for package in packages:
        named = f"llava-llama31[{package.extra}]" if package.extra else "llava-llama31"
        if package.installed is None:
            if not package.extra:
                why = "it is required"
                found.append(
                    DoctorFinding("packages", "error", f"{package.name} is missing", why, f"pip install '{named}'")
                )
            continue
        if not SpecifierSet(package.specifier).contains(package.installed, prereleases=True):
            found.append(
                DoctorFinding(
                    "packages",
                    "error",
                    f"{package.name} {package.installed} is outside the supported {package.specifier}",
                    "APIs that we call may be missing or behave differently",
                    f"pip install '{package.name}{package.specifier}'",
                )
            )
        elif package.tested and Version(package.installed).release[:2] != Version(package.tested).release[:2]:
            other.append(package)
    if other:
        listed = ", ".join(f"{p.name} {p.installed} (tested: {p.tested})" for p in other)
        pins = " ".join(f"{p.name}=={Version(p.tested or '').public}" for p in other)
        why = "only the tested versions have passed all tests"
        found.append(DoctorFinding("packages", "warning", listed, why, f"pip install {pins}"))
    number = sum(package.installed is not None for package in packages)
    return found or [DoctorFinding("packages", "ok", f"{number} packages, all in their tested series")]


def check_installations(found: Installations) -> list[DoctorFinding]:
    if len(found.metadata) == 1:
        return [DoctorFinding("installation", "ok", f"imported from {found.imported}")]
    return [
        DoctorFinding(
            "installation",
            "warning",
            f"{len(found.metadata)} installations: {', '.join(found.metadata)}; {found.imported} is imported",
            "versions are read from one and code from another",
            "run pip uninstall llava-llama31 until none is left, then install it once",
        )
    ]


def check_gpus(gpus: Gpus) -> list[DoctorFinding]:
    if not gpus.devices:
        return _no_gpu(gpus)
    found = []
    for device in dict.fromkeys(gpus.devices):
        numbers = ", ".join(str(number) for number, other in enumerate(gpus.devices) if other == device)
        found += _check_gpu(f"GPU {numbers}", device, gpus.architectures)
    if len({(device.name, device.memory) for device in gpus.devices}) > 1:
        why = "every step waits for the slowest GPU, and the smallest limits what fits"
        fix = "choose equal ones with CUDA_VISIBLE_DEVICES"
        found.append(DoctorFinding("GPUs", "warning", "the GPUs differ", why, fix))
    return [*found, *_check_driver(gpus)]


def _check_gpu(name: str, device: Gpu, architectures: Sequence[str]) -> list[DoctorFinding]:
    if device.architecture is not None:
        return _check_amds(name, device, architectures)
    major, minor = device.capability
    able = [kind for kind, least in (("bfloat16", BFLOAT16), ("float8", FLOAT8)) if device.capability >= least]
    what = f"{name}: {device.name}, {device.memory / GB:.0f} GB, capability {major}.{minor}"
    found = [DoctorFinding("GPUs", "ok", f"{what}, {' and '.join(able) or 'neither bfloat16 nor float8'}")]
    found += _check_free(name, device, "nvidia-smi")
    if not able:
        why = "precision: bfloat16 is emulated, and packed rows are read segment by segment; both are slow"
        fix = "use an Ampere GPU or newer, or set precision: float32"
        found.append(DoctorFinding("GPUs", "warning", f"{name} has no bfloat16 matrix products", why, fix))
    if architectures and not is_built_for(device.capability, architectures):
        what = f"torch is not built for capability {major}.{minor} of {name}: {', '.join(architectures)}"
        why = "the first kernel fails with 'no kernel image is available'"
        fix = "install the torch build that lists this GPU, by the selector on pytorch.org"
        found.append(DoctorFinding("GPUs", "error", what, why, fix))
    return found


def _check_amds(name: str, device: Gpu, architectures: Sequence[str]) -> list[DoctorFinding]:
    """A GPU of AMD, whose capability says nothing of what it can do and is built for."""
    what = f"{name}: {device.name}, {device.memory / GB:.0f} GB, {device.architecture}"
    found = [DoctorFinding("GPUs", "ok", what), *_check_free(name, device, "rocm-smi")]
    if architectures and device.architecture not in architectures:
        what = f"torch is not built for {device.architecture} of {name}: {', '.join(architectures)}"
        why = "the first kernel may fail with 'invalid device function'"
        fix = "install the torch build that lists this GPU, by the selector on pytorch.org"
        found.append(DoctorFinding("GPUs", "warning", what, why, fix))
    return found


def _check_free(name: str, device: Gpu, command: str) -> list[DoctorFinding]:
    if device.memory - device.free <= _USED_BY_OTHERS:
        return []
    what = f"{name}: other processes hold {(device.memory - device.free) / GB:.0f} GB"
    why = "a run that fits according to `plan` runs out of memory"
    fix = f"find them with {command} and end them, or choose GPUs with CUDA_VISIBLE_DEVICES"
    return [DoctorFinding("GPU memory", "warning", what, why, fix)]


def _check_driver(gpus: Gpus) -> list[DoctorFinding]:
    """A driver supports all CUDA versions of its major version and older ones."""
    if gpus.torch_cuda is None or gpus.driver_cuda is None:
        return []
    served = ".".join(map(str, gpus.driver_cuda))
    if int(gpus.torch_cuda.split(".")[0]) > gpus.driver_cuda[0]:
        return [
            DoctorFinding(
                "driver",
                "error",
                f"torch is built for CUDA {gpus.torch_cuda}, the driver {gpus.driver or ''} supports at most {served}",
                "torch sees no GPU",
                f"update the driver, or install a torch build for CUDA {gpus.driver_cuda[0]}",
            )
        ]
    return [
        DoctorFinding("driver", "ok", f"{gpus.driver or 'driver'}, CUDA up to {served}; torch uses {gpus.torch_cuda}")
    ]


def _no_gpu(gpus: Gpus) -> list[DoctorFinding]:
    if not gpus.num_installed and gpus.driver_cuda is None:
        return [DoctorFinding("GPUs", "ok", "none; small recipes run on the CPU")]
    number, why = gpus.num_installed or "NVIDIA", "everything would run on the CPU"
    if gpus.torch_cuda is None:
        fix = "install the CUDA build of torch, by the selector on pytorch.org"
        return [DoctorFinding("GPUs", "error", f"{number} GPU(s) here, but torch is a CPU build", why, fix)]
    if gpus.visible is not None and gpus.visible.strip() in ("", "-1"):
        fix = "unset CUDA_VISIBLE_DEVICES"
        return [DoctorFinding("GPUs", "warning", f"CUDA_VISIBLE_DEVICES={gpus.visible} hides all GPUs", why, fix)]
    driver = [finding for finding in _check_driver(gpus) if finding.level == "error"]
    what = f"{number} GPU(s) here, and torch can't use them: {gpus.error}"
    fix = "run nvidia-smi; if it fails too, restart or reinstall the driver"
    return driver or [DoctorFinding("GPUs", "error", what, why, fix)]


def check_communication(backend: str, outcomes: Sequence[Outcome]) -> list[DoctorFinding]:
    """Whether processes on this machine could sum a tensor."""
    failed = {rank: outcome.error for rank, outcome in enumerate(outcomes) if outcome.error}
    if not failed:
        seconds = max(outcome.seconds for outcome in outcomes)
        return [
            DoctorFinding(
                backend, "ok", f"all-reduce across {len(outcomes)} processes of this machine works, in {seconds:.1f} s"
            )
        ]
    if all(outcome.busy for outcome in outcomes if outcome.error):
        return [_not_tried(backend, next(outcome for outcome in outcomes if outcome.error))]
    what = "; ".join(f"process {rank}: {error}" for rank, error in failed.items())
    why = "training on several processes would fail or hang the same way"
    fix = {
        "gloo": "let this machine's name resolve to an address of its own (/etc/hosts), or set GLOO_SOCKET_IFNAME=lo",
        "nccl": "set NCCL_DEBUG=INFO and run it again; try NCCL_P2P_DISABLE=1, and see /dev/shm above",
    }[backend]
    return [DoctorFinding(backend, "error", what, why, fix)]


def _not_tried(name: str, outcome: Outcome) -> DoctorFinding:
    """A process that had no time to answer says nothing of what it tried."""
    what = f"not checked: {outcome.error} at {outcome.busy}"
    return DoctorFinding(
        name, "warning", what, "a busy machine and a fault look alike", "run doctor on an idle machine"
    )


def check_folder(folder: Folder) -> list[DoctorFinding]:
    name, where, move = f"{folder.role} folder", folder.path, _MOVE[folder.role]
    if folder.write_error:
        return [
            DoctorFinding(name, "error", f"{where} can't be written: {folder.write_error}", "a run writes there", move)
        ]
    found = []
    least, wanted = NEEDS[folder.role]
    if folder.free < wanted:
        found.append(
            DoctorFinding(
                name,
                "error" if folder.free < least else "warning",
                f"{folder.free / GB:.1f} GB are free in {where}",
                _WHY_SPACE[folder.role],
                f"make room, or {move}",
            )
        )
    if folder.role == "output" and folder.filesystem in _VOLATILE:
        why = "checkpoints there use memory and are lost on restart"
        found.append(DoctorFinding(name, "warning", f"{where} is {folder.filesystem}", why, move))
    found += _check_abilities(name, folder)
    return found or [DoctorFinding(name, "ok", f"{where}: {folder.free / GB:.0f} GB free, {folder.filesystem}")]


def _check_abilities(name: str, folder: Folder) -> list[DoctorFinding]:
    if folder.role not in ("output", "cache"):
        return []
    found = []
    if folder.lock_error:
        found.append(
            DoctorFinding(
                name,
                "error" if folder.role == "output" else "warning",
                f"{folder.path} ({folder.filesystem}) has no working flock: {folder.lock_error}",
                "it prevents two runs from using one folder"
                if folder.role == "output"
                else "feature_cache_gb would store nothing",
                "mount Lustre with -o flock and NFS without nolock and local_lock, or choose another folder",
            )
        )
    if folder.durable_error:
        found.append(
            DoctorFinding(
                name,
                "error",
                f"{folder.path} ({folder.filesystem}) can't sync and rename: {folder.durable_error}",
                "checkpoints need both to be complete or absent after a crash",
                "choose another folder",
            )
        )
    return found


def check_compilers(facts: Compilers) -> list[DoctorFinding]:
    found = [_build_lock(lock.path, lock.minutes) for lock in facts.locks]
    if facts.deepspeed is None:
        what = "not installed; stages without `deepspeed` don't need it"
        return [*found, DoctorFinding("DeepSpeed", "ok", what)]
    needs = {"a C++ compiler": facts.cpp, "ninja": facts.ninja}
    if facts.torch_cuda is not None:
        needs["nvcc"] = facts.nvcc
    missing = [name for name, path in needs.items() if path is None]
    if not missing:
        return [
            *found,
            DoctorFinding("DeepSpeed", "ok", f"{facts.deepspeed}, and {', '.join(needs)} to build its operators"),
        ]
    fix = "apt-get install build-essential ninja-build"
    if "nvcc" in missing:
        fix += f"; install the CUDA toolkit {facts.torch_cuda} and set CUDA_HOME"
    why = "ZeRO-offload builds its optimizer on first use; without offload nothing is built"
    return [*found, DoctorFinding("DeepSpeed", "warning", f"{' and '.join(missing)} missing", why, fix)]


def _build_lock(path: str, minutes: float) -> DoctorFinding:
    stale = minutes > _STALE_MINUTES
    return DoctorFinding(
        "build lock",
        "error" if stale else "warning",
        f"{path} is {minutes:.0f} minutes old",
        "every run that needs this operator silently waits for the lock; a killed build may have left it",
        f"rm {shlex.quote(path)}" if stale else f"wait for the build; if none is running: rm {shlex.quote(path)}",
    )


def check_torchvision(outcome: Outcome | None) -> list[DoctorFinding]:
    if outcome is None:
        return [DoctorFinding("torchvision", "ok", "not installed; images are tiled without it")]
    if outcome.error is None:
        return [DoctorFinding("torchvision", "ok", "fits torch")]
    if outcome.busy:
        return [_not_tried("torchvision", outcome)]
    return [
        DoctorFinding(
            "torchvision",
            "error",
            f"can't be imported: {outcome.error}",
            "it is built for another torch (PyPI's does not match a CPU build), which breaks all of Transformers",
            "pip uninstall torchvision, or install it from the same index as torch",
        )
    ]


def check_torchao(outcome: Outcome | None, num_gpus: int) -> list[DoctorFinding]:
    if outcome is None:
        return [DoctorFinding("torchao", "ok", "not installed; only optimizer: adamw_8bit and fp8 need it")]
    fix = "pip install -U torchao, in the version built for this torch"
    if outcome.busy:
        return [_not_tried("torchao", outcome)]
    if outcome.error is not None:
        why = "optimizer: adamw_8bit and fp8 need it"
        return [DoctorFinding("torchao", "error", f"can't be imported: {outcome.error}", why, fix)]
    missing = [line for line in outcome.messages if "Failed to load" in line or "cpp extensions" in line]
    if missing and num_gpus:
        why = "its CUDA kernels are missing; adamw_8bit and fp8 don't need them, other quantizations do"
        return [DoctorFinding("torchao", "warning", missing[0], why, fix)]
    return [DoctorFinding("torchao", "ok", "adamw_8bit and fp8 can use it")]


def check_hub(hub: Hub) -> list[DoctorFinding]:
    found = []
    if hub.token_mode is not None and hub.token_mode & 0o077:
        why, fix = "others on this machine can read it", f"chmod 600 {shlex.quote(hub.token_from or '')}"
        found.append(DoctorFinding("Hub token", "warning", f"{hub.token_from} is readable by others", why, fix))
    token = f"token from {hub.token_from}" if hub.token_from else "no token; gated models need one: hf auth login"
    if hub.offline:
        return [*found, DoctorFinding("Hub", "ok", f"offline by HF_HUB_OFFLINE; {token}")]
    if hub.refused:
        why = "with an invalid token not even public models can be downloaded"
        fix = "create a new one and run hf auth login, or unset HF_TOKEN"
        return [*found, DoctorFinding("Hub token", "error", f"{hub.endpoint} refuses the {token}", why, fix)]
    if hub.error is not None:
        why = "a recipe with a Hub id retries and waits for it"
        fix = "fix the network or HTTPS_PROXY, or set HF_HUB_OFFLINE=1 and use folders or cached models"
        return [
            *found,
            DoctorFinding("Hub", "warning", f"{hub.endpoint} can't be reached: {hub.error}; {token}", why, fix),
        ]
    return [*found, DoctorFinding("Hub", "ok", f"{token}, of {hub.user}" if hub.user else token)]


def check_accelerate_config(config: AccelerateConfig) -> list[DoctorFinding]:
    content, name = config.content, "accelerate config"
    if content is None:
        return [DoctorFinding(name, "ok", "no saved default; the command line decides")]
    kind, processes = str(content.get("distributed_type", "NO")), content.get("num_processes")
    said = []
    if content.get("use_cpu") and config.num_gpus:
        said.append("use_cpu: true leaves the GPUs idle")
    if kind == "MULTI_CPU" or content.get("mpirun_config"):
        said.append(f"distributed_type {kind} starts one process unless mpirun is set up")
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        said.append(f"distributed_type {kind} shards every launch, even if the recipe doesn't say so")
    if kind == "NO" and config.num_gpus > 1:
        said.append("distributed_type NO starts one process")
    if isinstance(processes, int) and config.num_gpus and kind != "NO" and processes % config.num_gpus:
        said.append(f"num_processes: {processes} beside {config.num_gpus} GPUs")
    if content.get("num_machines", 1) != 1:
        said.append(f"num_machines: {content['num_machines']} waits for other machines")
    if content.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        said.append(f"compute_environment: {content['compute_environment']}")
    if not said:
        return [DoctorFinding(name, "ok", f"{config.path}: {kind}, {processes or 1} process(es)")]
    return [
        DoctorFinding(
            name,
            "warning",
            f"{config.path}: {'; '.join(said)}",
            "`accelerate launch` silently uses it for everything the command line leaves out",
            f"name a file with --config_file, or rm {shlex.quote(config.path)}",
        )
    ]


# pattern, values that match ("" is any), why, fix
_VARIABLES = (
    ("NCCL_P2P_DISABLE", "1", "GPUs of one machine communicate through main memory, many times slower", "unset it"),
    ("NCCL_SHM_DISABLE", "1", "GPUs of one machine communicate through the network", "unset it"),
    ("NCCL_IB_DISABLE", "1", "machines communicate over TCP although there may be InfiniBand", "unset it"),
    ("NCCL_LAUNCH_MODE", "GROUP", "deprecated; it may deadlock", "unset it"),
    ("NCCL_ASYNC_ERROR_HANDLING", "", "torch reads TORCH_NCCL_ASYNC_ERROR_HANDLING now", "rename it"),
    ("NCCL_BLOCKING_WAIT", "", "torch reads TORCH_NCCL_BLOCKING_WAIT now", "rename it"),
    ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0", "when a process dies, the others wait forever", "unset it"),
    ("TORCH_NCCL_BLOCKING_WAIT", "1", "every collective blocks the CPU: training is slower", "unset it"),
    ("CUDA_LAUNCH_BLOCKING", "1", "the GPU waits for the CPU at every kernel", "unset it; it is for debugging"),
    ("NCCL_DEBUG", "TRACE", "the log grows by megabytes a second", "set it to WARN or INFO"),
)


def check_variables(launch: Launch) -> list[DoctorFinding]:
    """NCCL's, torch's and the launcher's environment variables."""
    found = []
    for name, meant, why, fix in _VARIABLES:
        value = launch.variables.get(name)
        if value is not None and (not meant or value.upper() == meant):
            found.append(DoctorFinding("environment", "warning", f"{name}={value}", why, fix))
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        found += _check_interface(name, launch)
    threads, local = launch.variables.get("OMP_NUM_THREADS"), launch.number("LOCAL_WORLD_SIZE")
    if local > 1 and (threads is None or launch.number("OMP_NUM_THREADS") * local > 2 * launch.cores):
        what = f"OMP_NUM_THREADS={threads}" if threads else "OMP_NUM_THREADS is not set"
        why = f"{local} processes with {threads or launch.cores} threads each on {launch.cores} cores"
        fix = f"set it to {max(1, launch.cores // local)}"
        found.append(DoctorFinding("environment", "warning", what, why, fix))
    return [*found, *_check_addresses(launch)] or [
        DoctorFinding("environment", "ok", "no variable that often causes trouble")
    ]


def _check_interface(name: str, launch: Launch) -> list[DoctorFinding]:
    value = launch.variables.get(name)
    if not value or value.startswith("^"):  # ^ excludes
        return []
    # NCCL takes prefixes, or =NAME for an exact name; gloo takes exact names
    wanted = [part.removeprefix("=") + ("" if part.startswith("=") else "*") for part in value.split(",")]
    if not any(fnmatch(there, want) for there in launch.interfaces for want in wanted):
        why = "processes can't find each other"
        fix = f"name one of {', '.join(launch.interfaces)}, or unset it"
        return [DoctorFinding("environment", "error", f"{name}={value}: there is no such interface", why, fix)]
    if launch.num_machines > 1 and value in ("lo", "=lo"):
        return [
            DoctorFinding(
                "environment", "error", f"{name}=lo", "it reaches only this machine", "name the real interface"
            )
        ]
    return []


def _check_addresses(launch: Launch) -> list[DoctorFinding]:
    if launch.num_machines < 2:
        return []
    found, master = [], launch.variables.get("MASTER_ADDR", "")
    if master == "localhost" or master.startswith("127."):
        why = "every machine would look for the first one on itself; this only works on a single machine"
        fix = "set it to a name of the first machine that the others can resolve"
        found.append(DoctorFinding("environment", "warning", f"MASTER_ADDR={master}", why, fix))
    if launch.address is None or launch.address.startswith("127."):
        what = f"this machine's name resolves to {launch.address or 'nothing'}"
        why = "gloo advertises that address to the other machines, which can't reach it"
        fix = "set GLOO_SOCKET_IFNAME to the interface that the machines share"
        if "GLOO_SOCKET_IFNAME" not in launch.variables:
            found.append(DoctorFinding("environment", "warning", what, why, fix))
    return found


def check_ranks(
    world_size: int,
    local_world_size: int,
    hosts: Mapping[int, str],
    outcomes: Mapping[str, Mapping[int, str | None]],
    address: str,
) -> list[DoctorFinding]:
    """Whether all processes of a launch met and could sum a tensor.

    Args:
        hosts: by rank, of the ranks that reached the meeting point.
        outcomes: by backend, each answering rank's error; None: it worked.
        address: of the meeting point.
    """
    absent = [rank for rank in range(world_size) if rank not in hosts]
    why = "training would wait for them until it times out"
    if absent:
        machines = sorted({rank // local_world_size for rank in absent})
        what = f"of {world_size} ranks {_listed(absent)} never reached {address} (machine {_listed(machines)})"
        fix = "check whether they started; if so, whether a firewall keeps their machine from that address"
        return [DoctorFinding("ranks", "error", what, why, fix)]
    found = []
    for backend, answers in outcomes.items():
        failed = {rank: answers.get(rank, "no answer") for rank in hosts if answers.get(rank, "no answer")}
        if failed:
            named = "; ".join(f"rank {rank} on {hosts[rank]}: {error}" for rank, error in failed.items())
            fix = {
                "gloo": "set GLOO_SOCKET_IFNAME to the interface that the machines share; open the ports between them",
                "nccl": "set NCCL_SOCKET_IFNAME to the shared interface; NCCL_DEBUG=INFO shows what NCCL tries",
            }[backend]
            found.append(DoctorFinding("ranks", "error", f"{backend}: {named}", why, fix))
        else:
            number = len(set(hosts.values()))
            found.append(
                DoctorFinding(
                    "ranks", "ok", f"{backend}: all-reduce across {world_size} ranks on {number} machine(s) works"
                )
            )
    return found


def check_agreement(
    versions: Mapping[int, Mapping[str, str]],
    sees_output: Mapping[int, bool],
    sees_cache: Mapping[int, bool],
    hosts: Mapping[int, str],
    output: Path,
) -> list[DoctorFinding]:
    """Whether all ranks of a launch run the same versions and write to the same folder."""
    found = []
    for package, expected in versions[0].items():
        others = {rank: mine[package] for rank, mine in versions.items() if mine[package] != expected}
        if others:
            named = ", ".join(f"{number} on {hosts[rank]}" for rank, number in others.items())
            what = f"{package} {expected} on {hosts[0]}, but {named}"
            why = "ranks that compute differently diverge, or wait for each other"
            found.append(DoctorFinding("ranks", "error", what, why, "install the same environment on every machine"))
    blind = sorted({hosts[rank] for rank, sees in sees_output.items() if not sees})
    if blind:
        why = "rank 0 writes there, and every rank reads the previous stage's result there"
        what = f"{', '.join(blind)} don't see what {hosts[0]} writes to {output}"
        found.append(
            DoctorFinding("output folder", "error", what, why, "name a folder on a file system that all share")
        )
    alone = sorted({hosts[rank] for rank, sees in sees_cache.items() if not sees})
    if alone:
        what = f"{', '.join(alone)} and {hosts[0]} have separate caches"
        found.append(DoctorFinding("cache folder", "ok", f"{what}: every machine checks the data itself"))
    return found or [DoctorFinding("ranks", "ok", "the same versions and the same folders everywhere")]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
