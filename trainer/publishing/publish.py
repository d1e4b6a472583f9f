"""Publishes a model: gate -> pull request -> the same gate on the downloaded copy -> merge, tag, visibility.

Each step looks at the repository first and does only what is missing, so that the same command resumes after any
failure without a second pull request or commit. Content identifies a release: the pull request's title and the tag
contain a hash of all names and contents.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo, RepoFile

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.publishing.contents import CARD, GateFinding
from llava_llama31.trainer.publishing.doors import Doors, empty_cache, fetch, open_doors
from llava_llama31.trainer.publishing.gate import RULES, check_folder
from llava_llama31.trainer.publishing.hub_calls import attempt
from llava_llama31.trainer.publishing.release import REMOTE_ONLY, Release
from llava_llama31.trainer.terminal import shown_size


MAX_FINDINGS = 12


CheckFolder = Callable[[Path], Doors]
CheckRevision = Callable[[Release, str], Doors]


def doors_of_folder(folder: Path) -> Doors:
    """Open both doors of a local folder."""
    with empty_cache() as cache:
        return open_doors(folder.resolve(), cache)


def doors_of_revision(release: Release, revision: str) -> Doors:
    """Download a revision into an empty cache in a clean process; check gate, both doors and the card's code."""
    with empty_cache() as cache:

        def download() -> Path:
            return fetch(release.repo_id, revision, cache)

        folder = attempt(f"download of {revision[:8]}", download, resume=release.resume)
        # the cache holds links to its blobs
        refuse(
            check_folder(folder, release.name, links_within=folder.parents[1]),
            where=f"{release.repo_id}@{revision[:8]}",
        )
        return open_doors(release.repo_id, cache, revision=revision, snippet_of=folder)


def refuse(findings: Sequence[GateFinding], *, where: str) -> None:
    """Raise a UserError if the gate found anything."""
    if findings:
        shown = "; ".join(map(str, findings[:MAX_FINDINGS]))
        more = f"; and {len(findings) - MAX_FINDINGS} more" if len(findings) > MAX_FINDINGS else ""
        raise UserError(f"cannot be published: {shown}{more}", where=where)


def publish(
    release: Release,
    *,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda line: None,
    check_local: CheckFolder = doors_of_folder,
    check_published: CheckRevision = doors_of_revision,
) -> dict[str, Any]:
    """Publish, or with `dry_run` only list the steps; returns repo, revision, url, tag and checks.

    Raises:
        UserError: names the fix and the command that resumes; no finished step runs twice.
    """
    refuse(check_folder(release.folder, release.name), where=str(release.folder))
    api = HfApi()
    check_free_space(sum(file.size for file in release.files.values()))
    card = release.files[CARD].path.read_text(encoding="utf-8")
    if dry_run and get_token() is None:
        unchecked = (
            "there is no token, so your rights, the card (by the Hub) and what exists on the Hub are not checked"
        )
        return {**_plan(release, None, {}), "not_checked": unchecked}
    info = check_target(api, release.repo_id, card, release.collection, resume=release.resume)
    tree = attempt("file list", lambda: tree_of(api, release, "main"), resume=release.resume) if info else {}
    if dry_run:
        return _plan(release, info, tree)
    say(f"{len(release.files)} files pass {len(RULES)} rules; opening the folder both ways")
    local = check_local(release.folder)
    attempt("repository", lambda: ensure_repo(api, release), resume=release.resume)
    published = attempt("file list", lambda: _published(api, release), resume=release.resume)
    pull_request = None
    if published is None:
        pull_request, head = attempt("upload", lambda: _ensure_pull_request(api, release), resume=release.resume)
        say(f"pull request {pull_request} holds {head[:8]}; downloading it and opening it both ways")
        checked = _compared(local, check_published(release, head), release, head)
        published = attempt("merge", lambda: _ensure_merged(api, release, pull_request), resume=release.resume)
    else:
        say(f"{release.repo_id} has this content; downloading it and opening it both ways")
        checked = _compared(local, check_published(release, published), release, published)
    attempt("tag", lambda: ensure_tag(api, release, published, release.tag), resume=release.resume)
    attempt("visibility", lambda: _ensure_visibility(api, release), resume=release.resume)
    attempt("collection", lambda: _ensure_collected(api, release), resume=release.resume)
    return {
        "repo": release.repo_id,
        "revision": published,
        "url": f"{api.endpoint}/{release.repo_id}/tree/{published}",
        "tag": release.tag,
        "private": release.private,
        "collection": release.collection,
        "pull_request": pull_request,
        "checks": {
            "rules": [rule.__name__.removeprefix("check_") for rule in RULES],
            "logits_sha256": checked.logits_sha256,
            "samples": checked.samples,
            "snippet": checked.snippet,
        },
    }


def check_rights(api: HfApi, repo_id: str, *, resume: str) -> None:
    """Check that the token may write to the repository's owner, as far as the token says.

    Raises:
        UserError: there is no valid token, or it may not write there.
    """
    owner = repo_id.partition("/")[0]
    user = attempt("token", api.whoami, resume=resume)
    orgs = {org["name"]: org.get("roleInOrg") for org in user.get("orgs", [])}
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        fix = f"set HF_TOKEN to a token with write access, then: {resume}"
        raise UserError("the token can only read", where="token", fix=fix)
    if owner != user["name"] and orgs.get(owner, "read") == "read":
        may = ", ".join([user["name"], *(name for name, role in orgs.items() if role != "read")])
        fix = f"publish under one of {may}, or use another token"
        raise UserError(f"{user['name']} cannot write to {owner}", where="--repo-id", fix=fix)


def check_target(api: HfApi, repo_id: str, card: str, collection: str | None, *, resume: str) -> ModelInfo | None:
    """Check with the Hub, before writing, everything it could refuse later; returns the repository if it exists.

    Raises:
        UserError: the Hub would refuse token, right, card or collection; names which.
    """
    check_rights(api, repo_id, resume=resume)
    attempt("card", lambda: ModelCard(card).validate(), resume=resume)
    if collection is not None:
        attempt("collection", lambda: api.get_collection(collection), resume=resume)
    return attempt("repository", lambda: find_repo(api, repo_id), resume=resume)


def check_free_space(size: int) -> None:
    """Check that the temporary folder has room for `size` bytes: the check downloads the published files.

    Raises:
        UserError: there is too little space.
    """
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < 1.1 * size:
        what = f"the check downloads the published files, {shown_size(size)}, but only {shown_size(free)} are free"
        raise UserError(what, where=tempfile.gettempdir(), fix="free some space, or set TMPDIR to a larger disk")


def find_repo(api: HfApi, repo_id: str) -> ModelInfo | None:
    try:
        return api.model_info(repo_id)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:
            raise
        return None


def _plan(release: Release, info: ModelInfo | None, tree: Mapping[str, RepoFile]) -> dict[str, Any]:
    files = {name: file.size for name, file in release.files.items()}
    same = info is not None and release.equals(tree)
    steps = ["open the folder with stock classes and with remote code, and compare their logits"]
    if info is None:
        steps.append(f"create {release.repo_id}, private")
    if not same:
        steps.append(f"upload {len(files)} files, {shown_size(sum(files.values()))}, in one commit as a pull request")
    steps.append("download that revision into an empty cache, check it, open it both ways, compare logits and answers")
    if not same:
        steps.append("merge the pull request")
    steps += [f"tag it {release.tag}", f"leave the repository {'private' if release.private else 'public'}"]
    if release.collection is not None:
        steps.append(f"add it to the collection {release.collection}")
    return {
        "repo": release.repo_id,
        "dry_run": True,
        "steps": steps,
        "files": files,
        "removed": sorted(tree.keys() - release.files.keys() - REMOTE_ONLY),
        "tag": release.tag,
    }


def ensure_repo(api: HfApi, release: Release) -> None:
    info = find_repo(api, release.repo_id)
    if info is None:
        api.create_repo(release.repo_id, private=True, exist_ok=True)
        info = api.model_info(release.repo_id)
    if release.private and not info.private:
        api.update_repo_settings(release.repo_id, private=True)


def tree_of(api: HfApi, release: Release, revision: str) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(release.repo_id, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def head_of(api: HfApi, release: Release, revision: str) -> str:
    head = api.model_info(release.repo_id, revision=revision).sha
    assert head is not None
    return head


def _published(api: HfApi, release: Release) -> str | None:
    """Commit of the main revision if it has exactly the release's content."""
    head = head_of(api, release, "main")
    return head if release.equals(tree_of(api, release, head)) else None


def _find_pull_request(api: HfApi, release: Release) -> tuple[int, str] | None:
    """(number, status) of the release's unmerged pull request."""
    for found in api.get_repo_discussions(release.repo_id):
        if found.is_pull_request and found.title == release.title and found.status in ("open", "draft"):
            return found.num, found.status
    return None


def _ensure_pull_request(api: HfApi, release: Release) -> tuple[int, str]:
    """Find or open a pull request with exactly the release's content; returns (number, commit)."""
    found = _find_pull_request(api, release)
    revision = f"refs/pr/{found[0]}" if found else "main"
    head = head_of(api, release, revision)
    tree = tree_of(api, release, head)
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
    """Merge if necessary; returns the commit of the main revision with exactly the release's content."""
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
        f"after merging pull request {number}, main has other files too: somebody else changed it",
        where=release.repo_id,
        fix=f"look at its history, then: {release.resume}",
    )


def ensure_tag(api: HfApi, release: Release, revision: str, tag: str) -> None:
    api.create_tag(release.repo_id, tag=tag, revision=revision, exist_ok=True)


def _ensure_visibility(api: HfApi, release: Release) -> None:
    if bool(api.model_info(release.repo_id).private) != release.private:
        api.update_repo_settings(release.repo_id, private=release.private)


def _ensure_collected(api: HfApi, release: Release) -> None:
    if release.collection is not None:
        api.add_collection_item(release.collection, release.repo_id, "model", exists_ok=True)


def _compared(local: Doors, published: Doors, release: Release, revision: str) -> Doors:
    if local != published:
        raise UserError(
            "the downloaded model answers differently from the local one",
            where=f"{release.repo_id}@{revision[:8]}",
            fix=f"it is not merged; look at the pull request, then: {release.resume}",
        )
    return published
