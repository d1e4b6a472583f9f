"""Shards with an index, as `llava-llama31 shards` writes them: opened without listing a row, on disk or in a store.

`index.json` names the shards with their rows, bytes and sha256; `index-members.npy` has start, size, checksum and
suffix of each file of each sample, `index-rows.npy` where the files of each row end. Both arrays stay on disk, mapped
into memory. Each sample is one byte range; its files are verified by their CRC-32.
"""

import hashlib
import zlib
from bisect import bisect_right
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.data.sources.remote_files import (
    Missing,
    RemoteFile,
    at_once,
    cache_folder,
    is_remote,
    join,
    open_remote,
    whole,
)
from llava_llama31.trainer.data.sources.tar_rows import Member, TarRows
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.strict_json import parse_json


INDEX = "index.json"
MEMBERS, ROWS = "index-members.npy", "index-rows.npy"
MEMBER_TYPE = np.dtype([("start", "<u8"), ("size", "<u4"), ("crc", "<u4"), ("suffix", "<u2")])
ROW_TYPE = np.dtype("<u8")
VERSION = 1
KEY_DIGITS = 9
_LONGEST_INDEX = 64 * 2**20
_FIX = "write the shards again, or fetch them again"


class ShardedRows(TarRows):
    """The samples of a folder of shards with an index, in the order in which they were written.

    Args:
        folder: a path of this machine, or a URL.

    Raises:
        UserError: the index or a shard is missing, damaged or of another length.
        RecordError: from `rows[i]`, that sample's bytes are not those that were written.
    """

    def __init__(self, folder: str):
        self.folder = folder
        index = self._index()
        self.suffixes: list[str] = index["suffixes"]
        self.names: list[str] = [shard["name"] for shard in index["shards"]]
        self._sizes_of_shards: list[int] = [shard["bytes"] for shard in index["shards"]]
        self._num_rows: int = index["rows"]
        self._first_row_of = list(accumulate((shard["rows"] for shard in index["shards"]), initial=0))[:-1]
        self._arrays_of = {name: index["arrays"][name] for name in (MEMBERS, ROWS)}
        self._open_arrays()
        if not is_remote(folder):
            self._check_local()
        self._memo: tuple[int, bytes] = (-1, b"")

    def __len__(self) -> int:
        return self._num_rows

    def __getstate__(self) -> dict[str, Any]:
        kept = dict(self.__dict__)
        del kept["_members_array"], kept["_ends_array"]
        return kept | {"_memo": (-1, b"")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_arrays()

    def prefetch(self, rows: list[int]) -> None:
        """Bring the samples of rows of a store into the cache, several at once."""
        if not is_remote(self.folder):
            return
        at_once([partial(self._sample_range, row) for row in rows])

    def _sample_range(self, row: int) -> bytes:
        """A row's bytes from the store."""
        members = self._members(row)
        start = members[0].start
        return self._remote(self._number(row)).read(start, members[-1].start + members[-1].size - start)

    def _index(self) -> dict[str, Any]:
        text = self._text(INDEX)
        try:
            content = parse_json(text.decode())
            if content["version"] != VERSION:
                raise ValueError(f"its version is {content['version']}, not {VERSION}")
            if sum(shard["rows"] for shard in content["shards"]) != content["rows"]:
                raise ValueError("its rows do not add up")
            return content
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"the index is damaged: {error}", where=f"{self.folder}/{INDEX}", fix=_FIX) from None

    def _text(self, name: str) -> bytes:
        try:
            if is_remote(self.folder):
                return whole(str(join(self.folder, name)), _LONGEST_INDEX)
            return (Path(self.folder) / name).read_bytes()
        except (Missing, FileNotFoundError):
            fix = f"{_FIX}; parquet and shards without an index are written as such by `llava-llama31 shards`"
            raise UserError(f"there is no {name}", where=self.folder, fix=fix) from None

    def _open_arrays(self) -> None:
        arrays = []
        for name, dtype in ((MEMBERS, MEMBER_TYPE), (ROWS, ROW_TYPE)):
            path = self._array_file(name)
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise UserError(f"can't be read: {error}", where=str(path), fix=_FIX) from None
            if array.dtype != dtype or array.ndim != 1:
                raise UserError(f"holds {array.dtype}, not {dtype}", where=str(path), fix=_FIX)
            arrays.append(array)
        self._members_array, self._ends_array = arrays
        if len(self._ends_array) != self._num_rows:
            what = f"{len(self._ends_array)} rows, the index has {self._num_rows}"
            raise UserError(what, where=f"{self.folder}/{ROWS}", fix=_FIX)

    def _array_file(self, name: str) -> Path:
        """A file of this machine; of a store, a copy in the cache whose sha256 is the index's."""
        if not is_remote(self.folder):
            return Path(self.folder) / name
        facts = self._arrays_of[name]
        path = cache_folder() / "index" / f"{facts['sha256']}.npy"
        if path.is_file() and path.stat().st_size == facts["bytes"]:
            return path
        file = open_remote(str(join(self.folder, name)))
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.{id(self)}")
        digest = hashlib.sha256()
        with staged.open("wb") as copy:
            for start in range(0, file.size, _LONGEST_INDEX):
                block = file.read(start, _LONGEST_INDEX)
                digest.update(block)
                copy.write(block)
        if digest.hexdigest() != facts["sha256"]:
            staged.unlink()
            raise UserError("its sha256 is not the index's", where=f"{self.folder}/{name}", fix=_FIX)
        staged.replace(path)
        return path

    def _check_local(self) -> None:
        for name, size in zip(self.names, self._sizes_of_shards, strict=True):
            path = Path(self.folder) / name
            found = path.stat().st_size if path.is_file() else -1
            if found != size:
                what = "is missing" if found < 0 else f"is {found:,} bytes long, {size:,} when it was written"
                raise UserError(what, where=str(path), fix=_FIX)

    def _number(self, row: int) -> int:
        return bisect_right(self._first_row_of, row) - 1

    def _remote(self, number: int) -> RemoteFile:
        url = str(join(self.folder, self.names[number]))
        try:
            file = open_remote(url)
        except Missing:
            raise UserError("the shard is missing", where=url, fix=_FIX) from None
        if file.size != self._sizes_of_shards[number]:
            what = f"is {file.size:,} bytes long, {self._sizes_of_shards[number]:,} when it was written"
            raise UserError(what, where=url, fix=_FIX)
        return file

    def _members(self, row: int) -> list[Member]:
        if not 0 <= row < self._num_rows:
            raise IndexError(row)
        begin = int(self._ends_array[row - 1]) if row else 0
        key = f"{row:0{KEY_DIGITS}}"
        return [
            Member(f"{key}.{self.suffixes[suffix]}", start, size)
            for start, size, _, suffix in self._members_array[begin : int(self._ends_array[row])].tolist()
        ]

    def _bytes(self, row: int, member: Member, most: int | None = None) -> bytes:
        if self._memo[0] != row:
            self._memo = (row, self._sample(row))
        offset = member.start - self._members(row)[0].start
        size = member.size if most is None else min(most, member.size)
        return self._memo[1][offset : offset + size]

    def _sample(self, row: int) -> bytes:
        """All bytes of a row's files, verified."""
        members = self._members(row)
        start = members[0].start
        size = members[-1].start + members[-1].size - start
        number = self._number(row)
        if is_remote(self.folder):
            data = self._remote(number).read(start, size)
        else:
            try:
                with (Path(self.folder) / self.names[number]).open("rb") as file:
                    file.seek(start)
                    data = file.read(size)
            except OSError as error:
                raise RecordError("unreadable_image", f"{self.names[number]}: {error.strerror}") from None
        begin = int(self._ends_array[row - 1]) if row else 0
        crcs = self._members_array["crc"][begin : int(self._ends_array[row])].tolist()
        for member, crc in zip(members, crcs, strict=True):
            offset = member.start - start
            if zlib.crc32(data[offset : offset + member.size]) != crc:
                what = f"{member.name} of {self.names[number]} is not what was written there"
                raise RecordError("corrupt_image", what, member.name)
        return data

    def _where(self, row: int) -> str:
        return f"sample {row} of {self.folder}/{self.names[self._number(row)]}"
