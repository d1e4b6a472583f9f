"""The sizes of a recipe's model before it exists: from its folders, or from what is known of published parts."""

import importlib.resources
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from llava_llama31.tile_grids import GRID_SHAPES, shapes_up_to
from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.schema import Model, Recipe


_EMBEDDING_MULTIPLE = 64  # of rows, as assembly pads them
_LLAVA_DEFAULTS: dict[str, Any] = {"multimodal_projector_bias": True, "tie_word_embeddings": False}


@cache
def published() -> dict[str, Any]:
    """What the package knows of parts and data that are published elsewhere."""
    file = importlib.resources.files("llava_llama31.trainer.planning") / "published.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def model_config(recipe: Recipe, output: Path) -> tuple[Mapping[str, Any], str] | None:
    """Configuration of the model that the first stage starts from, and where it comes from; None: not known yet."""
    base = RunFolder(output).base
    folder = base if base.exists() else Path(recipe.model.checkpoint or "").expanduser()
    if recipe.model.checkpoint is not None or base.exists():
        found = _folder_config(folder) or _published_llava(recipe.model.checkpoint)
        return (_regridded(found, recipe.model), str(folder)) if found else None
    return _assembled(recipe.model)


def _published_llava(name: str | None) -> Mapping[str, Any] | None:
    """Configuration of a whole LLaVA that is published, where both parts are known."""
    known = published()["models"].get((name or "").partition("@")[0], {})
    if not {"vision_config", "text_config"} <= set(known):
        return None
    side = known["vision_config"]["image_size"]
    grid = [[side * rows, side * columns] for rows, columns in GRID_SHAPES]
    return _LLAVA_DEFAULTS | {"vision_feature_layer": -2, "image_grid_pinpoints": grid} | known


def _regridded(config: Mapping[str, Any], model: Model) -> Mapping[str, Any]:
    """A checkpoint's configuration with the grid that the recipe asks for."""
    if model.max_tiles is None and model.image_grid_pinpoints is None:
        return config
    return {**config, "image_grid_pinpoints": _pinpoints(model, config["vision_config"]["image_size"])}


def _pinpoints(model: Model, side: int) -> list[list[int]]:
    shapes = GRID_SHAPES if model.max_tiles is None else shapes_up_to(model.max_tiles)
    return model.image_grid_pinpoints or [[side * rows, side * columns] for rows, columns in shapes]


def _assembled(model: Model) -> tuple[Mapping[str, Any], str] | None:
    vision = _part(model.vision_tower or "", "vision_config")
    text = _part(model.language_model or "", "text_config")
    if vision is None or text is None:
        return None
    text = text | {"vocab_size": -(-(text["vocab_size"] + 1) // _EMBEDDING_MULTIPLE) * _EMBEDDING_MULTIPLE}
    chosen = {
        "vision_feature_layer": model.vision_feature_layer,
        "image_grid_pinpoints": _pinpoints(model, vision["image_size"]),
        "tie_word_embeddings": text["tie_word_embeddings"],  # as assembly passes it on
    }
    config = _LLAVA_DEFAULTS | chosen | {"vision_config": vision, "text_config": text}
    return config, f"{model.vision_tower} and {model.language_model}"


def _part(name: str, key: str) -> dict[str, Any] | None:
    """`vision_config` or `text_config` of a folder or a published part."""
    known = published()["models"].get(name.partition("@")[0], {})
    if key in known:
        return dict(known[key])
    file = Path(name).expanduser() / "config.json"
    if not file.is_file():
        return None
    fields = _read(file)
    fields = fields.get(key, fields)
    if fields.get("model_type") in ("clip", "siglip"):
        fields = fields.get("vision_config", {}) | {"model_type": f"{fields['model_type']}_vision_model"}
    return _with_defaults(fields | {"model_type": fields.get("model_type", "clip_vision_model")}, file)


def _folder_config(folder: Path) -> Mapping[str, Any] | None:
    file = folder / "config.json"
    if not file.is_file():
        return None
    fields = _read(file)
    if "vision_config" not in fields or "text_config" not in fields:
        raise UserError("is not a LlavaNext model", where=str(file), fix="name an assembled checkpoint")
    parts = {key: _with_defaults(fields[key], file) for key in ("vision_config", "text_config")}
    return _LLAVA_DEFAULTS | {"vision_feature_layer": -2} | fields | parts


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"not JSON: {error}", where=str(file), fix="correct it or download it again") from None


def _with_defaults(fields: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """A part's configuration with Transformers' defaults."""
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**fields).to_dict()
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"cannot be read: {error}", where=str(file), fix="see the message") from error
