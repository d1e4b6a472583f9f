"""Chat in a browser: one page, served to this machine, with streamed answers of one model or of two side by side.

Only the standard library: Gradio 6.31 asks for Pillow before 13, whose pixels are others than those of training.
"""

import json
import sys
import threading
import traceback
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from llava_llama31.trainer.chat.conversation import Conversation
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.redaction import shown


LOOPBACK = "127.0.0.1"
MAX_IMAGE_BYTES = 32 * 2**20
MAX_BODY_BYTES = 128 * 2**20
MAX_CONVERSATIONS = 4  # each holds its images' tiles and a cache of keys and values


@dataclass(frozen=True)
class Example:
    """A question about an image file that the page offers."""

    image: Path
    question: str


class ChatServer(ThreadingHTTPServer):
    """Serves the page at `/`, answers at `/ask` as lines of JSON, and forgets a conversation at `/reset`.

    One question is answered at a time; others wait.

    Args:
        models: names of the models, one or two, for the page.
        begin: makes a new conversation with each of them.
        examples: that the page offers.
        host: address to listen at.
        port: 0: a free one.

    Raises:
        UserError: the address can't be had.
    """

    daemon_threads = True

    def __init__(
        self,
        models: Sequence[str],
        begin: Callable[[], Sequence[Conversation]],
        examples: Sequence[Example] = (),
        *,
        host: str = LOOPBACK,
        port: int = 0,
    ):
        self.models, self.begin, self.examples = models, begin, examples
        self.busy = threading.Lock()
        self._conversations: OrderedDict[str, Sequence[Conversation]] = OrderedDict()
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            where = f"--host {host} --port {port}"
            raise UserError(f"{error.strerror or error}", where=where, fix="name another port, or none") from error

    @property
    def address(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_port}/"

    def conversations(self, key: str) -> Sequence[Conversation]:
        """The conversations of one page; the newest `MAX_CONVERSATIONS` pages are kept."""
        if key not in self._conversations:
            self._conversations[key] = self.begin()
        self._conversations.move_to_end(key)
        while len(self._conversations) > MAX_CONVERSATIONS:
            self._conversations.popitem(last=False)
        return self._conversations[key]

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):  # a page that has gone is not a fault
            sys.stderr.write(shown(traceback.format_exc()))

    def forget(self, key: str) -> None:
        self._conversations.pop(key, None)

    def page(self) -> tuple[str, str]:
        """The page, and the policy under which it may run its own script and talk to this server alone."""
        style, script, page = (_file(f"web.{suffix}") for suffix in ("css", "js", "html"))
        examples = [
            {"image": f"examples/{i}{example.image.suffix}", "question": example.question}
            for i, example in enumerate(self.examples)
        ]
        data = json.dumps({"models": list(self.models), "examples": examples, "limit": MAX_IMAGE_BYTES})
        filled = Template(page).substitute(style=style, script=script, data=data.replace("<", "\\u003c"))
        policy = (
            f"default-src 'none'; connect-src 'self'; img-src 'self' blob: data:; style-src {_source_hash(style)}; "
            f"script-src {_source_hash(script)}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return filled, policy


class _Refused(Exception):
    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_GET(self) -> None:
        if not self._is_ours():
            return self._send(403, b"", "text/plain")
        if self.path == "/":
            page, policy = self.server.page()
            return self._send(200, page.encode(), "text/html; charset=utf-8", policy)
        for i, example in enumerate(self.server.examples):
            if self.path == f"/examples/{i}{example.image.suffix}":
                return self._send(200, example.image.read_bytes(), f"image/{example.image.suffix[1:]}")
        self._send(404, b"", "text/plain")

    def do_POST(self) -> None:
        try:
            if not self._is_ours():
                raise _Refused(403, "the request comes from another page")
            body = self._body()
            if self.path == "/reset":
                with self.server.busy:
                    self.server.forget(str(body.get("conversation")))
                return self._send(200, b"{}", "application/json")
            if self.path != "/ask":
                raise _Refused(404, "there is nothing here")
            with self.server.busy:
                self._answer(body)
        except _Refused as refused:
            self._send(refused.code, json.dumps({"error": str(refused)}).encode(), "application/json")

    def _is_ours(self) -> bool:
        """Whether a page of this server asks: another one could send requests, or be called by another name."""
        host, port = self.server.server_address[:2]
        names = {f"{name}:{port}" for name in (str(host), "localhost")}
        if str(host) != LOOPBACK:
            names.add(str(self.headers.get("Host")))
        origin = self.headers.get("Origin")
        return self.headers.get("Host") in names and (origin is None or origin.removeprefix("http://") in names)

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        # another page cannot send this type without being asked first, which it is refused
        if self.headers.get("Content-Type") != "application/json" or not length.isdigit():
            raise _Refused(415, "not a request of this page")
        if int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            raise _Refused(413, f"the images have more than {MAX_BODY_BYTES // 10**6} MB together")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except ValueError:
            raise _Refused(400, "not JSON") from None
        if not isinstance(body, dict):
            raise _Refused(400, "not a request of this page")
        return body

    def _answer(self, body: Mapping[str, Any]) -> None:
        text, images = str(body.get("text", "")).strip(), _images(body.get("images", []))
        if not text:
            raise _Refused(400, "there is no question")
        conversations = self.server.conversations(str(body.get("conversation")))
        try:
            for conversation in conversations:
                conversation.add_images(images)
        except UserError as error:
            for conversation in conversations:
                conversation.drop_pending()
            raise _Refused(400, str(error)) from None
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        streams = [_lines(model, conversation, text) for model, conversation in enumerate(conversations)]
        try:
            while streams:
                for stream in list(streams):  # in turn, so that both are seen to write
                    line = next(stream, None)
                    if line is None:
                        streams.remove(stream)
                    else:
                        self.wfile.write(json.dumps(line).encode() + b"\n")
        except OSError:  # stopped: the page no longer listens; what was said until then stays
            pass
        finally:
            for stream in streams:
                stream.close()
            for conversation in conversations:  # one that was not asked before the page had gone
                conversation.drop_pending()

    def _send(self, code: int, content: bytes, kind: str, policy: str = "default-src 'none'") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _images(sent: Any) -> list[tuple[str, bytes]]:
    """(name, encoded image) of what a page sent."""
    found = []
    try:
        for image in sent:
            data = b64decode(image["data"], validate=True)
            if len(data) > MAX_IMAGE_BYTES:
                raise _Refused(413, f"{image['name']}: more than {MAX_IMAGE_BYTES // 10**6} MB")
            found.append((str(image["name"]), data))
    except (TypeError, KeyError, Base64Error):
        raise _Refused(400, "not a request of this page") from None
    return found


def _lines(model: int, conversation: Conversation, text: str) -> Generator[dict[str, Any], None, None]:
    """The answer of a model in pieces, or why there is none."""
    pieces = conversation.ask(text)
    try:
        for piece in pieces:
            yield {"model": model, "piece": piece}
    except UserError as error:
        yield {"model": model, "error": str(error)}
    finally:
        pieces.close()


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _source_hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
