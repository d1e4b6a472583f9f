"""`evaluate --task`: benchmarks and own questions asked of a model, by the engine that TextVQA is asked with."""

import copy
import csv
import io
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.data.sources.images import ImageRef
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.answering import ToAsk
from llava_llama31.trainer.evaluation.generation import GreedyAnswerer, Prefixes
from llava_llama31.trainer.evaluation.settings import EvaluationSettings
from llava_llama31.trainer.evaluation.task_evaluation import (
    TaskToAsk,
    evaluate_task,
    evaluate_tasks,
    preset_of,
    questions_to_ask,
)
from llava_llama31.trainer.evaluation.task_files import load_task


SIZES = [(28, 28), (20, 90), (90, 20), (60, 50), (120, 121)]
STOP_IDS = list(range(200, 448, 7))


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def data(make_image, tmp_path_factory):
    """Four images, each with four yes/no questions of POPE's files and three multiple-choice ones of VLMEvalKit's."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    choices, labels = [], {"random": [], "popular": []}
    for i in range(4):
        make_image(*SIZES[i % len(SIZES)], seed=i).save(folder / f"{i}.png")
        for k, category in enumerate(("random", "random", "popular", "popular")):
            row = {"question_id": len(labels[category]), "image": f"{i}.png", "text": f"Is there a {'cup' * k}?"}
            labels[category].append(row | {"label": draw.choice(["yes", "no"])})
        for k in range(3):
            options = {"A": f"red {k}", "B": "blue" * (k + 1), "C": f"wet {i}"}
            row = {"index": 3 * i + k, "image_path": f"{i}.png", "question": f"What is {k}?", **options}
            choices.append(row | {"answer": draw.choice("ABC"), "category": f"kind {k}"})
    for category, rows in labels.items():
        write_lines(folder / f"coco_pope_{category}.json", rows)
    write_lines(folder / "mmstar.jsonl", choices)
    return folder


def answers_of(folder):
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["question_id"]: row["token_ids"] for row in rows}


def without_seconds(lines):
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def tasks(data):
    for name, source in (("pope", data), ("mmstar", data / "mmstar.jsonl")):
        task = load_task(name)
        yield task, questions_to_ask(task, str(source), image_root=str(data))


def test_batches_and_order_change_no_answer_of_other_tasks(lively_model, processor, data, tmp_path):
    for task, questions in tasks(data):
        preset = preset_of(task, "card")
        found = {}
        shuffled = random.Random(7).sample(questions, len(questions))
        for size, asked in ((1, questions), (5, shuffled)):
            settings = EvaluationSettings(revision="r", preset=preset, max_new_tokens=4, batch_size=size)
            folder = tmp_path / f"{task.name}-{len(found)}"
            report = evaluate_task(task, lively_model, processor, asked, folder, settings).report
            found[len(found)] = (answers_of(folder), report.protocols[report.protocol].metrics)
        assert len(set(map(tuple, found[0][0].values()))) > 3
        for answers, metrics in found.values():
            assert answers == found[0][0]
            assert metrics == pytest.approx(found[0][1])


def test_a_note_says_that_the_options_were_not_shown(lively_model, processor, data, tmp_path):
    _, (task, questions) = tasks(data)
    hidden = task.model_copy(update={"prompts": {"card": "{question}"}})
    for asked, is_noted in ((task, False), (hidden, True)):
        settings = EvaluationSettings(revision="r", preset=preset_of(asked, "card"), max_new_tokens=2)
        folder = tmp_path / str(is_noted)
        evaluation = evaluate_task(asked, lively_model, processor, questions[:4], folder, settings)
        note = json.loads((folder / "scores.json").read_text()).get("note", "")
        assert ("the prompt does not show the options" in note) == is_noted and evaluation.note == note


def test_a_killed_task_resumes_and_ends_the_same(lively_model, processor, data, tmp_path):
    for task, questions in tasks(data):
        settings = EvaluationSettings(revision="r", preset=preset_of(task, "card"), max_new_tokens=3, batch_size=4)
        folder = tmp_path / task.name
        whole = evaluate_task(task, lively_model, processor, questions, folder, settings)
        path = folder / "predictions.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:6]) + lines[6][:20])
        again = evaluate_task(task, lively_model, processor, questions, folder, settings)
        assert again.report == whole.report
        assert without_seconds(path.read_bytes().splitlines()) == without_seconds(lines)


def test_each_image_is_encoded_once(lively_model, processor, data, tmp_path, monkeypatch):
    task, questions = next(iter(tasks(data)))
    encoded = []
    inner = GreedyAnswerer.prompt_from_tiles

    def counted(self, messages, tiles, sizes):
        encoded.append(id(tiles[0]))
        return inner(self, messages, tiles, sizes)

    monkeypatch.setattr(GreedyAnswerer, "prompt_from_tiles", counted)
    settings = EvaluationSettings(revision="r", preset=preset_of(task, "card"), max_new_tokens=2, batch_size=4)
    evaluate_task(task, lively_model, processor, questions, tmp_path, settings)
    assert len(questions) == 16 and len(encoded) == 16 and len(set(encoded)) <= 4


def test_tasks_asked_together_share_what_they_show(lively_model, processor, data, tmp_path, monkeypatch):
    """Under other names too: here one task has the bytes of the files that the other names."""
    asked, alone = [], []
    for task, questions in tasks(data):
        if task.name == "pope":
            held = {q.image_id: ImageRef("bytes", data=Path(q.image.path).read_bytes()) for q in questions}
            questions = [replace(q, image=held[q.image_id], image_id=f"other {q.image_id}") for q in questions]
        size = 3 if task.name == "pope" else 5
        settings = EvaluationSettings(revision="r", preset=preset_of(task, "card"), max_new_tokens=4, batch_size=size)
        alone.append(evaluate_task(task, lively_model, processor, questions, tmp_path / "alone" / task.name, settings))
        asked.append(TaskToAsk(task, ToAsk(questions, tmp_path / "together" / task.name, settings)))
    opened, read, kept = [], [], []
    open_image, put = ImageRef.open, Prefixes.put
    monkeypatch.setattr(ImageRef, "open", lambda image: opened.append(image) or open_image(image))

    def counted(prefixes, key, prompt, cache):
        put(prefixes, key, prompt, cache)
        read.append(key)
        kept.append(len(prefixes._kept))

    monkeypatch.setattr(Prefixes, "put", counted)
    together = evaluate_tasks(lively_model, processor, asked)
    assert len(opened) == len(read) == len(set(read)) == 4 and max(kept) <= 3  # one image after the other
    for one, other in zip(alone, together, strict=True):
        assert one.report == other.report and one.settings == other.settings
        assert answers_of(one.predictions.parent) == answers_of(other.predictions.parent)
    lines = asked[0].to_ask.output / "predictions.jsonl"
    lines.write_bytes(b"".join(lines.read_bytes().splitlines(keepends=True)[:7]))
    again = evaluate_tasks(lively_model, processor, asked)
    assert [evaluation.report for evaluation in again] == [evaluation.report for evaluation in together]


def test_in_half_precision_the_settings_say_what_was_asked_with_it(lively_model, processor, data, tmp_path):
    lively_model.bfloat16()
    for invariant in (False, True):
        asked = []
        for task, questions in tasks(data):
            settings = EvaluationSettings(
                revision="r",
                preset=preset_of(task, "card"),
                max_new_tokens=1,
                batch_size=8,
                batch_invariant=invariant,
                data=task.name,
            )
            asked.append(TaskToAsk(task, ToAsk(questions[:4], tmp_path / f"{invariant}" / task.name, settings)))
        written = [done.settings.get("asked_with") for done in evaluate_tasks(lively_model, processor, asked)]
        assert written == ([None, None] if invariant else [["mmstar"], ["pope"]])


SUBMITTED = {
    "vqav2": (
        [{"question_id": 5, "image": "0.png", "text": "What?\nAnswer briefly."}],
        [{"question_id": 5, "answer": "2"}],
    ),
    "vizwiz": (
        [{"question_id": "v", "image": "0.png", "text": "What?\nAnswer briefly."}],
        [{"image": "0.png", "answer": "2"}],
    ),
    "docvqa": (
        [{"questionId": "7", "question": "What?", "image": "0.png"}],
        [{"questionId": 7, "answer": "The Two."}],
    ),
    "infovqa": (
        [{"questionId": 7, "question": "What?", "image": "0.png", "answers": None}],
        [{"questionId": 7, "answer": "The Two."}],
    ),
    "mmmu": (
        [
            {
                "id": "test_Art_1",
                "question": "What?",
                "image_1": "0.png",
                "answer": "?",
                "options": "['one', 'the two']",
            }
        ],
        {"test_Art_1": "B"},
    ),
    "mmbench": (
        [{"index": 3, "question": "What?", "image": "0.png", "A": "one", "B": "two"}],
        [{"index": 3, "question": "What?", "A": "one", "B": "two", "C": "", "D": "", "prediction": "The Two."}],
    ),
}


@pytest.mark.parametrize("name", SUBMITTED)
def test_answers_that_are_not_public_go_to_the_server_in_its_format(
    lively_model, processor, data, tmp_path, capsys, name
):
    from llava_llama31.trainer.evaluation.row_files import any_rows

    rows, wanted = SUBMITTED[name]
    path = write_lines(tmp_path / "test.jsonl", rows)
    task = load_task(name)
    questions = questions_to_ask(task, path, image_root=str(data))
    settings = EvaluationSettings(revision="r", preset=preset_of(task, "card"), max_new_tokens=2)
    done = evaluate_task(task, lively_model, processor, questions, tmp_path / "out", settings)
    assert done.submission.is_file() and done.to_json()["metrics"] == {} and done.report.complete
    (question,) = questions
    said = [{"id": question.question_id, "question": question.question, "response": "The Two."}]
    answers, output = write_lines(tmp_path / "said.jsonl", said), tmp_path / done.submission.name
    arguments = ["score", answers, "--task", name, "--annotations", path]
    assert main([*arguments, "--submission", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["submission"] == str(output)
    if output.suffix == ".json":
        assert json.loads(output.read_text()) == wanted
    else:
        assert [{k: v or "" for k, v in row.items()} for _, row in any_rows(output)] == wanted
    # what a server takes is read back, and makes the same file again
    again = output.with_name(f"again{output.suffix}")
    assert main(["score", str(output), *arguments[2:], "--submission", str(again), "--json"]) == 0
    assert list(any_rows(again, keyed="kv")) == [
        (where.replace(output.name, again.name), row) for where, row in any_rows(output, keyed="kv")
    ]
    assert main(arguments) == 2
    assert "these questions have no annotated answers" in capsys.readouterr().err
    assert main([*arguments, "--submission", "out.txt"]) == 2
    assert f"takes a {output.suffix} file" in capsys.readouterr().err


def test_an_answer_in_normal_form_is_not_normalised_again(tmp_path):
    path = write_lines(tmp_path / "test.jsonl", [{"question_id": 1, "image": "a.png", "text": "What?"}])
    (tmp_path / "u.json").write_text(json.dumps([{"image": "a.png", "answer": "that's"}]))
    arguments = ["score", str(tmp_path / "u.json"), "--task", "vizwiz", "--annotations", path, "--json"]
    assert main([*arguments, "--submission", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text()) == [{"image": "a.png", "answer": "that's"}]


def test_answers_for_a_grader_are_written_by_the_documented_task(lively_model, processor, data, tmp_path, capsys):
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    block = "name: mm-vet" + text.split("```yaml\nname: mm-vet")[1].split("```")[0]
    (tmp_path / "mm-vet.yaml").write_text(block)
    path = write_lines(tmp_path / "q.jsonl", [{"question_id": 3, "image": "0.png", "text": "What?\nSay why."}])
    task = load_task(tmp_path / "mm-vet.yaml")
    questions = questions_to_ask(task, path, image_root=str(data))
    settings = EvaluationSettings(revision="r", preset=preset_of(task, "card"), max_new_tokens=2)
    done = evaluate_task(task, lively_model, processor, questions, tmp_path / "out", settings)
    (row,) = map(json.loads, (tmp_path / "out" / "predictions.jsonl").read_text().splitlines())
    assert row["prompt"] == "What?\nSay why." and json.loads(done.submission.read_text()) == {"v1_3": row["answer"]}
    assert main(["score", str(done.predictions), "--task", str(tmp_path / "mm-vet.yaml"), "--annotations", path]) == 2
    assert "a language model grades these answers" in capsys.readouterr().err
    lines = (
        (tmp_path / "mm-vet.yaml").read_text().replace("file: object", "file: lines").replace("key:", "question_id:")
    )
    (tmp_path / "mm-vet.yaml").write_text(lines)
    options = ["--annotations", path, "--submission", str(tmp_path / "for_grader.jsonl")]
    assert main(["score", str(done.predictions), "--task", str(tmp_path / "mm-vet.yaml"), *options]) == 0
    assert json.loads((tmp_path / "for_grader.jsonl").read_text()) == {"question_id": "v1_3", "value": row["answer"]}


def test_vqas_own_test_questions_name_coco_images(tmp_path):
    content = {"questions": [{"image_id": 262144, "question": "Is it?", "question_id": 262144000}]}
    (tmp_path / "q.json").write_text(json.dumps(content))
    (question,) = questions_to_ask(load_task("vqav2"), str(tmp_path / "q.json"))
    assert question.image_id == "COCO_test2015_000000262144.jpg" and question.answers == ()


def test_a_submission_needs_a_server_and_partly_annotated_questions_are_refused(data, tmp_path, capsys):
    answers = write_lines(tmp_path / "a.jsonl", [{"id": 0, "response": "A"}])
    options = ["--annotations", str(data / "mmstar.jsonl"), "--submission", "x.json"]
    assert main(["score", answers, "--task", "mmstar", *options]) == 2
    assert "no server takes answers of mmstar" in capsys.readouterr().err
    rows = [{"questionId": i, "question": f"{i}?", "image": "0.png", "answers": ["a"] * i} for i in range(2)]
    with pytest.raises(UserError, match="1 of 2 questions have no annotated answer, the first 0"):
        questions_to_ask(load_task("docvqa"), write_lines(tmp_path / "q.jsonl", rows))


@pytest.fixture(scope="module")
def model_folder(processor, pristine_config, tmp_path_factory):
    from llava_llama31 import LlavaLlama31ForConditionalGeneration

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("model")
    LlavaLlama31ForConditionalGeneration(copy.deepcopy(pristine_config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_two_tasks_at_once_agree_with_score(model_folder, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--task", f"pope={data}", "--task", f"mmstar={data / 'mmstar.jsonl'}", "--image-root", str(data)]
    assert main(["evaluate", model_folder, *arguments, "--max-new-tokens", "3", "--json"]) == 0
    evaluated = {result["task"]: result for result in json.loads(capsys.readouterr().out)["tasks"]}
    assert {name: result["num_questions"] for name, result in evaluated.items()} == {"pope": 16, "mmstar": 12}
    for name, annotations in (("pope", data), ("mmstar", data / "mmstar.jsonl")):
        options = ["--task", name, "--annotations", str(annotations), "--json"]
        assert main(["score", evaluated[name]["predictions"], *options]) == 0
        scored = json.loads(capsys.readouterr().out)
        for key in ("metrics", "groups", "num_questions", "protocols", "protocol"):
            assert scored[key] == evaluated[name][key], key
    rows = (tmp_path / evaluated["mmstar"]["predictions"]).read_text(encoding="utf-8").splitlines()
    wanted = (
        "What is 1?\nA. red 1\nB. blueblue\nC. wet 0\nAnswer with the option's letter from the given choices directly."
    )
    assert json.loads(rows[1])["prompt"] == wanted
    monkeypatch.setattr(GreedyAnswerer, "answer", None)  # the second time there is nothing left to generate
    assert main(["evaluate", model_folder, *arguments, "--max-new-tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert "POPE, COCO" in out and "MMStar" in out and "12 of 12 questions answered" in out
    predictions = tmp_path / evaluated["mmstar"]["predictions"]
    page = predictions.with_suffix(".html").read_text(encoding="utf-8")
    shown = json.loads(page.split('id="data">')[1].split("</script>")[0])
    protocols = [
        "vlmevalkit",
        "letter",
        "vlmevalkit-2025",
        "vlmevalkit-2026",
        "mmstar",
        "lmms-eval",
        "lmms-eval-2026",
        "evalscope",
    ]
    assert shown["protocols"] == protocols
    assert len(shown["questions"]) == 12
    first = shown["questions"][0]
    assert first["options"][0] == ["A", "red 0"] and first["groups"] == ["kind 0"] and len(first["scores"]) == 8
    browse = ["browse", str(predictions), "--task", "mmstar", "--data", str(data / "mmstar.jsonl")]
    assert main([*browse, "--image-root", str(data), "--output", "b.html"]) == 0
    again = json.loads((tmp_path / "b.html").read_text("utf-8").split('id="data">')[1].split("</script>")[0])
    assert again["questions"] == shown["questions"]


OWN = [
    {"image": "0.png", "question": "What does it say?", "answer": "open", "metric": "anls", "group": "text"},
    {"image": "0.png", "question": "Which words?", "answer": ["a", "b"], "metric": "contains", "group": "text"},
    {"image": "1.png", "question": "Is it red?", "answer": "yes", "metric": "yes_no", "group": "other"},
    {
        "image": "2.png",
        "question": "Which?",
        "answer": "B",
        "metric": "choice",
        "A": "one",
        "B": "two",
        "group": "other",
    },
    {"image": "3.png", "question": "As JSON?", "answer": {"total": "1"}, "metric": "fields", "group": "text"},
]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_own_questions_in_a_table(model_folder, data, tmp_path, monkeypatch, capsys, suffix):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"own.{suffix}"
    if suffix == "jsonl":
        write_lines(path, [{"A": None, "B": None} | row for row in OWN])
    else:
        columns = ["image", "question", "answer", "metric", "group", "A", "B"]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for row in OWN:
                answer = row["answer"]
                text = str(answer) if isinstance(answer, list) else answer
                writer.writerow(row | {"answer": json.dumps(text) if isinstance(text, dict) else text})
    assert main(["evaluate", model_folder, "--task", str(path), "--image-root", str(data), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["task"], result["headline"], result["num_questions"]) == ("own", "score", 5)
    assert set(result["groups"]) == {"anls", "contains", "yes_no", "choice", "fields", "text", "other"}
    said = ["opel", "only b", "Yes.", "It is two", 'Sure: {"total": "1"}']
    ids = [f"{row['image']}#{1 + (i == 1)}" for i, row in enumerate(OWN)]
    lines = [{"id": name, "response": text} for name, text in zip(ids, said, strict=True)]
    assert main(["score", write_lines(tmp_path / "a.jsonl", lines), "--task", str(path), "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["metrics"]["score"] == pytest.approx(100 * (0.75 + 4) / 5)
    assert scored["groups"]["anls"]["score"] == 75 and scored["groups"]["other"]["score"] == 100


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": "0.png", "question": "?", "answer": "a"}], "no metric: the rows have image, question, answer"),
        (
            [{"image": "0.png", "question": "?", "answer": "a", "metric": "near"}],
            "metric is 'near' (fix: one of",
        ),
        ([{"image": "", "question": "?", "answer": "a", "metric": "exact"}], "1 questions of own have no image"),
    ],
)
def test_bad_tables_are_named_before_the_model_is_read(data, tmp_path, capsys, rows, message):
    path = write_lines(tmp_path / "own.jsonl", rows)
    assert main(["evaluate", "nowhere", "--task", path, "--image-root", str(data)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data: no questions"),
        (["--task", "pope"], "--data: no questions of pope"),
        (["--task", "pope", "--task", "mme", "--data", "x"], "one file for several tasks"),
        (["--task", "pope=a", "--task", "pope=b"], "pope is named twice"),
        (["--task", "pope", "--ocr", "rapidocr"], "--ocr: does not go with --task"),
        (["--data", "x", "--preset", "vlmevalkit"], "TextVQA's prompt there is that of card"),
    ],
)
def test_options_that_do_not_go_together(arguments, message, capsys):
    assert main(["evaluate", "nowhere", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_scienceqa_without_images_is_not_asked(tmp_path):
    rows = [
        {"id": "1", "conversations": [{"value": "What?\nA. x\nB. y"}, {"value": "A"}]},
        {"id": "2", "image": "2.png", "conversations": [{"value": "<image>\nWho?\nA. x\nB. y"}, {"value": "B"}]},
    ]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match="1 questions of scienceqa have no image, the first 1"):
        questions_to_ask(load_task("scienceqa"), str(tmp_path / "q.json"))
    task = load_task("scienceqa-img")
    (question,) = questions_to_ask(task, str(tmp_path / "q.json"))
    instruction = "\nAnswer with the option's letter from the given choices directly."
    # options that the question lists are not said twice
    assert preset_of(task, "llava").text(question) == "Who?\nA. x\nB. y" + instruction
    other = replace(question, question="Who?", context="Look.")
    assert preset_of(task, "llava").text(other) == "Look.\nWho?\nA. x\nB. y" + instruction


def test_images_in_base64_and_in_other_rows(make_image, tmp_path):
    from base64 import b64encode

    file = io.BytesIO()
    make_image(20, 30, seed=1).save(file, "PNG")
    encoded = b64encode(file.getvalue()).decode()
    with (tmp_path / "MMBench.tsv").open("w", newline="") as table:
        writer = csv.writer(table, delimiter="\t")
        writer.writerow(["index", "question", "A", "B", "answer", "image"])
        writer.writerow([5, "What?", "x", "y", "A", encoded])
        writer.writerow([1_000_005, "What?", "y", "x", "B", "5"])
    questions = questions_to_ask(load_task("mmbench"), str(tmp_path / "MMBench.tsv"))
    assert questions[0].image is questions[1].image and questions[0].image.data == file.getvalue()
    assert [question.units for question in questions] == [("5",), ("5",)]
    assert questions[1].options == (("A", "y"), ("B", "x"))


def test_the_documented_tasks_and_tables_work(make_image, tmp_path, capsys):
    docs = Path(__file__).parents[1] / "docs"
    blocks = {}
    for page in ("documents", "multiple_choice"):
        text = (docs / f"{page}.md").read_text(encoding="utf-8")
        for kind in ("yaml", "csv"):
            blocks[page, kind] = text.split(f"```{kind}\n")[1].split("```")[0]
    for name in ("0001.png", "0002.png"):
        make_image(20, 20, seed=0).save(tmp_path / name)
    rows = [{"id": 1, "image": "0001.png", "question": "Read.", "fields": {"total": "9.50", "n": 1}, "shop": "north"}]
    write_lines(tmp_path / "receipts.jsonl", rows)
    (tmp_path / "receipts.yaml").write_text(blocks["documents", "yaml"])
    answers = write_lines(tmp_path / "a.jsonl", [{"id": 1, "response": '{"total": "9.50"}'}])
    assert main(["score", answers, "--task", str(tmp_path / "receipts.yaml"), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics == {"f1": pytest.approx(100 * 1 / 1.5), "exact": 0.0}
    assert len(questions_to_ask(load_task(tmp_path / "receipts.yaml"), None)) == 1
    for page, number in (("documents", 4), ("multiple_choice", 2)):
        (tmp_path / "questions.csv").write_text(blocks[page, "csv"])
        questions = questions_to_ask(load_task(tmp_path / "questions.csv"), None)
        assert len(questions) == number and all(question.image is not None for question in questions)
    table = blocks["multiple_choice", "csv"].replace("answer,metric", "answer,plant").replace(",choice", ",east")
    (tmp_path / "questions.csv").write_text(table)
    (tmp_path / "valves.yaml").write_text(blocks["multiple_choice", "yaml"])
    task = load_task(tmp_path / "valves.yaml")
    first, second = questions_to_ask(task, None)
    options = "\nA. the left one\nB. the right one\nC. both\n"
    instruction = "Answer with the option's letter from the given choices directly."
    assert preset_of(task, "card").text(first) == f"Which valve is open?{options}{instruction}"
    assert second.options == (("A", "pressure"), ("B", "temperature")) and second.answers == ("A",)
