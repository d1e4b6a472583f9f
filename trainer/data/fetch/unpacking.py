"""Unpacks an archive so that its folders appear when they are whole; a killed unpacking leaves a staging folder alone.

Members are written below `.staging-NAME` beside their place, each checked by the archive's own checksum, and moved
when all of them are on disk. Absolute names, `..`, links, devices and encrypted members are refused by name.
"""

import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from llava_llama31.trainer.checkpoint.atomic_folders import remove, staging_folder
from llava_llama31.trainer.errors import UserError


_CHUNK_BYTES = 2**20
_JUNK = "__MACOSX"
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class _Member:
    """A plain file of an archive."""

    name: str
    size: int
    entry: zipfile.ZipInfo | tarfile.TarInfo


def unpack(archive: Path, into: Path) -> dict[str, int]:
    """Unpack a zip or tar archive into a folder; returns the number of files of each of its entries at the top.

    What is at a member's place already is replaced by it.

    Raises:
        UserError: the archive is damaged or of another kind, holds an unsafe member, or the disk is too small.
    """
    into.mkdir(parents=True, exist_ok=True)
    staging = staging_folder(into / archive.name)
    num_files: Counter[str] = Counter()
    try:
        with _Archive(archive) as opened:
            _check_space(archive, into, sum(member.size for member in opened.members))
            for member in opened.members:
                target = staging / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(member) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file, _CHUNK_BYTES)
                if target.stat().st_size != member.size:
                    raise _damaged(archive, f"{member.name[:80]} is shorter than the archive says")
                num_files[PurePosixPath(member.name).parts[0]] += not target.name.startswith(".")
    except _DAMAGED as error:
        raise _damaged(archive, str(error)) from error
    os.sync()  # all of them are on disk before the first is seen
    _move(staging, into)
    remove(staging)
    return dict(num_files)


class _Archive:
    """A zip or tar file: its plain files, checked, and their contents."""

    def __init__(self, path: Path):
        self._path = path
        self._zip: zipfile.ZipFile | None = None
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> "_Archive":
        if zipfile.is_zipfile(self._path):
            self._zip = zipfile.ZipFile(self._path)
        elif tarfile.is_tarfile(self._path):
            self._tar = tarfile.open(self._path)
        else:
            raise _damaged(self._path, "it is neither a zip nor a tar archive, or it is cut off")
        self.members = [member for member in self._plain_files() if not _is_junk(member.name)]
        return self

    def __exit__(self, *_: object) -> None:
        for opened in (self._zip, self._tar):
            if opened is not None:
                opened.close()

    def open(self, member: _Member) -> IO[bytes]:
        """The member's contents; a zip's checksum is verified at the end."""
        if isinstance(member.entry, zipfile.ZipInfo):
            assert self._zip is not None
            return self._zip.open(member.entry)
        assert self._tar is not None
        found = self._tar.extractfile(member.entry)
        assert found is not None  # a plain file
        return found

    def _plain_files(self) -> Iterator[_Member]:
        seen: set[str] = set()
        for entry, kind in self._entries():
            if isinstance(entry, zipfile.ZipInfo):
                name, size = entry.filename, entry.file_size
            else:
                name, size = entry.name, entry.size
            if kind == "folder":
                continue
            parts = PurePosixPath(name).parts
            if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or not parts or ":" in parts[0]:
                raise self._unsafe(name, "leaves the folder")
            if kind != "file":
                raise self._unsafe(name, f"is {kind}")
            if name in seen:
                raise self._unsafe(name, "occurs twice")
            seen.add(name)
            yield _Member(name, size, entry)

    def _entries(self) -> Iterator[tuple[zipfile.ZipInfo | tarfile.TarInfo, str]]:
        """Everything in the archive, and its kind."""
        if self._zip is not None:
            for entry in self._zip.infolist():
                mode = entry.external_attr >> 16
                kind = "folder" if entry.is_dir() else "file"
                if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    kind = "a link or a device"
                elif entry.flag_bits & 1:
                    kind = "encrypted"
                yield entry, kind
        for found in self._tar or ():
            kind = "folder" if found.isdir() else "file" if found.isreg() else "a link or a device"
            yield found, kind

    def _unsafe(self, name: str, what: str) -> UserError:
        fix = "look at the archive, and unpack it by hand if you trust it"
        return UserError(f"its member {ascii(name[:80])} {what}; nothing was unpacked", where=str(self._path), fix=fix)


def _is_junk(name: str) -> bool:
    """Whether a member is macOS's metadata of others."""
    parts = PurePosixPath(name).parts
    return parts[0] == _JUNK or parts[-1].startswith("._")


def _check_space(archive: Path, into: Path, needed: int) -> None:
    free = shutil.disk_usage(into).free
    if needed > free:
        what = f"its files need {needed:,} bytes, but only {free:,} are free; nothing was unpacked"
        raise UserError(what, where=str(archive), fix=f"free {(needed - free) / 1e9:.2f} GB and run again")


def _damaged(archive: Path, what: str) -> UserError:
    return UserError(f"the archive is damaged: {what}", where=str(archive), fix="remove it and fetch it again")


def _move(source: Path, target: Path) -> None:
    """Move a folder's entries to their places, a folder that is new there as a whole."""
    for entry in sorted(source.iterdir()):
        place = target / entry.name
        if entry.is_dir() and place.is_dir():
            _move(entry, place)
        else:
            os.replace(entry, place)
