"""Processor of LLaVA-NeXT on Llama 3.1."""

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
