"""The command `publish`, and the last step of a run whose recipe has `publish`."""

import json
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from huggingface_hub.utils import logging as hub_logging

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.errors import Unpublished, UserError
from llava_llama31.trainer.publishing.hub_calls import redact
from llava_llama31.trainer.publishing.publish import publish, shown_size
from llava_llama31.trainer.publishing.release import Release, check_repo_id
from llava_llama31.trainer.publishing.staging import public_copy
from llava_llama31.trainer.recipes.schema import Publish


def publish_command(
    source: str, repo_id: str, *, private: bool, collection: str | None, dry_run: bool, json_output: bool
) -> int:
    """`llava-llama31 publish`: progress on stderr, the plan or the result on stdout."""
    check_repo_id(repo_id, "--repo-id")
    path = Path(source)
    if not path.is_dir():
        raise UserError("no such folder", where=source, fix="name a finished run or an exported folder")
    with redirect_stdout(sys.stderr):  # libraries print to stdout when imported
        result = publish_folder(
            path,
            repo_id,
            private=private,
            collection=collection,
            dry_run=dry_run,
            say=lambda line: print(line),  # noqa: T201
        )
    sys.stdout.write(redact(json.dumps(result) if json_output else _rendered(result)) + "\n")
    return 0


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
        folder = public_copy(path, repo_id) if RunFolder(path).record.is_file() else path
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
    told = summary.get("publish", {})
    if spec is None or (told.get("repo") == spec.repo_id and told.get("published")):
        return summary
    resume = publish_line(output, spec.repo_id, private=spec.private, collection=spec.collection)
    told = summary["publish"] = {"repo": spec.repo_id, "published": False, "resume": resume}
    atomic_folders.write_json(file, summary)
    try:
        result = publish_folder(
            output, spec.repo_id, private=spec.private, collection=spec.collection, dry_run=False, say=say
        )
    except (UserError, OSError) as error:
        told["reason"] = redact(str(error))
        atomic_folders.write_json(file, summary)
        fix = "" if resume in str(error) else resume
        what = f"the run has finished but is not yet published: {told['reason']}"
        raise Unpublished(what, where=str(output), fix=fix) from error
    summary["publish"] = {"repo": spec.repo_id, "published": True} | {k: result[k] for k in ("revision", "url", "tag")}
    atomic_folders.write_json(file, summary)
    say(f"published: {result['url']} ({result['tag']})")
    return summary


def publish_line(path: Path, repo_id: str, *, private: bool, collection: str | None) -> str:
    """The command that publishes, also after a failure."""
    options = [*(["--private"] if private else []), *(["--collection", collection] if collection else [])]
    return shlex.join(["llava-llama31", "publish", str(path), "--repo-id", repo_id, *options])


def _rendered(result: Mapping[str, Any]) -> str:
    if "steps" not in result:
        samples = [f"  {sample['question']} -> {sample['answer']}" for sample in result["checks"]["samples"]]
        return "\n".join(
            ["answers of the published model:", *samples, f"published: {result['url']} ({result['tag']})"]
        )
    steps = [f"{number}. {step}" for number, step in enumerate(result["steps"], start=1)]
    files = [f"  {shown_size(size):>12}  {name}" for name, size in result["files"].items()]
    removed = [f"  {'removed':>12}  {name}" for name in result["removed"]]
    return "\n".join(
        [f"{result['repo']}: dry run, nothing was written; the steps would be", *steps, "files:", *files, *removed]
    )
