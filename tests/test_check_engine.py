"""check-engine against servers around our own model: each planted fault is found and named."""

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from engine_server import Engine, serving
from PIL import Image

from llava_llama31.processing import build_processor
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.engines import check
from llava_llama31.trainer.engines.client import EngineClient
from llava_llama31.trainer.engines.questions import fixed_questions, sign
from llava_llama31.trainer.engines.reference import (
    DROPPED,
    ON_BLACK,
    PADDED_RIGHT,
    read_reference,
    record_reference,
)
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.model.opening import open_model


@pytest.fixture(scope="module")
def served(lively_folder):
    return open_model(lively_folder)


@pytest.fixture(scope="module")
def paired(lively_folder):
    """A model whose tokens come in pairs of almost equal logits, which half precision turns round."""
    model, processor = open_model(lively_folder)
    head = model.lm_head.weight.data
    torch.manual_seed(3)
    head[1::2] = head[::2] + 1e-3 * torch.randn_like(head[::2])
    return model, processor


@pytest.fixture(scope="module")
def folder(served, make_once):
    return make_once("engine", lambda folder: (folder / "reference.json").write_text(record_reference(*served)))


@pytest.mark.slow
def test_float16_is_named(paired, tmp_path, capsys):
    (tmp_path / "reference.json").write_text(record_reference(*paired))
    model, processor = paired
    report = checked(tmp_path, Engine(copy.deepcopy(model).half(), processor), capsys)
    assert 0 < report["equal"] < report["asked"] and report["likely"] == check.PRECISION


def checked(folder, engine: Engine, capsys, *options: str) -> dict[str, Any]:
    with serving(engine) as url:
        code = main(["check-engine", str(folder), "--url", url, "--json", "--concurrency", "4", *options])
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"asked", "equal", "first_difference", "likely"}
    assert code == (0 if report["equal"] == report["asked"] else 3)
    return report


@pytest.mark.slow
def test_a_faithful_engine_gives_every_answer(folder, served, capsys):
    report = checked(folder, Engine(*served), capsys)
    assert report == {"asked": 14, "equal": 14, "first_difference": None, "likely": None}
    assert checked(folder, Engine(*served, counts=False), capsys)["equal"] == 14


def test_the_questions_cover_what_engines_get_wrong(served):
    processor = served[1]
    grids = processor.image_processor.image_grid_pinpoints
    questions = {question.id: question for question in fixed_questions(grids, processor.tile_size)}
    tiles = [processor.num_tiles(image.size[::-1]) for q in questions.values() if "grid" in q.id for image in q.images]
    places = {
        (place.grid_height, place.grid_width)
        for question in questions.values()
        for image in question.images
        for place in [processor.placement(image.size[::-1])]
    }
    assert places == {tuple(grid) for grid in grids} and len(tiles) == len(grids)
    assert [len(questions[name].images) for name in ("text only", "two images", "thin, wide")] == [0, 2, 1]
    assert questions["transparent image"].is_transparent and questions["system turn"].turns[0][0] == "system"
    assert all(max(image.size) >= 3 * min(image.size) for image in questions["thin, tall"].images)


def test_an_image_is_the_same_everywhere():
    """The word's points, by hand; sums of the pixels, as computed once."""
    image = np.asarray(sign(0, 40, 60))
    white = (image == 255).all(-1)
    assert white.any() and not white[:5].any() and (image[6, 8] == (200, 30, 40)).all()
    assert image.astype(int).sum() == 654_679
    alpha = np.asarray(sign(0, 40, 60, transparent=True))[..., 3]
    assert alpha[0, 0] == 0 and alpha[20, 30] == 255


def two_bos(inputs, number):
    bos = inputs["input_ids"][:, :1]
    assert bos.item() >= 0
    return {
        **inputs,
        "input_ids": torch.cat([bos, inputs["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.ones_like(bos), inputs["attention_mask"]], dim=1),
    }


def pads(inputs, processor, *, right: bool, mask: int):
    ids = inputs["input_ids"]
    added = ids.new_full((1, 3), processor.tokenizer.pad_token_id)
    masks = [inputs["attention_mask"], torch.full_like(added, mask)]
    rows = [ids, added]
    step = 1 if right else -1
    return {**inputs, "input_ids": torch.cat(rows[::step], 1), "attention_mask": torch.cat(masks[::step], 1)}


class FewerTokens(Engine):
    """Counts the prompt without the pads that it added."""

    def answer(self, messages, max_tokens):
        text, counted = super().answer(messages, max_tokens)
        return text, counted - 3


def on_black(image: Image.Image) -> Image.Image:
    flat = Image.new("RGB", image.size)
    flat.paste(image, mask=image.getchannel("A") if image.mode == "RGBA" else None)
    return flat


def with_template(processor, old: str, new: str):
    changed = copy.copy(processor)
    assert old in processor.chat_template
    changed.chat_template = processor.chat_template.replace(old, new)
    return changed


def other_grids(model, processor):
    """The same weights, with one grid in place of all."""
    ip, tile = processor.image_processor, processor.tile_size
    changed = build_processor(
        copy.deepcopy(processor.tokenizer),
        image_size=tile,
        patch_size=processor.patch_size,
        image_mean=ip.image_mean,
        image_std=ip.image_std,
        image_grid_pinpoints=[[2 * tile, 2 * tile]],
    )
    model = copy.deepcopy(model)
    model.config.image_grid_pinpoints = [[2 * tile, 2 * tile]]
    return model, changed


def other_pixels(processor):
    changed = copy.deepcopy(processor)
    changed.image_processor.image_mean = [0.1, 0.9, 0.1]
    return changed


FAULTS = {
    "two bos": (check.TWO_BOS, lambda m, p: Engine(m, p, two_bos)),
    "another grid": (check.TILES, lambda m, p: Engine(*other_grids(m, p))),
    "right padding": (
        PADDED_RIGHT,
        lambda m, p: FewerTokens(m, p, lambda inputs, _: pads(inputs, p, right=True, mask=0)),
    ),
    "alpha on black": (ON_BLACK, lambda m, p: Engine(m, p, of_image=on_black)),
    "alpha dropped": (DROPPED, lambda m, p: Engine(m, p, of_image=lambda image: image.convert("RGB"))),
    "a system turn": (
        check.SYSTEM_TURN,
        lambda m, p: Engine(
            m,
            with_template(
                p,
                "{{- bos_token }}",
                "{{- bos_token }}{%- if messages[0]['role'] != 'system' %}{{- '<|start_header_id|>system"
                "<|end_header_id|>Be brief.<|eot_id|>' }}{%- endif %}",
            ),
        ),
    ),
    "another template": (
        check.TEMPLATE,
        lambda m, p: Engine(m, with_template(p, "<|end_header_id|>\\n\\n", "<|end_header_id|>\\n\\nWell then: ")),
    ),
    "disturbed rows": (
        check.BATCH,
        lambda m, p: FewerTokens(m, p, lambda inputs, number: pads(inputs, p, right=False, mask=int(number <= 14))),
    ),
    "other pixels": (check.PIXELS, lambda m, p: Engine(m, other_pixels(p))),
    "no second image": (
        f"{check.REFUSED}: two images",
        lambda m, p: Engine(m, p, refuse=lambda messages: str(messages).count("image_url'") > 2),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_named(folder, served, capsys, fault):
    cause, plant = FAULTS[fault]
    report = checked(folder, plant(*served), capsys)
    assert report["equal"] < report["asked"] == 14
    assert report["likely"].startswith(cause), report
    first = report["first_difference"]
    assert first["question"] and (first["answered"] != first["expected"] or first["prompt_tokens"])


@pytest.mark.slow
def test_other_weights_are_not_called_pixels(folder, served, capsys):
    model = copy.deepcopy(served[0])
    for parameter in model.model.language_model.parameters():
        parameter.data = 0.25 * torch.randn_like(parameter)
    assert checked(folder, Engine(model, served[1]), capsys)["likely"] == check.WEIGHTS


def test_the_separator_of_several_images_is_named():
    """From the prompts' lengths alone: two images are joined by nothing in place of a newline."""
    questions = fixed_questions([[56, 56]], 28)
    asked = [
        check.Asked(question, recorded_of(question.id), check.Served("yes", 10 - (question.id == "two images")))
        for question in questions
    ]
    report = check.report_of(asked)
    assert report.likely == check.SEPARATOR and report.equal == report.asked - 1


def recorded_of(name: str) -> check.Recorded:
    return check.Recorded(name, [[5, 10]], "yes", [7], [9.0], ["no"], "", [[7, -0.1]], {})


@pytest.mark.slow
def test_a_report_for_people(folder, served, capsys):
    with serving(Engine(*served, two_bos)) as url:
        assert main(["check-engine", str(folder), "--url", f"{url}/v1/"]) == 3
    out = capsys.readouterr().out
    assert "of 14 answers are equal" in out and f"likely: {check.TWO_BOS}" in out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no reference answers"),
        ("{", "is not a reference"),
        ('{"format": 99}', "was written by another version"),
        ('{"format": 1, "tile": 28, "grids": [], "dtype": "float32", "recorded": [{}]}', "is not a reference"),
    ],
)
def test_a_folder_without_a_reference_is_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "reference.json").write_text(content)
    with pytest.raises(UserError, match=words):
        read_reference(tmp_path)


def test_a_server_that_does_not_answer_is_named(folder, served, capsys):
    assert main(["check-engine", str(folder), "--url", "http://127.0.0.1:9"]) == 2
    assert "http://127.0.0.1:9/v1: does not answer" in capsys.readouterr().err
    with serving(Engine(*served, refuse=lambda messages: True)) as url:
        assert main(["check-engine", str(folder), "--url", url]) == 2
    assert "refuses every question: HTTP 400" in capsys.readouterr().err


def test_the_key_goes_to_the_server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k-123")
    with EngineClient("http://127.0.0.1:9", "m") as client:
        assert client._http.headers["Authorization"] == "Bearer k-123"
