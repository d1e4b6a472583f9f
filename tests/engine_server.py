"""A server around one of our models, as OpenAI-compatible engines are."""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image

from llava_llama31.trainer.engines.reference import inputs_of


# of each model: what it generates from inputs, which most tests ask again and again
_GENERATED: WeakKeyDictionary[Any, dict[Any, torch.Tensor]] = WeakKeyDictionary()


def generated(model: Any, inputs: dict[str, torch.Tensor], max_tokens: int) -> torch.Tensor:
    content = [
        (name, tuple(x.shape), x.dtype, x.contiguous().view(torch.uint8).numpy().tobytes())
        for name, x in sorted(inputs.items())
    ]
    known, key = _GENERATED.setdefault(model, {}), (max_tokens, *content)
    if key not in known:
        with torch.no_grad():
            known[key] = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
    return known[key]


@dataclass
class Engine:
    """What a server answers with; `change` plants a fault in the inputs of a request.

    Args:
        refuse: whether a request's messages are answered with HTTP 400.
        drops_stop: leave the token that ends an answer out of it, where it is no special one.
    """

    model: Any
    processor: Any
    change: Callable[[dict[str, torch.Tensor], int], dict[str, torch.Tensor]] = lambda inputs, number: inputs
    of_image: Callable[[Image.Image], Image.Image] = lambda image: image
    refuse: Callable[[list], bool] = lambda messages: False
    counts: bool = True
    drops_stop: bool = False
    asked: int = 0

    def answer(self, messages: list[dict[str, Any]], max_tokens: int) -> tuple[str, int]:
        inputs = inputs_of(self.processor, [self._opened(message) for message in messages])
        self.asked += 1
        inputs = self.change(dict(inputs), self.asked)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        output = generated(self.model, inputs, max_tokens)
        length = inputs["input_ids"].shape[1]
        ids = output[0, length:].tolist()
        if self.drops_stop and ids[-1] in self.model.generation_config.eos_token_id:
            ids.pop()
        return self.processor.decode(ids, skip_special_tokens=True), length

    def _opened(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        return {"role": message["role"], "content": [self._part(part) for part in parts]}

    def _part(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "text":
            return part
        head, _, data = part["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        return {"type": "image", "image": self.of_image(Image.open(io.BytesIO(base64.b64decode(data))))}


@contextmanager
def serving(engine: Engine) -> Iterator[str]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def _send(self, status: int, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            self._send(200, {"data": [{"id": "the-model"}]})

        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert body["model"] == "the-model" and body["temperature"] == 0
            if engine.refuse(body["messages"]):
                return self._send(400, {"error": {"message": "at most one image"}})
            with lock:
                text, counted = engine.answer(body["messages"], body["max_tokens"])
            usage = {"usage": {"prompt_tokens": counted}} if engine.counts else {}
            self._send(200, {"choices": [{"message": {"role": "assistant", "content": text}}], **usage})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
