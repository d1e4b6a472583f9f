"""What a check of one source found, kept on disk under a fingerprint of all that it depends on."""

import hashlib
import inspect
import json
import logging
import os
import re
import zipfile
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import numpy as np

from llava_llama31.processing import pixels_llava_llama31
from llava_llama31.trainer import redaction
from llava_llama31.trainer.checkpoint.package_versions import package_version
from llava_llama31.trainer.data import check, sources
from llava_llama31.trainer.data.sources.images import stat_signature
from llava_llama31.trainer.data.sources.parquet_rows import is_parquet
from llava_llama31.trainer.data.sources.remote_files import signature
from llava_llama31.trainer.errors import naming


if TYPE_CHECKING:
    from llava_llama31.processing import LlavaLlama31Processor


logger = logging.getLogger(__name__)

_PACKAGES = ("datasets", "numpy", "pillow", "tokenizers", "transformers")
_WHOLE_FILE_BYTES = 64 * 2**20
_SAMPLE_BYTES = 2**20


class WatchedFiles:
    """Image files with the size and modification time that they had when they were checked."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._names = bytearray()
        self._signatures = array("q")

    def add(self, name: str, signature: tuple[int, int]) -> None:
        """Watch a file; the first signature of a name counts."""
        known = hash(name)
        if known not in self._seen:
            self._seen.add(known)
            self._names += os.fsencode(name) + b"\0"
            self._signatures.extend(signature)

    def to_arrays(self) -> dict[str, np.ndarray]:
        return {
            "watched_names": np.frombuffer(self._names, np.uint8),
            "watched_signatures": np.frombuffer(self._signatures, np.int64).reshape(-1, 2),
        }


def first_changed_file(arrays: dict[str, np.ndarray]) -> str | None:
    """The first watched file that is no longer what it was; None where none has changed."""
    names = arrays["watched_names"].tobytes().split(b"\0")[:-1]
    for name, (size, modified) in zip(names, arrays["watched_signatures"].tolist(), strict=True):
        path = os.fsdecode(name)
        if stat_signature(path) != (size, modified):
            return path
    return None


class CheckCache:
    """A folder of findings; an entry becomes visible as a whole, and a damaged or outdated one counts as absent.

    An entry is `KEY.json`, written last, which names an `.npz` of arrays and a `.jsonl` of rejected rows.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, key: str) -> tuple[dict, dict[str, np.ndarray], Path] | None:
        """Summary, arrays and path of the rejects, or None."""
        entry = self.folder / f"{key}.json"
        try:
            summary = json.loads(entry.read_text(encoding="utf-8"))
            with np.load(self.folder / summary["arrays"], allow_pickle=False) as stored:
                arrays = dict(stored)
            rejects = self.folder / summary["rejects"]
            rejects.stat()
            changed = first_changed_file(arrays)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("%s: not used, it is damaged (%s)", entry, error)
            return None
        if changed:
            logger.info("checking again: %s has changed", changed)
            return None
        return summary, arrays, rejects

    def store(self, key: str, summary: dict, arrays: dict[str, np.ndarray], rejects: Path) -> Path:
        """Keep an entry, taking over the file `rejects`; returns where the rejects lie from now on."""
        name = f"{key}-{uuid4().hex[:8]}"
        kept = rejects.replace(self.folder / f"{name}.jsonl")
        np.savez(self.folder / f"{name}.npz", allow_pickle=False, **arrays)
        summary |= {"arrays": f"{name}.npz", "rejects": kept.name}
        write_atomically(self.folder / f"{key}.json", [json.dumps(summary)])
        for old in self.folder.glob(f"{key}-*"):
            if not old.name.startswith(name):
                old.unlink(missing_ok=True)
        return kept


def write_atomically(path: Path, pieces: Iterable[str]) -> None:
    """Write a text file that is either there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        with naming(staged), staged.open("w", encoding="utf-8") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def content_digests(signatures: Sequence[list], arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """Digests of a source's data files and of the image files beside them, wherever their folders are.

    Args:
        signatures: of the data files, by `file_signature`.
        arrays: of a finding; an image file counts with its name, size and modification time in seconds.
    """
    names = [os.fsdecode(name) for name in arrays["watched_names"].tobytes().split(b"\0")[:-1]]
    times = [(size, modified // 10**9) for size, modified in arrays["watched_signatures"].tolist()]
    images = sorted(zip(_below_common_folder(names), times, strict=True))
    places = [re.sub(r"^\w+://", "", signature[0]) for signature in signatures]
    files = _below_common_folder(places) if len(signatures) > 1 else [""]
    parts = {
        "files": [(name, size, digest) for name, (_, size, _, digest) in zip(files, signatures, strict=True)],
        "images": images,
    }
    return {
        part: hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
        for part, content in parts.items()
    }


def _below_common_folder(paths: Sequence[str]) -> list[str]:
    common = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    return [path[len(common) :].lstrip(os.sep) for path in paths]


def fingerprint(signatures: Sequence[list], processor: "LlavaLlama31Processor | None", settings: dict) -> str:
    """32 hex digits that change with the data files, the processor, the settings, this code and its libraries."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (
        signatures,
        processor and processor_signature(processor),
        settings,
        code_signature(processor),
    ):
        digest.update(json.dumps(part, sort_keys=True).encode() + b"\0")
    return digest.hexdigest()


def file_signature(path: Path | str) -> list:
    """Path, size and a hash of the content; of a large file, of 64 MiB spread over it, and its modification time.

    A string is a URL, whose large file counts with what its store calls the version; parquet, with its footer too.
    """
    if isinstance(path, str):
        return signature(path, 0 if is_parquet(path) else _WHOLE_FILE_BYTES)
    size, modified = stat_signature(os.fspath(path))
    if size <= _WHOLE_FILE_BYTES:
        modified = 0
        offsets: Iterable[int] = range(0, size, _SAMPLE_BYTES)
    else:
        last = _WHOLE_FILE_BYTES // _SAMPLE_BYTES - 1
        offsets = (number * (size - _SAMPLE_BYTES) // last for number in range(last + 1))
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        for offset in offsets:
            file.seek(offset)
            digest.update(file.read(_SAMPLE_BYTES))
    return [os.path.realpath(path), size, modified, digest.hexdigest()]


def processor_signature(processor: "LlavaLlama31Processor") -> str:
    """Hash of the processor's settings, chat template and tokenizer."""
    tokenizer = processor.tokenizer.backend_tokenizer.to_str()
    # what comes before is the padding and truncation of the last call
    tokenizer = tokenizer[tokenizer.index('"added_tokens"') :]
    parts = [processor.to_json_string(), processor.chat_template, tokenizer]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def code_signature(processor: "LlavaLlama31Processor | None") -> dict:
    """Hash of the source that decides what is found, and the versions of the libraries beneath it."""
    files = [Path(redaction.__file__), Path(pixels_llava_llama31.__file__)]
    for room in (sources, check):
        files += sorted(Path(str(room.__file__)).parent.glob("*.py"))
    if processor is not None:
        files.append(Path(inspect.getfile(type(processor))))
    digest = hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=16)
    return {"code": digest.hexdigest()} | {package: package_version(package) for package in _PACKAGES}
