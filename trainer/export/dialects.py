"""Rewrites an exported folder for older Transformers, 4.52 to 5.5: same weights, stock classes only.

What those versions read differently from ours (5.23): the tower's keys have a level `vision_model`; the rotary
embedding is `rope_theta` and `rope_scaling`; the type is `torch_dtype`; the image processor has a separate file; the
tokenizer's class has another name. Our code needs a newer Transformers, so the folder neither contains nor names it.
5.23 reads this dialect too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from llava_llama31.trainer.checkpoint.atomic_folders import read_json, write_json


NATIVE, TRANSFORMERS_4 = "native", "transformers-4.52"
DIALECTS = (NATIVE, TRANSFORMERS_4)
_INDEX = "model.safetensors.index.json"
_CLIP_PARTS = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")


def to_transformers_4(folder: Path) -> None:
    """Rewrite a folder just saved in the native dialect; only one file of weights is in memory at a time."""
    config = read_json(folder / "config.json")
    _rewrite_weights(folder, is_clip=config["vision_config"]["model_type"] == "clip_vision_model")
    write_json(folder / "config.json", _older_config(config))
    processor = read_json(folder / "processor_config.json")
    processor.pop("auto_map", None)
    images = processor.pop("image_processor") | {"processor_class": processor["processor_class"]}
    write_json(folder / "preprocessor_config.json", images)
    write_json(folder / "processor_config.json", processor)
    tokenizer = read_json(folder / "tokenizer_config.json")
    tokenizer.pop("backend", None)
    tokenizer.pop("extra_special_tokens", None)  # they expect a mapping; tokenizer.json marks the tokens as special
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer["model_input_names"] = [
        "input_ids",
        "attention_mask",
    ]  # they write three, and generate refuses the third
    write_json(folder / "tokenizer_config.json", tokenizer)
    for code in folder.glob("*.py"):
        code.unlink()


def _rewrite_weights(folder: Path, *, is_clip: bool) -> None:
    def older(name: str) -> str:
        part = name.removeprefix("model.vision_tower.")
        nested = is_clip and part != name and part.partition(".")[0] in _CLIP_PARTS
        return f"model.vision_tower.vision_model.{part}" if nested else name

    if not is_clip:
        return
    for file in sorted(folder.glob("*.safetensors")):
        _rename(file, older)
    if (folder / _INDEX).is_file():
        index = read_json(folder / _INDEX)
        index["weight_map"] = {older(name): file for name, file in index["weight_map"].items()}
        write_json(folder / _INDEX, index)


def _rename(file: Path, older: Callable[[str], str]) -> None:
    tensors = {older(name): tensor for name, tensor in load_file(file).items()}
    staging = file.with_suffix(".renamed")
    save_file(tensors, staging, metadata={"format": "pt"})
    staging.replace(file)


def _older_config(config: dict[str, Any]) -> dict[str, Any]:
    config = {key: value for key, value in config.items() if key not in ("auto_map", "dtype")} | {
        "torch_dtype": config["dtype"]
    }
    text = dict(config["text_config"])
    rope = dict(text.pop("rope_parameters"))
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    parts = {"text_config": text, "vision_config": dict(config["vision_config"])}
    for part in parts.values():
        if "dtype" in part:
            part["torch_dtype"] = part.pop("dtype")
    return config | parts
