"""Measures the host's cost of a training sample, part by part: read, decode, tile, tokenise, collate.

    OMP_NUM_THREADS=1 python benchmarks/data_wait.py [--images 40] [--rounds 5]

Makes JPEGs of 640 x 480 and LLaVA records about them (two conversations per image, about 160 tokens of text each) in a
temporary folder, and feeds rows through training's own data set and collator: anyres tiles of 336 px in bfloat16,
packed micro-batches of 8. Each figure is the median over the rounds of this process's CPU time, which a busy machine
does not change much. `whole` is a DataLoader worker's loop without the clocks of parts; it gives samples/s per core.
`device_tiles` leaves resizing and tiling to the training device, whose time is not counted here.
The last lines read features of 576 x 1024 in bfloat16 for each tile from a feature cache (`feature_cache_gb`).
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llava_llama31.processing import CHAT_TOKENS, LlavaLlama31Processor, build_processor
from llava_llama31.trainer.costs.matrix_peak import cpu_instructions
from llava_llama31.trainer.data.batches.collator import Collator
from llava_llama31.trainer.data.batches.dataset import StageDataset
from llava_llama31.trainer.data.batches.feature_cache import FeatureCache, image_key
from llava_llama31.trainer.data.sources.records import RecordStore, open_records
from llava_llama31.trainer.recipes.schema import DataSource


MICRO_BATCH = 8
SHAPE, DTYPE = (576, 1024), torch.bfloat16  # of a tile's features: CLIP-L at 336 px


def write_data(folder: Path, num_images: int) -> list[str]:
    """Write images and records; returns the texts."""
    rng, words = random.Random(0), made_up_words()
    texts, rows = [], []
    for number in range(num_images):
        noise = Image.effect_noise((640, 480), 80).filter(ImageFilter.GaussianBlur(1.5))
        channels = (noise, noise.transpose(Image.Transpose.ROTATE_180), noise)
        Image.merge("RGB", channels).save(folder / f"{number:06d}.jpg", quality=90)
        for conversation in range(2):
            turns = []
            for turn in range(3):
                question, answer = (" ".join(rng.choices(words, k=count)) for count in (8, 24))
                turns.append({"from": "human", "value": ("<image>\n" if turn == 0 else "") + question})
                turns.append({"from": "gpt", "value": answer})
                texts += [question, answer]
            row = {"id": f"{number}-{conversation}", "image": f"{number:06d}.jpg", "conversations": turns}
            rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows))
    return texts


def made_up_words(number: int = 8000) -> list[str]:
    """Pronounceable words, mostly short."""
    rng = random.Random(1)
    syllables = [a + b for a in "bcdfglmnprstvw" for b in ("a", "e", "i", "o", "u", "en", "ar", "ing")]
    return ["".join(rng.choices(syllables, k=rng.choice((1, 1, 2, 2, 3)))) for _ in range(number)]


def make_processor(texts: list[str]) -> LlavaLlama31Processor:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=6000, special_tokens=list(CHAT_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return build_processor(
        PreTrainedTokenizerFast(tokenizer_object=backend),
        image_size=336,
        patch_size=14,
        image_mean=(0.48145466, 0.4578275, 0.40821073),
        image_std=(0.26862954, 0.26130258, 0.27577711),
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    )


def cpu_seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def parts(store: RecordStore, processor: LlavaLlama31Processor, dataset: StageDataset, collate: Collator) -> dict:
    """CPU seconds per sample in each part; an image is read again for each of its conversations."""
    records = [store[row] for row in range(len(store))]
    images = [image for record in records for image in record.images]
    opened = [image.open() for image in images[: 2 * MICRO_BATCH]]
    tiles = [torch.from_numpy(processor.tiles(image)) for image in opened]
    sizes = [[(480, 640)]] * len(records)
    samples = dataset.__getitems__(range(MICRO_BATCH))
    number = len(records)
    return {
        "read and check the record": cpu_seconds(lambda: [store[row] for row in range(number)]) / number,
        "read and decode the image": cpu_seconds(lambda: [image.open() for image in images]) / number,
        "tiles": cpu_seconds(lambda: [processor.tiles(image) for image in opened]) / len(opened),
        "tiles to bfloat16": cpu_seconds(lambda: [tile.to(DTYPE) for tile in tiles]) / len(tiles),
        "tokenise, ids and labels": cpu_seconds(
            lambda: [processor.encode(r.messages, size) for r, size in zip(records, sizes, strict=True)]
        )
        / number,
        "collate": cpu_seconds(lambda: collate(samples)) / len(samples),
    }


def whole(dataset: StageDataset, collate: Collator, *, shared: bool) -> float:
    """CPU seconds per sample in a worker's loop, conversations about an image together or far apart."""
    order = np.arange(len(dataset))
    if not shared:
        order = order.reshape(-1, 2).T.ravel()
    batches = [order[start : start + MICRO_BATCH].tolist() for start in range(0, len(order), MICRO_BATCH)]
    return cpu_seconds(lambda: [collate(dataset.__getitems__(batch)) for batch in batches]) / len(dataset)


def filled_cache(folder: Path, store: RecordStore, processor: LlavaLlama31Processor) -> FeatureCache:
    """A cache with features of the right shape; their values don't affect the time."""
    cache = FeatureCache(folder, "0" * 32, SHAPE, DTYPE, quota=2**34)
    for row in range(0, len(store), 2):
        (image,) = store[row].images
        features = torch.zeros((processor.num_tiles((480, 640)), *SHAPE), dtype=DTYPE)
        assert cache.store(image_key(image), (480, 640), features)
    return cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processor = make_processor(write_data(folder, args.images))
        store = open_records(DataSource(name="rows", path=str(folder / "rows.json")))
        rows = [(0, row) for row in range(len(store))]
        plain = StageDataset([store], rows, processor, DTYPE)
        cached = StageDataset([store], rows, processor, DTYPE, filled_cache(folder / "cache", store, processor))
        pad, image_token = processor.tokenizer.pad_token_id, processor.image_token_id
        pixels = StageDataset([store], rows, processor, DTYPE, device_tiles=True)
        collate = Collator(pad, image_token, packed=True, share_prefix=True)
        rounds = []
        for _ in range(args.rounds):
            found = parts(store, processor, plain, collate)
            found["whole, images apart"] = whole(plain, collate, shared=False)
            found["whole, two conversations per image"] = whole(plain, collate, shared=True)
            found["whole, device_tiles, images apart"] = whole(pixels, collate, shared=False)
            found["whole, device_tiles, two per image"] = whole(pixels, collate, shared=True)
            found["whole, cached features, images apart"] = whole(cached, collate, shared=False)
            found["whole, cached features, two per image"] = whole(cached, collate, shared=True)
            rounds.append(found)
    medians = {part: statistics.median(found[part] for found in rounds) for part in rounds[0]}
    print(cpu_instructions())
    print(f"{'part':42}{'ms/sample':>12}{'share':>8}{'samples/s/core':>18}")
    for part, seconds in medians.items():
        share = seconds / medians["whole, images apart"]
        rate = f"{1 / seconds:>18.1f}" if part.startswith("whole") else ""
        print(f"{part:42}{seconds * 1000:>12.3f}{share:>8.1%}{rate}")


if __name__ == "__main__":
    main()
