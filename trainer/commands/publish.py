"""`llava-llama31 publish`."""

import argparse
import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from llava_llama31.trainer.commands.options import add_json
from llava_llama31.trainer.commands.quick_imports import quick_imports
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.redaction import plain, say


HELP = "check a model, upload it, check what was uploaded, and merge it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN|FOLDER", help="a finished run, or an exported folder")
    parser.add_argument(
        "--repo-id",
        required=True,
        metavar="OWNER/NAME",
        help="repository on the Hub; for a model made from Llama: OWNER/Llama...",
    )
    parser.add_argument("--private", action="store_true", help="leave the repository private")
    parser.add_argument("--collection", metavar="SLUG", help="collection to add the model to, as in its address")
    parser.add_argument("--dry-run", action="store_true", help="check and show what would be done; write nothing")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Publish: progress on stderr, the plan or the result on stdout."""
    with quick_imports():
        from llava_llama31.trainer.publishing.hub_calls import redact
        from llava_llama31.trainer.publishing.publish_run import publish_folder
        from llava_llama31.trainer.publishing.release import check_repo_id

    check_repo_id(options.repo_id, "--repo-id")
    path = Path(options.source)
    if not path.is_dir():
        raise UserError("no such folder", where=options.source, fix="name a finished run or an exported folder")
    with redirect_stdout(sys.stderr):  # libraries print there when they are imported
        result = publish_folder(
            path,
            options.repo_id,
            private=options.private,
            collection=options.collection,
            dry_run=options.dry_run,
            say=say,
        )
    if options.json_output:
        sys.stdout.write(redact(json.dumps(result)) + "\n")
    else:
        _print(result)
    return 0


def what_is_kept(options: argparse.Namespace) -> str:
    """Where the same command resumes after a signal."""
    return "run the same command to continue: it does only what is missing on the Hub"


def _print(result: Mapping[str, Any]) -> None:
    from llava_llama31.trainer.terminal import Terminal, shown_size

    terminal = Terminal()
    if "steps" not in result:
        terminal.print("answers of the published model:")
        samples = [(plain(sample["question"]), plain(sample["answer"])) for sample in result["checks"]["samples"]]
        terminal.table(("question", "answer"), samples)
        terminal.print(f"published: {result['url']} ({result['tag']})")
        return
    terminal.print(f"{result['repo']}: dry run, nothing was written; these would be the steps")
    for number, step in enumerate(result["steps"], start=1):
        terminal.print(f"{number}. {step}")
    files = [(plain(name), shown_size(size)) for name, size in result["files"].items()]
    files += [(plain(name), "removed") for name in result["removed"]]
    terminal.table(("file", "size"), files, numbers=("size",))
    if "not_checked" in result:
        terminal.print(result["not_checked"])
