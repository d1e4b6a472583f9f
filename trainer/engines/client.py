"""A client of OpenAI-compatible servers: what vLLM, SGLang and `transformers serve` offer under /v1."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx2

from llava_llama31.trainer.errors import UserError


API_KEY = "OPENAI_API_KEY"
MAX_SHOWN = 300
# a server that is busy or restarts says so; then it is asked again after so many seconds, or as long as it says
WAITS = (1.0, 2.0, 4.0, 8.0)
LONGEST_WAIT = 30.0
BUSY = (429, 502, 503, 504)
# how an answer ends that the model did not end
BROKEN_OFF = ("content_filter", "abort", "error", "tool_calls", "function_call")


class Unreachable(UserError):
    """Nobody listens at the server's address."""


@dataclass(frozen=True)
class Served:
    """A server's answer.

    Args:
        text: the answer; None if the server refused the request.
        num_prompt_tokens: that it counted in the prompt; None if it does not say.
        error: why it refused, else empty.
        finish_reason: what it says of the answer's end: `stop`, `length`; empty if nothing.
        model: that it says has answered; empty if it does not say.
    """

    text: str | None
    num_prompt_tokens: int | None = None
    error: str = ""
    finish_reason: str = ""
    model: str = ""


class EngineClient:
    """Asks one server for greedy answers; use it as a context manager.

    Args:
        url: of the server, with or without `/v1`.
        model: its name there; by default the only one that the server has.
        timeout: seconds to wait for an answer.
        named_by: the option that names the model, for errors.

    Raises:
        UserError: the server does not answer, or serves several models and none is named.
    """

    def __init__(self, url: str, model: str | None = None, timeout: float = 600, *, named_by: str = "--model"):
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        key = os.environ.get(API_KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx2.Client(headers=headers, timeout=timeout)
        self._named_by = named_by
        self.model = model or self._only_model()

    def __enter__(self) -> "EngineClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def ask(self, messages: Sequence[dict[str, Any]], max_tokens: int) -> Served:
        """The greedy answer to a conversation; a busy server is asked again.

        Raises:
            Unreachable: nobody listens at the server's address.
            UserError: the connection breaks, or the server's answer is not of this protocol.
        """
        body = {"model": self.model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0}
        answer = self._ask_patiently(body)
        if answer.status_code != 200:
            return Served(None, error=f"HTTP {answer.status_code}: {_shown(answer)}")
        try:
            content = answer.json()
            text = content["choices"][0]["message"]["content"]
            counted = (content.get("usage") or {}).get("prompt_tokens")
            reason = str(content["choices"][0].get("finish_reason") or "")
            model = str(content.get("model") or "")
            if not isinstance(text, str | None):
                raise TypeError(f"content is a {type(text).__name__}")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            what = f"answers with something other than a chat completion: {_shown(answer)}"
            raise UserError(what, where=self.url, fix="name the address of an OpenAI-compatible server") from error
        num_prompt_tokens = counted if isinstance(counted, int) else None
        if text is None or reason in BROKEN_OFF:
            # e.g. a reasoning parser that took all words: an empty answer would be the model's own
            why = f"the server gave no answer in content; finish_reason is {reason or 'not given'}"
            return Served(None, num_prompt_tokens, why, reason)
        return Served(text, num_prompt_tokens, finish_reason=reason, model=model)

    def _ask_patiently(self, body: dict[str, Any]) -> httpx2.Response:
        """The answer to a request; a busy server and one that closes the connection are asked again."""
        for wait in WAITS:
            try:
                answer = self._send("POST", "/chat/completions", body)
            except UserError as error:
                if not isinstance(error.__cause__, httpx2.NetworkError | httpx2.RemoteProtocolError):
                    raise
            else:
                if answer.status_code not in BUSY:
                    return answer
                wait = _seconds_to_wait(answer, wait)
            time.sleep(wait)
        return self._send("POST", "/chat/completions", body)

    def _only_model(self) -> str:
        answer = self._send("GET", "/models")
        try:
            names = [item["id"] for item in answer.json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            what = f"does not list its models: HTTP {answer.status_code}: {_shown(answer)}"
            needs_key = answer.status_code in (401, 403)
            fix = f"set {API_KEY} to a key that it takes" if needs_key else f"name the model with {self._named_by}"
            raise UserError(what, where=f"{self.url}/models", fix=fix) from error
        if len(names) != 1:
            what = f"serves {len(names)} models{': ' if names else ''}{', '.join(map(str, names[:5]))}"
            raise UserError(what, where=self.url, fix=f"name one with {self._named_by}")
        return str(names[0])

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx2.Response:
        try:
            return self._http.request(method, self.url + path, json=body)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            what = f"does not answer: {type(error).__name__}: {error}"
            kind = Unreachable if isinstance(error, httpx2.ConnectError) else UserError
            raise kind(what, where=self.url, fix="start the server, and name its address with --url") from error


def _seconds_to_wait(answer: httpx2.Response, default: float) -> float:
    """How long a busy server asks to wait, at most LONGEST_WAIT."""
    said = answer.headers.get("Retry-After", "")
    return min(float(said), LONGEST_WAIT) if said.isdecimal() else default


def _shown(answer: httpx2.Response) -> str:
    return " ".join(answer.text.split())[:MAX_SHOWN]
