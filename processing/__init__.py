"""Processor of LLaVA-NeXT on Llama 3.1."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .processing_llava_llama31 import (
        CHAT_TEMPLATE,
        CHAT_TOKENS,
        IGNORE_INDEX,
        IMAGE_TOKEN,
        PAD_TOKEN,
        STOP_TOKENS,
        Encoding,
        LlavaLlama31Processor,
        build_processor,
    )


__all__ = [
    "CHAT_TEMPLATE",
    "CHAT_TOKENS",
    "IGNORE_INDEX",
    "IMAGE_TOKEN",
    "PAD_TOKEN",
    "STOP_TOKENS",
    "Encoding",
    "LlavaLlama31Processor",
    "build_processor",
]


def __getattr__(name: str) -> Any:
    # lazy: what decodes images needs pixels_llava_llama31 and must not import torch
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.processing_llava_llama31"), name)
