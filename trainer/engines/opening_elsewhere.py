"""Opens an exported folder in clean processes, this environment's and others', and compares with its reference."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from packaging.version import Version

from llava_llama31.trainer.engines.ask_folder import MARK
from llava_llama31.trainer.engines.reference import NUM_NEW_TOKENS, Recorded, Reference, read_reference
from llava_llama31.trainer.errors import UserError


SCRIPT = Path(__file__).with_name("ask_folder.py")
FIRST_WITH_OUR_CODE = Version("5.17")
DOORS = {
    "stock": "stock classes",
    "remote": "trust_remote_code=True",
    "vllm": "vLLM's own class",
}
_ERROR = re.compile(r"\b\w*Error: ")
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


@dataclass(frozen=True)
class Opened:
    """What one way of opening a folder gave.

    Args:
        engine: name and version.
        door: how it was opened.
        asked, equal: number of questions, and of those with the recorded prompt ids and answer.
        note: why it does not open, or which question differs first; empty if all is equal.
    """

    engine: str
    door: str
    asked: int
    equal: int
    note: str = ""

    @property
    def whole(self) -> bool:
        return self.asked > 0 and self.asked == self.equal

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def open_everywhere(folder: Path, pythons: Sequence[str]) -> Iterator[Opened]:
    """Open a folder through every door of this environment and of those that Python interpreters name.

    A transparent image is asked with remote code only: stock classes drop its transparency.

    Raises:
        UserError: there is no reference, or a named interpreter does not run or has no Transformers.
    """
    reference = read_reference(folder)
    with tempfile.TemporaryDirectory(prefix="llava-llama31-check-") as scratch:
        for python in map(_interpreter, [sys.executable, *pythons]):
            installed = _run(python, ["versions"], Path(scratch))
            if isinstance(installed, str) or "transformers" not in installed["versions"]:
                what = installed if isinstance(installed, str) else "has no Transformers"
                fix = "name the Python of an environment that the model is to open in"
                raise UserError(what, where=python, fix=fix)
            for door in _doors(installed["versions"]):
                yield _opened(door, installed["versions"], folder, reference, python, Path(scratch))


def _interpreter(python: str) -> str:
    """Its absolute path, since it runs in another folder; a link of an environment stays a link."""
    found = shutil.which(python)
    return str(Path(found).absolute()) if found is not None else python


def _doors(versions: dict[str, str]) -> list[str]:
    doors = ["stock"]
    if Version(versions["transformers"]) >= FIRST_WITH_OUR_CODE:
        doors.append("remote")
    return [*doors, "vllm"] if "vllm" in versions else doors


def _opened(
    door: str, versions: dict[str, str], folder: Path, reference: Reference, python: str, scratch: Path
) -> Opened:
    engine = f"vLLM {versions['vllm']}" if door == "vllm" else f"Transformers {versions['transformers']}"
    # only our processor and vLLM put such an image on white
    is_asked = [door != "stock" or not question.is_transparent for question in reference.questions()]
    recorded = [item for item, asked in zip(reference.recorded, is_asked, strict=True) if asked]
    file = _write_questions(reference, is_asked, scratch)
    result = _run(python, [door, str(folder.resolve()), str(file)], scratch)
    if isinstance(result, str):
        return Opened(engine, DOORS[door], len(recorded), 0, result)
    if result["imports_our_package"]:
        return Opened(engine, DOORS[door], len(recorded), 0, "the folder's code imports llava_llama31")
    same = [_is_same(item, answer) for item, answer in zip(recorded, result["answers"], strict=True)]
    note = "" if all(same) else f"differs first in {recorded[same.index(False)].id!r}"
    return Opened(engine, DOORS[door], len(recorded), sum(same), note)


def _is_same(recorded: Recorded, answer: dict[str, Any]) -> bool:
    prompt = [[token, len(list(run))] for token, run in groupby(answer["prompt_ids"])]
    return prompt == recorded.prompt and answer["answer"].strip() == recorded.answer.strip()


def _write_questions(reference: Reference, is_asked: Sequence[bool], scratch: Path) -> Path:
    conversations = []
    questions = [question for question, asked in zip(reference.questions(), is_asked, strict=True) if asked]
    for number, question in enumerate(questions):
        messages = question.messages()
        parts = [part for turn in messages for part in turn["content"] if part["type"] == "image"]
        for index, part in enumerate(parts):
            file = scratch / f"{number}-{index}.png"
            part["image"].save(file)
            part["image"] = str(file)
        conversations.append(messages)
    file = scratch / "questions.json"
    longest = max(item.num_prompt_tokens for item in reference.recorded) + NUM_NEW_TOKENS
    content = {"conversations": conversations, "num_new_tokens": NUM_NEW_TOKENS}
    content |= {"max_length": longest, "dtype": reference.dtype}
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def _reason(stdout: str, stderr: str) -> str:
    """Why it failed: the first error that an engine's own processes log on stdout, else the last line of all."""
    logged = [line[match.start() :] for line in stdout.splitlines() if (match := _ERROR.search(line))]
    return (logged or (stderr.strip() or "it was killed").splitlines()[-1:])[0]


def _run(python: str, arguments: Sequence[str], scratch: Path) -> Any:
    """The JSON object that the script prints; the last line of its errors, where it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in TOKENS}
    # its remote code comes from the folder that is checked, not from a cache
    environment |= {"HF_HOME": str(scratch / "home"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("HF_MODULES_CACHE", None)
    try:
        done = subprocess.run(
            [python, "-I", str(SCRIPT), *arguments],
            cwd=scratch,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    except OSError as error:
        return f"does not run: {error.strerror}"
    if done.returncode != 0:
        return f"does not open: {_reason(done.stdout, done.stderr)}"
    marked = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    return json.loads(marked[-1]) if marked else "does not open: it ended without an answer"
