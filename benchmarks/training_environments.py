"""Makes a separate environment, from PyPI, for every trainer that benchmarks/training.py compares with ours."""

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Environment:
    """Packages of a virtual environment besides torch and torchvision, and those that lose their compiled part."""

    name: str
    packages: tuple[str, ...]
    stripped: tuple[str, ...] = ()


# first and alone: as a dependency of another package, torch might come in another build and release
TORCH = "torch==2.13.0"
# PyPI's build does not load its compiled part beside a CPU torch; training_peers.py makes do without it
TORCHVISION = "torchvision==0.28.0"

STOCK = Environment(
    "transformers-trl",
    (
        "transformers==5.23.0",
        "trl==1.16.0",
        "accelerate==1.15.0",
        "datasets==5.2.0",
        "peft==0.21.2",
        "numpy==2.4.6",
        "pillow==13.0.0",
    ),
)
SWIFT = Environment(
    "ms-swift",
    (
        "ms-swift==4.6.0",
        "transformers==5.19.0",
        "trl==0.29.1",
        "accelerate==1.15.0",
        "datasets==4.8.4",
        "peft==0.20.0",
        "numpy==2.4.6",
        "pillow==13.0.0",
    ),
)
LLAMAFACTORY = Environment(
    "llamafactory",
    (
        "llamafactory==0.9.5",
        "torchaudio==2.11.0",
        "transformers==5.6.0",
        "trl==0.24.0",
        "accelerate==1.11.0",
        "datasets==4.0.0",
        "peft==0.18.1",
        "numpy==2.4.6",
        "pillow==11.3.0",
    ),
    # has to be importable, and its compiled part does not load beside a CPU torch; only audio needs that
    stripped=("torchaudio",),
)
ENVIRONMENTS = {"transformers": STOCK, "trl": STOCK, "ms-swift": SWIFT, "llamafactory": LLAMAFACTORY}


def default_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "llava-llama31", "benchmarks")


def python_of(trainer: str, folder: Path) -> str:
    """The interpreter of a trainer's environment, which is first made if missing or outdated."""
    if trainer == "ours":
        return sys.executable
    environment = ENVIRONMENTS[trainer]
    place = (folder / environment.name).expanduser().absolute()
    python, stamp = place / "bin" / "python", place / "benchmark-environment"
    recipe = hashlib.sha256(repr((environment, TORCH, TORCHVISION)).encode()).hexdigest()
    if not (stamp.is_file() and stamp.read_text() == recipe):
        print(f"making {place}", file=sys.stderr, flush=True)
        shutil.rmtree(place, ignore_errors=True)
        _make(place, python, environment)
        stamp.write_text(recipe)
    return str(python)


def _make(place: Path, python: Path, environment: Environment) -> None:
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    constraints = place / "constraints.txt"
    constraints.write_text(f"{TORCH}\n{TORCHVISION}\n")

    def pip(*arguments: str) -> None:
        command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
        subprocess.run(command, check=True, stdout=sys.stderr)

    pip("install", TORCH)
    pip("install", "--no-deps", TORCHVISION)
    pip("install", "--constraint", str(constraints), *environment.packages)
    for package in environment.stripped:
        for library in place.glob(f"lib/python*/site-packages/{package}/lib/*.so"):
            library.unlink()
