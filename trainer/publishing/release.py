"""What is published: files, target and the content hash that identifies them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.errors import UserError


REMOTE_ONLY = frozenset((".gitattributes",))  # the Hub's own
NUM_HASH_DIGITS = 12


@dataclass(frozen=True)
class LocalFile:
    """A file to be published."""

    path: Path

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @cached_property
    def sha256(self) -> str:
        return atomic_folders.sha256(self.path)

    @cached_property
    def git_oid(self) -> str:
        digest = hashlib.sha1(b"blob %d\0" % self.size)
        with self.path.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
        return digest.hexdigest()

    def equals(self, remote: RepoFile) -> bool:
        if remote.lfs is not None:
            return remote.lfs.sha256 == self.sha256
        return remote.blob_id == self.git_oid


@dataclass(frozen=True)
class Release:
    """What is published, where to, and how to resume after a failure.

    Attributes:
        folder: that contains exactly the files to publish.
        repo_id: OWNER/NAME on the Hub.
        private: whether the repository stays private.
        resume: the command that resumes.
        collection: slug of a collection to add it to.
    """

    folder: Path
    repo_id: str
    private: bool
    resume: str
    collection: str | None = None

    @property
    def name(self) -> str:
        return self.repo_id.rpartition("/")[2]

    @cached_property
    def files(self) -> dict[str, LocalFile]:
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        names = {path.relative_to(self.folder).as_posix(): LocalFile(path) for path in paths}
        return {name: file for name, file in names.items() if name not in REMOTE_ONLY}

    @cached_property
    def content(self) -> str:
        """Hash of all names and contents."""
        listed = json.dumps([[name, file.sha256] for name, file in self.files.items()])
        return hashlib.sha256(listed.encode()).hexdigest()[:NUM_HASH_DIGITS]

    @property
    def title(self) -> str:
        return f"Publish {self.name}, content {self.content}"

    @property
    def tag(self) -> str:
        return f"content-{self.content}"

    def equals(self, tree: Mapping[str, RepoFile]) -> bool:
        """Whether a revision has exactly these files."""
        if tree.keys() - REMOTE_ONLY != self.files.keys():
            return False
        return all(file.equals(tree[name]) for name, file in self.files.items())


def check_repo_id(repo_id: str, where: str) -> None:
    """Refuse an id that is not OWNER/NAME.

    Raises:
        UserError: it is malformed; names the fault.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(str(error), where=where, fix="OWNER/NAME") from None
    if repo_id.count("/") != 1:
        raise UserError(f"{repo_id!r} has no owner", where=where, fix="OWNER/NAME")
