"""What images and questions are recognised by: bytes, a perceptual hash of 256 bits, and words without their form.

The hash is `imagehash.phash` (Zauner, 2010: signs of the low frequencies of a cosine transform) of 16 x 16 bits. It
hardly changes when an image is encoded or scaled again; the evaluation's images are also hashed mirrored.
"""

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from llava_llama31.trainer.data.sources.images import ImageRef
from llava_llama31.trainer.errors import UserError


HASH_SIZE = 16
NUM_BITS = HASH_SIZE**2
# lines that benchmarks and LLaVA's data put after a question
_INSTRUCTIONS = re.compile(
    r"answer the question using a single word or phrase|answer with the option'?s letter from the given choices"
    r"( directly)?|reference ocr tokens?:[^\n]*|provide a one-sentence caption for the provided image|<image>",
    re.IGNORECASE,
)
_NOT_WORDS = re.compile(r"[^\w]+|_")
# shorter questions, such as "why?", are asked everywhere
_SHORTEST = 3


class Fingerprint(NamedTuple):
    """An image's digest, 16 bytes that only the same encoded image has, and its perceptual hash's bits, 0 or 1."""

    digest: bytes
    bits: np.ndarray  # bool (NUM_BITS,)


@dataclass(frozen=True)
class EvaluationImage:
    """An image of an evaluation, as it is and mirrored."""

    image_id: str
    digest: bytes
    bits: np.ndarray
    mirrored: np.ndarray


def fingerprint(image: ImageRef) -> Fingerprint:
    """The fingerprint of an image.

    Raises:
        RecordError: it can't be read.
        UserError: imagehash is not installed.
    """
    return Fingerprint(bytes.fromhex(image.sha256())[:16], perceptual_hash(image.open()))


def evaluation_image(image_id: str, image: ImageRef) -> EvaluationImage:
    """As `fingerprint`, mirrored too."""
    opened = image.open()
    mirrored = perceptual_hash(ImageOps.mirror(opened))
    return EvaluationImage(image_id, bytes.fromhex(image.sha256())[:16], perceptual_hash(opened), mirrored)


def perceptual_hash(image: Image.Image) -> np.ndarray:
    """bool (NUM_BITS,)."""
    hash_version()
    import imagehash

    return imagehash.phash(image, hash_size=HASH_SIZE).hash.ravel()


@cache
def hash_version() -> str:
    """Version of the library that hashes.

    Raises:
        UserError: it is not installed.
    """
    try:
        return version("imagehash")
    except PackageNotFoundError:
        what = "near duplicates are found by imagehash, which is not installed"
        raise UserError(what, where="contamination", fix="pip install 'llava-llama31[contamination]'") from None


def question_key(text: str) -> bytes | None:
    """8 bytes that are equal for questions of the same words; None for one that is too short to tell."""
    plain = unicodedata.normalize("NFKC", _INSTRUCTIONS.sub(" ", text)).casefold()
    words = _NOT_WORDS.sub(" ", plain).split()
    if len(words) < _SHORTEST:
        return None
    return hashlib.blake2b(" ".join(words).encode("utf-8", "replace"), digest_size=8).digest()


def nearest(bits: np.ndarray, others: np.ndarray, chunk: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    """For each hash, the position of the nearest other one and how many bits differ.

    Args:
        bits, others: bool (N, NUM_BITS) and (M, NUM_BITS), M above 0.

    Returns:
        Both int64 (N,).
    """
    signs = np.where(others, 1, -1).astype(np.float32).T
    position, distance = np.empty(len(bits), np.int64), np.empty(len(bits), np.int64)
    for start in range(0, len(bits), chunk):
        # equal bits less different ones: exact in float32
        agreement = np.where(bits[start : start + chunk], 1, -1).astype(np.float32) @ signs
        found = agreement.argmax(axis=1)
        position[start : start + chunk] = found
        best = agreement[np.arange(len(found)), found]
        distance[start : start + chunk] = (NUM_BITS - best.astype(np.int64)) // 2
    return position, distance
