"""The workload of benchmarks/training.py: a small LlavaNext with random weights, and rows like LLaVA's data sets.

The model has the structure and the proportions of work of a real one, except for the head, whose share is larger; the
images are noise, the words are drawn from a made-up lexicon by Zipf's law. Everything is seeded.
"""

import copy
import json
import math
import random
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from llava_llama31 import LlavaLlama31Config, LlavaLlama31ForConditionalGeneration
from llava_llama31.processing import CHAT_TOKENS, IGNORE_INDEX, LlavaLlama31Processor, build_processor
from llava_llama31.trainer.costs import flops
from llava_llama31.trainer.costs.flops import ModelShape, Work


TILE, PATCH = 112, 14
PINPOINTS = [[TILE * rows, TILE * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
TEXT: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
}
VISION: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
}
VOCABULARY = 32_064
FEATURE_LAYER = -2
NUM_WORDS = 16_000
# (height, width) of images and how often, as in COCO
SIZES = {(480, 640): 6, (427, 640): 3, (640, 480): 2, (640, 427): 1, (612, 612): 1}
ROUNDS = {1: 11, 2: 2, 3: 4, 4: 3}


@dataclass(frozen=True)
class Row:
    """A conversation about one image, with its lengths in tokens.

    `num_prefix_tokens` is the length of the prefix that rows about the same image share: up to the end of the image.
    """

    image: str
    messages: list[dict[str, str]]
    num_tokens: int
    num_prefix_tokens: int
    read_positions: list[int]
    """Positions whose output is read: each precedes a supervised token."""
    num_tiles: int


class Words:
    """Generates text with a given number of words, most of which are one token."""

    def __init__(self, seed: int):
        draw = random.Random(seed)
        syllables = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]
        lexicon: dict[str, None] = {}
        while len(lexicon) < NUM_WORDS:
            lexicon["".join(draw.choices(syllables, k=draw.randint(1, 4)))] = None
        self.lexicon = list(lexicon)
        self.weights = [1 / (rank + 10) for rank in range(NUM_WORDS)]

    def text(self, draw: random.Random, num_words: int) -> str:
        return " ".join(draw.choices(self.lexicon, self.weights, k=max(1, num_words)))


def make_processor(words: Words) -> LlavaLlama31Processor:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1,  # plus the image token
        special_tokens=list(CHAT_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    names = ["user", "assistant", "system"] * 10
    backend.train_from_iterator([*names, *(f"{word} {word} {word}" for word in words.lexicon)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
    return build_processor(
        tokenizer,
        image_size=TILE,
        patch_size=PATCH,
        image_mean=[0.48, 0.46, 0.41],
        image_std=[0.27, 0.26, 0.28],
        image_grid_pinpoints=PINPOINTS,
    )


def make_config(processor: LlavaLlama31Processor) -> LlavaLlama31Config:
    text = LlamaConfig(
        **TEXT,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        pad_token_id=processor.tokenizer.pad_token_id,
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
    )
    return LlavaLlama31Config(
        vision_config=CLIPVisionConfig(**VISION, image_size=TILE, patch_size=PATCH, projection_dim=256),
        text_config=text,
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=(TILE // PATCH) ** 2,
        vision_feature_layer=FEATURE_LAYER,
    )


def make_checkpoint(folder: Path, config: LlavaLlama31Config, processor: LlavaLlama31Processor, seed: int) -> None:
    """A folder that the project and stock Transformers open: float32 with values that are exact in bfloat16.

    So are published checkpoints and `assemble`'s default output; casting frozen weights loses nothing.
    """
    torch.manual_seed(seed)
    model = LlavaLlama31ForConditionalGeneration(copy.deepcopy(config)).bfloat16().float()
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def make_stock_checkpoint(ours: Path, folder: Path) -> None:
    """The same weights and processor without our code, which some peers cannot save."""
    shutil.copytree(ours, folder, ignore=shutil.ignore_patterns("*.py"))
    for file in folder.glob("*.json"):
        content = json.loads(file.read_text())
        content.pop("auto_map", None)
        file.write_text(json.dumps(content))


def make_rows(
    folder: Path, words: Words, processor: LlavaLlama31Processor, *, stage: str, num_rows: int, share: bool, seed: int
) -> list[Row]:
    """Rows and their JPEG files; with `share` every image has two rows, which are not adjacent."""
    draw = random.Random(seed)
    num_images = num_rows // 2 if share else num_rows
    sizes = draw.choices(list(SIZES), list(SIZES.values()), k=num_images)
    images = [make_image(folder / f"{i}.jpg", size, seed + i) for i, size in enumerate(sizes)]
    conversation = {"instruct": _instruct_conversation, "projector": _caption_conversation}[stage]
    rows = []
    for i in range(num_rows):
        image = i % num_images
        rows.append(_measured(images[image], sizes[image], conversation(draw, words), processor))
    return rows


def make_image(path: Path, size: tuple[int, int], seed: int) -> str:
    height, width = size
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)
    return str(path)


def _instruct_conversation(draw: random.Random, words: Words) -> list[dict[str, str]]:
    """Supervised tokens as in llava-instruct: 5, 50 and 95 % at 69, 127 and 235."""
    num_rounds = draw.choices(list(ROUNDS), list(ROUNDS.values()))[0]
    num_answer_words = math.exp(draw.gauss(math.log(127), math.log(235 / 69) / 2 / 1.645))
    shares = [draw.uniform(0.5, 1.5) for _ in range(num_rounds)]
    messages = []
    for share in shares:
        question = words.text(draw, draw.randint(10, 26))
        answer = words.text(draw, round(num_answer_words * share / sum(shares)) - 1)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _caption_conversation(draw: random.Random, words: Words) -> list[dict[str, str]]:
    """Supervised tokens as in llava-pretrain: 15, 20 and 24."""
    question, caption = words.text(draw, draw.randint(5, 10)), words.text(draw, draw.randint(14, 23))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": caption}]


def _measured(
    image: str, size: tuple[int, int], messages: list[dict[str, str]], processor: LlavaLlama31Processor
) -> Row:
    first: Any = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": messages[0]["content"]}]}
    encoding = processor.encode([first, *messages[1:]], [size])
    ids, labels = encoding.input_ids, encoding.labels
    return Row(
        image=image,
        messages=messages,
        num_tokens=len(ids),
        num_prefix_tokens=len(ids) - ids[::-1].index(processor.image_token_id),
        read_positions=[i - 1 for i, label in enumerate(labels) if label != IGNORE_INDEX],
        num_tiles=processor.num_tiles(size),
    )


def write_llava(rows: Sequence[Row], file: Path) -> None:
    """Write LLaVA's JSON, which ours reads."""
    names = {"user": "human", "assistant": "gpt"}
    records = []
    for i, row in enumerate(rows):
        turns = [{"from": names[m["role"]], "value": m["content"]} for m in row.messages]
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        records.append({"id": f"row-{i}", "image": Path(row.image).name, "conversations": turns})
    file.write_text(json.dumps(records))


def write_for(trainer: str, rows: Iterable[Row], file: Path) -> None:
    """Write the same rows, in the given order, in another trainer's format."""
    # swift's template adds the newline after the image by itself
    mark = {"ms-swift": "<image>", "llamafactory": "<image>\n"}.get(trainer, "")
    records = []
    for row in rows:
        messages = [dict(message) for message in row.messages]
        messages[0]["content"] = mark + messages[0]["content"]
        images = {"images": [row.image]} if mark else {"image": row.image}
        records.append({"messages": messages, **images})
    if trainer == "ms-swift":
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        file.write_text(json.dumps(records))
    if trainer == "llamafactory":
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
        columns = {"messages": "messages", "images": "images"}
        entry = {"file_name": file.name, "formatting": "sharegpt", "columns": columns, "tags": tags}
        file.with_name("dataset_info.json").write_text(json.dumps({file.stem: entry}))


def needed_flops(rows: Sequence[Row], config: LlavaLlama31Config, trainable: Sequence[str]) -> int:
    """Floating-point operations that one optimizer step on these rows needs; see docs/speed.md.

    What rows about one image share, the image and everything before it, counts once.
    """
    trees: dict[str, list[Row]] = {}
    for row in rows:
        trees.setdefault(row.image, []).append(row)
    packing, supervised, begin = [], [], 0
    for branches in trees.values():
        trunk = branches[0].num_prefix_tokens
        packing.append([trunk, *(row.num_tokens - trunk for row in branches)])
        begin += trunk
        for row in branches:
            supervised += [begin + position - trunk for position in row.read_positions]
            begin += row.num_tokens - trunk
    images = [branches[0] for branches in trees.values()]
    num_tiles = sum(row.num_tiles for row in images)
    num_features = num_tiles * (TILE // PATCH) ** 2
    work = Work.pruned(packing, supervised, num_tiles=num_tiles, num_image_features=num_features)
    return flops.needed_flops(ModelShape.of(config), work, trainable).total.needed
