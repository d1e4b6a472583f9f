"""Measures what the contamination check finds of planted duplicates, and how often it is wrong.

    python benchmarks/contamination.py [--images DIR] [--number 400]

Half of the images are an evaluation's, half are not. Each one of the first half is changed in each of the ways below
and looked for; each one of the second half is looked for as it is. Prints, per kind, the share that is found at the
limit of `check-data` and beside it, and how many of the others are taken for an evaluation's. Without --images they
are generated: smooth fields with shapes and letters in them.
"""

import argparse
import io
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from llava_llama31.trainer.data.contamination.fingerprints import NUM_BITS, nearest, perceptual_hash
from llava_llama31.trainer.data.contamination.search import NEAR_BITS


LIMITS = (20, 30, NEAR_BITS, 50, 60)


def generated(seed: int) -> Image.Image:
    """A smooth field of colours with rectangles, ellipses and letters."""
    rng = random.Random(seed)
    size = rng.choice([(640, 480), (480, 640), (1024, 683), (500, 375)])
    colours = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    image = Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(3, 12)):
        x, y = rng.randrange(size[0]), rng.randrange(size[1])
        box = (x, y, x + rng.randrange(20, size[0] // 2), y + rng.randrange(20, size[1] // 2))
        colour = tuple(rng.randrange(256) for _ in range(3))
        rng.choice([draw.rectangle, draw.ellipse])(box, fill=colour)
        draw.text((x, y), "".join(rng.choices("ABCDEFGH 0123456789", k=8)), fill=(255, 255, 255), font_size=32)
    return image.filter(ImageFilter.GaussianBlur(0.7))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((max(round(image.width * factor), 8), max(round(image.height * factor), 8)))


def cropped(image: Image.Image, share: float) -> Image.Image:
    x, y = round(image.width * share), round(image.height * share)
    return image.crop((x, y, image.width - x, image.height - y))


KINDS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "encoded again, JPEG 75 twice": lambda image: jpeg(jpeg(image, 75), 75),
    "encoded again, JPEG 30": lambda image: jpeg(image, 30),
    "half the size": lambda image: scaled(image, 0.5),
    "a quarter of the size": lambda image: scaled(image, 0.25),
    "336 x 336 (other aspect)": lambda image: image.resize((336, 336)),
    "mirrored": ImageOps.mirror,
    "mirrored, half the size, JPEG 75": lambda image: jpeg(scaled(ImageOps.mirror(image), 0.5), 75),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "cropped by 2 % a side": lambda image: cropped(image, 0.02),
    "cropped by 5 % a side": lambda image: cropped(image, 0.05),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of images of your own")
    parser.add_argument("--number", type=int, default=400)
    options = parser.parse_args()
    if options.images:
        found = sorted(p for p in options.images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
        random.Random(0).shuffle(found)
        images = [Image.open(path).convert("RGB") for path in found[: options.number]]
    else:
        images = [generated(seed) for seed in range(options.number)]
    evaluation, others = images[: len(images) // 2], images[len(images) // 2 :]
    started = time.process_time()
    bits = np.array([perceptual_hash(image) for image in evaluation])
    per_image = (time.process_time() - started) / len(evaluation)
    known = np.concatenate([bits, [perceptual_hash(ImageOps.mirror(image)) for image in evaluation]])
    print(f"{len(evaluation)} images of the evaluation, {len(others)} others; {1000 * per_image:.1f} ms a hash")
    print(f"| changed | {' | '.join(f'{limit} bits' for limit in LIMITS)} |")
    print(f"|---|{'---|' * len(LIMITS)}")
    for kind, change in KINDS.items():
        position, distance = nearest(np.array([perceptual_hash(change(image)) for image in evaluation]), known)
        is_own = position % len(evaluation) == np.arange(len(evaluation))
        shares = [f"{100 * (is_own & (distance <= limit)).mean():.1f} %" for limit in LIMITS]
        print(f"| {kind} | {' | '.join(shares)} |")
    _, distance = nearest(np.array([perceptual_hash(image) for image in others]), known)
    wrong = [str(int((distance <= limit).sum())) for limit in LIMITS]
    print(f"| others taken for one, of {len(others)} | {' | '.join(wrong)} |")
    print(f"nearest of the others: {distance.min()} of {NUM_BITS} bits")


if __name__ == "__main__":
    main()
