"""Images: measured by the header as they are decoded, kept under the root, refused with a reason."""

import base64
import io
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps
from PIL.PngImagePlugin import PngInfo
from stock_pixels import on_white

from llava_llama31.trainer.data.sources.images import FORMATS, ImageRef, image_at
from llava_llama31.trainer.data.sources.reject_reasons import RecordError


# FUZZ_SCALE=40 looks forty times as far
SCALE = int(os.environ.get("FUZZ_SCALE", "1"))


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def reason_of(call) -> str:
    with pytest.raises(RecordError) as caught:
        call()
    assert caught.value.detail
    return caught.value.reason


@pytest.mark.parametrize("format", FORMATS)
def test_size_and_pixels_of_every_format(make_image, format):
    image = make_image(13, 29)
    ref = ImageRef("x", data=encoded(image, format, **({"lossless": True} if format == "WEBP" else {})))
    assert ref.size() == (13, 29)
    decoded = ref.open()
    assert decoded.mode == "RGB" and decoded.size == (29, 13)
    if format not in ("JPEG", "GIF"):
        assert np.array_equal(np.asarray(decoded), np.asarray(image))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_applied_as_pillow_does(make_image, tmp_path, format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "x").write_bytes(encoded(make_image(16, 40), format, exif=exif))
    ref = image_at("x", tmp_path)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "x")).convert("RGB")
    assert ref.size() == (expected.height, expected.width)
    assert np.array_equal(np.asarray(ref.open()), np.asarray(expected))


def test_orientation_behind_the_pixels_is_applied_as_pillow_does(make_image):
    exif = Image.Exif()
    exif[0x0112] = 6
    png = encoded(make_image(8, 20), exif=exif)
    start = png.index(b"eXIf") - 4
    chunk = png[start : start + 12 + int.from_bytes(png[start : start + 4], "big")]
    late = png.replace(chunk, b"").replace(b"\0\0\0\0IEND", chunk + b"\0\0\0\0IEND")
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(late)))
    ref = ImageRef("x", data=late)
    assert ref.size() == (20, 8) and np.array_equal(np.asarray(ref.open()), np.asarray(expected))


def test_orientation_that_is_broken_changes_nothing(make_image):
    rubbish = PngInfo()
    rubbish.add_text("Raw profile type exif", "a\nb\nc\nno hexadecimal digits")
    broken = encoded(make_image(8, 20), pnginfo=rubbish)
    for data in (broken, encoded(make_image(8, 20), "JPEG", exif=b"Exif\0\0rubbish")):
        ref = ImageRef("x", data=data)
        assert ref.size() == (8, 20) and ref.open().size == (20, 8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(make_image, mode):
    image = make_image(6, 7).convert(mode)
    decoded = ImageRef("x", data=encoded(image, "JPEG" if mode == "CMYK" else "PNG")).open()
    if mode != "CMYK":
        assert np.array_equal(np.asarray(decoded), on_white(image))
    assert decoded.mode == "RGB"


def test_sixteen_bit_grey_keeps_its_shades():
    levels = np.array([[0, 256, 30_000, 65_535]], np.uint16)
    decoded = ImageRef("x", data=encoded(Image.fromarray(levels))).open()
    assert np.asarray(decoded)[0, :, 0].tolist() == [0, 1, 117, 255]


def test_first_frame_of_an_animation(make_image):
    frames = [make_image(5, 5, seed).quantize(8) for seed in range(3)]
    for format in ("GIF", "PNG"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        assert np.array_equal(np.asarray(ImageRef("x", data=data).open()), np.asarray(frames[0].convert("RGB")))


def test_extreme_shapes(make_image):
    for size in [(1, 1), (1, 10_000), (10_000, 1)]:
        ref = ImageRef("x", data=encoded(Image.new("RGB", size)))
        assert ref.size() == size[::-1] and ref.open().size == size


def test_truncated_image_has_a_size_but_does_not_open(make_image):
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    for format in ("JPEG", "PNG", "WEBP"):
        data = encoded(make_image(64, 64), format)
        ref = ImageRef("x", data=data[: len(data) * 2 // 3])
        if format != "WEBP":
            assert ref.size() == (64, 64)
        assert reason_of(ref.open) == "corrupt_image"


def test_bomb_is_refused_by_its_header():
    data = encoded(Image.new("1", (9000, 9000)))
    assert len(data) < 20_000
    tracemalloc.start()
    for call in (ImageRef("x", data=data).size, ImageRef("x", data=data).open):
        assert reason_of(call) == "oversized_image"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert ImageRef("x", data=data, max_pixels=9000 * 9000).size() == (9000, 9000)
    huge = data.replace((9000).to_bytes(4, "big") * 2, (60_000).to_bytes(4, "big") * 2)
    assert reason_of(ImageRef("x", data=huge, max_pixels=10**12).size) in ("oversized_image", "corrupt_image")


@pytest.mark.parametrize(
    ("on_disk", "named", "said"),
    [
        (
            "caf\u00e9/a.png",
            "cafe\u0301/a.png",
            "; on disk its name is in Unicode's form NFC: write the data's names in it too",
        ),
        (
            "cafe\u0301/a.png",
            "caf\u00e9/a.png",
            "; on disk its name is in Unicode's form NFD: write the data's names in it too",
        ),
        ("a.JPG", "a.jpg", "; there is a.JPG"),
        ("a.jpg", "a.JPG", "; there is a.jpg"),
        ("img/a.png", "img\\a.png", "; there is img/a.png"),
        ("a b.png", "a%20b.png", "; there is a b.png"),
        ("a.png", " a.png\n", "; there is a.png"),
        ("b.png", "a.png", ""),
    ],
)
def test_a_missing_image_names_the_file_it_probably_is(tmp_path, make_image, on_disk, named, said):
    (tmp_path / on_disk).parent.mkdir(exist_ok=True)
    make_image(4, 4).save(tmp_path / on_disk)
    root = Path(os.path.realpath(tmp_path))
    with pytest.raises(RecordError) as caught:
        image_at(named, root).open()
    assert str(caught.value) == f"missing_image: no file {root / named}{said}"


def test_a_bomb_in_the_metadata_is_refused(make_image):
    bomb = PngInfo()
    bomb.add_text("comment", "0" * 50_000_000, zip=True)
    ref = ImageRef("x", data=encoded(make_image(4, 4), pnginfo=bomb))
    assert len(ref.data) < 100_000 and reason_of(ref.size) == reason_of(ref.open) == "oversized_image"


@pytest.mark.parametrize("kind", ["text", "profile"])
def test_large_metadata_is_reported_as_such(make_image, kind):
    info = PngInfo()
    if kind == "text":
        info.add_text("comment", "0" * 2_000_000, zip=True)
    options = {"icc_profile": bytes(2_000_000)} if kind == "profile" else {"pnginfo": info}
    ref = ImageRef("x", data=encoded(make_image(4, 4), **options))
    for call in (ref.size, ref.open):
        with pytest.raises(RecordError, match="save it again without metadata"):
            call()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "corrupt_image"),
        (b"<!DOCTYPE html><html>not found</html>", "unsupported_image_format"),
        (b"\xff\xd8\xff\xe0broken", "corrupt_image"),
        (b"\x89PNG\r\n\x1a\nbroken", "corrupt_image"),
        (encoded(Image.new("RGB", (4, 4)), "TIFF"), "unsupported_image_format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unsupported_image_format"),
    ],
)
def test_files_that_are_no_images(tmp_path, data, reason):
    (tmp_path / "x.jpg").write_bytes(data)
    for ref in (image_at("x.jpg", tmp_path), ImageRef("x", data=data)):
        assert reason_of(ref.size) == reason_of(ref.open) == reason


@pytest.mark.parametrize(
    "url", ["http://host/a.jpg", "https://host/a.jpg", "ftp://h/a", "file:///etc/passwd", "s3://b/k"]
)
def test_urls_are_refused(tmp_path, url):
    assert reason_of(lambda: image_at(url, tmp_path)) == "image_url"


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "/etc/hostname", "//host/share.png"])
def test_paths_out_of_the_root_are_refused(tmp_path, name):
    assert reason_of(lambda: image_at(name, tmp_path / "root")) == "image_outside_root"


@pytest.mark.parametrize("name", ["", "  ", "a\0b.png", "\ud800.png"])
def test_impossible_paths_are_refused(tmp_path, name):
    assert reason_of(lambda: image_at(name, tmp_path)) == "invalid_image_path"


def test_a_sibling_that_starts_like_the_root_is_outside(tmp_path):
    assert reason_of(lambda: image_at("../root2/x.png", tmp_path / "root")) == "image_outside_root"


def test_what_lies_at_a_path(tmp_path, make_image):
    root = (tmp_path / "root").resolve()
    (root / "folder").mkdir(parents=True)
    outside = tmp_path / "secret.png"
    for path in (outside, root / "good.png"):
        make_image(4, 6).save(path)
    (root / "inside.png").symlink_to("good.png")
    (root / "escape.png").symlink_to(outside)
    (root / "escape").symlink_to(tmp_path)
    (root / "loop.png").symlink_to("loop.png")
    (root / "dangling.png").symlink_to("nowhere.png")
    os.mkfifo(root / "pipe.png")
    for name in ("good.png", "inside.png", "folder/../good.png", str(root / "good.png"), "./good.png"):
        assert image_at(name, root).size() == (4, 6)
        assert image_at(name, root).open().size == (6, 4)
    reasons = {
        "none.png": "missing_image",
        "good.png/x.png": "missing_image",
        "dangling.png": "missing_image",
        "escape.png": "image_symlink_escape",
        "escape/secret.png": "image_symlink_escape",
        "folder": "image_not_a_file",
        "pipe.png": "image_not_a_file",
        "loop.png": "unreadable_image",
        "n" * 300: "invalid_image_path",
    }
    for name, reason in reasons.items():
        ref = image_at(name, root)
        assert reason_of(ref.size) == reason_of(ref.open) == reason, name


def test_a_device_is_no_file():
    assert reason_of(image_at("zero", Path("/dev")).size) == "image_not_a_file"


def test_absolute_path_through_a_linked_root(tmp_path, make_image):
    (tmp_path / "real").mkdir()
    make_image(3, 4).save(tmp_path / "real" / "x.png")
    (tmp_path / "link").symlink_to("real")
    assert image_at(str(tmp_path / "link" / "x.png"), (tmp_path / "real").resolve()).size() == (3, 4)


def test_data_uri(tmp_path, make_image):
    data = base64.b64encode(encoded(make_image(3, 5))).decode()
    assert image_at(f"data:image/png;base64,{data}", tmp_path).size() == (3, 5)
    for bad in ("data:image/png;base64,", "data:image/png,raw", "data:;base64,aGk="):
        assert reason_of(lambda bad=bad: image_at(bad, tmp_path).size()) in (
            "corrupt_image",
            "unsupported_image_format",
        )


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=60 * SCALE)
@given(st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 255)), min_size=1, max_size=30), st.integers(0, 4))
def test_mutated_images_are_read_or_refused(make_image, format, flips, cut):
    data = bytearray(encoded(make_image(24, 31), format))
    for position, value in flips:
        data[position % len(data)] = value
    ref = ImageRef("x", data=bytes(data[: len(data) * (8 - cut) // 8]), max_pixels=10**6)
    try:
        size = ref.size()
        decoded = ref.open()
    except RecordError:
        return
    assert (decoded.height, decoded.width) == size and decoded.mode == "RGB"
