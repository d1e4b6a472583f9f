"""Tiles of images made on the training device, equal to the last bit to those that workers make with Pillow.

Pillow's bicubic resize of 8-bit images is integer arithmetic, so it can be had exactly wherever integers can be added:
one pass, rounding to 8 bits, the other pass, as in libImaging/Resample.c of Pillow. GPU resizes, torchvision's among
them, round elsewhere and give other pixels.

Shapes: H W an image's height and width in pixels, T tiles, S side of a tile, N samples of a line, K weights of one.
"""

import functools
from collections.abc import Sequence

import numpy as np
import PIL
import torch
from PIL import Image

from llava_llama31.packed_llama_llava_llama31 import to_device
from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.errors import UserError


_PRECISION_BITS = 32 - 8 - 2  # of Pillow's weights; their products with 8 bits fit an int32


class DeviceTiles:
    """Cuts decoded images into base tile and anyres tiles on the device that the images lie on.

    Args:
        processor: whose `tiles` are matched.
        dtype: of the tiles.
        where: recipe key that an error names.

    Raises:
        UserError: the processor resizes by another filter, or this Pillow resizes otherwise than is known here.
    """

    def __init__(self, processor: LlavaLlama31Processor, dtype: torch.dtype = torch.float32, where: str = ""):
        resample = processor.image_processor.resample
        if resample != Image.Resampling.BICUBIC:
            what = f"the processor resizes by Pillow's filter {resample}, device_tiles knows the bicubic one alone"
            raise UserError(what, where=where, fix="remove it")
        if not _as_pillow():
            what = f"Pillow {PIL.__version__} resizes otherwise than device_tiles"
            raise UserError(what, where=where, fix="remove it, or take the Pillow of constraints.txt")
        self.processor = processor
        self._levels = torch.from_numpy(processor.pixel_levels).to(dtype)
        # where each channel's levels begin
        self._first_levels = (torch.arange(3) * self._levels.shape[1]).view(3, 1, 1)

    def __call__(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """(T, 3, S, S): tiles of all images, each uint8 (H, W, 3), in order."""
        tiles = torch.cat([self._cut(image.permute(2, 0, 1)) for image in images])
        self._levels = self._levels.to(tiles.device)
        if self._first_levels.device != tiles.device:
            self._first_levels = self._first_levels.to(tiles.device)
        return self._levels.flatten().take(tiles + self._first_levels)

    def _cut(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 (tiles of the image, 3, S, S) of uint8 (3, H, W)."""
        side = self.processor.tile_size
        height, width = image.shape[1:]
        place = self.processor.placement((height, width))
        canvas = image.new_zeros((3, place.grid_height, place.grid_width))
        rows, columns = slice(place.top, place.top + place.height), slice(place.left, place.left + place.width)
        canvas[:, rows, columns] = resize_as_pillow(image, place.height, place.width)
        grid = canvas.unflatten(2, (-1, side)).unflatten(1, (-1, side)).permute(1, 3, 0, 2, 4).flatten(0, 1)
        return torch.cat([resize_as_pillow(image, side, side)[None], grid])


def resize_as_pillow(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 (3, height, width): what `Image.resize` with the bicubic filter makes of uint8 (3, H, W)."""
    lost_rows, lost_columns = image.shape[1] - height, image.shape[2] - width
    # Pillow 13 (#9549); the passes do not commute, since each rounds
    rows_first = lost_rows > max(0, 2 * lost_columns)
    for is_rows in (rows_first, not rows_first):
        if is_rows and lost_rows:
            image = _resize_lines(image.transpose(1, 2), height).transpose(1, 2)
        elif not is_rows and lost_columns:
            image = _resize_lines(image, width)
    return image


def _as_pillow() -> bool:
    """Whether noise is resized as Pillow does, on both sides of the rule for the passes' order."""
    noise = np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8)
    reference, image = Image.fromarray(noise), torch.from_numpy(noise).permute(2, 0, 1)
    return all(
        np.array_equal(
            np.asarray(reference.resize((width, height), Image.Resampling.BICUBIC)).transpose(2, 0, 1),
            resize_as_pillow(image, height, width),
        )
        for height, width in ((8, 8), (8, 23), (8, 24), (12, 40), (22, 31), (40, 12), (40, 50))
    )


def _resize_lines(lines: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 (..., size) of uint8 (..., N)."""
    if lines.device.type == "cpu":
        return _by_sums(lines, size)
    return _by_product(lines, size)


def _by_sums(lines: torch.Tensor, size: int) -> torch.Tensor:
    first, weights = _filter(lines.shape[-1], size)
    last = lines.shape[-1] - 1
    total = torch.full((*lines.shape[:-1], size), 1 << (_PRECISION_BITS - 1), dtype=torch.int32, device=lines.device)
    for k, weight in enumerate(weights):
        # beyond the line's end the weight is zero
        total += lines[..., (first + k).clamp_(max=last)] * weight
    return (total >> _PRECISION_BITS).clamp_(0, 255).to(torch.uint8)


def _by_product(lines: torch.Tensor, size: int) -> torch.Tensor:
    """The same by one product in float64, which is exact: sums of 30 bits and a few kernels, where sums take K x 4."""
    length = lines.shape[-1]
    first, weights = _filter(length, size)
    # one copy for the filter: N, K and S change with every image
    packed = to_device(torch.cat([first[None], weights]).int(), lines.device)
    places = packed[:1] + torch.arange(len(weights), dtype=torch.int32, device=lines.device)[:, None]
    # with room for the weights beyond the line's end, which are zero
    matrix = torch.zeros(length + len(weights), size, dtype=torch.float64, device=lines.device)
    matrix = matrix.scatter_(0, places.long(), packed[1:].double())[:length].mul_(2.0**-_PRECISION_BITS)
    half = matrix.new_full((size,), 0.5)
    total = torch.addmm(half, lines.reshape(-1, length).double(), matrix)
    return total.clamp_(0, 255).to(torch.uint8).view(*lines.shape[:-1], size)


@functools.lru_cache(maxsize=256)
def _filter(num_before: int, num_after: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each output sample's inputs begin, int64 (num_after,), and their weights, int32 (K, num_after)."""
    scale = num_before / num_after
    stretch = max(scale, 1.0)
    support = 2.0 * stretch  # of the bicubic filter
    center = (np.arange(num_after) + 0.5) * scale
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    end = np.minimum((center + support + 0.5).astype(np.int64), num_before)
    weights = np.zeros((int((end - first).max()), num_after))
    total = np.zeros(num_after)
    for k, row in enumerate(weights):
        inside = k < end - first
        row[inside] = _bicubic((k + first - center + 0.5) * (1 / stretch))[inside]
        total += row  # one after the other, as Pillow adds them
    weights /= total
    scaled = np.trunc(weights * (1 << _PRECISION_BITS) + np.where(weights < 0, -0.5, 0.5))
    return torch.from_numpy(first), torch.from_numpy(scaled.astype(np.int32))


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution with a = -0.5, in the order of operations that Pillow has."""
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
