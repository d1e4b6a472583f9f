"""What a folder must be before it is published: one function a rule, each finding with its file and its fix.

The rules read files and run nothing; `doors.py` then opens the folder in clean processes. A rule sees a folder as
anybody else would get it: what training knows of the model does not count.
"""

import ast
import io
import json
import math
import os
import pickletools
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, get_token
from safetensors import SafetensorError, safe_open

from llava_llama31.model_card.card import LLAMA31, LLAMA31_NOTICE, LLAMA31_POLICY, LLAMA31_TITLE
from llava_llama31.trainer.checkpoints import MANIFEST, sha256


ARCHITECTURE, MODEL_TYPE, STOCK_PROCESSOR = "LlavaNextForConditionalGeneration", "llava_next", "LlavaNextProcessor"
CARD = "README.md"
EXPORT_AGAIN = "write it again: llava-llama31 export RUN"
REQUIRED = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    CARD,
    "LICENSE",
    MANIFEST,
)
# what a person may add to an export or edit in it
EDITABLE = frozenset((CARD, "LICENSE", "NOTICE", "USE_POLICY.md"))
# licences whose terms our export puts into a NOTICE
NOTICE_LICENCES = (LLAMA31, "apache-2.0")
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText")
SUFFIXES = frozenset(
    (".json", ".jsonl", ".jinja", ".md", ".model", ".py", ".safetensors", ".txt", ".yaml")
    + (".png", ".jpg", ".jpeg", ".webp")
)
NAMES = frozenset(("LICENSE", "LICENSE-Apache-2.0", "NOTICE", ".gitattributes"))
TRAINING_STATE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state\w*|trainer_state|train_state)\.(bin|pt|pth|json|safetensors)"
)
TEXT_SUFFIXES = frozenset((".json", ".jsonl", ".jinja", ".md", ".py", ".txt", ".yaml", ""))

MAX_CODE_FILES = 4
CODE_MAY_IMPORT = frozenset((*sys.stdlib_module_names, "torch", "transformers", "numpy", "PIL")) - frozenset(
    ("subprocess", "socket", "socketserver", "ssl", "urllib", "http", "ftplib", "smtplib", "telnetlib", "asyncio")
    + ("ctypes", "pickle", "marshal", "shelve", "pty", "multiprocessing", "webbrowser", "xmlrpc", "runpy", "code")
)
CODE_MAY_NOT_CALL = frozenset(("eval", "exec", "compile", "__import__", "open", "input", "breakpoint"))
OS_MAY_NOT_CALL = re.compile(r"system|popen|startfile|fork\w*|kill\w*|(exec|spawn|posix_spawn)\w*")

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
_WHOLE_PATH = re.compile(r"(?:~|file:/)?(?:/[\w. -]+){2,}/?|[A-Za-z]:[\\/].+")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_IMAGE = re.compile(r"<img[^>]*\bsrc=\"([^\"]+)\"|!\[[^\]]*\]\(([^)\s]+)")


@dataclass(frozen=True)
class Finding:
    """Why a folder is not published."""

    rule: str
    file: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what} (fix: {self.fix})"


@dataclass(frozen=True)
class Contents:
    """A folder as the rules see it.

    Attributes:
        folder: where its files lie.
        name: under which it will be published, without the owner.
    """

    folder: Path
    name: str

    @cached_property
    def files(self) -> dict[str, Path]:
        """Relative name -> path, sorted."""
        paths = sorted(path for path in self.folder.rglob("*") if not path.is_dir())
        return {path.relative_to(self.folder).as_posix(): path for path in paths}

    def read(self, file: str) -> str | None:
        path = self.files.get(file)
        return None if path is None else path.read_text(encoding="utf-8", errors="replace")

    def read_json(self, file: str) -> dict[str, Any]:
        """An object, empty where the file is missing or broken: `check_complete` names those."""
        try:
            content = json.loads(self.read(file) or "{}")
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    @cached_property
    def card(self) -> Mapping[str, Any]:
        """The card's metadata, empty where it cannot be read."""
        try:
            return ModelCard(self.read(CARD) or "", ignore_metadata_errors=True).data.to_dict()
        except (ValueError, yaml.YAMLError):
            return {}

    @property
    def is_adapter(self) -> bool:
        return "adapter_config.json" in self.files

    @property
    def is_llama(self) -> bool:
        """Whether Meta's licence governs the model, by anything in the folder that says so."""
        llama_card = self.card.get("license") == LLAMA31 or "llama-3.1" in (self.card.get("tags") or [])
        return llama_card or any(LLAMA31_TITLE in (self.read(file) or "").upper() for file in ("LICENSE", "NOTICE"))


def check_complete(contents: Contents) -> Iterator[Finding]:
    """All that both doors, the licences and a reader need."""
    required = list(REQUIRED)
    if contents.card.get("license") in NOTICE_LICENCES or contents.is_llama:
        required.append("NOTICE")
    for (file, name), module in _mapped_modules(contents).items():
        if not module:
            yield Finding("complete", file, f"auto_map lacks {name}", EXPORT_AGAIN)
        else:
            required.append(f"{module}.py")
    for file in dict.fromkeys(required):
        fix = EXPORT_AGAIN if file != "LICENSE" else "set model.licence in the recipe, or put the licence's text there"
        if file not in contents.files:
            yield Finding("complete", file, "is missing", fix)
        elif contents.files[file].stat().st_size == 0:
            yield Finding("complete", file, "is empty", EXPORT_AGAIN)
    for file, path in contents.files.items():
        if path.suffix == ".json":
            try:
                json.loads(path.read_bytes())
            except ValueError as error:
                yield Finding("complete", file, f"is no JSON: {error}", EXPORT_AGAIN)


def _mapped_modules(contents: Contents) -> dict[tuple[str, str], str]:
    """(file, Auto class) -> module of the folder that holds ours, empty where the file does not say."""
    maps = {"config.json": AUTO_CLASSES, "processor_config.json": ("AutoProcessor",)}
    return {
        (file, name): str((contents.read_json(file).get("auto_map") or {}).get(name, "")).partition(".")[0]
        for file, names in maps.items()
        if file in contents.files
        for name in names
    }


def check_doors_named(contents: Contents) -> Iterator[Finding]:
    """What the files say of themselves must let stock classes open them."""
    config = contents.read_json("config.json")
    said = {
        "config.json: architectures": (config.get("architectures"), [ARCHITECTURE]),
        "config.json: model_type": (config.get("model_type"), MODEL_TYPE),
        "processor_config.json: processor_class": (
            contents.read_json("processor_config.json").get("processor_class"),
            STOCK_PROCESSOR,
        ),
        "tokenizer_config.json: auto_map": (contents.read_json("tokenizer_config.json").get("auto_map"), None),
    }
    for place, (found, wanted) in said.items():
        file, _, key = place.partition(": ")
        if file in contents.files and found != wanted:
            yield Finding("doors-named", file, f"{key} is {found!r}, not {wanted!r}", EXPORT_AGAIN)
    if "generation_config.json" in contents.files:
        stops = contents.read_json("generation_config.json").get("eos_token_id")
        if stops is None or stops == []:
            fix = "set eos_token_id to the ids of <|end_of_text|>, <|eom_id|> and <|eot_id|>"
            yield Finding("doors-named", "generation_config.json", "no eos_token_id: answers would not end", fix)


def check_extensions(contents: Contents) -> Iterator[Finding]:
    """Only kinds of files that a model needs."""
    for file, path in contents.files.items():
        if path.suffix.lower() not in SUFFIXES and path.name not in NAMES:
            yield Finding("extensions", file, "is no file of a model", f"remove {file}")


def check_training_state(contents: Contents) -> Iterator[Finding]:
    """No training_args.bin (it holds the Hub token) and nothing else that only training reads."""
    for file, path in contents.files.items():
        if TRAINING_STATE.fullmatch(path.name):
            yield Finding(
                "training-state", file, "is training state", f"remove {file}: nobody needs it to use the model"
            )


def check_pickle(contents: Contents) -> Iterator[Finding]:
    """No pickled object, whatever the file is called and wherever in it the pickle begins."""
    for file, path in contents.files.items():
        with path.open("rb") as stream:
            content = stream.read(1 << 20) if path.suffix == ".safetensors" else stream.read()
        if content.startswith(b"PK\x03\x04") or zipfile.is_zipfile(io.BytesIO(content)):
            yield Finding("pickle", file, "is a ZIP archive, as pickled checkpoints are", _no_pickle(file))
        elif _holds_pickle(content, anywhere=path.suffix != ".safetensors"):
            yield Finding("pickle", file, "holds a pickled object, which runs code when it is read", _no_pickle(file))


def _no_pickle(file: str) -> str:
    return f"remove {file}; weights are safetensors, all else JSON"


def _holds_pickle(content: bytes, *, anywhere: bool) -> bool:
    starts = {0} | ({match.start() for match in re.finditer(rb"\x80[\x02-\x05]", content)} if anywhere else set())
    return any(_is_pickle(content[start:]) for start in starts)


def _is_pickle(content: bytes) -> bool:
    """Whether the bytes are a pickle up to its end: one that imports a name, or one that says its protocol at once."""
    imports = False
    try:
        for opcode, _, position in pickletools.genops(content):
            imports |= opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")
            if opcode.name == "STOP":
                whole = content[:1] == b"\x80" and position == len(content) - 1
                return imports or whole
    except (ValueError, IndexError, OverflowError):  # how pickletools says that it is none
        return False
    return False


def check_secrets(contents: Contents) -> Iterator[Finding]:
    """No token or key; what is found is not repeated."""
    held = {name: os.environ.get(name) for name in SECRET_VARIABLES} | {"the Hub's token of this machine": get_token()}
    for file, path in contents.files.items():
        content = _header(path) if path.suffix == ".safetensors" else path.read_bytes()
        for kind, pattern in SECRETS.items():
            if re.search(pattern, content):
                yield Finding("secrets", file, f"holds what looks like {kind}", f"take it out of {file}, revoke it")
                break
        else:
            for name, value in held.items():
                if value and len(value) >= 8 and value.encode() in content:
                    yield Finding(
                        "secrets", file, f"holds the value of {name}", f"take it out of {file} and revoke it"
                    )
                    break


def _header(path: Path) -> bytes:
    """The JSON at the start of a safetensors file."""
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return stream.read(min(size, 100_000_000))


def check_paths(contents: Contents) -> Iterator[Finding]:
    """No path of a machine in what people read: it tells names and means nothing elsewhere."""
    here = {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), contents.folder.resolve()} - {Path("/")}
    mine = re.compile("|".join(rf"(?<![\w.:/-]){re.escape(str(path))}/" for path in sorted(here)))
    for file, path in contents.files.items():
        if path.suffix not in TEXT_SUFFIXES:
            continue
        text = contents.read(file) or ""
        shown = _matched(mine, text)
        if not shown and path.name != "tokenizer.json":  # a vocabulary has pieces of paths
            whole = _whole_paths(contents.read_json(file)) if path.suffix == ".json" else iter(())
            shown = _matched(_FOREIGN_PATH, text) or next(whole, "")
        if shown:
            yield Finding("paths", file, f"holds a path of a machine: {shown!r}", f"take it out of {file}")


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


def check_manifest(contents: Contents) -> Iterator[Finding]:
    """Files are those that the export wrote, bit by bit, but for the card and the licences."""
    if MANIFEST not in contents.files:
        return
    listed = {entry["name"]: entry for entry in contents.read_json(MANIFEST).get("files") or []}
    for file in contents.files.keys() - listed.keys() - EDITABLE - {MANIFEST, ".gitattributes"}:
        yield Finding("manifest", file, f"is not in {MANIFEST}", f"remove {file}, or {EXPORT_AGAIN}")
    for file in listed.keys() - EDITABLE:
        path = contents.files.get(file)
        if path is None:
            yield Finding("manifest", file, f"is in {MANIFEST} and missing here", EXPORT_AGAIN)
        elif path.stat().st_size != listed[file]["size"] or sha256(path) != listed[file]["sha256"]:
            yield Finding("manifest", file, "is not the file that was exported", EXPORT_AGAIN)


def check_tensors(contents: Contents) -> Iterator[Finding]:
    """Weights are exactly those that the configuration makes, in the files that the index names."""
    if contents.is_adapter:
        return
    shapes: dict[str, tuple[int, ...]] = {}
    holders: dict[str, str] = {}
    for file in (file for file in contents.files if file.endswith(".safetensors")):
        try:
            with safe_open(contents.files[file], framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no mapping
                    if name not in holders:
                        holders[name], shapes[name] = file, tuple(tensors.get_slice(name).get_shape())
                    elif "model.safetensors" not in (file, holders[name]):
                        yield Finding("tensors", file, f"{name} stands in {holders[name]} too", EXPORT_AGAIN)
        except (SafetensorError, OSError) as error:
            if not TRAINING_STATE.fullmatch(Path(file).name):
                yield Finding("tensors", file, f"cannot be read: {error}", EXPORT_AGAIN)
                return
    if not holders:
        yield Finding("tensors", "model.safetensors", "is missing", EXPORT_AGAIN)
        return
    yield from _index_findings(contents, holders)
    if "config.json" in contents.files:
        yield from _shape_findings(contents, shapes, holders)


def _index_findings(contents: Contents, holders: dict[str, str]) -> Iterator[Finding]:
    index = "model.safetensors.index.json"
    if index not in contents.files:
        if set(holders.values()) != {"model.safetensors"}:
            yield Finding("tensors", index, "is missing: the weights are in several files", EXPORT_AGAIN)
        return
    if "model.safetensors" in contents.files:
        what = "stands beside an index: it would be loaded instead of the shards"
        yield Finding("tensors", "model.safetensors", what, "remove the stale one")
        return
    weight_map = contents.read_json(index).get("weight_map") or {}
    wrong = sorted(name for name in weight_map.keys() | holders.keys() if weight_map.get(name) != holders.get(name))
    if wrong:
        yield Finding("tensors", index, f"does not say where {wrong[0]} is ({len(wrong)} such)", EXPORT_AGAIN)


def _shape_findings(
    contents: Contents, shapes: dict[str, tuple[int, ...]], holders: dict[str, str]
) -> Iterator[Finding]:
    """Names and shapes against the stock model of config.json; one finding a kind, with the first name."""
    import torch
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    try:
        config = LlavaNextConfig.from_dict(contents.read_json("config.json"))
        with torch.device("meta"):
            state = LlavaNextForConditionalGeneration(config).state_dict()
    except Exception as error:  # whatever a broken configuration makes it raise
        yield Finding("tensors", "config.json", f"makes no LlavaNext: {error}", EXPORT_AGAIN)
        return
    tie = config.tie_word_embeddings or config.get_text_config().tie_word_embeddings
    tied = {"lm_head.weight"} if tie else set()
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    kinds = {
        "is missing": sorted(wanted.keys() - shapes.keys() - tied),
        "has no place in the model of config.json": sorted(shapes.keys() - wanted.keys()),
        "has another shape than config.json asks for": sorted(
            name for name in shapes.keys() & wanted.keys() if shapes[name] != wanted[name]
        ),
    }
    for what, names in kinds.items():
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            file = holders.get(names[0], next(iter(holders.values())))
            yield Finding("tensors", file, f"{names[0]} {what}{more}", EXPORT_AGAIN)


def check_card(contents: Contents) -> Iterator[Finding]:
    """Metadata that the Hub takes, ids of the Hub and no local names, finite scores, pictures that are there."""
    text = contents.read(CARD)
    if text is None:
        return
    try:
        data = ModelCard(text).data
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        yield Finding(
            "card", CARD, f"its metadata cannot be read: {reason}", "mend the YAML between the first two ---"
        )
        return
    wanted = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    for key, value in wanted.items():
        if data.get(key) != value:
            yield Finding("card", CARD, f"{key} is {data.get(key)!r}", f"set `{key}: {value}`")
    if not data.get("license"):
        yield Finding(
            "card", CARD, "names no licence", "set model.licence in the recipe and export, or `license:` here"
        )
    for key in ("base_model", "datasets"):
        given = data.get(key) or []
        for name in [given] if isinstance(given, str) else given:
            if not _HUB_ID.fullmatch(str(name)) or Path(str(name)).exists():
                yield Finding(
                    "card", CARD, f"{key} {name!r} is no id of the Hub", "name it OWNER/NAME, or leave it out"
                )
    for result in data.get("eval_results") or []:
        if isinstance(result.metric_value, float) and not math.isfinite(result.metric_value):
            yield Finding("card", CARD, f"a score is {result.metric_value}", "evaluate again")
    for picture in {a or b for a, b in _IMAGE.findall(text)}:
        if "://" not in picture and picture not in contents.files:
            yield Finding(
                "card", CARD, f"shows {picture}, which is not there", f"add {picture}, or take it off the card"
            )


def check_licence(contents: Contents) -> Iterator[Finding]:
    """What Meta's licence asks of a model made from Llama 3.1 (1.b and 1.b.iii of the agreement)."""
    if not contents.is_llama:
        return
    if not contents.name.startswith("Llama"):
        fix = f"publish it as --repo-id OWNER/Llama-{contents.name}"
        yield Finding("licence", CARD, f"the name {contents.name!r} must begin with 'Llama' (licence, 1.b.i)", fix)
    if contents.card:  # check_complete and check_card name one that is missing or unreadable
        card = contents.read(CARD) or ""
        if contents.card.get("license") != LLAMA31:
            yield Finding("licence", CARD, f"license is {contents.card.get('license')!r}", f"set `license: {LLAMA31}`")
        if "Built with Llama" not in card:
            yield Finding(
                "licence", CARD, "does not say 'Built with Llama'", "put it below the title (licence, 1.b.i)"
            )
        if LLAMA31_POLICY not in card:
            yield Finding("licence", CARD, "has no link to the Acceptable Use Policy", f"link to {LLAMA31_POLICY}")
    if "LICENSE" in contents.files and LLAMA31_TITLE not in (contents.read("LICENSE") or "").upper():
        yield Finding("licence", "LICENSE", "is not the Llama 3.1 agreement", "copy LICENSE from the base model")
    if "NOTICE" in contents.files and LLAMA31_NOTICE not in (contents.read("NOTICE") or ""):
        yield Finding("licence", "NOTICE", "lacks the sentence of the licence (1.b.iii)", f"add: {LLAMA31_NOTICE}")


def check_adapters(contents: Contents) -> Iterator[Finding]:
    """Adapters are merged: the folder must open without PEFT and without another model's weights."""
    config = contents.read_json("adapter_config.json")
    if not contents.is_adapter:
        return
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    pinned = isinstance(base, str) and _HUB_ID.fullmatch(base) and revision
    also = "" if pinned else ", and name no base model on the Hub with its revision"
    fix = "merge them (peft: merge_and_unload), save, and publish the whole model"
    yield Finding("adapters", "adapter_config.json", f"adapters are not merged{also}", fix)


def check_code(contents: Contents) -> Iterator[Finding]:
    """Remote code is short and plain: no network, no processes, no eval, imports that every machine has."""
    code = {file: path for file, path in contents.files.items() if path.suffix == ".py"}
    if len(code) > MAX_CODE_FILES:
        last = sorted(code)[-1]
        yield Finding("code", last, f"is one of {len(code)} code files, at most {MAX_CODE_FILES}", f"remove {last}")
    siblings = {path.stem for file, path in code.items() if "/" not in file}
    siblings |= set(_mapped_modules(contents).values())  # those that are missing are named by check_complete
    for file in code:
        for what in code_problems(contents.read(file) or "", siblings):
            yield Finding("code", file, what, f"{file} comes from this package; {EXPORT_AGAIN}")


def code_problems(source: str, siblings: set[str]) -> list[str]:
    """What a file that goes to the Hub does against the import law."""
    try:
        nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.expr | ast.stmt)]
    except (SyntaxError, ValueError) as error:
        return [f"is no Python: {error}"]
    problems = []
    for node in nodes:
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level and (node.level > 1 or name not in siblings):
                problems.append(f"line {node.lineno}: {'.' * node.level}{name} is not a file beside it")
            modules = [] if node.level else [name]
        for module in modules:
            if module.split(".")[0] not in CODE_MAY_IMPORT:
                problems.append(f"line {node.lineno}: imports {module}")
        match node:  # a Name is what a call of a built-in is made through
            case ast.Name(id=name) if name in CODE_MAY_NOT_CALL:
                problems.append(f"line {node.lineno}: uses {name}")
            case ast.Attribute(value=ast.Name(id="os"), attr=name) if OS_MAY_NOT_CALL.fullmatch(name):
                problems.append(f"line {node.lineno}: uses os.{name}")
    return problems


RULES: tuple[Callable[[Contents], Iterator[Finding]], ...] = (
    check_complete,
    check_doors_named,
    check_extensions,
    check_training_state,
    check_pickle,
    check_secrets,
    check_paths,
    check_manifest,
    check_tensors,
    check_card,
    check_licence,
    check_adapters,
    check_code,
)


def check_folder(folder: Path, name: str) -> list[Finding]:
    """Everything that keeps a folder from being published under this name (without the owner)."""
    contents = Contents(folder, name)
    return [finding for rule in RULES for finding in rule(contents)]
