"""A file server on the loopback interface with byte ranges, ETags and faults on demand.

It speaks what `fetch`, fsspec's HTTP file system and s3fs ask of a server: GET and HEAD with `Range` and `If-Range`,
and of S3 the listing of a bucket's prefix.
"""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


# what a client of a store has to come through: name -> `Files.faults`
FAULTS: dict[str, list[int | str]] = {
    "none": [],
    "429 and 503": [429, 503, 500],
    "cut": ["cut:100", "cut:10"],
    "short": ["short:20", "short:1"],
    "no ranges": ["no-range"] * 10,
}


@dataclass
class Files:
    """What the server serves, and how it fails.

    Attributes:
        contents: by path.
        faults: each used up by the first GET that it meets: a status; `cut:N`, the connection ends after N bytes of
            the body; `short:N` and `long:N`, N bytes fewer or more than the file has are announced and sent;
            `no-range`, a range is answered with the whole file; `stale`, another file is sent whole under another
            ETag; `silent-stale`, its bytes are sent as the range that was asked for.
        etags: False: no ETag, no date.
        calls: (method, path, Range) in the order of arrival.
    """

    contents: dict[str, bytes] = field(default_factory=dict)
    faults: list[int | str] = field(default_factory=list)
    etags: bool = True
    calls: list[tuple[str, str, str]] = field(default_factory=list)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take_fault(self) -> int | str | None:
        with self.lock:
            return self.faults.pop(0) if self.faults else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: Files

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError):  # of a client that was killed
            super().handle()

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        asked = self.headers.get("Range", "")
        path = unquote(urlsplit(self.path).path)
        with self.files.lock:
            self.files.calls.append((self.command, path, asked))
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        if "list-type" in query:
            return self._list(path.strip("/"), query)
        content = self.files.contents.get(path)
        fault = self.files.take_fault() if with_body and content is not None else None
        if content is None or isinstance(fault, int):
            return self._refuse(404 if content is None else fault)
        return self._send(content, asked, fault, with_body=with_body)

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        if status in (429, 503):
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, content: bytes, asked: str, fault: str | None, *, with_body: bool) -> None:
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        kind, _, number = (fault or "").partition(":")
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
        condition = self.headers.get("If-Range")
        whole = match is None or kind == "no-range" or (condition not in (None, etag) and kind != "silent-stale")
        if kind in ("stale", "silent-stale"):
            content = bytes(255 - byte for byte in content)
            etag = '"another"'
            whole = whole or kind == "stale"
        start = 0 if whole else int(match[1])
        end = len(content) if whole or not match[2] else min(int(match[2]) + 1, len(content))
        if start >= len(content) and not whole:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = content[start:end]
        if kind == "long":
            body += b"x" * int(number)
        self.send_response(200 if whole else 206)
        if not whole:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        if self.files.etags:
            self.send_header("ETag", etag)
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body) - (int(number) if kind == "short" else 0)))
        self.end_headers()
        if not with_body:
            return
        if kind in ("cut", "short"):
            body = body[: int(number)] if kind == "cut" else body[: len(body) - int(number)]
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        if kind == "cut":
            self.close_connection = True

    def _list(self, bucket: str, query: dict[str, list[str]]) -> None:
        prefix = query.get("prefix", [""])[0]
        keys = [path.split("/", 2)[2] for path in self.files.contents if path.startswith(f"/{bucket}/{prefix}")]
        entries = "".join(
            f"<Contents><Key>{key}</Key><Size>{len(self.files.contents[f'/{bucket}/{key}'])}</Size>"
            f'<ETag>"{hashlib.md5(self.files.contents[f"/{bucket}/{key}"]).hexdigest()}"</ETag>'
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in sorted(keys)
        )
        body = (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{bucket}</Name><Prefix>{prefix}</Prefix><KeyCount>{len(keys)}</KeyCount><MaxKeys>1000</MaxKeys>"
            f"<IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving() -> Iterator[Files]:
    """A server on a free port of the loopback interface."""
    files = Files()
    handler = type("Handler", (_Handler,), {"files": files})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    files.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield files
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
