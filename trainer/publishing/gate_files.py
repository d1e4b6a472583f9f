"""The gate's rules on files as such: what is there, of what kind, and that nothing in it tells or runs something."""

import base64
import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from llava_llama31.trainer.checkpoint.atomic_folders import MANIFEST, sha256
from llava_llama31.trainer.publishing.contents import CARD, EXPORT_AGAIN, WEIGHTS, Contents, GateFinding
from llava_llama31.trainer.publishing.pickles import holds_pickle


# what a person may add to an export or edit in it
EDITABLE = frozenset((CARD, "LICENSE", "NOTICE", "USE_POLICY.md"))
TEXT_SUFFIXES = frozenset((".json", ".jsonl", ".jinja", ".md", ".py", ".txt", ".yaml", ""))
PICTURES = {
    ".png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    ".jpg": re.compile(rb"\xff\xd8\xff"),
    ".jpeg": re.compile(rb"\xff\xd8\xff"),
    ".webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
}
SUFFIXES = (TEXT_SUFFIXES - {""}) | PICTURES.keys() | {WEIGHTS, ".model"}
NAMES = frozenset(("LICENSE", "LICENSE-Apache-2.0", "NOTICE", ".gitattributes"))
TRAINING_STATE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state\w*|trainer_state|train_state)\.(bin|pt|pth|json|safetensors)"
)
SECRETS = {
    "a Hugging Face token": rb"\bhf_[A-Za-z0-9]{30,}|\bapi_org_[A-Za-z0-9]{30,}",
    "an OpenAI or Anthropic key": rb"\bsk-[A-Za-z0-9_-]{20,}",
    "an AWS key": rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": rb"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{22,}",
    "a Google key": rb"\bAIza[0-9A-Za-z_-]{35}",
    "a Slack token": rb"\bxox[abprs]-[0-9A-Za-z-]{10,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY")
_ROOTS = "home|Users|root|mnt|media|data|workspace|scratch|tmp|var|opt|srv|gpfs|lustre|nfs|fsx|private|work"
_FOREIGN_PATH = re.compile(
    rf"(?<![\w.:/~-])(?:/(?:{_ROOTS})/[\w.-]+/[\w./-]+|file:///[^\s\"']+|[A-Za-z]:\\Users\\\w+)"
)
_WHOLE_PATH = re.compile(r"(?:~|file:/|\.{1,2})?(?:/[\w. -]+)+/?|[A-Za-z]:[\\/].+|\\\\\w.+")


_PLAIN_NAME = re.compile(r"[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)*")
# the shortest secret above has 20 bytes, 27 digits in base64
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{27,}")
_ESCAPE = re.compile(rb"\\u00([0-7][0-9a-fA-F])")


def check_entries(contents: Contents) -> Iterator[GateFinding]:
    """Regular files of a size that a model has, under names that mean the same everywhere."""
    for file, reason in contents.obstacles.items():
        yield GateFinding("entries", ascii(file)[1:-1], reason, "put the file itself there, or remove it")
    seen: dict[str, str] = {}
    for file in contents.files:
        if not _PLAIN_NAME.fullmatch(file):
            fix = "name it with letters, digits, dot, hyphen and underscore"
            yield GateFinding("entries", ascii(file)[1:-1], "has a name that shows or sorts otherwise elsewhere", fix)
        if file.lower() in seen:
            what = f"differs from {seen[file.lower()]} by capitals alone: some systems hold one of them"
            yield GateFinding("entries", file, what, f"remove {file}")
        seen[file.lower()] = file


def check_extensions(contents: Contents) -> Iterator[GateFinding]:
    """Only kinds of files that a model needs, and each is what its name says."""
    for file, path in contents.files.items():
        if path.suffix not in SUFFIXES and path.name not in NAMES:
            yield GateFinding("extensions", file, "is no file of a model", f"remove {file}")
        elif path.suffix in TEXT_SUFFIXES and not _is_text(path.read_bytes()):
            yield GateFinding("extensions", file, "is no UTF-8 text, as its name says", f"remove {file}")
        elif path.suffix in PICTURES and not PICTURES[path.suffix].match(path.read_bytes()):
            yield GateFinding(
                "extensions", file, f"is no {path.suffix[1:]} picture, as its name says", f"remove {file}"
            )


def _is_text(content: bytes) -> bool:
    try:
        return "\0" not in content.decode()
    except UnicodeDecodeError:
        return False


def check_training_state(contents: Contents) -> Iterator[GateFinding]:
    """No training_args.bin (it holds the Hub token) and nothing else that only training reads."""
    for file, path in contents.files.items():
        if TRAINING_STATE.fullmatch(path.name):
            yield GateFinding(
                "training-state", file, "is training state", f"remove {file}: nobody needs it to use the model"
            )


def check_pickle(contents: Contents) -> Iterator[GateFinding]:
    """No pickled object, whatever the file is called and wherever in it the pickle begins; no YAML that makes one."""
    for file, path in contents.files.items():
        with path.open("rb") as stream:
            content = stream.read(1 << 20) if path.suffix == WEIGHTS else stream.read()
        fix = f"remove {file}; weights are safetensors, all else JSON"
        if content.startswith(b"PK\x03\x04") or zipfile.is_zipfile(io.BytesIO(content)):
            yield GateFinding("pickle", file, "is a ZIP archive, as pickled checkpoints are", fix)
        elif holds_pickle(content, anywhere=path.suffix != WEIGHTS):
            yield GateFinding("pickle", file, "holds a pickled object, which runs code when it is read", fix)
        elif path.suffix in (".yaml", ".md") and b"!!python/" in content:
            yield GateFinding("pickle", file, "holds a Python object in YAML, which runs code when it is read", fix)


def check_secrets(contents: Contents) -> Iterator[GateFinding]:
    """No token or key, plain, escaped or in base64; what is found is not repeated."""
    held = {name: os.environ.get(name) for name in SECRET_VARIABLES} | {"the Hub's token of this machine": get_token()}
    secrets = {name: value.encode() for name, value in held.items() if value and len(value) >= 8}
    for file, path in contents.files.items():
        found = next((kind for content in _readings(path) for kind in _secrets_in(content, secrets)), None)
        if found:
            yield GateFinding("secrets", file, f"holds {found}", f"take it out of {file} and revoke it")


def _secrets_in(content: bytes, secrets: dict[str, bytes]) -> Iterator[str]:
    yield from (f"the value of {name}" for name, value in secrets.items() if value in content)
    yield from (f"what looks like {kind}" for kind, pattern in SECRETS.items() if re.search(pattern, content))


def _readings(path: Path) -> Iterator[bytes]:
    """What is written in a file: as it stands, without escapes, and out of base64."""
    content = _header(path) if path.suffix == WEIGHTS else path.read_bytes()
    yield content
    yield _ESCAPE.sub(lambda match: bytes([int(match[1], 16)]), content)
    for run in _BASE64.findall(content):
        digits = run.replace(b"-", b"+").replace(b"_", b"/")
        for start in range(4):  # a neighbour may look like a digit of it
            part = digits[start:]
            part = part[:-1] if len(part) % 4 == 1 else part  # one digit alone is no byte
            yield base64.b64decode(part + b"=" * (-len(part) % 4))


def _header(path: Path) -> bytes:
    """The JSON at the start of a safetensors file."""
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return stream.read(min(size, 100_000_000))


def check_paths(contents: Contents) -> Iterator[GateFinding]:
    """No path of a machine: it tells names and means nothing elsewhere."""
    here = {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), contents.folder.resolve()} - {Path("/")}
    mine = re.compile("|".join(rf"(?<![\w.:/-]){re.escape(str(path))}/" for path in sorted(here)))
    for file, path in contents.files.items():
        content = _header(path) if path.suffix == WEIGHTS else path.read_bytes()
        text = content.decode(errors="replace")
        shown = _matched(mine, text)
        # a vocabulary has pieces of paths, and a picture's bytes are not text
        if not shown and path.name != "tokenizer.json" and path.suffix in TEXT_SUFFIXES | {WEIGHTS}:
            try:
                parsed = json.loads(text) if path.suffix in (".json", WEIGHTS) else None
            except (ValueError, RecursionError):  # check_complete and check_tensors name it
                parsed = None
            shown = _matched(_FOREIGN_PATH, text) or next(_whole_paths(parsed), "")
        if shown:
            yield GateFinding("paths", file, f"holds a path of a machine: {shown!r}", f"take it out of {file}")


def _matched(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found[0] if found else ""


def _whole_paths(value: Any) -> Iterator[str]:
    """String values that are an absolute path and nothing else."""
    if isinstance(value, str):
        if _WHOLE_PATH.fullmatch(value):
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _whole_paths(item)
    elif isinstance(value, list):
        for item in value:
            yield from _whole_paths(item)


def check_manifest(contents: Contents) -> Iterator[GateFinding]:
    """Files are those that the export wrote, bit by bit, but for the card and the licences."""
    if MANIFEST not in contents.files:
        return
    try:
        listed = {entry["name"]: (entry["size"], entry["sha256"]) for entry in contents.read_json(MANIFEST)["files"]}
    except (KeyError, TypeError):
        yield GateFinding("manifest", MANIFEST, "lists no files with name, size and sha256", EXPORT_AGAIN)
        return
    for file in contents.files.keys() - listed.keys() - EDITABLE - {MANIFEST, ".gitattributes"}:
        yield GateFinding("manifest", file, f"is not in {MANIFEST}", f"remove {file}, or {EXPORT_AGAIN}")
    for file in listed.keys() - EDITABLE:
        path = contents.files.get(file)
        if path is None:
            yield GateFinding("manifest", file, f"is in {MANIFEST} and missing here", EXPORT_AGAIN)
        elif (path.stat().st_size, sha256(path)) != listed[file]:
            yield GateFinding("manifest", file, "is not the file that was exported", EXPORT_AGAIN)
