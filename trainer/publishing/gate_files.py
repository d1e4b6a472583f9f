"""The gate's rules on files: which exist, of what kind, and that none leaks a secret or runs code."""

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


# files that a user may add to an export or edit in it
EDITABLE = frozenset((CARD, "LICENSE", "NOTICE", "USE_POLICY.md"))
TEXT_SUFFIXES = frozenset((".json", ".jsonl", ".jinja", ".md", ".py", ".txt", ".yaml", ""))
IMAGES = {
    ".png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    ".jpg": re.compile(rb"\xff\xd8\xff"),
    ".jpeg": re.compile(rb"\xff\xd8\xff"),
    ".webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
}
SUFFIXES = (TEXT_SUFFIXES - {""}) | IMAGES.keys() | {WEIGHTS, ".model"}
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
# every secret above has one of these: found at once in a folder's thousands of decoded strings, of which few have one
POSSIBLE_SECRET = re.compile(rb"hf_|api_org_|sk-|A[KS]IA|gh[pousr]_|github_pat_|AIza|xox[abprs]-|-----BEGIN ")
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY")
_ROOTS = "home|Users|root|mnt|media|data|workspace|scratch|tmp|var|opt|srv|gpfs|lustre|nfs|fsx|private|work"
_FOREIGN_PATH = re.compile(
    rf"(?<![\w.:/~-])(?:/(?:{_ROOTS})/[\w.-]+/[\w./-]+|file:///[^\s\"']+|[A-Za-z]:\\Users\\\w+)"
)
# every one of them has one of these, which are found ten times as fast
_POSSIBLE_PATH = re.compile(rf"/(?:{_ROOTS})/|file:///|:\\Users\\")
_WHOLE_PATH = re.compile(r"(?:~|file:/|\.{1,2})?(?:/[\w. -]+)+/?|[A-Za-z]:[\\/].+|\\\\\w.+")


_PLAIN_NAME = re.compile(r"[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)*")
# the shortest secret above is 20 bytes, or 27 base64 digits
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{27,}")
_ESCAPE = re.compile(rb"\\u00([0-7][0-9a-fA-F])")


def check_entries(contents: Contents) -> Iterator[GateFinding]:
    """Only regular files of a plausible size, under portable names."""
    for file, reason in contents.obstacles.items():
        yield GateFinding("entries", ascii(file)[1:-1], reason, "replace it with the file itself, or remove it")
    seen: dict[str, str] = {}
    for file in contents.files:
        if not _PLAIN_NAME.fullmatch(file):
            fix = "rename it, using only letters, digits, dot, hyphen and underscore"
            yield GateFinding(
                "entries", ascii(file)[1:-1], "has a name that displays or sorts differently on other systems", fix
            )
        if file.lower() in seen:
            what = f"differs from {seen[file.lower()]} only in case: some file systems keep only one of them"
            yield GateFinding("entries", file, what, f"remove {file}")
        seen[file.lower()] = file


def check_extensions(contents: Contents) -> Iterator[GateFinding]:
    """Only the file types that a model needs, and each file has the type that its name says."""
    for file, path in contents.files.items():
        if path.suffix not in SUFFIXES and path.name not in NAMES:
            yield GateFinding("extensions", file, "is not a type of file that a model needs", f"remove {file}")
        elif path.suffix in TEXT_SUFFIXES and not _is_text(path.read_bytes()):
            yield GateFinding("extensions", file, "is not UTF-8 text, although its name says so", f"remove {file}")
        elif path.suffix in IMAGES and not IMAGES[path.suffix].match(path.read_bytes()):
            yield GateFinding(
                "extensions", file, f"is not a {path.suffix[1:]} image, although its name says so", f"remove {file}"
            )


def _is_text(content: bytes) -> bool:
    try:
        return "\0" not in content.decode()
    except UnicodeDecodeError:
        return False


def check_training_state(contents: Contents) -> Iterator[GateFinding]:
    """No training_args.bin (it contains the Hub token) and no other file that only training reads."""
    for file, path in contents.files.items():
        if TRAINING_STATE.fullmatch(path.name):
            yield GateFinding("training-state", file, "is training state", f"remove {file}: only training needs it")


def check_pickle(contents: Contents) -> Iterator[GateFinding]:
    """No pickled object, whatever the file's name and wherever the pickle begins; no YAML that creates an object."""
    for file, path in contents.files.items():
        with path.open("rb") as stream:
            content = stream.read(1 << 20) if path.suffix == WEIGHTS else stream.read()
        fix = f"remove {file}; store weights as safetensors, everything else as JSON"
        if content.startswith(b"PK\x03\x04") or zipfile.is_zipfile(io.BytesIO(content)):
            yield GateFinding("pickle", file, "is a ZIP archive, like pickled checkpoints", fix)
        elif holds_pickle(content, anywhere=path.suffix != WEIGHTS):
            yield GateFinding("pickle", file, "contains a pickled object, which can run code when loaded", fix)
        elif path.suffix in (".yaml", ".md") and b"!!python/" in content:
            yield GateFinding("pickle", file, "contains a Python object in YAML, which can run code when loaded", fix)


def check_secrets(contents: Contents) -> Iterator[GateFinding]:
    """No token or key, plain, escaped or in base64; the finding does not repeat it."""
    held = {name: os.environ.get(name) for name in SECRET_VARIABLES} | {"the Hub's token of this machine": get_token()}
    secrets = {name: value.encode() for name, value in held.items() if value and len(value) >= 8}
    for file, path in contents.files.items():
        found = next((kind for content in _readings(path) for kind in _secrets_in(content, secrets)), None)
        if found:
            yield GateFinding("secrets", file, f"contains {found}", f"remove it from {file} and revoke it")


def _secrets_in(content: bytes, secrets: dict[str, bytes]) -> Iterator[str]:
    yield from (f"the value of {name}" for name, value in secrets.items() if value in content)
    if POSSIBLE_SECRET.search(content):
        yield from (f"what looks like {kind}" for kind, pattern in SECRETS.items() if re.search(pattern, content))


def _readings(path: Path) -> Iterator[bytes]:
    """A file's content: as it is, unescaped, and decoded from base64."""
    content = _header(path) if path.suffix == WEIGHTS else path.read_bytes()
    yield content
    yield _ESCAPE.sub(lambda match: bytes([int(match[1], 16)]), content)
    for run in _BASE64.findall(content):
        digits = run.replace(b"-", b"+").replace(b"_", b"/")
        for start in range(4):  # an adjacent character may look like a base64 digit
            part = digits[start:]
            part = part[:-1] if len(part) % 4 == 1 else part  # a single digit does not encode a byte
            yield base64.b64decode(part + b"=" * (-len(part) % 4))


def _header(path: Path) -> bytes:
    """The JSON at the start of a safetensors file."""
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return stream.read(min(size, 100_000_000))


def check_paths(contents: Contents) -> Iterator[GateFinding]:
    """No path of a local machine: it reveals names and is useless elsewhere."""
    here = {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), contents.folder.resolve()} - {Path("/")}
    mine = re.compile("|".join(rf"(?<![\w.:/-]){re.escape(str(path))}/" for path in sorted(here)))
    for file, path in contents.files.items():
        content = _header(path) if path.suffix == WEIGHTS else path.read_bytes()
        text = content.decode(errors="replace")
        shown = _matched(mine, text) if any(f"{path}/" in text for path in here) else ""
        # a vocabulary has pieces of paths, and an image's bytes are not text
        if not shown and path.name != "tokenizer.json" and path.suffix in TEXT_SUFFIXES | {WEIGHTS}:
            try:
                parsed = json.loads(text) if path.suffix in (".json", WEIGHTS) else None
            except (ValueError, RecursionError):  # reported by check_complete and check_tensors
                parsed = None
            if _POSSIBLE_PATH.search(text):
                shown = _matched(_FOREIGN_PATH, text)
            shown = shown or next(_whole_paths(parsed), "")
        if shown:
            yield GateFinding(
                "paths", file, f"contains a path of a local machine: {shown!r}", f"remove it from {file}"
            )


def _matched(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found[0] if found else ""


def _whole_paths(value: Any) -> Iterator[str]:
    """String values that consist of an absolute path."""
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
    """The files are exactly those that the export wrote, except the card and the licences."""
    if MANIFEST not in contents.files:
        return
    try:
        listed = {entry["name"]: (entry["size"], entry["sha256"]) for entry in contents.read_json(MANIFEST)["files"]}
    except (KeyError, TypeError):
        yield GateFinding("manifest", MANIFEST, "does not list files with name, size and sha256", EXPORT_AGAIN)
        return
    for file in contents.files.keys() - listed.keys() - EDITABLE - {MANIFEST, ".gitattributes"}:
        yield GateFinding("manifest", file, f"is not in {MANIFEST}", f"remove {file}, or {EXPORT_AGAIN}")
    for file in listed.keys() - EDITABLE:
        path = contents.files.get(file)
        if path is None:
            yield GateFinding("manifest", file, f"is listed in {MANIFEST} but missing", EXPORT_AGAIN)
        elif (path.stat().st_size, sha256(path)) != listed[file]:
            yield GateFinding("manifest", file, "has changed since it was exported", EXPORT_AGAIN)
