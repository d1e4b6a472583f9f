"""Downloads one file over HTTP so that it is whole or absent: resumed by range, retried, checked against its length.

What has arrived is in `.part-NAME`, and whose bytes these are in `.part-NAME.json`, which is written before the first
of them. A resume asks for the rest under the condition that the file is still the same (`If-Range`) and verifies that
the answer is; where a server gives neither an ETag nor a date, it starts again.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple

import httpx2

from llava_llama31.trainer.checkpoint.atomic_folders import read_json, write_json
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.redaction import redacted


ATTEMPTS = 8  # in a row that bring nothing
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
TIMEOUT_S = 60.0
_RETRIED = frozenset((408, 425, 429, 500, 502, 503, 504))
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")
_FIXES = {
    401: "log in where the file is published, or fetch it by hand",
    403: "accept its terms where it is published, or fetch it by hand",
    404: "the file has moved: see the data set's page",
    410: "the file is gone: see the data set's page",
}


class _Changed(Exception):
    """The server's file is not the one whose beginning is here, or its length is wrong: begin again."""


class _Passing(Exception):
    """A fault that another attempt may not meet; `wait` in seconds, where the server names one."""

    def __init__(self, what: str, wait: float | None = None):
        super().__init__(what)
        self.wait = wait


class Version(NamedTuple):
    """What distinguishes one version of a file at a URL from another."""

    etag: str
    date: str
    total: int | None  # bytes

    @property
    def condition(self) -> str:
        """The value for `If-Range`, which takes no weak ETag."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.date


@dataclass
class Download:
    """One file and where it goes.

    Args:
        url: http or https.
        path: where the whole file will be.
        sha256: of the whole file; empty where nobody has published it.
        bytes: of the whole file, as the server gave them before; None where it did not.
        advance: is called with the number of bytes as they arrive, below 0 when they are thrown away.
        wait: sleeps; for tests.
    """

    url: str
    path: Path
    sha256: str = ""
    bytes: int | None = None
    advance: Callable[[int], None] = lambda num_bytes: None
    wait: Callable[[float], None] = time.sleep

    @property
    def part(self) -> Path:
        return self.path.with_name(f".part-{self.path.name}")

    @property
    def _facts(self) -> Path:
        return self.path.with_name(f".part-{self.path.name}.json")

    def num_bytes(self) -> int:
        """Bytes of the file that are here from an earlier attempt."""
        return self.part.stat().st_size if self.part.is_file() and self._version() is not None else 0

    def run(self, client: httpx2.Client) -> int:
        """Download the file, or the rest of it; returns its bytes.

        Raises:
            UserError: the server refuses, does not answer, or gives bytes of another checksum.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        failures = 0
        while True:
            before = self.num_bytes()
            try:
                self._once(client)
                break
            except _Changed:
                self._begin_again()
                failures += 1
                fault, pause = "its length or its version changed while it was fetched", 0.0
            except (_Passing, httpx2.TransportError) as error:
                failures = 1 if self.num_bytes() > before else failures + 1
                fault = str(error) or type(error).__name__
                named = error.wait if isinstance(error, _Passing) else None
                pause = min(FIRST_WAIT_S * 2 ** (failures - 1), LONGEST_WAIT_S) if named is None else named
            except httpx2.InvalidURL as error:
                raise self._refused(str(error), "correct the URL") from None
            if failures >= ATTEMPTS:
                fix = "run the same command again: what has arrived is kept"
                raise self._refused(f"not complete after {failures} attempts: {fault}", fix)
            self.wait(min(pause, LONGEST_WAIT_S))
        return self._finish()

    def _once(self, client: httpx2.Client) -> None:
        """One request; returns when the part is whole."""
        known = self._version()
        have = self.num_bytes()
        if known is not None and known.total is not None and have == known.total:
            return
        headers = {"Accept-Encoding": "identity"}
        if have and known is not None and known.condition:
            headers |= {"Range": f"bytes={have}-", "If-Range": known.condition}
        elif have:
            self._begin_again()
            have = 0
        with client.stream("GET", self.url, headers=headers) as answer:
            if answer.status_code == 206 and have:
                self._check_range(answer, known, have)
            elif answer.status_code == 200:
                have = 0
                self._begin_again()
                known = _version_of(answer)
                if self.bytes is not None and known.total not in (None, self.bytes):
                    raise _Passing(f"a length of {known.total:,} bytes, {self.bytes:,} before")
                write_json(self._facts, known._asdict())
            else:
                raise self._failure(answer)
            self._append(answer, known)

    def _check_range(self, answer: httpx2.Response, known: Version | None, have: int) -> None:
        match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        assert known is not None
        start, total = (match[1], match[3]) if match else (None, None)
        given = _version_of(answer)
        if start != str(have) or (known.total is not None and total not in (str(known.total), "*")):
            raise _Changed
        if (given.etag, given.date) != (known.etag, known.date):
            raise _Changed

    def _append(self, answer: httpx2.Response, known: Version | None) -> None:
        """Append the answer's body to the part."""
        total = known.total if known is not None else None
        with self._opened() as file:
            size = file.tell()
            for chunk in answer.iter_raw():  # as it arrives, so that a cut loses nothing
                size += len(chunk)
                if total is not None and size > total:
                    raise _Changed
                file.write(chunk)
                file.flush()  # so that a killed process leaves what it has counted
                self.advance(len(chunk))
            os.fsync(file.fileno())
        if total is not None and size < total:
            raise _Passing(f"the connection ended after {size:,} of {total:,} bytes")
        if total is None:
            write_json(self._facts, Version(*known[:2], size)._asdict() if known is not None else {})

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        try:
            with self.part.open("ab") as file:
                yield file
        except OSError as error:
            fix = "free space there and run the same command again: what has arrived is kept"
            raise UserError(f"can't be written: {error.strerror}", where=str(self.part), fix=fix) from error

    def _failure(self, answer: httpx2.Response) -> Exception:
        status = answer.status_code
        if status == 416:
            return _Changed()
        if status in _RETRIED:
            return _Passing(f"HTTP {status}", _retry_after(answer))
        return self._refused(f"the server answers {status}", _FIXES.get(status, "see the data set's page"))

    def _refused(self, what: str, fix: str) -> UserError:
        return UserError(what, where=redacted(self.url), fix=fix)

    def _version(self) -> Version | None:
        try:
            facts = read_json(self._facts)
            return Version(str(facts["etag"]), str(facts["date"]), facts["total"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _begin_again(self) -> None:
        """Throw away what is here: first the bytes, then the facts about them."""
        if self.part.is_file():
            self.advance(-self.part.stat().st_size)
        self.part.unlink(missing_ok=True)
        self._facts.unlink(missing_ok=True)

    def _finish(self) -> int:
        if self.sha256:
            found = sha256_of(self.part)
            if found != self.sha256:
                self._begin_again()
                what = f"its sha256 is {found}, not {self.sha256}; it was removed"
                raise self._refused(what, "run the same command again; if this repeats, the file was replaced there")
        size = self.part.stat().st_size
        os.replace(self.part, self.path)
        self._facts.unlink(missing_ok=True)
        return size


def new_client() -> httpx2.Client:
    """A client that follows redirects and reads proxies from the environment."""
    return httpx2.Client(timeout=TIMEOUT_S, follow_redirects=True, headers={"User-Agent": "llava-llama31"})


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version_of(answer: httpx2.Response) -> Version:
    headers = answer.headers
    length = headers.get("Content-Length", "") if answer.status_code == 200 else ""
    return Version(
        headers.get("ETag", ""), headers.get("Last-Modified", ""), int(length) if length.isdecimal() else None
    )


def _retry_after(answer: httpx2.Response) -> float | None:
    """Seconds that the server asks to wait: a number or a date."""
    given = answer.headers.get("Retry-After", "")
    if given.isdecimal():
        return float(given)
    try:
        return max(parsedate_to_datetime(given).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return None
