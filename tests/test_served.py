"""`evaluate --url` and `--engine`: a server asked with our prompts and pixels gives our scores, or the difference."""

import copy
import json
import os
import random
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from engine_server import Engine, serving

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.engines import client
from llava_llama31.trainer.model.opening import open_model


SIZES = [(28, 28), (20, 90), (90, 20), (60, 50)]
# instead of `vllm serve`: says A to everything, and what it was started with
VLLM = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
if "--broken" in sys.argv:
    sys.exit("out of memory")
if "--broken-worker" in sys.argv:  # as vLLM 0.32 prints it
    print("(APIServer pid=1) WARNING [utils.py:255] It can cause errors like `OSError: [Errno 24] many files`")
    print("(VllmWorker-0 pid=2) ERROR [multiproc_executor.py:953]     raise ValueError(")
    print("(VllmWorker-0 pid=2) ERROR [multiproc_executor.py:953] ValueError: too little memory", flush=True)
    sys.exit("RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}")
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


@contextmanager
def scripted(replies, models=("m",), port=0):
    """A server that answers the n-th question as `replies(n)` says: (status, content), or None to hang up."""
    asked, lock = [0], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def _send(self, status, content):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self._send(*((401, {}) if models is None else (200, {"data": [{"id": name} for name in models]})))

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                asked[0] += 1
                reply = replies(asked[0])
            if reply is not None:
                self._send(*reply)
            else:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def said(content, reason="stop"):
    return 200, {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": reason}]}


def ask(lively_folder, data, url, *more):
    options = ["--url", url, "--compare", "0", "--concurrency", "1", "--output", "out", *more]
    return main(["evaluate", str(lively_folder), "--data", str(data / "textvqa.jsonl"), *options])


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (said(None, "length"), "the server gave no answer in content; finish_reason is length"),
        (said("", "content_filter"), "the server gave no answer in content; finish_reason is content_filter"),
        (said([{"type": "text", "text": "red"}]), "answers with something other than a chat completion"),
        (said(5), "answers with something other than a chat completion"),
        ((500, {"error": "boom"}), 'HTTP 500: {"error": "boom"}'),
    ],
)
def test_what_is_no_answer_is_not_scored_as_an_empty_one(lively_folder, data, capsys, reply, reason):
    with scripted(lambda number: reply if number == 2 else said("red")) as (url, _):
        assert ask(lively_folder, data, url, "--json") == 3
        report = json.loads(capsys.readouterr().out)
        assert (
            report["failed"] == 1 and reason in report["failed_ids"]["1"] and "(fix" not in report["failed_ids"]["1"]
        )
        assert report["protocols"]["m4c"]["accuracy"] == 1.0
        assert ask(lively_folder, data, url) == 0  # it is asked again


def test_a_server_that_answers_with_another_model_is_named(lively_folder, data, capsys):
    """LM Studio, for one, answers with whatever model it has loaded."""

    def said_by(number):
        status, content = said("red")
        return status, content | {"model": ["m", "llama-3", None][number % 3]}

    with scripted(said_by) as (url, _):
        assert ask(lively_folder, data, url, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["answered_by"] == {"llama-3": 2}
    assert json.loads(Path("out/scores.json").read_text())["answered_by"] == {"llama-3": 2}
    assert "the server was asked for m and names what has answered: llama-3 (2 questions)" in err
    rows = [json.loads(line) for line in Path("out/predictions.jsonl").read_text().splitlines()]
    assert [row.get("served_model") for row in rows] == ["llama-3", None, None, "llama-3"]


def test_a_busy_server_is_asked_again(lively_folder, data, capsys, monkeypatch):
    monkeypatch.setattr(client, "WAITS", (0.0, 0.0))
    busy = {1: (429, {}), 2: (503, {}), 4: None}
    with scripted(lambda number: busy.get(number, said("red"))) as (url, asked):
        assert ask(lively_folder, data, url) == 0
        assert asked[0] == 4 + len(busy)
    with scripted(lambda number: (429, {"error": "slower"})) as (url, asked):
        assert ask(lively_folder, data, url, "--output", "other") == 2
        assert asked[0] == 4 * 3
    assert "question 0: HTTP 429" in capsys.readouterr().err


def test_a_server_that_is_gone_ends_the_evaluation_and_another_one_resumes_it(
    lively_folder, data, capsys, monkeypatch
):
    monkeypatch.setattr(client, "WAITS", (0.0, 0.0))
    with scripted(lambda number: said("red")) as (url, _):
        port = int(url.rpartition(":")[2])
    send = client.EngineClient._send
    asked = []

    def send_two(self, method, path, body=None):
        asked.append(path)
        if len(asked) <= 3:  # the models and two questions
            with scripted(lambda number: said("red"), port=port):
                return send(self, method, path, body)
        return send(self, method, path, body)

    monkeypatch.setattr(client.EngineClient, "_send", send_two)
    assert ask(lively_folder, data, url) == 2
    error = capsys.readouterr().err
    assert "does not answer: ConnectError" in error
    assert "fix: start it again, and run the same command: what is answered is kept" in error
    assert len(Path("out/predictions.jsonl").read_text().splitlines()) == 2
    monkeypatch.setattr(client.EngineClient, "_send", send)
    with scripted(lambda number: said("red")) as (url, counted):
        assert ask(lively_folder, data, url) == 0
        assert counted[0] == 2


def test_a_servers_answers_have_a_page_and_their_sample_in_the_scores(served, lively_folder, data, capsys):
    with serving(Engine(*served)) as url:
        arguments = ["evaluate", str(lively_folder), "--url", url, *tasks(data), "--output", "out"]
        assert main(arguments) == 0
        printed = json.loads(capsys.readouterr().out)["tasks"]
        for report, name in zip(printed, ("pope", "mmstar"), strict=True):
            assert Path("out", name, "predictions.html").is_file()
            written = json.loads(Path("out", name, "scores.json").read_text())
            assert written | {"predictions": report["predictions"]} == report and written["sample"]["compared"] == 8
        assert main([*arguments[:-3], "--output", "out", "--no-browser"]) == 0
    assert "out/pope/predictions.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (("a", "b"), "serves 2 models: a, b (fix: name one with --served-model)"),
        ((), "serves 0 models (fix: name one with --served-model)"),
        (None, "HTTP 401: {} (fix: set OPENAI_API_KEY to a key that it takes)"),
    ],
)
def test_a_model_is_named_by_the_commands_own_option(lively_folder, data, capsys, models, message):
    with scripted(lambda number: said("red"), models) as (url, _):
        assert ask(lively_folder, data, url) == 2
    assert message in capsys.readouterr().err


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
    assert main([*arguments, "--output", "other", "--engine-options=--broken-worker"]) == 2
    assert "vllm ended with 1: ValueError: too little memory (fix: read the log)" in capsys.readouterr().err
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
        (["--url", "http://x", "--data", "x", "--ocr", "rapidocr"], "--ocr: does not go with a server"),
        (["--url", "http://x", "--data", "x", "--engine-options=-x"], "the server runs already"),
        (["--url", "http://x"], "--data: no questions"),
    ],
)
def test_options_that_do_not_go_together(arguments, message, capsys):
    assert main(["evaluate", "nowhere", *arguments]) == 2
    assert message in capsys.readouterr().err
