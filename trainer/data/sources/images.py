"""Images that records name: kept under the image root, measured by their header, decoded whole or refused."""

import errno
import hashlib
import os
import re
import stat
import unicodedata
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal
from urllib.parse import unquote

from PIL import Image, UnidentifiedImageError

from llava_llama31.processing.pixels_llava_llama31 import SIDEWAYS, orientation_of, upright_rgb
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.data.sources.remote_files import Missing, is_remote, join, whole
from llava_llama31.trainer.recipes.data_formats import MAX_PIXELS
from llava_llama31.trainer.redaction import redacted


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
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
# two letters or more before the colon: `C:/` is not a scheme
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_DATA_URI = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_SURROGATE = re.compile(r"[\ud800-\udfff]")
# Pillow's errors name its constants
_METADATA_LIMIT = re.compile(r"\bMAX_TEXT_(CHUNK|MEMORY)\b")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# where a PNG may give an orientation: EXIF, or text that holds EXIF or XMP
_PNG_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
# no longer than the base64 text of the smallest image; a name of that length has a dot
_BASE64_START = re.compile(r"[A-Za-z0-9+/_-]{56}")


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
        with self._file() as file, self._header(file) as image:
            late = _late_png_metadata(file) if image.format == "PNG" else None
            if late is None:
                orientation = orientation_of(image)
            else:
                with Image.open(late, formats=("PNG",)) as header:
                    orientation = orientation_of(header)
            sideways = orientation in SIDEWAYS
            return (image.width, image.height) if sideways else (image.height, image.width)

    def open(self) -> Image.Image:
        """The image as `upright_rgb` shows it, fully decoded; of an animation, the first frame."""
        with self._file() as file, self._header(file, check_scans=True) as image:
            return upright_rgb(image)

    @property
    def is_remote(self) -> bool:
        """Whether it is in a store rather than on this machine."""
        return is_remote(self.path)

    def encoded(self) -> bytes:
        """The image as it is stored, no longer than MAX_FILE_BYTES."""
        with self._file() as file:
            return file.read()

    def fetched(self) -> "ImageRef":
        """The image with its bytes, where it is in a store."""
        return replace(self, path=None, root=None, data=self.encoded()) if self.is_remote else self

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
    def _header(self, file: BinaryIO, *, check_scans: bool = False) -> Iterator[Image.Image]:
        try:
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > self.max_pixels:
                    what = f"{image.height} x {image.width} pixels, more than {self.max_pixels:,}: raise max_pixels "
                    what += "(`--max-pixels`, or the key of a recipe), or make it smaller"
                    raise RecordError("oversized_image", what, self.name)
                if max(image.size) > MAX_SIDE:
                    what = f"{image.height} x {image.width} pixels, a side above {MAX_SIDE}: make it smaller"
                    raise RecordError("oversized_image", what, self.name)
                if check_scans and image.format in ("JPEG", "MPO"):
                    self._check_scans(file)
                yield image
        except RecordError:
            raise
        except UnidentifiedImageError:
            raise self._unidentified(file) from None
        except Image.DecompressionBombError as error:
            what = f"more pixels than Pillow reads, which no setting raises: make it smaller ({error})"
            raise RecordError("oversized_image", what, self.name) from None
        except MemoryError:
            raise RecordError(
                "oversized_image", "there is not enough memory to decode it: make it smaller", self.name
            ) from None
        except OSError as error:
            # Pillow's own complaints carry no errno
            reason = "corrupt_image" if error.errno is None else "unreadable_image"
            raise RecordError(reason, error.strerror or str(error), self.name) from None
        except Exception as error:  # a decoder fed hostile bytes may raise anything
            if _METADATA_LIMIT.search(str(error)):
                what = "its text or colour profile unpacks to more than Pillow reads (1 MiB a chunk): "
                raise RecordError("oversized_image", what + "save it again without metadata", self.name) from None
            raise RecordError("corrupt_image", f"{type(error).__name__}: {error}", self.name) from None

    @contextmanager
    def _file(self) -> Iterator[BinaryIO]:
        """The encoded image, no longer than MAX_FILE_BYTES."""
        with BytesIO(self.data) if self.data is not None else self._stored_file() as file:
            num_bytes = file.seek(0, os.SEEK_END)
            if num_bytes > MAX_FILE_BYTES:
                what = f"{num_bytes} bytes encoded, more than {MAX_FILE_BYTES}: make it smaller"
                raise RecordError("oversized_image", what, self.name)
            file.seek(0)
            yield file

    def _stored_file(self) -> BinaryIO:
        if not self.is_remote:
            return self._regular_file()
        try:
            return BytesIO(whole(str(self.path), MAX_FILE_BYTES))
        except Missing:
            raise RecordError("missing_image", f"no file {redacted(str(self.path))}", self.name) from None

    def _regular_file(self) -> BinaryIO:
        """The opened file, which is under the root and not a device."""
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
            raise RecordError("missing_image", f"no file {self.path}{self._other_spelling()}", self.name) from None
        except OSError as error:
            reason = "invalid_image_path" if error.errno == errno.ENAMETOOLONG else "unreadable_image"
            raise RecordError(reason, error.strerror or str(error), self.name) from None

    def _other_spelling(self) -> str:
        """Names the file that a missing one probably is: file systems differ in case and in Unicode's forms."""
        name = os.path.relpath(str(self.path), self.root)
        stem, suffix = os.path.splitext(name)
        spellings = {form: unicodedata.normalize(form, name) for form in ("NFC", "NFD")}
        for form, spelling in spellings.items():
            if spelling != name and os.path.lexists(os.path.join(str(self.root), spelling)):
                return f"; on disk its name is in Unicode's form {form}: write the data's names in it too"
        others = (name.replace("\\", "/"), name.strip(), unquote(name))
        for spelling in (stem + suffix.lower(), stem + suffix.upper(), *others):
            if spelling != name and os.path.lexists(os.path.join(str(self.root), spelling)):
                return f"; there is {spelling}"
        return ""

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


def image_at(name: str, root: Path | str, max_pixels: int = MAX_PIXELS) -> ImageRef:
    """The image that the data calls `name`, under the real path or the URL `root`.

    An absolute path and `..` are allowed as long as they stay under the root; nothing on disk is opened.

    Raises:
        RecordError: image_url, invalid_image_path, image_outside_root; corrupt_image for a broken data: URI.
    """
    if name[:5].lower() == "data:":
        return ImageRef("data: URI", data=_decoded(name), max_pixels=max_pixels)
    if holds_base64_image(name):
        what = "base64 text is not a path: put `data:image/TYPE;base64,` before it"
        raise RecordError("invalid_image_path", what, f"{name[:20]}...")
    if _URL.match(name):
        raise RecordError("image_url", "URLs are not fetched: download the image and name its path", name)
    if not name.strip() or "\0" in name or _SURROGATE.search(name):
        raise RecordError("invalid_image_path", f"{ascii(name)} is not a path", name)
    if isinstance(root, str) and is_remote(root):
        url = join(root, name)
        if url is None:
            raise RecordError("image_outside_root", f"{ascii(name)} is not under {redacted(root)}", name)
        return ImageRef(name, path=url, root=root, max_pixels=max_pixels)
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
    found = [record[key] for key in ("image", "images") if not is_absent(record.get(key))]
    if len(found) > 1:
        raise RecordError("malformed_record", "the row has both `image` and `images`")
    if not found:
        return []
    return found[0] if isinstance(found[0], list) else [found[0]]


def is_absent(value: object) -> bool:
    """Whether a field holds nothing: null, empty, or a list or an object of nulls alone."""
    if isinstance(value, list):
        return all(item is None or (isinstance(item, dict) and is_absent(item)) for item in value)
    if isinstance(value, dict):
        return all(item is None for item in value.values())
    return value is None or (isinstance(value, str) and not value)


def is_encoded_image(data: bytes) -> bool:
    """Whether bytes begin as an image of a known format does."""
    return _SIGNATURE.match(data) is not None


def holds_base64_image(text: str) -> bool:
    """Whether text is an image in base64, without the `data:` that would say so."""
    match = _BASE64_START.match(text) if len(text) >= 56 else None
    if match is None:
        return False
    start = b64decode(match.group(), altchars=b"-_" if {"-", "_"} & set(match.group()) else None)
    # two letters do not prove a BMP; its header holds four zeros
    return is_encoded_image(start) and (start[:2] != b"BM" or start[6:10] == bytes(4))


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


def _late_png_metadata(file: BinaryIO) -> BytesIO | None:
    """A PNG of the header alone, with what follows the pixels moved before them; None if nothing does."""
    kept: list[tuple[int, int]] = []
    behind_pixels = late = False
    at = len(_PNG_SIGNATURE)
    file.seek(at)
    while len(head := file.read(8)) == 8:
        size, kind = int.from_bytes(head[:4], "big") + 12, head[4:]
        # an animation's next frame ends what Pillow reads with the first
        if kind == b"IEND" or (kind == b"fcTL" and behind_pixels):
            break
        behind_pixels = behind_pixels or kind == b"IDAT"
        if kind == b"IHDR" or kind in _PNG_METADATA:
            kept.append((at, size))
            late = late or behind_pixels
        at += size
        file.seek(at)
    if not late:
        return None
    header = BytesIO(_PNG_SIGNATURE)
    header.seek(0, os.SEEK_END)
    for start, size in kept:
        file.seek(start)
        header.write(file.read(size))
    header.write(b"\0\0\0\0IDAT")
    header.seek(0)
    return header
