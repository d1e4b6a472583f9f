"""Processor of LLaVA-NeXT on Llama 3.1: conversations and images -> token ids, labels and tiles.

It is Transformers' `LlavaNextProcessor` (same files, same attributes) with three additions: the Llama-3.1 chat
template below, ids and labels built turn by turn (`encode`), and a fast path to the tiles, bit-identical to
Transformers' PIL image processor (`tiles`). A folder that it saves also opens with the stock class, without this file.

Shapes: T tiles, H W the height and width of a tile, S tokens of a conversation.
"""

import json
import os
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from transformers import LlavaNextImageProcessor, LlavaNextProcessor, PreTrainedTokenizerBase
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_transforms import normalize, rescale
from transformers.image_utils import ChannelDimension


IGNORE_INDEX = -100
IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<|finetune_right_pad_id|>"
END_OF_TURN = "<|eot_id|>"
STOP_TOKENS = ("<|end_of_text|>", "<|eom_id|>", END_OF_TURN)
CHAT_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", PAD_TOKEN, *STOP_TOKENS)

# Llama-3.1 turns as in Meta's ChatFormat (llama_models/llama3/chat_format.py), without tools and dates.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception("unknown role '" + message['role'] + "': system, user or assistant") }}
    {%- endif %}
    {%- set turn = namespace(text='') %}
    {%- if message['content'] is string %}
        {%- set turn.text = message['content'] %}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}
                {%- set turn.text = turn.text + '<image>\\n' %}
            {%- elif part['type'] == 'text' %}
                {%- set turn.text = turn.text + part['text'] %}
            {%- else %}
                {{- raise_exception("unknown content type '" + part['type'] + "': image or text") }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- (turn.text | trim) + '<|eot_id|>' }}{%- endgeneration %}
    {%- else %}
        {{- (turn.text | trim) + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# an assistant turn that is not learnt from has "weight": 0
Message = dict  # {"role": str, "content": str | list[{"type": "image"} | {"type": "text", "text": str}]}


class Encoding(NamedTuple):
    """Token ids of one conversation and their labels: -100 except in assistant turns and their `<|eot_id|>`.

    An assistant turn with `"weight": 0` has no labels either.

    The first `num_prefix_tokens` end with the last image, before anything supervised: conversations about the same
    images share them. 0 without images, or with an image in a later turn.
    """

    input_ids: list[int]
    labels: list[int]
    num_prefix_tokens: int = 0

    @property
    def num_supervised_tokens(self) -> int:
        return sum(label != IGNORE_INDEX for label in self.labels)


class Placement(NamedTuple):
    """A resized image centred in its grid of tiles; all in pixels.

    Args:
        grid_height, grid_width: of all tiles together.
        top, left: of the resized image within the grid.
        height, width: of the resized image.
    """

    grid_height: int
    grid_width: int
    top: int
    left: int
    height: int
    width: int


class LlavaLlama31Processor(LlavaNextProcessor):
    """`LlavaNextProcessor` with the chat template, ids and labels of Llama 3.1.

    `__call__`, `apply_chat_template` and `decode` are the stock ones. With Llama's tokenizer, `encode` returns the
    same ids as `apply_chat_template`; it tokenises a header separately from what follows (like Meta's ChatFormat), so
    that training and generation agree with any tokenizer, and text that looks like a special token stays text.

    Raises:
        ValueError: from `encode`, if the numbers of images and of image parts in the messages differ.
    """

    @cached_property
    def tile_size(self) -> int:
        """Side of a tile in pixels."""
        return self.image_processor.crop_size["height"]

    @cached_property
    def _num_image_tokens(self) -> dict[tuple[int, int], int]:
        return {}

    def num_image_tokens(self, image_size: tuple[int, int]) -> int:
        """Number of placeholders of an image of (height, width) pixels; equals the model's feature count."""
        known = self._num_image_tokens
        if image_size not in known:
            height, width = image_size
            num_features = self._get_number_of_features(height, width, self.tile_size, self.tile_size)
            known[image_size] = num_features - (self.vision_feature_select_strategy == "default")
        return known[image_size]

    def num_tiles(self, image_size: tuple[int, int]) -> int:
        """Number of tiles of an image of (height, width) pixels, including the base tile."""
        height, width = select_best_resolution(image_size, self.image_processor.image_grid_pinpoints)
        return 1 + (height // self.tile_size) * (width // self.tile_size)

    def encode(self, messages: Sequence[Message], image_sizes: Sequence[tuple[int, int]] = ()) -> Encoding:
        """Ids and labels of a conversation; `image_sizes` are (height, width) in pixels, in order of appearance."""
        return self.encode_batch([messages], [image_sizes])[0]

    def encode_batch(
        self, conversations: Sequence[Sequence[Message]], image_sizes: Sequence[Sequence[tuple[int, int]]]
    ) -> list[Encoding]:
        """`encode` many conversations with one call of the tokenizer."""
        # each distinct string once: headers and short answers repeat
        texts: dict[str, list[int]] = {"\n\n": []}
        for messages in conversations:
            for message in messages:
                texts[message["role"]] = []
                texts.update((segment, []) for segment in _segments(message) if segment)
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
        )
        texts = dict(zip(texts, encoded["input_ids"], strict=True))
        return [self._join(m, s, texts) for m, s in zip(conversations, image_sizes, strict=True)]

    def encode_prompt(self, messages: Sequence[Message], image_sizes: Sequence[tuple[int, int]] = ()) -> list[int]:
        """Ids of a conversation that ends with the header of the assistant's turn, ready to generate from."""
        return self.encode(messages, image_sizes).input_ids + self._header("assistant", self._header_texts)

    def placement(self, image_size: tuple[int, int]) -> Placement:
        """Where an image of (height, width) pixels is placed in its grid of tiles."""
        best = select_best_resolution(image_size, self.image_processor.image_grid_pinpoints)
        # only the shape of this array is used
        height, width = get_patch_output_size(np.empty((3, *image_size), bool), best, "channels_first")
        top, left = (best[0] - height) // 2, (best[1] - width) // 2
        return Placement(best[0], best[1], top, left, height, width)

    def tiles(self, image: Image.Image) -> np.ndarray:
        """Base tile and anyres tiles of an image: float32 (T, 3, H, W), bit-identical to the PIL image processor's."""
        size, resample = self.tile_size, self.image_processor.resample
        image = image.convert("RGB")
        place = self.placement((image.height, image.width))
        canvas = np.zeros((place.grid_height, place.grid_width, 3), np.uint8)
        rows, columns = slice(place.top, place.top + place.height), slice(place.left, place.left + place.width)
        canvas[rows, columns] = np.asarray(image.resize((place.width, place.height), resample))
        grid = canvas.reshape(place.grid_height // size, size, place.grid_width // size, size, 3)
        grid = grid.transpose(0, 2, 4, 1, 3).reshape(-1, 3, size, size)
        base = np.asarray(image.resize((size, size), resample)).transpose(2, 0, 1)[None]
        tiles = np.concatenate([base, grid])
        values = np.empty(tiles.shape, np.float32)
        for tile in range(len(tiles)):
            for channel, table in enumerate(self.pixel_levels):
                # no uint8 is out of range: `clip` only avoids a slow check
                np.take(table, tiles[tile, channel], out=values[tile, channel], mode="clip")
        return values

    @cached_property
    def pixel_levels(self) -> np.ndarray:
        """float32 (3, 256): each uint8 value of a channel after rescaling and normalising."""
        ip = self.image_processor
        levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
        if ip.do_rescale:
            first = ChannelDimension.FIRST
            levels = rescale(levels, ip.rescale_factor, data_format=first, input_data_format=first)
        if ip.do_normalize:
            levels = normalize(levels, ip.image_mean, ip.image_std, input_data_format=ChannelDimension.FIRST)
        return np.asarray(levels, np.float32)[:, 0]

    @cached_property
    def _header_texts(self) -> dict[str, list[int]]:
        return {text: self.tokenizer.encode(text, add_special_tokens=False) for text in ("\n\n", "assistant")}

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: self.tokenizer.convert_tokens_to_ids(token) for token in CHAT_TOKENS}

    def _header(self, role: str, texts: dict[str, list[int]]) -> list[int]:
        return [self._ids["<|start_header_id|>"], *texts[role], self._ids["<|end_header_id|>"], *texts["\n\n"]]

    def _join(
        self, messages: Sequence[Message], image_sizes: Sequence[tuple[int, int]], texts: dict[str, list[int]]
    ) -> Encoding:
        segments = [_segments(message) for message in messages]
        num_images = sum(segment is None for turn in segments for segment in turn)
        if num_images != len(image_sizes):
            raise ValueError(
                f"the messages contain {num_images} images, but {len(image_sizes)} image sizes were given"
            )
        sizes = iter([(height, width) for height, width in image_sizes])
        input_ids = [self._ids["<|begin_of_text|>"]]
        labels = [IGNORE_INDEX]
        num_prefix_tokens, num_images_left = 0, num_images
        for message, turn in zip(messages, segments, strict=True):
            header = self._header(message["role"], texts)
            content: list[int] = []
            for segment in turn:
                if segment is None:
                    content += [self.image_token_id] * self.num_image_tokens(next(sizes))
                    num_images_left -= 1
                    if num_images_left == 0:
                        num_prefix_tokens = len(input_ids) + len(header) + len(content)
                elif segment:
                    content += texts[segment]
            content.append(self._ids[END_OF_TURN])
            if message["role"] == "assistant" and num_images_left:
                num_images_left = 0
            input_ids += header + content
            labels += [IGNORE_INDEX] * len(header)
            is_learnt = message["role"] == "assistant" and message.get("weight", 1) != 0
            labels += content if is_learnt else [IGNORE_INDEX] * len(content)
        return Encoding(input_ids, labels, num_prefix_tokens)

    def to_dict(self) -> dict:
        output = super().to_dict()
        output["processor_class"] = LlavaNextProcessor.__name__
        output["image_processor"]["image_processor_type"] = "LlavaNextImageProcessor"
        output["auto_map"] = {"AutoProcessor": f"{Path(__file__).stem}.{type(self).__name__}"}
        return output

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Save so that both the stock class (without remote code) and this one (with it) open the folder."""
        files = super().save_pretrained(save_directory, push_to_hub=False, **kwargs)
        tokenizer_config = Path(save_directory, "tokenizer_config.json")
        config = json.loads(tokenizer_config.read_text(encoding="utf-8"))
        config["processor_class"] = LlavaNextProcessor.__name__
        config.pop("auto_map", None)
        tokenizer_config.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        shutil.copyfile(__file__, Path(save_directory, Path(__file__).name))
        if push_to_hub:
            raise ValueError(
                "push_to_hub is not supported: upload the saved folder with huggingface_hub.upload_folder"
            )
        return files


def _segments(message: Message) -> list[str | None]:
    """A turn as the template renders it, split at its images (None) and trimmed like the template trims it."""
    content = message["content"]
    if isinstance(content, str):
        return [content.strip()]
    segments: list[str | None] = [""]
    for part in content:
        if part["type"] == "image":
            segments += [None, "\n"]
        else:
            segments[-1] += part["text"]
    if segments[0] is not None:
        segments[0] = segments[0].lstrip()
    if segments[-1] is not None:
        segments[-1] = segments[-1].rstrip()
    return segments


def build_processor(
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_size: int,
    patch_size: int,
    image_mean: Sequence[float],
    image_std: Sequence[float],
    image_grid_pinpoints: Sequence[Sequence[int]],
    resample: int = Image.Resampling.BICUBIC,
) -> LlavaLlama31Processor:
    """Build the processor for a vision tower with a CLS token and a Llama-3.1 tokenizer, adding `<image>` to it.

    Args:
        tokenizer: a fast tokenizer with Llama 3.1's special tokens; changed in place.
        image_size: side of a tile in pixels.
        patch_size: side of a patch in pixels.
        image_mean, image_std: per channel, on pixel values in [0, 1].
        image_grid_pinpoints: (height, width) in pixels of the resolutions that an image may be tiled at.
        resample: PIL's code for the filter.

    Raises:
        ValueError: the tokenizer lacks chat tokens; names them.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in CHAT_TOKENS if token not in vocabulary]
    if missing:
        raise ValueError(f"the tokenizer lacks {', '.join(missing)}: it is not a Llama-3.1 tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    tokenizer.bos_token, tokenizer.pad_token, tokenizer.eos_token = "<|begin_of_text|>", PAD_TOKEN, END_OF_TURN
    tokenizer.padding_side = "left"
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(image_mean),
        image_std=list(image_std),
        image_grid_pinpoints=[list(pinpoint) for pinpoint in image_grid_pinpoints],
        resample=int(resample),
    )
    return LlavaLlama31Processor(
        image_processor,
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )
