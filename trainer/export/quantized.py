"""Rewrites an exported folder with its decoder's linear layers in 8 or 4 bits, in compressed-tensors' format.

Weights are rounded to the nearest value that the format has; no data is needed. Tower, projector, embeddings and head
stay as they are. vLLM reads the format by itself, Transformers where compressed-tensors is installed.

Shapes: O rows (outputs) and I columns (inputs) of a layer's weight, G groups of columns with a scale each.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llava_llama31.trainer.checkpoint.atomic_folders import read_json, write_json
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.export.dialects import INDEX


if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme


# name -> compressed-tensors' names of scheme and format
SCHEMES = {
    "fp8": ("FP8_DYNAMIC", "float-quantized"),
    "int8": ("W8A8", "int-quantized"),
    "w4a16": ("W4A16", "pack-quantized"),
}
QUANTIZATION = "quantization_config"
# a twin's file with what quantising cost, and the share of the score that it may
TWIN, MAX_LOSS = "twin.json", 0.01
# columns that share a scale in 4 bits, the coarsest that divides every layer's
GROUP_SIZES = (128, 64, 32)
_UNTOUCHED = ["re:.*vision_tower.*", "re:.*multi_modal_projector.*", "re:.*lm_head.*"]
_LAYER = re.compile(r"(language_model\.model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj)\.weight")
_PACKED = 8  # values of 4 bits in an int32


def quantize(folder: Path, scheme: str) -> int:
    """Quantise a folder of the portable layout in place, file by file; returns the number of layers.

    Args:
        scheme: one of `SCHEMES`.

    Raises:
        UserError: compressed-tensors is not installed, the folder is quantised already or of another layout, or its
            layers' widths do not divide into groups.
    """
    try:
        from compressed_tensors import __version__ as version
        from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme
    except ImportError:
        fix = "pip install 'llava-llama31[quantize]'"
        raise UserError("needs compressed-tensors", where="--quantize", fix=fix) from None
    config = read_json(folder / "config.json")
    if QUANTIZATION in config:
        raise UserError("is quantised already", where=str(folder), fix="name a run with plain weights")
    preset, form = SCHEMES[scheme]
    chosen = preset_name_to_scheme(preset, ["Linear"])
    assert chosen.weights is not None
    if chosen.weights.group_size is not None:
        chosen.weights.group_size = _group_size(folder, config["text_config"])
    num_layers = 0
    weight_map: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        layers, names = _quantize_file(file, chosen, form)
        num_layers += layers
        weight_map |= dict.fromkeys(names, file.name)
    if num_layers == 0:
        raise UserError("has no decoder layers of the portable layout", where=str(folder), fix="export it again")
    if (folder / INDEX).is_file():
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    status = QuantizationStatus.COMPRESSED
    groups = QuantizationConfig(
        config_groups={"group_0": chosen}, ignore=_UNTOUCHED, format=form, quantization_status=status
    )
    config[QUANTIZATION] = groups.model_dump(mode="json", exclude_none=True) | {"version": version}
    write_json(folder / "config.json", config)
    return num_layers


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a quantised model."""
    return QUANTIZATION in config


def dense_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors before they were quantised."""
    dense: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            dense[f"{layer}.weight"] = (shape[0], shape[1] * _PACKED)
        elif kind not in ("weight_scale", "weight_shape"):
            dense[name] = shape
    return dense


def _quantize_file(file: Path, scheme: "QuantizationScheme", form: str) -> tuple[int, list[str]]:
    """Number of layers in a file, and the names of its tensors afterwards."""
    from compressed_tensors.compressors.base import BaseCompressor
    from safetensors.torch import load_file, save_file

    compressor = BaseCompressor.get_value_from_registry(form)
    tensors, num_layers = {}, 0
    for name, tensor in load_file(file).items():
        match = _LAYER.fullmatch(name)
        if match is None:
            tensors[name] = tensor
            continue
        num_layers += 1
        scale = _scales(tensor, scheme)
        compressed = compressor.compress({"weight": tensor, "weight_scale": scale}, scheme)
        tensors |= {f"{match[1]}.{key}": value.contiguous() for key, value in compressed.items()}
    if num_layers:
        staging = file.with_suffix(".quantized")
        save_file(tensors, staging, metadata={"format": "pt"})
        staging.replace(file)
    return num_layers, list(tensors)


def _scales(weight: torch.Tensor, scheme: "QuantizationScheme") -> torch.Tensor:
    """(O, 1) for a scale a row, (O, G) for groups; in the weight's type."""
    from compressed_tensors.quantization.utils import calculate_qparams

    assert scheme.weights is not None
    size = scheme.weights.group_size or weight.shape[1]
    groups = weight.unflatten(1, (-1, size))
    scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    return scales.to(weight.dtype)


def _group_size(folder: Path, text: Mapping[str, Any]) -> int:
    widths = [text["hidden_size"], text["intermediate_size"]]
    # where a model has more columns there than its hidden size
    if text.get("head_dim") is not None:
        widths.append(text["head_dim"] * text["num_attention_heads"])
    for size in GROUP_SIZES:
        if all(width % size == 0 for width in widths):
            return size
    what = f"4 bits need layers whose widths divide by {GROUP_SIZES[-1]}; they are {', '.join(map(str, widths))}"
    raise UserError(what, where=str(folder), fix="choose --quantize int8 or fp8")
