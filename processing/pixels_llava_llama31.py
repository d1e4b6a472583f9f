"""The one way from an encoded or opened image to the pixels that the model sees, in training and in use.

Only PIL: the data check decodes millions of images in processes that must start soon.

Shapes: H W the height and width of an image in pixels.
"""

from typing import cast

from PIL import Image, ImageChops


_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)
_BAND_PIXELS = 2**20


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, 8 bits, upright by its EXIF, on white where it is transparent; a new image without metadata.

    Transparency and colour modes are as in Transformers' `convert_to_rgb`; 16-bit grey, which that clips to white,
    keeps its upper 8 bits. Applied twice it changes nothing.

    Raises:
        ValueError: 32-bit values outside [0, 255], whose scale is unknown.
    """
    image.getim()  # decodes: the metadata may stand behind the pixels
    if image.mode.startswith("I;16"):
        rgb = _sixteen_bit_grey(image)
    elif "A" in image.getbands() or image.info.get("transparency") is not None:
        rgb = _on_white(image)
    else:
        if image.mode in ("I", "F"):
            low, high = cast(tuple[float, float], image.getextrema())  # of the one band
            if not 0 <= low <= high <= 255:
                raise ValueError(
                    f"an image of mode {image.mode} has values from {low} to {high}, not 0 to 255: scale it to 8 bits"
                )
        rgb = image.convert("RGB")
    orientation = orientation_of(image)
    if orientation in _TRANSPOSE:
        rgb = rgb.transpose(_TRANSPOSE[orientation])
    rgb.info = {}  # with its EXIF it would be turned again by the next reader
    return rgb


def orientation_of(image: Image.Image) -> int:
    """EXIF's number of the orientation, 1 to 8, from what has been read of the image so far; 1 where there is none."""
    try:
        # the PNG class's own getexif would decode the whole image to look for EXIF behind the pixels
        return Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except Exception:  # broken metadata does not spoil the pixels
        return 1


def _on_white(image: Image.Image) -> Image.Image:
    """RGB over white, band by band: a whole RGBA copy of a large image would need gigabytes."""
    canvas = Image.new("RGB", image.size)
    num_rows = max(1, _BAND_PIXELS // max(1, image.width))
    for top in range(0, image.height, num_rows):
        band = image.crop((0, top, image.width, min(top + num_rows, image.height))).convert("RGBA")
        paper = Image.new("RGBA", band.size, (255, 255, 255, 255))
        canvas.paste(Image.alpha_composite(paper, band).convert("RGB"), (0, top))
    return canvas


def _sixteen_bit_grey(image: Image.Image) -> Image.Image:
    """RGB of the upper 8 bits; the one level that is marked as transparent is white."""
    levels = image.tobytes()
    upper_first = Image.new(image.mode, (1, 1), 1).tobytes() == b"\0\1"
    shades, rests = (Image.frombytes("L", image.size, levels[first::2]) for first in (not upper_first, upper_first))
    transparent = image.info.get("transparency")
    if transparent is not None:
        of_shade, of_rest = (
            band.point([255 * (level == wanted) for level in range(256)])
            for band, wanted in zip((shades, rests), divmod(transparent, 256), strict=True)
        )
        shades.paste(255, mask=ImageChops.darker(of_shade, of_rest))
    return shades.convert("RGB")
