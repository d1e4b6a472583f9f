"""`evaluate --url` and `--engine`: a server asked with our prompts and pixels gives our scores, or the difference."""

import copy
import json
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from engine_server import Engine, serving

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.model.opening import open_model


SIZES = [(28, 28), (20, 90), (90, 20), (60, 50)]
# in the place of `vllm serve`: says A to everything, and what it was started with
VLLM = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
if "--broken" in sys.argv:
    sys.exit("out of memory")
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass
    def send(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.send({{"data": [{{"id": sys.argv[2]}}]}})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send({{"choices": [{{"message": {{"content": " A "}}, "finish_reason": "stop"}}]}})
print(sys.argv, flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def served(lively_folder):
    return open_model(lively_folder)


@pytest.fixture(scope="module")
def data(make_image, tmp_path_factory):
    """Eight yes/no and eight multiple-choice questions on four images, and four of TextVQA's kind."""
    folder, draw = tmp_path_factory.mktemp("served"), random.Random(0)
    files = {"pope": [], "mmstar": [], "textvqa": []}
    for i in range(4):
        make_image(*SIZES[i], seed=i).save(folder / f"{i}.png")
        shown = {"image": f"{i}.png", "question": f"What is {i}?"}
        files["textvqa"].append({"question_id": i, "image_id": str(i), **shown, "answers": ["red"] * 10})
        for k in range(2):
            row = {"index": 2 * i + k, "image_path": f"{i}.png", "question": f"Which is {i}{k}?"}
            files["mmstar"].append(row | {"A": "red", "B": "blue", "answer": draw.choice("AB"), "category": "one"})
            files["pope"].append(row | {"answer": draw.choice(["yes", "no"]), "category": "random", "image": None})
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def tasks(data):
    named = [f"{name}={data / f'{name}.jsonl'}" for name in ("pope", "mmstar")]
    return ["--task", named[0], "--task", named[1], "--image-root", str(data), "--max-new-tokens", "3", "--json"]


def test_a_server_gives_our_answers_and_scores(served, lively_folder, data, capsys):
    assert main(["evaluate", str(lively_folder), *tasks(data)]) == 0
    own = json.loads(capsys.readouterr().out)["tasks"]
    with serving(Engine(*served, drops_stop=True)) as url:
        assert main(["evaluate", str(lively_folder), "--url", url, *tasks(data)]) == 0
    result = json.loads(capsys.readouterr().out)["tasks"]
    for ours, theirs in zip(own, result, strict=True):
        assert theirs["sample"] == {"compared": 8, "equal": 8} and theirs["predictions"] != ours["predictions"]
        for name in ("task", "protocols", "metrics", "num_questions", "failed"):
            assert theirs[name] == ours[name]
        lines = [Path(file["predictions"]).read_text().splitlines() for file in (ours, theirs)]
        texts = [[json.loads(line)["answer"] for line in file] for file in lines]
        assert texts[0] == texts[1] and len(set(texts[0])) > 1
        assert theirs["settings"]["engine"] == "OpenAI-compatible server, model the-model"


def test_a_difference_is_counted_and_named(served, lively_folder, data, capsys):
    model, processor = copy.deepcopy(served[0]), served[1]
    model.lm_head.weight.data[:] = torch.roll(model.lm_head.weight.data, 1, dims=0)
    arguments = ["--data", str(data / "textvqa.jsonl"), "--max-new-tokens", "3", "--compare", "3"]
    with serving(Engine(model, processor)) as url:
        assert main(["evaluate", str(lively_folder), "--url", url, *arguments]) == 0
    out = capsys.readouterr().out
    assert "m4c" in out and "0 of 3 sampled answers are those of this package's engine" in out
    assert "first difference: question 0: served " in out


def test_what_a_server_refuses_is_named_and_asked_again(served, lively_folder, data, capsys):
    refused = [True]

    def refuse(messages):
        return refused[0] and "Which is 11?" in json.dumps(messages)

    engine = Engine(*served, refuse=refuse)
    with serving(engine) as url:
        arguments = ["evaluate", str(lively_folder), "--url", url, *tasks(data), "--compare", "0"]
        assert main(arguments) == 3
        pope = json.loads(capsys.readouterr().out)["tasks"][0]
        assert pope["failed_ids"] == {"3": 'HTTP 400: {"error": {"message": "at most one image"}}'}
        refused[0], before = False, engine.asked
        assert main(arguments) == 0
        assert engine.asked == before + 2  # one of each task
    assert "sample" not in json.loads(capsys.readouterr().out)["tasks"][0]


def test_vllm_is_started_and_ended(lively_folder, data, tmp_path, monkeypatch, capsys):
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(VLLM.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    arguments = ["evaluate", str(lively_folder), "--engine", "vllm", *tasks(data), "--output", "out", "--compare", "0"]
    options = ["--dtype", "float32", "--engine-options", "--max-model-len 512"]
    assert main([*arguments, *options]) == 0
    pope, mmstar = json.loads(capsys.readouterr().out)["tasks"]
    assert mmstar["groups"]["one"]["accuracy"] == mmstar["metrics"]["accuracy"] > 0 and pope["metrics"]["f1"] >= 0
    started = (tmp_path / "out" / "pope" / "vllm.log").read_text()
    assert "'--dtype', 'float32', '--max-model-len', '512'" in started
    assert mmstar["settings"]["engine"] == "vllm --dtype float32 --max-model-len 512"
    assert main([*arguments, "--output", "other", "--engine-options=--broken"]) == 2
    assert "vllm ended with 1: out of memory (fix: read the log)" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    assert main(arguments) == 2
    assert "the command vllm is not on PATH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--url", "http://x", "--engine", "vllm", "--data", "x"],
            "both a running server and an engine to start are named",
        ),
        (["--url", "http://x", "--data", "x", "--ocr", "rapidocr"], "--ocr does not go with a server"),
        (["--url", "http://x", "--data", "x", "--engine-options=-x"], "the server runs already"),
        (["--url", "http://x"], "--data: no questions"),
    ],
)
def test_options_that_do_not_go_together(arguments, message, capsys):
    assert main(["evaluate", "nowhere", *arguments]) == 2
    assert message in capsys.readouterr().err
