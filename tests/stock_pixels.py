"""What Transformers makes of an image of any mode: the tests' reference for ours."""

from functools import partial

import numpy as np
import pytest
import transformers
from packaging.version import Version
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_transforms import convert_to_rgb


DROPS_TRANSPARENCY = Version(transformers.__version__) < Version("5.20")


def on_white(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3); by Pillow where this Transformers still drops transparency."""
    if not DROPS_TRANSPARENCY:
        return convert_to_rgb(image, return_numpy=True)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def resize_by_pil(patch: pytest.MonkeyPatch) -> None:
    """Stock processors that are opened from here on resize by PIL, also where torchvision is installed."""
    by_pil = partial(AutoImageProcessor.from_pretrained, backend="pil")
    patch.setattr(AutoImageProcessor, "from_pretrained", by_pil)
