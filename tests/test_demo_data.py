"""The demo's images, questions and stand-in parts: honest splits, true labels, whole or absent, repeatable."""

import hashlib
import json
import multiprocessing
import queue
import random
import signal
import time
from multiprocessing import resource_tracker
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from sleeper import asleep
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, GenerationConfig, LlamaForCausalLM
from transformers.image_processing_utils import select_best_resolution

from llava_llama31.trainer.demo import images, parts
from llava_llama31.trainer.errors import Interrupted
from llava_llama31.trainer.worker_pools import spawned_pool


SMALL = parts.Settings(
    captions=6,
    dialogues=6,
    validation_pictures=5,
    tower=parts.TowerSettings(hidden_size=32, intermediate_size=32, layers=1, heads=2, sheets=2, steps=2, batch=4),
    language_model=parts.LanguageModelSettings(
        hidden_size=32, intermediate_size=32, layers=1, heads=2, scenes=40, line_steps=2, page_steps=2, batch=4
    ),
)


@pytest.fixture(scope="module")
def scenes():
    rng = random.Random(5)
    return {split: [images.make_scene(rng, split) for _ in range(3000)] for split in ("train", "validation")}


@pytest.fixture(scope="session")
def prepared(make_once):
    def fill(folder: Path) -> None:
        said = []
        with pytest.MonkeyPatch.context() as patch:
            # one process for both parts, since each imports torch; not this one, whose sets have another order
            patch.setattr(parts, "spawned_pool", lambda _: spawned_pool(1))
            parts.prepare(folder / "parts", seed=3, progress=said.append, settings=SMALL)
        (folder / "said.json").write_text(json.dumps(said))

    folder = make_once("demo-parts", fill)
    return folder / "parts", json.loads((folder / "said.json").read_text())


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_no_words_and_layout_pair_is_in_both_splits(scenes):
    pairs = {split: {(scene.words, scene.layout) for scene in made} for split, made in scenes.items()}
    assert not pairs["train"] & pairs["validation"]
    assert len(pairs["validation"]) > 2000


def test_layout_is_kind_shape_and_words_per_cell():
    scene = images.Scene("receipt", "square", (("KORA",), ("ICE CREAM", "2.50")), "", ())
    assert scene.words == ("KORA", "ICE", "CREAM", "2.50")
    assert scene.layout == ("receipt", "square", ((1,), (2, 1)))
    moved = images.Scene("receipt", "square", (("KORA ICE",), ("CREAM", "2.50")), "another caption", ())
    assert moved.words == scene.words and moved.layout != scene.layout


def test_words_of_validation_are_known_from_training_in_other_images(scenes):
    words = {split: {w for s in made if s.kind == "sign" for w in s.words} for split, made in scenes.items()}
    assert words["validation"] <= words["train"]


def test_every_anyres_grid_is_needed(scenes):
    rng = random.Random(1)
    grids = set()
    for scene in scenes["train"][:200]:
        painted, _ = images.paint(scene, rng)
        grids.add(select_best_resolution((painted.height, painted.width), images.GRID_PINPOINTS))
    assert grids == {tuple(grid) for grid in images.GRID_PINPOINTS}


def test_glyphs_stand_where_the_ink_is(scenes):
    rng = random.Random(2)
    for scene in scenes["train"][:100]:
        painted, glyphs = images.paint(scene, rng)
        assert "".join(glyph.character for glyph in glyphs) == "".join(scene.words)
        columns, rows = images.SHAPES[scene.shape]
        cell = painted.width // columns
        assert painted.size == (columns * cell, rows * cell)
        grey = np.asarray(painted.convert("L"), dtype=np.int64)
        ground = np.bincount(grey.ravel()).argmax()
        for glyph in glyphs:
            here = grey[glyph.row * cell : (glyph.row + 1) * cell, glyph.column * cell : (glyph.column + 1) * cell]
            assert abs(here - ground).max() > 60, (scene, glyph)


def test_every_character_has_a_patch_of_its_own(scenes):
    rng = random.Random(4)
    for scene in scenes["train"][:300] + scenes["validation"][:300]:
        _, glyphs = images.paint(scene, rng)
        columns, rows = images.SHAPES[scene.shape]
        assert len({(glyph.row, glyph.column) for glyph in glyphs}) == len(glyphs)
        assert all(0 <= glyph.column < columns and 0 <= glyph.row < rows for glyph in glyphs)


def test_answers_are_in_the_image(scenes):
    for scene in scenes["train"]:
        for question in scene.questions:
            assert set(question.answer.split()) <= set(scene.words)
        assert set(scene.words) <= set(scene.caption.replace(",", " ").replace(":", " ").split()) | {
            word for word in scene.caption.replace(", ", " ").removesuffix(".").split()
        }


def test_ten_answers_of_which_most_are_true(scenes):
    rng = random.Random(6)
    seen_others = set()
    for scene in scenes["validation"][:500]:
        for question in scene.questions:
            answers = parts.human_answers(question, rng)
            assert len(answers) == 10 and answers.count(question.answer) >= 6
            seen_others |= {answer for answer in answers if answer != question.answer}
    assert "unanswerable" in seen_others and len(seen_others) > 100


def test_page_holds_the_text_in_reading_order(scenes):
    rng = random.Random(7)
    for scene in scenes["train"][:200]:
        _, glyphs = images.paint(scene, rng)
        columns, rows = images.SHAPES[scene.shape]
        lines = parts.lay_out(glyphs, columns, rows).split("\n")
        assert len(lines) == rows + 1 and {len(line) for line in lines[:-1]} == {columns}
        assert "".join(lines).replace(" ", "") == "".join(scene.words)
        assert len(parts.thumbnail(glyphs, columns, rows)) == 36


def test_tiles_are_labelled_with_the_character_in_each_patch():
    sheet = parts.draw_sheet(random.Random(8))
    tiles, targets = parts.cut_tiles([sheet], random.Random(9), 20)
    replay = random.Random(9)
    for tile, target in zip(tiles, targets, strict=True):
        replay.choice([sheet])
        column, row = (replay.randrange(parts.SHEET // 8 - 5) for _ in range(2))
        pixels = (tile * parts.PIXEL_STD + parts.PIXEL_MEAN) * 255
        cut = torch.tensor(sheet.pixels[8 * row : 8 * row + 48, 8 * column : 8 * column + 48]).float()
        assert torch.allclose(pixels.permute(1, 2, 0), cut, atol=1e-3)
        assert torch.equal(target.view(6, 6), torch.tensor(sheet.characters[row : row + 6, column : column + 6]))
    assert (targets > 0).float().mean() > 0.1


def test_tokenizer_keeps_the_text_of_images_in_single_characters(scenes):
    tokenizer = parts.train_tokenizer(scenes["train"][:600], 383)
    assert len(tokenizer) == 383
    assert len(tokenizer.encode("MILK 12.50", add_special_tokens=False)) == len("MILK 12.50")
    assert len(tokenizer.encode(images.PROMPT_SUFFIX, add_special_tokens=False)) < 14
    assert [tokenizer.decode(tokenizer.convert_tokens_to_ids(t)) for t in parts.SPECIAL_TOKENS] == list(
        parts.SPECIAL_TOKENS
    )
    text = "Crème brûlée, 3 €\n<|eot_id|>"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.slow
def test_parts_open_and_fit_together(prepared):
    folder, said = prepared
    assert any("tower: reads" in line for line in said)
    tower = CLIPVisionModel.from_pretrained(folder / "vision_tower")
    assert tower.config.num_hidden_layers == SMALL.tower.layers + 1
    assert (tower.config.image_size, tower.config.patch_size) == (images.TILE, images.PATCH)
    preprocessor = CLIPImageProcessor.from_pretrained(folder / "vision_tower")
    pixels = preprocessor(Image.new("RGB", (90, 70), "white"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 48, 48) and torch.allclose(pixels, torch.tensor(2.0))
    model = LlamaForCausalLM.from_pretrained(folder / "language_model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "language_model")
    stops = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])
    assert GenerationConfig.from_pretrained(folder / "language_model").eos_token_id == stops
    assert model.config.vocab_size == len(tokenizer) and tokenizer.pad_token == "<|finetune_right_pad_id|>"


def test_data_is_in_llava_and_textvqa_form(prepared):
    data = prepared[0] / "data"
    for name in ("captions", "instruct"):
        rows = json.loads((data / f"{name}.json").read_text())
        assert len(rows) == 6 and len({row["id"] for row in rows}) == 6
        for row in rows:
            turns = row["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert [("<image>" in turn["value"]) for turn in turns] == [True] + [False] * (len(turns) - 1)
            assert turns[0]["value"].startswith("<image>\n")
            if name == "instruct":
                assert all(turn["value"].endswith(images.PROMPT_SUFFIX) for turn in turns[::2])
            Image.open(data / row["image"]).verify()
    rows = [json.loads(line) for line in (data / "validation.jsonl").read_text().splitlines()]
    assert len({row["question_id"] for row in rows}) == len(rows) >= SMALL.validation_pictures
    assert all(len(row["answers"]) == 10 and (data / row["image"]).is_file() for row in rows)


def test_tasks_ask_about_the_validation_images(tmp_path, scenes):
    from llava_llama31.trainer.demo.tasks import write_tasks
    from llava_llama31.trainer.evaluation.task_files import load_task
    from llava_llama31.trainer.evaluation.task_questions import load_task_questions

    shown = {f"v{number}": scene for number, scene in enumerate(scenes["validation"][:120])}
    write_tasks(tmp_path, shown, 3)
    yes_no = load_task(tmp_path / "yes_no.yaml")
    asked = load_task_questions(yes_no, yes_no.data, with_images=False)
    assert [sum(q.answers == (said,) for q in asked) for said in ("yes", "no")] == [120, 120]
    for question in asked:
        scene = shown[Path(question.image_id).stem]
        text, _, said = question.question.removesuffix("?").partition("? is it ")
        is_true = any(q.text == f"{text}?" and q.answer == said for q in scene.questions)
        assert is_true == (question.answers == ("yes",)), question
    task = load_task(tmp_path / "choices.yaml")
    choices = load_task_questions(task, task.data, with_images=False)
    assert len(choices) == 120 and {q.answers[0] for q in choices} == set("ABCD")
    for question in choices:
        scene, options = shown[Path(question.image_id).stem], dict(question.options)
        right = options[question.answers[0]]
        assert right in [q.answer for q in scene.questions if q.text == question.question] and len(options) == 4
        assert not [text for text in options.values() if text != right and (text in right or right in text)]


def test_finished_folder_is_left_alone_and_another_seed_replaces_it(prepared, monkeypatch):
    folder, _ = prepared
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(parts, "_train_parts", lambda *_: pytest.fail("prepared twice"))
    parts.prepare(folder, seed=3, progress=lambda _: None, settings=SMALL)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert SMALL.fingerprint(3) != SMALL.fingerprint(4) != parts.Settings().fingerprint(4)


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(folder, *_):
        (folder / "vision_tower").mkdir()
        raise RuntimeError("out of paper")

    monkeypatch.setattr(parts, "_train_parts", fail)
    with pytest.raises(RuntimeError, match="out of paper"):
        parts.prepare(tmp_path / "parts", seed=0, progress=lambda _: None, settings=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_same_seed_makes_the_same_files(prepared, tmp_path):
    said = queue.Queue()
    parts.train_tower(tmp_path / "vision_tower", SMALL.tower, 3, said)
    parts.train_language_model(tmp_path / "language_model", SMALL.language_model, 3, said)
    parts.write_data(tmp_path / "data", SMALL, 3)
    first = digests(prepared[0])
    assert first.pop("fingerprint.txt")
    assert digests(tmp_path) == first


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Interrupted("stopped by SIGTERM")], ids=["SIGINT", "SIGTERM"])
def test_a_signal_while_it_prepares_ends_the_workers_at_once(tmp_path, monkeypatch, stop):
    monkeypatch.setattr(parts, "train_tower", asleep)
    monkeypatch.setattr(parts, "train_language_model", asleep)
    seen = []

    def stopped(*_):
        seen.extend(psutil.Process(worker.pid) for worker in set(multiprocessing.active_children()) - before)
        masks = [Path(f"/proc/{worker.pid}/status").read_text().partition("SigBlk:")[2].split()[0] for worker in seen]
        # a terminal sends Ctrl-C to them too, and each would print a traceback
        assert all(int(mask, 16) & 1 << (signal.SIGINT - 1) for mask in masks)
        raise stop

    monkeypatch.setattr(parts, "write_data", stopped)
    before, started = set(multiprocessing.active_children()), time.monotonic()
    with pytest.raises(type(stop)):
        # settings that no worker has to import torch for
        settings = SimpleNamespace(tower=None, language_model=None, fingerprint=str)
        parts.prepare(tmp_path / "parts", seed=3, progress=print, settings=settings)
    assert time.monotonic() - started < 50 and len(seen) >= 3  # two workers and the queue's
    alive = psutil.wait_procs(seen, timeout=20)[1]
    assert [(worker.pid, worker.status(), worker.num_threads()) for worker in alive] == []
    assert not list(tmp_path.iterdir())
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_the_first_process_does_not_let_interrupts_through(monkeypatch):
    tracker = resource_tracker.ResourceTracker()  # as where no process was started before
    for name in ("ensure_running", "getfd"):
        monkeypatch.setattr(resource_tracker, name, getattr(tracker, name))
    with parts._unseen_interrupts():
        resource_tracker.getfd()  # the start of a process asks for it
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, set())
    tracker._stop()
