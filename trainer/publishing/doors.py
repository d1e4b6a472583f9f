"""Opens both doors of a model in clean processes that never import this package, and compares them."""

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

from llava_llama31.model_card.card import adapter_snippet, quick_snippet, twin_snippet, usage_snippet
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.export.quantized import is_quantized
from llava_llama31.trainer.model.opening import ADAPTER_CONFIG
from llava_llama31.trainer.publishing.hub_calls import DownloadError


DOOR = Path(__file__).with_name("door.py")
DOORS = ("stock", "remote")
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


class DoorError(UserError):
    """A model does not open in a separate process, or its two doors differ."""


@dataclass(frozen=True)
class Doors:
    """The result of both doors.

    Attributes:
        logits_sha256: of the logits for one image, the same through both doors.
        samples: three questions about generated images, with the greedy answers.
        snippet: what the card's code prints, if it was run.
    """

    logits_sha256: str
    samples: list[dict[str, str]]
    snippet: str | None = field(default=None, compare=False)


@contextmanager
def empty_cache() -> Iterator[Path]:
    """Context with an empty folder for a Hub cache, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="llava-llama31-gate-") as folder:
        yield Path(folder)


def fetch(repo_id: str, revision: str, cache: Path) -> Path:
    """Download a revision into `cache` in a clean process; a second call resumes an interrupted download.

    Raises:
        DownloadError: the download failed; holds the Hub's status.
    """
    result = _run(["download", repo_id, revision], cache, online=True)
    if "error" in result:
        raise DownloadError(result["error"], result["status"])
    return Path(result["folder"])


def open_doors(model: str | Path, cache: Path, *, revision: str = "", snippet_of: Path | None = None) -> Doors:
    """Open a folder, or a revision that `fetch` downloaded into `cache`, through both doors.

    Args:
        snippet_of: the downloaded folder on which to run the card's code too.

    Raises:
        DownloadError: the base of adapters can't be downloaded.
        DoorError: a door does not open, the logits are not finite or differ, or the answers differ; or the card's
            code fails, or prints different texts.
    """
    from safetensors.numpy import load_file

    code, adapter = cache / "snippet.py", Path(snippet_of or model, ADAPTER_CONFIG)
    if adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8"))
        fetch(base["base_model_name_or_path"], base["revision"], cache)
        model = adapter.parent
    if snippet_of is not None:
        code.write_text(_code_of(snippet_of), encoding="utf-8")
    asked = ["open", str(model), revision, str(cache), *([str(code)] if snippet_of is not None else [])]
    results = _run(asked, cache, online=False)
    for door, result in results.items():
        where = "the card's code" if door == "snippet" else f"{door} door"
        if "error" in result:
            raise DoorError(f"does not open in a clean process: {result['error']}", where=where)
        if result["imports_our_package"]:
            raise DoorError("the folder's code imports llava_llama31, which others do not have", where=where)
    logits = {door: load_file(cache / f"{door}.safetensors")["logits"] for door in DOORS}
    for door in DOORS:
        if not results[door]["finite"]:
            fix = "check the losses of the last stage; nothing was published"
            raise DoorError("the logits are NaN or infinite", where=f"{door} door", fix=fix)
    stock, remote = (results[door] for door in DOORS)
    if stock["logits_sha256"] != remote["logits_sha256"]:
        same_shape = logits["stock"].shape == logits["remote"].shape
        apart = abs(logits["stock"] - logits["remote"]).max() if same_shape else "shapes"
        raise DoorError(
            f"the logits through stock classes and through remote code differ (largest difference: {apart})",
            where=str(model),
            fix="export again (llava-llama31 export RUN): the folder's code does not match its weights",
        )
    if stock["samples"] != remote["samples"]:
        raise DoorError(
            "the answers of stock classes and of remote code differ although the logits agree", where=str(model)
        )
    texts = results["snippet"]["texts"] if snippet_of is not None else [None]
    if len(set(texts)) != 1:
        raise DoorError(f"the code on the card prints different texts: {texts}", where=str(snippet_of))
    return Doors(stock["logits_sha256"], stock["samples"], texts[0])


def _code_of(folder: Path) -> str:
    """The code of a folder's card, and for a whole model that which opens it in every other way too."""
    if (folder / ADAPTER_CONFIG).is_file():
        return adapter_snippet(str(folder))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if is_quantized(config):
        return twin_snippet(str(folder))
    return f"{usage_snippet(str(folder))}\n{quick_snippet(str(folder))}"


def _run(arguments: list[str], cache: Path, *, online: bool) -> dict[str, Any]:
    """Run door.py and return the JSON object on its last line."""
    environment = {name: value for name, value in os.environ.items() if online or name not in TOKENS}
    environment |= {
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0" if online else "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # bit-identical logits before and after the download need the same device
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
        raise DoorError(f"no clean process could be started: {last}", where="doors")
    return json.loads(done.stdout.splitlines()[-1])


def _stored_token() -> dict[str, str]:
    """The token of `hf auth login`, which a process with another cache folder would not find."""
    from huggingface_hub import get_token

    token = get_token()
    return {"HF_TOKEN": token} if token else {}
