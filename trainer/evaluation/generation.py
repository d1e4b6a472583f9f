"""Batched greedy answers to questions about pictures, on Transformers' own `generate`.

Shapes: B rows, S positions of the longest prompt, T tiles of all pictures of a batch, H W a tile in pixels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import GenerationConfig, LlavaNextForConditionalGeneration, PreTrainedConfig

from llava_llama31 import LlavaLlama31ForConditionalGeneration
from llava_llama31.processing import CHAT_TOKENS, STOP_TOKENS, LlavaLlama31Processor
from llava_llama31.trainer.errors import UserError


@dataclass(frozen=True, eq=False)
class Prompt:
    """One conversation, ready to be answered.

    Args:
        input_ids: token ids, image placeholders expanded, ending with the assistant's header.
        tiles: float32 (tiles of its pictures, 3, H, W).
        image_sizes: (height, width) in pixels of each picture.
    """

    input_ids: list[int]
    tiles: np.ndarray
    image_sizes: tuple[tuple[int, int], ...]


class GreedyAnswerer:
    """Answers prompts in batches: left-padded, greedy whatever the checkpoint's own sampling settings say.

    Args:
        model: LlavaNext in eval mode (see `undisturbed`), on one device.
        processor: for prompts with Llama-3.1's special tokens its own ids; other tokenizers go by their chat template.
        max_new_tokens: length at which an answer is cut.

    Source: `transformers.generation.GenerationMixin.generate`.
    """

    def __init__(
        self,
        model: LlavaNextForConditionalGeneration,
        processor: LlavaLlama31Processor,
        *,
        max_new_tokens: int = 16,
    ):
        vocabulary = processor.tokenizer.get_vocab()
        self.model = model
        self.processor = processor
        self.stop_ids = _stop_ids(model, processor)
        self._encodes_llama31 = all(token in vocabulary for token in CHAT_TOKENS)
        pad_id = processor.tokenizer.pad_token_id
        self.pad_id = min(self.stop_ids) if pad_id is None else pad_id
        # every setting that bends a greedy search is named: `generate` fills what is None from the checkpoint
        self._settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            min_new_tokens=0,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            temperature=1.0,
            top_k=50,
            top_p=1.0,
            use_cache=True,
            return_dict_in_generate=False,
            eos_token_id=self.stop_ids,
            pad_token_id=self.pad_id,
        )

    def prompt(self, messages: list[dict[str, Any]], images: Sequence[Image.Image] = ()) -> Prompt:
        """Tokens and tiles of a conversation whose image parts are `images`, in order."""
        tiles = [self.processor.tiles(image) for image in images]
        return self.prompt_from_tiles(messages, tiles, [(image.height, image.width) for image in images])

    def prompt_from_tiles(
        self,
        messages: list[dict[str, Any]],
        tiles: Sequence[np.ndarray],
        image_sizes: Sequence[tuple[int, int]],
    ) -> Prompt:
        """`prompt` for pictures that are already cut into tiles."""
        sizes = tuple(image_sizes)
        encode = self.processor.encode_prompt if self._encodes_llama31 else self._encode_by_template
        size = self.processor.image_processor.crop_size
        empty = np.zeros((0, 3, size["height"], size["width"]), np.float32)
        return Prompt(encode(messages, sizes), np.concatenate([empty, *tiles]), sizes)

    def answer(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Generated ids of each prompt, the stop id included where one was reached."""
        longest = max(len(prompt.input_ids) for prompt in prompts)
        input_ids = torch.full((len(prompts), longest), self.pad_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            start = longest - len(prompt.input_ids)
            input_ids[row, start:] = torch.tensor(prompt.input_ids)
            attention_mask[row, start:] = 1
        device = self.model.device
        images: dict[str, Any] = {}
        image_sizes = [size for prompt in prompts for size in prompt.image_sizes]
        if image_sizes:
            tiles = torch.from_numpy(np.concatenate([prompt.tiles for prompt in prompts]))
            images = {
                "pixel_values": tiles.to(device, self.model.dtype),
                "image_sizes": torch.tensor(image_sizes),  # on the CPU: the model reads its numbers one by one
            }
        generated = self.model.generate(  # type: ignore[misc]
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=self._settings,
            **images,
        )
        return [self._until_stop(row) for row in generated[:, longest:].tolist()]

    def text(self, token_ids: Sequence[int]) -> str:
        """Answer as text, stripped, without stop and special tokens."""
        ids = [token_id for token_id in token_ids if token_id not in self.stop_ids]
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _until_stop(self, token_ids: list[int]) -> list[int]:
        for position, token_id in enumerate(token_ids):
            if token_id in self.stop_ids:
                return token_ids[: position + 1]
        return token_ids

    def _encode_by_template(self, messages: list[dict[str, Any]], image_sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Ids by the tokenizer's own chat template, as the stock processor builds them."""
        tokenizer = self.processor.tokenizer
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        sizes = iter(image_sizes)
        ids: list[int] = []
        for token_id in tokenizer.encode(text, add_special_tokens=not has_bos):
            is_image = token_id == self.processor.image_token_id
            ids += [token_id] * (self.processor.num_image_tokens(next(sizes)) if is_image else 1)
        return ids


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into eval mode; afterwards every module's mode and torch's random state are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


def load_model(
    folder: str | Path, *, dtype: str = "auto", device: str | None = None
) -> tuple[LlavaLlama31ForConditionalGeneration, LlavaLlama31Processor]:
    """Open any folder that stock Transformers opens as LlavaNext.

    Args:
        folder: what `save_pretrained` wrote, here or elsewhere.
        dtype: `auto` (the checkpoint's own), `float32`, `bfloat16` or `float16`.
        device: torch's name of a device; by default the GPU where there is one.

    Raises:
        UserError: there is no such model, or it is not a LlavaNext.
    """
    where = str(folder)
    if not Path(folder, "config.json").is_file():
        raise UserError("no config.json", where=where, fix="name a folder that save_pretrained or export wrote")
    model_type = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    if model_type != "llava_next":
        raise UserError(f"model_type is {model_type}, not llava_next", where=where, fix="assemble or export it first")
    try:
        loaded: Any = LlavaLlama31ForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
        processor = LlavaLlama31Processor.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot be opened as LlavaNext: {error}", where=where, fix="check the path") from error
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"lacks {len(missing)} weights, the first {missing[0]}", where=where, fix="export it again")
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), processor


def _stop_ids(model: LlavaNextForConditionalGeneration, processor: LlavaLlama31Processor) -> list[int]:
    """Ids that end an answer: the checkpoint's own, the tokenizer's, and Llama 3.1's three where they exist."""
    vocabulary, tokenizer = processor.tokenizer.get_vocab(), processor.tokenizer
    own = model.generation_config.eos_token_id
    ids = {vocabulary[token] for token in STOP_TOKENS if token in vocabulary}
    ids.update([own] if isinstance(own, int) else own or [])
    ids.update([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
    if not ids:
        raise UserError("the model names no end-of-turn token", fix="set eos_token_id in generation_config.json")
    return sorted(ids)
