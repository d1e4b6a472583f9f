"""Serves an exported folder with vLLM and `transformers serve`, and compares all answers with the evaluator's.

    python benchmarks/serve_check.py EXPORT PREDICTIONS.jsonl --questions FILE --vllm .venv-vllm/bin/vllm

`make serve-check` sets up what it needs. For each way of serving it prints how many of check-engine's questions and of
the evaluation's questions get the recorded answer, one row of the table in docs/results/serving.md.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from llava_llama31.trainer.engines.check import check_engine
from llava_llama31.trainer.engines.client import EngineClient
from llava_llama31.trainer.engines.questions import data_uri
from llava_llama31.trainer.engines.reference import read_reference
from llava_llama31.trainer.errors import UserError


PATIENCE = 900  # seconds until a server answers
CONCURRENCY = 8
VLLM = ("--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--limit-mm-per-prompt", '{"image": 4}')
# name of a way of serving -> whether vLLM serves, its options, whether the tokenizer is made to add a bos
WAYS: dict[str, tuple[bool, tuple[str, ...], bool]] = {
    "vLLM, own class": (True, (), False),
    "vLLM, own class, a tokenizer that adds bos": (True, (), True),
    "vLLM, own class, `--trust-remote-code`": (True, ("--trust-remote-code",), False),
    "vLLM, `--model-impl transformers`": (True, ("--model-impl", "transformers"), False),
    "vLLM, `--model-impl transformers --trust-remote-code`": (
        True,
        ("--model-impl", "transformers", "--trust-remote-code"),
        False,
    ),
    "`transformers serve`": (False, (), False),
    "`transformers serve`, a tokenizer that adds bos": (False, (), True),
}


def main() -> int:
    options = parsed()
    predictions = [json.loads(line) for line in options.predictions.read_text(encoding="utf-8").splitlines()]
    rows = {row["question_id"]: row for row in map(json.loads, options.questions.read_text("utf-8").splitlines())}
    asked = [(row, options.questions.parent / rows[row["question_id"]]["image"]) for row in predictions]
    # the evaluator's limit, or enough where no answer was cut
    max_tokens = max(len(row["token_ids"]) for row in predictions)
    with_bos = options.scratch / "with-bos"
    add_bos(options.export, with_bos)
    failed = False
    print("| served by | check-engine | evaluation's questions |\n|---|---|---|")
    for name, (is_vllm, extra, adds_bos) in WAYS.items():
        folder = with_bos if adds_bos else options.export
        log = options.scratch / "server.log"
        try:
            with serving(options.vllm if is_vllm else options.transformers, is_vllm, folder, extra, log) as url:
                checked, equal = judged(folder, url, None if is_vllm else str(folder), asked, max_tokens)
        except UserError as error:
            checked, equal = str(error), "not asked"
        failed |= not (checked.startswith("all ") and equal.startswith("all "))
        print(f"| {name} | {checked} | {equal} |", flush=True)
    return int(failed)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("export", type=Path)
    parser.add_argument("predictions", type=Path, help="of `evaluate` on the export")
    parser.add_argument("--questions", type=Path, required=True, help="JSON lines with question_id and image")
    parser.add_argument("--vllm", required=True, help="its command")
    parser.add_argument("--transformers", default=str(Path(sys.executable).with_name("transformers")))
    parser.add_argument("--scratch", type=Path, default=Path("runs/serve-check"))
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    options.export, options.scratch = options.export.resolve(), options.scratch.resolve()
    return options


def add_bos(export: Path, folder: Path) -> None:
    """A copy of the export with the post-processor of Llama 3.1's own tokenizer.json, which adds a bos."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(export, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    bos = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["bos_token"]
    number = next(token["id"] for token in tokenizer["added_tokens"] if token["content"] == bos)
    special, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


@contextmanager
def serving(command: str, is_vllm: bool, folder: Path, extra: tuple[str, ...], log: Path) -> Iterator[str]:
    """A server of a folder; yields its address.

    Raises:
        UserError: it ends before it answers; names the last error of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    line = [command, "serve", *([str(folder), *VLLM, *extra] if is_vllm else []), *address]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    # vLLM starts programs of its environment by name
    environment["PATH"] = f"{Path(command).parent}{os.pathsep}{environment['PATH']}"
    with log.open("wb") as output:
        server = subprocess.Popen(
            line, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=log.parent, start_new_session=True
        )
    try:
        wait_for(port, server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()


def wait_for(port: int, server: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(PATIENCE):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        if server.poll() is not None:
            lines = log.read_text(errors="replace").splitlines()
            errors = [line[line.index("Error: ") :] for line in lines if "Error: " in line and "WARNING" not in line]
            raise UserError("refused: " + (errors or lines or ["no output"])[0].strip())
        time.sleep(1)
    raise UserError(f"does not answer after {PATIENCE} s", where=str(log))


def judged(
    folder: Path, url: str, model: str | None, asked: list[tuple[dict[str, Any], Path]], max_tokens: int
) -> tuple[str, str]:
    """What check-engine says, and how many of the evaluation's answers are equal."""
    with EngineClient(url, model) as client:
        report = check_engine(read_reference(folder), client, CONCURRENCY)
        checked = f"all {report.asked}" if report.equal == report.asked else f"{report.equal} of {report.asked}"
        if report.likely:
            checked += f": {report.likely}"

        def differs(row: dict[str, Any], image: Path) -> bool:
            with Image.open(image) as opened:
                part = {"type": "image_url", "image_url": {"url": data_uri(opened)}}
            content = [part, {"type": "text", "text": row["prompt"]}]
            served = client.ask([{"role": "user", "content": content}], max_tokens)
            row["served"] = served.text
            return (served.text or "").strip() != row["answer"].strip()

        with ThreadPoolExecutor(CONCURRENCY) as pool:
            different = [
                f"{row['question_id']}: {row['answer']!r} -> {row['served']!r}"
                for (row, _), other in zip(asked, pool.map(lambda pair: differs(*pair), asked), strict=True)
                if other
            ]
    if not different:
        return checked, f"all {len(asked)}"
    print("\n".join(different), file=sys.stderr)
    return checked, f"{len(asked) - len(different)} of {len(asked)}"


if __name__ == "__main__":
    sys.exit(main())
