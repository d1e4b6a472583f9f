"""Files of the Hub: their sizes and checksums, and downloads that huggingface_hub resumes and we verify."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from llava_llama31.trainer.data.fetch.downloading import sha256_of
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.redaction import redacted


_DATASETS = "datasets/"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository; `sha256` is empty for small files, which are kept in git."""

    repo: str
    repo_type: str
    path: str
    revision: str
    bytes: int
    sha256: str


def parse(url: str) -> tuple[str, str, str]:
    """(repository, its type, path in it) of `hf://[datasets/]OWNER/NAME[/PATH]`."""
    rest = url.removeprefix("hf://")
    repo_type = "dataset" if rest.startswith(_DATASETS) else "model"
    owner, name, *path = rest.removeprefix(_DATASETS).split("/", 2)
    return f"{owner}/{name}", repo_type, path[0] if path else ""


def find(url: str) -> list[HubFile]:
    """The files that a URL names at the newest commit, those that match where it holds `*`.

    Raises:
        UserError: the Hub does not answer, refuses, or has no such file.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    repo, repo_type, path = parse(url)
    with _calls(url):
        api = HfApi()
        revision = api.repo_info(repo, repo_type=repo_type).sha
        assert revision is not None
        folder = path.rpartition("/")[0] or None
        listed = api.list_repo_tree(repo, folder, recursive=True, revision=revision, repo_type=repo_type)
        files = [
            HubFile(repo, repo_type, file.path, revision, file.size, file.lfs.sha256 if file.lfs else "")
            for file in listed
            if isinstance(file, RepoFile) and (file.path == path or fnmatchcase(file.path, path))
        ]
    if not files:
        raise UserError("the repository has no such file", where=url, fix="see its page: it may have been moved")
    return sorted(files, key=lambda file: file.path)


def fetch(file: HubFile, to: Path, advance: Callable[[int], None]) -> None:
    """Download a file to a path, where it appears as a whole.

    Raises:
        UserError: the Hub does not answer or refuses, or the file's checksum is wrong.
    """
    from huggingface_hub import hf_hub_download

    folder = to.with_name(f".part-{to.name}")
    where = f"hf://{file.repo}/{file.path}"
    with _calls(where):
        got = hf_hub_download(file.repo, file.path, repo_type=file.repo_type, revision=file.revision, local_dir=folder)
    path = Path(got)
    size = path.stat().st_size
    if size != file.bytes or (file.sha256 and sha256_of(path) != file.sha256):
        path.unlink()
        what = f"{size} bytes arrived whose length or sha256 is not the Hub's; they were removed"
        raise UserError(what, where=where, fix="run the same command again")
    advance(size)
    to.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, to)
    _remove(folder)


def fetch_checkpoint(name: str) -> None:
    """Download a checkpoint into the Hub's cache, and verify the checksums of its large files.

    Raises:
        UserError: the Hub does not answer or refuses, or a checksum is wrong.
    """
    from llava_llama31.trainer.model.locating import local_checkpoint

    folder = local_checkpoint(name, where=name)
    for path in sorted(folder.rglob("*.safetensors")):
        stored = path.resolve()  # the cache calls large files by their sha256
        if len(stored.name) == 64 and sha256_of(stored) != stored.name:
            stored.unlink()
            path.unlink()
            what = "its sha256 is not the Hub's; it was removed from the cache"
            raise UserError(what, where=str(path), fix="run the same command again")


def _remove(folder: Path) -> None:
    from llava_llama31.trainer.checkpoint.atomic_folders import remove

    remove(folder)


@contextmanager
def _calls(where: str) -> Iterator[Any]:
    """Turn the Hub's errors into ours."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except GatedRepoError as error:
        page = f"https://huggingface.co/{where.removeprefix('hf://')}"
        what = "the repository is gated, and this machine's token may not read it"
        raise UserError(what, where=where, fix=f"accept its terms at {page}, then `hf auth login`") from error
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set", where=where, fix="unset it to fetch") from error
    except (HfHubHTTPError, HTTPError, OSError) as error:
        what = redacted(str(error).strip().partition("\n")[0]) or type(error).__name__
        fix = "run the same command again: what has arrived is kept"
        raise UserError(f"the request to the Hub failed: {what}", where=where, fix=fix) from error
