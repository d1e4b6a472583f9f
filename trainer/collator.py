"""Samples -> one right-padded batch, with the tiles of all its pictures as one 4-D tensor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from llava_llama31.processing import IGNORE_INDEX


class Sample(NamedTuple):
    """One conversation, ready for the model.

    Shapes: S tokens, I pictures, T tiles of all pictures, H W height and width of a tile.
    """

    record_id: str
    input_ids: list[int]  # (S,)
    labels: list[int]  # (S,)
    pixel_values: torch.Tensor | None  # (T, 3, H, W)
    image_sizes: list[tuple[int, int]]  # I times (height, width) in pixels
    num_image_tokens: int  # placeholders that the pictures fill


@dataclass(frozen=True)
class Collator:
    """Pads on the right to the longest sample; image placeholders are checked before any model sees them.

    Args:
        pad_token_id, image_token_id: from the processor's tokenizer.

    Raises:
        ValueError: naming the record whose placeholders and pictures do not agree.
    """

    pad_token_id: int
    image_token_id: int

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        for sample in samples:
            num_placeholders = sample.input_ids.count(self.image_token_id)
            if num_placeholders != sample.num_image_tokens:
                raise ValueError(
                    f"record {sample.record_id} has {num_placeholders} image placeholders, but its pictures give "
                    f"{sample.num_image_tokens} features"
                )
        length = max(len(sample.input_ids) for sample in samples)
        input_ids = torch.full((len(samples), length), self.pad_token_id)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        attention_mask = torch.zeros_like(input_ids)
        for row, sample in enumerate(samples):
            size = len(sample.input_ids)
            input_ids[row, :size] = torch.tensor(sample.input_ids)
            labels[row, :size] = torch.tensor(sample.labels)
            attention_mask[row, :size] = 1
        batch = {"input_ids": input_ids, "labels": labels}
        if not attention_mask.all():  # without a mask attention takes its causal path
            batch["attention_mask"] = attention_mask
        tiles = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
        if tiles:
            batch["pixel_values"] = torch.cat(tiles)
            batch["image_sizes"] = torch.tensor([size for sample in samples for size in sample.image_sizes])
        return batch
