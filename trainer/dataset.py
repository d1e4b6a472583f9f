"""Accepted records of a stage as a map-style data set of samples."""

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from llava_llama31.processing import IGNORE_INDEX, LlavaLlama31Processor
from llava_llama31.trainer.collator import Sample
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.records import Record, RecordError, RecordStore


Pictures = tuple[list[tuple[int, int]], torch.Tensor | None]  # (height, width) of each, and the tiles of all


class StageDataset(Dataset):
    """Samples by position; a negative index -1 - i is sample i with no supervised token (see `RankBatches`).

    Args:
        stores: one per source.
        rows: (source, row) of every sample.
        processor: makes ids, labels and tiles.
        pixel_dtype: of the tiles that are handed to the model.

    Raises:
        UserError: naming the record that can no longer be read; all were checked before training.
    """

    def __init__(
        self,
        stores: Sequence[RecordStore],
        rows: Sequence[tuple[int, int]],
        processor: LlavaLlama31Processor,
        pixel_dtype: torch.dtype = torch.float32,
    ):
        self.stores, self.rows, self.processor, self.pixel_dtype = stores, rows, processor, pixel_dtype

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self._sample(index, {})

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of one micro-batch; a picture that several of them show is read once."""
        known: dict[tuple[str, ...], Pictures] = {}
        return [self._sample(index, known) for index in indices]

    def _sample(self, index: int, known: dict[tuple[str, ...], Pictures]) -> Sample:
        source, row = self.rows[index if index >= 0 else -1 - index]
        store = self.stores[source]
        try:
            record = store[row]
            key = tuple(image.key() for image in record.images)
            if key not in known:
                known[key] = self._pictures(record)
        except RecordError as error:
            raise UserError(
                f"passed the check but can't be read any more: {error}",
                where=f"record {store.row_id(row)}",
                fix="put the file back and run again",
            ) from error
        sizes, tiles = known[key]
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
        )

    def _pictures(self, record: Record) -> Pictures:
        images = [image.open() for image in record.images]
        tiles = [torch.from_numpy(self.processor.tiles(image)) for image in images]
        sizes = [(image.height, image.width) for image in images]
        return sizes, torch.cat(tiles).to(self.pixel_dtype) if tiles else None
