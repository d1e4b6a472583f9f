"""Finds checkpoints by folder or Hub id."""

import re
from pathlib import Path

from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.file_names import ends_like_a_file


# weights only as safetensors: nothing is unpickled
CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "LICENSE*", "NOTICE*", "USE_POLICY*")


_HUB_ID = re.compile(r"(\w[\w.-]*/[\w.-]+)(?:@(.+))?")


def hub_id(name: str) -> tuple[str, str | None] | None:
    """(OWNER/NAME, revision or None) of a Hub id; None for a path, and for the name of a file."""
    match = None if Path(name).expanduser().exists() else _HUB_ID.fullmatch(name)
    return (match[1], match[2]) if match and not ends_like_a_file(match[1]) else None


def local_checkpoint(name: str, *, where: str, file: bool = False) -> Path:
    """Folder of a checkpoint; a Hub id (`OWNER/NAME` or `OWNER/NAME@REVISION`) is downloaded into the Hub cache.

    Args:
        name: folder or Hub id.
        where: its name in messages.
        file: also accept a single file, e.g. a projector.

    Raises:
        UserError: there is neither such a folder nor such a repository.
    """
    path = Path(name).expanduser()
    if path.is_dir() or (file and path.is_file()):
        return path
    named = hub_id(name)
    if named is None:
        raise UserError(f"no folder {name!r}", where=where, fix="name a checkpoint folder or a Hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        repo_id, revision = named
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(CHECKPOINT_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{name} is not a folder and cannot be downloaded: {reason}",
            where=where,
            fix="download it and name the folder, or log in with `hf auth login` if it is gated",
        ) from error


def model_folder(name: str, *, where: str) -> Path:
    """Folder of a model to be asked: a checkpoint, a Hub id, or a finished run, of which it is the export.

    Raises:
        UserError: there is no such model, or the run has no export yet.
    """
    folder = local_checkpoint(name, where=where)
    run = RunFolder(folder)
    if not run.recipe.is_file() or (folder / "config.json").is_file():
        return folder
    if not (run.export / "config.json").is_file():
        fix = "finish it, or name a stage's folder `final` in it"
        raise UserError("the run has not finished, so it has no export", where=name, fix=fix)
    return run.export
