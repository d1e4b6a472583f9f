"""The wrong-answer browser: what the file holds, and what a real Chromium makes of it.

The tests that need Chromium are skipped where it or its driver is missing, unless REQUIRE_BROWSER is set, as in CI.
"""

import base64
import configparser
import http.server
import io
import json
import re
import threading
import time
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.data.sources.images import ImageRef
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation import browser as browser_module
from llava_llama31.trainer.evaluation.browser import Answers, write_browser, write_comparison
from llava_llama31.trainer.evaluation.questions import Question
from llava_llama31.trainer.evaluation.scoring import compare_answers, score_answers
from llava_llama31.trainer.evaluation.settings import EvaluationSettings
from llava_llama31.trainer.evaluation.task_browser import write_task_browser
from llava_llama31.trainer.evaluation.task_files import load_task
from llava_llama31.trainer.evaluation.textvqa import evaluate
from llava_llama31.trainer.evaluation.vqa_accuracy import PROTOCOLS, normalize, vqa_accuracy


HOSTILE = (
    '</script><img src=x onerror="window.owned=1">\'`\\',
    "<!--<script>window.owned=1</script>",
    '"><svg onload="window.owned=1"></svg>&lt;&amp;${1}',
    "line\u2028paragraph\u2029nul\0tab\tend\r\n.",
    "lone \ud800 and \udfff surrogates",
    "\u202eright to left\u2066 שלום",
    "  spaces at both ends  ",
)


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def make_question(number, text="what is it?", answers=("stop",) * 10, image_id="p0", image=None):
    return Question(number, image_id, image, text, tuple(answers))


@pytest.fixture(scope="module")
def image(make_image):
    return ImageRef("p0", data=encoded(make_image(30, 40)))


@pytest.fixture(scope="module")
def evaluation(make_image):
    """(questions, rows) with one question for each thing that can be said of an answer."""
    images = {name: ImageRef(name, data=encoded(make_image(30, 40, seed=i))) for i, name in enumerate("ab")}
    images["cut"] = ImageRef("cut", data=images["a"].data[:400])
    asked = [
        (1, "a", "right?", ["stop"] * 10),
        (2, "a", "the wrong one?", ["stop"] * 10),
        (3, "b", "in part?", ["stop"] * 8 + ["halt"] * 2),
        (4, "b", "period?", ["8"] * 10),
        (5, "cut", "comma here?", ["new yorkny"] * 9 + ["NY"]),
        (6, "a", "failed?", ["Übergröße"] * 10),
        (7, "a", "missing?", ["stop"] * 10),
        (2**60 + 1, "b", "which?", ["no"] * 10),
    ]
    questions = [make_question(id_, text, answers, key, images[key]) for id_, key, text, answers in asked]
    rows = [
        {"question_id": 4, "answer": "8."},
        {"question_id": 1, "answer": "Stop."},
        {"question_id": 2, "answer": "go", "ended": "length"},
        {"question_id": 2, "answer": "stop"},
        {"question_id": 3, "answer": "halt", "ended": "stop"},
        {"question_id": 5, "answer": "New York,NY"},
        {"question_id": 6, "answer": None, "error": "RuntimeError: CUDA out of memory"},
        {"question_id": 2**60 + 1, "answer": "", "shown_image_id": "a"},
        {"question_id": 77, "answer": "stop"},
    ]
    return questions, rows


class Elements(HTMLParser):
    """Tags of a page, and the text of its scripts and styles by id, or by tag where there is none."""

    def __init__(self, text):
        super().__init__(convert_charrefs=False)
        self.tags, self.texts, self._name = [], {}, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._name = dict(attributes).get("id", tag)

    def handle_endtag(self, tag):
        self._name = ""

    def handle_data(self, data):
        self.texts[self._name] = self.texts.get(self._name, "") + data


def read(path):
    elements = Elements(path.read_text(encoding="utf-8"))
    return elements, json.loads(elements.texts["data"])


# --- the file


def test_the_file_holds_what_was_asked_answered_and_scored(evaluation, tmp_path):
    questions, rows = evaluation
    written = write_browser(questions, rows, tmp_path / "deep" / "b.html", title="mine")
    _, data = read(written.path)
    entries = {entry["id"]: entry for entry in data["questions"]}
    assert list(entries) == [str(question.question_id) for question in questions]
    assert (data["title"], data["protocols"], data["unknown"]) == ("mine", list(PROTOCOLS), ["77"])
    for question in questions:
        entry = entries[str(question.question_id)]
        assert entry["question"] == question.question
        assert data["images"][entry["image"]]["id"] == question.image_id
        assert sorted(a["text"] for a in entry["answers"] for _ in range(a["count"])) == sorted(question.answers)
        counts = [answer["count"] for answer in entry["answers"]]
        assert counts == sorted(counts, reverse=True)
        if "scores" in entry:
            assert entry["scores"] == [vqa_accuracy(entry["prediction"], question.answers, name) for name in PROTOCOLS]
    assert entries["2"]["prediction"] == "go" and entries["2"]["times"] == 2 and entries["2"]["cut"]
    assert "cut" not in entries["3"] and entries["3"]["answers"][1]["matches"] == [True] * 3
    assert entries["6"]["error"] == "RuntimeError: CUDA out of memory"
    assert entries["7"]["error"] == "no row answers this question"
    assert entries[str(2**60 + 1)]["shown"] == {"id": "a", "image": 0}
    assert {id_ for id_, entry in entries.items() if "compared" in entry} == {"4", "5"}
    assert [forms["prediction"] for forms in entries["4"]["compared"]] == ["8", "8.", "8"]
    assert entries["5"]["compared"][2] == {
        "prediction": "new yorkny",
        "answers": [{"text": "new yorkny", "count": 9}, {"text": "ny", "count": 1}],
    }
    assert (written.num_questions, written.num_unanswered, written.num_images) == (8, 2, 2)
    assert written.unknown == ("77",) and list(written.unreadable) == ["cut"]


def test_means_are_those_of_the_score(evaluation, tmp_path):
    questions, rows = evaluation
    _, data = read(write_browser(questions, rows, tmp_path / "b.html").path)
    report = score_answers(questions, rows)
    scores = [entry["scores"] for entry in data["questions"] if "scores" in entry]
    for i, name in enumerate(data["protocols"]):
        assert sum(score[i] for score in scores) / len(scores) == pytest.approx(report.protocols[name].accuracy)


def test_an_evaluation_without_one_answer_can_be_browsed(evaluation, tmp_path):
    questions, _ = evaluation
    assert write_browser(questions, [], tmp_path / "b.html").num_unanswered == 8


def test_an_answer_in_normal_form_is_compared_as_it_stands(tmp_path):
    # m4c makes `thats` of `that's`, and something else of that again
    questions = [make_question(1, answers=["thats"] * 10)]
    rows = [{"question_id": 1, "answer": normalize("thats", "m4c"), "normalized": "m4c"}]
    _, data = read(write_browser(questions, rows, tmp_path / "b.html", note="read this").path)
    report = score_answers(questions, rows)
    scores = data["questions"][0]["scores"]
    assert scores == [report.protocols[name].accuracy for name in PROTOCOLS] and scores[2] == 1
    assert all(data["questions"][0]["answers"][0]["matches"]) and data["note"] == "read this"
    _, plain = read(write_browser(questions, [{"question_id": 1, "answer": "that's"}], tmp_path / "b.html").path)
    assert plain["questions"][0]["scores"][2] == 0


def test_rows_of_an_evaluation_say_what_was_cut_and_shown(tiny_model, processor, image, tmp_path):
    other = replace(image, name="p1")
    questions = [make_question(0, image=image), make_question(1, image_id="p1", image=other)]
    evaluate(
        tiny_model, processor, questions, tmp_path, EvaluationSettings(revision="r", max_new_tokens=1, blind_seed=0)
    )
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    _, data = read(write_browser(questions, rows, tmp_path / "b.html").path)
    stop_ids = tiny_model.generation_config.eos_token_id
    assert not any(row["token_ids"][-1] in stop_ids for row in rows)
    assert [(entry["cut"], entry["shown"]["id"]) for entry in data["questions"]] == [(True, "p1"), (True, "p0")]


def hostile_evaluation(image):
    questions = [
        make_question(text, text, (text, "a") * 5, text, replace(image, name=text) if i else None)
        for i, text in enumerate(HOSTILE)
    ]
    rows = [{"question_id": text, "answer": text, "shown_image_id": HOSTILE[i - 1]} for i, text in enumerate(HOSTILE)]
    rows[1] |= {"answer": None, "error": HOSTILE[0]}
    return questions, [*rows, {"question_id": HOSTILE[0] + "?", "answer": "x"}]


def test_hostile_text_stays_text_in_the_file(image, tmp_path):
    questions, rows = hostile_evaluation(image)
    path = write_browser(questions, rows, tmp_path / "b.html", title=HOSTILE[0] + HOSTILE[4]).path
    elements, data = read(path)
    expected, _ = read(write_browser([make_question(1, image=image)], [], tmp_path / "plain.html").path)
    plain_tags = [tag for tag, attributes in expected.tags if not attributes.get("id", "").startswith("image-")]
    assert [tag for tag, a in elements.tags if not a.get("id", "").startswith("image-")] == plain_tags
    assert [entry["question"] for entry in data["questions"]] == list(HOSTILE)
    assert [entry["id"] for entry in data["questions"]] == list(HOSTILE)
    assert data["title"] == HOSTILE[0] + HOSTILE[4] and data["unknown"] == [HOSTILE[0] + "?"]
    island = elements.texts["data"]
    assert island.isascii() and "<" not in island


def test_only_the_own_style_and_script_are_allowed(evaluation, tmp_path):
    elements, _ = read(write_browser(*evaluation, tmp_path / "b.html").path)
    policy = next(a["content"] for tag, a in elements.tags if tag == "meta" and "http-equiv" in a)
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'" and directives["img-src"] == "data:"
    for name in ("style", "script"):
        digest = base64.b64encode(sha256(elements.texts[name].encode()).digest()).decode()
        assert directives[f"{name}-src"] == f"'sha256-{digest}'"
    assert not [a for _, a in elements.tags if any(name.startswith("on") or name in ("src", "style") for name in a)]
    assert "innerHTML" not in elements.texts["script"] and "http" not in elements.texts["script"]


def stored_images(path):
    elements, data = read(path)
    found = {}
    for index, image in enumerate(data["images"]):
        text = elements.texts.get(f"image-{index}")
        found[image["id"]] = Image.open(io.BytesIO(base64.b64decode(text))) if text else image["error"]
        if text:
            assert found[image["id"]].size == (image["width"], image["height"])
    return found


def test_each_image_is_stored_once_and_small(make_image, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    sources = {
        "wide": encoded(make_image(200, 900)),
        "small": encoded(make_image(20, 30)),
        "thin": encoded(make_image(700, 1)),
        "turned": encoded(make_image(100, 300), "JPEG", exif=exif, comment=b"private"),
        "clear": encoded(make_image(20, 30).convert("RGBA")),
    }
    images = {name: ImageRef(name, data=data) for name, data in sources.items()}
    questions = [
        make_question(10 * i + j, "?", "a", n, p) for i in range(4) for j, (n, p) in enumerate(images.items())
    ]
    calls = []
    path = tmp_path / "b.html"
    write_browser(questions, [], path, image_side=128, on_progress=lambda done, total: calls.append((done, total)))
    stored = stored_images(path)
    sizes = {name: image.size for name, image in stored.items()}
    assert sizes == {"wide": (128, 28), "small": (30, 20), "thin": (1, 128), "turned": (43, 128), "clear": (30, 20)}
    assert {image.format for image in stored.values()} == {"JPEG"} and "comment" not in stored["turned"].info
    assert calls == [(done, 5) for done in range(1, 6)]
    assert path.read_text().count('id="image-') == 5


def test_unreadable_images_are_named(image, tmp_path):
    questions = [
        make_question(1, image_id="cut", image=replace(image, data=image.data[:400])),
        make_question(2, image_id="gone", image=ImageRef("gone", path=str(tmp_path / "no.png"), root=str(tmp_path))),
        make_question(3, image_id="none"),
        make_question(4, image_id="late"),
        make_question(5, image_id="late", image=image),
    ]
    written = write_browser(questions, [], tmp_path / "b.html")
    stored = stored_images(written.path)
    assert {key: reason.split(":")[0] for key, reason in written.unreadable.items()} == {
        "cut": "corrupt_image",
        "gone": "missing_image",
        "none": "missing_image",
    }
    assert {key: stored[key] for key in written.unreadable} == written.unreadable
    assert stored["late"].size == (40, 30) and written.num_images == 1


def test_a_broken_off_write_leaves_the_old_file(evaluation, tmp_path):
    path = tmp_path / "b.html"
    path.write_text("old")

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_browser(*evaluation, path, on_progress=stop)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_said(evaluation, tmp_path):
    questions, rows = evaluation
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UserError, match="cannot be written.*fix: "):
        write_browser(questions, rows, tmp_path / "file" / "b.html")
    for folder in (str(tmp_path / "folder.html"), ".", "..", "/"):
        with pytest.raises(UserError, match=f"{re.escape(folder)}: is a folder .fix: name an .html file"):
            write_browser(questions, rows, folder)
    with pytest.raises(UserError, match="no questions"):
        write_browser([], rows, tmp_path / "b.html")
    with pytest.raises(UserError, match="0 pixels"):
        write_browser(questions, rows, tmp_path / "b.html", image_side=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.html"]


def test_the_page_is_shipped():
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[1] / "setup.cfg")
    patterns = config["options.package_data"]["llava_llama31.trainer.evaluation"].split(", ")
    folder = Path(browser_module.__file__).parent
    assert {path.name for pattern in patterns for path in folder.glob(pattern)} >= {
        "browser.html",
        "browser.css",
        "browser.js",
    }


def contrast(one, other):
    """WCAG 2's contrast ratio of two colours `#rrggbb`."""

    def luminance(colour):
        levels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_text_stands_out_in_light_and_dark():
    style = Path(browser_module.__file__).with_name("browser.css").read_text()
    schemes = [dict(re.findall(r"--(\w+): (#\w{6});", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)]
    pairs = [(ink, paper) for ink in ("ink", "quiet") for paper in ("page", "card", "tint")]
    pairs += [(ink, "card") for ink in ("full", "part", "none", "accent")] + [("full", "match"), ("accent", "page")]
    assert len(schemes) == 2
    for scheme in schemes:
        for ink, paper in pairs:
            assert contrast(scheme[ink], scheme[paper]) >= 4.5, (ink, paper)


def write_files(folder, questions, rows):
    """(predictions, data) on disk; images that cannot be read are not there at all."""
    lines = []
    for question in questions:
        if question.image_id != "cut":
            (folder / f"{question.image_id}.png").write_bytes(question.image.data)
        fields = ("question_id", "image_id", "question", "answers")
        lines.append(json.dumps({field: getattr(question, field) for field in fields}))
    (folder / "questions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(folder / "predictions.jsonl"), str(folder / "questions.jsonl")


def test_browse_command(evaluation, tmp_path, capsys):
    predictions, data = write_files(tmp_path, *evaluation)
    assert main(["browse", predictions, "--data", data]) == 0
    out = capsys.readouterr().out
    assert "8 questions, 2 images" in out and "without an answer: 2" in out
    assert "images not shown: 1: cut (missing_image" in out and "not in the data: 1: 77" in out
    assert read(tmp_path / "predictions.html")[1]["title"] == "predictions.jsonl on questions.jsonl"
    submission = tmp_path / "textvqa_submission.json"
    submission.write_text(json.dumps([{"question_id": i, "answer": "stop"} for i in (1, 2)]))
    assert main(["browse", str(submission), "--data", data]) == 0
    assert "note: these answers are in m4c's normal form" in capsys.readouterr().out
    assert read(submission.with_suffix(".html"))[1]["note"].startswith("these answers")
    output = tmp_path / "three.html"
    assert main(["browse", predictions, "--data", data, "--limit", "3", "--output", str(output)]) == 0
    limited = read(output)[1]
    assert [entry["id"] for entry in limited["questions"]] == ["1", "2", "3"] and limited["unknown"] == ["77"]
    assert main(["browse", predictions, "--data", str(tmp_path / "no.jsonl")]) == 2
    assert "no.jsonl: cannot be read" in capsys.readouterr().err


# --- Chromium


@pytest.fixture
def page(window, evaluation, tmp_path):
    window.open(write_browser(*evaluation, tmp_path / "b.html", title="mine").path)
    return window


BIG = str(2**60 + 1)


def test_filters_show_the_right_questions(page):
    assert page.run("return location.protocol") == "file:" and page.text("h1") == "mine"
    assert page.ids() == ["1", "2", "3", "4", "5", "6", "7", BIG]
    expected = {
        "vlmevalkit-2024": {"right": ["1", "4"], "wrong": ["2", "3", "5", BIG], "zero": ["2", "5", BIG]},
        "vlmevalkit-2025": {"wrong": ["2", "3", "4", "5", BIG], "zero": ["2", "4", "5", BIG]},
        "m4c": {"wrong": ["2", "3", BIG], "zero": ["2", BIG]},
    }
    for i, shown in enumerate(expected.values()):
        page.choose("protocol", i)
        for name, ids in (shown | {"disagree": ["4", "5"], "unanswered": ["6", "7"]}).items():
            page.show(name)
            assert page.ids() == ids
            assert page.text(f"#filters label:has([value={name}]) .count") == str(len(ids))
        page.show("all")
        assert len(page.ids()) == 8


def test_the_mean_follows_protocol_and_filter(page, evaluation):
    report = score_answers(*evaluation)
    for i, name in enumerate(PROTOCOLS):
        page.choose("protocol", i)
        answered = 100 * report.protocols[name].accuracy
        as_zero = 100 * report.protocols_failed_as_zero[name].accuracy
        assert page.text("#status") == (
            f"8 questions, accuracy {answered:.3f} % ({as_zero:.3f} % with 2 unanswered as 0)"
        )
    assert len({score.accuracy for score in report.protocols.values()}) == 3
    page.show("disagree")
    assert page.text("#status") == "2 questions, accuracy 100.000 %"
    page.show("unanswered")
    assert page.text("#status") == "2 questions, no answer to score"


def test_search_looks_in_question_prediction_answers_and_ids(page):
    found = {"THE WRONG": ["2"], "yorkny": ["5"], "New York,": ["5"], "übergröße": ["6"], BIG: [BIG], "cut": ["5"]}
    for text, ids in found.items():
        page.search(text)
        assert page.ids() == ids
    page.search("stop")
    assert page.ids() == ["1", "2", "3", "7"]
    page.show("wrong")
    assert page.ids() == ["2", "3"]
    page.search("nowhere")
    assert page.ids() == [] and page.text("#status") == "No question matches."


def test_sorting(page):
    orders = {
        "lowest": ["2", "5", BIG, "3", "1", "4", "6", "7"],
        "highest": ["1", "4", "3", "2", "5", BIG, "6", "7"],
        "shortest": ["1", BIG, "4", "6", "3", "7", "5", "2"],
        "longest": ["2", "5", "3", "7", "4", "6", "1", BIG],
        "image": ["1", "2", "6", "7", "3", "4", BIG, "5"],
        "file": ["1", "2", "3", "4", "5", "6", "7", BIG],
    }
    for name, ids in orders.items():
        page.choose("sort", name)
        assert page.ids() == ids, name


def test_a_card_shows_all_there_is_to_an_answer(page):
    cards = page.run("return [...document.querySelectorAll('article')].map((card) => card.textContent)")
    texts = dict(zip(page.ids(), cards, strict=True))
    assert "cut at the token limit" in texts["2"] and "first of 2 answers" in texts["2"]
    assert "stop × 8" in texts["3"] and "halt × 2 (as predicted)" in texts["3"] and "0.6" in texts["3"]
    assert "Answers as compared" in texts["4"] and "Answers as compared" not in texts["3"]
    assert "Image not shown: corrupt_image" in texts["5"]
    assert "No answer: RuntimeError: CUDA out of memory" in texts["6"]
    assert "No answer: no row answers this question" in texts["7"]
    assert "shown image a instead" in texts[BIG] and "empty" in texts[BIG]
    alts = page.run("return [...document.images].map((image) => image.alt)")
    assert alts == ["Image a", "Image b", "Image a", "Image b", "Image a, shown instead"]
    assert "the image above: a" in texts["2"]
    script = (
        "return Promise.all([...document.images].map((i) => i.decode())).then(() => document.images[0].naturalWidth)"
    )
    assert page.run(script) == 40
    page.click("article .image")
    assert page.run("return document.querySelector('#zoom img').clientWidth") > 400
    assert page.role_and_name("#zoom") == ("dialog", "Image and answer") and page.violations() == []
    assert "right?" in page.text("#zoom") and "Stop." in page.text("#zoom")
    page.press("Escape")
    assert not page.run("return document.getElementById('zoom').open")
    page.click("article .image")
    page.click("#close")
    assert not page.run("return document.getElementById('zoom').open")


def test_the_keyboard_is_enough(page):
    page.press("ArrowDown")
    assert page.focused() == "1"
    page.press("ArrowDown", "ArrowDown", "ArrowUp")
    assert page.focused() == "2"
    page.press("/")
    assert page.focused() == "search"
    page.press(*"stop/", "ArrowLeft")
    assert page.run("return document.activeElement.value") == "stop/" and page.ids() == []
    page.press("Escape")
    assert len(page.ids()) == 8
    page.press(*"halt", "ArrowDown")
    assert page.focused() == "3"
    page.run("document.querySelector('#filters [value=all]').focus()")
    page.press("ArrowRight", "ArrowRight")
    assert page.run("return document.querySelector('#filters :checked').value") == "wrong"
    page.press("ArrowDown")
    assert page.focused() == "3" and page.run("return document.querySelector('#filters :checked').value") == "wrong"
    page.run("document.querySelector('#filters [value=wrong]').focus()")
    page.press("Tab", "Tab", "ArrowDown", "Enter")
    assert page.run("return document.getElementById('zoom').open"), "Tab reaches the cards' buttons"


def test_arrows_go_over_the_ends_of_pages(window, image, tmp_path):
    questions = [make_question(i, image=image) for i in range(120)]
    window.open(write_browser(questions, [], tmp_path / "b.html").path)
    assert window.ids() == [str(i) for i in range(50)] and window.text("#range") == "1 to 50 of 120"
    window.run("document.querySelector('#questions li:last-child article').focus()")
    window.press("ArrowDown")
    assert window.focused() == "50" and window.ids()[-1] == "99"
    window.press("ArrowUp")
    assert window.focused() == "49"
    window.press("ArrowRight", "ArrowRight", "ArrowRight")
    assert window.focused() == "100" and window.ids() == [str(i) for i in range(100, 120)]
    window.click("#previous")
    assert window.ids()[0] == "50"
    window.show("unanswered")
    assert window.ids()[0] == "0", "another filter starts on its first page"


def test_the_address_names_what_is_shown(page, tmp_path):
    page.show("wrong")
    page.choose("sort", "lowest")
    page.choose("protocol", 2)
    page.search("stop")
    page.press("ArrowDown", "ArrowDown")
    address = page.run("return location.href")
    assert address.endswith("#filter=wrong&protocol=m4c&sort=lowest&search=stop&question=3")
    page.open("about:blank")
    page.console(), page.requests()
    page.open(address)
    assert page.ids() == ["2", "3"] and page.focused() == "3"
    assert page.run("return document.getElementById('search').value") == "stop"
    page.run("location.hash = '#filter=right&page=7&sort=never&protocol='")
    assert page.ids() == ["1", "4"]
    page.show("all")
    page.search("")
    page.press("Escape")
    assert page.run("return location.hash") == ""


def test_what_is_shown_can_be_saved(page, evaluation):
    catch = "window.saved = []; URL.createObjectURL = (f) => { saved.push(f); return '#'; }"
    page.run(catch)
    page.show("wrong")
    page.click("#export")
    script = "saved[0].text().then(arguments[0])"
    lines = page.call("POST", "/execute/async", {"script": script, "args": []}).splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["question_id"] for row in rows] == ["2", "3", "5", BIG]
    assert rows[1]["answers"] == ["stop"] * 8 + ["halt"] * 2 and rows[1]["scores"]["m4c"] == 0.6
    page.search("nowhere")
    assert page.run("return document.getElementById('export').disabled")


def other_answers():
    """To the evaluation's questions: 1 and 7 worse and better, 3 better in part, 5 the same, 6 failed in both."""
    said = {1: "go", 2: "go", 3: "stop", 4: "8", 5: "New York,NY", 7: "stop", 2**60 + 1: "no"}
    rows = [{"question_id": key, "answer": answer} for key, answer in said.items()]
    return [*rows, {"question_id": 6, "answer": None, "error": "no"}, {"question_id": 78, "answer": "x"}]


@pytest.fixture
def compared(window, evaluation, tmp_path):
    questions, rows = evaluation
    files = (Answers(rows, "old/predictions.jsonl", "a note"), Answers(other_answers(), "new/predictions.jsonl"))
    window.open(write_comparison(questions, *files, tmp_path / "b.html").path)
    return window


def test_two_files_are_shown_side_by_side(compared, evaluation):
    questions, rows = evaluation
    assert (
        compared.text("#names") == "Aold/predictions.jsonlBnew/predictions.jsonl"
        and compared.text("#note") == "a note"
    )
    assert "left out: 77, 78" in compared.text("#summary")
    shown = {
        "only-a": ["1"],
        "only-b": ["3", "7", BIG],
        "both": ["4"],
        "neither": ["2", "5", "6"],
        "differ": ["1", "3", "4", "7", BIG],
        "unanswered": ["6", "7"],
    }
    for name, ids in shown.items():
        compared.show(name)
        assert (compared.ids(), compared.text(f"#filters label:has([value={name}]) .count")) == (ids, str(len(ids)))
    compared.show("all")
    pair = compare_answers(questions, rows, other_answers()).protocols["vlmevalkit-2024"]
    means = [f"{100 * value:.3f}" for value in (pair.first, pair.second, pair.difference)]
    expected = "8 questions, accuracy A {} %, B {} % of 6 that both answer, B − A +{}".format(*means)
    assert compared.text("#status") == expected
    compared.choose("sort", "lost")
    assert compared.ids()[0] == "1" and set(compared.ids()[-2:]) == {"6", "7"}
    first = "document.querySelector('article')"
    assert compared.text("article .facts") == "AStop.BgoAnswersstop × 10 (A)"
    cells = compared.run(f"return [...{first}.querySelectorAll('tbody tr > *')].map((cell) => cell.textContent)")
    assert cells == ["every protocol", "1", "0"]
    assert compared.run("return location.hash") == "#sort=lost"
    compared.run("window.saved = []; URL.createObjectURL = (f) => { saved.push(f); return '#'; }")
    compared.show("only-a")
    compared.click("#export")
    line = compared.call("POST", "/execute/async", {"script": "saved[0].text().then(arguments[0])", "args": []})
    assert [json.loads(line)[side]["answer"] for side in "AB"] == ["Stop.", "go"]
    compared.show("all")
    compared.resize(390)
    compared.prefer("dark")
    assert compared.run("return document.documentElement.scrollWidth") <= 390 and compared.violations() == []


def test_browse_compares_two_files(evaluation, tmp_path, capsys):
    questions, rows = evaluation
    predictions, data = write_files(tmp_path, questions, rows)
    other = tmp_path / "other" / "predictions.jsonl"
    other.parent.mkdir()
    other.write_text("\n".join(map(json.dumps, other_answers())))
    assert main(["browse", predictions, str(other), "--data", data, "--limit", "1"]) == 0
    assert "1 question, 1 image" in capsys.readouterr().out
    page = read(tmp_path / "predictions.compared.html")[1]
    assert page["names"] == [f"{tmp_path.name}/predictions.jsonl", "other/predictions.jsonl"]
    assert page["title"] == "Two files of answers on questions.jsonl" and page["unknown"] == ["77", "78"]
    [entry] = page["questions"]
    assert (entry["prediction"], entry["second"]) == (
        "Stop.",
        {"prediction": "go", "scores": [0, 0, 0], "matches": {}},
    )


@pytest.mark.parametrize("width", [390, 1280])
def test_nobody_is_left_out(page, width):
    page.resize(width)
    assert page.run("return document.documentElement.scrollWidth") <= width
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        assert page.violations() == []


def test_every_control_has_a_name(page):
    named = {
        "#search": ("searchbox", "Search"),
        "#protocol": ("combobox", "Protocol"),
        "#sort": ("combobox", "Sort"),
        "#filters": ("group", "Questions to show"),
        "#filters [value=disagree]": ("radio", "Protocols disagree 2"),
        "#status": ("status", ""),
        "#tools": ("search", ""),
        "article": ("article", "right?"),
        "article img": ("image", "Image a"),
        "article .image": ("button", "Image a"),
        "#questions": ("list", "Questions"),
    }
    assert {selector: page.role_and_name(selector) for selector in named} == named


def code_units(text):
    return list(memoryview(text.encode("utf-16-le", "surrogatepass")).cast("H"))


def test_hostile_text_is_shown_and_never_run(window, image, tmp_path):
    questions, rows = hostile_evaluation(image)
    window.open(write_browser(questions, rows, tmp_path / "b.html", title=HOSTILE[0], note=HOSTILE[1]).path)
    units = (
        "return [...document.querySelectorAll(arguments[0])].map("
        "(element) => Array.from({ length: element.textContent.length }, (_, i) => element.textContent.charCodeAt(i)))"
    )
    texts = [code_units(text) for text in HOSTILE]
    assert window.run(units, "h2") == texts and window.run(units, "#questions .id bdi") == texts
    assert window.run(units, "li.match bdi") == [texts[0], *texts[2:]]
    assert window.run(units, ".prediction > bdi:first-child") == [texts[0], *texts[2:]]
    assert window.run(units, ".error bdi") == [texts[0]]
    assert (
        window.text("#note") == HOSTILE[1]
        and window.text("h1") == HOSTILE[0]
        and HOSTILE[0] in window.text("#summary")
    )
    assert window.run("return [window.owned, document.querySelectorAll('svg, iframe, [src=x], bdi *').length]") == [
        None,
        0,
    ]
    # a right-to-left override ends with the text that holds it
    assert window.run("return getComputedStyle(document.querySelector('h2 bdi')).unicodeBidi") == "isolate"


@pytest.fixture
def listener():
    """(address, paths that were asked for) of a server on this machine."""
    paths = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    thread.join()
    server.server_close()


LEAK = """
const [address, done] = arguments;
document.body.append(Object.assign(document.createElement("img"), { src: address + "/image" }));
document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href: address + "/style" }));
navigator.sendBeacon(address + "/beacon", "x");
let injected = "let through";
try { document.body.innerHTML = "<img src=" + address + "/markup>"; } catch (error) { injected = error.name; }
fetch(address + "/fetch", { mode: "no-cors" }).then(() => "let through", (error) => error.name)
  .then((fetched) => setTimeout(() => done([fetched, injected]), 300));
"""


def test_the_policy_lets_nothing_out(chromium, evaluation, listener, tmp_path):
    """Even a script that runs in the page reaches no server; without the policy the same script does."""
    address, paths = listener
    path = write_browser(*evaluation, tmp_path / "b.html").path
    chromium.open(path)
    leak = {"script": LEAK, "args": [address]}
    assert chromium.call("POST", "/execute/async", leak) == ["TypeError", "TypeError"]
    assert paths == []
    open_page = tmp_path / "open.html"
    open_page.write_text(re.sub(r"<meta http-equiv=.*", "", path.read_text()))
    chromium.open(open_page)
    assert chromium.call("POST", "/execute/async", leak) == ["let through", "let through"]
    assert {"/image", "/style", "/fetch", "/markup"} <= set(paths)


@pytest.mark.slow
def test_five_thousand_questions_load(window, make_image, tmp_path):
    images = [ImageRef(f"p{i}", data=encoded(make_image(60, 80, seed=i))) for i in range(300)]
    questions = [
        make_question(i, f"what is number {i}?", ("stop", "halt") * 5, f"p{i % 300}", images[i % 300])
        for i in range(5000)
    ]
    rows = [{"question_id": i, "answer": ("stop", "go", "a stop,sign")[i % 3]} for i in range(5000)]
    path = write_browser(questions, rows, tmp_path / "b.html").path
    started = time.perf_counter()
    window.open(path)
    loaded = time.perf_counter()
    window.search("number 49")
    searched = time.perf_counter()
    assert len(window.ids()) == 50 and window.text("#status").startswith("111 questions")
    assert window.run("return document.querySelectorAll('article').length") == 50
    print(f"5,000 questions: loaded in {loaded - started:.2f} s, searched in {searched - loaded:.2f} s")  # noqa: T201


def test_a_tasks_page_shows_options_and_what_was_read(window, image, tmp_path):
    task = load_task("mmstar")
    common = {"image": image, "answers": ("B",), "options": (("A", "red"), ("B", "blue")), "groups": ("colours",)}
    questions = [Question(i, "p", question=f"what is {i}?", **common) for i in range(4)]
    rows = [{"question_id": i, "answer": text} for i, text in enumerate(["B.", "it is blue", "A"])]
    written = write_task_browser(task, questions, rows, tmp_path / "b.html")
    assert written.num_unanswered == 1
    window.open(written.path)
    assert window.text("h1") == "MMStar" and "mean score 66.667 %" in window.text("#status")
    assert (
        window.text("article .facts") == "PredictionB.AnswersB. blue (as predicted)OptionsA. redB. blueGroupscolours"
    )
    assert window.text("article .scores") == "every protocol1 (read as B)"
    window.show("disagree")
    assert window.ids() == ["1"] and window.text("article .scores") == (
        "vlmevalkit1 (read as B)letter0vlmevalkit-20251 (read as B)vlmevalkit-20261 (read as B)"
        "mmstar0lmms-eval0lmms-eval-20260evalscope0"
    )
    window.show("unanswered")
    assert window.ids() == ["3"]
    window.show("all")
    window.search("colours")
    assert len(window.ids()) == 4
