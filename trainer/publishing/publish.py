"""Publish a model: gate -> pull request -> the same gate on what the Hub gives back -> merge, tag, visibility.

Each step looks at the repository first and does only what is missing, so that the same command goes on after any
failure with no second pull request and no second commit. What is published is known by its content: the title of the
pull request and the tag hold a hash of all names and contents.
"""

import hashlib
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo, RepoFile
from huggingface_hub.utils import logging as hub_logging

from llava_llama31.trainer import checkpoints
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.publishing.doors import Doors, empty_cache, fetch, open_doors
from llava_llama31.trainer.publishing.gate import CARD, RULES, Contents, check_folder, check_manifest
from llava_llama31.trainer.publishing.hub_calls import attempt, redact


STAGED = "publish"
REMOTE_ONLY = frozenset((".gitattributes",))  # the Hub's own
NUM_HASH_DIGITS = 12
MAX_FINDINGS = 12


@dataclass(frozen=True)
class LocalFile:
    """A file to be published."""

    path: Path

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @cached_property
    def sha256(self) -> str:
        return checkpoints.sha256(self.path)

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
    """What is published, where to, and how to go on after a failure.

    Attributes:
        folder: that holds all of it and nothing else.
        private: whether the repository stays hidden when all is done.
        resume: the command that goes on.
    """

    folder: Path
    repo_id: str
    private: bool
    resume: str

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
        """Whether a revision holds these files and no others."""
        if tree.keys() - REMOTE_ONLY != self.files.keys():
            return False
        return all(file.equals(tree[name]) for name, file in self.files.items())


CheckFolder = Callable[[Path], Doors]
CheckRevision = Callable[[Release, str], Doors]


def doors_of_folder(folder: Path) -> Doors:
    """Both doors of a local folder."""
    with empty_cache() as cache:
        return open_doors(folder.resolve(), cache)


def doors_of_revision(release: Release, revision: str) -> Doors:
    """Gate and both doors of a revision, downloaded into an empty cache by a clean process."""
    with empty_cache() as cache:

        def download() -> Path:
            return fetch(release.repo_id, revision, cache)

        folder = attempt(f"download of {revision[:8]}", download, resume=release.resume)
        refuse(check_folder(folder, release.name), where=f"{release.repo_id}@{revision[:8]}")
        return open_doors(release.repo_id, cache, revision=revision)


def refuse(findings: list[Any], *, where: str) -> None:
    """Raise what the gate found, if anything."""
    if findings:
        shown = "; ".join(map(str, findings[:MAX_FINDINGS]))
        more = f"; and {len(findings) - MAX_FINDINGS} more" if len(findings) > MAX_FINDINGS else ""
        raise UserError(f"not fit to be published: {shown}{more}", where=where)


def publish(
    release: Release,
    *,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda line: None,
    check_local: CheckFolder = doors_of_folder,
    check_published: CheckRevision = doors_of_revision,
) -> dict[str, Any]:
    """Publish, or with `dry_run` find out what would be done; returns repo, revision, url, tag and checks.

    Raises:
        UserError: what to mend, and the command that goes on; nothing that was done is done twice.
    """
    refuse(check_folder(release.folder, release.name), where=str(release.folder))
    api = HfApi()
    info = _preflight(api, release)
    tree = attempt("file list", lambda: _tree(api, release, "main"), resume=release.resume) if info else {}
    if dry_run:
        return _plan(release, info, tree)
    say(f"{len(release.files)} files pass {len(RULES)} rules; opening both doors")
    local = check_local(release.folder)
    attempt("repository", lambda: _ensure_repo(api, release), resume=release.resume)
    published = attempt("file list", lambda: _published(api, release), resume=release.resume)
    pull_request = None
    if published is None:
        pull_request, head = attempt("upload", lambda: _ensure_pull_request(api, release), resume=release.resume)
        say(f"pull request {pull_request} holds {head[:8]}; downloading it and opening both doors")
        _compare(local, check_published(release, head), release, head)
        published = attempt("merge", lambda: _ensure_merged(api, release, pull_request), resume=release.resume)
    else:
        say(f"{release.repo_id} has this content; downloading it and opening both doors")
        _compare(local, check_published(release, published), release, published)
    attempt("tag", lambda: _ensure_tag(api, release, published), resume=release.resume)
    attempt("visibility", lambda: _ensure_visibility(api, release), resume=release.resume)
    return {
        "repo": release.repo_id,
        "revision": published,
        "url": f"{api.endpoint}/{release.repo_id}/tree/{published}",
        "tag": release.tag,
        "private": release.private,
        "pull_request": pull_request,
        "checks": {
            "rules": [rule.__name__.removeprefix("check_") for rule in RULES],
            "logits_sha256": local.logits_sha256,
            "samples": local.samples,
        },
    }


def check_rights(api: HfApi, repo_id: str, *, resume: str) -> None:
    """Whether the token may write to the repository's owner, as far as it says; needs no folder yet.

    Raises:
        UserError: there is no valid token, or it may not.
    """
    owner = repo_id.partition("/")[0]
    user = attempt("token", api.whoami, resume=resume)
    orgs = {org["name"]: org.get("roleInOrg") for org in user.get("orgs", [])}
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        fix = f"set HF_TOKEN to one with write access, then: {resume}"
        raise UserError("the token can only read", where="token", fix=fix)
    if owner != user["name"] and orgs.get(owner, "read") == "read":
        may = ", ".join([user["name"], *(name for name, role in orgs.items() if role != "read")])
        fix = f"publish under one of: {may}; or use another token"
        raise UserError(f"{user['name']} cannot write to {owner}", where="--repo-id", fix=fix)


def _preflight(api: HfApi, release: Release) -> ModelInfo | None:
    """Everything that can be known before anything is written; the repository if it is there."""
    check_rights(api, release.repo_id, resume=release.resume)
    attempt("card", lambda: ModelCard.load(release.folder / CARD).validate(), resume=release.resume)
    size = sum(file.size for file in release.files.values())
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < 1.1 * size:
        what = f"the published files are downloaded for the check: {_size(size)}, and {_size(free)} are free"
        raise UserError(what, where=tempfile.gettempdir(), fix="free some space, or set TMPDIR to a larger disk")
    return attempt("repository", lambda: _find_repo(api, release), resume=release.resume)


def _find_repo(api: HfApi, release: Release) -> ModelInfo | None:
    try:
        return api.model_info(release.repo_id)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:
            raise
        return None


def _plan(release: Release, info: ModelInfo | None, tree: Mapping[str, RepoFile]) -> dict[str, Any]:
    files = {name: file.size for name, file in release.files.items()}
    same = info is not None and release.equals(tree)
    steps = ["open both doors of the folder and compare their logits"]
    if info is None:
        steps.append(f"create {release.repo_id}, private")
    if not same:
        steps.append(f"upload {len(files)} files, {_size(sum(files.values()))}, in one commit as a pull request")
    steps.append("download that revision into an empty cache, check it, open both doors, compare logits and answers")
    if not same:
        steps.append("merge the pull request")
    steps += [f"tag it {release.tag}", f"leave the repository {'private' if release.private else 'public'}"]
    return {
        "repo": release.repo_id,
        "dry_run": True,
        "steps": steps,
        "files": files,
        "removed": sorted(tree.keys() - release.files.keys() - REMOTE_ONLY),
        "tag": release.tag,
    }


def _ensure_repo(api: HfApi, release: Release) -> None:
    info = _find_repo(api, release)
    if info is None:
        api.create_repo(release.repo_id, private=True, exist_ok=True)
        info = api.model_info(release.repo_id)
    if release.private and not info.private:
        api.update_repo_settings(release.repo_id, private=True)


def _tree(api: HfApi, release: Release, revision: str) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(release.repo_id, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _head(api: HfApi, release: Release, revision: str) -> str:
    head = api.model_info(release.repo_id, revision=revision).sha
    assert head is not None
    return head


def _published(api: HfApi, release: Release) -> str | None:
    """Commit of the main revision if that holds exactly the release."""
    head = _head(api, release, "main")
    return head if release.equals(_tree(api, release, head)) else None


def _find_pull_request(api: HfApi, release: Release) -> tuple[int, str] | None:
    """(number, status) of the one that is still to be merged."""
    for found in api.get_repo_discussions(release.repo_id):
        if found.is_pull_request and found.title == release.title and found.status in ("open", "draft"):
            return found.num, found.status
    return None


def _ensure_pull_request(api: HfApi, release: Release) -> tuple[int, str]:
    """(number, commit) of a pull request that holds exactly the release."""
    found = _find_pull_request(api, release)
    revision = f"refs/pr/{found[0]}" if found else "main"
    head = _head(api, release, revision)
    tree = _tree(api, release, head)
    if found and release.equals(tree):
        return found[0], head
    made = api.create_commit(
        release.repo_id,
        [
            *(CommitOperationAdd(name, str(file.path)) for name, file in release.files.items()),
            *(CommitOperationDelete(name) for name in sorted(tree.keys() - release.files.keys() - REMOTE_ONLY)),
        ],
        commit_message=release.title,
        revision=revision,
        parent_commit=head,
        create_pr=found is None,
    )
    number = found[0] if found else made.pr_num
    assert number is not None
    return number, made.oid


def _ensure_merged(api: HfApi, release: Release, number: int) -> str:
    """Commit of the main revision that holds exactly the release."""
    published = _published(api, release)
    if published is None:
        found = _find_pull_request(api, release)
        if found and found[1] == "draft":
            api.change_discussion_status(release.repo_id, number, "open")
        api.merge_pull_request(release.repo_id, number)
        published = _published(api, release)
    if published is not None:
        return published
    raise UserError(
        f"after the merge of pull request {number} main holds other files too: somebody else changed it",
        where=release.repo_id,
        fix=f"look at its history, then: {release.resume}",
    )


def _ensure_tag(api: HfApi, release: Release, revision: str) -> None:
    api.create_tag(release.repo_id, tag=release.tag, revision=revision, exist_ok=True)


def _ensure_visibility(api: HfApi, release: Release) -> None:
    if bool(api.model_info(release.repo_id).private) != release.private:
        api.update_repo_settings(release.repo_id, private=release.private)


def _compare(local: Doors, published: Doors, release: Release, revision: str) -> None:
    if local != published:
        raise UserError(
            "the downloaded model does not answer as the local one does",
            where=f"{release.repo_id}@{revision[:8]}",
            fix=f"it is not merged; look at the pull request, then: {release.resume}",
        )


def _size(size: float) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


# --- from a run


def stage_run(run: Path, repo_id: str) -> Path:
    """RUN/publish: the run's export under its public name; files are linked, the card is written for `repo_id`.

    A card that was edited in RUN/export goes as it is.
    """
    from llava_llama31.model_card.card import CardError, render_card
    from llava_llama31.trainer.finish import EXPORT, RECORD, export_again

    export = run / EXPORT
    if not (export / checkpoints.MANIFEST).is_file() or any(check_manifest(Contents(export, ""))):
        export = export_again(run)
    staged = checkpoints.stage(run / STAGED)
    shutil.copytree(export, staged, copy_function=_link, dirs_exist_ok=True)
    manifest = checkpoints.read_manifest(export)
    (entry,) = (entry for entry in manifest["files"] if entry["name"] == CARD)
    if checkpoints.sha256(export / CARD) == entry["sha256"]:
        record = checkpoints.read_json(run / RECORD) | {"name": repo_id.rpartition("/")[2], "model_id": repo_id}
        try:
            text = render_card(record)
        except CardError as error:
            raise UserError(str(error), where=str(run / RECORD)) from error
        (staged / CARD).unlink()
        (staged / CARD).write_text(text, encoding="utf-8")
    entry |= {"size": (staged / CARD).stat().st_size, "sha256": checkpoints.sha256(staged / CARD)}
    (staged / checkpoints.MANIFEST).unlink()
    checkpoints.write_manifest(staged, manifest)
    checkpoints.remove(run / STAGED)
    os.replace(staged, run / STAGED)
    return run / STAGED


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # no hard links on this file system
        shutil.copyfile(source, target)


# --- the command


def publish_command(source: str, repo_id: str, *, private: bool, dry_run: bool, json_output: bool) -> int:
    """`llava-llama31 publish`: progress on stderr, the plan or the result on stdout."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    from llava_llama31.trainer.finish import RECORD

    hub_logging.set_verbosity_error()  # its warnings show signed addresses
    path = Path(source)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(str(error), where="--repo-id", fix="OWNER/NAME") from None
    if repo_id.count("/") != 1:
        raise UserError(f"{repo_id!r} names no owner", where="--repo-id", fix="OWNER/NAME")
    if not path.is_dir():
        raise UserError("there is no such folder", where=source, fix="name a finished run or an exported folder")
    is_run = (path / RECORD).is_file()
    resume = ["llava-llama31", "publish", source, "--repo-id", repo_id, *(["--private"] if private else [])]
    try:
        with redirect_stdout(sys.stderr):  # libraries speak there when they are imported
            folder = stage_run(path, repo_id) if is_run else path
            release = Release(folder, repo_id, private, shlex.join(resume))
            result = publish(release, dry_run=dry_run, say=lambda line: print(redact(line)))  # noqa: T201
    except UserError as error:
        raise UserError(redact(str(error))) from None
    sys.stdout.write(redact(json.dumps(result) if json_output else _told(result)) + "\n")
    return 0


def _told(result: Mapping[str, Any]) -> str:
    if "steps" not in result:
        samples = [f"  {sample['question']} -> {sample['answer']}" for sample in result["checks"]["samples"]]
        return "\n".join(
            ["answers of the published model:", *samples, f"published: {result['url']} ({result['tag']})"]
        )
    steps = [f"{number}. {step}" for number, step in enumerate(result["steps"], start=1)]
    files = [f"  {_size(size):>12}  {name}" for name, size in result["files"].items()]
    removed = [f"  {'removed':>12}  {name}" for name in result["removed"]]
    return "\n".join(
        [f"{result['repo']}: nothing was written; this would be done", *steps, "files:", *files, *removed]
    )
