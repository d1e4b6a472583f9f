"""Configuration of LLaVA-NeXT on Llama 3.1."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import LlamaConfig, LlavaNextConfig


class LlavaLlama31Config(LlavaNextConfig):
    """`LlavaNextConfig`, saved so that a folder opens through two doors.

    Fields, defaults and `model_type` are the stock ones. The saved file names the stock architecture, which opens
    without remote code, and maps the Auto classes to ours, which open with `trust_remote_code=True`.
    """

    if TYPE_CHECKING:  # the stock class also allows dicts and None, which it replaces when it is made
        text_config: LlamaConfig
        vision_config: Any

    def to_diff_dict(self) -> dict:
        # set here, not as attributes: values equal to a default would be left out of the file
        output = super().to_diff_dict()
        model_class = "modeling_llava_llama31.LlavaLlama31ForConditionalGeneration"
        output["architectures"] = ["LlavaNextForConditionalGeneration"]
        output["auto_map"] = {
            "AutoConfig": f"configuration_llava_llama31.{type(self).__name__}",
            # every Auto class that has stock's; its AutoModel would give a model without a head
            "AutoModel": model_class,
            "AutoModelForPreTraining": model_class,
            "AutoModelForImageTextToText": model_class,
            "AutoModelForMultimodalLM": model_class,
        }
        return output

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        if push_to_hub:
            raise ValueError(
                "push_to_hub is not supported: upload the saved folder with huggingface_hub.upload_folder"
            )
        super().save_pretrained(save_directory, **kwargs)
        shutil.copyfile(__file__, Path(save_directory, Path(__file__).name))


__all__ = ["LlavaLlama31Config"]
