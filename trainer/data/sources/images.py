"""Images that records name: kept under the image root, measured by their header, decoded whole or refused."""

import errno
import hashlib
import os
import re
import stat
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal

from PIL import Image, UnidentifiedImageError

from llava_llama31.trainer.data.sources.reject_reasons import RecordError


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 40_000_000
# a side that JPEG and GIF can hold; Pillow keeps a pointer a row and a WebP decoder twice the canvas
MAX_SIDE = 65_535
# more than any image of MAX_PIXELS needs; the WebP decoder reads its file whole
MAX_FILE_BYTES = 256 * 2**20
# a progressive JPEG has about ten; each one is a pass over the whole image
MAX_JPEG_SCANS = 500

_BLOCK_BYTES = 2**20
_START_OF_SCAN = b"\xff\xda"
_SIGNATURE = re.compile(rb"\xff\xd8\xff|\x89PNG|RIFF....WEBP|GIF8|BM", re.DOTALL)
# of files whose names tell nothing; BMP's two letters alone begin many a text. Formats that are refused are images too
_IMAGE_HEAD = re.compile(
    rb"\xff\xd8\xff|\x89PNG|RIFF....WEBP|GIF8|BM....\0\0\0\0|II[*+]\0|MM\0[*+]|8BPS|\0\0\0\x0c(?:JXL |jP  )"
    rb"|....ftyp(?:avif|avis|heic|heix|hevc|mif1|msf1)",
    re.DOTALL,
)
_VIDEO_HEAD = re.compile(rb"....ftyp|RIFF....AVI |\x1aE\xdf\xa3", re.DOTALL)
# two letters or more before the colon: `C:/` is no scheme
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_DATA_URI = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_SURROGATE = re.compile(r"[\ud800-\udfff]")

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
_SIDEWAYS = (5, 6, 7, 8)


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image of a record, not yet opened: either a file under `root` or bytes.

    Args:
        name: what the data calls it.
        path: the file, absolute and lexically under `root`; symbolic links are followed and checked when it is opened.
        data: the encoded image, for images that the data carries itself.
        root: real path of the folder that the file may not leave.
        max_pixels: height x width above which the image is refused by its header, before it is decoded.

    Raises:
        RecordError: from `size` and `open`, with the reason why the image can't be used.
    """

    name: str
    path: str | None = None
    data: bytes | None = field(default=None, repr=False)
    root: str | None = None
    max_pixels: int = MAX_PIXELS

    def size(self) -> tuple[int, int]:
        """(height, width) in pixels as seen upright, from the header alone."""
        with self._header() as image:
            sideways = _orientation(image) in _SIDEWAYS
            return (image.width, image.height) if sideways else (image.height, image.width)

    def open(self) -> Image.Image:
        """The upright image in RGB, fully decoded; of an animation, the first frame."""
        with self._header(check_scans=True) as image:
            orientation = _orientation(image)
            rgb = _rgb(image)
            return rgb.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else rgb

    def sha256(self) -> str:
        """Hash of the encoded image."""
        with self._file() as file:
            return hashlib.sha256(file.read()).hexdigest()

    def key(self) -> str:
        """Equal for the same image: its path, or a digest of its bytes."""
        return str(self.path) if self.data is None else hashlib.blake2b(self.data, digest_size=16).hexdigest()

    def stat(self) -> tuple[int, int]:
        """(bytes, modification time in ns) of the file, (-1, -1) where there is none."""
        assert self.path is not None
        return stat_signature(self.path)

    @contextmanager
    def _header(self, *, check_scans: bool = False) -> Iterator[Image.Image]:
        with self._file() as file:
            try:
                with Image.open(file, formats=FORMATS) as image:
                    if image.width * image.height > self.max_pixels:
                        what = f"{image.height} x {image.width} pixels, more than {self.max_pixels}"
                        raise RecordError("oversized_image", what, self.name)
                    if max(image.size) > MAX_SIDE:
                        what = f"{image.height} x {image.width} pixels, a side above {MAX_SIDE}"
                        raise RecordError("oversized_image", what, self.name)
                    if check_scans and image.format in ("JPEG", "MPO"):
                        self._check_scans(file)
                    yield image
            except RecordError:
                raise
            except UnidentifiedImageError:
                raise self._unidentified(file) from None
            except Image.DecompressionBombError as error:
                raise RecordError("oversized_image", str(error), self.name) from None
            except MemoryError:
                raise RecordError("oversized_image", "there is not enough memory to decode it", self.name) from None
            except OSError as error:
                # Pillow's own complaints carry no errno
                reason = "corrupt_image" if error.errno is None else "unreadable_image"
                raise RecordError(reason, error.strerror or str(error), self.name) from None
            except Exception as error:  # a decoder fed hostile bytes may raise anything
                raise RecordError("corrupt_image", f"{type(error).__name__}: {error}", self.name) from None

    @contextmanager
    def _file(self) -> Iterator[BinaryIO]:
        """The encoded image, no longer than MAX_FILE_BYTES."""
        with BytesIO(self.data) if self.data is not None else self._regular_file() as file:
            num_bytes = file.seek(0, os.SEEK_END)
            if num_bytes > MAX_FILE_BYTES:
                what = f"{num_bytes} bytes encoded, more than {MAX_FILE_BYTES}"
                raise RecordError("oversized_image", what, self.name)
            file.seek(0)
            yield file

    def _regular_file(self) -> BinaryIO:
        """The file, opened, which lies under the root and is no device."""
        assert self.path is not None and self.root is not None
        try:
            real = os.path.realpath(self.path, strict=True)
            mode = os.stat(real).st_mode
            if not _is_under(real, self.root):
                raise RecordError("image_symlink_escape", f"{self.path} leads to {real}{_hub_cache(real)}", self.name)
            if not stat.S_ISREG(mode):
                raise RecordError("image_not_a_file", f"{real} is a {_kind(mode)}", self.name)
            return open(real, "rb")
        except (FileNotFoundError, NotADirectoryError):
            raise RecordError("missing_image", f"no file {self.path}", self.name) from None
        except OSError as error:
            reason = "invalid_image_path" if error.errno == errno.ENAMETOOLONG else "unreadable_image"
            raise RecordError(reason, error.strerror or str(error), self.name) from None

    def _check_scans(self, file: BinaryIO) -> None:
        num_scans, last = 0, b""
        file.seek(0)
        while block := file.read(_BLOCK_BYTES):
            num_scans += (last + block).count(_START_OF_SCAN)
            last = block[-1:]
        if num_scans > MAX_JPEG_SCANS:
            raise RecordError("corrupt_image", f"{num_scans} JPEG scans, more than {MAX_JPEG_SCANS}", self.name)

    def _unidentified(self, file: BinaryIO) -> RecordError:
        file.seek(0)
        start = file.read(12)
        if not start:
            return RecordError("corrupt_image", "the file is empty", self.name)
        if _SIGNATURE.match(start):
            return RecordError("corrupt_image", "the header is damaged", self.name)
        return RecordError("unsupported_image_format", f"starts with {start!r}, not {', '.join(FORMATS)}", self.name)


def image_at(name: str, root: Path, max_pixels: int = MAX_PIXELS) -> ImageRef:
    """The image that the data calls `name`, under the real path `root`.

    An absolute path and `..` are allowed as long as they stay under the root; nothing on disk is opened.

    Raises:
        RecordError: image_url, invalid_image_path, image_outside_root; corrupt_image for a broken data: URI.
    """
    if name[:5].lower() == "data:":
        return ImageRef("data: URI", data=_decoded(name), max_pixels=max_pixels)
    if _URL.match(name):
        raise RecordError("image_url", "URLs are not fetched: download the image and name its path", name)
    if not name.strip() or "\0" in name or _SURROGATE.search(name):
        raise RecordError("invalid_image_path", f"{ascii(name)} is no path", name)
    base = os.fspath(root)
    path = os.path.normpath(os.path.join(base, name))
    if not _is_under(path, base):
        # the root may have been named through a symbolic link
        path = os.path.realpath(path)
        if not _is_under(path, base):
            raise RecordError("image_outside_root", f"{path} is not under {base}", name)
    return ImageRef(name, path=path, root=base, max_pixels=max_pixels)


def image_column(record: dict) -> list[object]:
    """What a record gives as `image` or `images`, one or many.

    Raises:
        RecordError: malformed_record, it gives both.
    """
    found = [record[key] for key in ("image", "images") if record.get(key) not in (None, "", [])]
    if len(found) > 1:
        raise RecordError("malformed_record", "the row has both `image` and `images`")
    if not found:
        return []
    return found[0] if isinstance(found[0], list) else [found[0]]


def medium_of(head: bytes) -> Literal["image", "video"] | None:
    """What a file is by the way it begins, be it of a format that is read or not; None: neither image nor video.

    Args:
        head: its first 16 bytes, or all of a shorter one.
    """
    if _IMAGE_HEAD.match(head):
        return "image"
    return "video" if _VIDEO_HEAD.match(head) else None


def stat_signature(path: str) -> tuple[int, int]:
    """(bytes, modification time in ns) of a file, (-1, -1) where there is none or its path is impossible."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _decoded(uri: str) -> bytes:
    match = _DATA_URI.match(uri)
    if not match:
        raise RecordError("corrupt_image", "a data: URI must read data:TYPE;base64,...", "data: URI")
    try:
        return b64decode(uri[match.end() :], validate=True)
    except (Base64Error, ValueError) as error:
        raise RecordError("corrupt_image", f"data: URI: {error}", "data: URI") from None


def _is_under(path: str, root: str) -> bool:
    return path.startswith(root if root.endswith(os.sep) else root + os.sep)


def _hub_cache(path: str) -> str:
    """What to do about links into the cache of the Hub, where files are called by their hashes."""
    if os.path.basename(os.path.dirname(path)) != "blobs":
        return ""
    return " (the Hub's cache keeps links: fetch real files with `hf download ID --repo-type dataset --local-dir DIR`)"


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "folder"
    return "device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else "pipe or socket"


def _orientation(image: Image.Image) -> int:
    try:
        # the PNG class's own getexif would decode the whole image to look for EXIF behind the pixels
        return Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except Exception:  # broken metadata does not spoil the pixels
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # convert() would clip 16-bit grey at 255: a white page
        image = image.point(lambda level: level * (1 / 256))
    return image.convert("RGB")
