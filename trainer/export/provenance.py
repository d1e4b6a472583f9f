"""Where a model comes from: the card's facts known before the first step, and the environment."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.checkpoint.package_versions import package_version
from llava_llama31.trainer.distributed.devices import default_device, device_name, uses_cpu
from llava_llama31.trainer.model.locating import hub_id, local_checkpoint
from llava_llama31.trainer.recipes.schema import Recipe


LOCK = "constraints.txt"
PACKAGES = ("llava-llama31", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "pillow")


def record_of(recipe: Recipe, command: str) -> dict[str, Any]:
    """The card's record, as far as it is known before the first step."""
    return {
        "name": recipe.name,
        "recipe": recipe.model_dump(mode="json"),
        "command": command,
        "commit": commit(),
        "lock": _lock(),
        "licence": recipe.model.license,
        "base_models": base_models_of(recipe),
        "environment": environment(),
    }


def base_models_of(recipe: Recipe) -> list[dict[str, Any]]:
    """The base models, for the card and the licences."""
    model = recipe.model
    if model.checkpoint is not None:
        named: list[tuple[str, str | None, str | None]] = [("checkpoint", model.checkpoint, model.license)]
    else:
        named = [
            ("vision_tower", model.vision_tower, model.vision_tower_license),
            ("language_model", model.language_model, model.license),
        ]
    return [_base_model(role, name, licence) for role, name, licence in named if name is not None]


def _base_model(role: str, name: str, licence: str | None) -> dict[str, Any]:
    on_hub = hub_id(name)
    return {
        "role": role,
        # a local folder is called by its name: a card has no paths
        "id": on_hub[0] if on_hub else Path(name).name,
        "revision": on_hub[1] if on_hub else None,
        "licence": licence,
        "folder": str(local_checkpoint(name, where=f"model.{role}")),
    }


def commit() -> str | None:
    """Commit of the project if it runs from a checkout, with `-dirty` if that has changes."""
    if _checkout() is None:
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _lock() -> dict[str, str] | None:
    """The checkout's file of pinned versions, and its hash."""
    checkout = _checkout()
    if checkout is None or not (checkout / LOCK).is_file():
        return None
    return {"file": LOCK, "sha256": atomic_folders.sha256(checkout / LOCK)}


def _checkout() -> Path | None:
    """Root of the project's own repository, if this file belongs to it and is not installed in another one."""
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name)
    root = _git("rev-parse", "--show-toplevel") if tracked else None
    return Path(root) if root else None


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def environment() -> dict[str, Any]:
    """Hardware, Python, and versions of what computes."""
    if not uses_cpu():
        hardware = f"{torch.accelerator.device_count()} x {device_name(default_device())}"
    else:
        hardware = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    versions = {name.replace("-", "_"): package_version(name) for name in PACKAGES}
    return {"hardware": hardware, "python": platform.python_version(), **versions}
