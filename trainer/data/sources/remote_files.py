"""Files in object storage and on web servers, read by byte range through fsspec: retried, cached, of checked length.

URLs begin with `s3://`, `gs://`, `hf://`, `http://` or `https://`; the environment variables of fsspec and of each
store give endpoints and credentials, never a recipe. What was read is kept on disk, in `llava-llama31/remote` of the
user's cache folder, up to `LLAVA_LLAMA31_REMOTE_CACHE_GB` (10^9 bytes, default 10; 0: nothing); the oldest goes first.
"""

import hashlib
import logging
import os
import posixpath
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

from llava_llama31.trainer.data.sources.user_cache import user_cache
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.redaction import redacted


logger = logging.getLogger(__name__)

ATTEMPTS = 6
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 20.0
CACHE_VARIABLE = "LLAVA_LLAMA31_REMOTE_CACHE_GB"
_DEFAULT_CACHE_GB = 10.0
_URL = re.compile(r"(s3|gs|hf|https?)://", re.IGNORECASE)
_ANY_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_EXTRAS = {"s3": "s3fs", "gs": "gcsfs"}
_CREDENTIALS = "give credentials in the environment, as the store's own tools read them"
_READ_AHEAD = 8  # ranges at once
_VERSIONS = ("ETag", "etag", "sha256", "blob_id", "mtime", "LastModified")
_END_BYTES = 64 * 2**10
# so often a process looks whether the cache is too large
_SCANS_PER_LIMIT = 16


def is_remote(path: object) -> bool:
    """Whether a path is a URL of a store that is read by byte range."""
    return isinstance(path, str) and _URL.match(path) is not None


def check_is_path(given: object, *, stores_too: bool = False) -> None:
    """Refuse a URL where a path of this machine is wanted, before it is taken for a relative one.

    Args:
        given: what the user names.
        stores_too: URLs of the stores are read there.

    Raises:
        UserError: it is a URL.
    """
    fault = url_fault(given, stores_too=stores_too)
    if fault is not None:
        raise UserError(fault[0], where=redacted(str(given)), fix=fault[1])


def url_fault(given: object, *, stores_too: bool = False) -> tuple[str, str] | None:
    """What is wrong with a URL where a path is wanted, and its fix; None if nothing is."""
    if not isinstance(given, str) or not _ANY_URL.match(given) or (stores_too and is_remote(given)):
        return None
    if given.lower().startswith("file://"):
        return "a path is wanted, not a URL", "leave out file://"
    if stores_too:
        return "URLs begin with s3://, gs://, hf://, http:// or https://", "download it and name the copy"
    return "a URL is not read here", "download it and name the copy"


def join(folder: str, name: str) -> str | None:
    """The URL of a file below a folder's, whatever characters its name has; None where the name leaves it."""
    if name.startswith("/") or ".." in name.split("/"):
        return None
    name = posixpath.normpath(name)
    is_web = folder[:4].lower() == "http"  # where `?`, `#` and `%` mean something; stores take keys as they are
    return f"{folder.rstrip('/')}/{quote(name) if is_web else name}"


@dataclass(frozen=True)
class RemoteFile:
    """A file of known length and version.

    Args:
        url: where it is.
        size: in bytes.
        version: its ETag, checksum or time, whatever the store gives.
    """

    url: str
    size: int
    version: str

    def read(self, start: int, size: int) -> bytes:
        """Up to `size` bytes from byte `start` on, fewer only at the file's end.

        Raises:
            UserError: the store does not give them.
        """
        end = min(start + size, self.size)
        if end <= start:
            return b""
        key = f"{self.url}\0{self.version}\0{self.size}\0{start}\0{end}"
        cache = _cache()
        found = cache.load(key)
        if found is None or len(found) != end - start:
            found = _retried(self.url, lambda: self._range(start, end))
            cache.store(key, found)
        return found

    def fetch(self, start: int, size: int) -> bytes:
        """`size` bytes from byte `start` on, from the store and not kept.

        Raises:
            UserError: the store does not give them.
        """
        return _retried(self.url, lambda: self._range(start, min(start + size, self.size)))

    def check_unchanged(self) -> None:
        """Check that the store still holds the file that was opened.

        Raises:
            UserError: it was replaced.
        """
        if _ask(self.url, fresh=True) != self:
            fix = "run again; a run that began with the former file can be resumed only with that file"
            raise UserError("was replaced since it was opened", where=redacted(self.url), fix=fix)

    def _range(self, start: int, end: int) -> bytes:
        system, path = _system(self.url)
        data = system.cat_file(path, start=start, end=end)
        if len(data) == self.size and (start, end) != (0, self.size):
            data = data[start:end]  # of a server that knows no ranges
        if len(data) != end - start:
            raise _ShortRead(f"{len(data):,} of {end - start:,} bytes arrived")
        return data


class _ShortRead(OSError):
    """Fewer bytes than asked for."""


class Missing(UserError):
    """There is no such file."""

    def __init__(self, url: str):
        super().__init__("there is no such file", where=redacted(url), fix="correct the URL")


def at_once(reads: Sequence[Callable[[], bytes]], most: int = _READ_AHEAD) -> None:
    """Bring ranges into the cache, up to `most` at once; what fails now is asked for again when it is read."""
    with ThreadPoolExecutor(min(most, _READ_AHEAD)) as pool:
        for done in [pool.submit(read) for read in reads]:
            if isinstance(error := done.exception(), BaseException) and not isinstance(error, UserError):
                raise error


def open_remote(url: str) -> RemoteFile:
    """A file, by asking for its length.

    Raises:
        Missing: there is none.
        UserError: the store does not answer, or refuses.
    """
    return _opened(url, os.getpid())


@lru_cache(maxsize=4096)
def _opened(url: str, process: int) -> RemoteFile:
    return _ask(url)


def _ask(url: str, *, fresh: bool = False) -> RemoteFile:
    """A file as its store describes it; `fresh`: now, and not when the store was last asked."""

    def ask() -> RemoteFile:
        system, path = _system(url)
        if fresh:
            system.invalidate_cache(path)
        facts = system.info(path)
        version = next((str(facts[key]) for key in _VERSIONS if facts.get(key)), "")
        if facts.get("size") is None:
            raise UserError("the server does not say how long it is", where=redacted(url), fix="use another server")
        return RemoteFile(url, int(facts["size"]), version)

    return _retried(url, ask)


def can_list(url: str) -> bool:
    """Whether the store of a URL lists its files; a web server does not."""
    return is_remote(url) and not url.lower().startswith("http")


def files_below(url: str) -> list[str]:
    """Names of all files below a folder of a store that lists them, in order, as they are now.

    Raises:
        UserError: the store does not answer, or refuses.
    """
    system, path = _system(url)
    root = f"{path.strip('/')}/"
    system.invalidate_cache()
    try:
        found = [str(name).lstrip("/") for name in _retried(url, lambda: system.find(path))]
    except Missing:
        return []
    return sorted(name.removeprefix(root) for name in found if name.startswith(root) and not name.endswith("/"))


def keeps_file(size: int) -> bool:
    """Whether the cache takes a file of that many bytes."""
    return size <= _cache().limit // 4


def keep_file(key: str, size: int, write: Callable[[Path], None]) -> Path | None:
    """A file of the cache, written if it is not there; None where the cache holds none of about `size` bytes."""
    return _cache().file(key, size, write)


def whole(url: str, longest: int) -> bytes:
    """The bytes of a file; one byte more than `longest` of a longer one.

    Raises:
        Missing: there is none.
        UserError: the store does not answer, or refuses.
    """
    file = open_remote(url)
    return file.read(0, min(file.size, longest + 1))


def signature(url: str, longest: int) -> list:
    """URL, size, 0 and a hash: of the content where that is short, else of what the store calls its version.

    Where `longest` is 0, of the version and the last 64 KiB, which of parquet are the footer.
    """
    file = open_remote(url)
    if longest == 0:
        content = file.version.encode() + file.read(max(file.size - _END_BYTES, 0), _END_BYTES)
    else:
        content = file.read(0, file.size) if file.size <= longest else file.version.encode()
    return [url, file.size, 0, hashlib.blake2b(content, digest_size=16).hexdigest()]


def _system(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it."""
    import fsspec.core

    scheme, _, rest = url.partition("://")
    system = _system_at(f"{scheme.lower()}://{rest.partition('/')[0]}", os.getpid())
    return system, fsspec.core.strip_protocol(url)


@lru_cache(maxsize=64)
def _system_at(url: str, process: int) -> Any:
    """The file system of a store, one for all threads of a process, so that they share its connections."""
    import fsspec.asyn

    loop_thread = fsspec.asyn.iothread[0]
    if loop_thread is not None and not loop_thread.is_alive():  # a fork has none; fsspec of 2025.3 would wait for it
        fsspec.asyn.reset_lock()
    scheme = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)[0]
    except ImportError as error:
        package = _EXTRAS.get(scheme, "fsspec")
        what = f"{scheme}:// is read by {package}, which is not installed"
        raise UserError(what, where=redacted(url), fix=f"pip install {package}") from error


def _retried(url: str, step: Callable[[], Any]) -> Any:
    import aiohttp

    for attempt in range(ATTEMPTS):
        try:
            return step()
        except UserError:
            raise
        except PermissionError as refusal:
            what = f"access is denied: {redacted(str(refusal))}"
            raise UserError(what, where=redacted(url), fix=_CREDENTIALS) from refusal
        except Exception as raised:  # each store's library has errors of its own, which share no class
            error = _fault(raised)
            status = error.status if isinstance(error, aiohttp.ClientResponseError) else None
            if isinstance(error, FileNotFoundError) or status in (404, 410):
                raise Missing(url) from error
            if isinstance(error, aiohttp.InvalidURL):
                raise UserError("this is not a URL", where=redacted(url), fix="correct its host and port") from error
            if status in (400, 401, 403):
                fix = f"correct the URL, or {_CREDENTIALS}" if status == 400 else _CREDENTIALS
                raise UserError(f"the server answers {status}", where=redacted(url), fix=fix) from error
            if attempt == ATTEMPTS - 1:
                what = f"can't be read after {ATTEMPTS} attempts: {_in_words(error)}"
                fix = "check the connection, the store and the credentials in the environment"
                raise UserError(what, where=redacted(url), fix=fix) from error
            logger.info("%s: %s, attempt %d", redacted(url), error, attempt + 1)
            time.sleep(min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S))
    raise AssertionError


def _in_words(error: Exception) -> str:
    """An error of a store's library in words that users know."""
    import aiohttp

    if isinstance(error, aiohttp.ClientResponseError):
        return f"the server answers {error.status} {error.message}".strip()
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the connection ended before the file did"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return redacted(str(error) if isinstance(error, OSError) and str(error) else f"{type(error).__name__}: {error}")


def _fault(error: Exception) -> Exception:
    """What went wrong: fsspec's HTTP system calls every fault of asking for a length FileNotFoundError."""
    import aiohttp

    cause = error.__cause__
    hidden = isinstance(error, FileNotFoundError) and isinstance(cause, aiohttp.ClientError | TimeoutError)
    return cause if hidden and isinstance(cause, Exception) else error


@dataclass
class _RangeCache:
    """Ranges on disk, one file each, whole or absent; all processes of a machine share it."""

    folder: Path
    limit: int
    _written: int = field(default=0)
    _is_full: bool = field(default=False)

    def load(self, key: str) -> bytes | None:
        if not self.limit:
            return None
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)  # the oldest goes first
        except OSError:
            return None
        return data

    def store(self, key: str, data: bytes) -> None:
        if not self.limit or len(data) > self.limit // 4:
            return
        path = self._path(key)
        staged = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            staged.write_bytes(data)
            staged.replace(path)
        except OSError as error:  # a full disk costs speed alone
            logger.warning("%s: not cached: %s", path, error)
            staged.unlink(missing_ok=True)
            return
        self._count(len(data))

    def _count(self, written: int) -> None:
        self._written += written
        if self._written > self.limit // _SCANS_PER_LIMIT:
            self._written = 0
            self.shrink()

    def file(self, key: str, size: int, write: Callable[[Path], None]) -> Path | None:
        """A file that is there, or is written now; None where about `size` bytes are too many."""
        if size > self.limit // 4:
            return None
        path = self._path(key)
        try:
            os.utime(path)  # the oldest goes first
            return path
        except OSError:
            pass
        staged = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(staged)
            written = staged.stat().st_size
            staged.replace(path)
        except OSError as error:  # a full disk costs speed alone
            if not self._is_full:
                logger.warning("%s: not cached: %s", path, error)
            self._is_full = True
            return None
        finally:
            staged.unlink(missing_ok=True)
        self._count(written)
        return path

    def shrink(self) -> None:
        """Remove the oldest files until the rest is within the limit."""
        found = []
        for path in self.folder.rglob("*"):
            try:
                facts = path.stat()
            except OSError:
                continue
            if path.is_file():
                found.append((facts.st_mtime_ns, facts.st_size, path))
        total = sum(size for _, size, _ in found)
        goal = self.limit - self.limit // _SCANS_PER_LIMIT
        for _, size, path in sorted(found):
            if total <= goal:
                break
            path.unlink(missing_ok=True)
            total -= size

    def _path(self, key: str) -> Path:
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return self.folder / name[:2] / name[2:]


def cache_folder() -> Path:
    """Where ranges are kept."""
    return user_cache("remote")


def _cache() -> _RangeCache:
    return _cache_at(cache_folder(), os.environ.get(CACHE_VARIABLE, ""), os.getpid())


@lru_cache(maxsize=4)
def _cache_at(folder: Path, given: str, process: int) -> _RangeCache:
    try:
        gigabytes = float(given or _DEFAULT_CACHE_GB)
        if not 0 <= gigabytes < float("inf"):
            raise ValueError
    except ValueError:
        what = f"{given!r} is not a number of 10^9 bytes"
        raise UserError(what, where=CACHE_VARIABLE, fix="set it to a number, 0 for no cache") from None
    return _RangeCache(folder, int(gigabytes * 1e9))
