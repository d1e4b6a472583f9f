"""What the answers of an evaluation depend on; cheap to import."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_llama31.trainer.evaluation.presets import PRESETS, Preset


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """All settings that change answers; `settings.json` and the name of the output folder are made from them.

    Args:
        revision: what names the weights: a hash, a run's step.
        preset: how the question is worded.
        jpeg_rounds: times that each image is written and read as JPEG first; the card's images went through two.
        blind_seed: show each question another question's image, by a derangement of the images with this seed.
        max_new_tokens: length at which an answer is cut.
        batch_size: questions answered together; those of one image stay together. Default: by the device's memory.
        batch_invariant: no sum depends on the batch, so bfloat16 answers do not either; see docs/evaluation.md.
        data: file of the questions.
        limit: number of questions asked. Default: all.
        ocr: engine that reads the OCR tokens. Default: those of `data`.
    """

    revision: str
    preset: Preset = PRESETS["card"]
    jpeg_rounds: int = 0
    blind_seed: int | None = None
    max_new_tokens: int = 64
    batch_size: int | None = None
    batch_invariant: bool = False
    data: str = ""
    limit: int | None = None
    ocr: str | None = None

    def folder(self, model: str, dtype: str) -> Path:
        """The default output folder: one per model, data and settings.

        Args:
            model: path of the model, whose last part becomes part of the name.
            dtype: torch's name of what the weights are loaded in.
        """
        asked = [
            self.revision,
            self.data,
            self.limit,
            self.preset.name,
            self.ocr,
            self.jpeg_rounds,
            self.batch_size,
            self.max_new_tokens,
            self.batch_invariant,
            self.blind_seed is not None,
            dtype,
        ]
        return Path("runs", "evaluate", f"{Path(model).name}-{Path(self.data).stem}-{digest(asked)[:8]}")

    def to_json(self) -> dict[str, Any]:
        """The share of settings.json that is known before the model and the questions."""
        return {
            "revision": self.revision,
            "preset": self.preset.name,
            "prompt": self.preset.prompt,
            "jpeg_rounds": self.jpeg_rounds,
            "blind_seed": self.blind_seed,
            "decoding": f"greedy, at most {self.max_new_tokens} new tokens",
        }


def digest(values: Iterable[Any]) -> str:
    """SHA-256 over the JSON list of values."""
    return hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()
