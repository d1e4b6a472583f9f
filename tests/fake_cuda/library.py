"""Compiles device.cpp on first use, and loads it: before torch, in a process of its own."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path


SOURCE = Path(__file__).with_name("device.cpp")


def missing() -> str | None:
    """What this machine lacks to build the device; None: nothing."""
    if shutil.which("g++") is None:
        return "g++ is missing"
    if not distribution("torch").version.endswith("+cpu"):
        return "torch is not a CPU build"
    return None


def build() -> Path:
    """The compiled library, kept for this source and this torch in the temporary folder."""
    torch = Path(str(distribution("torch").locate_file("torch")))
    digest = hashlib.sha256(SOURCE.read_bytes() + str(torch).encode() + distribution("torch").version.encode())
    library = Path(tempfile.gettempdir(), f"llava-llama31-fake-cuda-{digest.hexdigest()[:16]}-{os.getuid()}.so")
    if not library.is_file():
        staging = library.with_suffix(f".{os.getpid()}")
        command = [
            "g++",
            "-O0",
            "-shared",
            "-fPIC",
            "-std=c++20",
            f"-I{torch}/include",
            str(SOURCE),
            "-o",
            str(staging),
        ]
        command += [f"-L{torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"]
        subprocess.run(command, check=True)
        os.replace(staging, library)
    return library


def load() -> None:
    """Give this process the device."""
    assert "torch" not in sys.modules
    ctypes.CDLL(str(build()))
