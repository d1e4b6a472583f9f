"""Writes folders atomically: staged, fsynced, listed in a manifest, then renamed.

`manifest.json` lists the name, size and sha256 of every file and is written last; a folder whose manifest does not
verify is not a checkpoint. Training state that we write ourselves is JSON and safetensors: nothing is unpickled.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from llava_llama31.trainer.checkpoint.package_versions import package_version
from llava_llama31.trainer.errors import UserError, naming


if TYPE_CHECKING:
    import torch


MANIFEST = "manifest.json"
PACKAGES = ("llava-llama31", "torch", "transformers", "accelerate", "safetensors")
STAGING = ".staging-"
SEAL = "sha256"  # of the manifest itself; manifests of earlier versions do not have it
_HASHED_AT_ONCE = 8  # files
_NUMBERED = "checkpoint-"
PICKLES = frozenset((".bin", ".pkl", ".pickle", ".pt", ".pth"))


def staged(path: Path) -> Path:
    """Where a folder or file is written until it is complete: beside its place."""
    return path.with_name(STAGING + path.name)


def staging_folder(final: Path) -> Path:
    """Create an empty folder beside `final` to write into; leftovers of a killed save are removed."""
    staging = staged(final)
    remove(staging)
    staging.mkdir(parents=True)
    return staging


def remove(path: Path) -> None:
    """Remove a folder, or the file that a killed `write_json` left, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove the leftovers of killed saves in a folder."""
    for leftover in folder.glob(STAGING + "*"):
        remove(leftover)


def size(folder: Path) -> int:
    """Bytes of a committed folder, according to its manifest."""
    return sum(entry["size"] for entry in read_manifest(folder)["files"])


@contextmanager
def room(folder: Path, needed: int, *, check: bool = True) -> Iterator[None]:
    """Context that writes about this many bytes under `folder`, whose file system must have them free.

    Args:
        needed: in bytes.
        check: look at the free space first; only one of the processes that write together does.

    Raises:
        UserError: naming path and bytes: there is too little space, or writing fails.
    """
    free = shutil.disk_usage(folder).free
    fix = f"free {needed / 1e9:.2f} GB there and run again: the previous checkpoint is intact"
    if check and free < needed:
        raise UserError(
            f"saving needs {needed:,} bytes, but only {free:,} are free; nothing was written",
            where=str(folder),
            fix=fix,
        )
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # DeepSpeed writes with torch.save, which raises a plain RuntimeError
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        free = shutil.disk_usage(folder).free
        raise UserError(
            f"saving {needed:,} bytes failed, with {free:,} free: {error}", where=str(folder), fix=fix
        ) from error


def commit(staging: Path, final: Path, facts: dict[str, Any]) -> None:
    """Write a staged folder's manifest and rename the folder to `final`, durably.

    Args:
        facts: copied into the manifest, e.g. step and number of processes.
    """
    paths = sorted(path for path in staging.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as threads:  # the other processes wait for one core's hashes else
        entries = list(threads.map(lambda path: _synced(staging, path), paths))
    versions = {name: package_version(name) for name in PACKAGES}
    write_manifest(staging, {**facts, "versions": versions, "files": entries})
    for folder in {path.parent for path in staging.rglob("*")} | {staging}:
        _fsync_folder(folder)
    remove(final)  # a damaged folder of the same name, which verify() has rejected
    os.replace(staging, final)
    _fsync_folder(final.parent)


def _synced(staging: Path, path: Path) -> dict[str, Any]:
    """The manifest's entry of a staged file, whose contents are on the disk then."""
    path.chmod(path.stat().st_mode | 0o444)  # safetensors makes files readable by the owner only
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"name": path.relative_to(staging).as_posix(), "size": path.stat().st_size, "sha256": sha256(path)}


def verify(folder: Path) -> str | None:
    """Why a folder is not an intact checkpoint, or None if it is."""
    try:
        manifest = read_manifest(folder)
        if manifest.get(SEAL, _seal(manifest)) != _seal(manifest):
            return f"the checksum of {MANIFEST} has changed since it was saved"
        listed = {entry["name"] for entry in manifest["files"]}
        for path in folder.rglob("*"):
            if path.suffix in PICKLES and path.relative_to(folder).as_posix() not in listed:
                return f"{path.relative_to(folder)} is not in {MANIFEST}, and opening it could run arbitrary code"
        for entry in manifest["files"]:
            path = folder / entry["name"]
            if not path.is_file():
                return f"{entry['name']} is missing"
            if path.stat().st_size != entry["size"]:
                return f"{entry['name']} is {path.stat().st_size} bytes, not {entry['size']}"
            if sha256(path) != entry["sha256"]:
                return f"the checksum of {entry['name']} has changed since it was saved"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    return read_json(folder / MANIFEST)


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write a folder's manifest, including the manifest's own checksum."""
    write_json(folder / MANIFEST, {**content, SEAL: _seal(content)})


def _seal(content: dict[str, Any]) -> str:
    """sha256 of a manifest, computed without this field."""
    text = json.dumps({key: value for key, value in content.items() if key != SEAL}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def at_step(folder: str | Path | None, step: int) -> Path:
    """The checkpoint of a step in a stage's folder, by Transformers' name."""
    return Path(str(folder), f"{_NUMBERED}{step}")


def numbered(folder: Path) -> list[Path]:
    """The checkpoints of a stage's folder, newest (highest step) first."""
    found = [path for path in folder.glob(f"{_NUMBERED}*") if path.name.removeprefix(_NUMBERED).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_NUMBERED)), reverse=True)


def newest_committed(folder: Path) -> Path | None:
    """The newest checkpoint with a manifest, unverified."""
    return next((path for path in numbered(folder) if (path / MANIFEST).is_file()), None)


def newest_whole(folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, and the skipped ones with their reasons."""
    skipped: list[tuple[Path, str]] = []
    for path in numbered(folder):
        fault = verify(path)
        if fault is None:
            return path, skipped
        skipped.append((path, fault))
    return None, skipped


def rotate(folder: Path, keep: int, spare: Path | None = None) -> None:
    """Remove all but the newest `keep` checkpoints and `spare`."""
    for path in numbered(folder)[keep:]:
        if path != spare:
            shutil.rmtree(path)


def save_tree(path: Path, tree: Any) -> None:
    """Write nested dicts, lists, tuples, numbers, strings and tensors as `path`.json and `path`.safetensors."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    content = _encode(tree, tensors)
    save_file(tensors, path.with_suffix(".safetensors"))
    write_json(path.with_suffix(".json"), content)


def load_tree(path: Path) -> Any:
    """What `save_tree` wrote; tensors are on the CPU."""
    from safetensors.torch import load_file

    tensors = load_file(path.with_suffix(".safetensors"))
    return _decode(read_json(path.with_suffix(".json")), tensors)


def _encode(value: Any, tensors: "dict[str, torch.Tensor]") -> Any:
    import numpy as np
    import torch  # a finished run is recognised without it

    if isinstance(value, torch.Tensor | np.ndarray):
        tensor = torch.as_tensor(value).detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        # safetensors refuses tensors that share memory; the others are not copied, for they may fill half the host
        if storage.nbytes() > tensor.nbytes or any(
            storage.data_ptr() == known.data_ptr() for known in tensors.values()
        ):
            tensor = tensor.clone()
        tensors[str(len(tensors))] = tensor
        return {"tensor" if isinstance(value, torch.Tensor) else "array": str(len(tensors) - 1)}
    if isinstance(value, dict):
        return {"dict": [[_encode(k, tensors), _encode(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_encode(item, tensors) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"training state contains a {type(value).__name__}, which a checkpoint cannot store")


def _decode(value: Any, tensors: "dict[str, torch.Tensor]") -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    return {_decode(key, tensors): _decode(item, tensors) for key, item in content}


def write_json(path: Path, content: Any) -> None:
    """Write JSON durably and atomically; NaN is refused."""
    staging = staged(path)
    with naming(staging), staging.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, allow_nan=False, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
