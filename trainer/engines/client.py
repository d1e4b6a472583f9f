"""A client of OpenAI-compatible servers: what vLLM, SGLang and `transformers serve` offer under /v1."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx2

from llava_llama31.trainer.errors import UserError


API_KEY = "OPENAI_API_KEY"
MAX_SHOWN = 300


@dataclass(frozen=True)
class Served:
    """A server's answer.

    Args:
        text: the answer; None if the server refused the request.
        num_prompt_tokens: that it counted in the prompt; None if it does not say.
        error: why it refused, else empty.
        finish_reason: what it says of the answer's end: `stop`, `length`; empty if nothing.
    """

    text: str | None
    num_prompt_tokens: int | None = None
    error: str = ""
    finish_reason: str = ""


class EngineClient:
    """Asks one server for greedy answers; use it as a context manager.

    Args:
        url: of the server, with or without `/v1`.
        model: its name there; by default the only one that the server has.
        timeout: seconds to wait for an answer.

    Raises:
        UserError: the server does not answer, or serves several models and none is named.
    """

    def __init__(self, url: str, model: str | None = None, timeout: float = 600):
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        key = os.environ.get(API_KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx2.Client(headers=headers, timeout=timeout)
        self.model = model or self._only_model()

    def __enter__(self) -> "EngineClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def ask(self, messages: Sequence[dict[str, Any]], max_tokens: int) -> Served:
        """The greedy answer to a conversation.

        Raises:
            UserError: the server cannot be reached, or its answer is not of this protocol.
        """
        body = {"model": self.model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0}
        answer = self._send("POST", "/chat/completions", body)
        if answer.status_code != 200:
            return Served(None, error=f"HTTP {answer.status_code}: {_shown(answer)}")
        try:
            content = answer.json()
            text = content["choices"][0]["message"]["content"]
            counted = (content.get("usage") or {}).get("prompt_tokens")
            reason = content["choices"][0].get("finish_reason")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            what = f"answers with something other than a chat completion: {_shown(answer)}"
            raise UserError(what, where=self.url, fix="name the address of an OpenAI-compatible server") from error
        return Served(text or "", counted if isinstance(counted, int) else None, finish_reason=str(reason or ""))

    def _only_model(self) -> str:
        answer = self._send("GET", "/models")
        try:
            names = [item["id"] for item in answer.json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            what = f"does not list its models: HTTP {answer.status_code}: {_shown(answer)}"
            raise UserError(what, where=f"{self.url}/models", fix="name the model with --model") from error
        if len(names) != 1:
            what = f"serves {len(names)} models: {', '.join(map(str, names[:5]))}"
            raise UserError(what, where=self.url, fix="name one with --model")
        return str(names[0])

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx2.Response:
        try:
            return self._http.request(method, self.url + path, json=body)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            what = f"does not answer: {type(error).__name__}: {error}"
            raise UserError(what, where=self.url, fix="start the server, and name its address with --url") from error


def _shown(answer: httpx2.Response) -> str:
    return " ".join(answer.text.split())[:MAX_SHOWN]
