"""Tiles of images made on the training device, equal to the last bit to those that workers make with Pillow.

Pillow's bicubic resize of 8-bit images is integer arithmetic, so it can be had exactly wherever integers can be added:
one pass, rounding to 8 bits, the other pass, as in libImaging/Resample.c of Pillow. GPU resizes, torchvision's among
them, round elsewhere and give other pixels.

A CPU adds int32 numbers. Other devices multiply matrices of float64 numbers, in which these sums of 30 bits are exact.
An image's two resizes, into its base tile and into its grid of tiles, share them: the left matrix holds the filters of
both along the rows, the right one along the columns, with zeros where the grid has no image.

Shapes: H W an image's height and width in pixels, T tiles, S side of a tile, N samples of a line.
"""

from collections.abc import Sequence

import numpy as np
import PIL
import torch
from PIL import Image

from llava_llama31.packed_llama_llava_llama31 import to_device
from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.processing.processing_llava_llama31 import Placement
from llava_llama31.trainer.data.batches.pillow_filters import PRECISION_BITS, banded, pillow_filter, turns_rows_first
from llava_llama31.trainer.errors import UserError


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
            what = f"the processor resizes with Pillow's filter {resample}; device_tiles supports only the bicubic one"
            raise UserError(what, where=where, fix="remove it")
        if not _as_pillow():
            what = f"Pillow {PIL.__version__} resizes differently from device_tiles"
            raise UserError(what, where=where, fix="remove it, or install the Pillow version of constraints.txt")
        self.processor = processor
        self._levels = torch.from_numpy(processor.pixel_levels).to(dtype)
        # where each channel's levels begin
        self._first_levels = (torch.arange(3) * self._levels.shape[1]).view(3, 1, 1)

    def __call__(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """(T, 3, S, S): tiles of all images, each uint8 (H, W, 3), in order."""
        on_cpu = images[0].device.type == "cpu"
        tiles = torch.cat([self._cut(image) for image in images]) if on_cpu else self.by_products(images)
        self._levels = self._levels.to(tiles.device)
        if self._first_levels.device != tiles.device:
            self._first_levels = self._first_levels.to(tiles.device)
        return self._levels.flatten().take(tiles + self._first_levels)

    def by_products(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """int64 (T, 3, S, S): the tiles' 8 bits, of images of uint8 (H, W, 3).

        One copy to the device for all images, and ten kernels for each.
        """
        side, device = self.processor.tile_size, images[0].device
        base = Placement(side, side, 0, 0, side, side)
        grids = [self.processor.placement((image.shape[0], image.shape[1])) for image in images]
        numbers = [_numbers(image, (base, grid)) for image, grid in zip(images, grids, strict=True)]
        # one copy: their number changes with every image
        there = to_device(torch.from_numpy(np.concatenate(numbers, axis=1)), device)
        parts = there.split([part.shape[1] for part in numbers], dim=1)
        counts = [1 + grid.grid_height * grid.grid_width // side**2 for grid in grids]
        tiles = torch.empty(sum(counts), 3, side, side, dtype=torch.float64, device=device)
        for image, grid, part, own in zip(images, grids, parts, tiles.split(counts), strict=True):
            canvas = own.new_empty(3, grid.grid_height, grid.grid_width)
            _resize_by_products(image, (base, grid), part, (own[0], canvas))
            own[1:].unflatten(0, (-1, grid.grid_width // side)).copy_(_squares(canvas, side))
        return tiles.add_(0.5).clamp_(0, 255).long()

    def _cut(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 (tiles of the image, 3, S, S) of uint8 (H, W, 3)."""
        side, image = self.processor.tile_size, image.permute(2, 0, 1)
        place = self.processor.placement((image.shape[1], image.shape[2]))
        canvas = image.new_zeros((3, place.grid_height, place.grid_width))
        rows, columns = slice(place.top, place.top + place.height), slice(place.left, place.left + place.width)
        canvas[:, rows, columns] = resize_as_pillow(image, place.height, place.width)
        return torch.cat([resize_as_pillow(image, side, side)[None], _squares(canvas, side).flatten(0, 1)])


def _squares(canvas: torch.Tensor, side: int) -> torch.Tensor:
    """(rows of tiles, tiles of a row, 3, S, S): a canvas (3, H, W) cut into tiles."""
    return canvas.unflatten(2, (-1, side)).unflatten(1, (-1, side)).permute(1, 3, 0, 2, 4)


def resize_as_pillow(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 (3, height, width): what `Image.resize` with the bicubic filter makes of uint8 (3, H, W)."""
    rows_first = turns_rows_first((image.shape[1], image.shape[2]), (height, width))
    for is_rows in (rows_first, not rows_first):
        if is_rows and image.shape[1] != height:
            image = _resize_lines(image.transpose(1, 2), height).transpose(1, 2)
        elif not is_rows and image.shape[2] != width:
            image = _resize_lines(image, width)
    return image


def resized_by_products(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 (height, width, 3) of uint8 (H, W, 3), as on a GPU; for checks of one."""
    places = [Placement(height, width, 0, 0, height, width)]
    canvas = torch.empty(3, height, width, dtype=torch.float64, device=image.device)
    _resize_by_products(image, places, to_device(torch.from_numpy(_numbers(image, places)), image.device), [canvas])
    return canvas.add_(0.5).clamp_(0, 255).to(torch.uint8).permute(1, 2, 0)


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
    first, weights = map(torch.from_numpy, pillow_filter(lines.shape[-1], size))
    last = lines.shape[-1] - 1
    total = torch.full((*lines.shape[:-1], size), 1 << (PRECISION_BITS - 1), dtype=torch.int32)
    for k, weight in enumerate(weights):
        # beyond the line's end the weight is zero
        total += lines[..., (first + k).clamp_(max=last)] * weight
    return (total >> PRECISION_BITS).clamp_(0, 255).to(torch.uint8)


def _numbers(image: torch.Tensor, places: Sequence[Placement]) -> np.ndarray:
    """Where the two matrices of an image, flat and one after the other, are not zero, and the float64 bits there.

    int64 (2, numbers). The left matrix has a row for each row of all canvases, the right one a column for each column.
    """
    height, width = image.shape[:2]
    rows, columns = (sum(sizes) for sizes in zip(*(place[:2] for place in places), strict=True))
    found, row, column = [], 0, 0
    for place in places:
        before, after, values = banded(height, place.height)
        found.append(((row + place.top + after) * height + before, values))
        before, after, values = banded(width, place.width)
        found.append((rows * height + before * columns + column + place.left + after, values))
        row, column = row + place.grid_height, column + place.grid_width
    where, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return np.stack([where, values.view(np.int64)])


def _resize_by_products(
    image: torch.Tensor, places: Sequence[Placement], numbers: torch.Tensor, canvases: Sequence[torch.Tensor]
) -> None:
    """Fill each float64 canvas (3, rows, columns) with an image of uint8 (H, W, 3), before the last rounding.

    Args:
        numbers: `_numbers` of the image and places, on its device.
    """
    height, width = image.shape[:2]
    rows, columns = (sum(sizes) for sizes in zip(*(place[:2] for place in places), strict=True))
    flat = torch.zeros(rows * height + width * columns, dtype=torch.float64, device=image.device)
    flat.scatter_(0, numbers[0], numbers[1].view(torch.float64))
    left = flat[: rows * height].view(rows, height).expand(3, -1, -1)
    right = flat[rows * height :].view(width, columns).expand(3, -1, -1)
    pixels = image.permute(2, 0, 1).to(torch.float64, memory_format=torch.contiguous_format)
    turned = [turns_rows_first((height, width), (place.height, place.width)) for place in places]
    # one pass, of each order that any of the resizes has
    sizes = (3 * rows * width if any(turned) else 0, 3 * height * columns if not all(turned) else 0)
    once = flat.new_empty(sum(sizes))
    by_rows, by_columns = once.split(sizes)
    if any(turned):
        torch.bmm(left, pixels, out=by_rows.view(3, rows, width))
    if not all(turned):
        torch.bmm(pixels, right, out=by_columns.view(3, height, columns))
    once.add_(0.5).clamp_(0, 255).floor_()
    row = column = 0
    for place, rows_first, canvas in zip(places, turned, canvases, strict=True):
        own_rows = slice(row, row + place.grid_height)
        own_columns = slice(column, column + place.grid_width)
        if rows_first:
            torch.bmm(by_rows.view(3, rows, width)[:, own_rows], right[..., own_columns], out=canvas)
        else:
            torch.bmm(left[:, own_rows], by_columns.view(3, height, columns)[..., own_columns], out=canvas)
        row, column = row + place.grid_height, column + place.grid_width
