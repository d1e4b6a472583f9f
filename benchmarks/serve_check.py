"""Serves an exported folder with vLLM and `transformers serve`, and compares all answers with the evaluator's.

    python benchmarks/serve_check.py EXPORT PREDICTIONS.jsonl --questions FILE --vllm .venv-vllm/bin/vllm

`make serve-check` sets up what it needs. For each way of serving it prints how many of check-engine's questions and of
the evaluation's questions get the recorded answer, and the accuracy of the served and of the recorded answers
(`vlmevalkit-2024`): one row of the table in docs/results/serving.md. Adapters are drawn at random for the export; a
quantised twin, `export --quantize`, is compared with its own answers.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava_llama31.trainer.engines.check import check_engine
from llava_llama31.trainer.engines.client import EngineClient
from llava_llama31.trainer.engines.questions import data_uri
from llava_llama31.trainer.engines.reference import read_reference
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.questions import load_questions
from llava_llama31.trainer.evaluation.scoring import score_answers


PROTOCOL = "vlmevalkit-2024"
PATIENCE = 900  # seconds until a server answers
CONCURRENCY = 8
VLLM = ("--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--limit-mm-per-prompt", '{"image": 4}')
LORA_RANK = 8
WITH_BOS, WITH_ADAPTER = "with-bos", "adapter"


@dataclass(frozen=True)
class Way:
    """One way of serving.

    Args:
        name: in the table.
        options: of the server, beside `VLLM`.
        by: "vllm" or "transformers".
        what: the folder that is served: the export, or what `made` makes of it.
        known: what docs/serving.md says of this way where it does not give all answers; anything else is a failure.
    """

    name: str
    options: tuple[str, ...] = ()
    by: str = "vllm"
    what: str = "export"
    known: str = ""


# vLLM's kernel for 4 bits on a CPU takes no float32; of two types given, the last counts
BFLOAT16 = ("--dtype", "bfloat16")
DROPPED = "13 of 14: the transparency of images is dropped"
BY_TRANSFORMERS = ("--model-impl", "transformers")
WAYS = (
    Way("vLLM, own class"),
    Way("vLLM, own class, a tokenizer that adds bos", what=WITH_BOS),
    Way("vLLM, own class, `--trust-remote-code`", ("--trust-remote-code",)),
    Way("vLLM, `--model-impl transformers`", BY_TRANSFORMERS),
    Way(
        "vLLM, `--model-impl transformers --trust-remote-code`",
        (*BY_TRANSFORMERS, "--trust-remote-code"),
        known="no module or parameter named 'image_newline'",
    ),
    Way("vLLM, own class, adapters by `--lora-modules`", ("--enable-lora", "--max-lora-rank", "8"), what=WITH_ADAPTER),
    Way("`transformers serve`", by="transformers", known=DROPPED),
    Way("`transformers serve`, a tokenizer that adds bos", by="transformers", what=WITH_BOS, known=DROPPED),
)


def main() -> int:
    options = parsed()
    rows = {row["question_id"]: row for row in map(json.loads, options.questions.read_text("utf-8").splitlines())}
    twins = [Way(f"vLLM, own class, {twin.name}", options=BFLOAT16, what=str(twin.resolve())) for twin in options.twin]
    failed = False
    print("| served by | check-engine | evaluation's questions | accuracy, served and recorded |\n|---|---|---|---|")
    for way in (*WAYS, *twins):
        if not any(part in way.name for part in options.only or [""]):
            continue
        folder = made(way, options.export, options.scratch)
        predictions = folder / "predictions.jsonl" if Path(way.what).is_absolute() else options.predictions
        asked = [
            (row, options.questions.parent / rows[row["question_id"]]["image"])
            for row in map(json.loads, predictions.read_text(encoding="utf-8").splitlines())
        ]
        try:
            checked, equal = served(way, folder, asked, options)
            failed |= not equal.startswith(("all ", "no "))
        except UserError as error:
            checked, equal = str(error).partition(". ")[0], "not asked"  # vLLM names every parameter behind it
        failed |= way.known not in checked if way.known else not checked.startswith("all ")
        print(f"| {way.name} | {checked} | {equal} | {accuracies(asked, options.questions)} |", flush=True)
    return int(failed)


def found(command: str) -> str:
    """The absolute path of a command.

    Raises:
        SystemExit: there is no such command.
    """
    path = shutil.which(command)
    if path is None:
        raise SystemExit(f"error: there is no command {command} (fix: make serve-check)")
    return str(Path(path).absolute())


def accuracies(asked: list[tuple[dict[str, Any], Path]], questions: Path) -> str:
    """Of the served answers and of the recorded ones, in percent; empty where nothing was served."""
    rows = [row for row, _ in asked if row.get("served") is not None]
    if not rows:
        return ""
    annotated = load_questions(questions, with_images=False)
    served = score_answers(annotated, [{"question_id": row["question_id"], "answer": row["served"]} for row in rows])
    recorded = score_answers(annotated, rows)
    return ", ".join(f"{100 * report.protocols[PROTOCOL].accuracy:.2f} %" for report in (served, recorded))


def made(way: Way, export: Path, scratch: Path) -> Path:
    """The folder with the answers that a way of serving should give."""
    folder = scratch / way.what
    if way.what == WITH_BOS:
        add_bos(export, folder)
    elif way.what == WITH_ADAPTER:
        draw_adapter(export, folder)
    return export if way.what == "export" else folder


def served(
    way: Way, folder: Path, asked: list[tuple[dict[str, Any], Path]], options: argparse.Namespace
) -> tuple[str, str]:
    """What check-engine says, and how many of the evaluation's answers are equal."""
    command = options.vllm if way.by == "vllm" else options.transformers
    extra, served_folder, model = way.options, folder, None if way.by == "vllm" else str(folder)
    if way.what == WITH_ADAPTER:
        extra, served_folder, model = (*extra, "--lora-modules", f"mine={folder}"), options.export, "mine"
        asked = []  # the evaluation's answers are those without the adapters
    # the evaluator's limit, or enough where no answer was cut
    max_tokens = max((len(row["token_ids"]) for row, _ in asked), default=0)
    log = options.scratch / "server.log"
    with serving(command, way.by == "vllm", served_folder, extra, log) as url:
        return judged(folder, url, model, asked, max_tokens)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("export", type=Path)
    parser.add_argument("predictions", type=Path, help="of `evaluate` on the export")
    parser.add_argument("--questions", type=Path, required=True, help="JSON lines with question_id and image")
    parser.add_argument("--vllm", required=True, help="its command")
    parser.add_argument("--twin", type=Path, action="append", default=[], help="a quantised export; may be repeated")
    parser.add_argument("--only", action="append", metavar="TEXT", help="ways whose names hold it; may be repeated")
    parser.add_argument("--transformers", default=str(Path(sys.executable).with_name("transformers")))
    parser.add_argument("--scratch", type=Path, default=Path("runs/serve-check"))
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    # servers run in the scratch folder
    options.export, options.scratch = options.export.absolute(), options.scratch.absolute()
    options.vllm, options.transformers = (found(command) for command in (options.vllm, options.transformers))
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


def draw_adapter(export: Path, folder: Path) -> None:
    """Random adapters for the export's decoder, and what the model answers with them."""
    import torch
    from peft import LoraConfig, get_peft_model

    from llava_llama31.trainer.engines.reference import REFERENCE, record_reference
    from llava_llama31.trainer.model.module_groups import lora_target_pattern
    from llava_llama31.trainer.model.opening import open_model

    targets = lora_target_pattern(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    model, processor = open_model(export, dtype="float32", device="cpu")
    adapted = get_peft_model(model, LoraConfig(r=LORA_RANK, target_modules=targets, task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(str(folder))
    (folder / REFERENCE).write_text(record_reference(adapted.get_base_model(), processor), encoding="utf-8")


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
    if not asked:
        return checked, "no answers with the adapters"
    if not different:
        return checked, f"all {len(asked)}"
    print("\n".join(different), file=sys.stderr)
    return checked, f"{len(asked) - len(different)} of {len(asked)}"


if __name__ == "__main__":
    sys.exit(main())
