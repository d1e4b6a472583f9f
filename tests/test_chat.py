"""Conversations: the answers of `evaluate`, in pieces; what is typed is read as it is meant."""

import copy
import io
import json
import shlex
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_llama31.trainer.chat.conversation import Conversation, Sampling, answer_to
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.commands.chat import split_images
from llava_llama31.trainer.costs.matrix_peak import CpuSpeed
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation import precision
from llava_llama31.trainer.evaluation.generation import GreedyAnswerer


@pytest.fixture
def files(make_image, tmp_path):
    paths = []
    for name, size in (("a sign.png", (40, 60)), ("it's.jpg", (90, 30))):
        make_image(*size, seed=sum(size)).save(tmp_path / name)
        paths.append(str(tmp_path / name))
    return paths


@pytest.fixture
def model_folder(lively_model, processor, tmp_path):
    lively_model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def typed(monkeypatch, model_folder):
    """Exit code of a chat in which these lines are typed."""

    def chat(*lines: str, options: tuple[str, ...] = ()) -> int:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return main(["chat", model_folder, "--max-new-tokens", "12", *options])

    return chat


def answers_of(model, processor, paths, *questions):
    """Of the evaluator, turn by turn; the first question shows the images."""
    answerer = GreedyAnswerer(model, processor, max_new_tokens=12)
    images = [Image.open(path) for path in paths]
    messages, answers = [], []
    for number, question in enumerate(questions):
        parts = [{"type": "image"} for _ in images] if number == 0 else []
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        (ids,) = answerer.answer([answerer.prompt(messages, images)])
        answers.append(answerer.text(ids))
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answers[-1]}]})
    return answers


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_every_turn_has_the_evaluators_answer(lively_model, processor, files, num_images):
    expected = answers_of(lively_model, processor, files[:num_images], "what?", "and why?", "sure?")
    chat = Conversation(lively_model, processor, max_new_tokens=12)
    for path in files[:num_images]:
        chat.add_image(path)
    assert ["".join(chat.ask(text)).strip() for text in ("what?", "and why?", "sure?")] == expected
    assert len(set(expected)) > 1
    turns = chat.to_json()
    assert [turn["images"] for turn in turns] == [files[:num_images], [], [], [], [], []]
    assert [turn["text"] for turn in turns[1::2]] == expected
    chat.reset()
    assert answer_to(chat, "what?", files[:num_images]) == expected[0] and len(chat.messages) == 2


def test_an_image_may_come_later(lively_model, processor, files):
    chat = Conversation(lively_model, processor, max_new_tokens=12, system="be short")
    first = "".join(chat.ask("who?")).strip()
    said = answer_to(chat, "what?", files[:1])
    answerer = GreedyAnswerer(lively_model, processor, max_new_tokens=12)
    turns = [("system", "be short", 0), ("user", "who?", 0), ("assistant", first, 0), ("user", "what?", 1)]
    messages = [
        {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}
        for role, text, images in turns
    ]
    (ids,) = answerer.answer([answerer.prompt(messages, [Image.open(files[0])])])
    assert said == answerer.text(ids)


@settings(max_examples=60)
@given(text=st.text(max_size=30), more=st.lists(st.integers(0, 447), max_size=12))
def test_pieces_are_the_text_and_end_between_characters(pieces_of, text, more):
    pieces, whole = pieces_of(text, more)
    assert "".join(pieces) == whole
    for piece in pieces[:-1]:
        assert not piece.endswith("\ufffd")


@pytest.fixture(scope="module")
def pieces_of(processor):
    def pieces(text, more):
        ids = [*processor.tokenizer.encode(text, add_special_tokens=False), *more]
        chat = Conversation.__new__(Conversation)
        chat._answerer = type("Answerer", (), {"processor": processor})
        return list(chat._pieces(iter(ids))), processor.tokenizer.decode(ids, skip_special_tokens=True).lstrip()

    return pieces


def test_draws_are_repeatable_and_differ_from_the_most_likely_answer(lively_model, processor, files):
    def said(sampling):
        return answer_to(Conversation(lively_model, processor, max_new_tokens=12, sampling=sampling), "?", files[:1])

    assert said(Sampling(2.0, seed=1)) == said(Sampling(2.0, seed=1)) != said(Sampling(2.0, seed=2))
    assert said(Sampling(1e-4)) == said(Sampling(top_p=1e-6)) == said(None)


def test_a_draw_follows_temperature_and_top_p():
    logits = torch.tensor([[2.0, 1.0, 0.0, -9.0]]).expand(20_000, -1)
    choose = Sampling(temperature=2.0, top_p=0.8).choice(torch.device("cpu"))
    drawn = torch.bincount(choose(logits), minlength=4) / len(logits)
    weights = (torch.tensor([2.0, 1.0, 0.0, -9.0]) / 2).softmax(0)
    kept = torch.where(weights.cumsum(0) - weights < 0.8, weights, 0)  # the first that reaches it is kept
    torch.testing.assert_close(drawn, kept / kept.sum(), atol=0.02, rtol=0)


def test_a_stopped_answer_is_kept_as_it_stands(lively_model, processor):
    chat = Conversation(lively_model, processor, max_new_tokens=12)
    pieces = chat.ask("what?")
    first = next(pieces)
    pieces.close()
    assert chat.to_json()[-1] == {"role": "assistant", "images": [], "text": first.strip()}


def test_a_conversation_that_is_too_long_says_so(lively_model, processor):
    lively_model.config.text_config.max_position_embeddings = 40
    chat = Conversation(lively_model, processor, max_new_tokens=200)
    list(chat.ask("what?"))
    with pytest.raises(UserError, match=r"the model's context holds 40 \(fix: start again with /reset"):
        list(chat.ask("what? " * 40))
    assert len(chat.messages) == 2  # the question is not there


def test_one_question_is_answered_on_stdout(model_folder, lively_model, processor, files, capsys):
    expected = answers_of(lively_model, processor, files, "what?")
    options = [part for path in files for part in ("--image", path)]
    assert main(["chat", model_folder, *options, "--ask", "what?", "--max-new-tokens", "12"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{expected[0]}\n" and not printed.err


@pytest.mark.parametrize(("options", "dtype"), [([], "float32"), (["--dtype", "bfloat16"], "bfloat16")])
def test_answers_are_in_float32_where_bfloat16_is_emulated(
    lively_model, processor, files, tmp_path, capsys, options, dtype
):
    narrow = copy.deepcopy(lively_model).to(torch.bfloat16)
    narrow.save_pretrained(tmp_path / "narrow")
    processor.save_pretrained(tmp_path / "narrow")
    slow = partial(precision.answers_in_float32, measure=lambda: CpuSpeed(2e9, 76e9, "x86_64, AVX2"))
    command = ["chat", str(tmp_path / "narrow"), "--image", str(files[0]), "--ask", "what?", "--max-new-tokens", "2"]
    with mock.patch.object(precision, "answers_in_float32", slow):
        assert main([*command, "--device", "cpu", *options]) == 0
    assert f"answering in {dtype}" in capsys.readouterr().err


def test_a_conversation_in_the_terminal(typed, files, lively_model, processor, tmp_path, capsys):
    expected = answers_of(lively_model, processor, files, "what's it?", "and?")
    lines = [
        "/image '" + files[0] + "'",
        f'"{files[1]}"',
        "what's it?",
        "and?",
        f"/save {tmp_path}/said.json",
        f"/save {tmp_path}/said.json",
        "/rest",
        "/reset",
        f"{shlex.quote(files[0])} file://{files[0].replace(' ', '%20')} what?",
        "/image /none.png",
        "/image",
        "",
        "/exit",
        "never asked",
    ]
    assert typed(*lines) == 0
    printed = capsys.readouterr()
    assert [line.strip() for line in printed.out.splitlines()[:2]] == expected and len(printed.out.splitlines()) == 3
    turns = json.loads((tmp_path / "said.json").read_text())["turns"]
    assert [turn["text"] for turn in turns] == ["what's it?", expected[0], "and?", expected[1]]
    assert turns[0]["images"] == files
    said = printed.err
    assert f"error: {tmp_path}/said.json: File exists" in said and "did you mean /reset?" in said
    assert "error: /none.png: " in said and "error: /image: names no file" in said
    assert said.count(f"{files[0]}: 60 x 40 pixels") == 3


def test_text_of_a_model_is_not_control_sequences(typed, monkeypatch, capsys):
    monkeypatch.setattr(Conversation, "ask", lambda self, text: (piece for piece in ["a\x1b[31m", "b\nc"]))
    assert typed("what?") == 0
    assert capsys.readouterr().out == "a\\x1b[31mb\nc\n"


@pytest.mark.parametrize(
    ("line", "images", "text"),
    [
        ("what's this?", 0, "what's this?"),
        ("'what is this?", 0, "'what is this?"),
        ("/usr/none.png what?", 0, "/usr/none.png what?"),
        ("{plain} what?", 1, "what?"),
        ("'{plain}'  '{plain}'", 2, ""),
        ("look: {plain}", 0, "look: {plain}"),
        ("{text} what?", 0, "{text} what?"),
    ],
)
def test_paths_that_a_line_begins_with_are_images(make_image, tmp_path, line, images, text):
    make_image(20, 20).save(tmp_path / "plain.png")
    (tmp_path / "notes.txt").write_text("no image")
    names = {"plain": tmp_path / "plain.png", "text": tmp_path / "notes.txt"}
    assert split_images(line.format(**names)) == ([str(names["plain"])] * images, text.format(**names))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--top-p", "1.5"), "--top-p: 1.5 is above 1"),
        (("--image", "none.png", "--ask", "what?"), "none.png"),
        (
            ("--image", "{sign}", "--ask", "?", "--max-pixels", "2399"),
            "more than 2,399: raise max_pixels",
        ),
    ],
)
def test_what_cannot_be_is_said(typed, files, options, message, capsys):
    assert typed(options=[option.format(sign=files[0]) for option in options]) == 2
    assert message in capsys.readouterr().err


def test_images_of_the_page_have_the_same_limit(processor, lively_model, files):
    data = Path(files[0]).read_bytes()
    with pytest.raises(UserError, match=r"^sign: 40 x 60 pixels, more than 2,399: .*`--max-pixels`.* smaller$"):
        Conversation(lively_model, processor, max_pixels=2399).add_images([("sign", data)])
    Conversation(lively_model, processor, max_pixels=2400).add_images([("sign", data)])


def test_a_run_is_its_export(model_folder, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text("{}")
    assert main(["chat", str(run), "--ask", "what?"]) == 2
    assert "the run has not finished, so it has no export" in capsys.readouterr().err
    (run / "export").symlink_to(model_folder)
    assert main(["chat", str(run), "--ask", "what?", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.strip()
