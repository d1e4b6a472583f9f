"""Open a trained model, or adapters on their base, for evaluation, export and chat."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig

from llava_llama31 import LlavaLlama31ForConditionalGeneration
from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.distributed.devices import (
    default_device,
    leave_out_cudnn_attention,
    refuse_unbuilt_gpu,
)
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.model.locating import hub_id, local_checkpoint
from llava_llama31.trainer.terminal import without_bars


ADAPTER_CONFIG = "adapter_config.json"


def open_model(
    folder: str | Path, *, dtype: str = "auto", device: str | torch.device | None = None
) -> tuple[LlavaLlama31ForConditionalGeneration, LlavaLlama31Processor]:
    """Open any folder that stock Transformers opens as LlavaNext, or a folder of PEFT adapters for one.

    Adapters stay unmerged beside the weights: merging rounds in half precision. From here on this process
    attends without cuDNN, whose answers are wrong on some GPUs.

    Args:
        folder: what `save_pretrained` wrote, here or elsewhere.
        dtype: `auto` (the checkpoint's own), `float32`, `bfloat16` or `float16`.
        device: torch's name of a device; by default the accelerator where there is one.

    Raises:
        UserError: there is no such model, it is not a LlavaNext, it lacks weights, or the device can't compute it.
    """
    device = device or default_device()
    leave_out_cudnn_attention()
    if not Path(folder, ADAPTER_CONFIG).is_file():
        model = _load_whole(folder, dtype)
        processor_folder = Path(folder)
    else:
        base = adapted_base(folder)
        model = _load_adapters(_load_whole(base, dtype), folder)
        processor_folder = Path(folder if Path(folder, "processor_config.json").is_file() else base)
    try:
        processor = LlavaLlama31Processor.from_pretrained(processor_folder)
    except (OSError, ValueError) as error:
        what = f"has no processor of a LlavaNext: {error}"
        raise UserError(what, where=str(processor_folder), fix="export it again") from error
    placed: Any = model  # the decorator of `to` hides its arguments
    try:
        opened = placed.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"cannot go to device {device}: {reason}", where=str(folder), fix="pass --device cpu"
        ) from error
    refuse_unbuilt_gpu(model.device)
    return opened, processor


def _load_whole(folder: str | Path, dtype: str) -> LlavaLlama31ForConditionalGeneration:
    where = str(folder)
    if not Path(folder, "config.json").is_file():
        raise UserError("no config.json", where=where, fix="name a folder that save_pretrained or export wrote")
    model_type = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    if model_type != "llava_next":
        raise UserError(f"model_type is {model_type}, not llava_next", where=where, fix="assemble or export it first")
    try:
        with without_bars():  # compressed-tensors' own
            loaded: Any = LlavaLlama31ForConditionalGeneration.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, packable=True
            )
    except ImportError as error:  # of compressed-tensors, for a quantised folder
        fix = "pip install 'llava-llama31[quantize]'"
        raise UserError(f"is quantised: {error}", where=where, fix=fix) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot be opened as LlavaNext: {error}", where=where, fix="check the path") from error
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"lacks {len(missing)} weights, the first {missing[0]}", where=where, fix="export it again")
    if "quantization_config" in PreTrainedConfig.get_config_dict(folder)[0]:
        _decompress(model)
    return model


def _decompress(model: Any) -> None:
    """Give a quantised model's layers plain weights; they round activations as its scheme says.

    compressed-tensors would do so in the first forward pass, and wrap modules so that `generate` fails with images.
    """
    from compressed_tensors.compressors.base import decompress_module
    from compressed_tensors.quantization.utils import is_module_quantized

    for module in model.modules():
        if is_module_quantized(module):
            decompress_module(module)
    model.hf_quantizer.compressor.remove_decompression_hook(model)


def adapted_base(folder: str | Path) -> str:
    """Folder of the model that adapters were made for.

    Raises:
        UserError: the adapters name no base, or it does not exist.
    """
    where = str(Path(folder, ADAPTER_CONFIG))
    try:
        config = json.loads(Path(where).read_text(encoding="utf-8"))
        base, revision = config.get("base_model_name_or_path"), config.get("revision")
    except ValueError as error:
        raise UserError(f"not JSON: {error}", where=where, fix="save the adapters again") from error
    if not isinstance(base, str):
        raise UserError("names no base_model_name_or_path", where=where, fix="add the base model's folder or Hub id")
    named = f"{base}@{revision}" if revision and hub_id(base) == (base, None) else base
    return str(local_checkpoint(named, where=f"{where}: base_model_name_or_path"))


def _load_adapters(
    model: LlavaLlama31ForConditionalGeneration, folder: str | Path
) -> LlavaLlama31ForConditionalGeneration:
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise UserError("adapters need peft", where=str(folder), fix="pip install 'llava-llama31[peft]'") from error
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            raise UserError("these adapters are a prompt, not weights", where=str(folder), fix="evaluate LoRA or DoRA")
        adapted: Any = PeftModel(model, config)
        result = adapted.load_adapter(str(folder), "default")
        wrong = sorted([*result.missing_keys, *result.unexpected_keys])
        if wrong:
            raise ValueError(f"{len(wrong)} tensors are missing or unknown, the first {wrong[0]}")
        return adapted.get_base_model()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        what = f"the adapters do not fit their base model: {error}"
        raise UserError(what, where=str(folder), fix="name the base model they were trained on") from error
