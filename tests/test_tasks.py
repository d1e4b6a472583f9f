"""Tasks: every shipped one is sound, and answers in every layout score what the same answers score in any other."""

import csv
import datetime
import json
import math
import os
import random
from functools import reduce
from importlib import resources
from operator import add
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tables import write_xlsx

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.answer_files import Reading
from llava_llama31.trainer.evaluation.answer_matching import asks, image_key
from llava_llama31.trainer.evaluation.metrics.choices import inline_options
from llava_llama31.trainer.evaluation.task_answers import read_task_answers
from llava_llama31.trainer.evaluation.task_files import load_task, task_names
from llava_llama31.trainer.evaluation.task_questions import load_task_questions
from llava_llama31.trainer.evaluation.task_scoring import answered, score_task
from llava_llama31.trainer.evaluation.vqa_accuracy import normalize


SHIPPED = ["ai2d", "chartqa", "docvqa", "gqa", "hallusionbench", "infovqa", "mmbench", "mme", "mmmu", "mmstar"]
SHIPPED += ["ocrbench", "pope", "realworldqa", "scienceqa", "scienceqa-img", "seed-img", "textvqa", "vizwiz", "vqav2"]
PROMPT = "\nAnswer the question using a single word or phrase."


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_table(path, rows, delimiter="\t"):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def score(capsys, *arguments, code=0):
    assert main(["score", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


# --- tasks


def test_the_shipped_tasks_are_those_that_are_named():
    assert task_names() == SHIPPED
    listed = (Path(__file__).parents[1] / "setup.cfg").read_text()
    assert "tasks/*.yaml" in listed
    for name in SHIPPED:
        assert (resources.files("llava_llama31.trainer.evaluation") / "tasks" / f"{name}.yaml").is_file()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_task_says_what_it_is(name):
    task = load_task(name)
    assert task.name == name and task.sources and task.dataset and task.labels
    assert set(task.prompts) >= {"card", "llava", "lmms-eval"}
    assert bool(task.reproduced) != bool(task.not_reproduced)
    for protocol in task.protocols.values():
        assert protocol.source
    for figure in task.reproduced:
        assert figure.figures and figure.published


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "t.yaml: not a mapping"),
        ("a: [", "t.yaml: not YAML"),
        ("a: 1\na: 2\n", "t.yaml: not YAML: key .a. is given twice"),
        ("name: x", "t.yaml: title: this key is missing"),
        ("protocol: other", "no protocol is named 'other'; there are own"),
        ("speed: 1", "speed: no such key"),
        ("prompts: {card: ask}", "the prompt of card has no {question}"),
        (
            "protocols: {own: {source: s, metric: choice, rule: guess, headline: accuracy}}",
            "rule is 'guess'; choice has",
        ),
        (
            "protocols: {own: {source: s, metric: function, rule: f, headline: accuracy}}",
            "rule has to be module:function",
        ),
        (
            "protocols: {own: {source: s, metric: exact, rule: verbatim, headline: f1}}",
            "headline is 'f1'; there are accuracy",
        ),
        (
            "protocols: {own: {source: s, metric: exact, rule: verbatim, summary: fields, headline: f1}}",
            "summary fields is of metric fields, not exact",
        ),
        (
            "protocols: {own: {source: s, metric: exact, rule: verbatim, summary: circular, headline: accuracy}}",
            "summary circular of own needs units: circular",
        ),
    ],
)
def test_a_bad_task_is_named(tmp_path, text, message):
    good = "name: x\ntitle: X\nprotocol: own\nlayouts: [{name: rows}]\n"
    good += "protocols: {own: {source: s, metric: exact, rule: verbatim, headline: accuracy}}\n"
    keys = {line.split(":")[0]: line for line in good.splitlines()}
    if text.split(":")[0] in keys and not text.startswith("name"):
        keys[text.split(":")[0]] = text
        text = "\n".join(keys.values())
    elif text.startswith(("speed", "prompts")):
        text = good + text
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(UserError, match=message.replace("{", r"\{")) as caught:
        load_task(tmp_path / "t.yaml")
    assert "(fix: " in str(caught.value)
    (tmp_path / "t.yaml").write_text(good)
    assert load_task(tmp_path / "t.yaml").name == "x"


def test_an_unknown_task_names_those_that_there_are(capsys):
    assert main(["score", "p.jsonl", "--task", "popee"]) == 2
    assert "no task is named 'popee'; there are ai2d, chartqa" in capsys.readouterr().err
    assert main(["score", "p.jsonl"]) == 2
    assert "no annotations" in capsys.readouterr().err
    assert main(["score", "p.jsonl", "--annotations", "a", "--protocol", "m4c"]) == 2
    assert "--protocol: goes with --task" in capsys.readouterr().err


# --- POPE: two categories share images and questions


def pope_rows():
    draw = random.Random(0)
    rows = []
    for category, objects in {"random": "dog cat cup", "popular": "dog car cup sky"}.items():
        for image in range(6):
            for thing in objects.split():
                label = "yes" if draw.random() < 0.5 else "no"
                said = label if draw.random() < 0.7 else {"yes": "no", "no": "yes"}[label]
                row = {
                    "category": category,
                    "image": f"COCO_{image:03}.jpg",
                    "label": label,
                    "said": said.capitalize(),
                }
                rows.append(row | {"question": f"Is there a {thing} in the image?"})
    return rows


@pytest.fixture
def pope(tmp_path):
    """LLaVA's answers and questions, POPE's labels, and the mean F1 that they give."""
    rows = pope_rows()
    labels: dict[str, list] = {}
    for row in rows:
        of_category = labels.setdefault(row["category"], [])
        label = {"question_id": len(of_category) + 1, "image": row["image"], "text": row["question"]}
        of_category.append(label | {"label": row["label"]})
    for category, lines in labels.items():
        write_lines(tmp_path / "labels" / f"coco_pope_{category}.json", lines)
    questions = [
        {"question_id": i, "image": row["image"], "text": row["question"] + PROMPT, "category": row["category"]}
        for i, row in enumerate(rows)
    ]
    write_lines(tmp_path / "questions.jsonl", questions)
    answers = [
        {"question_id": i, "prompt": row["question"] + PROMPT, "text": row["said"], "metadata": {}}
        for i, row in enumerate(rows)
    ]
    write_lines(tmp_path / "labels" / "answers.jsonl", answers)  # another file beside the labels
    f1 = []
    for category in labels:
        pairs = [(row["said"].lower(), row["label"]) for row in rows if row["category"] == category]
        right = pairs.count(("yes", "yes"))
        f1.append(200 * right / (2 * right + pairs.count(("yes", "no")) + pairs.count(("no", "yes"))))
    return tmp_path, answers, sum(f1) / len(f1)


def pope_arguments(folder):
    return ["--task", "pope", "--annotations", folder / "labels", "--questions", folder / "questions.jsonl"]


def test_answers_are_scored_by_what_they_ask_in_any_order(pope, capsys):
    folder, answers, f1 = pope
    result = score(capsys, folder / "labels" / "answers.jsonl", *pope_arguments(folder))
    assert result["task"] == "pope" and result["protocol"] == "llava" and result["headline"] == "f1"
    assert result["metrics"]["f1"] == pytest.approx(f1) and result["num_questions"] == len(answers)
    assert (result["missing"], result["failed"], result["unknown"]) == (0, 0, 0)
    assert set(result["groups"]) == {"random", "popular"} and result["low"] <= f1 <= result["high"]
    shuffled = write_lines(folder / "shuffled.jsonl", random.Random(1).sample(answers, len(answers)))
    again = score(capsys, shuffled, *pope_arguments(folder))
    assert again["metrics"] == result["metrics"] and again["groups"] == result["groups"]
    read = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    floats = write_lines(folder / "floats.jsonl", [row | {"question_id": float(row["question_id"])} for row in read])
    again = score(capsys, shuffled, *pope_arguments(folder)[:-1], floats)
    assert again["metrics"] == result["metrics"] and again["missing"] == 0
    part = score(capsys, write_lines(folder / "part.jsonl", answers[5:25]), *pope_arguments(folder), code=3)
    assert part["missing"] == len(answers) - 20
    assert main(["score", shuffled, *map(str, pope_arguments(folder))]) == 0
    out = capsys.readouterr().out
    assert "POPE, COCO" in out and f"{f1:.3f}" in out and "popular" in out and "llava *" in out


@pytest.mark.parametrize("renamed", [False, True])
def test_a_row_that_names_its_category_needs_no_question_file(pope, capsys, renamed):
    """Two categories ask the same of an image; such rows were refused because they do not say the category."""
    folder, _, f1 = pope
    rows = [
        {"question_id": i, "image": row["image"], "question": row["question"] + PROMPT, "category": row["category"]}
        | ({"first_answer": row["said"], "second_answer": "Yes"} if renamed else {"prediction": row["said"]})
        for i, row in enumerate(pope_rows())
    ]
    labels = ["--task", "pope", "--annotations", folder / "labels"]
    columns = "id=question_id,answer=first_answer,question=question,image=image"
    arguments = [*labels, *(["--columns", columns] if renamed else [])]
    result = score(capsys, write_lines(folder / "a.jsonl", rows[::-1]), *arguments)
    assert result["metrics"]["f1"] == pytest.approx(f1) and result["num_questions"] == len(rows)
    rows[0]["category"] = "unusual"
    path = write_lines(folder / "a.jsonl", rows)
    assert main(["score", path, *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert "(fix: 'unusual' is no such category: pass the annotations of popular or random alone)" in error


@pytest.mark.parametrize("has_doc", [True, False])
@pytest.mark.parametrize("labels", ["own", "hub", "hub with suffixes"])
def test_samples_of_vizwiz_name_their_images(tmp_path, capsys, has_doc, labels):
    """lmms-eval submits images instead of ids, and since its 0.4 keeps no other; such samples were refused."""
    asked = ["What is this?", "What is this?", "What color is it?", "What is this?"]
    wanted, said = ["mug", "unanswerable", "red", "pen"], ["Mug", "Unanswerable", "Blue", "Mug"]
    images = [f"VizWiz_val_0000000{i}.jpg" for i in (2, 0, 1, 3)]
    named = zip(images, asked, wanted, strict=True)
    rows = [{"image": image, "question": text, "answers": [{"answer": answer}] * 10} for image, text, answer in named]
    hub = [
        {**row, "question_id": Path(row["image"]).stem, "answers": [row["answers"][0]["answer"]] * 10} for row in rows
    ]
    hub = [{name: value for name, value in row.items() if name != "image"} for row in hub]
    if labels == "hub with suffixes":
        hub = [row | {"question_id": f"{row['question_id']}.jpg"} for row in hub]
    annotations = write_lines(tmp_path / "val.jsonl", rows[::-1] if labels == "own" else hub[::-1])
    samples = [
        {"doc_id": i, "target": "answer", "filtered_resps": answer, "exact_match": 1.0}
        | {"submission": {"image": f"{hub[i]['question_id']}.jpg", "answer": answer.lower()}}
        | ({"doc": hub[i]} if has_doc else {"input": asked[i] + PROMPT})
        for i, answer in enumerate(said)
    ]
    path = write_lines(tmp_path / "samples_vizwiz_vqa_val.jsonl", samples)
    result = score(capsys, path, "--task", "vizwiz", "--annotations", annotations)
    assert result["layout"] == "lmms-eval's samples" and result["metrics"]["accuracy"] == 50
    assert (result["num_questions"], result["missing"], result["unknown"]) == (4, 0, 0)


def test_options_that_the_hub_calls_nan_are_none(tmp_path, capsys):
    """The Hub's MMBench has the text `nan` where a question has no further option, and `banana` holds it."""
    rows = [
        {
            "index": 1,
            "question": "Which is yellow?",
            "hint": "nan",
            "answer": "B",
            "A": "sky",
            "B": "banana",
            "C": "nan",
        },
        {"index": 2, "question": "Which is big?", "hint": "nan", "answer": "A", "A": "whale", "B": "ant", "C": "flea"},
    ]
    held = [{"gpt_eval_score": row | {"D": "nan", "E": "nan"}, "submission": row} for row in rows]
    samples = [
        row | {"doc_id": i, "target": "B", "filtered_resps": said, "input": "?"}
        for i, (row, said) in enumerate(zip(held, ["It is the banana", "A"], strict=True))
    ]
    result = score(capsys, write_lines(tmp_path / "samples.jsonl", samples), "--task", "mmbench")
    assert result["protocols"]["vlmevalkit"]["metrics"]["accuracy"] == 100
    questions = load_task_questions(load_task("mmbench"), [("row", row) for row in rows], with_images=False)
    assert [question.context for question in questions] == ["", ""]
    assert [letter for letter, _ in questions[0].options] == ["A", "B"]


def test_llavas_questions_are_of_category_default_where_there_is_none(tmp_path, capsys):
    """Its files for GQA, VQAv2 and VizWiz say so in each row, and SEED-Bench's a number; all were refused.

    GQA asks some questions of an image twice, which the ids tell apart.
    """
    asked = ["Is it red?", "What is on the table?", "What is on the table?", "Is it big?"]
    wanted, said = ["yes", "fork", "spoon", "no"], ["Yes", "Fork", "Spoon.", "Yes"]
    labels = {
        f"20{i}": {"question": text, "imageId": f"n{i // 3}", "answer": answer}
        for i, (text, answer) in enumerate(zip(asked, wanted, strict=True))
    }
    (tmp_path / "testdev_balanced_questions.json").write_text(json.dumps(labels))
    questions = [
        {"question_id": name, "image": f"{label['imageId']}.jpg", "text": label["question"] + PROMPT}
        for name, label in labels.items()
    ]
    answers = [
        {"question_id": row["question_id"], "prompt": row["text"], "text": text, "metadata": {}}
        for row, text in zip(questions, said, strict=True)
    ]
    path = write_lines(tmp_path / "merge.jsonl", answers[::-1])
    for category in ("default", 5):
        asked_of = write_lines(tmp_path / "q.jsonl", [row | {"category": category} for row in questions])
        arguments = ["--annotations", tmp_path / "testdev_balanced_questions.json", "--questions", asked_of]
        result = score(capsys, path, "--task", "gqa", *arguments)
        assert result["metrics"]["accuracy"] == 75 and (result["missing"], result["unknown"]) == (0, 0)


@pytest.mark.parametrize("suffix", ["", ".jpg"])
def test_ids_that_are_images_may_have_a_suffix(tmp_path, capsys, suffix):
    """VizWiz's own labels name images with it and the Hub's without; answers that differ so were all unknown."""
    rows = [
        {"question_id": f"VizWiz_val_0000000{i}{suffix}", "question": "What is it?", "answers": [f"word {i}"] * 10}
        for i in range(4)
    ]
    labels = write_lines(tmp_path / "val.jsonl", rows)
    other = "" if suffix else ".jpg"
    said = [{"id": f"VizWiz_val_0000000{i}{other}", "response": f"Word {i % 3}"} for i in range(4)]
    result = score(capsys, write_lines(tmp_path / "a.jsonl", said[::-1]), "--task", "vizwiz", "--annotations", labels)
    assert result["metrics"]["accuracy"] == 75 and (result["missing"], result["unknown"]) == (0, 0)
    asked = [row | {"question": "Is it?"} for row in said]
    path = write_lines(tmp_path / "b.jsonl", asked)
    assert main(["score", path, "--task", "vizwiz", "--annotations", labels]) == 2
    assert "4 of 4 answers are to questions that are not annotated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "rows", "wanted"),
    [
        ("docvqa", [{"questionId": 7, "answer": "6 kg", "annotation": ["6 kg", "6"]}], 100),
        ("infovqa", [{"questionId": 7, "question": "How much?", "answer": "oak", "annotation": ["elm"]}], 0),
        ("gqa", [{"questionId": "207", "question": "Is it?" + PROMPT, "answer": "Yes.", "annotation": "yes"}], 100),
        ("chartqa", [{"question": "How many?" + PROMPT, "answer": "10", "annotation": "10.3"}], 100),
        ("chartqa", [{"answer": "10", "annotation": "20"}], 0),
        ("ai2d", [{"question": "Which?\nA. oak\nB. elm", "image": "1.png", "answer": "B", "annotation": "B"}], 100),
        ("scienceqa-img", [{"question": "?\nA. 1\nB. 2", "image_path": "1.png", "answer": "A", "gt_answers": "B"}], 0),
    ],
)
def test_results_of_qwen_vl_and_internvl_hold_their_labels(tmp_path, capsys, task, rows, wanted):
    """Their `answer` is the model's and `annotation` the annotators'; such rows were refused."""
    (tmp_path / "r.json").write_text(json.dumps(rows * 2 if "questionId" not in rows[0] else rows))
    result = score(capsys, tmp_path / "r.json", "--task", task)
    assert result["layout"] == "Qwen-VL's and InternVL's results"
    assert result["metrics"][result["headline"]] == wanted
    if task == "docvqa":
        labels = [{"questionId": 7, "question": "How much?", "answers": ["7 kg"]}]
        path = write_lines(tmp_path / "val.jsonl", labels)
        assert score(capsys, tmp_path / "r.json", "--task", task, "--annotations", path)["metrics"]["anls"] == 75


def test_vqas_annotations_go_with_llavas_questions_too(tmp_path, capsys):
    """LLaVA's users have its question file, which was read as JSON and named as no JSON."""
    asked, wanted, said = ["Where is it?", "How many?", "What is it?"], ["down", "2", "cat"], ["Down", "2", "dog"]
    annotations = [
        {"question_id": 5000 + i, "image_id": 50 + i, "answers": [{"answer": text, "answer_id": k} for k in range(10)]}
        for i, text in enumerate(wanted)
    ]
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    rows = [
        {"question_id": 5000 + i, "image": f"COCO_val2014_{50 + i:012}.jpg", "text": text + PROMPT}
        for i, text in enumerate(asked)
    ]
    answers = [
        {"question_id": row["question_id"], "prompt": row["text"], "text": text}
        for row, text in zip(rows, said, strict=True)
    ]
    path = write_lines(tmp_path / "merge.jsonl", answers[::-1])
    questions = write_lines(tmp_path / "q.jsonl", [row | {"category": "default"} for row in rows])
    arguments = ["--task", "vqav2", "--annotations", str(tmp_path / "annotations.json"), "--questions", questions]
    assert score(capsys, path, *arguments)["metrics"]["accuracy"] == pytest.approx(200 / 3)
    write_lines(tmp_path / "q.jsonl", [rows[0] | {"image": rows[1]["image"]}, *rows[1:]])
    assert main(["score", path, *arguments]) == 2
    assert "image_id 50, but 51 in q.jsonl (fix: pass the two files of one split)" in capsys.readouterr().err


def test_labels_of_another_revision_are_refused(pope, capsys):
    """With POPE's later labels, which have other rows, published answers scored 45.7 for 87.8."""
    folder, _, _ = pope
    path = folder / "labels" / "coco_pope_random.json"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3]["text"] = "Is there a tree in the image?"
    write_lines(path, rows)
    answers = str(folder / "labels" / "answers.jsonl")
    assert main(["score", answers, *map(str, pope_arguments(folder))]) == 2
    error = capsys.readouterr().err
    assert "1 of 42 answers are to questions that are not annotated" in error and "AoiDragon/POPE@e3e39262" in error


def test_folders_of_other_files_are_named(pope, capsys):
    folder, _, _ = pope
    (folder / "other").mkdir()
    (folder / "other" / "color.txt").write_text("a.jpg\tIs it red?\tYes\n")
    answers = str(folder / "labels" / "answers.jsonl")
    assert main(["score", answers, "--task", "pope", "--annotations", str(folder / "other")]) == 2
    assert "other: no coco_pope_{category}.json and no parquet file there" in capsys.readouterr().err
    assert main(["score", str(folder / "other"), "--task", "mme"]) == 2
    assert "other: a folder of neither MME's results" in capsys.readouterr().err


def test_prompts_of_other_questions_are_refused(pope, capsys):
    folder, answers, _ = pope
    answers[7] = answers[7] | {"prompt": "Is there a zebra in the image?"}
    wrong = write_lines(folder / "wrong.jsonl", answers)
    assert main(["score", wrong, *map(str, pope_arguments(folder))]) == 2
    assert "wrong.jsonl:8: question_id 7 asks 'Is there a zebra" in capsys.readouterr().err
    # without the questions an id of POPE's says neither image nor category
    assert main(["score", str(folder / "labels" / "answers.jsonl"), *map(str, pope_arguments(folder)[:4])]) == 2
    assert "annotated questions could be meant" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["questions.jsonl", "labels/coco_pope_random.json"])
def test_questions_and_labels_are_not_scored_as_answers(pope, capsys, name):
    """Their `text` is the question; LLaVA's answers call the model's words so."""
    folder, _, _ = pope
    for arguments in (pope_arguments(folder), pope_arguments(folder)[:4]):
        assert main(["score", str(folder / name), *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert "these are questions" in error or (len(arguments) == 4 and "could be meant" in error)


def test_what_json_calls_no_value_is_no_answer(own, capsys):
    folder, arguments = own
    rows = [f'{{"id": "q{i}", "response": {said}}}' for i, said in enumerate(["null", "NaN", '"word 2"', '""'])]
    (folder / "a.jsonl").write_text("\n".join(rows))
    result = score(capsys, folder / "a.jsonl", *arguments, code=3)
    assert result["failed_ids"] == {"q0": "no answer", "q1": "no answer"} and result["metrics"]["accuracy"] == 50
    path = write_xlsx(folder / "a.xlsx", [{"id": "q2", "response": "word 2"}, {"id": "q3", "response": None}])
    assert score(capsys, path, *arguments, code=3)["failed"] == 0  # a cell without text is an empty answer
    assert main(["score", write_lines(folder / "b.jsonl", [{"id": "q2.0", "response": "a"}]), *arguments]) == 2
    assert "the first row is of 'q2.0', the first question is 'q0'" in capsys.readouterr().err


def test_several_answers_to_a_question_need_a_method(pope, capsys):
    folder, answers, f1 = pope
    rows = [row | {"method": method} for row in answers for method in ("dense", "pruned")]
    path = write_lines(folder / "methods.jsonl", rows)
    assert main(["score", path, *map(str, pope_arguments(folder))]) == 2
    assert "has several answers (fix: keep one row a question; --where FIELD=VALUE" in capsys.readouterr().err
    assert score(capsys, path, *pope_arguments(folder), "--where", "method=pruned")["metrics"]["f1"] == pytest.approx(
        f1
    )
    assert main(["score", path, *map(str, pope_arguments(folder)), "--where", "method=x"]) == 2
    assert "no row has method=x; there are dense, pruned" in capsys.readouterr().err


def test_rows_of_vlmevalkit_hold_their_labels(tmp_path, capsys):
    """One row may be in several sets, and its F1 is over all of them together."""
    rows = [
        {"index": i, "question": f"Is there a {i}?", "answer": answer, "category": category, "prediction": said}
        for i, (answer, category, said) in enumerate(
            [
                ("Yes", "random,popular", "Yes, there is."),
                ("No", "random", "Yes"),
                ("Yes", "popular", "There is none"),
                ("No", "random,popular", "No."),
            ]
        )
    ]
    result = score(capsys, write_xlsx(tmp_path / "m_POPE.xlsx", rows), "--task", "pope")
    assert result["layout"] == "VLMEvalKit's predictions" and result["protocol"] == "vlmevalkit"
    # by set: 2 true yes, 1 false yes, 1 false no, 2 true no
    assert result["metrics"]["f1"] == pytest.approx(200 * 2 / (4 + 2))
    assert result["metrics"]["accuracy"] == pytest.approx(100 * 4 / 6)
    assert result["groups"]["random"]["precision"] == 50


# --- MME: pairs of questions


def test_pairs_are_right_together(tmp_path, capsys):
    truth = {"count": [("1.jpg", "A cat?", "Yes"), ("1.jpg", "A dog?", "No"), ("2.jpg", "A cat?", "Yes")]}
    truth["count"].append(("2.jpg", "A dog?", "No"))
    truth["code_reasoning"] = [("1.jpg", "Is it 5?", "Yes"), ("1.jpg", "Is it 6?", "No")]
    (tmp_path / "truth").mkdir()
    for category, rows in truth.items():
        lines = [f"{image}\t{question} Please answer yes or no.\t{answer}" for image, question, answer in rows]
        (tmp_path / "truth" / f"{category}.txt").write_text("\n".join(lines) + "\n")
    said = {"count": ["Yes", "No", "yes.", "Yes"], "code_reasoning": ["No", "No"]}
    answers = [
        {"question_id": f"{category}/images/{row[0]}", "prompt": row[1] + PROMPT, "text": text}
        for category in truth
        for row, text in zip(truth[category], said[category], strict=True)
    ]
    path = write_lines(tmp_path / "a.jsonl", answers[::-1])
    result = score(capsys, path, "--task", "mme", "--annotations", tmp_path / "truth")
    assert result["metrics"]["perception"] == 75 + 50 and result["metrics"]["cognition"] == 50
    assert result["headline"] == "perception" and result["groups"]["count"]["score"] == 125
    assert "score" not in result["metrics"]
    (tmp_path / "results").mkdir()
    for category in truth:
        lines = (tmp_path / "truth" / f"{category}.txt").read_text().splitlines()
        lines = [f"{line}\t{text}\n" for line, text in zip(lines, said[category], strict=True)]
        (tmp_path / "results" / f"{category}.txt").write_text("".join(lines))
    for labels in ((), ("--annotations", tmp_path / "truth")):
        held = score(capsys, str(tmp_path / "results"), "--task", "mme", *labels)
        assert held["layout"] == "MME's results" and held["protocol"] == "llava"
        assert held["groups"] == result["groups"] and held["metrics"] == result["metrics"]
    one = score(capsys, str(tmp_path / "results" / "count.txt"), "--task", "mme")
    assert one["groups"]["count"]["score"] == 125 and one["num_questions"] == 4


def test_vlmevalkit_adds_mmes_categories_in_the_order_of_their_names(tmp_path, capsys):
    """The last digit of a sum depends on it."""
    categories = load_task("mme").protocols["llava"].sums["perception"]
    rows = []
    for place, category in enumerate(categories):
        num_right = (0, 1, 4)[place % 3]
        for i in range(6):
            asked = {"question": f"Is it {i}?", "answer": "Yes", "image_path": f"{category}/{i // 2}.jpg"}
            said = "Yes" if i < num_right else "No"
            rows.append({"index": len(rows), "category": category, **asked, "prediction": said})
    result = score(capsys, write_xlsx(tmp_path / "m_MME.xlsx", rows), "--task", "mme")
    scores = {category: result["groups"][category]["score"] for category in categories}
    listed, by_name = (reduce(add, map(scores.get, names)) for names in (categories, sorted(categories)))
    assert listed != by_name == result["metrics"]["perception"] == pytest.approx(450)


# --- multiple choice


def science_rows():
    draw = random.Random(2)
    rows = []
    for i in range(12):
        options = "".join(f"{letter}. {draw.choice(['red', 'blue', 'wet'])} {letter.lower()}{i}\n" for letter in "ABC")
        human = f"{'<image>' if i % 3 else ''}What is {i}?\n{options}".strip()
        gold = draw.choice("ABC")
        row = {"id": str(i), "conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": gold}]}
        said = [gold, f"{gold}. it", f"The answer is {gold}.", "E", "wrong"][i % 5]
        rows.append((row | ({"image": f"{i}/image.png"} if i % 3 else {}), gold, said, human))
    return rows


@pytest.mark.parametrize("form", ["answers", "result", "outputs"])
def test_scienceqa_with_and_without_images(tmp_path, capsys, form):
    rows = science_rows()
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps([row for row, *_ in rows], indent=2))
    instruction = "\nAnswer with the option's letter from the given choices directly."
    if form == "answers":
        lines = [
            {"question_id": row["id"], "prompt": human + instruction, "text": said} for row, _, said, human in rows
        ]
        path = write_lines(tmp_path / "a.jsonl", lines[::-1])
    elif form == "outputs":
        path = str(tmp_path / "result.json")
        content = {"acc": 1.5, "correct": 1, "count": 12, "results": {row["id"]: 0 for row, *_ in rows}}
        content["outputs"] = {row["id"]: said for row, _, said, _ in rows}
        Path(path).write_text(json.dumps(content))
    else:  # what eval_science_qa.py writes, named .jsonl
        halves: dict[str, list] = {"correct": [], "incorrect": []}
        for row, gold, said, human in rows:
            entry = {"question_id": row["id"], "parsed_ans": "?", "ground_truth": gold, "pred": said}
            halves["correct" if row["id"] < "5" else "incorrect"].append(entry | {"question": human + instruction})
        path = str(tmp_path / "a.jsonl")
        Path(path).write_text(json.dumps(halves, indent=2))
    right = [i % 5 < 3 for i in range(12)]
    every = score(capsys, path, "--task", "scienceqa", "--annotations", questions)
    assert every["metrics"]["accuracy"] == pytest.approx(100 * sum(right) / 12) and every["protocol"] == "llava"
    with_image = score(capsys, path, "--task", "scienceqa-img", "--questions", questions)
    assert (with_image["num_questions"], with_image["left_out"]) == (8, 4)
    assert with_image["metrics"]["accuracy"] == pytest.approx(100 * sum(right[i] for i in range(12) if i % 3) / 8)


def circular_rows():
    """Two questions in all their turns; the second one fails in one of them."""
    rows = []
    for base, gold_text in ((7, "red"), (8, "wet")):
        texts = ["red", "wet", "hot"]
        for turn in range(3):
            turned = texts[turn:] + texts[:turn]
            gold = "ABC"[turned.index(gold_text)]
            said = f"{gold}." if base == 7 or turn < 2 else "A" if gold != "A" else "B"
            options = dict(zip("ABCD", [*turned, None], strict=True))
            row = {"index": base + turn * 1_000_000, "question": f"What is {base}?", **options, "answer": gold}
            rows.append(row | {"prediction": said, "category": "colour"})
    return rows


def test_a_circular_question_is_right_in_all_its_turns(tmp_path, capsys):
    result = score(capsys, write_xlsx(tmp_path / "m_MMBench.xlsx", circular_rows()), "--task", "mmbench")
    assert result["metrics"] == {"accuracy": 50.0, "accuracy_of_turns": pytest.approx(100 * 5 / 6)}
    assert result["num_questions"] == 6
    judged = [row | {"hit": 1} for row in circular_rows()[:1]]
    path = write_xlsx(tmp_path / "m_MMBench_openai_result.xlsx", judged)
    assert main(["score", path, "--task", "mmbench"]) == 2
    assert "VLMEvalKit's result file, whose rows are whole questions" in capsys.readouterr().err


def test_turns_belong_together_however_a_table_writes_their_numbers(tmp_path, capsys):
    """As texts with a decimal point each turn was a question of its own, and 67.7 became 76.4."""
    rows = circular_rows()
    for number, spelt in enumerate((lambda i: f"{i}.0", lambda i: f" {i} ", float)):
        path = write_lines(tmp_path / f"{number}.jsonl", [row | {"index": spelt(row["index"])} for row in rows])
        assert score(capsys, path, "--task", "mmbench")["metrics"]["accuracy"] == 50
    renumbered = write_xlsx(tmp_path / "renumbered.xlsx", [row | {"index": i} for i, row in enumerate(rows)])
    result = score(capsys, renumbered, "--task", "mmbench")
    assert "no question has a second turn" in result["note"] and "in steps of 1,000,000" in result["note"]
    shifted = [row | {"index": other["index"]} for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]
    assert main(["score", write_xlsx(tmp_path / "s.xlsx", shifted), "--task", "mmbench"]) == 2
    assert "are turns of one question by their numbers, and ask " in capsys.readouterr().err


CHOICES = [
    {"index": i, "question": f"{i}?", "answer": gold, "A": "red car", "B": "blue", "C": None, "prediction": said}
    for i, (gold, said) in enumerate(
        [("A", "A."), ("B", "It is blue"), ("A", "B"), ("red car", "A"), ("B", "Failed to obtain answer via API.")]
    )
]


def test_letters_and_option_texts(tmp_path, capsys):
    result = score(capsys, write_xlsx(tmp_path / "m_MMStar.xlsx", CHOICES), "--task", "mmstar", code=3)
    assert (result["num_questions"], result["failed"]) == (5, 1)
    assert result["protocols"]["vlmevalkit"]["metrics"]["accuracy"] == 50
    assert result["protocols"]["letter"]["metrics"]["accuracy"] == 25
    assert result["metrics_unanswered_as_wrong"]["accuracy"] == 40
    assert "1 annotated answers are not the letter of an option" in result["note"] and "red car" in result["note"]
    result = score(capsys, tmp_path / "m_MMStar.xlsx", "--task", "mmstar", "--protocol", "letter", code=3)
    assert result["protocol"] == "letter" and result["metrics"]["accuracy"] == 25
    assert main(["score", str(tmp_path / "m_MMStar.xlsx"), "--task", "mmstar", "--protocol", "x"]) == 2
    fix = "one of vlmevalkit, letter, vlmevalkit-2025, vlmevalkit-2026, mmstar, lmms-eval, lmms-eval-2026, evalscope"
    assert f"mmstar has no protocol 'x' (fix: {fix})" in capsys.readouterr().err
    texts = [row | {"answer": "blue"} for row in CHOICES]
    assert main(["score", write_xlsx(tmp_path / "t.xlsx", texts), "--task", "mmstar"]) == 2
    assert "answer is 'blue', and 5 of 5 are not a letter" in capsys.readouterr().err


def test_mmmu_counts_the_validation_questions_of_vlmevalkits_two_splits(tmp_path, capsys):
    rows = [row | {"split": "validation" if i else "dev"} for i, row in enumerate(CHOICES[:3])]
    result = score(capsys, write_xlsx(tmp_path / "m_MMMU_DEV_VAL.xlsx", rows), "--task", "mmmu")
    assert (result["num_questions"], result["left_out"], result["missing"]) == (2, 1, 0)
    assert result["metrics"]["accuracy"] == 50
    assert main(["score", write_xlsx(tmp_path / "m.xlsx", rows[:1]), "--task", "mmmu"]) == 2
    assert "all rows are of split dev, which mmmu leaves out" in capsys.readouterr().err
    test = [{**row, "split": "test", "answer": "?"} for row in rows]
    table = write_table(tmp_path / "MMMU_TEST.tsv", [{**row, "prediction": ""} for row in test])
    answers = write_lines(tmp_path / "a.jsonl", [{"index": row["index"], "prediction": "A"} for row in test])
    arguments = ["score", answers, "--task", "mmmu", "--annotations", table, "--submission", str(tmp_path / "s.json")]
    assert main(arguments) == 0 and len(json.loads((tmp_path / "s.json").read_text())) == 3


@pytest.mark.parametrize("file", ["m_MMMU_DEV_VAL.xlsx", "m_MMMU_DEV_VAL_openai_result.xlsx"])
def test_an_open_question_is_open_in_vlmevalkits_result_files_too(tmp_path, capsys, file):
    """There its answer has become option A, and is still written as a text."""
    shown = {"A": "24 V", "B": "Other Answers", "hit": 1} if "result" in file else {"A": None, "B": None}
    asked = {"question": "How many volts?", "answer": "24 V", "split": "validation"} | shown
    said = ["It is 24 V.", "A", "B", "12 V"]
    rows = [{"index": i, **asked, "prediction": text} for i, text in enumerate(said)]
    result = score(capsys, write_xlsx(tmp_path / file, rows), "--task", "mmmu")
    found = {name: result["protocols"][name]["metrics"]["accuracy"] for name in ("vlmevalkit", "letter", "mmmu")}
    assert found == {"vlmevalkit": 50, "letter": 25, "mmmu": 25}
    assert "not the letter of an option" not in result["note"]


@pytest.mark.parametrize("name", ["mmbench", "mmmu"])
def test_both_levels_of_vlmevalkits_categories_have_figures(tmp_path, capsys, name):
    levels = [("Art", "Humanities"), ("Music", "Humanities"), ("Physics", "Science")]
    rows = [
        row | {"category": category, "l2-category": wide, "split": "validation"}
        for row, (category, wide) in zip(CHOICES[:3], levels, strict=True)
    ]
    result = score(capsys, write_xlsx(tmp_path / f"{name}.xlsx", rows), "--task", name)
    found = {group: figures["accuracy"] for group, figures in result["groups"].items()}
    assert found == {"Art": 100, "Music": 100, "Physics": 0, "Humanities": 100, "Science": 0}


@pytest.mark.parametrize("column", ["answers", "answer"])
def test_vlmevalkits_table_of_vizwiz_lists_its_answers(tmp_path, capsys, column):
    """Its column is called `answers`, and that of its TextVQA `answer`."""
    listed = str(["a red mug"] * 3 + ["mug"] * 2 + ["unanswerable"] * 5)
    said = ["Red mug.", "mug", "a cup"]
    rows = [
        {"index": i, "question": f"What is {i}?", column: listed, "prediction": text} for i, text in enumerate(said)
    ]
    result = score(capsys, write_xlsx(tmp_path / "m_VizWiz.xlsx", rows), "--task", "vizwiz")
    # of ten annotators, three see two others and seven see three; two see one and eight see two
    earned = (3 * 2 / 3 + 7) / 10 + (2 / 3 + 8 * 2 / 3) / 10
    assert result["protocol"] == "vlmevalkit-2024"
    assert result["metrics"]["accuracy"] == pytest.approx(100 * earned / 3)


@pytest.mark.parametrize("name", ["mmmu", "scienceqa-img"])
def test_a_page_shows_the_questions_that_count(tmp_path, capsys, name):
    """Its mean would be another one than that of `score`."""
    rows = [row | {"split": "validation" if i else "dev"} for i, row in enumerate(CHOICES[:3])]
    if name == "scienceqa-img":
        values = [{"value": "Which?\nA. red\nB. blue"}, {"value": "A"}]
        rows = [{"id": str(i), "conversations": values} | ({"image": "1.png"} if i else {}) for i in range(3)]
    ids = [str(row.get("id", row.get("index"))) for row in rows]
    data = write_lines(tmp_path / "data.json", rows)
    answers = write_lines(tmp_path / "a.jsonl", [{"question_id": key, "answer": "A"} for key in ids])
    result = score(capsys, answers, "--task", name, "--annotations", data)
    assert main(["score", answers, "--task", name, "--annotations", data]) == 0
    assert f"2 of 2 questions answered, and 1 that {name} leaves out" in capsys.readouterr().out
    assert main(["browse", answers, "--task", name, "--data", data, "--output", str(tmp_path / "b.html")]) == 0
    page = (tmp_path / "b.html").read_text()
    shown = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert [entry["id"] for entry in shown["questions"]] == ids[1:] and shown["unknown"] == []
    place = shown["protocols"].index(result["protocol"])
    mean = sum(entry["scores"][place] for entry in shown["questions"]) / 2
    assert 100 * mean == pytest.approx(result["metrics"]["accuracy"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"metric": "yes_no", "answer": "maybe"}, "answer is 'maybe', and the metric is yes_no (fix: give yes or no)"),
        ({"metric": "yes_no", "answer": "['yes', 'no']"}, "answer is 'yes', 'no', and the metric is yes_no"),
        (
            {"metric": "fields", "answer": "total 9.50"},
            "answer is 'total 9.50', and the metric is fields (fix: give one",
        ),
        ({"metric": "fields", "answer": '{"a": 1, "a": 2}'}, "and the metric is fields"),
        ({"metric": "fields", "answer": "[1, 2]"}, "and the metric is fields"),
        ({"metric": "contains", "answer": " "}, "answer is ' ': every answer contains an empty text"),
        ({"metric": "contains", "answer": "['x', '']"}, "answer is 'x', '': every answer contains an empty text"),
        ({"metric": "choice", "answer": "B"}, "the metric is choice, and the question has no options (fix: give the"),
    ],
)
def test_own_answers_that_a_metric_cannot_compare_are_refused(tmp_path, capsys, row, message):
    """Some ended in a traceback after all questions were asked, others were always right or always wrong."""
    rows = [{"image": "a.png", "question": "What?", **row}]
    answers = write_lines(tmp_path / "a.jsonl", [{"id": "a.png#1", "response": "B"}])
    assert main(["score", answers, "--task", write_table(tmp_path / "q.csv", rows, ",")]) == 2
    error = capsys.readouterr().err
    assert "q.csv:2: " in error and message in error and error.count("\n") == 1


def test_a_part_of_a_file_that_holds_its_questions_is_not_taken_for_the_whole(tmp_path, capsys):
    result = score(capsys, write_xlsx(tmp_path / "m.xlsx", CHOICES[:3]), "--task", "mmstar")
    assert "the file has 3 of mmstar's 1,500 questions; those it lacks are not counted as missing" in result["note"]


@pytest.mark.parametrize("name", ["chartqa", "docvqa", "gqa", "ocrbench", "pope", "textvqa"])
def test_multiple_choice_rows_are_not_scored_as_texts(tmp_path, capsys, name):
    assert main(["score", write_xlsx(tmp_path / "m_MMStar.xlsx", CHOICES), "--task", name]) == 2
    assert f"the rows have options A, B, and questions of {name} have none" in capsys.readouterr().err


def test_questions_outside_the_categories_that_a_figure_adds_are_refused(tmp_path, capsys):
    """They counted for nothing: perception was 0."""
    rows = [
        {"index": i, "image_path": f"{i // 2}.jpg", "question": f"Is {i}?", "answer": "Yes", "prediction": "Yes"}
        for i in range(4)
    ]
    for name, category, message in [
        (
            "mme",
            "random",
            "question 0 is of category 'random', and mme's perception by llava needs one of existence, ",
        ),
        ("mme", None, "question 0 is of category 'none'"),
        ("pope", None, "question 0 is of category 'none', and pope's f1 by llava needs a category"),
    ]:
        path = write_lines(tmp_path / "c.jsonl", [row | ({"category": category} if category else {}) for row in rows])
        assert main(["score", path, "--task", name]) == 2
        assert message in capsys.readouterr().err
    path = write_lines(tmp_path / "c.jsonl", [row | {"category": "OCR"} for row in rows])
    result = score(capsys, path, "--task", "mme")
    assert result["metrics"]["perception"] == 200
    assert "no question is of existence, count" in result["note"] and "so the sums lack them" in result["note"]


def test_lmms_eval_averages_the_finer_categories_of_mmstar(tmp_path, capsys):
    question = {"question": "Which?\nA: red, B: blue", "answer": "B"}
    rows = [
        {"doc": question | {"index": i, "category": "math", "l2_category": finer}, "filtered_resps": [said]}
        for i, (finer, said) in enumerate(
            [("geometry", "B"), ("geometry", "b) blue"), ("geometry", "A"), ("recognition", "B")]
        )
    ]
    result = score(capsys, write_lines(tmp_path / "s.jsonl", rows), "--task", "mmstar")
    assert result["protocol"] == "lmms-eval" and result["metrics"]["accuracy"] == pytest.approx((200 / 3 + 100) / 2)
    assert result["protocols"]["lmms-eval-2026"]["metrics"]["accuracy"] == pytest.approx((100 / 3 + 100) / 2)
    assert result["protocols"]["mmstar"]["metrics"]["accuracy"] == 75  # of all questions, as by MMStar's own script
    assert result["protocols"]["letter"]["metrics"]["accuracy"] == 50
    for row in rows:
        del row["doc"]["l2_category"]
    result = score(capsys, write_lines(tmp_path / "s.jsonl", rows), "--task", "mmstar")
    assert (
        result["metrics"]["accuracy"] == 75
        and "no question is of a category that lmms-eval averages" in result["note"]
    )


def test_nan_in_json_is_an_empty_cell(tmp_path, capsys):
    """Pandas writes it so; as a text it is a part of `banana`."""
    rows = [row | {"C": math.nan, "D": math.nan, "category": math.nan} for row in CHOICES]
    rows[0] |= {"answer": "A", "A": "a banana", "prediction": "banana, or rather a banana"}
    result = score(capsys, write_lines(tmp_path / "n.jsonl", rows[:1]), "--task", "mmstar")
    assert result["metrics"]["accuracy"] == 100 and "nan" not in result["groups"]
    assert (
        main(["score", write_lines(tmp_path / "n.jsonl", [rows[0] | {"answer": math.nan}]), "--task", "mmstar"]) == 2
    )
    assert "answer is None (fix: give the annotated answer" in capsys.readouterr().err


def test_dates_are_not_scored_as_texts(tmp_path, capsys):
    """Excel makes them of `3/4`."""
    date = datetime.date(2026, 3, 4)
    chart = {"index": 1, "question": "When?", "answer": date, "prediction": "3/4", "split": "test_human"}
    said = chart | {"answer": "3/4", "prediction": date}
    for row, name in [(chart, "chartqa"), (said, "chartqa"), (CHOICES[0] | {"B": date}, "mmstar")]:
        assert main(["score", write_xlsx(tmp_path / "d.xlsx", [row]), "--task", name]) == 2
        assert "is datetime.datetime(2026, 3, 4, 0, 0) (fix: give" in capsys.readouterr().err


def test_open_questions_of_mmmu(tmp_path, capsys):
    """VLMEvalKit makes the annotated answer an option, and MMMU looks for its number in the conclusion."""
    rows = [
        {"index": 1, "question": "How many?", "answer": "24", "category": "Art", "prediction": "23.999"},
        {"index": 2, "question": "Which?", "answer": "B", "category": "Art", "prediction": "B"},
        {"index": 3, "question": "How many?", "answer": "5", "category": "Art", "prediction": "A"},
        {"index": 4, "question": "How many?", "answer": "7", "category": "Art", "prediction": "7 in all"},
    ]
    rows = [row | ({"A": "x", "B": "y"} if row["index"] == 2 else {"A": "", "B": ""}) for row in rows]
    result = score(capsys, write_xlsx(tmp_path / "m_MMMU_DEV_VAL.xlsx", rows), "--task", "mmmu")
    found = {name: scores["metrics"]["accuracy"] for name, scores in result["protocols"].items()}
    assert found == {"vlmevalkit": 75, "letter": 50, "vlmevalkit-2025": 75, "vlmevalkit-2026": 75} | {
        "mmmu": 75,
        "lmms-eval": 75,
        "evalscope": 75,
    }
    assert result["protocol"] == "vlmevalkit"


@pytest.mark.parametrize("write", [write_xlsx, write_table])
def test_a_table_without_a_single_answer_is_refused(tmp_path, capsys, write):
    suffix = "xlsx" if write is write_xlsx else "tsv"
    rows = [row | {"prediction": ""} for row in CHOICES[:3]]
    assert main(["score", str(write(tmp_path / f"m_MMStar.{suffix}", rows)), "--task", "mmstar"]) == 2
    assert "the prediction of each of 3 rows is empty (fix: " in capsys.readouterr().err
    said = [*rows[:2], rows[2] | {"prediction": "A"}]  # an empty answer among others is one, and wrong
    result = score(capsys, write(tmp_path / f"n_MMStar.{suffix}", said), "--task", "mmstar")
    assert result["num_questions"] == 3 and result["missing"] == 0


@pytest.mark.parametrize("said", ["", " \n", "nan", PROMPT])
def test_a_file_that_no_model_wrote_is_refused(pope, capsys, said):
    """POPE's rule takes for yes what is not no: 67.1 for the published questions."""
    folder, answers, _ = pope
    rows = [row | {"text": row["prompt"] if said == PROMPT else said} for row in answers]
    path = write_lines(folder / "empty.jsonl", rows)
    assert main(["score", path, *map(str, pope_arguments(folder))]) == 2
    message = {PROMPT: "is its question, the first ", "nan": "is empty or nan (fix: "}.get(said, "is empty (fix: ")
    assert f"the prediction of each of {len(rows)} rows {message}" in capsys.readouterr().err
    own = [{"question_id": i, "answer": said, "model": "0" * 64} for i in range(len(rows))]
    result = score(capsys, write_lines(folder / "predictions.jsonl", own), *pope_arguments(folder))
    assert result["num_questions"] == len(rows)  # what `evaluate` wrote is a model's, however little it said


def test_answers_without_words_are_counted_in_a_note(pope, capsys):
    folder, answers, _ = pope
    odd = ["", "nan", "\u00a0No", "TRUE", "A dog is there"]
    rows = [row | {"text": said} for row, said in zip(answers, odd, strict=False)] + answers[len(odd) :]
    result = score(capsys, write_lines(folder / "some.jsonl", rows), *pope_arguments(folder))
    assert result["note"].split("; ") == [
        f"2 of {len(rows)} answers are empty, or nan, and are scored as they stand",
        "5 answers have no word yes and count as yes by llava, which takes everything for it but no and not",
    ]
    assert "note" not in score(capsys, write_lines(folder / "all.jsonl", answers), *pope_arguments(folder))


def test_answers_that_say_nothing_to_a_rule_are_counted_whoever_wrote_them(tmp_path, capsys):
    """MME's rule reads four characters, and one space before each answer took 1531 to 398."""
    (tmp_path / "labels").mkdir()
    texts = ["Is it red?", "Is it blue?"]
    for category in ("OCR", "count"):
        lines = [f"1.jpg\t{text}\t{label}" for text, label in zip(texts, ("Yes", "No"), strict=True)]
        (tmp_path / "labels" / f"{category}.txt").write_text("\n".join(lines))
    answers = [
        {"question_id": f"{category}/1.jpg", "prompt": text + PROMPT, "text": said}
        for category in ("OCR", "count")
        for text, said in zip(texts, ("  Yes", "No"), strict=True)
    ]
    arguments = ["--task", "mme", "--annotations", tmp_path / "labels"]
    result = score(capsys, write_lines(tmp_path / "a.jsonl", answers), *arguments)
    assert result["unclear"] == 2 and result["note"].endswith("2 answers choose nothing by llava and are wrong here")


def test_whole_numbers_are_read_as_pandas_means_them(own, capsys):
    """A column of numbers with an empty cell is one of floats, and JSON has 3.0 for 3: right answers were wrong."""
    folder, arguments = own
    labels = [row | {"answer": str(i)} for i, row in enumerate(ROWS)]
    arguments = [*arguments[:-1], write_lines(folder / "n.jsonl", labels)]
    answers = [{"id": row["id"], "response": float(i)} for i, row in enumerate(ROWS)]
    answers[1]["response"] = 1.5
    result = score(capsys, write_lines(folder / "a.jsonl", answers), *arguments)
    assert result["metrics"] == {"accuracy": 87.5}
    write_lines(folder / "n.jsonl", [row | {"answer": float(row["answer"])} for row in labels])
    answers = [{"id": row["id"], "response": str(i)} for i, row in enumerate(ROWS)]
    assert score(capsys, write_lines(folder / "a.jsonl", answers), *arguments)["metrics"] == {"accuracy": 100}


def test_accents_may_be_characters_of_their_own(own, capsys):
    """macOS takes the accents of file names apart."""
    folder, arguments = own
    labels = [row | {"image": f"caf\u00e9{i}.png", "question": f"O\u00f9 {i}?"} for i, row in enumerate(ROWS)]
    arguments = [*arguments[:-1], write_lines(folder / "n.jsonl", labels)]
    answers = [
        {"question_id": f"cafe\u0301{i}.png", "prompt": f"Ou\u0300 {i}?" + PROMPT, "text": row["answer"]}
        for i, row in enumerate(ROWS)
    ]
    result = score(capsys, write_lines(folder / "a.jsonl", answers), *arguments)
    assert result["metrics"] == {"accuracy": 100} and result["missing"] == 0


def test_a_column_of_annotated_answers_is_named_where_it_is_scored(tmp_path, capsys):
    rows = [row | {"prediction": row["answer"]} for row in CHOICES]
    result = score(capsys, write_xlsx(tmp_path / "gold.xlsx", rows), "--task", "mmstar")
    note = f"the answer of each of {len(rows)} rows is the annotated one, letter for letter"
    assert note in result["note"].split("; ")
    rows[0]["prediction"] += "."
    result = score(capsys, write_xlsx(tmp_path / "said.xlsx", rows), "--task", "mmstar")
    assert "letter for letter" not in result.get("note", "")


@pytest.mark.parametrize("task", ["chartqa", "realworldqa", "docvqa"])
def test_annotated_answers_that_are_empty_are_refused(tmp_path, capsys, task):
    """A third of ChartQA's cells emptied took 58.7 to 39.0."""
    rows = [{"index": i, "question": f"What is {i}?", "answer": "A", "prediction": "A"} for i in range(4)]
    rows = [row | {"A": "red", "B": "blue"} if task == "realworldqa" else row for row in rows]
    rows[2]["answer"] = " "
    assert main(["score", write_table(tmp_path / "t.tsv", rows), "--task", task]) == 2
    error = capsys.readouterr().err
    assert "t.tsv:4: answer is '" in error and "the question has no answer (fix: give one, or remove the row)" in error


def test_a_question_that_occurs_twice_in_mmes_results_is_refused(tmp_path, capsys):
    """It has no id, and counted as a question of its own."""
    lines = ["1.jpg\tIs it red?\tYes\tYes", "1.jpg\tIs it blue?\tNo\tYes"]
    for number, more in enumerate((lines[:1], ["1.jpg\tIs it blue?\tNo\tNo"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "OCR.txt").write_text("\n".join([*lines, *more]))
        assert main(["score", str(folder), "--task", "mme"]) == 2
        error = capsys.readouterr().err
        assert "OCR.txt:3: 'Is it" in error and f"occurs twice, first in {folder / 'OCR.txt'}:{number + 1}" in error


def test_a_list_on_one_line_and_the_parts_of_several_gpus(own, capsys):
    folder, arguments = own
    answers = [{"id": row["id"], "response": row["answer"]} for row in ROWS]
    (folder / "list.jsonl").write_text(json.dumps(answers))
    assert score(capsys, folder / "list.jsonl", *arguments)["metrics"] == {"accuracy": 100}
    parts = folder / "parts"
    for part in range(2):
        write_lines(parts / f"2_{part}.jsonl", answers[part::2])
    whole = score(capsys, parts, *arguments)
    assert whole["metrics"] == {"accuracy": 100} and whole["missing"] == 0
    assert whole["note"] == "2_0.jsonl to 2_1.jsonl are read as one file"
    write_lines(parts / "merge.jsonl", answers)
    assert score(capsys, parts, *arguments)["note"].endswith("as one file; not read: merge.jsonl")
    for paths, fix in (
        ([parts / "2_*.jsonl"], "name the folder, if these are N_K.jsonl of N GPUs, or join them: cat"),
        ([parts / "2_0.jsonl", parts / "2_1.jsonl"], f"name {parts}, whose parts are read as one file"),
    ):
        assert main(["score", *map(str, paths), *arguments]) == 2
        assert fix in capsys.readouterr().err
    write_lines(parts / "2_1.jsonl", answers[:1])  # in 2_0 too
    assert main(["score", str(parts), *arguments]) == 2
    assert "question q0 has several answers" in capsys.readouterr().err
    fix = "(fix: keep the parts of one run, all of them, in a folder of their own)"
    (parts / "2_1.jsonl").unlink()
    assert main(["score", str(parts), *arguments]) == 2
    assert f"{parts}: lacks 2_1.jsonl of the parts of 2 GPUs {fix}" in capsys.readouterr().err
    write_lines(parts / "8_0.jsonl", answers)
    assert main(["score", str(parts), *arguments]) == 2
    assert f"{parts}: holds parts of 2 and of 8 GPUs {fix}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "fix"),
    [
        ("m_ChartQA_TEST_acc.csv", "split,Overall\nnone,58.7\n", "pass its answers, m_ChartQA_TEST.xlsx"),
        ("m_OCRBench_score.json", '{"Final Score": 458}', "pass its answers, m_OCRBench.xlsx"),
        ("20261130_results.json", '{"results": {}, "configs": {}}', "pass its samples, which --log_samples writes"),
    ],
)
def test_scores_are_refused_with_the_answers_to_pass(tmp_path, capsys, name, content, fix):
    (tmp_path / name).write_text(content)
    assert main(["score", str(tmp_path / name), "--task", "chartqa"]) == 2
    assert f"scores: {fix})" in capsys.readouterr().err


def test_earlier_and_judged_files_are_distinguished(tmp_path, capsys):
    rows = CHOICES[:3]
    result = score(capsys, write_xlsx(tmp_path / "m_MMStar_PREV.xlsx", rows), "--task", "mmstar")
    assert "earlier, perhaps unfinished run (_PREV)" in result["note"]
    judged = [row | {"hit": 1, "log": ""} for row in rows]
    result = score(capsys, write_xlsx(tmp_path / "m_MMStar_openai_result.xlsx", judged), "--task", "mmstar")
    assert "judge's verdicts (hit)" in result["note"]
    (tmp_path / "0_m.pkl").write_bytes(b"\x80\x04.")
    assert main(["score", str(tmp_path / "0_m.pkl"), "--task", "mmstar"]) == 2
    assert "a pickle, which can run code when it is opened, is not read" in capsys.readouterr().err


# --- other metrics


def test_charts_documents_points_and_figures(tmp_path, capsys):
    charts = [("14", "14.5", "human"), ("[2014, 2016]", "2016", "human"), ("Blue", "blue", "augmented")]
    rows = [
        {"index": i, "question": f"{i}?", "answer": gold, "split": split, "prediction": said}
        for i, (gold, said, split) in enumerate(charts)
    ]
    result = score(capsys, write_xlsx(tmp_path / "c.xlsx", rows), "--task", "chartqa")
    assert result["metrics"]["relaxed_accuracy"] == 100 and result["headline"] == "relaxed_accuracy"
    assert result["protocols"]["lmms-eval"]["metrics"]["relaxed_accuracy"] == pytest.approx(200 / 3)
    documents = [("['abcdef', 'x']", "abcxyz"), ("['total']", "Total")]
    rows = [
        {"index": i, "question": f"{i}?", "answer": gold, "prediction": said}
        for i, (gold, said) in enumerate(documents)
    ]
    result = score(capsys, write_xlsx(tmp_path / "d.xlsx", rows), "--task", "docvqa")
    assert result["metrics"]["anls"] == 75 and result["protocols"]["paper"]["metrics"]["anls"] == 50
    formula = "Handwritten Mathematical Expression Recognition"
    points = [("['CENTRE']", "a centre", "Digit String Recognition"), ("['x ^ 2']", "x^2", formula)]
    points.append(("['x']", "y", "Doc-oriented VQA"))
    rows = [
        {"index": i, "question": f"{i}?", "answer": gold, "category": category, "prediction": said}
        for i, (gold, said, category) in enumerate(points)
    ]
    result = score(capsys, write_xlsx(tmp_path / "o.xlsx", rows), "--task", "ocrbench")
    assert result["metrics"] == {"points": 2, "Text Recognition": 1} and result["groups"][formula]["points"] == 1


def test_hallusionbench_counts_figures_and_questions(tmp_path, capsys):
    # (figure, question) of one set: one wrong of six, which spoils one of three figures and one of two questions
    said = {(figure, question): "Yes" if question == 0 else "No" for figure in range(3) for question in range(2)}
    said[1, 1] = "Yes"
    rows = [
        {
            "index": f"VD_illusion_1_0_{figure}_{question}",
            "question": f"Is {question} so?",
            "answer": "Yes" if question == 0 else "No",
            "category": "VD",
            "l2-category": "VD_illusion",
            "prediction": text,
        }
        for (figure, question), text in said.items()
    ]
    result = score(capsys, write_xlsx(tmp_path / "h.xlsx", rows), "--task", "hallusionbench")
    assert result["metrics"] == pytest.approx({"aAcc": 500 / 6, "fAcc": 200 / 3, "qAcc": 50})
    rows[3]["index"] = rows[3]["index"].replace("illusion", "math")
    assert main(["score", write_xlsx(tmp_path / "i.xlsx", rows), "--task", "hallusionbench"]) == 2
    assert "index 'VD_math_1_0_1_1' is not of the row's category VD_illusion" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "protocol", "value"), [("vqav2", "vlmevalkit-2024", 50), ("textvqa", "m4c", 100)])
def test_samples_of_lmms_eval_are_scored_by_its_rule_of_the_task(tmp_path, capsys, name, protocol, value):
    """Its VQAv2 does not set `'s` apart and turns `a,b` into `b`, where TextVQA's rule makes `ab`."""
    rows = [
        {
            "doc": {"question_id": i, "question": "What is it?", "image_id": i, "answers": [gold] * 10},
            "filtered_resps": [said],
        }
        for i, (said, gold) in enumerate([("Red.", "red"), ("a,b", "ab")])
    ]
    if name == "vqav2":
        for row in rows:
            row["doc"]["answers"] = [{"answer": text, "answer_id": i} for i, text in enumerate(row["doc"]["answers"])]
    result = score(capsys, write_lines(tmp_path / f"{name}.jsonl", rows), "--task", name)
    assert (result["protocol"], result["metrics"]["accuracy"]) == (protocol, value)


# --- layouts of answers

ROWS = [
    {"id": f"q{i}", "image": f"{i // 2}.png", "question": f"What is {i}?", "answer": f"word {i}", "kind": "ab"[i % 2]}
    for i in range(8)
]
SAID = [row["answer"] if i % 4 else "wrong" for i, row in enumerate(ROWS)]
TASK = """
name: own
title: My own questions
protocol: plain
protocols:
  plain: {source: mine, metric: exact, rule: ignore-case, headline: accuracy}
  loose: {source: mine, metric: cer, summary: error_rate, called: cer, headline: cer}
layouts:
  - {name: rows, id: id, image: image, groups: [kind]}
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.yaml").write_text(TASK)
    return tmp_path, ["--task", str(tmp_path / "own.yaml"), "--annotations", write_lines(tmp_path / "q.jsonl", ROWS)]


def answers_in(layout, folder):
    pairs = list(zip(ROWS, SAID, strict=True))
    if layout == "id and response":
        return write_lines(folder / "a.jsonl", [{"id": row["id"], "response": said} for row, said in pairs])
    if layout == "question_id and prediction":
        rows = [{"question_id": row["id"], "prediction": said, "ground_truths": ["?"]} for row, said in pairs]
        (folder / "a.json").write_text(json.dumps(rows))
        return str(folder / "a.json")
    if layout == "LLaVA's answers":
        rows = [{"question_id": row["image"], "prompt": row["question"] + PROMPT, "text": said} for row, said in pairs]
        return write_lines(folder / "a.jsonl", rows[::-1])
    if layout == "lmms-eval's samples":
        rows = [
            {"doc": {"id": row["id"], "question": row["question"]}, "filtered_resps": [said]} for row, said in pairs
        ]
        return write_lines(folder / "samples.jsonl", rows)
    if layout == "lmms-eval's old logs":
        rows = [
            {"doc": {"id": row["id"], "question": row["question"]}, "filtered_resps": [said]} for row, said in pairs
        ]
        path = folder / "own.json"
        path.write_text(json.dumps({"args": {}, "model_configs": {}, "logs": rows, "time": "1"}, indent=4))
        return str(path)
    if layout == "EvalScope's predictions":
        rows = [
            {
                "index": i,
                "model": "m",
                "model_output": {"choices": [{"message": {"role": "assistant", "content": said}}]},
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {
                        "role": "user",
                        "content": [{"type": "image"}, {"type": "text", "text": row["question"] + PROMPT}],
                    },
                ],
            }
            for i, (row, said) in enumerate(pairs)
        ]
        return write_lines(folder / "own_default.jsonl", rows[::-1])
    if layout == "an object":
        (folder / "a.json").write_text(json.dumps({row["id"]: said for row, said in pairs}))
        return str(folder / "a.json")
    if layout == "columns":
        rows = [{"key": row["id"], "answer": "gold", "words": said} for row, said in pairs]
        return write_table(folder / "a.csv", rows, ",")
    rows = [{"index": row["id"], "question": row["question"], "prediction": said} for row, said in pairs]
    return write_table(folder / "a.tsv", rows)


@pytest.mark.parametrize(
    "layout",
    ["id and response", "question_id and prediction", "LLaVA's answers", "lmms-eval's samples", "lmms-eval's old logs"]
    + ["EvalScope's predictions", "an object", "columns", "VLMEvalKit's predictions"],
)
def test_every_layout_of_answers_gives_the_same_score(own, capsys, layout):
    folder, arguments = own
    path = answers_in(layout, folder)
    more = ["--columns", "id=key,answer=words"] if layout == "columns" else []
    result = score(capsys, path, *arguments, *more)
    assert result["metrics"] == {"accuracy": 75.0} and result["num_questions"] == 8
    assert result["groups"] == {"a": {"accuracy": 50.0}, "b": {"accuracy": 100.0}}
    expected = {"lmms-eval's old logs": "lmms-eval's samples", "columns": "columns id=key, answer=words"}
    expected["an object"] = "question_id and prediction"
    assert result["layout"] == expected.get(layout, layout)


def vizwiz_files(folder, *, ids_are_images):
    """LLaVA's upload file, and annotations that name images or whose ids do."""
    names = [f"VizWiz_val_{i:08}.jpg" for i in range(6)]
    rows = [
        {"question": "What is this?", "answers": [f"word {i}"] * 10}
        | ({"question_id": name[:-4]} if ids_are_images else {"question_id": i, "image": name})
        for i, name in enumerate(names)
    ]
    said = [{"image": name, "answer": "wrong" if i == 2 else f"word {i}"} for i, name in enumerate(names)]
    (folder / "upload.json").write_text(json.dumps(random.Random(0).sample(said, 6)))
    return said, [folder / "upload.json", "--task", "vizwiz", "--annotations", write_lines(folder / "v.jsonl", rows)]


@pytest.mark.parametrize("ids_are_images", [False, True])
def test_a_file_for_vizwizs_server_is_read_by_its_images(tmp_path, capsys, ids_are_images):
    said, arguments = vizwiz_files(tmp_path, ids_are_images=ids_are_images)
    result = score(capsys, *arguments)
    assert result["metrics"]["accuracy"] == pytest.approx(100 * 5 / 6) and result["missing"] == 0
    assert (result["layout"], result["protocol"]) == ("images and answers", "m4c")
    assert "normal form already" in result["note"]
    (tmp_path / "upload.json").write_text(json.dumps(said[1:3]))
    part = score(capsys, *arguments, code=3)
    assert part["metrics"]["accuracy"] == 50 and part["missing"] == 4


def test_answers_by_image_are_refused_where_an_image_has_two_questions_or_two_answers(tmp_path, capsys):
    said, arguments = vizwiz_files(tmp_path, ids_are_images=False)
    for rows, message in [
        ([*said, said[0]], "question 0 has several answers"),
        ([*said, {"image": "other.jpg", "answer": "a"}], "not annotated, the first image 'other.jpg' (fix"),
    ]:
        (tmp_path / "upload.json").write_text(json.dumps(rows))
        assert main(["score", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
    questions = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    write_lines(tmp_path / "v.jsonl", [*questions, questions[3] | {"question_id": 9, "question": "Which?"}])
    (tmp_path / "upload.json").write_text(json.dumps(said))
    assert main(["score", *map(str, arguments)]) == 2
    assert "2 annotated questions could be meant by image 'VizWiz_val_00000003.jpg' (fix" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row",
    [
        {"question_id": "q1", "answer": "word 1", "text": "mine"},
        {"question_id": "q1", "question": "What is 1?", "answer": "word 1", "text": "mine"},
        {"id": "q1", "answer": "word 1", "text": "mine"},
        {"id": "q1", "response": "a", "prediction": "b"},
    ],
)
def test_a_gold_answer_is_never_scored(own, capsys, row):
    folder, arguments = own
    path = write_lines(folder / "a.jsonl", [row])
    assert main(["score", path, *arguments]) == 2
    assert "the row does not tell which of" in capsys.readouterr().err
    words = [name for name in row if name in ("text", "response")][0]
    named = next(name for name in ("question_id", "id") if name in row)
    result = score(capsys, path, *arguments, "--columns", f"id={named},answer={words}", code=3)
    assert result["metrics"]["accuracy"] == 0 and result["missing"] == 7


def test_evalscopes_numbers_tell_questions_of_the_same_words_apart(own, capsys):
    folder, arguments = own
    same = [row | {"question": "What is it?"} for row in ROWS]
    write_lines(folder / "q.jsonl", same)
    path = Path(answers_in("EvalScope's predictions", folder))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["messages"][1]["content"][1]["text"] = "What is it?" + PROMPT
    assert score(capsys, write_lines(path, rows), *arguments)["metrics"] == {"accuracy": 75.0}
    rows[2]["messages"][1]["content"][1]["text"] = "Who is it?"
    assert main(["score", write_lines(path, rows), *arguments]) == 2
    assert "8 annotated questions could be meant" in capsys.readouterr().err


def evalscope_rows(asked, said):
    """EvalScope's predictions: its prompt around each question, numbered from 0."""
    prompt = 'Answer the question.\n{}\nThe last line of your response should be of the form "ANSWER: [ANSWER]".'
    return [
        {
            "index": number,
            "model_output": {"choices": [{"message": {"content": answer}}]},
            "messages": [{"role": "user", "content": [{"type": "text", "text": prompt.format(question)}]}],
        }
        for number, (question, answer) in enumerate(zip(asked, said, strict=True))
    ]


@pytest.mark.parametrize(
    ("task", "labels", "said", "scores"),  # under evalscope and another protocol
    [
        ("docvqa", [["A cat"], ["dog"]], ["I see it.\nANSWER: a cat", "dog"], ("anls", 100, "vlmevalkit", 50)),
        ("chartqa", ["45", "red"], ["It grows.\n**Answer: 44**", "red"], ("relaxed_accuracy", 50, "lmms-eval", 50)),
        ("realworldqa", ["B", "7"], ["ANSWER: b", "7"], ("accuracy", 50, "letter", 0)),
        ("mmstar", ["B", "A"], ["A is blue, so\nANSWER: B", "ANSWER: A, B"], ("accuracy", 50, "letter", 0)),
        ("pope", ["yes", "no"], ["YES", "no dog"], ("accuracy", 50, "vlmevalkit", 100)),
    ],
)
def test_evalscopes_answers_are_scored_by_its_own_rules(tmp_path, capsys, task, labels, said, scores):
    asked = [f"What is {i}?" + ("\nOptions: A: red, B: blue" if task == "mmstar" else "") for i in range(2)]
    rows = [
        {"image": f"{i}.png", "question": question, "answers" if task == "docvqa" else "answer": label}
        | {"questionId": str(60 + i), "question_types": ["form"], "type": "human", "image_path": f"{i}.png"}
        | {"index": i, "id": str(i), "image_source": f"{i}", "category": "math", "l2_category": "geometry"}
        for i, (question, label) in enumerate(zip(asked, labels, strict=True))
    ]
    fields = {"docvqa": ("questionId", "question_types"), "chartqa": ("type",), "realworldqa": ("image_path",)}
    fields |= {"mmstar": ("index", "category", "l2_category"), "pope": ("id", "image_source", "category")}
    kept = {"image", "question", "answer", "answers", *fields[task]}
    labels = write_lines(tmp_path / "q.jsonl", [{name: row[name] for name in row if name in kept} for row in rows])
    path = write_lines(tmp_path / f"{task}_default.jsonl", evalscope_rows(asked, said))
    result = score(capsys, path, "--task", task, "--annotations", labels)
    name, value, other, under_it = scores
    assert result["protocol"] == "evalscope" and result["metrics"][name] == value
    assert result["protocols"][other]["metrics"][name] == under_it
    # no note that says whose rule this is
    assert result.get("note", "") in ("", "1 answers choose nothing by evalscope and are wrong here")


def test_evalscopes_numbers_start_again_in_each_category(own, capsys):
    folder, arguments = own
    rows = [row | {"question": f"What is {i // 2 % 3}{row['kind']}?"} for i, row in enumerate(ROWS)]
    write_lines(folder / "q.jsonl", rows)
    asked = [row["question"] for row in rows if row["kind"] == "b"]
    predictions = evalscope_rows(asked, ["word 1", "wrong", "word 5", "word 7"])
    path = folder / "answers.jsonl"
    result = score(capsys, write_lines(path, predictions[::-1]), *arguments, code=3)
    assert result["groups"] == {"b": {"accuracy": 75.0}} and result["missing"] == 4
    predictions[2]["messages"][0]["content"][0]["text"] = "What is 9?"
    assert main(["score", write_lines(path, predictions), *arguments]) == 2
    assert "are to questions that are not annotated" in capsys.readouterr().err


def test_evalscopes_categories_that_ask_the_same_are_told_apart_by_the_files_name(tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(TASK)
    rows = [row | {"id": i, "question": "What is it?", "kind": "ab"[i // 4]} for i, row in enumerate(ROWS)]
    arguments = ["--task", tmp_path / "own.yaml", "--annotations", write_lines(tmp_path / "q.jsonl", rows)]
    predictions = evalscope_rows(["What is it?"] * 4, ["word 4", "word 5", "wrong", "word 7"])
    result = score(capsys, write_lines(tmp_path / "own_b.jsonl", predictions), *arguments, code=3)
    assert result["metrics"] == {"accuracy": 75.0} and set(result["missing_ids"]) == {0, 1, 2, 3}
    # the numbers are ids of questions of a, which are asked in the same words
    path = write_lines(tmp_path / "renamed.jsonl", predictions)
    assert main(["score", path, *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert "several categories ask what the rows ask, in the same order (fix: name the file as EvalScope does" in said


def test_evalscope_shows_images_in_the_place_of_their_names(own, capsys):
    folder, arguments = own
    write_lines(folder / "q.jsonl", [ROWS[0] | {"question": "Which of <image 1>, and (<image 2>) is it?"}])
    predictions = evalscope_rows([""], ["word 0"])
    parts = [{"type": "text", "text": text} for text in ("Solve it.\nWhich of ", ", and (", ") is it?\nA) this")]
    image = {"type": "image", "image": "data:"}
    predictions[0]["messages"][0]["content"] = [parts[0], image, parts[1], image, parts[2]]
    path = folder / "own.jsonl"
    assert score(capsys, write_lines(path, predictions), *arguments)["metrics"] == {"accuracy": 100.0}
    parts[1]["text"] = ", or ("
    assert main(["score", write_lines(path, predictions), *arguments]) == 2
    assert "not annotated" in capsys.readouterr().err


def test_evalscopes_reviews_are_refused_by_name(own, capsys):
    folder, arguments = own
    review = {
        "index": 0,
        "input": "What is 0?",
        "target": "word 0",
        "sample_score": {"score": {"value": {"acc": 1.0}}},
    }
    assert main(["score", write_lines(folder / "own_default.jsonl", [review]), *arguments]) == 2
    assert "EvalScope's reviews, which are scored already (fix: pass the file of the same" in capsys.readouterr().err


def test_a_benchmark_that_evalscope_scores_otherwise_says_so(tmp_path, capsys):
    row = {"index": "VD_illusion_1_0_0_0", "question": "Is it?", "answer": "yes", "image": "a.png", "category": "VD"}
    labels = write_lines(tmp_path / "h.jsonl", [row | {"l2-category": "illusion", "image_path": "a.png"}])
    path = write_lines(tmp_path / "p.jsonl", evalscope_rows(["Is it?"], ["YES"]))
    result = score(capsys, path, "--task", "hallusionbench", "--annotations", labels)
    assert result["metrics"]["aAcc"] == 100 and result["note"] == "none of these protocols is EvalScope's"


def test_columns_lead_into_rows_as_servers_log_them(own, capsys):
    folder, arguments = own

    def logged(said):
        return {"status_code": 200, "body": {"choices": [{"message": {"role": "assistant", "content": said}}]}}

    rows = [{"custom_id": row["id"], "response": logged(said)} for row, said in zip(ROWS, SAID, strict=True)]
    columns = ["--columns", "id=custom_id,answer=response.body.choices.0.message.content"]
    path = write_lines(folder / "batch.jsonl", rows)
    assert score(capsys, path, *arguments, *columns)["metrics"] == {"accuracy": 75.0}
    rows[3]["response"] = {"status_code": 500, "body": {"error": "?"}}
    assert main(["score", write_lines(folder / "batch.jsonl", rows), *arguments, *columns]) == 2
    assert "batch.jsonl:4: no response.body.choices.0.message.content: the row has" in capsys.readouterr().err
    rows[3]["response"] = logged(None)
    result = score(capsys, write_lines(folder / "batch.jsonl", rows), *arguments, *columns, code=3)
    assert result["failed_ids"] == {"q3": "no answer"}


def test_samples_of_a_benchmark_that_lmms_eval_scores_otherwise_say_so(tmp_path, capsys):
    doc = {"question": "Is it?", "gt_answer": "1", "category": "VD", "subcategory": "chart", "visual_input": "1"}
    rows = [
        {"doc": doc | {"set_id": "0", "figure_id": "1", "question_id": i}, "filtered_resps": ["Yes"]} for i in "01"
    ]
    result = score(capsys, write_lines(tmp_path / "h.jsonl", rows), "--task", "hallusionbench")
    assert "lmms-eval scores hallusionbench by a rule that is none of these protocols" in result["note"]


def test_rows_without_ids_and_images_are_taken_by_place_if_each_asks_what_is_asked_there(own, capsys):
    """POPE's own answers: a question and an answer a row, in the order of the labels, most questions several times."""
    folder, arguments = own
    asked = [row | {"question": f"Is there a {'dog' if i % 3 else 'cat'} in the image?"} for i, row in enumerate(ROWS)]
    write_lines(folder / "q.jsonl", asked)
    rows = [{"question": row["question"], "answer": said} for row, said in zip(asked, SAID, strict=True)]
    columns = ["--columns", "question=question,answer=answer"]
    result = score(capsys, write_lines(folder / "a.jsonl", rows), *arguments, *columns)
    assert result["metrics"] == {"accuracy": 75.0} and result["missing"] == 0
    assert main(["score", write_lines(folder / "a.jsonl", rows), *arguments]) == 2  # whose answer it is has to be said
    assert "--columns" in capsys.readouterr().err
    for others in (rows[1:], rows[1:] + rows[:1]):
        assert main(["score", write_lines(folder / "a.jsonl", others), *arguments, *columns]) == 2
        assert "annotated questions could be meant" in capsys.readouterr().err


def test_an_answer_beside_the_words_of_a_model_is_the_annotators(own, capsys):
    folder, arguments = own
    rows = [{"id": row["id"], "answer": row["answer"], "response": said} for row, said in zip(ROWS, SAID, strict=True)]
    assert score(capsys, write_lines(folder / "a.jsonl", rows), *arguments)["metrics"]["accuracy"] == 75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--columns", "id=key"], "--columns: names no answer"),
        (["--columns", "answer=words,name=key"], "--columns: names name"),
        (["--columns", "answer=nothing"], "no nothing: the row has index, question, prediction"),
    ],
)
def test_bad_columns_are_named(own, capsys, arguments, message):
    folder, options = own
    assert main(["score", answers_in("VLMEvalKit's predictions", folder), *options, *arguments]) == 2
    assert message in capsys.readouterr().err


MMMU_LABELS = {
    "validation_Art_1": {"question_type": "multiple-choice", "ground_truth": "B"},
    "validation_Art_2": {"question_type": "multiple-choice", "ground_truth": "A"},
    "validation_Math_1": {"question_type": "short-answer", "ground_truth": ["$6,000", "6000 dollars"]},
    "validation_Math_2": {"question_type": "short-answer", "ground_truth": "C"},
}
MMMU_SAID = ["B", "It is none of all those that are shown", "so it is 6000 Dollars", "C chord"]


def test_labels_and_predictions_of_mmmu_are_read_as_its_evaluator_takes_them(tmp_path, capsys):
    """Its labels are an object of ids, without questions and options; some open questions have several answers."""
    labels, said = tmp_path / "answer_dict_val.json", tmp_path / "total_val_output.json"
    labels.write_text(json.dumps(MMMU_LABELS))
    said.write_text(json.dumps(dict(zip(MMMU_LABELS, MMMU_SAID, strict=True))))
    result = score(capsys, said, "--task", "mmmu", "--annotations", labels)
    assert result["protocol"] == "mmmu" and result["num_questions"] == 4 and result["metrics"]["accuracy"] == 75
    said.write_text(json.dumps(dict(zip(list(MMMU_LABELS)[:2], MMMU_SAID, strict=False))))
    assert score(capsys, said, "--task", "mmmu", "--annotations", labels, code=3)["missing"] == 2
    # they cannot be asked, and are no answers
    with pytest.raises(UserError, match="answers without questions"):
        load_task_questions(load_task("mmmu"), labels)
    assert main(["score", str(labels), "--task", "mmmu", "--annotations", str(labels)]) == 2
    assert "no question_id, or no answer" in capsys.readouterr().err


def test_outputs_of_mmmu_are_read_by_subject(tmp_path, capsys):
    options = {"A": "black", "B": "green", "C": "blue"}
    rows = [
        {"id": name, "answer": label["ground_truth"], "question_type": label["question_type"], "response": said}
        | ({"all_choices": list(options), "index2ans": options} if label["question_type"] != "short-answer" else {})
        for (name, label), said in zip(MMMU_LABELS.items(), MMMU_SAID, strict=True)
    ]
    rows[1]["response"] = "I would say that this one is black"
    for subject, part in (("Art", rows[:2]), ("Math", rows[2:])):
        (tmp_path / subject).mkdir()
        (tmp_path / subject / "output.json").write_text(json.dumps(part))
    result = score(capsys, tmp_path, "--task", "mmmu")
    assert result["protocol"] == "mmmu" and result["metrics"]["accuracy"] == 100
    assert result["groups"].keys() == {"Art", "Math"}
    one = score(capsys, tmp_path / "Art" / "output.json", "--task", "mmmu")
    assert one["num_questions"] == 2 and "2 of mmmu's 900 questions" in one["note"]


def seed_rows():
    """SEED-Bench.json has videos too, and question 49914 twice."""
    row = {"choice_a": "red", "choice_b": "blue", "choice_c": "green", "choice_d": "None", "data_type": "image"}
    rows = [row | {"question_id": name, "question": f"Which {name}?", "answer": "D"} for name in ("1", "49914", "2")]
    rows.append(dict(rows[1]))
    return [*rows, rows[0] | {"question_id": "v1", "data_type": "video"}]


def test_seed_bench_is_read_as_llavas_script_reads_it(tmp_path, capsys):
    """The published upload has the doubled question twice, and was refused; videos counted with the images."""
    labels = tmp_path / "SEED-Bench.json"
    labels.write_text(json.dumps({"question_type": {"Scene Understanding": 1}, "questions": seed_rows()}))
    said = [{"question_id": row["question_id"], "prediction": "D"} for row in seed_rows()]
    said[0]["prediction"] = "A"
    upload = write_lines(tmp_path / "upload.jsonl", said)
    result = score(capsys, upload, "--task", "seed-img", "--annotations", labels)
    assert result["num_questions"] == 4 and result["left_out"] == 1 and result["metrics"]["accuracy"] == 75
    # as in LLaVA's script the last answer is that of both rows
    last = write_lines(tmp_path / "last.jsonl", [*said[:3], said[3] | {"prediction": "B"}])
    assert score(capsys, last, "--task", "seed-img", "--annotations", labels)["metrics"]["accuracy"] == 25
    once = write_lines(tmp_path / "once.jsonl", said[:3])
    assert score(capsys, once, "--task", "seed-img", "--annotations", labels)["metrics"]["accuracy"] == 75
    # `evaluate` asks both rows, and names the second one
    own = [{"question_id": key, "answer": "D", "ended": "stop"} for key in ("1", "49914", "2")]
    own = write_lines(tmp_path / "own.jsonl", [*own, own[1] | {"question_id": "49914#2", "answer": "A"}])
    assert score(capsys, own, "--task", "seed-img", "--annotations", labels)["metrics"]["accuracy"] == 75
    # so do answers whose rows hold the questions
    held = write_lines(tmp_path / "held.jsonl", [row | {"prediction": "D"} for row in seed_rows()])
    assert score(capsys, held, "--task", "seed-img")["num_questions"] == 4
    docs = [{"doc_id": i, "doc": row, "target": "D", "filtered_resps": ["D"]} for i, row in enumerate(seed_rows())]
    result = score(capsys, write_lines(tmp_path / "docs.jsonl", docs), "--task", "seed-img")
    assert result["num_questions"] == 4 and result["metrics"]["accuracy"] == 100
    # another question's second answer is refused
    twice = write_lines(tmp_path / "twice.jsonl", [*said, said[0]])
    assert main(["score", twice, "--task", "seed-img", "--annotations", str(labels)]) == 2
    assert "question 1 has several answers" in capsys.readouterr().err


def test_a_letter_is_right_where_vlmevalkits_table_lost_the_option(tmp_path, capsys):
    """Pandas reads the option `None` as an empty cell; LLaVA's script and lmms-eval compare letters alone."""
    table = [
        {"index": int(row["question_id"]), "question": row["question"], "answer": right, "A": "red", "B": "blue"}
        for row, right in zip(seed_rows()[:3], "ADB", strict=True)
    ]
    # the table has the doubled question once
    said = [{"question_id": row["question_id"], "prediction": "D"} for row in seed_rows()[:4]]
    answers = write_lines(tmp_path / "a.jsonl", said)
    options = ["--task", "seed-img", "--annotations", write_xlsx(tmp_path / "t.xlsx", table)]
    result = score(capsys, answers, *options)
    assert result["num_questions"] == 3 and result["metrics"]["accuracy"] == pytest.approx(100 / 3)
    assert result["protocols"]["lmms-eval"]["metrics"]["accuracy"] == pytest.approx(100 / 3)
    assert result["protocols"]["vlmevalkit"]["metrics"]["accuracy"] == 0
    assert "so no answer to them is right by a rule that looks for options" in result["note"]


def test_benchmarks_own_label_files_are_read(tmp_path, capsys):
    """GQA's and ScienceQA's are objects of ids, which were refused; ChartQA's and OCRBench's have their own fields."""

    def scored(task, labels, answers, name="labels.json"):
        (tmp_path / name).write_text(json.dumps(labels))
        path = write_lines(tmp_path / "answers.jsonl", answers)
        return score(capsys, path, "--task", task, "--annotations", tmp_path / name)

    gqa = {
        str(i): {"question": f"Is it {i}?", "imageId": f"n{i}", "answer": "no", "fullAnswer": "No, it is not"}
        for i in range(3)
    }
    said = [{"question_id": str(i), "prompt": f"Is it {i}?" + PROMPT, "text": text} for i, text in enumerate("abc")]
    said[1]["text"] = "No."
    assert scored("gqa", gqa, said)["metrics"]["accuracy"] == pytest.approx(100 / 3)

    problem = {"choices": ["x", "y"], "answer": 1, "hint": "", "image": "image.png", "subject": "s", "split": "test"}
    problems = {str(i): problem | {"question": f"Which {i}?"} for i in range(4)}
    problems["0"]["split"], problems["1"]["split"], problems["2"]["image"] = "train", "val", None
    said = [{"question_id": i, "prompt": f"Which {i}?\nA. x\nB. y", "text": "B"} for i in "23"]
    assert scored("scienceqa", problems, said)["metrics"]["accuracy"] == 100
    result = scored("scienceqa-img", problems, said)
    assert result["num_questions"] == 1 and result["left_out"] == 1

    chart = [{"imgname": f"{i}.png", "query": "How many?", "label": "4"} for i in range(2)]
    said = [{"question_id": f"{i}.png", "prompt": "How many?" + PROMPT, "text": "4.1"} for i in range(2)]
    result = scored("chartqa", chart, said, "test_human.json")
    assert result["metrics"]["relaxed_accuracy"] == 100 and result["groups"].keys() == {"human"}

    # OCRBench's own script keeps the labels beside what the model said
    kind = "Handwritten Mathematical Expression Recognition"
    row = {"dataset_name": "HME100k", "question": "Write it.", "type": kind}
    rows = [
        row | {"id": i, "image_path": f"{i}.png", "answers": "x y", "predict": said}
        for i, said in enumerate(["x", "xy"])
    ]
    rows[0] |= {"answers": ["a", "x"], "result": 0}
    result = score(capsys, write_lines(tmp_path / "o.jsonl", rows), "--task", "ocrbench")
    assert result["metrics"]["points"] == 2 and "2 of ocrbench's 1,000 questions" in result["note"]


def test_vqas_pair_of_files_annotates_a_task(tmp_path, capsys):
    """The two files went with TextVQA alone, where no task is named."""
    annotations = [{"question_id": i, "image_id": 7, "answers": [{"answer": "net"}] * 10} for i in range(2)]
    questions = [{"question_id": i, "image_id": 7, "question": f"What is {i}?"} for i in range(2)]
    (tmp_path / "a.json").write_text(json.dumps({"info": {}, "annotations": annotations}))
    (tmp_path / "q.json").write_text(json.dumps({"info": {}, "questions": questions}))
    said = [
        {"question_id": i, "prompt": f"What is {i}?" + PROMPT, "text": text} for i, text in enumerate(["net", "a"])
    ]
    path, pair = write_lines(tmp_path / "s.jsonl", said), ["--task", "vqav2", "--annotations", tmp_path / "a.json"]
    result = score(capsys, path, *pair, "--questions", tmp_path / "q.json")
    assert result["protocol"] == "m4c" and result["metrics"]["accuracy"] == 50
    assert main(["score", path, *map(str, pair)]) == 2
    assert "annotations without their questions (fix: name the file with --questions)" in capsys.readouterr().err


def test_answers_that_vlmevalkit_gives_to_a_judge_are_counted(tmp_path, capsys):
    """Its figure with a judge differs by them; without the count nobody saw why."""
    rows = [row | {"prediction": "['A']"} for row in CHOICES]
    result = score(capsys, write_xlsx(tmp_path / "m_MMStar.xlsx", rows), "--task", "mmstar")
    num_unclear = result["unclear"]
    assert num_unclear == result["protocols"]["letter"]["unclear"] == len(rows) and result["metrics"]["accuracy"] == 0
    assert f"{num_unclear} answers choose nothing by vlmevalkit and are wrong here; where VLMEvalKit" in result["note"]
    rows = [row | {"prediction": row["answer"]} for row in CHOICES]
    result = score(capsys, write_xlsx(tmp_path / "m_MMStar.xlsx", rows), "--task", "mmstar")
    assert result["unclear"] == 0 and "a language model" not in result.get("note", "")
    pairs = [{"index": i, "question": "Is it?", "answer": "Yes", "category": "OCR"} for i in range(2)]
    pairs = [row | {"image_path": "a", "prediction": said} for row, said in zip(pairs, ["Yes", "Maybe"], strict=True)]
    result = score(capsys, write_lines(tmp_path / "m.jsonl", pairs), "--task", "mme")
    assert result["unclear"] == 1 and "1 answers choose nothing by vlmevalkit" in result["note"]


def test_a_refusal_names_the_file_that_is_missing_or_half_annotated(tmp_path, capsys):
    labels = [{"question_id": i, "image": f"image{i}.jpg", "text": "Is it?", "label": "yes"} for i in range(2)]
    write_lines(tmp_path / "coco_pope_random.json", labels)
    said = write_lines(tmp_path / "a.jsonl", [{"question_id": 1, "prompt": "Is it?" + PROMPT, "text": "Yes"}])
    assert main(["score", said, "--task", "pope", "--annotations", str(tmp_path / "coco_pope_random.json")]) == 2
    assert "(fix: pass the questions that LLaVA's scripts asked as --questions" in capsys.readouterr().err
    write_lines(tmp_path / "coco_pope_popular.json", labels)
    said = write_lines(
        tmp_path / "a.jsonl", [{"question_id": 1, "image": "image0.jpg", "prompt": "Is it?", "text": "no"}]
    )
    assert main(["score", said, "--task", "pope", "--annotations", str(tmp_path)]) == 2
    assert "category: pass the annotations of popular or random alone" in capsys.readouterr().err
    rows = [{"index": i, "question": "?", "A": "x", "answer": "A" if i else None, "prediction": "A"} for i in range(2)]
    assert main(["score", write_lines(tmp_path / "m.jsonl", rows), "--task", "mmmu"]) == 2
    assert "m.jsonl:1: 1 of 2 questions have no annotated answer" in capsys.readouterr().err


def test_labels_are_not_scored_as_answers(tmp_path, capsys):
    """MME's, POPE's and SEED-Bench's call the right answer `answer`, and scored 100."""
    rows = [{"question_id": i, "question": f"Is it {i}?", "answer": "Yes", "category": "OCR"} for i in range(4)]
    labels = write_lines(tmp_path / "labels.jsonl", rows)
    for arguments in (["--annotations", labels], []):
        assert main(["score", labels, "--task", "mme", *arguments]) == 2
        assert "these are labels: the answer of each of 4 rows is the annotated one" in capsys.readouterr().err
    # one that differs is a model's, and so is what `evaluate` wrote, be it all right
    said = [row | {"answer": "no"} if i == 3 else row for i, row in enumerate(rows)]
    path = write_lines(tmp_path / "a.jsonl", said)
    assert score(capsys, path, "--task", "mme", "--annotations", labels)["metrics"]["accuracy"] == 75
    path = write_lines(tmp_path / "p.jsonl", [row | {"model": "r"} for row in rows])
    assert score(capsys, path, "--task", "mme", "--annotations", labels)["metrics"]["accuracy"] == 100


DOCS = {
    "chartqa": {"type": "human_test", "question": "How many?", "answer": "0"},
    "ocrbench": {"dataset": "IIIT5K", "question_type": "Regular Text Recognition", "question": "?", "answer": ["0"]},
    "ai2d": {"question": "Which?", "options": ["x", "y"], "answer": "0"},
    "scienceqa-img": {"question": "Which?", "choices": ["x", "y"], "answer": 0, "hint": "", "subject": "s"},
}


@pytest.mark.parametrize("name", DOCS)
def test_samples_of_lmms_eval_hold_their_labels_where_their_questions_have_no_name(tmp_path, capsys, name):
    """Charts and diagrams share their questions, and lmms-eval keeps neither images nor their names."""
    right, changed = ("A", 1) if name in ("ai2d", "scienceqa-img") else ("0", "7")
    rows = [{"doc_id": i, "doc": DOCS[name], "filtered_resps": [right], "target": "?"} for i in range(4)]
    answer = [changed] if name == "ocrbench" else changed
    rows[2] = rows[2] | {"doc": DOCS[name] | {"answer": answer}}
    path = write_lines(tmp_path / "a.jsonl", rows)
    result = score(capsys, path, "--task", name)
    assert result["metrics"][result["headline"]] == (3 if name == "ocrbench" else 75)
    assert result["num_questions"] == 4 and result["low"] < result["high"]
    assert ("which questions have an image" in result.get("note", "")) == (name == "scienceqa-img")
    # another order, as of several processes, is the same questions; another data set is not
    shuffled = write_lines(tmp_path / "b.jsonl", rows[::-1])
    assert score(capsys, path, shuffled, "--task", name)["tied"] == 4
    other = write_lines(tmp_path / "c.jsonl", [row | {"doc_id": 3 - row["doc_id"]} for row in rows])
    assert main(["score", path, other, "--task", name]) == 2
    assert f"{name}: question 1 is " in capsys.readouterr().err


CHOOSE = "Which?\nA. x\nB. y\nAnswer with the option's letter from the given choices directly."
# task -> what lmms-eval's metrics keep of a question, its prompt, its annotated answer and a wrong one
KEPT = {
    "ai2d": ({"exact_match": 1.0}, CHOOSE, "A", "B"),
    "chartqa": ({"relaxed_overall": 1.0}, "How many?\nAnswer the question with a single word.", "0", "7"),
    "docvqa": ({"anls": {"questionId": 9, "answer": "0"}}, "Who?" + PROMPT, "['word', 'other']", "12"),
    "gqa": ({"exact_match": 1.0}, "Who?" + PROMPT, "man", "woman"),
    "infovqa": ({"anls": 1.0}, "Who?" + PROMPT, "['word']", "12"),
    "mme": ({"mme_perception_score": {"question_id": "OCR/1.png", "category": "OCR"}}, "Is it?", "Yes", "No"),
    "mmmu": ({"mmmu_acc": {"id": "validation_Art_1", "subdomain": "Art"}}, "<image> " + CHOOSE, "A", "B"),
    "mmstar": ({"average": {"question_id": 1, "l2_category": "geometry"}}, "Which?\nOptions: A: x, B: y", "A", "B"),
    "ocrbench": (
        {"ocrbench_accuracy": {"question_type": "Handwritten Mathematical Expression Recognition"}},
        "Read.",
        "['x y']",
        "X y",
    ),
    "pope": ({"pope_accuracy": {"question_id": "1", "score": 1.0}}, "Is there a cat?", "yes", "no"),
    "realworldqa": ({"exact_match": 1.0}, CHOOSE, "A", "B"),
    "scienceqa-img": ({"exact_match": 1.0}, "Context: none\n" + CHOOSE, "A", "B"),
    "seed-img": ({"seed_image": {"question_id": "1"}, "seed_all": {"question_id": "1"}}, CHOOSE, "A", "B"),
}


def kept_rows(name, count=4):
    """Samples without `doc`, as lmms-eval writes them since its 0.4; the last is wrong."""
    metrics, asked, answer, wrong = KEPT[name]
    right = answer.strip("[]'").split("', '")[0]
    rows = [{"doc_id": i, "target": answer, "filtered_resps": right, "input": asked, **metrics} for i in range(count)]
    rows[-1]["filtered_resps"] = [wrong]
    return rows


@pytest.mark.parametrize("name", KEPT)
def test_samples_of_lmms_eval_hold_prompt_and_target_in_the_place_of_the_question(tmp_path, capsys, name):
    """Since its 0.4 lmms-eval drops the question; these files were refused as none that it writes."""
    result = score(capsys, write_lines(tmp_path / "s.jsonl", kept_rows(name)), "--task", name)
    expected = 3 if name == "ocrbench" else 75  # MME: 75 and 0, as the one image has a wrong answer
    assert result["layout"] == "lmms-eval's samples" and result["num_questions"] == 4
    if name == "pope":
        assert result["metrics"] == pytest.approx(
            {"accuracy": 75, "precision": 100, "recall": 75, "f1": 600 / 7, "yes_ratio": 75}
        )
        assert list(result["protocols"]) == ["lmms-eval", "evalscope"]
        assert "do not say the categories, which llava, vlmevalkit need" in result["note"]
    else:
        assert result["metrics"][result["headline"]] == expected


def test_samples_without_categories_are_not_scored_by_protocols_that_need_them(tmp_path, capsys):
    path = write_lines(tmp_path / "s.jsonl", kept_rows("pope"))
    assert main(["score", path, "--task", "pope", "--protocol", "llava"]) == 2
    assert "llava needs categories, which the answers do not say (fix: pass the annotations" in capsys.readouterr().err
    # the Hub's rows have them, and a question's number there is its sample's
    labels = [{"id": str(i), "question": "Is there a cat?", "image_source": f"{i}.jpg"} for i in range(4)]
    labels = [row | {"answer": "yes", "category": "random"} for row in labels]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(labels), tmp_path / "test-00000-of-00001.parquet")
    options = ["--task", "pope", "--annotations", tmp_path / "test-00000-of-00001.parquet"]
    result = score(capsys, path, *options, "--protocol", "llava")
    assert result["metrics"]["f1"] == pytest.approx(600 / 7) and result["groups"].keys() == {"random"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(labels[:3]), tmp_path / "test-00000-of-00001.parquet")
    assert main(["score", path, *map(str, options)]) == 2
    assert "annotated questions could be meant" in capsys.readouterr().err


def test_samples_without_questions_are_told_from_another_benchmark(tmp_path, capsys):
    choices = write_lines(tmp_path / "c.jsonl", kept_rows("scienceqa-img"))
    for name, message in [
        ("gqa", "the rows have options A, B, and questions of gqa have none"),
        ("mmstar", "the rows hold no annotated answers of mmstar"),
        ("seed-img", "the rows hold no annotated answers of seed-img"),
    ]:
        assert main(["score", choices, "--task", name]) == 2
        assert message in capsys.readouterr().err
    videos = kept_rows("seed-img", 5)
    del videos[0]["seed_image"]
    videos[0]["seed_video"] = {"question_id": "v1"}
    result = score(capsys, write_lines(tmp_path / "v.jsonl", videos), "--task", "seed-img")
    assert result["num_questions"] == 4 and result["left_out"] == 1 and result["metrics"]["accuracy"] == 75
    # a test split has no answers, and lmms-eval writes None
    hidden = write_lines(tmp_path / "h.jsonl", [row | {"target": "None"} for row in kept_rows("docvqa")])
    assert main(["score", hidden, "--task", "docvqa"]) == 2
    assert "these questions have no annotated answers" in capsys.readouterr().err


@pytest.mark.parametrize("name", KEPT)
def test_lmms_eval_scores_answers_without_the_white_space_around_them(tmp_path, capsys, name):
    """It strips every answer first; by GQA, ChartQA, AI2D and MMMU such answers were wrong."""
    rows = kept_rows(name)
    for row in rows[:-1]:
        row["filtered_resps"] = f" {row['filtered_resps']}\n"
    spaced = score(capsys, write_lines(tmp_path / "s.jsonl", rows), "--task", name)["protocols"]
    plain = score(capsys, write_lines(tmp_path / "p.jsonl", kept_rows(name)), "--task", name)["protocols"]
    theirs = [protocol for protocol in spaced if protocol.startswith("lmms-eval")] or ["vlmevalkit"]
    assert [spaced[protocol]["metrics"] for protocol in theirs] == [plain[protocol]["metrics"] for protocol in theirs]


def test_lmms_eval_divides_a_distance_by_lengths_without_white_space(tmp_path, capsys):
    rows = [row | {"filtered_resps": " ab\n", "target": "['xb']"} for row in kept_rows("docvqa")]
    protocols = score(capsys, write_lines(tmp_path / "s.jsonl", rows), "--task", "docvqa")["protocols"]
    assert [protocols[name]["metrics"]["anls"] for name in ("lmms-eval", "vlmevalkit")] == [50, 75]


def test_samples_of_an_open_question_have_no_options(tmp_path, capsys):
    """Its text may speak of `figure A.`; lmms-eval says which of MMMU's questions are open."""
    rows = kept_rows("mmmu")
    kept = rows[0]["mmmu_acc"] | {"question_type": "open"}
    asked = "<image 1> How long is the way from A. to B. ?" + PROMPT
    rows[0] = {**rows[0], "input": asked, "target": "12.5", "filtered_resps": "It is 12.5", "mmmu_acc": kept}
    result = score(capsys, write_lines(tmp_path / "s.jsonl", rows), "--task", "mmmu")
    assert result["metrics"]["accuracy"] == 75 and "not the letter of an option" not in result["note"]


def test_samples_say_categories_by_the_names_of_their_metrics(tmp_path, capsys):
    """As lmms-eval's own results give ChartQA's and MMStar's; since its 0.4 nothing else in the rows does."""
    charts = kept_rows("chartqa")
    for i, row in enumerate(charts):
        row["relaxed_human_split" if i == 3 else "relaxed_augmented_split"] = 1.0
    groups = score(capsys, write_lines(tmp_path / "c.jsonl", charts), "--task", "chartqa")["groups"]
    assert {name: figures["relaxed_accuracy"] for name, figures in groups.items()} == {
        "augmented_test": 100,
        "human_test": 0,
    }
    stars = [row | {"math": row["average"]} for row in kept_rows("mmstar")]
    stars[3]["average"] = stars[3]["math"] = {"question_id": 3, "l2_category": "statistical reasoning"}
    result = score(capsys, write_lines(tmp_path / "m.jsonl", stars), "--task", "mmstar")
    # a wider category's figure is the mean of its finer ones, as the overall one is
    expected = {"geometry": 100, "math": 50, "statistical reasoning": 0}
    assert {name: figures["accuracy"] for name, figures in result["groups"].items()} == expected
    assert result["protocols"]["mmstar"]["groups"]["math"]["accuracy"] == 75


def test_annotated_answers_that_lmms_eval_normalised_are_compared_as_they_stand(tmp_path, capsys):
    """Before its 0.4 `doc` holds them so: `that's` became `that 's` here, and ten times `a`, empty, was refused."""
    wanted, said = ["thats", "a", "red"], ["thats", "a", "blue"]
    docs = [
        {"question_id": i, "question": f"What {i}?", "answers": [normalize(answer, "m4c")] * 10}
        for i, answer in enumerate(wanted)
    ]
    assert [doc["answers"][0] for doc in docs] == ["that's", "", "red"]
    rows = [{"doc_id": i, "doc": doc, "target": "answer", "filtered_resps": [said[i]]} for i, doc in enumerate(docs)]
    result = score(capsys, write_lines(tmp_path / "s.jsonl", rows), "--task", "textvqa")
    assert result["protocol"] == "m4c" and result["metrics"]["accuracy"] == pytest.approx(200 / 3)
    assert "not those of the annotators' own words" in result["note"]
    # annotations have the annotators' own words
    raw = [doc | {"answers": [answer] * 10} for doc, answer in zip(docs, wanted, strict=True)]
    result = score(
        capsys, tmp_path / "s.jsonl", "--task", "textvqa", "--annotations", write_lines(tmp_path / "a", raw)
    )
    assert result["metrics"]["accuracy"] == pytest.approx(200 / 3) and "note" not in result
    # an empty answer of anybody else's is none
    path = write_lines(tmp_path / "b.jsonl", [docs[1] | {"prediction": "a"}, docs[2] | {"prediction": "a"}])
    assert main(["score", path, "--task", "textvqa"]) == 2
    assert "the question has no answer" in capsys.readouterr().err


POPE_ASKED = {"adversarial": ["cup", "dog"], "popular": ["cup", "car"], "random": ["cup", "tie"]}


def pope_labels():
    """Two questions about one image in each category, the first the same in all, as in POPE."""
    asked = [
        (category, number, thing) for category, things in POPE_ASKED.items() for number, thing in enumerate(things)
    ]
    return [
        {"id": str(i), "question_id": str(number + 1), "question": f"Is there a {thing} in the image?"}
        | {"answer": "no" if number else "yes", "image_source": "COCO_1", "category": category}
        for i, (category, number, thing) in enumerate(asked)
    ]


@pytest.mark.parametrize("has_doc", [True, False])
@pytest.mark.parametrize("category", [None, *POPE_ASKED])
def test_samples_of_pope_find_their_annotations_by_their_numbers(tmp_path, capsys, has_doc, category):
    """The ids begin again in each category, and the first questions are the same: both were refused.

    Of a category alone, as of the task pope_pop, the numbers are those in the category.
    """
    labels = pope_labels()
    annotations = write_lines(tmp_path / "test.jsonl", labels)
    asked = [row for row in labels if category in (None, row["category"])]
    samples = [
        {"doc_id": i, "target": row["answer"], "filtered_resps": "Yes" if i == 1 else row["answer"]}
        | {"pope_accuracy": {"question_id": row["question_id"], "score": 1.0}}
        | (
            {"doc": {k: v for k, v in row.items() if "image" not in k}}
            if has_doc
            else {"input": row["question"] + PROMPT}
        )
        for i, row in enumerate(asked)
    ]
    path = write_lines(tmp_path / "samples.jsonl", samples)
    result = score(capsys, path, "--task", "pope", "--annotations", annotations, code=3 if category else 0)
    assert result["missing_ids"] == [row["id"] for row in labels if row not in asked]
    assert result["metrics"]["accuracy"] == pytest.approx(100 * (len(asked) - 1) / len(asked))
    wrong = {name for name, figures in result["groups"].items() if figures["accuracy"] == 50}
    assert wrong == {category or "adversarial"}


def test_samples_of_mme_with_their_questions_name_their_images(tmp_path, capsys):
    """Before 0.4 lmms-eval kept the question; with labels that ask the same of two images it was refused."""
    rows = [
        {"question_id": f"OCR/{i // 2}.jpg", "question": f"Is it {said}?", "answer": said, "category": "OCR"}
        for i, said in enumerate(["Yes", "No", "Yes", "No"])
    ]
    annotations = write_lines(tmp_path / "labels.jsonl", rows[::-1])
    samples = [
        {"doc_id": i, "doc": row, "target": row["answer"], "filtered_resps": ["No" if i == 0 else row["answer"]]}
        for i, row in enumerate(rows)
    ]
    path = write_lines(tmp_path / "samples.jsonl", samples)
    result = score(capsys, path, "--task", "mme", "--annotations", annotations)
    assert result["metrics"]["perception"] == 125 and result["missing"] == 0


def test_two_files_are_compared_on_what_both_answer(own, capsys):
    folder, arguments = own
    first = write_lines(folder / "a.jsonl", [{"id": r["id"], "response": s} for r, s in zip(ROWS, SAID, strict=True)])
    second = [{"id": row["id"], "response": row["answer"] if i != 1 else "?"} for i, row in enumerate(ROWS)][:7]
    result = score(capsys, first, write_lines(folder / "b.jsonl", second), *arguments, code=3)
    pair = result["protocols"]["plain"]
    assert (
        result["compared"] == 7
        and pair["first"] == pytest.approx(500 / 7)
        and pair["second"] == pytest.approx(600 / 7)
    )
    assert pair["low"] <= pair["difference"] <= pair["high"]
    assert (result["gained_ids"], result["lost_ids"], result["left_out_ids"]) == (["q0", "q4"], ["q1"], ["q7"])
    assert main(["score", first, str(folder / "b.jsonl"), *arguments]) == 3
    assert "gained: 2: q0, q4" in capsys.readouterr().out


def test_the_interval_draws_images_and_not_questions():
    """Eight questions of one image that stand or fall together are one draw."""
    task = load_task("gqa")
    rows = [
        (f"g[{i}]", {"index": i, "image_path": f"{i // 8}.png", "question": f"{i}?", "answer": "yes"})
        for i in range(160)
    ]
    alone = [(where, row | {"image_path": f"{row['index']}.png"}) for where, row in rows]
    widths = []
    for source in (rows, alone):
        questions = load_task_questions(task, source, with_images=False)
        said = [{"question_id": i, "answer": "yes" if i // 8 % 2 else "no"} for i in range(160)]
        scores = score_task(task, answered(task, questions, said), "llava").protocols["llava"]
        assert scores.metrics["accuracy"] == 50
        widths.append(scores.high - scores.low)
    assert widths[0] == pytest.approx(2 * 196 * 0.5 / math.sqrt(20), rel=0.15)
    assert widths[1] == pytest.approx(2 * 196 * 0.5 / math.sqrt(160), rel=0.15)


# --- questions


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Which?\nA. one\nB. two", ["one", "two"]),
        ("Which? A: one, B: two, C: three", ["one", "two", "three"]),
        ("Which is in figure A. ?\nOptions: A: one, B: two", ["one", "two"]),
        ("From A. to B. how far?\nA. one\nB. two\nC. three", ["one", "two", "three"]),
        ("A. said so?\nA. one\nB. two", ["one", "two"]),
        ("Context: names\nA. not this\nB. nor this\nC. nor that\nWhich?\nA. one\nB. two", ["one", "two"]),
        ("Which?\nA. vitamin B. or\nB. C.\nAnswer with the letter.", ["vitamin B. or", "C."]),
        ("Which?\n(A) one\n(B) two\n", ["one", "two"]),
        ("Which?\nA. one B. two", ["one", "two"]),
        ("Which of A. ?", ["?"]),
        ("Which?", []),
    ],
)
def test_options_that_a_question_lists_are_told_from_what_it_speaks_of(question, options):
    assert inline_options(question) == tuple(zip("ABC", options, strict=False))


def test_parquet_and_inline_options(tmp_path):
    columns = {
        "index": [1, 2],
        "question": ["What? Options: A: one thing, B: two, C: a B. C.", "Who?\nA. him\nB. her\nAnswer."],
        "image": [{"bytes": b"x", "path": None}, {"bytes": b"y", "path": None}],
        "answer": ["A", "B"],
        "category": ["math", "math"],
        "l2_category": ["geometry", "numbers"],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "val-00000-of-00001.parquet")
    questions = load_task_questions(load_task("mmstar"), tmp_path / "val-00000-of-00001.parquet")
    assert questions[0].options == (("A", "one thing"), ("B", "two"), ("C", "a B. C."))
    assert questions[1].options == (("A", "him"), ("B", "her"))
    assert questions[0].groups == ("math", "geometry") and questions[0].image.data == b"x"


def test_scienceqa_of_the_hub(tmp_path):
    columns = {
        "image": [{"bytes": b"x", "path": None}, None],
        "question": ["What?", "Who?"],
        "choices": [["red", "blue"], ["he", "she", "it"]],
        "answer": [1, 2],
        "hint": ["Look.", ""],
        "subject": ["natural science", "language science"],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "test-00000-of-00001.parquet")
    questions = load_task_questions(load_task("scienceqa"), tmp_path / "test-00000-of-00001.parquet")
    assert [question.answers for question in questions] == [("B",), ("C",)]
    assert questions[0].context == "Look." and questions[0].image is not None and questions[1].image is None
    assert questions[1].options == (("A", "he"), ("B", "she"), ("C", "it"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"id": "q1", "question": "?"}],
            "these are not questions of own: the rows have id, question; rows has answer",
        ),
        ([{"id": "q1", "question": " ", "answer": "a"}], "question is ' '"),
        ([{"id": "q1", "question": "?", "answer": None}], "answer is None"),
        ([{"id": "q1", "question": "?", "answer": {"a": 1}}], "answer is {'a': 1}"),
        ([{"id": True, "question": "?", "answer": "a"}], "id is True"),
        ([{"id": "q1", "question": "?", "answer": "a"}] * 2, "id q1 occurs twice"),
    ],
)
def test_bad_questions_are_named(own, rows, message):
    folder, arguments = own
    with pytest.raises(UserError, match=message.replace("{", r"\{").replace("?", r"\?")):
        load_task_questions(load_task(arguments[1]), write_lines(folder / "bad.jsonl", rows), with_images=False)


def test_two_images_under_one_image_id_of_a_task_are_refused_with_both_rows(tmp_path):
    columns = {
        "question_id": [1, 2, 3],
        "image_id": ["i", "j", "i"],
        "question": ["What?"] * 3,
        "answers": [["red"] * 10] * 3,
    }
    for image, is_refused in ((b"x", False), (b"y", True)):
        images = [{"bytes": data, "path": None} for data in (b"x", b"z", image)]
        path = tmp_path / f"{is_refused}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({**columns, "image": images}), path)
        if is_refused:
            with pytest.raises(
                UserError, match=r"True\.parquet\[2\]: image_id i is another image .*True\.parquet\[0\]"
            ):
                load_task_questions(load_task("textvqa"), path)
        else:
            shown = [question.image.data for question in load_task_questions(load_task("textvqa"), path)]
            assert shown == [b"x", b"z", b"x"]


# --- a user's own function

FUNCTION_TASK = TASK.replace("metric: exact, rule: ignore-case", "metric: function, rule: 'mine:near'")


def test_a_function_of_ones_own(own, capsys):
    folder, arguments = own
    (folder / "own.yaml").write_text(FUNCTION_TASK)
    folder.chmod(0o700)
    (folder / "mine.py").write_text("def near(answer, answers):\n    return 0.5 if answer not in answers else True\n")
    (folder / "mine.py").chmod(0o600)
    path = answers_in("id and response", folder)
    assert score(capsys, path, *arguments)["metrics"]["accuracy"] == 100 * (6 + 2 * 0.5) / 8
    for body, message in {
        "def near(answer, answers):\n    return 2\n": "the function returned 2",
        "def far(): ...\n": "has no function near",
        "raise KeyError('x')\n": "fails: KeyError",
    }.items():
        (folder / "mine.py").write_text(body)
        assert main(["score", path, *arguments]) == 2
        assert message in capsys.readouterr().err
    (folder / "mine.py").write_text("def near(answer, answers):\n    return 1\n")
    (folder / "mine.py").chmod(0o666)
    assert main(["score", path, *arguments]) == 2
    assert "others may write to it; its code is not run" in capsys.readouterr().err
    os.remove(folder / "mine.py")
    assert main(["score", path, *arguments]) == 2
    assert "put mine.py beside the task's file" in capsys.readouterr().err


def test_a_function_is_not_taken_from_an_installed_module(own, capsys):
    """`os:system` would run what a model answers."""
    folder, arguments = own
    (folder / "own.yaml").write_text(FUNCTION_TASK.replace("mine:near", "os:system"))
    assert main(["score", answers_in("id and response", folder), *arguments]) == 2
    assert "os.py" in capsys.readouterr().err


# --- what is compared


@pytest.mark.parametrize(
    ("prompt", "question", "same"),
    [
        ("What is it?" + PROMPT, "what is  it?", True),
        ("<image>\nWhat is it?", "What is it?", True),
        ("What is it?\nReference OCR token: a, b" + PROMPT, "What is it?", True),
        ("Question: What is it? Short answer:", "What is it?", True),
        ("Is there a cat?", "Is there a cat? Please answer yes or no.", True),
        ("Is there a catfish", "Is there a cat", False),
        ("What is it?", "What is this?", False),
        ("", "", True),
    ],
)
def test_a_prompt_asks_the_question_that_it_holds(prompt, question, same):
    assert asks(prompt, question) == same


def test_images_are_called_by_their_stems():
    assert image_key("a/b/COCO_1.JPG") == image_key("coco_1.png") == "coco_1"
    assert image_key("tt0048028") == "tt0048028" and image_key("v1.2-final") == "v1.2-final"


def test_images_of_one_name_in_two_folders_are_two(own, capsys):
    folder, arguments = own
    rows = [{"id": i, "image": f"{name}/1.png", "question": "What?", "answer": name} for i, name in enumerate("ab")]
    write_lines(folder / "q.jsonl", rows)
    answers = [{"question_id": f"{name}/1.png", "prompt": "What?", "text": name} for name in "ba"]
    assert score(capsys, write_lines(folder / "a.jsonl", answers), *arguments)["metrics"]["accuracy"] == 100
    answers = [{"question_id": "c/1.png", "prompt": "What?", "text": "a"}]
    assert main(["score", write_lines(folder / "c.jsonl", answers), *arguments]) == 2
    assert "1 of 1 answers are to questions that are not annotated" in capsys.readouterr().err


def test_reading_without_choices_is_plain(own):
    folder, arguments = own
    found = read_task_answers(
        load_task(arguments[1]),
        answers_in("id and response", folder),
        annotations=arguments[3],
        questions=None,
        reading=Reading(),
    )
    assert [row["question_id"] for row in found.rows] == [row["id"] for row in ROWS] and found.note == ""


@pytest.mark.parametrize("name", ["scienceqa-img", "chartqa", "docvqa"])
def test_questions_are_called_the_same_with_and_without_images(tmp_path, name):
    """Predictions are scored against annotations that are read without images."""
    columns = {
        "questionId": ["7", "8", "9"],
        "image": [{"bytes": b"x", "path": None}, {"bytes": b"x", "path": None}, None],
        "question": ["What?", "Who?", "Why?"],
        "choices": [["red", "blue"]] * 3,
        "answer": [1, 0, 0] if name == "scienceqa-img" else ["a", "b", "c"],
        "answers": [["a"], ["b"], ["c"]],
    }
    path = tmp_path / "test-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    task = load_task(name)
    shown, unshown = (load_task_questions(task, path, with_images=with_images) for with_images in (True, False))
    assert [question.question_id for question in shown] == [question.question_id for question in unshown]
    if name == "scienceqa-img":
        rows = [{"question_id": question.question_id, "answer": "A"} for question in shown[:2]]
        assert len(answered(task, unshown, rows).questions) == 2


def test_an_empty_option_keeps_its_letter_and_none_is_left_out():
    row = {"question_id": "1", "data_id": "a.png", "question": "Which?", "answer": "C", "question_type_id": 1}
    row |= {"choice_a": "red", "choice_b": "", "choice_c": "wet", "choice_d": None}
    (question,) = load_task_questions(load_task("seed-img"), [("row 1", row)], with_images=False)
    assert question.options == (("A", "red"), ("C", "wet"))
    listed = {"id": "1", "question": "Which?", "options": [str(number) for number in range(27)], "answer": "A"}
    with pytest.raises(UserError, match="27 options, and 26 letters"):
        load_task_questions(load_task("mmmu"), [("row 1", listed)], with_images=False)
