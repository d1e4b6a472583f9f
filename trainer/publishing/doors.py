"""Both doors of a model, opened in clean processes that never import this package, and compared."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_llama31.model_card.card import usage_snippet
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.publishing.hub_calls import DownloadError


DOOR = Path(__file__).with_name("door.py")
DOORS = ("stock", "remote")
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


class DoorError(UserError):
    """A model does not open in a process of its own, or its doors differ."""


@dataclass(frozen=True)
class Doors:
    """What both doors gave.

    Attributes:
        logits_sha256: of the logits at one picture, the same through both doors.
        samples: three questions about made pictures, with the greedy answers.
        snippet: what the code on the card prints, if it was run.
    """

    logits_sha256: str
    samples: list[dict[str, str]]
    snippet: str | None = field(default=None, compare=False)


@contextmanager
def empty_cache() -> Iterator[Path]:
    """A folder for a Hub cache that nobody has used, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="llava-llama31-gate-") as folder:
        yield Path(folder)


def fetch(repo_id: str, revision: str, cache: Path) -> Path:
    """Folder of a revision, downloaded into `cache` by a clean process; a second call goes on where one broke off.

    Raises:
        DownloadError: with the Hub's status.
    """
    told = _run(["download", repo_id, revision], cache, online=True)
    if "error" in told:
        raise DownloadError(told["error"], told["status"])
    return Path(told["folder"])


def open_doors(model: str | Path, cache: Path, *, revision: str = "") -> Doors:
    """Open a folder, or a revision that `fetch` put into `cache`, through both doors.

    Raises:
        UserError: when a door does not open, the logits are not finite or not the same, or the answers differ.
    """
    from safetensors.numpy import load_file

    told, logits = {}, {}
    for door in DOORS:
        file = cache / f"{door}.safetensors"
        told[door] = _run([door, str(model), revision, str(file)], cache, online=False)
        logits[door] = load_file(file)["logits"]
    for door, answer in told.items():
        if answer["imports_our_package"]:
            raise DoorError(
                "the code in the folder imports llava_llama31, which others do not have", where=f"{door} door"
            )
        if not answer["finite"]:
            fix = "look into the last stage's losses; nothing is published"
            raise DoorError("the logits are NaN or infinite", where=f"{door} door", fix=fix)
    stock, remote = (told[door] for door in DOORS)
    if stock["logits_sha256"] != remote["logits_sha256"]:
        same_shape = logits["stock"].shape == logits["remote"].shape
        apart = abs(logits["stock"] - logits["remote"]).max() if same_shape else "shapes"
        raise DoorError(
            f"the logits through stock classes and through remote code differ (largest difference: {apart})",
            where=str(model),
            fix="write the folder again (llava-llama31 export RUN); its code does not belong to its weights",
        )
    if stock["samples"] != remote["samples"]:
        raise DoorError("the answers through both doors differ though the logits do not", where=str(model))
    return Doors(stock["logits_sha256"], stock["samples"])


def run_snippet(folder: Path, cache: Path) -> str:
    """Run the code that the card shows on a downloaded folder; returns the text that it prints each time.

    Raises:
        UserError: when it fails, or does not print the same every time.
    """
    code = cache / "snippet.py"
    code.write_text(usage_snippet(str(folder)), encoding="utf-8")
    texts = _run(["snippet", str(code)], cache, online=False)["texts"]
    if len(set(texts)) != 1:
        raise DoorError(f"the code on the card prints different texts: {texts}", where=str(folder))
    return texts[0]


def _run(arguments: list[str], cache: Path, *, online: bool) -> dict[str, Any]:
    """The JSON object that door.py ends with."""
    environment = {name: value for name, value in os.environ.items() if online or name not in TOKENS}
    environment |= {
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0" if online else "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # the same bits here and after the download need the same device
        "CUDA_VISIBLE_DEVICES": "",
    }
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_MODULES_CACHE", "TRANSFORMERS_CACHE"):
        environment.pop(name, None)
    if online and "HF_TOKEN" not in environment:
        environment |= _stored_token()
    done = subprocess.run(
        [sys.executable, "-I", str(DOOR), *arguments],
        cwd=cache,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or "it was killed").splitlines()[-1]
        if online:
            raise DownloadError(last, None)
        where = "the card's code" if arguments[0] == "snippet" else f"{arguments[0]} door"
        raise DoorError(f"does not open in a clean process: {last}", where=where)
    return json.loads(done.stdout.splitlines()[-1])


def _stored_token() -> dict[str, str]:
    """The token of `hf auth login`, which an empty cache folder hides."""
    from huggingface_hub import get_token

    token = get_token()
    return {"HF_TOKEN": token} if token else {}
