"""Samples of WebDataset shards, found once by byte offset and read one at a time, in place.

A sample is a run of files in a .tar whose names are the same up to the first dot of the last part: `000123.json`, a
record, and `000123.jpg`, `000123.1.jpg`, ..., its images. A file is an image by its content, or, if damaged, by its
suffix. Nothing is ever unpacked to disk.

Source: the WebDataset convention (Aizman et al., 2019, github.com/webdataset/webdataset).
"""

import io
import tarfile
from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from llava_llama31.trainer.data.sources.images import MAX_FILE_BYTES, image_column, medium_of
from llava_llama31.trainer.data.sources.json_rows import MAX_ROW_BYTES, parse_row, stand_in
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.errors import UserError


# tar's extended headers, names above all, are read whole
MAX_HEADER_BYTES = 2**20

_HEAD_BYTES = 16
# content decides for other names; the name decides where the content is damaged
_MEDIA = {
    "image": ".avif .bmp .gif .heic .heif .ico .jfif .jp2 .jpe .jpeg .jpg .jxl .pjpeg .png .psd .svg .tif .tiff .webp",
    "video": ".avi .m4v .mkv .mov .mp4 .mpeg .mpg .webm",
    "audio": ".aac .flac .m4a .mp3 .ogg .opus .wav",
}
_MEDIUM_OF_SUFFIX = {suffix: medium for medium, suffixes in _MEDIA.items() for suffix in suffixes.split()}
_BLOCK_BYTES = 512
_CHUNK_BYTES = 2**20


class Member(NamedTuple):
    """A file of a sample: its name in the shard, and where its bytes lie."""

    name: str
    start: int
    size: int


class TarRows:
    """The samples of one shard, or of all shards of a folder in the order of their names, as a sequence of records.

    Opening it reads the shards' headers and keeps about 100 bytes a sample. A record's own `image` or `images` say
    the images' order by name; without them it is that of the shard, or that of their numbers in a shard packed in the
    order of names (0, 1, 10, 2). A record without an `id` gets the sample's key. Names that begin with `._` are
    macOS's metadata of other files and passed over.

    Raises:
        UserError: when a shard as a whole can't be read (cut short, damaged, compressed), with the byte offset.
        RecordError: from `rows[i]`, when that sample alone is bad.
    """

    def __init__(self, shards: list[Path]):
        self.shards = shards
        self._first_rows = array("Q")  # of each shard
        self._starts, self._names = array("Q"), bytearray()
        self._member_ends, self._name_ends = array("Q"), array("Q")  # of samples among members, members among names
        self._sizes = array("Q")
        for shard in shards:
            self._first_rows.append(len(self))
            last = None
            for member in _members(shard):
                if member.name.rpartition("/")[2].startswith("._"):
                    continue
                key = _key(member.name)
                if key != last:
                    self._member_ends.append(len(self._starts))
                    last = key
                self._starts.append(member.start)
                self._sizes.append(member.size)
                self._names += member.name.encode("utf-8", "surrogateescape")
                self._name_ends.append(len(self._names))
                self._member_ends[-1] = len(self._starts)

    def __len__(self) -> int:
        return len(self._member_ends)

    def __getitem__(self, row: int) -> object:
        record = parse_row(self.text(row), f"in {self._where(row)}")
        if not isinstance(record, dict):
            return record
        images = self._in_order(row, record, self._images(row, record))
        if (num_bytes := sum(image.size for image in images)) > MAX_FILE_BYTES:
            what = f"{num_bytes} bytes of images in {self._where(row)}, more than {MAX_FILE_BYTES}"
            raise RecordError("oversized_image", what)
        rest = {name: value for name, value in record.items() if name not in ("image", "images")}
        if images:
            column = "images" if "images" in record else "image"
            rest[column] = [{"bytes": self._bytes(row, image), "path": image.name} for image in images]
        return {"id": _key(self._members(row)[0].name)} | rest

    def text(self, row: int) -> str:
        """The sample's record as it is in the shard; bytes that are not UTF-8 become lone surrogates.

        Raises:
            RecordError: there is none, or it is longer than MAX_ROW_BYTES.
        """
        members = self._members(row)
        found = [member for member in members if member.name[len(_key(member.name)) :].lower() == ".json"]
        if len(found) != 1:
            names = ", ".join(ascii(Path(member.name).name[:80]) for member in members[:5])
            what = f"{len(found) or 'no'} .json in {self._where(row)} among {len(members)} files ({names})"
            raise RecordError("malformed_record", what)
        if found[0].size > MAX_ROW_BYTES:
            what = f"the .json in {self._where(row)} is longer than {MAX_ROW_BYTES} bytes"
            raise RecordError("malformed_json", what)
        return self._bytes(row, found[0]).decode("utf-8", "surrogateescape")

    def not_read(self, row: int, shown: Collection[str]) -> Iterator[str]:
        """Endings of the sample's files that are neither its record nor images, such as `*.txt`.

        Args:
            shown: names of the images that the record shows.
        """
        for member in self._members(row):
            ending = member.name[len(_key(member.name)) :]
            if ending.lower() != ".json" and member.name not in shown:
                yield f"*{ending}"

    def _images(self, row: int, record: dict) -> list[Member]:
        """The files that are images by content or by name, or that the record calls so."""
        named = {Path(name).name for name in image_column(record) if isinstance(name, str)}
        images = []
        for member in self._members(row):
            if member.name[len(_key(member.name)) :].lower() == ".json":
                continue
            path = Path(member.name)
            medium = _MEDIUM_OF_SUFFIX.get(path.suffix.lower())
            medium = medium or medium_of(self._bytes(row, member, _HEAD_BYTES))
            if medium == "image" or path.name in named:
                images.append(member)
            elif medium is not None:
                what = f"{ascii(member.name)[:80]} in {self._where(row)} is {medium}, which is not read"
                raise RecordError("malformed_record", what)
        return images

    def _in_order(self, row: int, record: dict, images: list[Member]) -> list[Member]:
        """The images in the order in which the record names them; a single one may have any name."""
        by_name = {Path(image.name).name: image for image in images}
        if len(by_name) < len(images):
            raise RecordError("malformed_record", f"two files of one name in {self._where(row)}")
        names = image_column(record)
        if not names:
            return _by_number(images)
        if len(names) == len(images) == 1:
            return images
        for name in names:
            if not isinstance(name, str) or Path(name).name not in by_name:
                raise RecordError("missing_image", f"no file {ascii(name)[:80]} in {self._where(row)}")
        return [by_name[Path(str(name)).name] for name in names]

    def _bytes(self, row: int, member: Member, most: int | None = None) -> bytes:
        """The bytes of a file of a sample, or the first of them."""
        return _read(self._shard(row), member, most)

    def _shard(self, row: int) -> Path:
        return self.shards[bisect_right(self._first_rows, row) - 1]

    def _members(self, row: int) -> list[Member]:
        begin = self._member_ends[row - 1] if row else 0
        members = []
        for number in range(begin, self._member_ends[row]):
            name = self._names[self._name_ends[number - 1] if number else 0 : self._name_ends[number]]
            members.append(Member(name.decode("utf-8", "surrogateescape"), self._starts[number], self._sizes[number]))
        return members

    def _where(self, row: int) -> str:
        return f"sample {ascii(_key(self._members(row)[0].name)[:80])} of {self._shard(row)}"


def _key(name: str) -> str:
    """What the files of a sample have in common: their path up to the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _by_number(images: list[Member]) -> list[Member]:
    """The images as they stand; by their numbers where they stand in the order of names, in which 10 is before 2."""
    names = [image.name for image in images]
    numbers = [name[len(_key(name)) :].split(".")[1] for name in names]
    if len(images) < 2 or names != sorted(names) or not all(map(str.isdecimal, numbers)):
        return images
    return sorted(images, key=lambda image: int(image.name[len(_key(image.name)) :].split(".")[1]))


def _read(shard: Path, member: Member, most: int | None = None) -> bytes:
    """The bytes of a file of a shard, or the first of them."""
    size = member.size if most is None else min(most, member.size)
    try:
        with shard.open("rb") as file:
            file.seek(member.start)
            data = file.read(size)
    except OSError as error:
        raise RecordError("unreadable_image", f"{shard}: {error.strerror}", member.name) from None
    if len(data) < size:
        raise RecordError("unreadable_image", f"{shard} has become shorter", member.name)
    return data


class _Headers(io.FileIO):
    """A file whose reader takes no more than a header can be."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size) or b""


def _members(shard: Path) -> Iterator[Member]:
    """The plain files of a shard, from its headers alone."""
    try:
        with _Headers(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            position = -1
            while (found := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every header
                if found.offset <= position or found.size < 0:  # would loop forever
                    raise tarfile.ReadError(f"a size of {found.size} bytes at byte {found.offset}")
                position = found.offset
                if found.isdir():
                    continue
                if not found.isreg() or found.issparse():
                    what = f"{ascii(found.name[:80])} at byte {found.offset} is not a regular file"
                    raise UserError(what, where=str(shard), fix="pack files, and no links, devices or sparse files")
                yield Member(found.name, found.offset_data, found.size)
            _check_end(shard, tar.offset)
    except UserError:  # a ValueError too
        raise
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        fault = stand_in(shard) or (f"can't be read as a tar: {error}", "fetch or pack it again, uncompressed")
        raise UserError(fault[0], where=str(shard), fix=fault[1]) from error


def _check_end(shard: Path, position: int) -> None:
    """An archive ends with zeros; a damaged header in its midst would look like its end to tarfile."""
    fix = "fetch or pack the shard again"
    with shard.open("rb") as file:
        file.seek(position)
        if len(file.read(_BLOCK_BYTES)) < _BLOCK_BYTES:
            raise UserError(f"breaks off at byte {position}, without an end mark", where=str(shard), fix=fix)
        file.seek(position)
        while chunk := file.read(_CHUNK_BYTES):
            if chunk.count(0) < len(chunk):
                what = f"a damaged header, or data behind the end mark, at byte {position} or later"
                raise UserError(what, where=str(shard), fix=fix)
