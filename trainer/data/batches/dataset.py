"""Accepted records of a stage as a map-style data set of samples."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from llava_llama31.processing import IGNORE_INDEX, LlavaLlama31Processor
from llava_llama31.trainer.data.batches.collator import Sample
from llava_llama31.trainer.data.batches.feature_cache import FeatureCache
from llava_llama31.trainer.data.sources.conversations import Record
from llava_llama31.trainer.data.sources.records import RecordStore
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.errors import UserError


class RecordImages(NamedTuple):
    """The images of one record, each as tiles, pixels or cached features."""

    sizes: list[tuple[int, int]]  # height and width in pixels
    has_features: list[bool]
    tiles: torch.Tensor | None  # (T, 3, H, W)
    features: torch.Tensor | None  # (T, P, D)
    pixels: tuple[torch.Tensor, ...] = ()  # uint8 (height, width, 3) each


class StageDataset(Dataset):
    """Samples by position; a negative index -1 - i is sample i with no supervised token (see `RankBatches`).

    Args:
        stores: one per source.
        rows: (source, row) of every sample.
        processor: makes ids, labels and tiles.
        pixel_dtype: of the tiles that are handed to the model.
        features: where an image's features are, the image itself is not read.
        device_tiles: hand over pixels, to be cut into tiles by `DeviceTiles`.

    Raises:
        UserError: naming the record that can no longer be read; all were checked before training.
    """

    def __init__(
        self,
        stores: Sequence[RecordStore],
        rows: Sequence[tuple[int, int]],
        processor: LlavaLlama31Processor,
        pixel_dtype: torch.dtype = torch.float32,
        features: FeatureCache | None = None,
        device_tiles: bool = False,
    ):
        self.stores, self.rows, self.processor, self.pixel_dtype = stores, rows, processor, pixel_dtype
        self.features, self.device_tiles = features, device_tiles

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self._sample(index, {})

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of one micro-batch; an image that several of them show is read once."""
        for source, rows in self._by_source(indices).items():
            self.stores[source].prefetch(rows)
        known: dict[tuple[str, ...], RecordImages] = {}
        return [self._sample(index, known) for index in indices]

    def _by_source(self, indices: Sequence[int]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for index in indices:
            source, row = self.rows[index if index >= 0 else -1 - index]
            found.setdefault(source, []).append(row)
        return found

    def record_id(self, index: int) -> str:
        """Id of a sample's record, whether or not it can be read now."""
        source, row = self.rows[index if index >= 0 else -1 - index]
        return self.stores[source].row_id(row)

    def record(self, index: int) -> Record:
        """The record of a sample."""
        source, row = self.rows[index if index >= 0 else -1 - index]
        try:
            return self.stores[source][row]
        except RecordError as error:
            raise self._unreadable(index, error) from error

    def _sample(self, index: int, known: dict[tuple[str, ...], RecordImages]) -> Sample:
        record = self.record(index)
        key = tuple(image.key() for image in record.images)
        try:
            if key not in known:
                known[key] = self._images_of(record)
        except RecordError as error:
            raise self._unreadable(index, error) from error
        sizes, has_features, tiles, features, pixels = known[key]
        encoding = self.processor.encode(record.messages, sizes)
        return Sample(
            record_id=record.id,
            input_ids=encoding.input_ids,
            labels=encoding.labels if index >= 0 else [IGNORE_INDEX] * len(encoding.labels),
            pixel_values=tiles,
            image_sizes=sizes,
            num_image_tokens=sum(self.processor.num_image_tokens(size) for size in sizes),
            num_prefix_tokens=encoding.num_prefix_tokens,
            images=key,
            image_features=features,
            has_features=has_features,
            pixels=pixels,
            source=self.rows[index if index >= 0 else -1 - index][0],
        )

    def _images_of(self, record: Record) -> RecordImages:
        sizes, has_features, tiles, features, pixels = [], [], [], [], []
        for image in record.images:
            found = self.features.load(image) if self.features is not None else None
            if found is None:
                decoded = image.open()
                sizes.append((decoded.height, decoded.width))
                if self.device_tiles:
                    pixels.append(torch.from_numpy(np.array(decoded)))
                else:
                    tiles.append(torch.from_numpy(self.processor.tiles(decoded)).to(self.pixel_dtype))
            else:
                sizes.append(found[0])
                features.append(found[1])
            has_features.append(found is not None)
        return RecordImages(sizes, has_features, _joined(tiles), _joined(features), tuple(pixels))

    def _unreadable(self, index: int, error: RecordError) -> UserError:
        return UserError(
            f"passed the check but can't be read any more: {error}",
            where=f"record {self.record_id(index)}",
            fix="put the file back and run again",
        )


def _joined(pieces: list[torch.Tensor]) -> torch.Tensor | None:
    if len(pieces) > 1:
        return torch.cat(pieces)
    return pieces[0] if pieces else None
