"""Tiles from the training device against Pillow's: equal to the last bit, and so are the runs."""

import json

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from llava_llama31.processing import build_processor
from llava_llama31.processing.processing_llava_llama31 import Placement
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.data.batches import device_tiles, pillow_filters
from llava_llama31.trainer.data.batches.device_tiles import DeviceTiles, resize_as_pillow
from llava_llama31.trainer.errors import UserError


SIDES = st.integers(1, 90)


@pytest.mark.slow
@settings(max_examples=300)
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 2**32 - 1), st.booleans())
@example(40, 40, 20, 30, 0, False)  # as many rows lost as twice the columns: the passes' order turns
@example(40, 40, 19, 30, 0, False)
@example(40, 40, 41, 50, 0, False)
def test_resizing_is_pillows(height, width, new_height, new_width, seed, is_hard):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if is_hard:  # edges that overshoot and are clipped
        pixels = np.where(pixels > 127, np.uint8(255), np.uint8(0))
    expected = np.asarray(Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BICUBIC))
    image = torch.from_numpy(pixels)
    ours = resize_as_pillow(image.permute(2, 0, 1), new_height, new_width)  # a CPU's way
    assert np.array_equal(ours.permute(1, 2, 0).numpy(), expected)
    # a GPU's, with another resize of the same image beside it, and with a margin
    tops = ((new_height + 3, new_width + 5, 2, 1, new_height, new_width), (8, 9, 0, 0, 8, 9))
    places = [Placement(*place) for place in tops]
    canvases = [torch.empty(3, *place[:2], dtype=torch.float64) for place in places]
    numbers = torch.from_numpy(device_tiles._numbers(image, places))
    device_tiles._resize_by_products(image, places, numbers, canvases)
    made = (canvases[0] + 0.5).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    margin = np.zeros_like(made)
    margin[2 : 2 + new_height, 1 : 1 + new_width] = expected
    assert np.array_equal(made, margin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_are_the_processors(processor, make_image, dtype):
    sizes = [(20, 30), (64, 48), (480, 641), (1024, 683), (7, 500), (333, 4), (56, 56), (1, 1)]
    images = [make_image(*size, seed=i) for i, size in enumerate(sizes)]
    expected = torch.cat([torch.from_numpy(processor.tiles(image)) for image in images]).to(dtype)
    pixels = [torch.from_numpy(np.array(image)) for image in images]
    tiles = DeviceTiles(processor, dtype)(pixels)
    assert tiles.dtype == dtype and torch.equal(tiles, expected)
    by_products = DeviceTiles(processor, dtype).by_products(pixels)  # as on a GPU
    table = torch.from_numpy(processor.pixel_levels).to(dtype)
    assert torch.equal(torch.stack([table[i][by_products[:, i]] for i in range(3)], dim=1), expected)


def test_another_filter_and_another_pillow_are_refused(processor, monkeypatch):
    other = build_processor(
        processor.tokenizer, image_size=28, patch_size=14, image_mean=(0, 0, 0), image_std=(1, 1, 1),
        image_grid_pinpoints=[[28, 56]], resample=Image.Resampling.BILINEAR,
    )  # fmt: skip
    with pytest.raises(UserError, match="supports only the bicubic one"):
        DeviceTiles(other)
    monkeypatch.setattr(pillow_filters, "_bicubic", lambda x: np.maximum(1 - np.abs(x), 0))
    pillow_filters.pillow_filter.cache_clear()
    try:
        with pytest.raises(UserError, match="resizes differently from device_tiles"):
            DeviceTiles(processor)
    finally:
        pillow_filters.pillow_filter.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, pytest.param(False, marks=pytest.mark.torture)])
def test_a_run_ends_with_the_bits_of_one_that_tiles_in_its_workers(
    recipe_content, run_recipe, tmp_path, packing, monkeypatch
):
    cut, tiles_of = [], DeviceTiles.__call__
    monkeypatch.setattr(DeviceTiles, "__call__", lambda self, pixels: cut.append(pixels) or tiles_of(self, pixels))
    del recipe_content["evaluation"], recipe_content["stages"]["projector"]
    keys = {"validation_fraction": 0.1, "eval_steps": 3, "save_steps": 3, "packing": packing, "logging_steps": 1}
    one = run_recipe(recipe_content, tmp_path / "workers", **keys)
    assert not cut
    two = run_recipe(recipe_content, tmp_path / "device", **keys, device_tiles=True, dataloader_workers=int(packing))
    assert cut
    finals = [path / "stages/1-instruct/final" for path in (one, two)]
    ends = [load_file(final / "model.safetensors") for final in finals]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    logs = [json.loads((final / "stage.json").read_text()) for final in finals]
    assert logs[0]["validation_loss"] == logs[1]["validation_loss"]


def test_a_later_stage_is_refused_before_the_first_trains(recipe_content, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device_tiles, "_as_pillow", lambda: False)
    recipe_content["stages"]["instruct"]["device_tiles"] = True
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_content, sort_keys=False))
    assert main(["train", str(recipe), "--output", str(tmp_path / "run")]) == 2
    assert "stages.instruct.device_tiles: Pillow" in capsys.readouterr().err
    assert not list((tmp_path / "run" / "stages").glob("*/checkpoint-*"))


def test_it_does_not_go_with_a_feature_cache(recipe_content, tmp_path, capsys):
    del recipe_content["stages"]["instruct"]
    recipe_content["stages"]["projector"] |= {"device_tiles": True, "feature_cache_gb": 1.0}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_content))
    assert main(["train", str(recipe), "--output", str(tmp_path / "run")]) == 2
    assert "stored features make device_tiles pointless" in capsys.readouterr().err
