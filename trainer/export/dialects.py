"""The two layouts of an exported folder: `portable`, which every engine opens, and `native`, as Transformers saves it.

Engines and versions of Transformers differ in a few names. Portable takes the older one, which newer software reads
too; its weights have the names of llava-hf's own repositories, which every engine was made for:

| | native | portable | read so by |
|---|---|---|---|
| language model | `model.language_model.`, `lm_head.` | `language_model.model.`, `language_model.lm_head.` | SGLang |
| rest | `model.NAME` | `NAME` | SGLang |
| CLIP or SigLIP tower | no level `vision_model` | with it | Transformers before 5.6, vLLM's own class |
| DINOv2's attention | `q_proj`, `o_proj` | `attention.query`, `output.dense` | Transformers before 5.17 |
| rotary embedding | `rope_parameters` | `rope_theta`, `rope_scaling` | Transformers 4 |
| type | `dtype` | `torch_dtype` | Transformers 4 |
| image processor | in `processor_config.json` | `preprocessor_config.json` | Transformers 4 |
| tokenizer | `TokenizersBackend` | `PreTrainedTokenizerFast`, with its two inputs | Transformers 4 |
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llava_llama31.trainer.checkpoint.atomic_folders import read_json, write_json


PORTABLE, NATIVE = "portable", "native"
DIALECTS = (PORTABLE, NATIVE)
INDEX = "model.safetensors.index.json"
# beginnings of names
_PARTS = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
}
_TOWER = "model.vision_tower."
_LEVEL_TOWERS = ("clip_vision_model", "siglip_vision_model")
_LEVEL_PARTS = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.", "head.")
_DINOV2_NAME = re.compile(r"(?<=\.attention\.)([qkvo])_proj(?=\.)")
_DINOV2_OLDER = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "output.dense"}
_DINOV2_NEWER = {old: f"{new}_proj" for new, old in _DINOV2_OLDER.items()}
_DINOV2_OLDER_NAME = re.compile(r"(?<=\.attention\.)(attention\.(?:query|key|value)|output\.dense)(?=\.)")


def to_portable(folder: Path) -> None:
    """Rewrite a folder just saved in the native layout; only one file of weights is in memory at a time."""
    config = read_json(folder / "config.json")
    tower = config["vision_config"]["model_type"]
    _rename_weights(folder, lambda name: portable_name(name, tower))
    write_json(folder / "config.json", _older_config(config))
    processor = read_json(folder / "processor_config.json")
    images = processor.pop("image_processor") | {"processor_class": processor["processor_class"]}
    write_json(folder / "preprocessor_config.json", images)
    write_json(folder / "processor_config.json", processor)
    write_json(folder / "tokenizer_config.json", _older_tokenizer(read_json(folder / "tokenizer_config.json")))


def portable_name(name: str, tower: str) -> str:
    """The portable name of a tensor that has this native name.

    Args:
        tower: `model_type` of the vision tower.
    """
    part = name.removeprefix(_TOWER)
    if part != name and tower in _LEVEL_TOWERS and part.startswith(_LEVEL_PARTS):
        name = f"{_TOWER}vision_model.{part}"
    elif part != name and tower == "dinov2":
        name = _TOWER + _DINOV2_NAME.sub(lambda match: _DINOV2_OLDER[match[1]], part)
    for native, portable in _PARTS.items():
        if name.startswith(native):
            return portable + name.removeprefix(native)
    return name


def native_name(name: str, tower: str) -> str:
    """The native name of a tensor of either layout; see `portable_name`."""
    for native, portable in _PARTS.items():
        if name.startswith(portable):
            name = native + name.removeprefix(portable)
            break
    part = name.removeprefix(_TOWER)
    if part != name and tower in _LEVEL_TOWERS:
        return _TOWER + part.removeprefix("vision_model.")
    if part != name and tower == "dinov2":
        return _TOWER + _DINOV2_OLDER_NAME.sub(lambda match: _DINOV2_NEWER[match[1]], part)
    return name


def _rename_weights(folder: Path, renamed: Callable[[str], str]) -> None:
    from safetensors.torch import load_file, save_file

    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        if all(renamed(name) == name for name in tensors):
            continue
        staging = file.with_suffix(".renamed")
        save_file({renamed(name): tensor for name, tensor in tensors.items()}, staging, metadata={"format": "pt"})
        staging.replace(file)
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        index["weight_map"] = {renamed(name): file for name, file in index["weight_map"].items()}
        write_json(folder / INDEX, index)


def _older_config(config: Mapping[str, Any]) -> dict[str, Any]:
    text = dict(config["text_config"])
    rope = dict(text.pop("rope_parameters"))
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    parts = {"text_config": text, "vision_config": dict(config["vision_config"])}
    older = {**config, **parts}
    for part in (older, *parts.values()):
        if "dtype" in part:
            part["torch_dtype"] = part.pop("dtype")
    return older


def _older_tokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    older = {key: value for key, value in config.items() if key not in ("backend", "extra_special_tokens")}
    # Transformers 4 expects a mapping under the newer name
    if "extra_special_tokens" in config:
        older["additional_special_tokens"] = config["extra_special_tokens"]
    older["tokenizer_class"] = "PreTrainedTokenizerFast"
    # by default it makes a third one there, which generate refuses
    older["model_input_names"] = ["input_ids", "attention_mask"]
    return older
