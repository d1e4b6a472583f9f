"""`export-metric`: a folder that `evaluate.load` opens with no network, and that scores as this project does."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.evaluation.textvqa_accuracy import TextVQAAccuracy
from llava_llama31.trainer.evaluation.vqa_accuracy import PROTOCOLS, normalize, score_all


PAIRS = [
    ("New York,NY", ["new york ny"] * 4 + ["nyc"] * 6),
    ("wendy's", ["wendy's"] * 3 + ["Wendys"] * 7),
    ("8.", ["8"] * 8 + ["8."] * 2),
    ("Grüße — 日本", ["grüße — 日本"] * 9 + ["unanswerable"]),
    ("", ["stop"] * 10),
    ("two", ["2", "2", "x"]),
]
BAD = [
    (
        {"predictions": ["a"], "references": [["a"]], "protocol": "vqa2"},
        "no protocol is named 'vqa2'; there are vlmev",
    ),
    ({"predictions": [], "references": []}, "there are no predictions to score"),
    ({"predictions": ["a", "b"], "references": [["a"], []]}, "references[1] is [], not a list of at least one string"),
    ({"predictions": ["a", "b"], "references": [["a"], None]}, "references[1] is None, not a list"),
    ({"predictions": ["a", None], "references": [["a"], ["b"]]}, "predictions[1] is None, not a string"),
    ({"predictions": ["a", "b"], "references": [["a"], ["b", None]]}, "references[1] is ['b', None], not a list"),
    (
        {"predictions": ["a"], "references": [["a"], ["b"]]},
        "Mismatch in the number of predictions (1) and references (2)",
    ),
    ({"predictions": [8], "references": [["a"]]}, "don't match the expected format"),
    ({"predictions": ["a"], "references": ["abc"]}, "expected a list instead: 'abc'"),
]
LOAD = """
import json, sys
import evaluate

metric = evaluate.load(sys.argv[1])
result = {"doc": metric.inputs_description, "citation": metric.citation, "description": metric.description}
errors = []
for arguments in json.loads(sys.argv[2]):
    try:
        metric.compute(**arguments)
    except ValueError as error:
        errors.append(str(error))
predictions, references = zip(*json.loads(sys.argv[3]))
result["scores"] = {
    protocol: metric.compute(predictions=predictions, references=references, protocol=protocol)
    for protocol in ("m4c", "vlmevalkit-2025", "all")
}
for prediction, reference in zip(predictions, references):
    metric.add(prediction=prediction, reference=reference)
result["one by one"] = metric.compute()
renamed = evaluate.load(sys.argv[4])
result["renamed"] = renamed.compute(predictions=predictions, references=references)
print(json.dumps(result | {"errors": errors}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metric") / "textvqa_accuracy"
    assert main(["export-metric", "--output", str(folder)]) == 0
    return folder


def run_apart(code, *arguments, home, cwd=None):
    """In a process that knows neither this project nor the network nor a cache."""
    environment = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    # evaluate's cache follows HF_HOME too; -I leaves this project's own folder out of the path
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, *arguments], env=environment, cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_evaluate_loads_the_folder_offline_and_scores_as_we_do(folder, tmp_path):
    renamed, home = tmp_path / "my-metric", tmp_path / "home"
    assert main(["export-metric", "--output", str(renamed)]) == 0
    bad = json.dumps([arguments for arguments, _ in BAD])
    result = run_apart(LOAD, str(folder), bad, json.dumps(PAIRS), str(renamed), home=home, cwd=tmp_path)
    expected = {name: vars(score) for name, score in score_all(PAIRS).items()}
    assert result["scores"]["all"] == result["one by one"] == result["renamed"] == expected
    assert result["scores"]["m4c"] == {"protocol": "m4c"} | expected["m4c"]
    assert result["scores"]["vlmevalkit-2025"] == {"protocol": "vlmevalkit-2025"} | expected["vlmevalkit-2025"]
    assert len({score["accuracy"] for score in expected.values()}) == 3
    assert len(result["errors"]) == len(BAD)
    for error, (_, message) in zip(result["errors"], BAD, strict=True):
        assert message in error
    assert "Raises" in result["doc"] and "sum_i min(1," in result["description"]
    assert "Towards {VQA} Models That Can Read" in result["citation"]
    # it ran from its own copies, of which nothing belongs to this project
    copies = {path.name for path in home.rglob("*.py")} - {"__init__.py"}
    assert copies == {"textvqa_accuracy.py", "my-metric.py", "vqa_accuracy.py"}
    for path in home.rglob("*.py"):
        assert "llava_llama31." not in path.read_text()


def test_the_metric_scores_in_the_project_too(tmp_path):
    metric = TextVQAAccuracy(cache_dir=str(tmp_path))
    predictions, references = zip(*PAIRS, strict=True)
    result = metric.compute(predictions=predictions, references=references)
    assert result == {name: vars(score) for name, score in score_all(PAIRS).items()}
    example = [["8"] * 2 + ["8."] * 8, ["stop"] * 3 + ["halt"] * 7]
    result = metric.compute(predictions=["8.", "Stop!"], references=example, protocol="m4c")
    assert result["accuracy"] == 0.95  # what its documentation says


def test_the_folder_is_a_space(folder):
    assert {path.name for path in folder.iterdir()} == {
        *("textvqa_accuracy.py", "vqa_accuracy.py", "app.py", "requirements.txt", "README.md", "LICENSE")
    }
    _, front, card = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    settings = yaml.safe_load(front)
    assert (settings["sdk"], settings["app_file"], settings["license"]) == ("gradio", "app.py", "apache-2.0")
    assert {"evaluate", "metric"} <= set(settings["tags"]) and "Metric card" in card
    assert "Apache License" in (folder / "LICENSE").read_text()
    requirements = (folder / "requirements.txt").read_text()
    assert "evaluate" in requirements and "llava" not in requirements


def test_the_page_shows_what_each_protocol_compares(folder, tmp_path):
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import app;"
        "print(json.dumps([(*example, app.score(*example)) for example in [*app.EXAMPLES, ('a', '')]]))"
    )
    *examples, nothing = run_apart(code, str(folder), home=tmp_path)
    assert nothing == ["a", "", []] and len(examples) == 3
    for prediction, answers, rows in examples:
        scores = score_all([(prediction, answers.split("\n"))])
        assert [(row[0], float(row[1])) for row in rows] == [(name, scores[name].accuracy) for name in PROTOCOLS]
        assert [row[2] for row in rows] == [normalize(prediction, name) for name in PROTOCOLS]
    assert examples[0][2][1] == ["vlmevalkit-2025", "1", "8.", "8 | 8 | " + " | ".join(["8."] * 8)]


def test_nothing_is_overwritten_and_impossible_names_are_refused(folder, tmp_path, capsys):
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    assert main(["export-metric", "--output", str(folder)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir()) == before
    for name in ("vqa_accuracy", "app", "a.b"):
        assert main(["export-metric", "--output", str(tmp_path / name)]) == 2
        assert "cannot be the name of the metric's script" in capsys.readouterr().err
        assert not (tmp_path / name).exists()
    (tmp_path / "empty").mkdir()
    assert main(["export-metric", "--output", str(tmp_path / "empty")]) == 0
    assert (tmp_path / "empty" / "empty.py").exists() and [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_the_folder_is_the_result_on_stdout(tmp_path, capsys):
    assert main(["export-metric", "--output", str(tmp_path / "metric")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'metric'}\n"
