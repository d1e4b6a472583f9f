"""Questions, batched greedy answers, prediction files, and the two commands."""

import copy
import hashlib
import io
import json
import random
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch.overrides import TorchFunctionMode
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from llava_llama31.trainer.cli import command_parser
from llava_llama31.trainer.commands.evaluate_questions import task_questions, textvqa_questions
from llava_llama31.trainer.data.sources.images import ImageRef
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation import generation, textvqa
from llava_llama31.trainer.evaluation.answering import derangement
from llava_llama31.trainer.evaluation.asker import take_turns
from llava_llama31.trainer.evaluation.generation import GreedyAnswerer, undisturbed
from llava_llama31.trainer.evaluation.presets import PRESETS, Preset
from llava_llama31.trainer.evaluation.questions import Question, load_questions
from llava_llama31.trainer.evaluation.settings import EvaluationSettings
from llava_llama31.trainer.evaluation.textvqa import evaluate
from llava_llama31.trainer.model.opening import open_model
from llava_llama31.trainer.recipes.data_formats import MAX_PIXELS
from llava_llama31.trainer.recipes.schema import Evaluation
from llava_llama31.trainer.runs.final_evaluation import question_set


SIZES = [(28, 28), (20, 90), (90, 20), (60, 50), (5, 200), (120, 121), (33, 64)]
STOP_IDS = list(range(200, 448, 7))  # of lively_model
ANSWERS = ("stop", "stop", "stop sign", "8", "8.", "stop", "no", "no", "stop", "halt")


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


@pytest.fixture(scope="module")
def questions(make_image):
    """40 questions on 25 images of many shapes."""
    draw = random.Random(0)
    images = [ImageRef(f"p{i}", data=encoded(make_image(*SIZES[i % len(SIZES)], seed=i))) for i in range(25)]
    words = ["what", "is", "the", "brand", "number", "word", "on", "this", "sign", "bottle", "clock", "left", "right"]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 9))) + "?" for _ in range(40)]
    return [Question(100 + i, f"p{i % 25}", images[i % 25], text, ANSWERS) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def many_questions(questions):
    """500 questions on those images, the last ones on few of them."""
    draw = random.Random(1)
    texts = [
        " ".join(draw.choices(["what", "brand", "is", "7", "left", "to", "Stop"], k=draw.randint(1, 12)))
        for _ in range(500)
    ]
    shown = [questions[i % 25 if i < 400 else i % 3] for i in range(500)]
    return [replace(q, question_id=i, question=text) for i, (q, text) in enumerate(zip(shown, texts, strict=True))]


def rows(folder):
    with (folder / "predictions.jsonl").open(encoding="utf-8") as file:  # splitlines would cut at U+2028 too
        return [json.loads(line) for line in file]


def without_seconds(folder):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(folder)]


def token_ids(folder):
    return {row["question_id"]: row["token_ids"] for row in rows(folder)}


# --- generation


@pytest.mark.slow
@pytest.mark.parametrize("number", [50, pytest.param(500, marks=pytest.mark.torture)])
def test_answers_do_not_depend_on_batch_size_or_order(lively_model, processor, many_questions, tmp_path, number):
    many_questions = many_questions[:number]
    evaluate(
        lively_model,
        processor,
        many_questions,
        tmp_path / "1",
        EvaluationSettings(revision="r", batch_size=1, max_new_tokens=16),
    )
    expected = token_ids(tmp_path / "1")
    lengths = {len(ids) for ids in expected.values()}
    assert len(expected) == number and len({tuple(ids) for ids in expected.values()}) > 0.4 * number
    assert len(lengths) > 8
    shuffled = random.Random(3).sample(many_questions, number)
    for batch_size, asked in ((3, many_questions), (16, many_questions), (7, shuffled)):
        folder = tmp_path / str(batch_size)
        evaluate(
            lively_model,
            processor,
            asked,
            folder,
            EvaluationSettings(revision="r", batch_size=batch_size, max_new_tokens=16),
        )
        assert token_ids(folder) == expected
    # in the caller's own order, without the evaluator's sorting
    answerer = GreedyAnswerer(lively_model, processor, max_new_tokens=16)
    prompts = [prompt_for(answerer, question) for question in shuffled[:49]]
    for start in range(0, 49, 7):
        answers = answerer.answer(prompts[start : start + 7])
        assert answers == [expected[question.question_id] for question in shuffled[start : start + 7]]


def prompt_for(answerer, question):
    content = [{"type": "image"}, {"type": "text", "text": prompt_of(question)}]
    return answerer.prompt([{"role": "user", "content": content}], [question.image.open()])


@pytest.mark.slow
def test_batch_invariant_answers_are_the_same_bits_in_bfloat16(lively_model, processor, many_questions, tmp_path):
    model = lively_model.to(torch.bfloat16)
    asked = many_questions[:32]
    shuffled = random.Random(5).sample(asked, 32)
    logits = {}

    def record(name):
        def hook(module, args, output):
            logits.setdefault(name, []).append(output[:, -1])

        return hook

    for name, batch_size, questions in (("1", 1, asked), ("16", 16, asked), ("s", 5, shuffled)):
        handle = model.lm_head.register_forward_hook(record(name))
        evaluate(
            model,
            processor,
            questions,
            tmp_path / name,
            EvaluationSettings(revision="r", batch_size=batch_size, max_new_tokens=8, batch_invariant=True),
        )
        handle.remove()
    assert token_ids(tmp_path / "1") == token_ids(tmp_path / "16") == token_ids(tmp_path / "s")
    # not just the ids: the sorted rows of all logits, bit by bit
    bits = {
        name: sorted(row.view(torch.int16).numpy().tobytes() for row in torch.cat(x)) for name, x in logits.items()
    }
    assert set(bits["1"]) == set(bits["16"]) == set(bits["s"])


class HostReads(TorchFunctionMode):
    """Counts the operations that make a host wait for its device."""

    def __init__(self):
        super().__init__()
        self.num_reads = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        waits = ("tolist", "item", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")
        self.num_reads += func.__name__ in waits
        return func(*args, **(kwargs or {}))


def test_the_host_waits_for_a_gpu_once_in_four_tokens(lively_model, processor, questions):
    answerer = GreedyAnswerer(lively_model, processor, max_new_tokens=16)
    prompts = [prompt_for(answerer, question) for question in questions[:8]]
    expected = answerer.answer(prompts)
    num_steps = max(map(len, expected))
    assert num_steps > 8  # or the count below says little
    reads = {}
    for steps_between_syncs in (1, generation.STEPS_BETWEEN_SYNCS):
        answerer._steps_between_syncs = steps_between_syncs  # 4 on a GPU
        prefixes = answerer._read(prompts)
        with HostReads() as counted:
            assert answerer._branches(prompts, prefixes) == expected
        reads[steps_between_syncs] = counted.num_reads
    assert reads == {1: num_steps, 4: -(-num_steps // 4)}


def test_each_image_is_encoded_once(lively_model, processor, questions, tmp_path):
    num_tiles = []
    handle = lively_model.model.vision_tower.embeddings.register_forward_hook(
        lambda module, inputs, output: num_tiles.append(len(output))
    )
    images = {question.image_id: question.image for question in questions}
    expected = sum(len(processor.tiles(image.open())) for image in images.values())
    for batch_size in (1, 4, 16):
        num_tiles.clear()
        folder = tmp_path / str(batch_size)
        evaluate(
            lively_model,
            processor,
            questions,
            folder,
            EvaluationSettings(revision="r", batch_size=batch_size, max_new_tokens=3),
        )
        assert sum(num_tiles) == expected  # 25 images of 40 questions
    handle.remove()


def test_a_cpu_takes_a_few_tiles_at_once_through_the_vision_tower(lively_model, processor, questions, monkeypatch):
    vision = lively_model.config.vision_config
    monkeypatch.setattr(generation, "TOWER_POSITIONS_ON_CPU", 2 * (vision.image_size // vision.patch_size) ** 2)
    num_tiles = []
    handle = lively_model.model.vision_tower.embeddings.register_forward_hook(
        lambda module, inputs, output: num_tiles.append(len(output))
    )
    answerer = GreedyAnswerer(lively_model, processor)
    prompts = [prompt_for(answerer, question) for question in questions[:8]]
    with torch.no_grad():
        answerer._read(prompts)
    handle.remove()
    images = {id(tiles): len(tiles) for prompt in prompts for tiles in prompt.tiles}
    assert max(num_tiles) == 2 < max(images.values()) and sum(num_tiles) == sum(images.values())


class OneImageATurn:
    """Stands for an asker of a model on a device: notes what it opens and asks."""

    def __init__(self, device):
        self.answerer = SimpleNamespace(model=SimpleNamespace(device=torch.device(device)))
        self.opened = {name: threading.Event() for name in "abc"}
        self.events = []

    def shows(self, batch):
        return {batch: batch}

    def open(self, image_id):
        self.events.append(f"open {image_id}")
        self.opened[image_id].set()
        return "not an image"

    def ask(self, batch, images):
        if self.answerer.model.device.type != "cpu":
            assert all(opened.wait(60) for opened in self.opened.values())
        self.events.append(f"ask {batch}")
        return [batch]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_images_are_decoded_while_a_gpu_computes_and_before_a_cpu_does(device):
    one = OneImageATurn(device)
    assert list(take_turns([(one, batch) for batch in "abc"])) == [["a"], ["b"], ["c"]]
    if device == "cpu":
        assert one.events == ["open a", "ask a", "open b", "ask b", "open c", "ask c"]
    else:
        assert sorted(one.events[:3]) == ["open a", "open b", "open c"]


def test_prefixes_of_one_row_are_those_read_alone(lively_model, processor, questions, monkeypatch):
    monkeypatch.setattr(generation, "POSITIONS_OF_A_ROW", 64)
    answerer = GreedyAnswerer(lively_model, processor)
    prompts = [prompt_for(answerer, question) for question in questions[:12]]
    with torch.no_grad():
        alone = [prefix for prompt in prompts for prefix in answerer._read([prompt])]
    num_positions = [keys.shape[2] for (keys, _), *_ in alone]
    packings = []
    handle = lively_model.register_forward_pre_hook(
        lambda module, args, kwargs: packings.append(kwargs["packing"]), with_kwargs=True
    )
    with torch.no_grad():
        together = GreedyAnswerer(lively_model, processor)._read(prompts)
        one_by_one = GreedyAnswerer(lively_model, processor, batch_invariant=True)._read(prompts)
    handle.remove()
    rows_read, alone_again = packings[: -len(prompts)], packings[-len(prompts) :]
    assert [length for row in rows_read for (length,) in row] == num_positions
    lengths = [sum(length for (length,) in row) for row in rows_read]
    assert len(rows_read) > 1 and max(lengths) <= generation.POSITIONS_OF_A_ROW
    # a further prefix would not have found room
    for length, (following, *_) in zip(lengths, rows_read[1:], strict=False):
        assert length + following[0] > generation.POSITIONS_OF_A_ROW
    assert alone_again == [[[length]] for length in num_positions]
    for expected, packed, single in zip(alone, together, one_by_one, strict=True):
        torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(single, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("num_rows", "expected"), [(1000, 16), (4, 4), (0, 1)])
def test_a_batch_fits_the_memory_of_a_cpu(lively_model, processor, num_rows, expected, monkeypatch):
    answerer = GreedyAnswerer(lively_model, processor, max_new_tokens=44)
    text = lively_model.config.get_text_config()
    # keys and values in float32 of 2,700 positions of an image, 256 of its question and 44 of the answer
    row = 3000 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    # each beside its prefix, in half of what the weights leave
    memory = lively_model.get_memory_footprint() + num_rows * row * 2 * 2
    monkeypatch.setattr(generation, "total_memory", lambda device: memory)
    assert answerer.auto_batch_size(2700) == expected


def test_a_batch_is_chosen_for_a_stock_model_whose_configuration_lacks_the_head_size(lively_model, processor):
    """Qwen2's; `evaluate` on a CPU ended in an AttributeError."""
    text = Qwen2Config(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = LlavaNextConfig(vision_config=lively_model.config.vision_config, text_config=text)
    model = LlavaNextForConditionalGeneration(config)
    model.generation_config.eos_token_id = 0
    assert GreedyAnswerer(model, processor).auto_batch_size(2700) == 16


def test_rows_that_stay_fill_the_places_of_those_that_leave():
    assert generation._close_gaps([True] * 3) == [0, 1, 2]
    assert generation._close_gaps([False] * 3) == []
    assert generation._close_gaps([True, True, False, False]) == [0, 1]
    assert generation._close_gaps([False, True, False, True, True, False, True]) == [6, 1, 4, 3]


# Transformers' eager attention takes its softmax in float32
@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 1e-10), ("eager", 1e-5)])
@pytest.mark.parametrize("steps_between_syncs", [1, generation.STEPS_BETWEEN_SYNCS])
def test_branches_equal_rows_of_their_own(
    lively_model, processor, questions, monkeypatch, attention, tolerance, steps_between_syncs
):
    """Logits of shared prefixes, padding, rows that moved and all, against a forward pass over each row; float64."""
    model = lively_model.double()
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = list(range(200, 448, 3))
    answerer = GreedyAnswerer(model, processor, max_new_tokens=9)
    answerer._steps_between_syncs = steps_between_syncs
    prompts = [prompt_for(answerer, question) for question in (*questions[:5], questions[25])]
    prompts.append(answerer.prompt([{"role": "user", "content": "no image"}]))
    rows, steps, num_rows = list(range(len(prompts))), [[] for _ in prompts], []

    def record(module, args, output):  # the head does not run over prefixes
        num_rows.append(len(output))
        for row, logits in zip(rows, output[:, -1], strict=True):
            steps[row].append(logits)

    close_gaps = generation._close_gaps

    def closed(kept):
        places = close_gaps(kept)
        rows[:] = [rows[place] for place in places]
        return places

    monkeypatch.setattr(generation, "_close_gaps", closed)
    handle = model.lm_head.register_forward_hook(record)
    answers = answerer.answer(prompts)
    handle.remove()
    assert len(set(num_rows)) > 1 and num_rows == sorted(num_rows, reverse=True)
    if steps_between_syncs == 1:  # no row is computed once its answer has ended
        assert len(set(num_rows)) > 2
        assert num_rows == [sum(len(answer) > step for answer in answers) for step in range(max(map(len, answers)))]
    for logits, prompt, answer in zip(steps, prompts, answers, strict=True):
        ids = torch.tensor([prompt.input_ids + answer])
        images = {}
        if prompt.tiles:
            tiles = torch.from_numpy(np.concatenate(prompt.tiles)).double()
            images = {"pixel_values": tiles, "image_sizes": torch.tensor(prompt.image_sizes)}
        with torch.no_grad():
            whole = model(input_ids=ids, use_cache=True, **images).logits[0, len(prompt.input_ids) - 1 : -1]
        assert torch.allclose(torch.stack(logits[: len(answer)]), whole, rtol=0, atol=tolerance)


def prompt_of(question):
    return f"{question.question}\nAnswer the question using a single word or phrase."


def test_answers_equal_stock_generation(lively_model, processor, questions, tmp_path):
    stock_folder = tmp_path / "model"
    lively_model.save_pretrained(stock_folder)
    processor.save_pretrained(stock_folder)
    stock = LlavaNextForConditionalGeneration.from_pretrained(stock_folder).eval()
    stock_processor = LlavaNextProcessor.from_pretrained(stock_folder)
    evaluate(
        lively_model, processor, questions[:8], tmp_path / "ours", EvaluationSettings(revision="r", max_new_tokens=9)
    )
    ours = token_ids(tmp_path / "ours")
    for question in questions[:8]:
        content = [{"type": "image", "image": question.image.open()}, {"type": "text", "text": prompt_of(question)}]
        inputs = stock_processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = stock.generate(**inputs, do_sample=False, max_new_tokens=9)
        assert output[0, inputs["input_ids"].shape[1] :].tolist() == ours[question.question_id]


def test_checkpoint_settings_cannot_bend_the_greedy_search(lively_model, processor, questions, tmp_path):
    evaluate(lively_model, processor, questions[:9], tmp_path / "plain", EvaluationSettings(revision="r"))
    lively_model.generation_config.update(
        do_sample=True, temperature=3.0, top_p=0.5, repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=12
    )
    evaluate(lively_model, processor, questions[:9], tmp_path / "bent", EvaluationSettings(revision="r"))
    assert token_ids(tmp_path / "bent") == token_ids(tmp_path / "plain")


def test_a_training_run_is_left_as_it_was(lively_model, processor, questions, tmp_path):
    model = lively_model
    evaluate(model, processor, questions[:6], tmp_path / "eval", EvaluationSettings(revision="r"))
    model.train()
    model.model.vision_tower.eval()
    model.config.use_cache = model.config.text_config.use_cache = False
    model.config.text_config.attention_dropout = 0.5
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.gradient_checkpointing_enable()  # its name at the lower bound
    modes = [module.training for module in model.modules()]
    config = model.config.to_dict()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    evaluate(model, processor, questions[:6], tmp_path / "train", EvaluationSettings(revision="r"))
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    assert model.config.to_dict() == config
    assert token_ids(tmp_path / "train") == token_ids(tmp_path / "eval")
    with pytest.raises(KeyError), undisturbed(model):
        torch.rand(3)
        raise KeyError
    assert [module.training for module in model.modules()] == modes
    assert torch.get_rng_state().tolist() == states[2]


@pytest.mark.parametrize("start", ["", "<|begin_of_text|>"])
def test_other_tokenizers_go_by_their_own_chat_template(tiny_model, processor, questions, start):
    theirs = type(processor)(
        processor.image_processor,
        without_llama31_tokens(processor.tokenizer),
        patch_size=processor.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=start
        + "{% for m in messages %}USER: {% for p in m.content %}{% if p.type == 'image' %}<image>\n"
        "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endfor %} ASSISTANT:",
    )
    answerer = GreedyAnswerer(tiny_model, theirs)
    image = questions[1].image.open()
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    with pytest.raises(ValueError, match="holds an image placeholder"):
        answerer.prompt(
            [{"role": "user", "content": [*messages[0]["content"], {"type": "text", "text": "<image>"}]}], [image]
        )
    ids = answerer.prompt(messages, [image]).input_ids
    assert ids == list(expected["input_ids"][0]) and ids.count(theirs.tokenizer.bos_token_id) == 1
    assert answerer.prompt([{"role": "user", "content": [{"type": "text", "text": "hm"}]}]).tiles == ()


def without_llama31_tokens(tokenizer):
    """The same tokenizer with two of Llama 3.1's tokens renamed; like many, it puts a BOS before what it encodes."""
    text = tokenizer.backend_tokenizer.to_str()
    for name in ("<|finetune_right_pad_id|>", "<|eom_id|>"):
        text = text.replace(name, name.replace("|", "!"))
    backend = Tokenizer.from_str(text)
    backend.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", tokenizer.bos_token_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        extra_special_tokens={"image_token": "<image>"},
    )


def test_answers_end_at_each_stop_token(tiny_model, processor):
    tiny_model.generation_config.eos_token_id = 17
    answerer = GreedyAnswerer(tiny_model, processor)
    names = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    assert set(answerer.stop_ids) == {17, *processor.tokenizer.convert_tokens_to_ids(names)}
    assert answerer._until_stop([1, 2, 17, 9, 17]) == [1, 2, 17]
    assert answerer._until_stop([1, 2]) == [1, 2]


# --- evaluation


def test_rows_hold_what_made_them(lively_model, processor, questions, tmp_path):
    progress = []

    def on_progress(done, total):
        assert len(rows(tmp_path)) == done  # out of the process: a kill loses no more than one batch
        progress.append((done, total))

    evaluation = evaluate(
        lively_model,
        processor,
        questions,
        tmp_path,
        EvaluationSettings(revision="abc", max_new_tokens=9),
        on_progress=on_progress,
    )
    answerer = GreedyAnswerer(lively_model, processor)
    by_id = {question.question_id: question for question in questions}
    written = rows(tmp_path)
    assert [row["question_id"] for row in written] == [question.question_id for question in questions]
    for row in written:
        question = by_id[row["question_id"]]
        assert (row["question"], row["image_id"], row["model"]) == (question.question, question.image_id, "abc")
        assert row["prompt"] == prompt_of(question) and row["seconds"] > 0
        assert row["image_sha256"] == hashlib.sha256(question.image.data).hexdigest()
        assert (row["ended"] == "stop") == (row["token_ids"][-1] in STOP_IDS)
        prompt = json.dumps(prompt_for(answerer, question).input_ids).encode()
        assert row["prompt_sha256"] == hashlib.sha256(prompt).hexdigest()
        ids = row["token_ids"][:-1] if row["token_ids"][-1] in STOP_IDS else row["token_ids"]
        assert row["answer"] == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert {row["ended"] for row in written} == {"stop", "length"}
    assert progress[-1] == (40, 40) and len(progress) == 3
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["num_questions"] == 40 and scores["failed"] == scores["missing"] == 0
    assert scores["protocols"] == evaluation.to_json()["protocols"]
    assert scores["protocols_failed_as_zero"] == scores["protocols"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "share", [0.0, 0.3, 0.999, *(pytest.param(share, marks=pytest.mark.torture) for share in (0.02, 0.55, 0.81, 1.0))]
)
def test_a_killed_evaluation_resumes_and_ends_the_same(lively_model, processor, questions, tmp_path, share):
    """The file cut at any byte is what a kill leaves behind."""
    asked = questions[:14]
    evaluate(lively_model, processor, asked, tmp_path / "whole", EvaluationSettings(revision="r", batch_size=4))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    file = tmp_path / "cut" / "predictions.jsonl"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    calls = []
    evaluate(
        lively_model,
        processor,
        asked,
        tmp_path / "cut",
        EvaluationSettings(revision="r", batch_size=4),
        on_progress=lambda done, _: calls.append(done),
    )
    assert without_seconds(tmp_path / "cut") == without_seconds(tmp_path / "whole")
    assert len(calls) <= 4 and (bool(calls) == (share < 1.0))


@pytest.mark.slow
def test_an_interrupted_evaluation_keeps_its_batches(lively_model, processor, questions, tmp_path):
    done = []

    def interrupt(count, total):
        done.append(count)
        if len(done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(
            lively_model,
            processor,
            questions,
            tmp_path,
            EvaluationSettings(revision="r", batch_size=4),
            on_progress=interrupt,
        )
    assert len(rows(tmp_path)) == done[-1] >= 9
    before = rows(tmp_path)
    evaluate(lively_model, processor, questions, tmp_path, EvaluationSettings(revision="r", batch_size=4))
    assert len(rows(tmp_path)) == 40 and all(row in rows(tmp_path) for row in before)


@pytest.mark.parametrize(
    "change",
    [
        {"revision": "other"},
        {"batch_size": 5},
        {"max_new_tokens": 3},
        {"preset": PRESETS["lmms-eval"]},
        {"blind_seed": 1},
        {"jpeg_rounds": 2},
    ],
)
def test_answers_of_different_settings_are_never_mixed(tiny_model, processor, questions, tmp_path, change):
    settings = {"revision": "r", "batch_size": 4}
    evaluate(tiny_model, processor, questions[:6], tmp_path, EvaluationSettings(**settings))
    named = {"max_new_tokens": "decoding"}.get(next(iter(change)), next(iter(change)))
    with pytest.raises(UserError, match=f"another {named}.*fix: pass another --output"):
        evaluate(tiny_model, processor, questions[:6], tmp_path, EvaluationSettings(**(settings | change)))
    with pytest.raises(UserError, match="another questions_sha256"):
        evaluate(tiny_model, processor, questions[1:7], tmp_path, EvaluationSettings(**settings))
    (tmp_path / "settings.json").unlink()
    with pytest.raises(UserError, match="no settings.json"):
        evaluate(tiny_model, processor, questions[:6], tmp_path, EvaluationSettings(**settings))


def test_failures_are_counted_and_named(lively_model, processor, questions, tmp_path, monkeypatch):
    whole = encoded(questions[0].image.open())
    asked = [
        replace(questions[0], image_id="cut", image=ImageRef("cut", data=whole[: len(whole) // 2])),
        replace(questions[1], image_id="no", image=ImageRef("no", path=str(tmp_path / "no.png"), root=str(tmp_path))),
        replace(questions[2], image_id="none", image=None),
        *questions[3:12],
    ]
    answer, poison = GreedyAnswerer.answer, asked[7].image.size()

    def answer_or_fail(self, prompts):
        if any(prompt.image_sizes == (poison,) for prompt in prompts):
            raise RuntimeError("CUDA out of memory")
        return answer(self, prompts)

    monkeypatch.setattr(GreedyAnswerer, "answer", answer_or_fail)
    report = evaluate(
        lively_model, processor, asked, tmp_path / "out", EvaluationSettings(revision="r", batch_size=5)
    ).report
    unanswerable = {question.question_id for question in asked[3:] if question.image.size() == poison}
    assert unanswerable and set(report.failed) == {100, 101, 102} | unanswerable and not report.complete
    assert [report.failed[i].split(":")[0] for i in (100, 101, 102)] == [
        "corrupt_image",
        "missing_image",
        "missing_image",
    ]
    assert all(report.failed[i] == "RuntimeError: CUDA out of memory" for i in unanswerable)
    share = (12 - len(report.failed)) / 12
    for name, score in report.protocols.items():
        assert report.protocols_failed_as_zero[name].accuracy == pytest.approx(score.accuracy * share)
    failed = [row for row in rows(tmp_path / "out") if row["answer"] is None]
    assert {row["question_id"]: row["error"] for row in failed} == report.failed
    with pytest.raises(UserError, match="not one of 3 questions is answered; question 100: corrupt_image"):
        evaluate(lively_model, processor, asked[:3], tmp_path / "nothing", EvaluationSettings(revision="r"))


def test_what_was_mended_is_asked_again_and_what_changed_is_refused(lively_model, processor, questions, tmp_path):
    missing = ImageRef("p0", path=str(tmp_path / "p0.png"), root=str(tmp_path))
    asked = [replace(questions[0], image=missing), *questions[1:6]]
    settings = {"revision": "r", "batch_size": 2, "max_new_tokens": 4}
    first = evaluate(lively_model, processor, asked, tmp_path / "out", EvaluationSettings(**settings)).report
    assert list(first.failed) == [100]
    (tmp_path / "p0.png").write_bytes(questions[0].image.data)
    again = evaluate(lively_model, processor, asked, tmp_path / "out", EvaluationSettings(**settings)).report
    assert again.complete
    evaluate(lively_model, processor, questions[:6], tmp_path / "whole", EvaluationSettings(**settings))
    assert without_seconds(tmp_path / "out") == without_seconds(tmp_path / "whole")
    (tmp_path / "p0.png").write_bytes(questions[1].image.data)
    with pytest.raises(UserError, match="question 100 was answered from another image p0"):
        evaluate(lively_model, processor, asked, tmp_path / "out", EvaluationSettings(**settings))


def test_one_bad_question_fails_alone(lively_model, processor, questions, tmp_path):
    long = Image.new("RGB", (66000, 1000))
    asked = [
        replace(questions[0], image_id="long", image=ImageRef("long", data=encoded(long), max_pixels=10**9)),
        replace(questions[1], question="lone \ud800 surrogate?"),
        replace(questions[2], question="line\u2028and\x85ends?"),
        *questions[3:6],
    ]
    report = evaluate(
        lively_model, processor, asked, tmp_path, EvaluationSettings(revision="r", jpeg_rounds=1, max_new_tokens=3)
    ).report
    assert 100 in report.failed and not set(report.failed) - {100, 101}
    assert [row["question_id"] for row in rows(tmp_path)] == [100, 101, 102, 103, 104, 105]


def test_two_evaluations_do_not_write_into_one_folder(lively_model, processor, questions, tmp_path):
    def again(done, total):
        with pytest.raises(UserError, match="another evaluation writes into this folder"):
            evaluate(
                lively_model, processor, questions[:4], tmp_path, EvaluationSettings(revision="r", max_new_tokens=2)
            )

    evaluate(
        lively_model,
        processor,
        questions[:4],
        tmp_path,
        EvaluationSettings(revision="r", max_new_tokens=2),
        on_progress=again,
    )


@given(st.sets(st.text(max_size=5), min_size=2, max_size=40), st.integers(0, 5))
def test_no_image_keeps_its_place_in_a_derangement(image_ids, seed):
    shown = derangement(image_ids, seed)
    assert shown.keys() == set(shown.values()) == image_ids
    assert all(shown[image_id] != image_id for image_id in image_ids)
    assert shown == derangement(sorted(image_ids, reverse=True), seed)


@pytest.mark.slow
def test_blind_shows_each_question_another_image(lively_model, processor, questions, tmp_path):
    evaluate(lively_model, processor, questions, tmp_path / "blind", EvaluationSettings(revision="r", blind_seed=2))
    images = {question.image_id: question.image for question in questions}
    blind = {row["question_id"]: row for row in rows(tmp_path / "blind")}
    assert all(row["shown_image_id"] != row["image_id"] for row in blind.values())
    swapped = [replace(q, image=images[blind[q.question_id]["shown_image_id"]]) for q in questions]
    evaluate(lively_model, processor, swapped, tmp_path / "swapped", EvaluationSettings(revision="r"))
    assert token_ids(tmp_path / "swapped") == token_ids(tmp_path / "blind")
    with pytest.raises(UserError, match="at least two images"):
        evaluate(
            lively_model, processor, questions[:1], tmp_path / "one", EvaluationSettings(revision="r", blind_seed=2)
        )


def test_presets_word_the_question_as_their_evaluators_do(lively_model, processor, questions, tmp_path):
    asked = replace(questions[0], question="what is NASA's {ocr_tokens}?", ocr_tokens=("NASA", "{question}"))
    ending = "\nAnswer the question using a single word or phrase."
    assert PRESETS["card"].text(asked) == "what is NASA's {ocr_tokens}?" + ending
    assert PRESETS["lmms-eval"].text(asked) == "What is nasa's {ocr_tokens}?" + ending
    told = "what is NASA's {ocr_tokens}?\nReference OCR token: NASA, {question}" + ending
    assert PRESETS["llava"].text(asked) == told
    with pytest.raises(UserError, match="no {question}"):
        Preset("mine", "Describe it.")
    with pytest.raises(
        UserError, match="question 100: the prompt of llava contains OCR tokens, and 40 questions have no"
    ):
        evaluate(
            lively_model, processor, questions, tmp_path, EvaluationSettings(revision="r", preset=PRESETS["llava"])
        )
    with_tokens = [replace(question, ocr_tokens=("a",)) for question in questions[:3]]
    evaluate(
        lively_model,
        processor,
        with_tokens,
        tmp_path,
        EvaluationSettings(revision="r", preset=PRESETS["llava"], max_new_tokens=2),
    )
    assert all("\nReference OCR token: a\n" in row["prompt"] for row in rows(tmp_path))


def test_jpeg_rounds_are_what_the_model_sees(lively_model, processor, questions, tmp_path):
    evaluate(
        lively_model,
        processor,
        questions,
        tmp_path / "2",
        EvaluationSettings(revision="r", jpeg_rounds=2, max_new_tokens=8),
    )
    twice = []
    for question in questions:
        image = question.image.open()
        for _ in range(2):
            image = Image.open(io.BytesIO(encoded(image, "JPEG"))).convert("RGB")
        twice.append(replace(question, image=ImageRef(question.image_id, data=encoded(image))))
    evaluate(lively_model, processor, twice, tmp_path / "once", EvaluationSettings(revision="r", max_new_tokens=8))
    evaluate(lively_model, processor, questions, tmp_path / "0", EvaluationSettings(revision="r", max_new_tokens=8))
    assert token_ids(tmp_path / "2") == token_ids(tmp_path / "once") != token_ids(tmp_path / "0")


# --- files


@pytest.fixture(scope="module")
def files(questions, tmp_path_factory):
    """The same questions as JSON Lines, as TextVQA's JSON and in lmms-lab's parquet layout, images beside them."""
    folder = tmp_path_factory.mktemp("textvqa")
    for question in questions[:25]:
        suffix = ".png" if question.question_id % 3 else ".jpg"
        (folder / f"{question.image_id}{suffix}").write_bytes(question.image.data)
    plain = [
        {"question_id": q.question_id, "image_id": q.image_id, "question": q.question, "answers": list(q.answers)}
        for q in questions
    ]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, plain)) + "\n", encoding="utf-8")
    named = [
        row | {"image": f"{row['image_id']}{'.png' if i % 25 % 3 != 2 else '.jpg'}"} for i, row in enumerate(plain)
    ]
    (folder / "named.jsonl").write_text("\n".join(map(json.dumps, named)) + "\n", encoding="utf-8")
    official = {"dataset_type": "val", "data": [row | {"ocr_tokens": ["OPEN", "24h"]} for row in plain]}
    (folder / "official.json").write_text(json.dumps(official), encoding="utf-8-sig")
    (folder / "shards").mkdir()
    for shard, part in enumerate((plain[:30], plain[30:])):
        images = [{"bytes": questions[row["question_id"] - 100].image.data, "path": None} for row in part]
        table = pyarrow.table(
            {
                "image_id": [row["image_id"] for row in part],
                "question_id": [row["question_id"] for row in part],
                "question": [row["question"] for row in part],
                "image": images,
                "answers": [row["answers"] for row in part],
                "ocr_tokens": [["OPEN", "24h"]] * len(part),
            }
        )
        pyarrow.parquet.write_table(table, folder / "shards" / f"validation-0000{shard}-of-00002.parquet")
    return folder


@pytest.mark.parametrize("name", ["q.jsonl", "named.jsonl", "official.json", "shards", "shards/validation-*.parquet"])
def test_every_format_gives_the_same_questions(files, questions, name):
    loaded = load_questions(files / name)
    tokens = ("OPEN", "24h") if "official" in name or "shards" in name else None
    for ours, expected in zip(loaded, questions, strict=True):
        assert replace(ours, image=None) == replace(expected, image=None, ocr_tokens=tokens)
        assert np.array_equal(np.asarray(ours.image.open()), np.asarray(expected.image.open()))
    assert len({id(question.image) for question in loaded}) == 25
    assert [question.question_id for question in load_questions(files / name, limit=7)] == list(range(100, 107))
    assert all(question.image is None for question in load_questions(files / name, with_images=False))


GOOD = {"question_id": 1, "image_id": "p0", "question": "?", "answers": ["a"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", None, "x.jsonl: cannot be read: No such file"),
        ("x.jsonl", "", "x.jsonl: no questions"),
        ("x.jsonl", '{"question_id": 1', "x.jsonl:1: not JSON"),
        ("x.jsonl", "[1]", "x.jsonl:1: not an object"),
        ("x.jsonl", json.dumps(GOOD | {"answers": None}), "x.jsonl:1: no answers"),
        ("x.jsonl", json.dumps(GOOD | {"answers": []}), "x.jsonl:1: answers is not a list of texts"),
        ("x.jsonl", json.dumps(GOOD | {"answers": "a"}), "x.jsonl:1: answers is not a list of texts"),
        ("x.jsonl", json.dumps(GOOD | {"ocr_tokens": "OPEN"}), "x.jsonl:1: ocr_tokens is not a list of texts"),
        ("x.jsonl", json.dumps(GOOD | {"ocr_tokens": [8]}), "x.jsonl:1: ocr_tokens is not a list of texts"),
        ("x.jsonl", json.dumps(GOOD | {"question": 5}), "x.jsonl:1: question_id or question of a wrong type"),
        ("x.jsonl", json.dumps(GOOD | {"image": 5}), "x.jsonl:1: image is 5"),
        ("x.jsonl", json.dumps(GOOD | {"image": "../../etc/passwd"}), "x.jsonl:1: .*outside"),
        ("x.jsonl", json.dumps(GOOD | {"image": "https://x.org/a.png"}), "x.jsonl:1: .*URLs are not fetched"),
        ("x.jsonl", f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}", "x.jsonl:2: question_id 1 occurs twice, .*x.jsonl:1"),
        ("x.jsonl", '{"question_id": 1, "question_id": 2}', "x.jsonl:1: not JSON: key 'question_id' is given twice"),
        ("x.json", '[{"answers": ["a"], "answers": ["b"]}]', "x.json: not JSON: key 'answers' is given twice"),
        ("x.tsv", "index\tquestion\tanswer\tanswer\n", "no questions"),
        ("x.tsv", "index\tquestion\tanswer\tanswer\n1\t?\t['a']\t['b']\n", "x.tsv:2: column 'answer' occurs twice"),
        ("x.json", '{"rows": []}', "x.json: neither a list"),
        ("x.json", "[1]", r"x.json\[0\]: not an object"),
        ("x.parquet", "PAR1", "x.parquet: cannot be read"),
        ("*.parquet", None, "no parquet file there"),
    ],
)
def test_bad_question_files_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_questions(tmp_path / name)
    assert "(fix: " in str(caught.value) and "\n" not in str(caught.value)


def test_two_images_under_one_image_id_are_refused_with_both_rows(tmp_path):
    for colour in ("red", "blue"):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{colour}.png")
    shutil.copy(tmp_path / "red.png", tmp_path / "copy.png")
    rows = [
        GOOD | {"question_id": number, "image_id": "page", "image": image}
        for number, image in enumerate(["red.png", "./red.png", "copy.png", None, "blue.png"])
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, rows[:4])))
    shown = load_questions(path)
    assert {question.image.name for question in shown} == {"red.png"}
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"q\.jsonl:5: image_id page is another image here than in .*q\.jsonl:1"):
        load_questions(path)
    assert len(load_questions(path, with_images=False)) == 5
    shutil.copy(tmp_path / "blue.png", tmp_path / "page.png")
    path.write_text("\n".join(map(json.dumps, [rows[0], rows[3]])))  # the second row's is page.png
    with pytest.raises(UserError, match=r"q\.jsonl:2: image_id page is another image"):
        load_questions(path)


@pytest.mark.parametrize("field", ["image_path", "img", "file_name", "images", "Image"])
def test_an_image_under_another_name_is_the_rows_own(tmp_path, field):
    for name, colour in (("p0", "red"), ("own", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{name}.png")
    path = tmp_path / "q.jsonl"
    for value, shown in (("own.png", "own.png"), (None, "p0.png"), (["own.png"], "own.png")):
        path.write_text(json.dumps(GOOD | {field: value, "flickr_original_url": "https://h/x.jpg"}))
        assert [question.image.name for question in load_questions(path)] == [shown]
    path.write_text(json.dumps(GOOD | {field: "https://h/x.jpg"}))  # where it is from
    assert load_questions(path)[0].image.name == "p0.png"
    for row in ({field: ["own.png", "p0.png"]}, {field: "own.png", "picture": "p0.png"}):
        path.write_text(json.dumps(GOOD | row))
        with pytest.raises(UserError, match=r"q\.jsonl:1: .* give 2 images \(fix: name the one image"):
            load_questions(path)


@pytest.mark.parametrize("as_bytes", [False, True], ids=["object", "plain bytes"])
def test_embedded_images_under_one_image_id_are_compared(tmp_path, as_bytes):
    colours = {colour: io.BytesIO() for colour in ("red", "blue")}
    for colour, file in colours.items():
        Image.new("RGB", (4, 4), colour).save(file, "PNG")
    for second, is_same in (("red", True), ("blue", False)):
        rows = [
            GOOD | {"question_id": n, "image": data if as_bytes else {"bytes": data, "path": None}}
            for n, data in enumerate(colours[colour].getvalue() for colour in ("red", second))
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "q.parquet")
        if is_same:
            first, other = load_questions(tmp_path / "q.parquet")
            assert first.image is other.image
        else:
            with pytest.raises(UserError, match=r"q\.parquet\[1\]: image_id p0 .* than in .*q\.parquet\[0\]"):
                load_questions(tmp_path / "q.parquet")


def test_a_key_of_vqas_files_and_of_vlmevalkits_table_stands_for_one_row(tmp_path):
    question = {"question_id": 1, "image_id": "p0", "question": "?"}
    annotation = {"question_id": 1, "image_id": "p0", "answers": [{"answer": "a"}]}
    for questions, annotations, place in (
        ([question, question], [annotation], r"q\.json\[1\]: question_id 1 occurs twice, first in .*q\.json\[0\]"),
        ([question], [annotation, annotation], r"a\.json\[1\]: question_id 1 occurs twice, first in .*a\.json\[0\]"),
    ):
        (tmp_path / "q.json").write_text(json.dumps({"questions": questions}))
        (tmp_path / "a.json").write_text(json.dumps({"annotations": annotations}))
        with pytest.raises(UserError, match=place):
            load_questions(tmp_path / "a.json", questions=tmp_path / "q.json", with_images=False)
    table = "index\tquestion_id\tquestion\tanswer\n7\t1\t?\t['a']\n7\t2\t?\t['b']\n"
    (tmp_path / "t.tsv").write_text(table)
    with pytest.raises(UserError, match=r"t\.tsv:3: index 7 occurs twice, first in .*t\.tsv:2"):
        load_questions(tmp_path / "t.tsv", with_images=False)


def test_shards_of_several_splits_are_refused(files, tmp_path):
    for split in ("train", "validation"):
        shutil.copy(files / "shards" / "validation-00000-of-00002.parquet", tmp_path / f"{split}-0.parquet")
    with pytest.raises(UserError, match=r"several splits \(train, validation\)"):
        load_questions(tmp_path)


# --- commands


@pytest.fixture(scope="module")
def folder(processor, pristine_config, tmp_path_factory):
    from llava_llama31 import LlavaLlama31ForConditionalGeneration

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("model")
    LlavaLlama31ForConditionalGeneration(copy.deepcopy(pristine_config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def command(*arguments: object) -> int:
    """Exit code of a command, whose errors are raised."""
    options = command_parser().parse_args(list(map(str, arguments)))
    return options.run(options)


def test_the_output_folder_keeps_its_name():
    settings = EvaluationSettings(revision="abc", data="data/q.jsonl", limit=9, jpeg_rounds=2, blind_seed=0)
    # of an evaluation by an earlier version: it resumes there
    assert settings.folder("models/mine", "torch.float32") == Path("runs/evaluate/mine-q-3d4576a4")


def test_evaluate_and_score_commands_agree(folder, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command("evaluate", folder, "--data", files / "q.jsonl", "--limit", 9, "--json") == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["num_questions"] == 9 and set(evaluated["protocols"]["m4c"]) == {"accuracy", "low", "high"}
    assert evaluated["settings"]["revision"] == textvqa.weights_revision(folder)
    lines = [line for number, line in enumerate((files / "q.jsonl").read_text().splitlines()) if number < 9]
    (tmp_path / "nine.jsonl").write_text("\n".join(lines))
    assert command("score", evaluated["predictions"], "--annotations", "nine.jsonl", "--json") == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored.pop("layout") == "question ids and answers"
    assert scored == {key: evaluated[key] for key in scored}
    # the second time there is nothing left to generate
    monkeypatch.setattr(GreedyAnswerer, "answer", None)
    assert command("evaluate", folder, "--data", files / "q.jsonl", "--limit", 9) == 0
    out = capsys.readouterr().out
    assert "9 of 9 questions" in out and "vlmevalkit-2024" in out and "unanswered" not in out


@pytest.mark.slow
def test_the_bar_shows_how_far_it_is_and_how_long_it_takes(folder, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    options = ["--data", files / "q.jsonl", "--batch-size", 1, "--output", tmp_path / "out", "--no-browser"]
    assert command("evaluate", folder, *options) == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    frames = re.findall(r"answering .*?(\d+)/40 (\d:\d\d:\d\d) (\d:\d\d:\d\d|-:--:--)", shown)
    done = [int(frame[0]) for frame in frames]
    assert done == sorted(done) and done[-1] == 40 and len(set(done)) > 2
    assert any(0 < int(number) < 40 and left != "-:--:--" for number, _, left in frames)


def test_failed_questions_set_the_exit_code(folder, files, tmp_path, capsys):
    lines = (files / "q.jsonl").read_text().splitlines()[:3]
    for i in (0, 1):
        shutil.copy(next(files.glob(f"p{i}.*")), tmp_path)
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    options = ["--data", tmp_path / "q.jsonl", "--output", tmp_path / "out", "--max-new-tokens", 2]
    assert command("evaluate", folder, *options) == 3
    out = capsys.readouterr().out
    assert "2 of 3 questions answered" in out and "unanswered as 0" in out and "102 (missing_image" in out


@pytest.mark.parametrize("kind", ["path", "bytes", "task"])
def test_the_largest_image_is_the_users_to_set(make_image, tmp_path, kind):
    make_image(30, 20).save(tmp_path / "a.png")
    row = {"question_id": 1, "image_id": "a", "question": "?", "answers": ["x"], "image": "a.png"}
    row |= {"question": "?", "answer": "x", "metric": "exact"} if kind == "task" else {}
    source = write_lines(tmp_path / "q.jsonl", [row])
    if kind == "bytes":
        table = pyarrow.Table.from_pylist([row | {"image": {"bytes": (tmp_path / "a.png").read_bytes()}}])
        source = str(tmp_path / "q.parquet")
        pyarrow.parquet.write_table(table, source)

    def shown(*limit):
        given = ["--task" if kind == "task" else "--data", source, *limit]
        options = command_parser().parse_args(["evaluate", "model", *given])
        questions = task_questions(options)[0][3] if kind == "task" else textvqa_questions(options)
        return questions[0].image

    def of_recipe(**limit):
        spec = {"task": source} if kind == "task" else {"data": source}
        return question_set(Evaluation.model_validate(spec | limit), where="evaluation").questions[0].image

    assert shown().max_pixels == of_recipe().max_pixels == MAX_PIXELS == 40_000_000
    for image in (shown("--max-pixels", "599"), of_recipe(max_pixels=599)):
        with pytest.raises(RecordError, match="30 x 20 pixels, more than 599: raise max_pixels .`--max-pixels`"):
            image.open()
    assert shown("--max-pixels", "600").open().size == of_recipe(max_pixels=600).open().size == (20, 30)


def write_lines(path, objects):
    path.write_text("\n".join(map(json.dumps, objects)) + "\n", encoding="utf-8")
    return str(path)


def test_score_counts_missing_failed_doubled_and_unknown_answers(tmp_path, capsys):
    annotations = write_lines(
        tmp_path / "a.jsonl",
        [{"question_id": i, "image_id": f"p{i}", "question": "?", "answers": ["yes"] * 10} for i in range(6)],
    )
    predictions = write_lines(
        tmp_path / "p.jsonl",
        [
            {"question_id": 0, "answer": "Yes."},
            {"question_id": "1", "answer": "no"},
            {"question_id": 2, "answer": None, "error": "corrupt_image: cut"},
            {"question_id": 0, "answer": "no"},
            {"question_id": 77, "answer": "yes"},
            {"question_id": 4, "answer": "yes"},
        ],
    )
    assert command("score", predictions, "--annotations", annotations, "--json") == 3
    result = json.loads(capsys.readouterr().out)
    counts = {key: result[key] for key in ("num_questions", "missing", "failed", "duplicates", "unknown")}
    assert counts == {"num_questions": 6, "missing": 2, "failed": 1, "duplicates": 1, "unknown": 1}
    assert (result["missing_ids"], result["failed_ids"]) == ([3, 5], {"2": "corrupt_image: cut"})
    assert (result["duplicate_ids"], result["unknown_ids"]) == ([0], ["77"])
    for name in ("vlmevalkit-2024", "vlmevalkit-2025", "m4c"):
        assert result["protocols"][name]["accuracy"] == 2 / 3
        assert result["protocols_failed_as_zero"][name]["accuracy"] == 2 / 6
    assert command("score", predictions, "--annotations", annotations) == 3
    out = capsys.readouterr().out
    assert "missing: 2: 3, 5" in out and "not annotated: 1: 77" in out and "2 (corrupt_image: cut)" in out


def test_score_reads_the_answers_that_llava_writes(tmp_path, capsys):
    annotations = write_lines(
        tmp_path / "a.jsonl",
        [
            {"question_id": i, "image_id": f"p{i // 2}", "question": f"{i}?", "answers": [f"w{i}"] * 10}
            for i in range(4)
        ],
    )
    theirs = [{"question_id": f"p{i // 2}", "prompt": f"{i}?", "text": f"W{i}"} for i in range(4)]
    for rows in (theirs, theirs[::-1]):
        assert command("score", write_lines(tmp_path / "l.jsonl", rows), "--annotations", annotations, "--json") == 0
        assert json.loads(capsys.readouterr().out)["protocols"]["m4c"]["accuracy"] == 1
    with pytest.raises(UserError, match="1 of 4 answers are to questions that are not annotated"):
        other = [theirs[0] | {"prompt": "5?"}, *theirs[1:]]
        command("score", write_lines(tmp_path / "l.jsonl", other), "--annotations", annotations)
    with pytest.raises(UserError, match=r"l.jsonl:1: no question_id, or no answer"):
        command("score", write_lines(tmp_path / "l.jsonl", [{"question_id": 1}]), "--annotations", annotations)


@pytest.mark.parametrize("wrong", ["nowhere", "empty", "not_a_model", "other_type"])
def test_models_that_cannot_be_opened_are_named(folder, tmp_path, wrong):
    path = tmp_path / wrong
    if wrong != "nowhere":
        path.mkdir()
    if wrong == "not_a_model":
        (path / "config.json").write_text("{}")
    if wrong == "other_type":
        shutil.copytree(folder, path, dirs_exist_ok=True)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(UserError, match=wrong):
        open_model(str(path))


def test_a_checkpoint_without_some_weights_is_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights, the first lm_head.weight"):
        open_model(str(tmp_path))
    assert textvqa.weights_revision(tmp_path) != textvqa.weights_revision(folder)


# --- OCR


@pytest.mark.slow
def test_ocr_tokens_are_read_once(questions, tmp_path, monkeypatch):
    from llava_llama31.trainer.evaluation import ocr

    pytest.importorskip("rapidocr")
    image = Image.new("RGB", (400, 160), "white")
    ImageDraw.Draw(image).text((30, 40), "STOP 42", fill="black", font=ImageFont.load_default(72))
    sign = replace(questions[0], image_id="sign", image=ImageRef("sign", data=encoded(image)))
    broken = replace(questions[1], image_id="broken", image=ImageRef("broken", data=b"no image"))
    cache = tmp_path / "ocr_tokens.jsonl"
    read = ocr.with_ocr_tokens([sign, replace(sign, question_id=7), broken], cache)
    assert [question.ocr_tokens for question in read] == [("STOP", "42"), ("STOP", "42"), ()]
    cache.write_text(cache.read_text() + '{"image_id": "cut', encoding="utf-8")
    monkeypatch.setattr(ocr, "_reader", None)  # all is in the cache
    assert ocr.with_ocr_tokens([sign, broken], cache) == [read[0], read[2]]
