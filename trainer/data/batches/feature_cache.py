"""Features of a frozen vision tower, kept on disk: an image is decoded, tiled and encoded once.

`KEY.features` has the images' features one behind the other, `KEY.index` a record for each, written last: an entry
is complete or invisible. KEY changes with the tower's weights and with all else that the features depend on.

Shapes: T tiles, P patches of a tile, D width of the chosen layers together.
"""

import fcntl
import hashlib
import inspect
import json
import logging
import math
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from llava_llama31.processing import LlavaLlama31Processor, pixels_llava_llama31
from llava_llama31.trainer.data.sources import images
from llava_llama31.trainer.data.sources.images import ImageRef
from llava_llama31.trainer.data.sources.user_cache import user_cache
from llava_llama31.trainer.distributed.devices import device_name


if TYPE_CHECKING:  # a data loader's worker has no use for the model
    from llava_llama31 import LlavaLlama31ForConditionalGeneration


logger = logging.getLogger(__name__)

_RECORD = struct.Struct("<16sQIIII")  # image, offset, tiles, height, width, checksum of these and of the features
_PACKAGES = ("numpy", "pillow", "torch", "transformers")
# whose products and convolutions of float32 numbers may be narrower; their types don't declare it
_BACKENDS: Any = torch.backends
_PRODUCTS = (_BACKENDS.cuda.matmul, _BACKENDS.cudnn.conv, _BACKENDS.mkldnn.matmul)


class Entry(NamedTuple):
    """Where an image's features lie; height and width are the image's, in pixels."""

    offset: int
    num_tiles: int
    height: int
    width: int
    checksum: int


class FeatureCache:
    """Features (T, P, D) by image; several processes may read and store at once.

    Args:
        folder: of all caches that share the quota.
        key: of the tower and of how images become tiles (`cache_key`).
        shape: (P, D).
        dtype: of the features.
        quota: bytes that the folder may hold; nothing is ever evicted.
    """

    def __init__(self, folder: Path, key: str, shape: Sequence[int], dtype: torch.dtype, quota: int):
        self.folder, self.shape, self.dtype, self.quota = folder, tuple(shape), dtype, quota
        self.features, self.index = folder / f"{key}.features", folder / f"{key}.index"
        self._tile_bytes = math.prod(self.shape) * dtype.itemsize
        self._entries: dict[bytes, Entry] = {}
        self._num_read = 0  # bytes of the index
        self._end = 0  # of the last whole entry
        folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, image_id: bytes) -> bool:
        return image_id in self._entries

    def load(self, image: ImageRef) -> tuple[tuple[int, int], torch.Tensor] | None:
        """(height, width) of an image and its features (T, P, D), mapped from the file; None where there are none."""
        image_id = image_key(image)
        entry = self._entries.get(image_id)
        if entry is None:
            return None
        try:
            # private: torch tensors need writable memory
            data = np.memmap(self.features, np.uint8, "c", entry.offset, (entry.num_tiles * self._tile_bytes,))
        except (OSError, ValueError) as error:
            self._forget(image_id, image, str(error))
            return None
        if _checksum(image_id, entry, data) != entry.checksum:
            self._forget(image_id, image, "wrong checksum")
            return None
        features = torch.from_numpy(data).view(self.dtype).view(entry.num_tiles, *self.shape)
        return (entry.height, entry.width), features

    def store(self, image_id: bytes, size: tuple[int, int], features: torch.Tensor) -> bool:
        """Keep the features of an image of (height, width) pixels; False where the quota or the disk is full."""
        assert features.shape[1:] == self.shape and features.dtype == self.dtype
        data = features.detach().cpu().contiguous().view(torch.uint8).numpy().ravel()
        try:
            with self._locked():
                self.refresh()
                if image_id in self._entries:
                    return True
                if self._used() + data.nbytes + _RECORD.size > self.quota:
                    return False
                entry = Entry(self._end, len(features), *size, checksum=0)
                entry = entry._replace(checksum=_checksum(image_id, entry, data))
                _write_at(self.features, self._end, data.data)
                _write_at(self.index, self._num_read, _RECORD.pack(image_id, *entry))
                self.refresh()
                return True
        except OSError as error:
            logger.warning("%s: no more features are stored: %s", self.features, error)
            return False

    def refresh(self) -> None:
        """See what other processes have stored."""
        try:
            size = self.index.stat().st_size
            if size < self._num_read:  # deleted, and started again
                self._entries, self._num_read, self._end = {}, 0, 0
            with open(self.index, "rb") as file:
                file.seek(self._num_read)
                content = file.read()
            end = self.features.stat().st_size
        except FileNotFoundError:
            return
        whole = len(content) - len(content) % _RECORD.size  # a killed process may have left a part of a record
        for image_id, *numbers in _RECORD.iter_unpack(content[:whole]):
            entry = Entry(*numbers)
            if entry.offset + entry.num_tiles * self._tile_bytes > end:
                logger.warning("%s: a damaged entry is ignored, it points beyond the end of %s", self.index, end)
                continue
            self._entries[image_id] = entry
            self._end = max(self._end, entry.offset + entry.num_tiles * self._tile_bytes)
        self._num_read += whole

    def __getstate__(self) -> dict[str, object]:
        # a data loader's worker reads the index by itself
        return self.__dict__ | {"_entries": {}, "_num_read": 0, "_end": 0}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.refresh()

    def _used(self) -> int:
        """Bytes of the folder, without what a killed process left behind the last whole entry."""
        own = (self.features, self.index)
        others = (file.stat().st_size for file in self.folder.iterdir() if file not in own)
        return self._end + self._num_read + sum(others)

    def _forget(self, image_id: bytes, image: ImageRef, what: str) -> None:
        logger.warning(
            "%s: the features of %s are damaged (%s) and computed instead; delete the file to store all of them again",
            self.features,
            image.name,
            what,
        )
        del self._entries[image_id]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _checksum(image_id: bytes, entry: Entry, data: np.ndarray) -> int:
    return zlib.crc32(data.data, zlib.crc32(_RECORD.pack(image_id, *entry._replace(checksum=0))))


def _write_at(path: Path, end: int, content: bytes | memoryview) -> None:
    """Write behind the whole entries, over what a killed process may have left there."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        file.truncate(end)
        file.seek(end)
        file.write(content)


def image_key(image: ImageRef) -> bytes:
    """16 bytes that change with an image's file (path, size, modification time), or with its bytes."""
    signature = image.stat() if image.data is None else None
    return hashlib.blake2b(repr((image.key(), signature)).encode(), digest_size=16).digest()


def cache_key(
    model: "LlavaLlama31ForConditionalGeneration",
    processor: LlavaLlama31Processor,
    device: torch.device,
    pixel_dtype: torch.dtype,
    *,
    autocast: bool,
) -> str:
    """32 hex digits that change with the tower's weights, layers and arithmetic, the tiles, and the code of both."""
    digest = hashlib.blake2b(digest_size=16)
    config = model.config
    vision: Any = config.vision_config
    settings = [
        vision.to_dict(),
        vision._attn_implementation,
        config.vision_feature_layer,
        config.vision_feature_select_strategy,
        processor.image_processor.to_json_string(),
        device_name(device),
        # not get_float32_matmul_precision(), which fails where tf32 was set by its new name
        [str(pixel_dtype), autocast, *(part.fp32_precision for part in _PRODUCTS)],
        [version(package) for package in _PACKAGES],
    ]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for part in (images, pixels_llava_llama31, type(processor), type(model)):
        digest.update(Path(inspect.getfile(part)).read_bytes())
    for name, weight in sorted(model.model.vision_tower.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def default_folder() -> Path:
    """`llava-llama31/features` under the user's cache folder."""
    return user_cache("features")
