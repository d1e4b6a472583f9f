"""The report of runs: what the page says, that it needs nothing else, and what a real Chromium makes of it."""

import fcntl
import json
import re
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import TORTURE
from PIL import Image

from llava_llama31.model_card import curves
from llava_llama31.model_card.curves import Chart, Line, described, svg, thinned
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.schema import Recipe
from llava_llama31.trainer.report.panels import panels
from llava_llama31.trainer.report.run_facts import run_facts
from llava_llama31.trainer.report.watch import ReportServer


HOSTILE = '</title><script>window.owned=1</script>$x^2$ & "quoted" \''
GROUPS = [
    {"group": "vision_tower", "num_parameters": 900, "num_trainable": 0, "learning_rate": None},
    {"group": "multi_modal_projector", "num_parameters": 70, "num_trainable": 70, "learning_rate": 0.01},
]
DATA = [
    {
        "name": "rows",
        "rows": 44,
        "usable": 41,
        "selected": 40,
        "weight": 1.0,
        "dropped": {"missing_image": 2, "too_long": 1},
        "not_read": {"source": 44},
    }
]


def logged(stage, step, **figures):
    return {"time": "2026-11-28T13:00:00.000+00:00", "stage": stage, "step": step, **figures}


def training(stage, step):
    return logged(
        stage,
        step,
        loss=5 / step,
        grad_norm=1.0,
        seconds=2.5 * step,
        tokens_per_second=900.0,
        mfu=0.3,
        memory_gib=1.5,
        learning_rates={"multi_modal_projector": 0.01 / step},
    )


def start(stage, step, steps):
    facts = {"groups": GROUPS, "data": DATA, "command": "llava-llama31 train r.yaml", "environment": {"torch": "2.13"}}
    return logged(stage, step, event="start", steps=steps, **facts)


@pytest.fixture
def make_run(recipe_content, tmp_path):
    def make(folder, log, **changes) -> Path:
        path = tmp_path / folder
        path.mkdir()
        recipe = Recipe.model_validate({**recipe_content, **changes}).model_dump(mode="json")
        (path / "recipe.json").write_text(json.dumps(recipe))
        (path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
        return path

    return make


@pytest.fixture
def run(make_run, data_folder):
    """Killed after step 6, and again after step 8 of which only step 4 and 7 are saved; in its second stage now."""
    log = [
        start("projector", 0, 8),
        *(training("projector", step) for step in range(1, 7)),
        start("projector", 4, 8),
        logged("projector", 5, event="finding", what="loss is nan", action="skip", records={"0": ["r1", "r<2>"]}),
        *(training("projector", step) for step in range(5, 9)),
        logged("projector", 8, eval_loss=1.25, eval_accuracy=0.5),
        start("projector", 7, 8),
        training("projector", 8),
        logged(
            "projector",
            8,
            eval_loss=1.5,
            eval_token_loss=1.5,
            eval_accuracy=0.25,
            eval_loss_by_source={"rows": {"loss": 1.5}},
        ),
        start("instruct", 0, 20),
        training("instruct", 1),
        training("instruct", 2) | {"loss": "nan"},
        training("instruct", 3) | {"eval_pope_f1": 81.5, "eval_pope_unanswered": 0},
    ]
    folder = make_run("run", log, name=HOSTILE)
    asked = folder / "stages/2-instruct/evaluation"
    asked.mkdir(parents=True)
    for step in (1, 2, 3, 9):  # the last one is of a start that was undone
        rows = [{"question_id": i, "question": "what?", "answer": f"{HOSTILE}{step}"} for i in (1, 2)]
        (asked / f"step-{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Page(HTMLParser):
    """Tags, and the cells of each table by its label."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.tables, self._rows, self._cell = [], {}, [], None
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "div" and "aria-label" in dict(attributes):
            self._rows = self.tables.setdefault(dict(attributes)["aria-label"], [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data):
        if self._cell:
            self._rows[-1][-1] += data


def page_of(capsys, *arguments) -> Page:
    assert main(["report", *map(str, arguments)]) == 0
    return Page(Path(capsys.readouterr().out.strip()))


def test_a_run_that_was_killed_twice_has_every_step_once(run):
    facts = run_facts(run)
    assert [entry["step"] for entry in facts.stages[0].logged if "loss" in entry] == list(range(1, 9))
    assert [entry["eval_loss"] for entry in facts.stages[0].logged if "eval_loss" in entry] == [1.5]
    assert facts.state == "stopped" and facts.num_starts == 4
    charts = {panel.title: panel.charts for panel in panels([facts])}
    assert [line.label for line in charts["Validation loss by source"]["steps"].lines] == ["rows"]
    assert {"Loss", "Validation accuracy", "Learning rate", "Memory, GiB"} <= set(charts)
    assert [(line.label, line.dots) for line in charts["Scores of tasks"]["time"].lines] == [("pope_f1", True)]
    first, second = charts["Loss"]["steps"].lines
    drawn = [x for x, y in first.points if np.isfinite(y)]
    assert drawn == [*range(1, 9), 9, 11]  # of the second stage the step with a loss of nan is a gap
    assert charts["Loss"]["steps"].bounds == {0: "projector", 8: "instruct"} and charts["Loss"]["steps"].marks == [5]
    assert [x for x, y in charts["Loss"]["time"].lines[0].points if np.isfinite(y)] == [
        *(2.5 * step for step in range(1, 9)),
        22.5,
        27.5,
    ]
    assert tuple(second.points[0]) == (8, 1.5) and second.dots


@pytest.mark.slow
def test_the_page_says_what_is_known_needs_nothing_else_and_runs_nothing(run, capsys):
    page = page_of(capsys, run)
    assert_nothing_else_is_needed(page)
    assert "stage instruct, step 3 of 20" in page.text and "resumed 2 times" in page.text
    stage = f"{HOSTILE}: module groups of stage instruct"
    assert page.tables[stage][1:] == [
        ["vision_tower", "900", "0", "frozen"],
        ["multi_modal_projector", "70", "70", "0.01"],
    ]
    assert page.tables[f"{HOSTILE}: data of stage instruct"][1][-2:] == ["missing_image: 2, too_long: 1", "source: 44"]
    assert page.tables[f"{HOSTILE}: findings"][1] == ["projector", "5", "loss is nan", "skip", "r1, r<2>"]
    assert ["torch", "2.13"] in page.tables[f"{HOSTILE}: command, commit, environment"]
    answers = page.tables[f"{HOSTILE}: answers of stage instruct"]
    assert answers[0] == ["question", "image", "annotated", "step 1", "step 2", "step 3"]
    assert answers[1] == ["what?", "", "red x 10", *(f"{HOSTILE}{step}" for step in (1, 2, 3))]
    assert page.tables[f"{HOSTILE}: recipe"][0] == ["name", HOSTILE]


def assert_nothing_else_is_needed(page):
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object")]
    addresses = [value for _, a in page.tags for name, value in a.items() if name in ("src", "href", "xlink:href")]
    assert addresses and all(address.startswith(("data:image/jpeg;base64,", "#")) for address in addresses)
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]*)\)|href=\"#([^\"]*)\"", page.text))
    assert {one or other for one, other in used} <= set(ids)


@pytest.mark.slow
def test_a_finished_run_has_its_score_and_a_link_to_the_wrong_answers(make_run, capsys, tmp_path):
    run = make_run("run", [start("projector", 0, 2), training("projector", 1), training("projector", 2)])
    score = {"accuracy": 0.5, "low": 0.25, "high": 0.75}
    evaluation = {"dataset": "signs", "num_questions": 9, "decoding": "greedy", "protocols": {"m4c": score}}
    sample = {"question": "what?", "prediction": "red", "answers": ["red", "blue", "red"], "image": "samples/1.png"}
    pope = {"headline": "f1", "metrics": {"f1": 81.25}, "low": 80.0, "high": 82.5}
    task = {"title": "POPE", "name": "pope", "num_questions": 9, "decoding": "greedy", "protocols": {"llava": pope}}
    task |= {"failed": 2, "missing": 0, "cut": 3}
    (run / "predictions-pope.html").write_text("")
    record = {
        "tasks": [task | {"predictions": {"file": "predictions-pope.jsonl"}}],
        "evaluation": evaluation,
        "samples": [sample | {"accuracy": 0.6}],
        "commit": "abc",
        "command": "train x",
    }
    (run / "record.json").write_text(json.dumps(record))
    (run / "samples").mkdir()
    Image.new("RGB", (900, 30), "red").save(run / "samples/1.png")
    for name in ("summary.json", "predictions.html"):
        (run / name).write_text("{}")
    page = page_of(capsys, run)
    assert page.tables["test: score"][1] == ["m4c", "50.0%", "25.0% to 75.0%"]
    assert page.tables["test: score of POPE"][1] == ["llava", "f1", "81.2", "80.0 to 82.5"]
    assert 'href="predictions-pope.html"' in page.text
    assert "pope, 9 questions, 2 failed, 3 answers cut at the limit; greedy" in page.text
    assert 'href="predictions.html#filter=wrong"' in page.text and "red x 2, blue" in page.text
    assert ["commit", "abc"] in page.tables["test: command, commit, environment"]
    elsewhere = page_of(capsys, run, "--output", tmp_path / "deep/page.html")
    assert 'href="../run/predictions.html"' in elsewhere.text and ">finished<" in elsewhere.text


@pytest.mark.slow
def test_two_runs_are_laid_over_each_other(make_run, recipe_content, capsys):
    log = [start("projector", 0, 8), *(training("projector", step) for step in range(1, 9))]
    one = make_run("one", log, name="one")
    recipe_content["stages"]["projector"]["adam_beta2"] = 0.95
    other = make_run("other", log[:5], name="other", seed=3)
    page = page_of(capsys, one, other)
    assert page.tables["Where the recipes differ"] == [
        ["key", "one", "other"],
        ["name", "one", "other"],
        ["seed", "1", "3"],
        ["stages.projector.adam_beta2", "0.999", "0.95"],
    ]
    lines = panels([run_facts(one), run_facts(other)])[0].charts["steps"].lines
    assert [(line.label, line.colour, line.dash) for line in lines] == [
        ("one, training", 0, 0),
        ("other, training", 1, 0),
    ]
    assert "one and other" in page.text
    recipe_content["stages"]["more"] = recipe_content["stages"].pop("projector") | {"epochs": 2}
    page = page_of(capsys, one, make_run("third", log[:5], name="third"))
    assert page.tables["Where the recipes differ"][-2:] == [  # and not a row for each of their keys
        ["stages.more", "not there", "trains [multi_modal_projector]"],
        ["stages.projector", "trains [multi_modal_projector]", "not there"],
    ]
    assert f"one ({one}) and one ({one})" in page_of(capsys, one, one).text


@pytest.mark.parametrize("state", ["not begun", "stopped", "running", "finished"])
def test_states(make_run, capsys, state):
    log = [] if state == "not begun" else [start("projector", 0, 8), training("projector", 4)]
    run = make_run("run", log)
    if state == "finished":
        (run / "summary.json").write_text("{}")
    with (run / ".lock").open("w") as lock:
        if state == "running":
            fcntl.flock(lock, fcntl.LOCK_EX)
        page = page_of(capsys, run)
    assert f">{state}<" in page.text
    assert ("about 10 s left in this stage; then instruct" in page.text) == (state == "running")
    assert ("Nothing is logged yet." in page.text) == (state == "not begun")


def test_a_run_of_before_the_log_has_its_curves(make_run):
    run = make_run("run", [])
    (run / "log.jsonl").unlink()
    record = {
        "steps": 4,
        "minutes": 2,
        "loss_curve": [[2, 3.0], [4, 1.0]],
        "validation_curve": [[4, 2.0]],
        "groups": GROUPS,
    }
    final = run / "stages/1-projector/final"
    final.mkdir(parents=True)
    (final / "stage.json").write_text(json.dumps(record))
    chart = panels([run_facts(run)])[0].charts["time"]
    assert chart.lines[0].points[:2].tolist() == [[60, 3.0], [120, 1.0]]
    assert chart.lines[1].points[0].tolist() == [120, 2.0]


def test_a_long_log_makes_a_small_page(make_run, capsys):
    log = [start("projector", 0, 100_000), *(training("projector", step) for step in range(1, 5_001))]
    page = page_of(capsys, make_run("run", log))
    assert len(page.text) < 500_000  # nothing in it grows with the log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone"], "gone: there is no such folder"),
        (["."], ".: is not a run's folder: it has no recipe.json"),
        (["{run}", "--output", "{run}"], "is a folder (fix: name an .html file"),
        (["{run}", "--output", "{run}/recipe.json/x.html"], "cannot be written"),
    ],
)
def test_what_cannot_be_is_said(make_run, arguments, message, capsys, monkeypatch, tmp_path):
    run = make_run("run", [])
    monkeypatch.chdir(tmp_path)
    assert main(["report", *(argument.format(run=run) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def served(run):
    (run / "predictions.html").write_text("<p>answers")
    with ReportServer([run], port=0, every=7) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(address, host=None) -> tuple[int, str]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(address, headers={"Host": host} if host else {})
    try:
        with opener.open(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.slow
def test_a_watched_run_is_served_to_this_machine_and_always_new(served, run):
    assert served.server_address[0] == "127.0.0.1"
    code, text = get(served.address)
    assert code == 200 and 'http-equiv="refresh" content="7"' in text and "step 3 of 20" in text
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps(training("instruct", 4)) + "\n")
    assert "step 4 of 20" in get(served.address)[1]
    assert get(served.address + "answers/0/predictions.html") == (200, "<p>answers")
    for path in ("answers/1/predictions.html", "answers/0/recipe.json", "../recipe.json", "recipe.json"):
        assert get(served.address + path)[0] == 404
    assert get(served.address, host="evil.example")[0] == 403
    (run / "recipe.json").unlink()
    assert get(served.address)[0] == 500
    with pytest.raises(UserError, match="--port"):
        ReportServer([run], port=served.server_port, every=1)


# --- charts


def test_many_points_become_means_with_their_range():
    rng = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in enumerate(rng.normal(size=10_000))]
    kept = thinned(points)
    assert len(kept) == 300 and kept[:, 2].min() == min(y for _, y in points)
    assert kept[:, 3].max() == max(y for _, y in points) and (kept[:, 2] <= kept[:, 1]).all()
    np.testing.assert_allclose(kept[0, :2], np.mean(points[:34], axis=0))
    assert thinned(points[:500]).shape == (500, 4)


def test_a_chart_is_told_in_words_and_takes_the_pages_colours():
    chart = Chart("Loss", [Line("train & co", [(0, 4.0), (1, np.nan), (2, 1.0)])], bounds={0: "$a_b$"})
    assert described(chart) == "Loss over step. train & co: first 4, last 1, from 1 to 4."
    drawn = svg(chart, "k1")
    assert "train &amp; co: first 4" in drawn and "$a_b$" in drawn and "var(--line-1)" in drawn
    assert 'aria-labelledby="k1t k1d"' in drawn and "#0102" not in drawn and "<style" not in drawn
    assert drawn.count("<use") == 2  # points between gaps are dots, such as a stage's first entry
    assert "<use" not in svg(Chart("Loss", [Line("x", [(0, 1.0), (1, 2.0)])]), "k1")
    tiny = svg(Chart("Learning rate", [Line("x", [(0, 1e-6), (1, 2e-6)])], bounds={0: "first"}), "k1")
    assert ">1e-06<" in tiny and ">2e-06<" in tiny  # no factor of the whole axis, which would stand on `first`
    with pytest.raises(ValueError, match="no finite point"):
        svg(Chart("Loss", [Line("x", [(0, np.nan)])]), "k")


def test_charts_that_two_threads_draw_have_one_style():
    chart = Chart("Loss", [Line("x", [(0, 1.0), (1, 2.0)])])
    alone, drawn = svg(chart, "k1"), []
    thread = threading.Thread(target=lambda: drawn.append(svg(chart, "k1")))
    with curves._style():  # as while another thread draws; matplotlib's settings are the process's
        thread.start()
        thread.join(0.2)
        assert not drawn
    thread.join()
    assert drawn == [alone]


# --- Chromium


WIDTHS = {390: ("light",), 1280: ("dark",)}
if TORTURE:
    WIDTHS = dict.fromkeys(WIDTHS, ("light", "dark"))


def test_the_page_in_a_browser(window, run, capsys):
    page_of(capsys, run, run)
    for width, schemes in WIDTHS.items():
        window.resize(width)
        window.open(run / "report.html")
        assert_usable(window, width, schemes)


def assert_usable(window, width, schemes):
    assert window.run("return document.documentElement.scrollWidth") <= width
    assert window.run("return document.title").startswith(HOSTILE) and window.run("return window.owned") is None
    shown = "return [...document.querySelectorAll('svg.chart')].filter((e) => e.checkVisibility()).length"
    count = window.run(shown)
    assert window.role_and_name(".time svg.chart")[0] in ("image", "img")
    assert window.role_and_name(".time svg.chart")[1].startswith("Loss")
    window.click("#axis-steps")
    assert window.run(shown) == count > 3
    for scheme in schemes:
        window.prefer(scheme)
        assert window.violations() == []
        dark = window.run("return getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 23)"
        assert dark == (scheme == "dark")
