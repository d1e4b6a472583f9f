"""Publish a folder, or a run whose recipe asks for it."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.utils import logging as hub_logging

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.errors import Unpublished, UserError
from llava_llama31.trainer.publishing.hub_calls import redact
from llava_llama31.trainer.publishing.publish import publish
from llava_llama31.trainer.publishing.published import is_outstanding
from llava_llama31.trainer.publishing.release import Release
from llava_llama31.trainer.publishing.staging import named_copy, public_copy
from llava_llama31.trainer.recipes.schema import Publish


def publish_folder(
    path: Path, repo_id: str, *, private: bool, collection: str | None, dry_run: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Publish a finished run or an exported folder; messages and errors contain no token.

    Raises:
        UserError: names the fix and the command that resumes.
    """
    hub_logging.set_verbosity_error()  # its warnings show signed addresses
    resume = publish_line(path, repo_id, private=private, collection=collection)
    try:
        folder = (public_copy if RunFolder(path).record.is_file() else named_copy)(path, repo_id)
        release = Release(folder, repo_id, private, resume, collection)
        return publish(release, dry_run=dry_run, say=lambda line: say(redact(line)))
    except UserError as error:
        raise UserError(redact(str(error))) from None


def publish_run(
    spec: Publish | None, output: Path, summary: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """Publish a finished run if its recipe asks for it and it is not published yet; returns the updated summary.

    Raises:
        Unpublished: names the command that publishes it.
    """
    file = RunFolder(output).summary
    if spec is None or not is_outstanding(spec, summary):
        return summary
    resume = publish_line(output, spec.repo_id, private=spec.private, collection=spec.collection)
    state = summary["publish"] = {"repo": spec.repo_id, "published": False, "resume": resume}
    atomic_folders.write_json(file, summary)
    try:
        result = publish_folder(
            output, spec.repo_id, private=spec.private, collection=spec.collection, dry_run=False, say=say
        )
    except (UserError, OSError) as error:
        state["reason"] = redact(str(error))
        atomic_folders.write_json(file, summary)
        fix = "" if resume in str(error) else resume
        what = f"the run has finished but is not yet published: {state['reason']}"
        raise Unpublished(what, where=str(output), fix=fix) from error
    summary["publish"] = {"repo": spec.repo_id, "published": True} | {k: result[k] for k in ("revision", "url", "tag")}
    atomic_folders.write_json(file, summary)
    say(f"published: {result['url']} ({result['tag']})")
    return summary


def publish_line(path: Path, repo_id: str, *, private: bool, collection: str | None) -> str:
    """The command that publishes, also after a failure."""
    options = [*(["--private"] if private else []), *(["--collection", collection] if collection else [])]
    return shlex.join(["llava-llama31", "publish", str(path), "--repo-id", repo_id, *options])
