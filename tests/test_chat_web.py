"""Chat in a browser: what the server answers and refuses, and a conversation in a real Chromium."""

import http.client
import json
import threading
import time
from base64 import b64encode
from io import BytesIO

import pytest

from llava_llama31.trainer.chat.conversation import Conversation
from llava_llama31.trainer.chat.web import MAX_BODY_BYTES, MAX_CONVERSATIONS, MAX_IMAGE_BYTES, ChatServer, Example
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.commands.chat import _examples


def encoded(image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def serve(lively_model, processor, make_image, tmp_path):
    """Starts a server; each conversation with it is in `begun`."""
    servers, begun = [], []
    make_image(30, 50, seed=3).save(tmp_path / "1.png")

    def begin_one():
        begun.append(Conversation(lively_model, processor, max_new_tokens=12))
        return begun[-1]

    def start(models=("m",), begin=begin_one):
        examples = [Example(tmp_path / "1.png", "what is <here>?")]
        server = ChatServer(models, lambda: [begin() for _ in models], examples)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        servers.append((server, thread))
        server.begun = begun
        return server

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def request(server, method, path, body=None, **headers) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    headers = {"Content-Type": "application/json", **{key.replace("_", "-"): value for key, value in headers.items()}}
    connection.request(method, path, json.dumps(body) if body is not None else None, headers)
    answer = connection.getresponse()
    text = answer.read().decode(errors="replace")
    connection.close()
    return answer.status, text


def ask(server, text, *images, conversation="a"):
    sent = [{"name": name, "data": b64encode(data).decode()} for name, data in images]
    code, answer = request(server, "POST", "/ask", {"conversation": conversation, "text": text, "images": sent})
    return code, [json.loads(line) for line in answer.splitlines()]


def said(lines, model=0) -> str:
    return "".join(line["piece"] for line in lines if line["model"] == model).strip()


def test_turns_have_the_answers_of_the_terminal(serve, lively_model, processor, make_image, tmp_path):
    server = serve()
    image = encoded(make_image(40, 60, seed=1))
    (tmp_path / "x.png").write_bytes(image)
    expected = Conversation(lively_model, processor, max_new_tokens=12)
    expected.add_image(str(tmp_path / "x.png"))
    for text, images in (("what?", [("x.png", image)]), ("and why?", [])):
        code, lines = ask(server, text, *images)
        assert code == 200 and len(lines) > 1 and said(lines) == "".join(expected.ask(text)).strip()
    assert server.begun[0].to_json()[0]["images"] == ["x.png"] and len(server.begun) == 1
    ask(server, "what?", conversation="other tab")
    assert len(server.begun) == 2 and len(server.begun[0].messages) == 4
    assert request(server, "POST", "/reset", {"conversation": "a"})[0] == 200
    ask(server, "what?")
    assert len(server.begun[-1].messages) == 2
    for number in range(MAX_CONVERSATIONS):
        ask(server, "what?", conversation=str(number))
    ask(server, "what?")
    assert len(server.begun) == 4 + MAX_CONVERSATIONS  # the oldest was forgotten


def test_two_models_answer_side_by_side(serve):
    lines = ask(serve(("one", "other")), "what?")[1]
    assert said(lines, 0) == said(lines, 1) != ""
    assert [line["model"] for line in lines[:4]] == [0, 1, 0, 1]


def test_a_broken_image_is_refused_and_the_question_not_asked(serve, make_image):
    server = serve()
    whole = encoded(make_image(40, 60))
    for name, data in (("cut.png", whole[:90]), ("text.png", b"no image"), ("b.png", b"")):
        code, (line,) = ask(server, "what?", ("whole.png", whole), (name, data))
        assert code == 400 and line["error"].startswith(name) and "(fix: choose an image file)" in line["error"]
    assert ask(server, "what?")[0] == 200
    assert server.begun[0].to_json()[0]["images"] == []


def test_a_conversation_that_is_too_long_says_so(serve, lively_model, make_image):
    lively_model.config.text_config.max_position_embeddings = 30
    server = serve()
    (line,) = ask(server, "what? " * 40, ("x.png", encoded(make_image(20, 20))))[1]
    assert "the model's context holds 30" in line["error"] and server.begun[0].messages == []
    assert "error" not in ask(server, "?")[1][0]


def test_other_pages_are_refused(serve):
    server = serve()
    body = {"conversation": "a", "text": "what?", "images": []}
    own = f"127.0.0.1:{server.server_port}"
    assert server.server_address[0] == "127.0.0.1"
    refused = [
        (403, request(server, "POST", "/ask", body, Origin="http://evil.example")),
        (403, request(server, "POST", "/ask", body, Host="evil.example")),
        (403, request(server, "GET", "/", Host="evil.example")),
        (415, request(server, "POST", "/ask", body, Content_Type="text/plain")),
        (413, request(server, "POST", "/ask", None, Content_Length=str(MAX_BODY_BYTES + 1))),
        (400, request(server, "POST", "/ask", {"text": " "})),
        (400, request(server, "POST", "/ask", ["what?"])),
        (400, request(server, "POST", "/ask", {"text": "?", "images": [{"name": "x", "data": "%"}]})),
        (404, request(server, "POST", "/else", {})),
        (404, request(server, "GET", "/../1.png")),
    ]
    assert [(code, answer[0]) for code, answer in refused] == [(code, code) for code, _ in refused]
    assert not server.begun
    assert request(server, "POST", "/ask", body, Origin=f"http://{own}")[0] == 200
    assert request(server, "GET", "/examples/0.png")[0] == 200
    huge = b64encode(bytes(MAX_IMAGE_BYTES + 1)).decode()
    code, text = request(server, "POST", "/ask", body | {"images": [{"name": "big", "data": huge}]})
    assert code == 413 and "big: more than 33 MB" in text


class Slow:
    """Talks until it is stopped."""

    def __init__(self):
        self.said, self.closed = 0, threading.Event()

    def add_images(self, images):
        pass

    def drop_pending(self):
        pass

    def ask(self, text):
        try:
            while self.said < 3000:
                self.said += 1
                time.sleep(0.01)
                yield f"word{self.said} "
        finally:
            self.closed.set()


def test_examples_are_the_samples_of_a_run(tmp_path):
    assert _examples(tmp_path) == []
    (tmp_path / "a.png").write_bytes(b"")
    samples = [{"image": "a.png", "question": "what?"}, {"image": "gone.png", "question": "?"}]
    (tmp_path / "record.json").write_text(json.dumps({"samples": samples}))
    assert _examples(tmp_path) == [Example(tmp_path / "a.png", "what?")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "x"], "--compare: has no effect in the terminal (fix: add --web)"),
        (["--port", "80"], "--port: has no effect in the terminal"),
        (["--web", "--ask", "?"], "--ask: has no effect in the browser"),
        (["--web", "--image", "x.png"], "--image: has no effect in the browser"),
    ],
)
def test_options_without_effect_are_refused(arguments, message, capsys):
    assert main(["chat", "nowhere", *arguments]) == 2
    assert message in capsys.readouterr().err


# --- Chromium


@pytest.fixture
def page(chromium):
    """Opens a server's page; it may ask for nothing from elsewhere."""
    chromium.requests()

    def open_page(server, width=1280):
        chromium.resize(width)
        chromium.open(server.address)
        chromium.address = server.address
        return chromium

    yield open_page
    assert all(url.startswith((chromium.address, "blob:")) for url in chromium.requests())


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.05)
    return found


def send(page, text, *files):
    for file in files:
        page.call("POST", f"/element/{page.find('#file')}/value", {"text": str(file)})
    until(lambda: page.run("return document.querySelectorAll('#images img').length") == len(files))
    page.call("POST", f"/element/{page.find('#text')}/value", {"text": text})
    page.click("#send")


def idle(page):
    return page.run("return document.getElementById('stop').hidden")


TURNS = "return [...document.querySelectorAll('.turn')].map((e) => e.lastChild.textContent.trim())"


def test_a_conversation_in_a_browser(page, serve, lively_model, processor, make_image, tmp_path):
    make_image(40, 60, seed=1).save(tmp_path / "a b.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    expected = Conversation(lively_model, processor, max_new_tokens=12)
    expected.add_image(str(tmp_path / "a b.png"))
    answers = ["".join(expected.ask(text)).strip() for text in ("what <b>is</b> it?", "and why?")]
    shown = page(serve())
    shown.click("#examples button")
    until(lambda: shown.run("return document.getElementById('text').value") == "what is <here>?")
    shown.click("#images button")
    shown.run("document.getElementById('text').value = ''")
    send(shown, "what?", tmp_path / "broken.png")
    message = until(lambda: shown.text("#error"))
    assert message.startswith("broken.png: ") and shown.run(TURNS) == []
    assert shown.run("return document.getElementById('text').value") == "what?"
    shown.click("#images button")
    shown.run("document.getElementById('text').value = ''")
    send(shown, "what <b>is</b> it?", tmp_path / "a b.png")
    until(lambda: len(shown.run(TURNS)) == 2 and idle(shown))
    assert shown.run(TURNS) == ["what <b>is</b> it?", answers[0]] and shown.text("#error") == ""
    assert shown.run("return document.querySelector('.mine img').naturalWidth") == 60
    send(shown, "and why?")
    until(lambda: len(shown.run(TURNS)) == 4 and idle(shown))
    assert shown.run(TURNS)[2:] == ["and why?", answers[1]]
    for width in (1280, 390):
        shown.resize(width)
        assert shown.run("return document.documentElement.scrollWidth") <= width
        for scheme in ("light", "dark"):
            shown.prefer(scheme)
            assert shown.violations() == []
    shown.click("#reset")
    until(lambda: shown.run(TURNS) == [])
    # 400 of the broken image is all the console says
    assert all("400" in line for line in shown.console())


def test_an_answer_is_streamed_and_can_be_stopped(page, serve):
    slow = [Slow(), Slow()]
    made = iter(slow)
    shown = page(serve(("one", "other"), lambda: next(made)), width=390)
    send(shown, "what?")
    until(lambda: len(shown.run(TURNS)) == 3 and "word5" in shown.run(TURNS)[1] and "word5" in shown.run(TURNS)[2])
    assert not idle(shown) and not slow[0].closed.is_set()
    shown.click("#stop")
    assert until(lambda: idle(shown)) and slow[0].closed.wait(20) and slow[1].closed.wait(20)
    assert slow[0].said < 3000 and shown.run(TURNS)[1:] == ["[stopped]"] * 2
    assert shown.role_and_name("#text") == ("textbox", "Question")
