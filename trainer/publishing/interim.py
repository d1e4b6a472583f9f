"""Pushes one save of a training run as a complete revision: run by `pusher.py`, in a separate process.

    python -m llava_llama31.trainer.publishing.interim FOLDER

FOLDER holds `job.json` and `checkpoint/`; `model/` is made there. The revision is a commit on the branch `training`,
with a tag that names stage, step and content. The last line of the output is one JSON object.
"""

import atexit
import contextlib
import gc
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import logging as hub_logging

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.publishing.contents import CARD, Contents
from llava_llama31.trainer.publishing.gate import RULES, check_tensors
from llava_llama31.trainer.publishing.gate_files import check_manifest, check_training_state
from llava_llama31.trainer.publishing.hub_calls import attempt, redact
from llava_llama31.trainer.publishing.publish import ensure_repo, ensure_tag, head_of, refuse, tree_of
from llava_llama31.trainer.publishing.release import REMOTE_ONLY, Release
from llava_llama31.trainer.publishing.staging import link


BRANCH = "training"
JOB, CHECKPOINT, MODEL = "job.json", "checkpoint", "model"
NUM_TAG_DIGITS = 8
# a revision to resume from contains training state, which those rules refuse
NOT_WITH_STATE = (check_training_state, check_tensors, check_manifest)


def push(folder: Path) -> dict[str, str]:
    """Build and push a job's revision; returns its tag and commit. A second call does only what is missing.

    Raises:
        UserError: the push failed; names the fix.
    """
    job = atomic_folders.read_json(folder / JOB)
    model = folder / MODEL
    if not model.is_dir():
        build(job, folder / CHECKPOINT, model)
    release = Release(model, job["repo_id"], job["private"], job["resume"])
    rules = [rule for rule in RULES if not (job["with_state"] and rule in NOT_WITH_STATE)]
    refuse([finding for rule in rules for finding in rule(Contents(model, release.name))], where=str(model))
    tag = f"{job['stage_name']}-step-{job['step']}-{release.content[:NUM_TAG_DIGITS]}"
    api = HfApi()
    attempt("repository", lambda: ensure_repo(api, release), resume=release.resume)
    revision = attempt("upload", lambda: _ensure_commit(api, release, tag), resume=release.resume)
    attempt("tag", lambda: ensure_tag(api, release, revision, tag), resume=release.resume)
    return {"tag": tag, "revision": revision}


def _ensure_commit(api: HfApi, release: Release, tag: str) -> str:
    """Find or make the commit with exactly this content."""
    for ref in api.list_repo_refs(release.repo_id).tags:
        if ref.name == tag:
            return ref.target_commit
    api.create_branch(release.repo_id, branch=BRANCH, exist_ok=True)
    head = head_of(api, release, BRANCH)
    tree = tree_of(api, release, head)
    if release.equals(tree):
        return head
    made = api.create_commit(
        release.repo_id,
        [
            *(CommitOperationAdd(name, str(file.path)) for name, file in release.files.items()),
            *(CommitOperationDelete(name) for name in sorted(tree.keys() - release.files.keys() - REMOTE_ONLY)),
        ],
        commit_message=tag,
        revision=BRANCH,
        parent_commit=head,
    )
    return made.oid


def build(job: dict[str, Any], checkpoint: Path, folder: Path) -> None:
    """Build the folder that opens through both doors, with adapters merged.

    With training state the checkpoint's files are there bit by bit: in the stage's folder they are the checkpoint.
    """
    from llava_llama31.trainer.export.dialects import NATIVE, PORTABLE
    from llava_llama31.trainer.export.export import licence_texts, write_export

    staged = atomic_folders.staging_folder(folder)
    if not (job["with_state"] and _is_whole_model(checkpoint)):
        model, processor = _load(job, checkpoint)
        # the checkpoint's files, which go on top, are native
        dialect = NATIVE if job["with_state"] else PORTABLE
        write_export(staged, model, processor, job["record"], {}, dialect=dialect)
    if job["with_state"]:
        shutil.copytree(checkpoint, staged, copy_function=_replace, dirs_exist_ok=True)
    for name, text in {CARD: _card(job), **licence_texts(job["record"]["base_models"])}.items():
        (staged / name).write_text(text, encoding="utf-8")
    os.replace(staged, folder)


def _is_whole_model(checkpoint: Path) -> bool:
    return any(checkpoint.glob("model*.safetensors"))


def _load(job: dict[str, Any], checkpoint: Path) -> tuple[Any, Any]:
    """The model and processor that `export` would write."""
    import torch
    from safetensors.torch import load_file

    from llava_llama31.processing import LlavaLlama31Processor
    from llava_llama31.trainer.model.adapters import TRAINABLE_WEIGHTS
    from llava_llama31.trainer.model.opening import open_model
    from llava_llama31.trainer.model.stage_model import load_stage_model
    from llava_llama31.trainer.recipes.schema import Stage

    if _is_whole_model(checkpoint):
        return open_model(checkpoint, dtype=job["dtype"], device="cpu")
    stage = Stage.model_validate(job["stage"])
    adapted: Any = load_stage_model(Path(job["origin"]), stage, seed=job["seed"], where=f"stages.{job['stage_name']}")
    _, unexpected = adapted.load_state_dict(load_file(checkpoint / TRAINABLE_WEIGHTS), strict=False)
    assert not unexpected, unexpected
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[job["dtype"]]
    return adapted.merge_and_unload().to(dtype), LlavaLlama31Processor.from_pretrained(checkpoint)


def _replace(source: str, target: str) -> None:
    Path(target).unlink(missing_ok=True)
    link(source, target)


def _card(job: dict[str, Any]) -> str:
    """The card of a model still in training, with a note below its metadata."""
    from llava_llama31.model_card.card import render_card

    note = (
        f"> A save of a run that was still training: stage `{job['stage_name']}`, step {job['step']}. Not evaluated."
    )
    return re.sub(
        r"\A(---\n.*?\n---\n)", lambda match: f"{match[0]}\n{note}\n", render_card(job["record"]), flags=re.DOTALL
    )


def main(arguments: list[str]) -> int:
    """Push a folder's job at low priority: if memory runs out, the system kills this process first."""
    atexit.register(gc.freeze)  # Python's last search for garbage takes seconds among all that is imported
    os.nice(10)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    hub_logging.set_verbosity_error()  # its warnings show signed URLs
    try:
        result = push(Path(arguments[0]))
    except UserError as error:
        sys.stderr.write(f"{redact(str(error))}\n")
        return error.exit_code
    sys.stdout.write(f"\n{json.dumps(result)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
