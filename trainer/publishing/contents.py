"""A folder as the gate's rules see it, and their findings."""

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from llava_llama31.model_card.card import LLAMA_LICENCES, LlamaLicence


CARD = "README.md"
# what huggingface_hub raises for malformed metadata
CARD_ERRORS = (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError)
EXPORT_AGAIN = "write it again: llava-llama31 export RUN"
WEIGHTS = ".safetensors"
# bytes: the Hub's limit for one file, and the limit for anything but weights
MAX_WEIGHTS, MAX_OTHER = 50 * 10**9, 100 * 10**6


@dataclass(frozen=True)
class GateFinding:
    """One reason why a folder must not be published.

    Args:
        rule: name of the rule.
        file: relative name within the folder.
        what: what is wrong with it.
        fix: how to fix it.
    """

    rule: str
    file: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what} (fix: {self.fix})"


@dataclass(frozen=True)
class Contents:
    """A folder as the rules see it.

    Attributes:
        folder: that contains the files.
        name: to publish under, without the owner.
        links_within: folder that symbolic links may point into, as the Hub cache's do; default: none.
    """

    folder: Path
    name: str
    links_within: Path | None = None

    @cached_property
    def files(self) -> dict[str, Path]:
        """Relative name -> path of every readable file, sorted."""
        return {name: path for name, path in self._entries.items() if name not in self.obstacles}

    @cached_property
    def obstacles(self) -> dict[str, str]:
        """Relative name -> why the rules cannot read it."""
        reasons = {name: self._obstacle(path) for name, path in self._entries.items()}
        return {name: reason for name, reason in reasons.items() if reason}

    @cached_property
    def _entries(self) -> dict[str, Path]:
        paths = sorted(path for path in self.folder.rglob("*") if path.is_symlink() or not path.is_dir())
        return {path.relative_to(self.folder).as_posix(): path for path in paths}

    def _obstacle(self, path: Path) -> str:
        if path.is_symlink():
            within = self.links_within
            if within is None or not path.resolve().is_relative_to(within.resolve()):
                return "is a link, whose target could be anything"
        try:
            status = path.stat()
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        if not stat.S_ISREG(status.st_mode):
            return "is not a regular file"
        limit = MAX_WEIGHTS if path.suffix == WEIGHTS else MAX_OTHER
        return f"has {status.st_size:,} bytes; the limit is {limit:,}" if status.st_size > limit else ""

    def read(self, file: str) -> str | None:
        path = self.files.get(file)
        return None if path is None else path.read_text(encoding="utf-8", errors="replace")

    def read_json(self, file: str) -> dict[str, Any]:
        """A file's JSON object; empty if the file is missing or broken, which `check_complete` reports."""
        try:
            content = json.loads(self.read(file) or "{}")
        except (ValueError, RecursionError):
            return {}
        return mapping(content)

    @cached_property
    def card(self) -> Mapping[str, Any]:
        """The card's metadata; empty if it cannot be read."""
        try:
            return ModelCard(self.read(CARD) or "", ignore_metadata_errors=True).data.to_dict()
        except CARD_ERRORS:
            return {}

    @property
    def is_adapter(self) -> bool:
        return "adapter_config.json" in self.files

    @property
    def llama_licences(self) -> list[LlamaLicence]:
        """Meta's licences that anything in the folder names as the model's."""
        tags, texts = self.card.get("tags") or [], [self._titles(file) for file in ("LICENSE", "NOTICE")]
        return [
            licence
            for licence in LLAMA_LICENCES.values()
            if self.card.get("license") == licence.key or licence.tag in tags or any(licence.title in t for t in texts)
        ]

    def _titles(self, file: str) -> str:
        return (self.read(file) or "").upper()


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}
