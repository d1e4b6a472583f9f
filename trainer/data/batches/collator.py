"""Samples -> one micro-batch: a packed row without padding, or right-padded rows; tiles as one 4-D tensor.

Shapes: B rows, S positions, I images, T tiles of all images, H W height and width of a tile, P patches of a tile,
D width of the vision tower's features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from llava_llama31.processing import IGNORE_INDEX


class Sample(NamedTuple):
    """One conversation, ready for the model; S is its own number of tokens."""

    record_id: str
    input_ids: list[int]  # (S,)
    labels: list[int]  # (S,)
    pixel_values: torch.Tensor | None  # (T, 3, H, W)
    image_sizes: list[tuple[int, int]]  # I times (height, width) in pixels
    num_image_tokens: int  # placeholders that the images fill
    num_prefix_tokens: int = 0  # up to the end of the last image
    images: tuple[str, ...] = ()  # what the images are known by
    image_features: torch.Tensor | None = None  # (T, P, D) of images that have no tiles in pixel_values
    has_features: Sequence[bool] = ()  # for each image; empty: no image has
    pixels: tuple[torch.Tensor, ...] = ()  # I times uint8 (height, width, 3), of images yet without tiles
    source: int = 0  # number of the data source


@dataclass(frozen=True)
class Collator:
    """Checks image placeholders before any model sees them, then packs or pads.

    Args:
        pad_token_id, image_token_id: from the processor's tokenizer.
        packed: one row of whole samples, for the model's `packing`; else rows padded on the right.
        share_prefix: samples that begin with the same tokens and images become branches of one trunk.
        multiple_of: a packed row ends with padding, as a sample of its own, up to a multiple of this.
        with_sources: add `sources`, the number of the data source of each supervised token in row order.

    Raises:
        ValueError: naming the record whose placeholders and images do not agree.
    """

    pad_token_id: int
    image_token_id: int
    packed: bool = False
    share_prefix: bool = False
    multiple_of: int = 1
    with_sources: bool = False

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        for sample in samples:
            num_placeholders = sample.input_ids.count(self.image_token_id)
            if num_placeholders != sample.num_image_tokens:
                raise ValueError(
                    f"record {sample.record_id} has {num_placeholders} image placeholders, but its images give "
                    f"{sample.num_image_tokens} features"
                )
        return self._pack(samples) if self.packed else self._pad(samples)

    def _pad(self, samples: Sequence[Sample]) -> dict[str, Any]:
        length = max(len(sample.input_ids) for sample in samples)
        input_ids = torch.full((len(samples), length), self.pad_token_id)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        attention_mask = torch.zeros_like(input_ids)
        for row, sample in enumerate(samples):
            size = len(sample.input_ids)
            input_ids[row, :size] = torch.tensor(sample.input_ids)
            labels[row, :size] = torch.tensor(sample.labels)
            attention_mask[row, :size] = 1
        batch: dict[str, Any] = {"input_ids": input_ids, "labels": labels}
        if self.with_sources:
            counts = (labels[:, 1:] != IGNORE_INDEX).sum(dim=1).numpy()
            batch["sources"] = np.repeat([sample.source for sample in samples], counts)
        if not attention_mask.all():  # without a mask attention takes its causal path
            batch["attention_mask"] = attention_mask
        return batch | _image_tensors(samples)

    def _pack(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """One row, with all that the model would else have to ask a GPU for; see the model's `forward`."""
        trees = self._trees(samples)
        owners: list[np.ndarray] = []  # of each position
        packing: list[list[int]] = []
        ids: list[int] = []
        labels: list[int] = []
        positions: list[np.ndarray] = []
        for tree in trees:
            trunk = tree[0].num_prefix_tokens if len(tree) > 1 else 0
            if trunk:
                ids += tree[0].input_ids[:trunk]
                labels += tree[0].labels[:trunk]
                positions.append(np.arange(trunk))
                owners.append(np.full(trunk, tree[0].source))
            for sample in tree:
                ids += sample.input_ids[trunk:]
                labels += sample.labels[trunk:]
                positions.append(np.arange(trunk, len(sample.input_ids)))
                owners.append(np.full(len(sample.input_ids) - trunk, sample.source))
            branches = [len(sample.input_ids) - trunk for sample in tree]
            packing.append([trunk, *branches] if trunk else branches)
        if padding := -len(ids) % self.multiple_of:
            ids += [self.pad_token_id] * padding
            labels += [IGNORE_INDEX] * padding
            positions.append(np.arange(padding))
            owners.append(np.zeros(padding, np.int64))
            packing.append([padding])
        row, targets = np.array(ids), np.array(labels)
        supervised = np.flatnonzero(targets[1:] != IGNORE_INDEX)
        packed = {
            "input_ids": torch.from_numpy(row)[None],
            "labels": torch.from_numpy(targets)[None],
            "position_ids": torch.from_numpy(np.concatenate(positions))[None],
            "packing": packing,
            "image_positions": torch.from_numpy(np.flatnonzero(row == self.image_token_id)),
            "supervised_positions": supervised.tolist(),
        } | _image_tensors([tree[0] for tree in trees], as_list=True)
        if self.with_sources:
            # a label belongs to the sample that it stands in
            packed["sources"] = np.concatenate(owners)[supervised + 1]
        return packed

    def _trees(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """Samples by their trunk, in order of first appearance."""
        trees: dict[object, list[Sample]] = {}
        for number, sample in enumerate(samples):
            key: object = number
            if self.share_prefix and sample.num_prefix_tokens:
                key = sample.images, tuple(sample.input_ids[: sample.num_prefix_tokens])
            trees.setdefault(key, []).append(sample)
        return list(trees.values())


def _image_tensors(samples: Sequence[Sample], *, as_list: bool = False) -> dict[str, Any]:
    sizes = [size for sample in samples for size in sample.image_sizes]
    if not sizes:
        return {}
    batch: dict[str, Any] = {"image_sizes": sizes if as_list else torch.tensor(sizes)}
    tiles = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
    if tiles:
        batch["pixel_values"] = torch.cat(tiles)
    pixels = [image for sample in samples for image in sample.pixels]
    if pixels:
        batch["pixels"] = pixels
    features = [sample.image_features for sample in samples if sample.image_features is not None]
    if features:
        batch["image_features"] = torch.cat(features)
        batch["has_features"] = [
            known for sample in samples for known in sample.has_features or [False] * len(sample.image_sizes)
        ]
    return batch
