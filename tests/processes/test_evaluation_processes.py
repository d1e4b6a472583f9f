"""Evaluations in real processes: killed, shared by two, and of adapters."""

import json
import random
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.model.opening import open_model


SIZES = [(28, 28), (20, 90), (90, 20), (60, 50), (5, 200), (120, 121), (33, 64)]
NUM_QUESTIONS, NUM_IMAGES = 300, 192


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_image) -> Path:
    """300 questions on 192 images of many shapes, TextVQA's ratio."""
    folder, draw = tmp_path_factory.mktemp("questions"), random.Random(0)
    for i in range(NUM_IMAGES):
        make_image(*SIZES[i % len(SIZES)], seed=i).save(folder / f"p{i}.png")
    rows = []
    for i in range(NUM_QUESTIONS):
        text = " ".join(draw.choices(["what", "is", "the", "brand", "number", "clock", "left"], k=draw.randint(1, 9)))
        image_id = f"p{i % NUM_IMAGES}"
        rows.append({"question_id": i, "image_id": image_id, "question": text, "answers": ["stop"] * 10})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "questions.jsonl"


def arguments(model: Path, data: Path, output: Path) -> list[str]:
    return [str(model), "--data", str(data), "--output", str(output), "--max-new-tokens", "12"]


def answers(folder: Path, *, order: bool = True) -> list[str]:
    """The lines of the file without their times."""
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]
    return [json.dumps({key: value for key, value in row.items() if key != "seconds"}) for row in rows]


@pytest.fixture(scope="module")
def whole(lively_folder, data, tmp_path_factory) -> list[str]:
    output = tmp_path_factory.mktemp("whole")
    assert main(["evaluate", *arguments(lively_folder, data, output), "--batch-size", "8"]) == 0
    lines = answers(output)
    assert len(lines) == NUM_QUESTIONS and len({json.loads(line)["answer"] for line in lines}) > 100
    return lines


def test_two_processes_write_the_file_of_one(forks, lively_folder, data, whole, tmp_path):
    output = tmp_path / "two"
    command = ("evaluate", *arguments(lively_folder, data, output), "--batch-size", "8", "--json")
    job = forks.start(*command, processes=2)
    printed, _ = job.communicate(timeout=240)
    assert job.codes == [0, 0], printed
    assert answers(output) == whole
    assert [path.name for path in sorted(output.iterdir())] == [
        "predictions.html",
        "predictions.jsonl",
        "scores.json",
        "settings.json",
    ]
    assert json.loads((output / "scores.json").read_text())["num_questions"] == NUM_QUESTIONS


def test_two_processes_report_an_image_that_is_missing(forks, lively_folder, data, tmp_path):
    lines = data.read_text().splitlines()[:40]
    broken = json.dumps(json.loads(lines[7]) | {"image_id": "gone"})
    (tmp_path / "q.jsonl").write_text("\n".join([*lines[:7], broken, *lines[8:]]))
    output = [*arguments(lively_folder, tmp_path / "q.jsonl", tmp_path / "out"), "--image-root", str(data.parent)]
    job = forks.start("evaluate", *output, "--json", processes=2)
    printed, _ = job.communicate(timeout=240)
    assert 3 in job.codes and set(job.codes) <= {0, 3}, printed
    assert '"failed": 1' in printed and (tmp_path / "out/predictions.html").is_file()


def test_what_fails_in_the_first_process_ends_the_second(forks, lively_folder, data, tmp_path):
    """It waited for a day where no launcher ended it, as on another machine."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "predictions.jsonl").write_text("{}\n")
    job = forks.start("evaluate", *arguments(lively_folder, data, output), processes=2)
    printed, _ = job.communicate(timeout=100)
    assert job.codes == [2, 2] and printed.count("error: ") == 1, printed
    assert "holds answers, but no settings.json" in printed


def test_two_processes_ask_with_the_ocr_tokens_that_one_has_read(forks, lively_folder, tmp_path):
    pytest.importorskip("rapidocr")
    signs, font = ["STOP 42", "OPEN 24h", "HALT 7", "STOP 42", "EXIT"], ImageFont.load_default(72)
    rows = []
    for number, sign in enumerate(signs):
        image = Image.new("RGB", (400, 160), "white")
        ImageDraw.Draw(image).text((30, 40), sign, fill="black", font=font)
        image.save(tmp_path / f"p{number}.png")
        row = {"image_id": f"p{number}", "question": "what is written?", "answers": [sign] * 10}
        rows += [{"question_id": 2 * number + again, **row} for again in range(2)]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = ["--preset", "llava", "--ocr", "rapidocr", "--batch-size", "2"]
    job = forks.start("evaluate", *arguments(lively_folder, questions, tmp_path / "two"), *told, processes=2)
    printed, _ = job.communicate(timeout=240)
    assert job.returncode == 0, printed
    (tmp_path / "one").mkdir()
    shutil.copy(tmp_path / "two/ocr_tokens.jsonl", tmp_path / "one")  # what they are is looked at below
    assert main(["evaluate", *arguments(lively_folder, questions, tmp_path / "one"), *told]) == 0
    assert answers(tmp_path / "two") == answers(tmp_path / "one")
    prompts = [json.loads(line)["prompt"] for line in answers(tmp_path / "two")]
    expected = [f"Reference OCR token: {', '.join(sign.split())}" for sign in signs for _ in range(2)]
    assert all(line in prompt for line, prompt in zip(expected, prompts, strict=True))
    read = [json.loads(line)["image_id"] for line in (tmp_path / "two/ocr_tokens.jsonl").read_text().splitlines()]
    assert read == ["p0", "p1", "p2", "p3", "p4"]  # by one process, each once


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.torture)])
def test_kill_9_at_any_moment_changes_nothing(launch, forks, lively_folder, data, whole, tmp_path, processes):
    """Four times each; with two processes one after the other, so that what was left belongs to another number.

    The first process that is killed is a real one.
    """
    output, draw = tmp_path / "killed", random.Random(processes)
    command, kills = [*arguments(lively_folder, data, output), "--batch-size", "8"], 0
    while kills < 4:
        started = num_written(output)
        if processes == 1 and kills == 0:
            job = launch("evaluate.py", *command)
        else:
            job = forks.start("evaluate", *command, processes=processes if kills % 2 == 0 else 1)
        wait_for_more(job, output, started)
        time.sleep(draw.random() * 0.3)
        if job.poll() is not None:
            break
        job.kill()
        job.communicate()
        kills += 1
    job = forks.start("evaluate", *command)
    printed, _ = job.communicate(timeout=240)
    assert job.returncode == 0, printed
    assert kills >= 3 and answers(output) == whole


def wait_for_more(job, output: Path, before: int) -> None:
    """Until a batch more is written than there was, or the process has ended."""
    deadline = time.monotonic() + 120
    while job.poll() is None and time.monotonic() < deadline:
        if num_written(output) > before:
            return
        time.sleep(0.02)


def num_written(output: Path) -> int:
    total = 0
    for file in output.rglob("predictions*.jsonl"):
        with suppress(FileNotFoundError):  # rank 0 takes the others' files in, and removes them
            total += len(file.read_bytes().splitlines())
    return total


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, make_image) -> list[str]:
    """Yes/no and multiple-choice questions, five an image of each kind: what `evaluate` is asked for both together."""
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(1)
    rows: dict[str, list[dict]] = {"pope": [], "mmstar": []}
    for i in range(24):
        make_image(*SIZES[i % len(SIZES)], seed=i).save(folder / f"{i}.png")
        for k in range(5):
            row = {"index": 5 * i + k, "image_path": f"{i}.png", "question": f"Is it {'very ' * k}{i}?"}
            rows["pope"].append(row | {"image": None, "answer": draw.choice(["yes", "no"]), "category": f"kind {k}"})
            rows["mmstar"].append(row | {"A": "red", "B": f"{i}", "answer": draw.choice("AB"), "category": "one"})
    named = []
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        named += ["--task", f"{name}={folder / f'{name}.jsonl'}"]
    return [*named, "--image-root", str(folder), "--max-new-tokens", "6", "--batch-size", "7", "--no-browser"]


def test_tasks_are_shared_by_processes_and_survive_kills(forks, lively_folder, tasks, tmp_path):
    """Answers of one process, of two, and of killed ones in turn, also in another order of the tasks."""
    command = ("evaluate", lively_folder, *tasks, "--output")
    assert main([str(part) for part in (*command, tmp_path / "one")]) == 0
    turned = ("evaluate", lively_folder, *tasks[2:4], *tasks[:2], *tasks[4:], "--output")
    jobs = [forks.start(*command, tmp_path / "two", processes=2), forks.start(*turned, tmp_path / "turned")]
    for job in jobs:
        printed, _ = job.communicate(timeout=240)
        assert set(job.codes) == {0}, printed
    draw, kills = random.Random(0), 0
    while kills < 3:
        started = num_written(tmp_path / "killed")
        job = forks.start(*command, tmp_path / "killed", processes=1 + kills % 2)
        wait_for_more(job, tmp_path / "killed", started)
        time.sleep(draw.random() * 0.1)
        if job.poll() is not None:
            break
        job.kill()
        job.communicate()
        kills += 1
    job = forks.start(*command, tmp_path / "killed")
    printed, _ = job.communicate(timeout=240)
    assert job.returncode == 0, printed
    for task in ("pope", "mmstar"):
        whole = answers(tmp_path / "one" / task)
        assert len(whole) == 120 and len({json.loads(line)["answer"] for line in whole}) > 15
        assert all(answers(tmp_path / name / task) == whole for name in ("two", "turned", "killed"))
        scores = [
            json.loads((tmp_path / name / task / "scores.json").read_text()) for name in ("one", "two", "killed")
        ]
        assert scores[0]["protocols"] == scores[1]["protocols"] == scores[2]["protocols"]
    assert kills


def test_adapters_answer_like_the_model_they_are_merged_into(lively_folder, data, tmp_path):
    from peft import LoraConfig, get_peft_model

    weights, processor = open_model(lively_folder)
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|up_proj)", init_lora_weights=False)
    adapted = get_peft_model(weights, config)
    adapted.peft_config["default"].base_model_name_or_path = str(lively_folder)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")
    texts = {}
    for name, folder in (("adapter", tmp_path / "adapter"), ("merged", tmp_path / "merged"), ("base", lively_folder)):
        output = tmp_path / f"{name}-answers"
        assert main(["evaluate", *arguments(folder, data, output), "--limit", "30"]) == 0
        texts[name] = [json.loads(line)["answer"] for line in answers(output)]
    assert texts["adapter"] == texts["merged"] != texts["base"]


def test_adapters_that_do_not_fit_are_refused(lively_folder, data, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    weights, _ = open_model(lively_folder)
    adapted = get_peft_model(weights, LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    adapted.peft_config["default"].base_model_name_or_path = str(lively_folder)
    adapted.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    renamed = {name.replace("language_model", "llm"): tensor for name, tensor in load_file(file).items()}
    save_file(renamed, file)
    assert main(["evaluate", *arguments(tmp_path, data, tmp_path / "out")]) == 2
    assert "the adapters do not fit their base model" in capsys.readouterr().err


def test_adapters_without_their_base_are_named(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "nowhere"}')
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question_id": 1, "image_id": "a", "question": "?", "answers": ["a"]}')
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    assert main(["evaluate", str(tmp_path), "--data", str(questions)]) == 2
    assert "base_model_name_or_path: no folder 'nowhere'" in capsys.readouterr().err


def test_stock_checkpoints_are_evaluated_as_they_are(lively_folder, data, tmp_path):
    """Saved by Transformers' own class and processor, without our code."""
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

    LlavaNextForConditionalGeneration.from_pretrained(lively_folder).save_pretrained(tmp_path / "stock")
    LlavaNextProcessor.from_pretrained(lively_folder).save_pretrained(tmp_path / "stock")
    assert not list((tmp_path / "stock").glob("*.py"))
    for name, folder in (("ours", lively_folder), ("stock", tmp_path / "stock")):
        assert main(["evaluate", *arguments(folder, data, tmp_path / f"{name}-answers"), "--limit", "20"]) == 0
    rows = {
        name: [json.loads(x)["token_ids"] for x in answers(tmp_path / f"{name}-answers")] for name in ("ours", "stock")
    }
    assert rows["ours"] == rows["stock"]
