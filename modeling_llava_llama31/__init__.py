"""LLaVA-NeXT on Llama 3.1: config, model and processor."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from llava_llama31.processing import LlavaLlama31Processor

    from .configuration_llava_llama31 import LlavaLlama31Config
    from .modeling_llava_llama31 import LlavaLlama31ForConditionalGeneration, LlavaLlama31Model

__version__ = "0.1.0"
__all__ = [
    "LlavaLlama31Config",
    "LlavaLlama31ForConditionalGeneration",
    "LlavaLlama31Model",
    "LlavaLlama31Processor",
]

_HOMES = {
    "LlavaLlama31Config": "llava_llama31.configuration_llava_llama31",
    "LlavaLlama31ForConditionalGeneration": "llava_llama31.modeling_llava_llama31",
    "LlavaLlama31Model": "llava_llama31.modeling_llava_llama31",
    "LlavaLlama31Processor": "llava_llama31.processing",
}


def __getattr__(name: str) -> Any:
    # lazy: the command line must answer --help without importing torch
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
