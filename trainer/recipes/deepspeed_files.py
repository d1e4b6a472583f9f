"""DeepSpeed's JSON files: the shipped ones by name, others by path."""

import importlib.resources
from pathlib import Path
from typing import Any

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.strict_json import parse_json


def deepspeed_file(name: str, where: str) -> Path:
    """A DeepSpeed file by path, or a shipped one by name; `where` is the stage, for the message.

    Raises:
        UserError: there is no such file.
    """
    for candidate in (Path(name).expanduser(), _folder() / f"{name}.json"):
        if candidate.is_file():
            return candidate
    raise UserError(
        f"there is no DeepSpeed file {name!r}", where=f"{where}.deepspeed", fix="give a path to a JSON file"
    )


def deepspeed_content(name: str, where: str) -> dict[str, Any]:
    """What a DeepSpeed file says.

    Raises:
        UserError: there is no such file, or it does not hold a JSON object.
    """
    return _content(deepspeed_file(name, where))


def shipped_deepspeed_files() -> dict[str, dict[str, Any]]:
    """Contents of the shipped files by name, shortest name first."""
    files = sorted(_folder().glob("*.json"), key=lambda file: (len(file.name), file.name))
    return {file.stem: _content(file) for file in files}


def _folder() -> Path:
    return Path(str(importlib.resources.files("llava_llama31.trainer.recipes")))


def _content(file: Path) -> dict[str, Any]:
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"not JSON: {error}", where=str(file), fix="fix the file") from None
    if not isinstance(content, dict):
        raise UserError("not a JSON object", where=str(file), fix="give a DeepSpeed file")
    return content
