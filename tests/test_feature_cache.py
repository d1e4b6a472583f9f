"""Features of a frozen tower from disk: the same bits as computed ones, and nothing damaged or out of date."""

import json
import logging
import multiprocessing
import os
import pickle
import signal
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.data.batches import feature_cache
from llava_llama31.trainer.data.batches.dataset import StageDataset
from llava_llama31.trainer.data.batches.feature_cache import FeatureCache, cache_key, image_key
from llava_llama31.trainer.data.batches.feature_filling import _missing, fill
from llava_llama31.trainer.data.sources.images import image_at
from llava_llama31.trainer.data.sources.records import open_records
from llava_llama31.trainer.recipes.schema import DataSource


CPU = torch.device("cpu")
ROOMY = 10**9
SIZES = [(30, 50), (60, 20), (28, 28)]  # of the images
SHAPE = (4, 32)  # of a tile's features in the tiny model


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "features"


@pytest.fixture
def cache(folder):
    return FeatureCache(folder, "k", SHAPE, torch.float32, ROOMY)


@pytest.fixture
def images(tmp_path, make_image):
    """Three files, as records name them."""
    for number, size in enumerate(SIZES):
        make_image(*size, seed=number).save(tmp_path / f"{number}.png")
    return [image_at(f"{number}.png", tmp_path) for number in range(3)]


@pytest.fixture
def dataset(tmp_path, images, processor):
    """Rows with one image, two, none; an image comes in several rows."""
    shown = [["0.png"], ["1.png", "2.png"], [], ["2.png", "0.png"], ["0.png"]]
    turns = [
        {"images": names, "messages": [
            {"role": "user", "content": "<image>" * len(names) + f"what is it, {number}?"},
            {"role": "assistant", "content": "a thing"},
        ]}
        for number, names in enumerate(shown)
    ]  # fmt: skip
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(turns))
    store = open_records(DataSource(name="rows", path=str(path), format="messages"))
    rows = [(0, row) for row in range(len(store))]

    def make(features=None, pixel_dtype=torch.float32):
        return StageDataset([store], rows, processor, pixel_dtype, features)

    return make


def encoder(model, *, autocast=False):
    @torch.no_grad()
    def encode(tiles):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model.model.tile_features(tiles)

    return encode


def gradients(model, row, *, autocast=False):
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**row).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("arithmetic", ["float32", "autocast", "autocast over bfloat16"])
@pytest.mark.parametrize("part", ["all", "some"])
def test_loss_and_gradients_have_the_same_bits(dataset, folder, tiny_model, collate, arithmetic, part):
    autocast = arithmetic != "float32"
    tiny_model.model.vision_tower.requires_grad_(False)
    if arithmetic == "autocast over bfloat16":
        tiny_model.model.vision_tower.bfloat16()
    plain = dataset(pixel_dtype=torch.bfloat16 if autocast else torch.float32)
    dtype = encoder(tiny_model, autocast=autocast)(torch.zeros(1, 3, 28, 28)).dtype
    assert dtype == (torch.bfloat16 if "over" in arithmetic else torch.float32)
    tiles = sum(plain.processor.num_tiles(size) for size in SIZES[:2])
    quota = ROOMY if part == "all" else tiles * 4 * 32 * dtype.itemsize + 2 * 40
    cache = FeatureCache(folder, "k", SHAPE, dtype, quota)
    fill(cache, encoder(tiny_model, autocast=autocast), plain)
    known = dataset(cache, plain.pixel_dtype)
    assert len(cache) == (3 if part == "all" else 2)
    assert [list(sample.has_features) for sample in known.__getitems__(range(5))] == (
        [[True], [True, True], [], [True, True], [True]]
        if part == "all"
        else [[True], [True, False], [], [False, True], [True]]
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, products of toy size are split by the number of tiles
    try:
        for chosen in ([0, 1, 2, 3, 4], [3], [2], [1, 4]):
            for share in (False, True):
                rows = [collate(d.__getitems__(chosen), packed=True, share_prefix=share) for d in (plain, known)]
                expected, got = (gradients(tiny_model, row, autocast=autocast) for row in rows)
                assert expected.keys() == got.keys() and len(got) > 5
                for name in expected:
                    assert torch.equal(expected[name], got[name]), name
        assert "pixel_values" not in rows[1] or part == "some"
    finally:
        torch.set_num_threads(threads)


def test_tiles_and_features_that_do_not_fit_the_images_are_refused(dataset, cache, tiny_model, collate):
    fill(cache, encoder(tiny_model), dataset())
    samples = dataset(cache).__getitems__([0, 1])
    row = collate(samples, packed=True)
    for change in ({"has_features": [True, False, True]}, {"image_features": row["image_features"][1:]}):
        with pytest.raises(ValueError, match="tiles, but the 3 images need"):
            tiny_model(**row | change)
    with pytest.raises(ValueError, match="only a packed row takes image_features"):
        tiny_model(input_ids=row["input_ids"], image_features=row["image_features"])


def test_a_stored_image_is_not_opened(dataset, cache, tiny_model, images, monkeypatch):
    fill(cache, encoder(tiny_model), dataset())
    monkeypatch.setattr(type(images[0]), "open", lambda self: pytest.fail("opened"))
    samples = dataset(cache).__getitems__(range(5))
    assert [sample.image_sizes for sample in samples][1] == [(60, 20), (28, 28)]
    fill(cache, lambda tiles: pytest.fail("encoded"), dataset())


def test_workers_fill_it_and_the_random_numbers_of_the_training_stay(dataset, cache, tiny_model, images):
    state = torch.get_rng_state()
    fill(cache, encoder(tiny_model), dataset(), num_workers=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(cache.load(image) is not None for image in images)


def test_a_changed_image_misses(dataset, cache, tiny_model, images, make_image, tmp_path):
    fill(cache, encoder(tiny_model), dataset())
    before = image_key(images[0])
    status = os.stat(tmp_path / "0.png")
    make_image(30, 50, seed=9).save(tmp_path / "0.png")
    os.utime(tmp_path / "0.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert image_key(images[0]) != before and cache.load(images[0]) is None
    assert cache.load(images[1]) is not None
    assert [sample.has_features for sample in dataset(cache).__getitems__([0, 1])] == [[False], [True, True]]


def test_other_tiles_towers_and_arithmetic_have_other_keys(tiny_model, processor):
    def key(device=CPU, pixel_dtype=torch.float32, autocast=False):
        return cache_key(tiny_model, processor, device, pixel_dtype, autocast=autocast)

    found = {key(), key(autocast=True), key(pixel_dtype=torch.bfloat16)}
    images = processor.image_processor
    for name, other in (("image_mean", [0.1, 0.2, 0.3]), ("resample", 2), ("image_grid_pinpoints", [[28, 56]])):
        former = getattr(images, name)
        setattr(images, name, other)
        found.add(key())
        setattr(images, name, former)
    tiny_model.config.vision_feature_layer = -3
    found.add(key())
    tiny_model.config.vision_feature_layer = -2
    weight = tiny_model.model.vision_tower.encoder.layers[0].mlp.fc1.weight
    with torch.no_grad():
        weight[3, 4] += 1e-6
    found.add(key())
    assert len(found) == 8
    wide = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32"  # as `tf32` of a stage's trainer_args does
        found.add(key())
    finally:
        torch.backends.fp32_precision = wide
    assert len(found) == 9
    before = key()
    with torch.no_grad():
        tiny_model.model.multi_modal_projector.linear_1.weight.zero_()
        tiny_model.lm_head.weight.zero_()
    assert key() == before


@pytest.mark.parametrize("room", [0, 1, 2, 3])
def test_the_quota_is_kept_over_all_caches_of_the_folder(dataset, folder, tiny_model, room, caplog):
    sizes = [dataset().processor.num_tiles(size) * 4 * 32 * 4 + 40 for size in SIZES]
    folder.mkdir()
    (folder / "other.features").write_bytes(b"x" * 10_000)
    quota = 10_000 + sum(sizes[: room + 1]) - (room < 3)  # a byte too little for the next
    cache = FeatureCache(folder, "k", SHAPE, torch.float32, quota)
    fill(cache, encoder(tiny_model), dataset())
    assert len(cache) == room
    assert sum(file.stat().st_size for file in folder.iterdir()) == 10_000 + sum(sizes[:room])
    assert ("no more fit" in caplog.text) == (room < 3)


def entry(number: int, tiles: int = 2) -> tuple[bytes, tuple[int, int], torch.Tensor]:
    return bytes([number]) * 16, (number + 1, 7), torch.full((tiles, *SHAPE), float(number))


def assert_whole(cache: FeatureCache, numbers) -> None:
    assert set(cache._entries) == {bytes([number]) * 16 for number in numbers}
    for number in numbers:
        found = cache._entries[bytes([number]) * 16]
        data = cache.features.read_bytes()[found.offset : found.offset + 2 * 4 * 32 * 4]
        assert data == entry(number)[2].numpy().tobytes() and (found.height, found.width) == (number + 1, 7)


def store(begin: Barrier, folder: Path, numbers: str, suffix: str, size: int) -> None:
    """In a process of its own: store images of these numbers; with a suffix, die when `size` bytes of an entry of that
    file are written."""
    write = feature_cache._write_at

    def dying(path, end, content):
        time.sleep(0.001)  # for other processes to come between
        if path.suffix == suffix:
            write(path, end, (bytes(content) * 9)[:size])
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, end, content)

    feature_cache._write_at = dying
    cache = FeatureCache(folder, "k", SHAPE, torch.float32, ROOMY)
    begin.wait(60)
    for number in range(*map(int, numbers.split("-"))):
        assert cache.store(*entry(number))


def exit_codes(folder: Path, *numbers: str, suffix: str = "", size: int = 0) -> list[int | None]:
    """Of processes that store these numbers at once."""
    forking = multiprocessing.get_context("fork")
    begin = forking.Barrier(len(numbers))
    jobs = [forking.Process(target=store, args=(begin, folder, own, suffix, size)) for own in numbers]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    return [job.exitcode for job in jobs]


def test_two_processes_store_at_once(folder):
    assert exit_codes(folder, "0-120", "80-200") == [0, 0]  # some by both
    cache = FeatureCache(folder, "k", SHAPE, torch.float32, ROOMY)
    assert_whole(cache, range(200))
    assert cache.features.stat().st_size == 200 * 2 * 4 * 32 * 4


def test_shares_of_the_work_are_disjoint_and_complete(dataset, cache):
    shares = [_missing(cache, dataset(), (rank, 16)) for rank in range(16)]
    assert sorted(index for share in shares for index, _ in share) == [0, 1]
    assert {image for share in shares for _, images in share for image in images} == {
        image_key(image) for index in range(5) for image in dataset().record(index).images
    }


@pytest.mark.parametrize(
    ("after", "part"), [(".features", 0), (".features", 700), (".features", 5000), (".index", 0), (".index", 39)]
)
def test_a_writer_that_is_killed_leaves_nothing_visible(folder, after, part, caplog):
    cache = FeatureCache(folder, "k", SHAPE, torch.float32, ROOMY)
    assert cache.store(*entry(1)) and cache.store(*entry(2))
    assert exit_codes(folder, "5-6", suffix=after, size=part) == [-signal.SIGKILL]
    cache = FeatureCache(folder, "k", SHAPE, torch.float32, ROOMY)
    assert_whole(cache, [1, 2])
    assert cache.store(*entry(3)) and cache.store(*entry(5))  # the lock is free, the rest is written over
    for again in (cache, FeatureCache(folder, "k", SHAPE, torch.float32, ROOMY)):
        assert_whole(again, [1, 2, 3, 5])
    assert cache.features.stat().st_size == 4 * 2 * 4 * 32 * 4
    assert not caplog.text


@pytest.mark.parametrize("damage", ["a bit", "a size", "cut", "gone"])
def test_damaged_entries_are_ignored_and_named(dataset, cache, tiny_model, images, damage, caplog):
    fill(cache, encoder(tiny_model), dataset())
    content = bytearray(cache.features.read_bytes())
    if damage == "a bit":
        content[40] ^= 1
        cache.features.write_bytes(content)
    elif damage == "a size":
        index = bytearray(cache.index.read_bytes())
        index[28] ^= 1  # the first image's height
        cache.index.write_bytes(index)
    elif damage == "cut":
        cache.features.write_bytes(content[:-4])
    else:
        cache.features.unlink()
    again = FeatureCache(cache.folder, "k", SHAPE, torch.float32, ROOMY)
    with caplog.at_level(logging.WARNING):
        found = [again.load(image) is not None for image in images]
    assert found == {"cut": [True, True, False], "gone": [False] * 3}.get(damage, [False, True, True])
    assert damage == "gone" or str(cache.folder) in caplog.text
    assert ("0.png" in caplog.text) == (damage in ("a bit", "a size"))
    samples = dataset(again).__getitems__(range(5))
    expected = dataset().__getitems__(range(5))
    for sample, plain in zip(samples, expected, strict=True):
        assert sample.image_sizes == plain.image_sizes and sample.input_ids == plain.input_ids
    # a mapping that was made before the damage
    assert not found[2] or cache.load(images[2]) is not None
    # what is missing is stored again; what is damaged stays computed
    fill(again, encoder(tiny_model), dataset())
    assert again.load(images[2]) is not None


def test_a_file_that_was_cut_is_filled_again(dataset, cache, tiny_model, images):
    fill(cache, encoder(tiny_model), dataset())
    os.truncate(cache.features, cache.features.stat().st_size - 4)
    again = FeatureCache(cache.folder, "k", SHAPE, torch.float32, ROOMY)
    fill(again, encoder(tiny_model), dataset())
    assert all(again.load(image) is not None for image in images)


def test_a_full_disk_stops_the_storing(cache, monkeypatch, caplog):
    def full(path, end, content):
        raise OSError(28, "No space left on device")

    assert cache.store(*entry(1))
    monkeypatch.setattr(feature_cache, "_write_at", full)
    assert not cache.store(*entry(2))
    assert "No space left" in caplog.text
    assert_whole(cache, [1])


def test_a_worker_reads_the_index_by_itself(cache):
    cache.store(*entry(1))
    state = pickle.dumps(cache)
    cache.store(*entry(2))
    assert_whole(pickle.loads(state), [1, 2])
    assert bytes([1]) * 16 not in state


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "lora"])
def test_a_run_with_a_cache_ends_with_the_bits_of_one_without(
    recipe_content, run_recipe, tmp_path, monkeypatch, capsys, kind, request
):
    if kind == "bfloat16":
        request.getfixturevalue("fast_bfloat16")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        del recipe_content["evaluation"]
        keys = {"validation_fraction": 0.1, "eval_steps": 3, "save_steps": 3}
        if kind == "lora":
            del recipe_content["stages"]["projector"]
            recipe_content["stages"]["instruct"]["lora"] = {"r": 4, "alpha": 8.0, "dropout": 0.1}
        elif kind == "bfloat16":
            keys["precision"] = kind
        plain = run_recipe(recipe_content, tmp_path / "plain", **keys)
        capsys.readouterr()
        cached = run_recipe(recipe_content, tmp_path / "cached", **keys, feature_cache_gb=1.0)
    finally:
        torch.set_num_threads(threads)
    stages = ["1-instruct"] if kind == "lora" else ["1-projector", "2-instruct"]
    assert capsys.readouterr().err.count("33 images' features are in") == len(stages)
    assert len(list((tmp_path / "cache/llava-llama31/features").glob("*.features"))) == 1  # all stages'
    for stage in stages:
        one, two = (load_file(path / "stages" / stage / "final/model.safetensors") for path in (plain, cached))
        assert one.keys() == two.keys()
        for name in one:
            assert torch.equal(one[name], two[name]), name
        logs = [json.loads((p / f"stages/{stage}/final/stage.json").read_text()) for p in (plain, cached)]
        assert logs[0]["validation_loss"] == logs[1]["validation_loss"] and logs[0]["loss"] == logs[1]["loss"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"trainable": ["vision_tower"]}, "features of a trained vision_tower change"),
        ({"packing": False}, "feature_cache_gb is for packed rows"),
        ({"deepspeed": "zero3"}, "under DeepSpeed is not supported yet"),
    ],
)
def test_stages_that_can_not_have_it_are_refused(recipe_content, tmp_path, capsys, keys, message):
    content = recipe_content | {"stages": {"one": recipe_content["stages"]["projector"]}}
    content["stages"]["one"] |= keys | {"feature_cache_gb": 1.0}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    assert main(["train", str(recipe), "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and "(fix: " in error
