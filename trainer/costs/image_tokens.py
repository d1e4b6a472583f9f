"""Tiles and tokens of an image by its size alone: what the processor makes of it, without one.

This file does not import torch. tests/test_towers.py holds it against the processor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_llama31.tile_grids import GRID_SHAPES


@dataclass(frozen=True)
class TileGrid:
    """How images are tiled.

    Args:
        pinpoints: (height, width) in pixels of the resolutions that an image may be tiled at.
        tile: side of a tile in pixels.
        patches: of a tile's side.
    """

    pinpoints: tuple[tuple[int, int], ...]
    tile: int
    patches: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "TileGrid":
        """The grid of a LlavaNext configuration."""
        vision = config["vision_config"]
        pinpoints = tuple((height, width) for height, width in config["image_grid_pinpoints"])
        return cls(pinpoints, vision["image_size"], vision["image_size"] // vision["patch_size"])

    def measure(self, size: Sequence[int]) -> tuple[int, int, int]:
        """Image tokens, patch features among them, and tiles of an image of (height, width) pixels."""
        height, width = size
        rows, columns = (side // self.tile for side in self._best(height, width))
        across, down = columns * self.patches, rows * self.patches
        # padding is cut off again, on both sides alike
        if width / height > across / down:
            down -= (down - int(round(height * (across / width), 7))) // 2 * 2
        else:
            across -= (across - int(round(width * (down / height), 7))) // 2 * 2
        features = across * down + self.patches**2
        return features + down, features, rows * columns + 1

    def _best(self, height: int, width: int) -> tuple[int, int]:
        """The resolution that keeps most of the image, and of these the smallest."""

        def kept(pinpoint: tuple[int, int]) -> tuple[int, int]:
            scale = min(pinpoint[1] / width, pinpoint[0] / height)
            pixels = min(int(width * scale) * int(height * scale), width * height)
            return pixels, pixels - pinpoint[0] * pinpoint[1]

        return max(self.pinpoints, key=kept)


CLIP_336 = TileGrid(tuple((336 * rows, 336 * columns) for rows, columns in GRID_SHAPES), 336, 24)
