"""The rules that a folder must pass before it is published: one function per rule, each finding with file and fix.

The rules read files and run nothing; `doors.py` then opens the folder in clean processes. A rule sees only what
somebody who downloads the folder gets, not what training knows about the model.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open

from llava_llama31.model_card.card import LLAMA_LICENCES, LlamaLicence
from llava_llama31.trainer.checkpoint.atomic_folders import MANIFEST
from llava_llama31.trainer.export.adapter import ADAPTER_WEIGHTS
from llava_llama31.trainer.export.dialects import native_name
from llava_llama31.trainer.export.quantized import MAX_LOSS, TWIN, dense_shapes, is_quantized
from llava_llama31.trainer.model.opening import ADAPTER_CONFIG
from llava_llama31.trainer.publishing.contents import CARD, CARD_ERRORS, EXPORT_AGAIN, Contents, GateFinding, mapping
from llava_llama31.trainer.publishing.gate_code import check_code
from llava_llama31.trainer.publishing.gate_files import (
    TRAINING_STATE,
    check_entries,
    check_extensions,
    check_manifest,
    check_paths,
    check_pickle,
    check_secrets,
    check_training_state,
)


ARCHITECTURE, MODEL_TYPE, STOCK_PROCESSOR = "LlavaNextForConditionalGeneration", "llava_next", "LlavaNextProcessor"
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
# licences whose terms our export writes into a NOTICE
NOTICE_LICENCES = (*LLAMA_LICENCES, "apache-2.0")
# where files may name classes, and which: Transformers would fetch OWNER/NAME--module.Class from another repository
AUTO_MAPS = {
    "config.json": (
        "AutoConfig",
        "AutoModel",
        "AutoModelForPreTraining",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
    ),
    "processor_config.json": ("AutoProcessor",),
}
# other keys by which a JSON file brings code, or a second template next to chat_template.jinja
FOREIGN_KEYS = ("custom_pipelines", "custom_generate", "chat_template")
_REVISION = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_IMAGE = re.compile(r"<img[^>]*\bsrc=\"([^\"]+)\"|!\[[^\]]*\]\(([^)\s]+)")


def check_complete(contents: Contents) -> Iterator[GateFinding]:
    """Every file that both doors, the licences and a reader need is present."""
    required = list(REQUIRED)
    if "image_processor" not in contents.read_json("processor_config.json"):
        required.append("preprocessor_config.json")
    if contents.card.get("license") in NOTICE_LICENCES or contents.llama_licences:
        required.append("NOTICE")
    for (file, name), module in _mapped_modules(contents).items():
        if not module:
            yield GateFinding("complete", file, f"auto_map lacks {name}", EXPORT_AGAIN)
        else:
            required.append(f"{module}.py")
    for file in dict.fromkeys(required):
        fix = (
            EXPORT_AGAIN
            if file != "LICENSE"
            else "put the licence's text there; before training: set model.license in the recipe"
        )
        if file not in contents.files:
            yield GateFinding("complete", file, "is missing", fix)
        elif contents.files[file].stat().st_size == 0:
            yield GateFinding("complete", file, "is empty", EXPORT_AGAIN)
    for file, path in contents.files.items():
        if path.suffix == ".json":
            try:
                json.loads(path.read_bytes())
            except (ValueError, RecursionError) as error:
                yield GateFinding("complete", file, f"is not valid JSON: {error}", EXPORT_AGAIN)


def _mapped_modules(contents: Contents) -> dict[tuple[str, str], str]:
    """(file, Auto class) -> the folder's module with our class, empty if the file names none."""
    return {
        (file, name): str(mapping(contents.read_json(file).get("auto_map")).get(name, "")).partition(".")[0]
        for file, names in AUTO_MAPS.items()
        if file in contents.files
        for name in names
    }


def check_doors_named(contents: Contents) -> Iterator[GateFinding]:
    """The files' metadata must let stock classes open them."""
    config = contents.read_json("config.json")
    said = {
        "config.json: architectures": (config.get("architectures"), [ARCHITECTURE]),
        "config.json: model_type": (config.get("model_type"), MODEL_TYPE),
        "processor_config.json: processor_class": (
            contents.read_json("processor_config.json").get("processor_class"),
            STOCK_PROCESSOR,
        ),
    }
    for place, (found, wanted) in said.items():
        file, _, key = place.partition(": ")
        if file in contents.files and found != wanted:
            yield GateFinding("doors-named", file, f"{key} is {found!r}, not {wanted!r}", EXPORT_AGAIN)
    if "generation_config.json" in contents.files:
        stops = contents.read_json("generation_config.json").get("eos_token_id")
        if stops is None or stops == []:
            fix = "set eos_token_id to the ids of <|end_of_text|>, <|eom_id|> and <|eot_id|>"
            yield GateFinding(
                "doors-named", "generation_config.json", "has no eos_token_id, so answers would never end", fix
            )
    for file in contents.files:
        if file.endswith(".json"):
            for key, value in _keys(contents.read_json(file)):
                allowed = AUTO_MAPS.get(file, ()) if key == "auto_map" else ()
                if key in FOREIGN_KEYS or (key.endswith("auto_map") and not _names_own_classes(value, allowed)):
                    yield GateFinding(
                        "doors-named", file, f"{key} refers to something outside the folder", EXPORT_AGAIN
                    )


def _keys(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of nested objects with its value; the names of nested keys start with a dot."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key if key in FOREIGN_KEYS else f"{prefix}{key}", item
            yield from _keys(item, ".")
    elif isinstance(value, list):
        for item in value:
            yield from _keys(item, ".")


def _names_own_classes(value: Any, allowed: tuple[str, ...]) -> bool:
    """Whether an auto_map names only these kinds of classes, all in the folder's own files."""
    if not isinstance(value, dict) or not value.keys() <= set(allowed):
        return False
    return all(isinstance(name, str) and re.fullmatch(r"\w+\.\w+", name) for name in value.values())


def check_template(contents: Contents) -> Iterator[GateFinding]:
    """The only chat template is ours, which the model was trained with."""
    from llava_llama31.trainer.export.templates import is_own_template

    for file in (file for file in contents.files if file.endswith(".jinja")):
        if file != "chat_template.jinja":
            yield GateFinding("template", file, "is a second chat template", f"remove {file}")
        elif not is_own_template(contents.read(file)) and contents.files[file].stat().st_size > 0:
            yield GateFinding("template", file, "is not the template that the model was trained with", EXPORT_AGAIN)


def check_tensors(contents: Contents) -> Iterator[GateFinding]:
    """The weights are exactly those of the configured model, in the files that the index names."""
    shapes: dict[str, tuple[int, ...]] = {}
    holders: dict[str, str] = {}
    for file in (file for file in contents.files if file.endswith(".safetensors")):
        try:
            with safe_open(contents.files[file], framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    if name not in holders:
                        holders[name], shapes[name] = file, tuple(tensors.get_slice(name).get_shape())
                    elif "model.safetensors" not in (file, holders[name]):
                        yield GateFinding("tensors", file, f"{name} is also in {holders[name]}", EXPORT_AGAIN)
        except (SafetensorError, OSError) as error:
            if not TRAINING_STATE.fullmatch(Path(file).name):
                yield GateFinding("tensors", file, f"cannot be read: {error}", EXPORT_AGAIN)
                return
    if not holders:
        yield GateFinding("tensors", "model.safetensors", "is missing", EXPORT_AGAIN)
        return
    yield from _index_findings(contents, holders)
    if "config.json" in contents.files:
        yield from _shape_findings(contents, shapes, holders)


def _index_findings(contents: Contents, holders: dict[str, str]) -> Iterator[GateFinding]:
    index = "model.safetensors.index.json"
    if index not in contents.files:
        if set(holders.values()) != {"model.safetensors"}:
            yield GateFinding("tensors", index, "is missing: the weights are in several files", EXPORT_AGAIN)
        return
    if "model.safetensors" in contents.files:
        what = "is next to an index, and would be loaded instead of the shards"
        yield GateFinding("tensors", "model.safetensors", what, "remove whichever is stale")
        return
    weight_map = mapping(contents.read_json(index).get("weight_map"))
    wrong = sorted(name for name in weight_map.keys() | holders.keys() if weight_map.get(name) != holders.get(name))
    if wrong:
        yield GateFinding(
            "tensors", index, f"does not say which file holds {wrong[0]} ({len(wrong)} tensors in all)", EXPORT_AGAIN
        )


def _shape_findings(
    contents: Contents, shapes: dict[str, tuple[int, ...]], holders: dict[str, str]
) -> Iterator[GateFinding]:
    """Compare names and shapes with the stock model of config.json; one finding per kind, with the first name."""
    try:
        model = _stock_model(json.dumps(contents.read_json("config.json")))
    except Exception as error:  # a broken configuration may raise anything
        yield GateFinding("tensors", "config.json", f"does not configure a LlavaNext model: {error}", EXPORT_AGAIN)
        return
    wanted, tower, tied = model.shapes, model.tower, {"lm_head.weight"} if model.is_tied else set()
    written = {native_name(name, tower): name for name in shapes}
    doubled = sorted(shapes.keys() - set(written.values()))
    shapes = {native: shapes[name] for native, name in written.items()}
    if is_quantized(contents.read_json("config.json")):
        shapes = dense_shapes(shapes)
    kinds = {
        "is missing": sorted(wanted.keys() - shapes.keys() - tied),
        "is not a tensor of the model in config.json": sorted(shapes.keys() - wanted.keys()),
        "has a different shape in the model of config.json": sorted(
            name for name in shapes.keys() & wanted.keys() if shapes[name] != wanted[name]
        ),
    }
    for name in doubled[:1]:
        what = f"{name} is also there as {written[native_name(name, tower)]}"
        yield GateFinding("tensors", holders[name], what, EXPORT_AGAIN)
    for what, names in kinds.items():
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            file = holders.get(written.get(names[0], ""), next(iter(holders.values())))
            yield GateFinding("tensors", file, f"{names[0]} {what}{more}", EXPORT_AGAIN)


@dataclass(frozen=True)
class _StockModel:
    """What stock's class makes of a configuration: shapes by tensor, the tower's type, whether the head is tied."""

    shapes: dict[str, tuple[int, ...]]
    tower: str
    is_tied: bool


@lru_cache(maxsize=2)  # a folder is checked before it goes up and after it came down
def _stock_model(config_json: str) -> _StockModel:
    import torch
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig.from_dict(json.loads(config_json))
    with torch.device("meta"):
        state = LlavaNextForConditionalGeneration(config).state_dict()
    vision: Any = config.vision_config
    is_tied = bool(config.tie_word_embeddings or config.get_text_config().tie_word_embeddings)
    return _StockModel({name: tuple(tensor.shape) for name, tensor in state.items()}, vision.model_type, is_tied)


def check_twin(contents: Contents) -> Iterator[GateFinding]:
    """A quantised model says what quantising it cost, and that is not more than a limit."""
    if not is_quantized(contents.read_json("config.json")):
        return
    lost = contents.read_json(TWIN).get("difference")
    fix = "write it with: llava-llama31 export RUN --quantize SCHEME"
    if not isinstance(lost, float | int):
        yield GateFinding("twin", TWIN, "does not say what quantising cost", fix)
    elif not lost >= -MAX_LOSS:
        what = f"quantising cost {-100 * lost:.2f} points of the score; the limit is {100 * MAX_LOSS:g}"
        yield GateFinding("twin", TWIN, what, "publish another scheme: fp8, int8 and w4a16, from least to most loss")


def check_card(contents: Contents) -> Iterator[GateFinding]:
    """The card has metadata that the Hub accepts, Hub ids instead of local names, finite scores and all its images."""
    text = contents.read(CARD)
    if text is None:
        return
    try:
        data = ModelCard(text).data
    except CARD_ERRORS as error:
        reason = " ".join(str(error).split())
        yield GateFinding(
            "card", CARD, f"has metadata that cannot be read: {reason}", "fix the YAML between the first two ---"
        )
        return
    library = "peft" if contents.is_adapter else "transformers"
    wanted = {"library_name": library, "pipeline_tag": "image-text-to-text"}
    for key, value in wanted.items():
        if data.get(key) != value:
            yield GateFinding("card", CARD, f"{key} is {data.get(key)!r}", f"set `{key}: {value}`")
    if not data.get("license"):
        yield GateFinding(
            "card", CARD, "names no licence", "set `license:` here; before training: model.license in the recipe"
        )
    for key in ("base_model", "datasets"):
        given = data.get(key) or []
        for name in [given] if isinstance(given, str) else given:
            if not _HUB_ID.fullmatch(str(name)) or Path(str(name)).exists():
                yield GateFinding(
                    "card", CARD, f"{key} {name!r} is not a Hub id", "name it OWNER/NAME, or leave it out"
                )
    for result in data.get("eval_results") or []:
        if isinstance(result.metric_value, float) and not math.isfinite(result.metric_value):
            yield GateFinding("card", CARD, f"has the score {result.metric_value}", "evaluate again")
    for image in {a or b for a, b in _IMAGE.findall(text)}:
        if "://" not in image and image not in contents.files:
            yield GateFinding(
                "card", CARD, f"shows {image}, which is missing", f"add {image}, or remove it from the card"
            )


def check_licence(contents: Contents) -> Iterator[GateFinding]:
    """What Meta's licences require of a model made from Llama (1.b and 1.b.iii of each agreement)."""
    for licence in contents.llama_licences:
        yield from _check_llama_licence(contents, licence)


def _check_llama_licence(contents: Contents, licence: LlamaLicence) -> Iterator[GateFinding]:
    begins = licence.name_begins
    if not licence.takes_name(contents.name):
        fix = f"publish it as --repo-id OWNER/{begins.replace(' ', '-')}-{contents.name}"
        what = f"the name {contents.name!r} must begin with {begins!r} (licence, 1.b.i)"
        yield GateFinding("licence", CARD, what, fix)
    if contents.card:  # check_complete and check_card report a missing or unreadable card
        card, words = contents.read(CARD) or "", licence.built_with
        if contents.card.get("license") != licence.key:
            what = f"license is {contents.card.get('license')!r}"
            yield GateFinding("licence", CARD, what, f"set `license: {licence.key}`")
        if words not in card:
            yield GateFinding("licence", CARD, f"does not say {words!r}", "put it below the title (licence, 1.b.i)")
        if licence.policy not in card:
            fix = f"link to {licence.policy}"
            yield GateFinding("licence", CARD, "has no link to the Acceptable Use Policy", fix)
    if "LICENSE" in contents.files and licence.title not in (contents.read("LICENSE") or "").upper():
        what = f"is not the {licence.family} agreement"
        yield GateFinding("licence", "LICENSE", what, "copy LICENSE from the base model")
    if "NOTICE" in contents.files and licence.notice not in (contents.read("NOTICE") or ""):
        what = "lacks the sentence that the licence requires (1.b.iii)"
        yield GateFinding("licence", "NOTICE", what, f"add: {licence.notice}")


def check_adapters(contents: Contents) -> Iterator[GateFinding]:
    """Adapters are published for a base on the Hub at one revision, as safetensors with nothing but adapters."""
    if not contents.is_adapter:
        return
    config = contents.read_json(ADAPTER_CONFIG)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    fix = (
        "write them with: llava-llama31 export RUN --adapter --base OWNER/NAME@REVISION; or publish the merged export"
    )
    if not (isinstance(base, str) and _HUB_ID.fullmatch(base) and _REVISION.fullmatch(str(revision))):
        what = "these adapters name no base model on the Hub with its revision, a commit"
        yield GateFinding("adapters", ADAPTER_CONFIG, what, fix)
    for key in ("auto_mapping", "modules_to_save"):
        if config.get(key):
            yield GateFinding("adapters", ADAPTER_CONFIG, f"{key} is {config[key]!r}: more than adapters", fix)
    for file in (ADAPTER_WEIGHTS, CARD, "LICENSE", MANIFEST):
        if file not in contents.files:
            yield GateFinding("adapters", file, "is missing", fix)
    for file in (file for file in contents.files if file.endswith(".safetensors")):
        if file != ADAPTER_WEIGHTS:
            yield GateFinding("adapters", file, "is not the adapters' file", f"remove {file}")
            continue
        try:
            with safe_open(contents.files[file], framework="numpy") as tensors:
                names = list(tensors.keys())
        except (SafetensorError, OSError) as error:
            yield GateFinding("adapters", file, f"cannot be read: {error}", fix)
            continue
        foreign = [name for name in names if ".lora_" not in name]
        if foreign or not names:
            what = f"holds {foreign[0]}, which is not an adapter" if foreign else "holds no adapters"
            yield GateFinding("adapters", file, what, fix)


RULES: tuple[Callable[[Contents], Iterator[GateFinding]], ...] = (
    check_complete,
    check_doors_named,
    check_template,
    check_entries,
    check_extensions,
    check_training_state,
    check_pickle,
    check_secrets,
    check_paths,
    check_manifest,
    check_tensors,
    check_twin,
    check_card,
    check_licence,
    check_adapters,
    check_code,
)


# of a folder that has neither a model's weights nor its files
ADAPTER_RULES = tuple(
    rule
    for rule in RULES
    if rule not in (check_complete, check_doors_named, check_template, check_tensors, check_twin)
)


def check_folder(folder: Path, name: str, links_within: Path | None = None) -> list[GateFinding]:
    """All findings that keep a folder from being published under this name (without the owner).

    Args:
        links_within: folder that symbolic links may point into, as the Hub cache's do; default: none.
    """
    contents = Contents(folder, name, links_within)
    rules = ADAPTER_RULES if contents.is_adapter else RULES
    return [finding for rule in rules for finding in rule(contents)]
