"""One set of pixels: every mode and format of an image, at every door of training, evaluation and use."""

import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from stock_pixels import DROPS_TRANSPARENCY, on_white, resize_by_pil
from transformers import AutoProcessor, LlavaNextProcessor

from llava_llama31.processing.pixels_llava_llama31 import upright_rgb
from llava_llama31.trainer.data.batches.device_tiles import DeviceTiles
from llava_llama31.trainer.data.sources.images import FORMATS, ImageRef
from llava_llama31.trainer.data.sources.reject_reasons import RecordError


HEIGHT, WIDTH = 24, 41
STEP = 16


def drawn(mode: str) -> Image.Image:
    """Few levels, so that a palette and a transparent level hold many pixels of each."""
    bands = len(Image.new(mode, (1, 1)).getbands()) if mode not in ("P", "1") else 1
    pixels = np.random.default_rng(bands).integers(0, 256 // STEP, (HEIGHT, WIDTH, bands)) * STEP
    pixels = pixels.astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray((pixels[..., 0].astype(np.uint16) << 8) + 7)
    if mode == "1":
        return Image.fromarray(pixels[..., 0]).convert("1")
    if mode == "P":
        image = Image.fromarray(pixels[..., 0] // STEP)
        palette = Image.new("P", image.size)
        palette.putdata(pixels[..., 0].ravel() // STEP)
        palette.putpalette(np.random.default_rng(5).integers(0, 256, 3 * 16, dtype=np.uint8).tobytes())
        return palette
    return Image.frombytes(mode, (WIDTH, HEIGHT), pixels.tobytes())


# mode, format, options of `save`
CASES = [
    ("RGB", "PNG", {}),
    ("RGB", "PNG", {"transparency": (16, 32, 48)}),
    ("RGBA", "PNG", {}),
    ("L", "PNG", {}),
    ("L", "PNG", {"transparency": 32}),
    ("LA", "PNG", {}),
    ("P", "PNG", {}),
    ("P", "PNG", {"transparency": 3}),
    ("P", "PNG", {"transparency": bytes(range(0, 256, 16))}),
    ("1", "PNG", {}),
    ("1", "PNG", {"transparency": 0}),
    ("I;16", "PNG", {}),
    ("I;16", "PNG", {"transparency": (32 << 8) + 7}),
    ("RGB", "JPEG", {}),
    ("L", "JPEG", {}),
    ("CMYK", "JPEG", {}),
    ("RGB", "WEBP", {}),
    ("RGBA", "WEBP", {"lossless": True, "exact": True}),
    ("P", "GIF", {}),
    ("P", "GIF", {"transparency": 3}),
    ("RGB", "BMP", {}),
    ("RGBA", "BMP", {}),
    ("P", "BMP", {}),
]
IDS = [f"{mode}-{format}{'-' + ','.join(options) if options else ''}" for mode, format, options in CASES]


def encoded(mode: str, format: str, options: dict, orientation: int = 1, *, late: bool = False) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = drawn(mode)
    if isinstance(options.get("transparency"), tuple):
        image.putpixel((3, 3), options["transparency"])
    file = io.BytesIO()
    image.save(file, format, **options, **({"exif": exif} if orientation > 1 else {}))
    data = file.getvalue()
    return behind_the_pixels(data) if late else data


def behind_the_pixels(png: bytes) -> bytes:
    """The PNG with its eXIf chunk moved to the end."""
    start = png.index(b"eXIf") - 4
    chunk = png[start : start + 12 + int.from_bytes(png[start : start + 4], "big")]
    return png.replace(chunk, b"").replace(b"\0\0\0\0IEND", chunk + b"\0\0\0\0IEND")


def seen(data: bytes) -> np.ndarray:
    """uint8 (H, W, 3) by Transformers' and Pillow's own means, but for 16-bit grey."""
    image = Image.open(io.BytesIO(data))
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode != "I;16":
        return on_white(image)
    levels = np.asarray(image)
    shades = np.where(levels == image.info.get("transparency", -1), 255, levels // 256)
    return np.repeat(shades.astype(np.uint8)[..., None], 3, axis=-1)


def content(part: dict) -> list[dict]:
    return [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}]


def by_template(processor, part: dict) -> np.ndarray:
    given = processor.apply_chat_template(content(part), tokenize=True, return_dict=True, return_tensors="np")
    return given["pixel_values"][0]


@pytest.fixture(scope="session")
def folder(processor, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("processor")
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def remote(folder):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="session")
def stock(folder):
    with pytest.MonkeyPatch.context() as patch:
        resize_by_pil(patch)
        loaded = AutoProcessor.from_pretrained(folder)
    assert type(loaded) is LlavaNextProcessor
    return loaded


def check_all_doors(data: bytes, processor, remote, path: Path) -> np.ndarray:
    """The tiles of an encoded image, which are the same at every door."""
    expected = seen(data)
    ref = ImageRef("x", data=data)
    decoded = ref.open()
    assert decoded.mode == "RGB" and np.array_equal(np.asarray(decoded), expected)
    assert ref.size() == expected.shape[:2]
    tiles = processor.image_processor(Image.fromarray(expected), return_tensors="np")["pixel_values"][0]
    assert np.array_equal(processor.tiles(decoded), tiles)
    assert np.array_equal(DeviceTiles(processor)([torch.from_numpy(np.array(decoded))]).numpy(), tiles)
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    loaded = Image.open(path)
    loaded.load()
    sources = [Image.open(path), loaded, str(path), path, data, text, f"data:image/png;base64,{text}"]
    assert np.array_equal(processor.tiles(Image.open(path)), tiles)
    for opener in (processor, remote):
        for source in sources:
            assert np.array_equal(opener(images=source, text="<image>", return_tensors="np")["pixel_values"][0], tiles)
            assert np.array_equal(by_template(opener, {"type": "image", "image": source}), tiles)
        for key, value in (("path", str(path)), ("url", str(path)), ("base64", text)):
            assert np.array_equal(by_template(opener, {"type": "image", key: value}), tiles)
    return tiles


@pytest.mark.parametrize(("mode", "format", "options"), CASES, ids=IDS)
def test_an_image_has_the_same_pixels_at_every_door(processor, remote, stock, tmp_path, mode, format, options):
    data = encoded(mode, format, options)
    tiles = check_all_doors(data, processor, remote, tmp_path / "x")
    if mode == "I;16":
        return  # stock clips it to white
    opened = Image.open(tmp_path / "x")
    if DROPS_TRANSPARENCY and ("A" in opened.getbands() or "transparency" in opened.info):
        return
    assert np.array_equal(stock(images=opened, text="<image>", return_tensors="np")["pixel_values"][0], tiles)
    assert np.array_equal(by_template(stock, {"type": "image", "image": opened}), tiles)
    if "A" not in opened.getbands() and "transparency" not in opened.info:
        # stock's own loader drops transparency
        assert np.array_equal(by_template(stock, {"type": "image", "path": str(tmp_path / "x")}), tiles)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize(
    ("mode", "format", "late"),
    [
        ("RGB", "JPEG", False),
        ("RGBA", "PNG", False),
        ("LA", "PNG", True),
        ("I;16", "PNG", True),
        ("RGBA", "WEBP", False),
    ],
)
def test_an_image_is_turned_alike_at_every_door(processor, remote, tmp_path, mode, format, late, orientation):
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    data = encoded(mode, format, options, orientation, late=late)
    check_all_doors(data, processor, remote, tmp_path / "x")


@settings(max_examples=40)
@given(
    mode=st.sampled_from(["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"]),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_mode_is_as_transformers_shows_it(mode, height, width, seed):
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    if mode in ("1", "P"):
        image = Image.fromarray(pixels[..., 0]).convert(mode)
    elif mode == "PA":
        image = Image.frombytes("LA", (width, height), pixels.tobytes()).convert("PA")
    else:
        image = Image.frombytes(mode, (width, height), pixels.tobytes())
    once = upright_rgb(image)
    assert once.mode == "RGB" and once.info == {}
    assert np.array_equal(np.asarray(once), on_white(image))
    assert np.array_equal(np.asarray(upright_rgb(once)), np.asarray(once))


MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"]
MODES += ["I", "F", "I;16", "I;16L", "I;16B"]
READ = [*FORMATS, "MPO"]  # MPO: JPEGs in a file, of which the first is shown
NOT_READ = ["TIFF", "JPEG2000", "ICO", "PPM", "TGA", "AVIF", "DIB", "PCX", "SGI"]


def in_mode(mode: str) -> Image.Image:
    deep = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) * 60
    if mode in ("I", "F"):
        return Image.fromarray((deep % 256).astype(np.int32 if mode == "I" else np.float32))
    if mode.startswith("I;16"):
        return Image.fromarray(deep.astype(np.uint16)).convert(mode)
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 4), np.uint8))
    if mode in ("LA", "La", "PA"):
        return colours.convert("LA").convert(mode)
    return colours.convert(mode) if mode in ("RGBA", "RGBa") else colours.convert("RGB").convert(mode)


@pytest.mark.parametrize("format", [*READ, *NOT_READ])
def test_whatever_mode_is_saved_is_shown_or_refused_by_its_format(format):
    exif = Image.Exif()
    exif[0x0112] = 6
    saved = 0
    for mode in MODES:
        file = io.BytesIO()
        try:
            in_mode(mode).save(file, format, **({"exif": exif} if format in ("PNG", "JPEG", "WEBP") else {}))
        except (OSError, ValueError, KeyError):  # a mode that the format has not
            continue
        saved += 1
        ref = ImageRef("x", data=file.getvalue())
        if format in READ:
            expected = seen(ref.data)
            assert np.array_equal(np.asarray(ref.open()), expected) and ref.size() == expected.shape[:2], mode
            continue
        for call in (ref.size, ref.open):
            with pytest.raises(RecordError, match="unsupported_image_format: starts with"):
                call()
    assert saved


def png(samples: np.ndarray, depth: int, colour: int, *, palette: bytes = b"", transparent: bytes = b"") -> bytes:
    """A PNG of samples (H, W, bands) in any bit depth, which Pillow itself cannot write."""
    height, width, _ = samples.shape
    bits = ((samples[..., None] >> np.arange(depth)[::-1]) & 1).astype(np.uint8).reshape(height, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(bits, axis=1))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), (b"PLTE", palette)]
    chunks += [(b"tRNS", transparent), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
        if data or kind == b"IEND"
    )


GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6
DEPTHS = [(GREY, depth) for depth in (1, 2, 4, 8, 16)] + [(PALETTE, depth) for depth in (1, 2, 4, 8)]
DEPTHS += [(colour, depth) for colour in (COLOUR, GREY_ALPHA, COLOUR_ALPHA) for depth in (8, 16)]
PNGS = [(*kind, False) for kind in DEPTHS] + [(*kind, True) for kind in DEPTHS if kind[0] < GREY_ALPHA]
MISREAD = [(GREY, 2), (GREY, 4), (COLOUR, 16)]  # by Pillow, where they have a transparent level: docs/data.md


@pytest.mark.parametrize(("colour", "depth", "with_level"), PNGS)
def test_every_depth_of_a_png_is_shown_as_its_samples_say(colour, depth, with_level):
    rng = np.random.default_rng(depth)
    bands = {COLOUR: 3, GREY_ALPHA: 2, COLOUR_ALPHA: 4}.get(colour, 1)
    num_levels = min(2**depth, 16)
    samples = rng.integers(0, num_levels, (9, 13, bands))
    alpha = np.ones((9, 13))
    palette = transparent = b""
    if colour == PALETTE:
        colours, alphas = rng.integers(0, 256, (num_levels, 3), np.uint8), rng.integers(0, 256, num_levels, np.uint8)
        palette, shades = colours.tobytes(), colours[samples[..., 0]]
        if with_level:
            transparent, alpha = alphas.tobytes(), alphas[samples[..., 0]] / 255
    else:
        samples = samples * (2**depth // num_levels)
        eight = samples >> 8 if depth == 16 else samples * 255 // (2**depth - 1)
        shades = eight[..., :3] if bands > 2 else np.repeat(eight[..., :1], 3, axis=-1)
        if with_level:
            transparent = struct.pack(f">{bands}H", *samples[4, 4])
            alpha = 1.0 - (samples == samples[4, 4]).all(axis=-1)
        if bands in (2, 4):
            alpha = eight[..., -1] / 255
    data = png(samples, depth, colour, palette=palette, transparent=transparent)
    shown = np.asarray(ImageRef("x", data=data).open())
    assert np.array_equal(shown, seen(data))
    on_white = 255 + (shades.astype(float) - 255) * alpha[..., None]
    assert (np.abs(shown - on_white).max() <= 0.5) != (with_level and (colour, depth) in MISREAD)


def test_a_large_transparent_image_is_put_together_band_by_band():
    image = Image.effect_noise((1500, 1501), 60).convert("RGBA")
    image.putalpha(Image.effect_noise(image.size, 90))
    assert np.array_equal(np.asarray(upright_rgb(image)), on_white(image))


def test_32_bit_values_of_unknown_scale_are_refused_and_known_ones_taken(processor):
    deep = Image.fromarray(np.array([[0, 70_000]], np.int32))
    with pytest.raises(ValueError, match="mode I has values from 0 to 70000"):
        processor(images=deep, text="<image>")
    assert np.asarray(upright_rgb(Image.fromarray(np.array([[0, 200]], np.int32)))).tolist() == [[[0] * 3, [200] * 3]]


def test_a_string_that_is_no_image_is_refused(processor):
    with pytest.raises(ValueError, match="'nowhere.png' is neither an image file that exists nor base64 nor a URL"):
        processor(images="nowhere.png", text="<image>")


def test_images_of_several_rows_keep_their_nesting(processor):
    images = [[drawn("RGBA")], [drawn("LA"), drawn("L")]]
    nested = processor(images=images, text=["<image>", "<image> <image>"], padding=True, return_tensors="np")
    alone = [processor.tiles(image) for row in images for image in row]
    assert len(nested["pixel_values"]) == 3
    for padded, tiles in zip(nested["pixel_values"], alone, strict=True):
        assert np.array_equal(padded[: len(tiles)], tiles)


def test_arrays_stay_what_they_are(processor):
    pixels = np.asarray(drawn("RGB"))
    given = processor(images=[pixels], text="<image>", return_tensors="np")["pixel_values"][0]
    assert np.array_equal(given, processor.tiles(Image.fromarray(pixels)))
