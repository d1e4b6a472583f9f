"""Gathers from this machine the facts that the checks judge; a function may raise, which its check reports."""

import ctypes
import fcntl
import os
import platform
import re
import resource
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distributions, metadata, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

import llava_llama31


if TYPE_CHECKING:
    from llava_llama31.trainer.costs.matrix_peak import CpuSpeed


DISTRIBUTION = "llava-llama31"
_ENVIRONMENT = re.compile(r"((TORCH_)?NCCL|GLOO|CUDA|OMP|MASTER)_|(LOCAL_)?(RANK|WORLD_SIZE)$")


@dataclass(frozen=True)
class Machine:
    """Memory in bytes; `memory_limit` is the control group's, None if it sets none."""

    host: str
    system: str
    python: str
    cores: int
    memory: int
    memory_limit: int | None
    shared_memory: int | None
    open_files: int
    address_space: int | None
    locked_memory: int | None
    infiniband: tuple[str, ...]


def machine() -> Machine:
    return Machine(
        host=socket.gethostname(),
        system=platform.platform(),
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)),
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        memory_limit=_memory_limit(),
        shared_memory=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
        open_files=_limit(resource.RLIMIT_NOFILE) or sys.maxsize,
        address_space=_limit(resource.RLIMIT_AS),
        locked_memory=_limit(resource.RLIMIT_MEMLOCK),
        infiniband=tuple(sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))),
    )


def _limit(kind: int) -> int | None:
    soft = resource.getrlimit(kind)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _memory_limit() -> int | None:
    """Memory limit of this process's control groups, version 2 or 1."""
    limits = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        own = root / group.lstrip("/")
        # in a container the group's path may be missing, and the root is the container's
        files = [folder / name for folder in (own, *own.parents) if folder.is_relative_to(root)]
        limits += [file.read_text().strip() for file in files if file.is_file()]
    numbers = [int(limit) for limit in limits if limit.isdigit()]
    return min((number for number in numbers if number < 1 << 60), default=None)


def cpu_speed() -> "CpuSpeed":
    from llava_llama31.trainer.costs.matrix_peak import measure_cpu_speed  # torch may be broken here

    return measure_cpu_speed()


@dataclass(frozen=True)
class Package:
    """One of our requirements; `extra` is empty if it is always needed."""

    name: str
    specifier: str
    extra: str
    installed: str | None
    tested: str | None


def packages() -> list[Package]:
    """Our requirements, without those for development, with their installed versions."""
    tested = tested_versions()
    extras = [extra for extra in metadata(DISTRIBUTION).get_all("Provides-Extra") or [] if extra != "dev"]
    found = []
    for line in requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        of_extras = [extra for extra in ["", *extras] if marker is None or marker.evaluate({"extra": extra})]
        if of_extras:
            name = requirement.name
            installed = _version(name)
            found.append(Package(name, str(requirement.specifier), of_extras[0], installed, tested.get(name.lower())))
    return found


def tested_versions() -> dict[str, str]:
    """Version by lower-case name; a test keeps the file equal to constraints.txt."""
    lines = Path(__file__).with_name("tested_versions.txt").read_text(encoding="utf-8").split()
    return {name.lower(): number for name, _, number in (line.partition("==") for line in lines)}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Installations:
    """The metadata folders found under our name, and the folder that is imported."""

    metadata: tuple[str, ...]
    imported: str


def installations() -> Installations:
    found = {
        str(Path(str(d.locate_file(""))).resolve()) for d in distributions() if d.metadata["Name"] == DISTRIBUTION
    }
    return Installations(tuple(sorted(found)), str(Path(llava_llama31.__file__).parent))


@dataclass(frozen=True)
class Gpu:
    """A GPU; memory in bytes, `free` measured before we use any. AMD's name an architecture, e.g. gfx942."""

    name: str
    capability: tuple[int, int]
    memory: int
    free: int
    architecture: str | None = None


@dataclass(frozen=True)
class Gpus:
    """GPUs according to torch and to the driver.

    Args:
        devices: visible to torch.
        torch_cuda: version that torch is built for; None for a CPU build.
        architectures: that torch is built for, e.g. sm_90 or gfx942.
        error: why torch sees none although it is built for CUDA.
        driver: the driver's own version.
        driver_cuda: newest CUDA that the driver supports, as (major, minor).
        num_installed: GPUs that the driver knows.
        visible: CUDA_VISIBLE_DEVICES.
    """

    devices: tuple[Gpu, ...] = ()
    torch_cuda: str | None = None
    architectures: tuple[str, ...] = ()
    error: str | None = None
    driver: str | None = None
    driver_cuda: tuple[int, int] | None = None
    num_installed: int = 0
    visible: str | None = None


@cache
def gpus() -> Gpus:
    import torch

    from llava_llama31.trainer.distributed.devices import num_installed_gpus

    number = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b\d{3,}\.\d[\d.]*", number.read_text()) if number.is_file() else None
    devices, error = [], None
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, memory = torch.cuda.mem_get_info(index)
            name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
            architecture = None
            if torch.version.hip is not None:
                architecture = torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
            devices.append(Gpu(name, capability, memory, free, architecture))
    elif torch.version.cuda is not None:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as reason:
            error = str(reason).strip().partition("\n")[0]
    return Gpus(
        devices=tuple(devices),
        torch_cuda=torch.version.cuda,
        architectures=tuple(torch.cuda.get_arch_list()),
        error=error,
        driver=found[0] if found else None,
        driver_cuda=_driver_cuda(),
        num_installed=num_installed_gpus(),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def _driver_cuda() -> tuple[int, int] | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    failed = driver.cuDriverGetVersion(ctypes.byref(number))
    return None if failed else (number.value // 1000, number.value % 1000 // 10)


@dataclass(frozen=True)
class Folder:
    """A folder that a run writes to, or its nearest existing parent; sizes in bytes."""

    role: str
    path: str
    filesystem: str
    free: int
    write_error: str | None
    lock_error: str | None
    durable_error: str | None


def folder(role: str, path: Path) -> Folder:
    """Write, lock, sync and rename a small file there, then remove it."""
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())
    facts: dict[str, Any] = {
        "role": role,
        "path": str(path),
        "filesystem": filesystem(there.resolve(), Path("/proc/self/mountinfo").read_text()),
        "free": shutil.disk_usage(there).free,
    }
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=there) as scratch:
            file = Path(scratch, "file")
            file.write_bytes(b"x" * 4096)
            return Folder(**facts, write_error=None, lock_error=_try_lock(file), durable_error=_try_durable(file))
    except OSError as error:
        return Folder(**facts, write_error=error.strerror or str(error), lock_error=None, durable_error=None)


def filesystem(path: Path, mountinfo: str) -> str:
    """Type of a path's file system, from /proc/self/mountinfo."""
    best, kind = -1, "unknown"
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        mounted_on = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4])
        if path.is_relative_to(mounted_on) and len(Path(mounted_on).parts) >= best:
            best, kind = len(Path(mounted_on).parts), after.split()[0]
    return kind


def _try_lock(file: Path) -> str | None:
    with file.open("r+b") as first, file.open("r+b") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.strerror or str(error)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
    return "a second lock on a locked file is granted"


def _try_durable(file: Path) -> str | None:
    try:
        with file.open("r+b") as opened:
            os.fsync(opened.fileno())
        os.replace(file, file.with_name("renamed"))
        descriptor = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        return error.strerror or str(error)
    return None


def hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


@dataclass(frozen=True)
class BuildLock:
    """The lock file of a build of DeepSpeed's operators, and its age in minutes."""

    path: str
    minutes: float


@dataclass(frozen=True)
class Compilers:
    """The tools that build DeepSpeed's operators, and the locks of such builds."""

    deepspeed: str | None
    cpp: str | None
    ninja: str | None
    nvcc: str | None
    torch_cuda: str | None
    locks: tuple[BuildLock, ...]


def compilers() -> Compilers:
    from torch.utils.cpp_extension import CUDA_HOME, get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    # the default folder has one more level: Python and CUDA version
    files = sorted({*root.glob("*/lock"), *root.glob("*/*/lock")})
    beside = Path(sys.executable).with_name("ninja")  # torch only looks in PATH, but the venv may not be activated
    return Compilers(
        deepspeed=_version("deepspeed"),
        cpp=shutil.which(os.environ.get("CXX", "c++")),
        ninja=shutil.which("ninja") or (str(beside) if beside.is_file() else None),
        nvcc=shutil.which("nvcc") or (shutil.which("nvcc", path=f"{CUDA_HOME}/bin") if CUDA_HOME else None),
        torch_cuda=gpus().torch_cuda,
        locks=tuple(BuildLock(str(file), (time.time() - file.stat().st_mtime) / 60) for file in files),
    )


@dataclass(frozen=True)
class Hub:
    """The Hub and the token's owner; never contains the token itself.

    Args:
        token_from: variable or file that the token comes from; None: there is no token.
        token_mode: permissions of that file.
        user: its owner according to the Hub.
        error: why the Hub gave no answer.
        refused: the Hub answered that the token is invalid.
    """

    offline: bool
    endpoint: str
    token_from: str | None
    token_mode: int | None = None
    user: str | None = None
    error: str | None = None
    refused: bool = False


def hub(limit: float) -> Hub:
    """Ask the Hub for the token's owner, if there is a token, for at most `limit` seconds."""
    from huggingface_hub import constants, get_token

    token = get_token()
    variables = ("HF_OIDC_RESOURCE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    variable = next((name for name in variables if os.environ.get(name)), None)
    file = Path(constants.HF_TOKEN_PATH)
    mode = file.stat().st_mode & 0o777 if token and not variable and file.is_file() else None
    origin = (variable or str(file)) if token else None
    offline = constants.is_offline_mode()
    answer: dict[str, Any] = {} if offline else {"error": f"no answer in {limit:.0f} s"}
    if not offline:
        # a name lookup can't be stopped, only abandoned
        asking = threading.Thread(target=_ask_hub, args=(constants.ENDPOINT, token, limit, answer), daemon=True)
        asking.start()
        asking.join(limit)
    return Hub(offline, constants.ENDPOINT, origin, mode, **dict(answer))


def _ask_hub(endpoint: str, token: str | None, limit: float, answer: dict[str, Any]) -> None:
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers

    try:
        headers = build_hf_headers(token=token or False)
        response = get_session().get(f"{endpoint}/api/whoami-v2", headers=headers, timeout=limit)
        answer["error"] = None
        if response.status_code == 200:
            answer["user"] = str(response.json().get("name"))
        elif token:
            answer["refused"] = response.status_code in (401, 403)
            answer["error"] = f"status {response.status_code}"
    except Exception as error:  # top of a thread: the finding reports it; the text might quote the token
        answer["error"] = type(error).__name__


@dataclass(frozen=True)
class AccelerateConfig:
    """The file that `accelerate launch` reads by default; `content` is None if it does not exist."""

    path: str
    content: Mapping[str, Any] | None
    num_gpus: int


def accelerate_config() -> AccelerateConfig:
    import yaml
    from huggingface_hub import constants

    path = Path(constants.HF_HOME, "accelerate", "default_config.yaml")
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return AccelerateConfig(str(path), content, len(gpus().devices))


@dataclass(frozen=True)
class Launch:
    """Variables that control a launch, and the facts they must match.

    Args:
        interfaces: names of the network interfaces.
        address: that this machine's own name resolves to.
    """

    variables: Mapping[str, str]
    cores: int
    interfaces: tuple[str, ...]
    address: str | None

    def number(self, name: str, default: int = 1) -> int:
        text = self.variables.get(name, "")
        return int(text) if text.isdigit() else default

    @property
    def num_machines(self) -> int:
        return -(-self.number("WORLD_SIZE") // self.number("LOCAL_WORLD_SIZE", self.number("WORLD_SIZE")))


def launch() -> Launch:
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = None
    return Launch(
        variables={name: value for name, value in os.environ.items() if _ENVIRONMENT.match(name)},
        cores=len(os.sched_getaffinity(0)),
        interfaces=tuple(name for _, name in socket.if_nameindex()),
        address=address,
    )
