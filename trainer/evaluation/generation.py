"""Greedy answers to questions about images: each image read once, its questions as branches of one prefix.

A prompt is cut behind its last image placeholder. What is before, the prefix, is the same for all questions about an
image: it goes through the vision tower and the language model once. Short prefixes share a packed row, in which none
sees another. The questions then continue from copies of their keys and values in batches. Exact: every position sees
what it would in a row of its own, and masked positions weigh zero.

Shapes: B rows, P positions of the longest prefix, S of the longest question, N new tokens, T tiles, H W a tile in
pixels.
"""

from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Cache, DynamicCache, LlavaNextForConditionalGeneration
from transformers.cache_utils import DynamicLayer

from llava_llama31 import LlavaLlama31ForConditionalGeneration
from llava_llama31.packed_llama_llava_llama31 import CACHE_NAME, LlavaLlama31TextModel, to_device
from llava_llama31.processing import CHAT_TOKENS, STOP_TOKENS, LlavaLlama31Processor
from llava_llama31.processing.pixels_llava_llama31 import upright_rgb
from llava_llama31.trainer.distributed.devices import total_memory
from llava_llama31.trainer.errors import UserError


STEPS_BETWEEN_SYNCS = 4
# prefixes are read together up to so many positions: products of few rows wait for the weights
POSITIONS_OF_A_ROW = 2048
# positions that a CPU takes through the vision tower at once: more do not stay in its cache between two operations
TOWER_POSITIONS_ON_CPU = 1024
LARGEST_BATCH_SIZE_ON_CPU, LARGEST_BATCH_SIZE, POSITIONS_OF_A_QUESTION = 16, 64, 256


# picks the next ids (B,) from logits (B, vocabulary) in float32
Choice = Callable[[torch.Tensor], torch.Tensor]


# keys and values (1, heads, P, head size) of each layer
Prefix = Sequence[tuple[torch.Tensor, torch.Tensor]]
# what a prefix is kept under: the `id` of each array of tiles, and its token ids
_PrefixKey = tuple[tuple[int, ...], tuple[int, ...]]


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """Greedy decoding."""
    return logits.argmax(dim=-1)


@dataclass(frozen=True, eq=False)
class Prompt:
    """One conversation, ready to be answered.

    Args:
        input_ids: token ids, image placeholders expanded, ending with the assistant's header.
        tiles: float32 (tiles, 3, H, W) of each image; prompts that share these very arrays share their prefix.
        image_sizes: (height, width) in pixels of each image.
    """

    input_ids: list[int]
    tiles: tuple[np.ndarray, ...]
    image_sizes: tuple[tuple[int, int], ...]


class Prefixes:
    """Keys and values of prefixes that have been read, for the questions that still ask for them.

    Args:
        most: how many are kept at once; the one that was used the longest time ago makes room.
    """

    def __init__(self, most: int = 1):
        self.most = most
        # with the prompts: an array that is freed may give its id to another
        self._kept: dict[Hashable, tuple[Prompt, Prefix]] = {}

    def get(self, key: Hashable) -> Prefix | None:
        """What is kept under a key."""
        if key not in self._kept:
            return None
        self._kept[key] = self._kept.pop(key)  # the youngest now
        return self._kept[key][1]

    def make_room(self, num_prefixes: int = 1) -> None:
        """Free the oldest prefixes, to make room for further ones before these are read."""
        while self._kept and len(self._kept) + num_prefixes > self.most:
            del self._kept[next(iter(self._kept))]

    def put(self, key: Hashable, prompt: Prompt, prefix: Prefix) -> None:
        """Keep a prefix. It is a view: a row's memory is freed with the last of the prefixes read in it."""
        self.make_room()
        self._kept[key] = prompt, prefix

    def release(self, tiles: np.ndarray) -> None:
        """Free the prefixes that show these tiles."""
        for key, (prompt, _) in list(self._kept.items()):
            if any(shown is tiles for shown in prompt.tiles):
                del self._kept[key]


class GreedyAnswerer:
    """Answers prompts, greedy whatever the checkpoint's own sampling settings say.

    Args:
        model: LlavaNext in eval mode (see `undisturbed`), on one device.
        processor: for prompts with Llama-3.1's special tokens its own ids; other tokenizers go by their chat template.
        max_new_tokens: length at which an answer is cut.
        batch_invariant: read and answer one by one, so that no sum depends on what stands beside a prompt.
        forward: what to call instead of `model`: its sharded form, whose ranks must all answer the same prompts.
        prefixes: where several answerers of one model keep what they have read. Default: the last prefix alone.

    Source: the search is that of `transformers.generation.GenerationMixin.generate` with `do_sample=False`.
    """

    def __init__(
        self,
        model: LlavaNextForConditionalGeneration,
        processor: LlavaLlama31Processor,
        *,
        max_new_tokens: int = 64,
        batch_invariant: bool = False,
        forward: torch.nn.Module | None = None,
        prefixes: Prefixes | None = None,
    ):
        vocabulary = processor.tokenizer.get_vocab()
        self.model = model
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.batch_invariant = batch_invariant
        self.stop_ids = _stop_ids(model, processor)
        self._forward = forward or model
        # ranks of a sharded model must call it equally often, whatever each of them reads out of its numbers
        self.in_step = forward is not None
        self._encodes_llama31 = all(token in vocabulary for token in CHAT_TOKENS)
        # a GPU is asked now and then: each question makes the host wait
        self._steps_between_syncs = STEPS_BETWEEN_SYNCS if model.device.type != "cpu" else 1
        self._prefixes = prefixes or Prefixes()
        text = model.config.get_text_config()
        self._reads_packed = (
            isinstance(model, LlavaLlama31ForConditionalGeneration)
            and isinstance(model.model.language_model, LlavaLlama31TextModel)
            and not text.attention_dropout
        )
        window = text.to_dict().get("sliding_window")
        if window is not None and window < text.max_position_embeddings:
            what = f"the language model has a sliding window of {window} positions, which branches do not respect"
            raise UserError(what, fix="evaluate a model with full attention")

    def prompt(self, messages: list[dict[str, Any]], images: Sequence[Image.Image] = ()) -> Prompt:
        """Tokens and tiles of a conversation whose image parts are `images`, in order."""
        upright = [upright_rgb(image) for image in images]
        tiles = [self.processor.tiles(image) for image in upright]
        return self.prompt_from_tiles(messages, tiles, [(image.height, image.width) for image in upright])

    def prompt_from_tiles(
        self,
        messages: list[dict[str, Any]],
        tiles: Sequence[np.ndarray],
        image_sizes: Sequence[tuple[int, int]],
    ) -> Prompt:
        """`prompt` for images that are already cut into tiles."""
        sizes = tuple(image_sizes)
        encode = self.processor.encode_prompt if self._encodes_llama31 else self._encode_by_template
        return Prompt(encode(messages, sizes), tuple(tiles), sizes)

    def auto_batch_size(self, num_image_tokens: int) -> int:
        """Prompts to answer at once: what half the memory beside the weights holds of keys and values.

        64 at most, and 16 on a CPU, where more gain nothing.
        """
        largest = LARGEST_BATCH_SIZE_ON_CPU if self.model.device.type == "cpu" else LARGEST_BATCH_SIZE
        text = self.model.config.get_text_config()
        positions = num_image_tokens + POSITIONS_OF_A_QUESTION + self.max_new_tokens
        # Qwen2's configurations have no head_dim
        head_size = text.to_dict().get("head_dim") or text.hidden_size // text.num_attention_heads
        per_position = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size * self.model.dtype.itemsize
        # twice: the prefix of an image and its copy in the batch
        row = 2 * positions * per_position
        free = total_memory(self.model.device) - self.model.get_memory_footprint()
        return max(1, min(largest, int(free / 2 / row)))

    @torch.no_grad()
    def answer(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Generated ids of each prompt, the stop id included where one was reached."""
        prefixes = self._read(prompts)
        rows = 1 if self.batch_invariant else len(prompts)
        answers: list[list[int]] = []
        for start in range(0, len(prompts), rows):
            answers += self._branches(prompts[start : start + rows], prefixes[start : start + rows])
        return answers

    def text(self, token_ids: Sequence[int]) -> str:
        """Answer as text, stripped, without stop and special tokens."""
        ids = [token_id for token_id in token_ids if token_id not in self.stop_ids]
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _prefix_length(self, prompt: Prompt) -> int:
        """Positions up to the last image placeholder; without an image all but the last."""
        if not prompt.tiles:
            return len(prompt.input_ids) - 1
        return len(prompt.input_ids) - prompt.input_ids[::-1].index(self.processor.image_token_id)

    def _prefix_key(self, prompt: Prompt) -> _PrefixKey:
        return tuple(map(id, prompt.tiles)), tuple(prompt.input_ids[: self._prefix_length(prompt)])

    def _read(self, prompts: Sequence[Prompt]) -> list[Prefix]:
        """The prefix of each prompt; prompts may share it."""
        keys = [self._prefix_key(prompt) for prompt in prompts]
        prefixes = {key: kept for key in keys if (kept := self._prefixes.get(key)) is not None}
        unread = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in prefixes}
        for row in self._rows(list(unread)):
            self._prefixes.make_room(len(row))
            for key, prefix in zip(row, self._read_row([unread[key] for key in row]), strict=True):
                prefixes[key] = prefix
                self._prefixes.put(key, unread[key], prefix)
        return [prefixes[key] for key in keys]

    def _rows(self, keys: Sequence[_PrefixKey]) -> Iterator[list[_PrefixKey]]:
        """Prefixes to read together: as many as fit into POSITIONS_OF_A_ROW, or a longer one by itself."""
        row: list[_PrefixKey] = []
        for key in keys:
            num_positions = sum(len(ids) for _, ids in (*row, key))
            if row and (not self._reads_packed or self.batch_invariant or num_positions > POSITIONS_OF_A_ROW):
                yield row
                row = []
            row.append(key)
        if row:
            yield row

    def _read_row(self, prompts: Sequence[Prompt]) -> list[Prefix]:
        """The prefixes of these prompts, read in one packed row, as views of its keys and values."""
        device = self.model.device
        lengths = list(map(self._prefix_length, prompts))
        ids = torch.tensor([[i for prompt, n in zip(prompts, lengths, strict=True) for i in prompt.input_ids[:n]]])
        tiles = [tile for prompt in prompts for tile in prompt.tiles]
        sizes = [size for prompt in prompts for size in prompt.image_sizes]
        images: dict[str, Any] = {}
        if tiles:
            pixel_values = torch.from_numpy(np.concatenate(tiles)).to(self.model.dtype)
            images = {
                "pixel_values": to_device(pixel_values, device),
                "image_sizes": torch.tensor(sizes),  # on the CPU: the model reads its numbers one by one
            }
        cache = DynamicCache()
        if self._reads_packed:  # the last layer then gives its keys and values alone
            images |= {"packing": [[n] for n in lengths]}
            images["position_ids"] = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
            images["image_sizes"] = sizes
            placeholders = (ids[0] == self.processor.image_token_id).nonzero()[:, 0]
            images["image_positions"] = to_device(placeholders, device)
            if tiles and device.type == "cpu" and not self.in_step:
                images["image_features"] = self._tower_features(images.pop("pixel_values"))
                images["has_features"] = [True] * len(sizes)
        else:
            images |= {"use_cache": True, "logits_to_keep": 1}
        self._forward(input_ids=to_device(ids, device), **{CACHE_NAME: cache}, **images)
        layers: list[Any] = cache.layers
        parts = [zip(*(x.split(lengths, dim=2) for x in (layer.keys, layer.values)), strict=True) for layer in layers]
        return list(zip(*parts, strict=True))

    def _tower_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The projector's input for tiles (T, 3, H, W), a few tiles at a time."""
        num_tiles = TOWER_POSITIONS_ON_CPU // (self.processor.tile_size // self.processor.patch_size) ** 2
        return torch.cat([self.model.model.tile_features(part) for part in pixel_values.split(max(1, num_tiles))])

    @torch.no_grad()
    def stream(self, prompt: Prompt, choose: Choice = most_likely) -> Iterator[int]:
        """Generated ids of one prompt as they come, without the stop id.

        Args:
            choose: picks the next ids (B,) from logits (B, vocabulary); by default those of `answer`.
        """
        for (token_id,) in self._steps([prompt], self._read([prompt]), choose):
            if int(token_id) in self.stop_ids:
                return
            yield int(token_id)

    def _branches(self, prompts: Sequence[Prompt], prefixes: Sequence[Prefix]) -> list[list[int]]:
        """Answers of prompts whose prefixes have been read; a row whose answer has ended leaves the batch."""
        answers: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))  # the prompt of each row
        chosen: list[torch.Tensor] = []  # ids that the host has not read yet
        kept: list[int] | None = None
        steps = self._steps(prompts, prefixes, most_likely)
        for step in range(1, self.max_new_tokens + 1):
            chosen.append(steps.send(kept))
            kept = None
            if step < self.max_new_tokens and (self.in_step or step % self._steps_between_syncs):
                continue
            for row, ids in zip(rows, torch.stack(chosen, dim=1).tolist(), strict=True):
                answers[row] = self._until_stop(answers[row] + ids)
            chosen = []
            kept = _close_gaps([answers[row][-1] not in self.stop_ids for row in rows])
            rows = [rows[place] for place in kept]
            if not rows:
                break
        return answers

    def _steps(
        self, prompts: Sequence[Prompt], prefixes: Sequence[Prefix], choose: Choice
    ) -> Generator[torch.Tensor, list[int] | None, None]:
        """The next ids (B,) of every row, N times: columns of P prefix, S question and N new positions.

        Sent the places of rows, it continues with these, in their order.
        """
        device = self.model.device
        past = [prefix[0][0].shape[2] for prefix in prefixes]
        questions = [prompt.input_ids[length:] for prompt, length in zip(prompts, past, strict=True)]
        num_past, num_asked = max(past), max(map(len, questions))
        input_ids = torch.zeros((len(prompts), num_asked), dtype=torch.long)
        position_ids = torch.zeros_like(input_ids)
        visible = torch.ones((len(prompts), num_past + num_asked + self.max_new_tokens), dtype=torch.bool)
        for row, (length, ids) in enumerate(zip(past, questions, strict=True)):
            start = num_asked - len(ids)
            input_ids[row, start:] = torch.tensor(ids)
            position_ids[row, start:] = torch.arange(length, length + len(ids))
            visible[row, length : num_past + start] = False
        input_ids, position_ids, visible = (to_device(x, device) for x in (input_ids, position_ids, visible))
        cache = _BranchCache(prefixes, num_past, num_asked + self.max_new_tokens)
        for step in range(self.max_new_tokens):
            num_keys = num_past + num_asked + step
            output = self._forward(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=self._mask(visible[:, :num_keys], input_ids.shape[1]),
                use_cache=True,
                logits_to_keep=1,
                **{CACHE_NAME: cache},
            )
            token_ids = choose(output.logits[:, -1].float())
            position_ids = position_ids[:, -1:] + 1
            kept = yield token_ids
            if kept is not None and len(kept) < len(token_ids):
                cache.keep(kept)
                places = to_device(kept, device)
                token_ids, position_ids, visible = (x[places] for x in (token_ids, position_ids, visible))
            input_ids = token_ids[:, None]

    def _mask(self, visible: torch.Tensor, num_queries: int) -> torch.Tensor:
        """Attention mask of the last `num_queries` columns: (B, 1, queries, keys), or (B, keys) for other backends.

        Ready-made for sdpa: given the two-dimensional form, Transformers asks the device whether it is all ones.
        """
        if self.model.config.get_text_config()._attn_implementation != "sdpa":
            return visible.long()
        num_keys = visible.shape[1]
        causal = torch.ones((num_queries, num_keys), dtype=torch.bool, device=visible.device)
        return visible[:, None, None] & causal.tril(num_keys - num_queries)

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
        placed: list[tuple[int, int]] = []
        ids: list[int] = []
        for token_id in tokenizer.encode(text, add_special_tokens=not has_bos):
            is_image = token_id == self.processor.image_token_id
            if is_image and len(placed) == len(image_sizes):
                raise ValueError("the text itself holds an image placeholder")
            if is_image:
                placed.append(image_sizes[len(placed)])
            ids += [token_id] * (self.processor.num_image_tokens(placed[-1]) if is_image else 1)
        return ids


class _BranchLayer(DynamicLayer):
    """Keys and values of one layer in tensors that have room for all that will come.

    Args:
        prefixes: keys and values, each (1, heads, positions, head size), of every row.
        num_past: positions that the longest prefix has.
        room: positions that will be added.
    """

    def __init__(self, prefixes: Sequence[tuple[torch.Tensor, torch.Tensor]], num_past: int, room: int):
        super().__init__()
        first = prefixes[0][0]
        shape = (len(prefixes), first.shape[1], num_past + room, first.shape[3])
        self._keys, self._values = first.new_empty(shape), first.new_empty(shape)
        for row, both in enumerate(prefixes):
            for kept, read in zip((self._keys, self._values), both, strict=True):
                kept[row, :, : read.shape[2]] = read[0]
                kept[row, :, read.shape[2] : num_past] = 0  # a masked key weighs zero only if it is finite
        self.dtype, self.device, self.is_initialized = first.dtype, first.device, True
        self._grow_to(num_past)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start, end = self._length, self._length + key_states.shape[2]
        self._keys[:, :, start:end], self._values[:, :, start:end] = key_states, value_states
        return self._grow_to(end)

    def keep(self, rows: Sequence[int]) -> None:
        """`_BranchCache.keep`, in place: each row comes from behind all that are kept, or stays."""
        for kept in (self._keys, self._values):
            for place, row in enumerate(rows):
                if place != row:
                    kept[place, :, : self._length] = kept[row, :, : self._length]
        self._keys, self._values = self._keys[: len(rows)], self._values[: len(rows)]
        self._grow_to(self._length)

    def _grow_to(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._length = length
        self.keys, self.values = self._keys[:, :, :length], self._values[:, :, :length]
        return self.keys, self.values


class _BranchCache(Cache):
    """One row per prefix, each padded on the right to `num_past` positions, with room for more."""

    def __init__(self, prefixes: Sequence[Prefix], num_past: int, room: int):
        self._branches = [_BranchLayer(layer, num_past, room) for layer in zip(*prefixes, strict=True)]
        super().__init__(layers=[*self._branches])

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order, as `_close_gaps` names them."""
        for layer in self._branches:
            layer.keep(rows)


def _close_gaps(kept: Sequence[bool]) -> list[int]:
    """The rows that are kept, the last ones in the places of those that are not: few rows move."""
    rows = [row for row, is_kept in enumerate(kept) if is_kept]
    behind = [row for row in rows if row >= len(rows)]
    return [row if kept[row] else behind.pop() for row in range(len(rows))]


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into eval mode; afterwards every module's mode and torch's random state are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({parameter.device for parameter in model.parameters() if parameter.device.type != "cpu"}, key=str)
    with torch.random.fork_rng(devices=devices, device_type=devices[0].type if devices else "cuda"):
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


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
