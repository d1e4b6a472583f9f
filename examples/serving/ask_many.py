"""Asks a server many questions about images, several at a time; the answers come in the order of the questions.

    python examples/serving/ask_many.py questions.jsonl --url http://localhost:8000 > answers.jsonl

A row has `image` (a path relative to the file), `question` and anything else, which goes into the answer's row. A row
that the server refuses has `error` in place of `answer`, and the exit code is then 3.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from llava_llama31.trainer.engines.client import EngineClient
from llava_llama31.trainer.engines.questions import data_uri


def main() -> int:
    options = parsed()
    rows = [json.loads(line) for line in options.questions.read_text(encoding="utf-8").splitlines() if line.strip()]
    refused = 0
    with EngineClient(options.url, options.model) as client, ThreadPoolExecutor(options.concurrency) as pool:

        def ask(row: dict[str, Any]) -> dict[str, Any]:
            with Image.open(options.questions.parent / row["image"]) as image:
                part = {"type": "image_url", "image_url": {"url": data_uri(image)}}
            content = [part, {"type": "text", "text": row["question"]}]
            served = client.ask([{"role": "user", "content": content}], options.max_tokens)
            return {**row, "error": served.error} if served.text is None else {**row, "answer": served.text}

        for answered in pool.map(ask, rows):
            refused += "error" in answered
            print(json.dumps(answered, ensure_ascii=False), flush=True)
    return 3 if refused else 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("questions", type=Path)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", help="its name there; default: the only one that the server has")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at a time; the server forms the batches")
    parser.add_argument("--max-tokens", type=int, default=64)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
