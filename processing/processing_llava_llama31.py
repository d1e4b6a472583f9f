"""Processor of LLaVA-NeXT on Llama 3.1: conversations and images -> token ids, labels and tiles.

It is Transformers' `LlavaNextProcessor` (same files, same attributes) with three additions: the Llama-3.1 chat
template below, ids and labels built turn by turn (`encode`), and a fast path to the tiles, bit-identical to
Transformers' PIL image processor (`tiles`). Images become pixels in `pixels_llava_llama31` alone, at every door. A
folder that it saves also opens with the stock class, without this file.

Shapes: T tiles, H W the height and width of a tile, S tokens of a conversation.
"""

import json
import os
import shutil
from base64 import b64decode
from collections.abc import Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor, PreTrainedTokenizerBase
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_transforms import normalize, rescale
from transformers.image_utils import ChannelDimension
from transformers.utils import logging

from .pixels_llava_llama31 import upright_rgb


logger = logging.get_logger(__name__)

IGNORE_INDEX = -100
IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<|finetune_right_pad_id|>"
END_OF_TURN = "<|eot_id|>"
STOP_TOKENS = ("<|end_of_text|>", "<|eom_id|>", END_OF_TURN)
CHAT_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", PAD_TOKEN, *STOP_TOKENS)

# Llama-3.1 turns as in Meta's ChatFormat (llama_models/llama3/chat_format.py), without tools and dates.
CHAT_TEMPLATE = """\
{%- if tools %}
    {{- raise_exception("tools= is not supported: describe the tools in the system turn") }}
{%- endif %}
{%- if documents %}
    {{- raise_exception("documents= is not supported: write them into the user's turn") }}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'developer' %}
        {{- raise_exception("role 'developer' is not supported: name it system") }}
    {%- elif message['role'] in ['tool', 'ipython', 'function'] %}
        {{- raise_exception("role '" + message['role'] + "' is not supported: write the result into a user's turn") }}
    {%- elif message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception("unknown role '" ~ message['role'] ~ "': system, user or assistant") }}
    {%- endif %}
    {%- if message['tool_calls'] or message['function_call'] %}
        {{- raise_exception("tool_calls are not supported: write the call into the content") }}
    {%- endif %}
    {%- for key in message if key not in ['role', 'content', 'weight'] and message[key] %}
        {{- raise_exception("unknown key '" ~ key ~ "' in a turn of role '" + message['role'] + "': leave it out") }}
    {%- endfor %}
    {%- if message['content'] is not defined or message['content'] is none %}
        {{- raise_exception("a turn of role '" + message['role'] + "' has no content: leave the turn out") }}
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
    {%- if message['role'] == 'assistant' and (message['weight'] is not defined or message['weight'] != 0) %}
        {%- generation %}{{- (turn.text | trim) + '<|eot_id|>' }}{%- endgeneration %}
    {%- else %}
        {{- (turn.text | trim) + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

ROLES = ("system", "user", "assistant")
_TURN_KEYS = frozenset(("role", "content", "weight"))
_POST_PROCESSORS_THAT_ADD = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")

# an assistant turn that is not trained on has "weight": 0
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

    `__call__`, `apply_chat_template` and `decode` are the stock ones, but images (opened, paths, encoded bytes,
    base64) go through `upright_rgb` first, as in training; URLs are left to Transformers' loader, with a warning.

    With Llama's tokenizer, `encode` returns the same ids as `apply_chat_template`; it tokenises a header separately
    from what follows (like Meta's ChatFormat), so that training and generation agree with any tokenizer, and text that
    looks like a special token stays text.

    Raises:
        ValueError: from `encode`, if the numbers of images and of image parts in the messages differ, or a turn has
            tool calls, no content, or a role or key that the template does not know.
    """

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "LlavaLlama31Processor":
        """Stock `from_pretrained`; where a folder does not name a padding side, batches are padded on the left.

        A tokenizer that adds its own bos to the template's, as folders of earlier versions have it, no longer does.
        Images are resized by PIL as in training, also where torchvision is installed, which gives other pixels.

        Raises:
            ValueError: `backend` asks for other pixels.
        """
        backend = kwargs.pop("backend", None)  # or a tokenizer would keep it among its own settings
        if backend not in (None, "pil"):
            raise ValueError(
                f"backend={backend!r} gives other pixels than training: leave it out, or open the folder with "
                "LlavaNextProcessor"
            )
        processor = super().from_pretrained(*args, **kwargs)
        if not isinstance(processor.image_processor, LlavaNextImageProcessorPil):
            processor.image_processor = LlavaNextImageProcessorPil.from_dict(processor.image_processor.to_dict())
        tokenizer = processor.tokenizer
        if "padding_side" not in tokenizer.init_kwargs:
            tokenizer.padding_side = "left"
        if processor.chat_template and tokenizer.bos_token and tokenizer.num_special_tokens_to_add():
            empty: Any = [{"role": "user", "content": [{"type": "text", "text": ""}]}]
            if processor.apply_chat_template(empty).startswith(tokenizer.bos_token):
                _add_nothing(tokenizer)
        return processor

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> tuple:
        """Stock, after images have become upright RGB: `__call__` and `apply_chat_template` both come through here.

        Raises:
            ValueError: a string is neither a path nor base64.
        """
        shown = None if images is None else _as_trained(images)
        return super().prepare_inputs_layout(images=shown, text=text, videos=videos, audio=audio, **kwargs)

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
                _check_turn(message)
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
        image = upright_rgb(image)
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
        output["image_processor"].pop("auto_map", None)  # a remote load leaves one
        output["auto_map"] = {"AutoProcessor": f"{Path(__file__).stem}.{type(self).__name__}"}
        return output

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Save so that both the stock class (without remote code) and this one (with it) open the folder.

        Raises:
            ValueError: `push_to_hub`; nothing is written.
        """
        if push_to_hub:
            raise ValueError(
                "push_to_hub is not supported: upload the saved folder with huggingface_hub.upload_folder"
            )
        # those of the last call; every call sets its own
        self.tokenizer.backend_tokenizer.no_padding()
        self.tokenizer.backend_tokenizer.no_truncation()
        files = super().save_pretrained(save_directory, push_to_hub=False, **kwargs)
        tokenizer_config = Path(save_directory, "tokenizer_config.json")
        config = json.loads(tokenizer_config.read_text(encoding="utf-8"))
        config["processor_class"] = LlavaNextProcessor.__name__
        # how the tokenizer was opened is not a setting of it
        for key in ("auto_map", "is_local", "local_files_only"):
            config.pop(key, None)
        # a tokenizer saves these only if they were given when it was made
        config |= {
            "padding_side": self.tokenizer.padding_side,
            "truncation_side": self.tokenizer.truncation_side,
            "model_input_names": self.tokenizer.model_input_names,
            "clean_up_tokenization_spaces": self.tokenizer.clean_up_tokenization_spaces,
            "split_special_tokens": self.tokenizer.split_special_tokens,
        }
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        tokenizer_config.write_text(text + "\n", encoding="utf-8")
        for file in (Path(__file__), Path(__file__).with_name("pixels_llava_llama31.py")):
            shutil.copyfile(file, Path(save_directory, file.name))
        return files


def _as_trained(images: Any) -> Any:
    """Images, however nested, as training shows them; arrays and tensors, which are pixels already, as they are."""
    if isinstance(images, list | tuple):
        return [_as_trained(image) for image in images]
    if isinstance(images, str) and images.startswith(("http://", "https://")):
        logger.warning_once(
            "Transformers' loader reads URLs: it drops transparency and clips 16-bit grey; download the image instead."
        )
        return images
    if isinstance(images, Image.Image):
        return upright_rgb(images)
    if isinstance(images, str | os.PathLike | bytes | bytearray):
        with Image.open(_file_of(images)) as image:
            return upright_rgb(image)
    return images


def _file_of(source: str | os.PathLike | bytes | bytearray) -> str | os.PathLike | BytesIO:
    """What PIL opens: a path, or the bytes of an encoded image."""
    if isinstance(source, bytes | bytearray):
        return BytesIO(source)
    if isinstance(source, os.PathLike) or os.path.isfile(source):
        return source
    encoded = source.partition(",")[2] if source.startswith("data:image/") else source
    try:
        return BytesIO(b64decode("".join(encoded.split()), validate=True))
    except ValueError as error:
        what = f"{source[:80]!r} is neither an image file that exists nor base64 nor a URL"
        raise ValueError(what) from error


def _add_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer add no token to a text: the template writes a bos, and with a second one it is another prompt.

    Raises:
        ValueError: it adds tokens in a way that is not known here.
    """
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    state["post_processor"] = _without_added_tokens(state["post_processor"])
    backend.post_processor = type(backend).from_str(json.dumps(state)).post_processor
    if tokenizer.num_special_tokens_to_add():
        raise ValueError("the tokenizer adds special tokens to every text: remove them from its post-processor")


def _without_added_tokens(post_processor: dict | None) -> dict | None:
    if post_processor is None or post_processor["type"] in _POST_PROCESSORS_THAT_ADD:
        return None
    if post_processor["type"] != "Sequence":
        return post_processor
    kept = [part for part in map(_without_added_tokens, post_processor["processors"]) if part is not None]
    return {"type": "Sequence", "processors": kept} if kept else None


def _check_turn(message: Message) -> None:
    """Refuse what the template refuses."""
    role = message["role"]
    if role not in ROLES:
        raise ValueError(f"role {role!r} is not supported: system, user or assistant")
    if message.get("content") is None or message.get("tool_calls") or message.get("function_call"):
        raise ValueError(f"a turn of role {role!r} has tool calls or no content: write them as text")
    unknown = [key for key in message.keys() - _TURN_KEYS if message[key]]
    if unknown:
        raise ValueError(f"unknown key {min(unknown)!r} in a turn of role {role!r}: leave it out")


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
    has_class_token: bool = True,
) -> LlavaLlama31Processor:
    """Build the processor for a vision tower and a Llama-3.1 tokenizer, adding `<image>` to it.

    Args:
        tokenizer: a fast tokenizer with Llama 3.1's special tokens; changed in place.
        image_size: side of a tile in pixels.
        patch_size: side of a patch in pixels.
        image_mean, image_std: per channel, on pixel values in [0, 1].
        image_grid_pinpoints: (height, width) in pixels of the resolutions that an image may be tiled at.
        resample: PIL's code for the filter.
        has_class_token: whether the tower's hidden states begin with one, which the model drops.

    Raises:
        ValueError: the tokenizer lacks chat tokens, and names them; or it adds tokens that can't be taken away.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in CHAT_TOKENS if token not in vocabulary]
    if missing:
        raise ValueError(f"the tokenizer lacks {', '.join(missing)}: it is not a Llama-3.1 tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    tokenizer.bos_token, tokenizer.pad_token, tokenizer.eos_token = "<|begin_of_text|>", PAD_TOKEN, END_OF_TURN
    if tokenizer.num_special_tokens_to_add():
        _add_nothing(tokenizer)
    tokenizer.padding_side = "left"  # a batch is generated from at its right end
    image_processor = LlavaNextImageProcessorPil(
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
        vision_feature_select_strategy="default" if has_class_token else "full",
        num_additional_image_tokens=int(has_class_token),
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )
