"""The contamination check: planted duplicates of each kind are found, others are not, and the policy drops them."""

import io
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from llava_llama31.model_card.card import _contamination_row
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.data.batches.stage_rows import check_stage
from llava_llama31.trainer.data.contamination.fingerprints import NUM_BITS, nearest, question_key
from llava_llama31.trainer.data.contamination.search import NEAR_BITS, find_in_sources, load_evaluation
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.schema import DataSource, Stage


# an optional extra: setup.cfg
needs_imagehash = pytest.mark.skipif(find_spec("imagehash") is None, reason="imagehash is not installed")


def scene(seed: int, size: tuple[int, int] = (240, 180)) -> Image.Image:
    """A field of colours with detail at the frequencies that the hash looks at."""
    colours = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def encoded_again(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=40)
    return Image.open(buffer).convert("RGB")


def half(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2))


PLANTED = {"again": encoded_again, "half": half, "mirror": ImageOps.mirror, "square": lambda i: i.resize((90, 90))}
PLANTED["mirror-half-again"] = lambda image: encoded_again(half(ImageOps.mirror(image)))
NUM = 6  # images of each kind


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """Questions about 12 images; rows with 6 of them as they are, 6 changed in each way, and 30 others."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "asked").mkdir()
    (folder / "rows").mkdir()
    questions, rows = [], []
    for i in range(12):
        scene(i).save(folder / "asked" / f"{i}.png")
        text = f"what is the brand of item {i}?"
        questions.append({"question_id": i, "image_id": str(i), "question": text, "answers": ["a"] * 10})

    def add(name: str, image: Image.Image | None, question: str) -> None:
        if image is not None:
            image.save(folder / "rows" / f"{name}.png")
        talk = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "that"}]
        rows.append({"id": name, "image": f"{name}.png", "conversations": talk})

    for i in range(NUM):
        (folder / "rows" / f"exact{i}.png").write_bytes((folder / "asked" / f"{i}.png").read_bytes())
        add(f"exact{i}", None, f"describe number {i} please")
        for kind, change in PLANTED.items():
            add(f"{kind}{i}", change(scene(i)), f"describe {kind} {i} please")
    for i in range(30):
        add(f"other{i}", scene(1000 + i), f"describe other {i} please")
    suffix = "\nAnswer the question using a single word or phrase."
    add("question", scene(2000), "What is the  BRAND of item 3" + suffix)
    add("short", scene(2001), "what?")
    (folder / "rows" / "rows.json").write_text(json.dumps(rows))
    (folder / "asked" / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return folder


@needs_imagehash
def test_planted_duplicates_are_found_and_others_are_not(planted, tmp_path, capsys):
    listed = tmp_path / "found.jsonl"
    command = ["check-data", str(planted / "rows" / "rows.json"), "--json", "--no-decode", "--matches", str(listed)]
    command += ["--against", str(planted / "asked" / "questions.jsonl")]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)["contamination"]
    expected = {"exact": NUM, "near": NUM * len(PLANTED), "questions": 1, "evaluation_images": 12}
    assert expected.items() <= found.items() and found["listed"] == str(listed)
    matches = [json.loads(line) for line in listed.read_text().splitlines()]
    assert len(matches) == NUM * (1 + len(PLANTED)) + 1
    for match in matches:
        if match["kind"] == "question":
            assert (match["id"], match["of"]) == ("question", "3")
            continue
        kind, number = match["id"].rstrip("0123456789"), match["id"][-1]
        assert match["of"] == number and match["kind"] == ("exact" if kind == "exact" else "near")
        assert match["mirrored"] == kind.startswith("mirror") and match["bits"] <= NEAR_BITS
    assert main([*command, "--near-bits", "0"]) == 0  # from the cache; an exact mirror image is 0 bits apart
    assert json.loads(capsys.readouterr().out)["contamination"]["near"] < NUM * len(PLANTED)


def stage_of(planted: Path, on_bad: dict, **spec) -> Stage:
    return Stage(
        trainable=["multi_modal_projector"],
        learning_rate=1e-3,
        global_batch=1,
        epochs=1,
        data=[DataSource(name="rows", path=str(planted / "rows" / "rows.json"))],
        contamination={"against": [str(planted / "asked" / "questions.jsonl")], **spec},
        on_bad_record=on_bad,
    )


@needs_imagehash
def test_a_policy_drops_them_and_the_card_says_so(planted, processor, tmp_path):
    num_planted = NUM * (1 + len(PLANTED))
    skip = {"default": "error", "evaluation_image": "skip", "evaluation_question": "skip"}
    (report,) = check_stage(stage_of(planted, skip), processor, tmp_path / "rejects.jsonl").sources
    assert report.dropped == {"evaluation_image": num_planted} and len(report.rows) == 32
    assert all(len(values) == 32 for values in (*report.counts.values(), report.prefixes))
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert {r["reason"] for r in rejects} == {"evaluation_image"} and len(rejects) == num_planted
    assert {r["action"] for r in rejects} == {"skip"} and all("image" in r["detail"] for r in rejects)
    (found,) = report.contamination
    row = _contamination_row({"name": "s"}, {"name": "rows"}, found)
    assert row[2:] == ["questions.jsonl", "12", "6", "30", "1", "rows with images"]

    both = stage_of(planted, skip, reject="images_and_questions")
    (report,) = check_stage(both, processor, None).sources
    assert report.dropped["evaluation_question"] == 1 and len(report.rows) == 31
    (kept,) = check_stage(stage_of(planted, skip, reject="nothing"), processor, None).sources
    assert not kept.dropped and kept.contamination[0]["exact"] == NUM and "rows" not in kept.content
    with pytest.raises(UserError, match="evaluation_image 36"):
        check_stage(stage_of(planted, {"default": "error"}), processor, None)


@needs_imagehash
def test_a_changed_image_is_compared_again(planted, tmp_path):
    import shutil

    own = tmp_path / "own"
    shutil.copytree(planted, own)
    source = DataSource(name="rows", path=str(own / "rows" / "rows.json"))

    def count() -> dict:
        asked = load_evaluation(own / "asked" / "questions.jsonl", cache_dir=tmp_path / "cache")
        rows = {"rows": np.arange(68)}
        return find_in_sources([source], rows, asked, cache_dir=tmp_path / "cache").to_dict()

    assert count()["exact"] == NUM == count()["exact"]
    scene(3000).save(own / "rows" / "exact0.png")
    assert count()["exact"] == NUM - 1
    scene(3000).save(own / "asked" / "7.png")
    assert count()["exact"] == NUM
    for i in range(12):
        (own / "asked" / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of its 12 images can be read"):
        count()


def test_the_nearest_hash_is_that_of_brute_force():
    rng = np.random.default_rng(0)
    bits, others = rng.random((50, NUM_BITS)) < 0.5, rng.random((20, NUM_BITS)) < 0.5
    apart = (bits[:, None] != others[None]).sum(-1)
    position, distance = nearest(bits, others, chunk=16)
    assert (distance == apart.min(1)).all() and (apart[np.arange(50), position] == distance).all()


def test_questions_are_equal_by_their_words():
    equal = [
        "What does the sign say?",
        "<image>\nwhat does the SIGN say",
        "What does the sign say?\nReference OCR token: STOP, 4\nAnswer the question using a single word or phrase.",
    ]
    assert len({question_key(text) for text in equal}) == 1
    assert question_key("what does the sign mean?") != question_key(equal[0])
    assert question_key("why is?") is None and question_key("") is None


def test_without_imagehash_the_extra_is_named(planted, monkeypatch, capsys):
    from llava_llama31.trainer.data.check import check
    from llava_llama31.trainer.data.contamination import fingerprints

    def absent(name):
        raise fingerprints.PackageNotFoundError(name)

    monkeypatch.setattr(check, "check_sources", None)  # it would take hours
    fingerprints.hash_version.cache_clear()
    monkeypatch.setattr(fingerprints, "version", absent)
    asked = str(planted / "asked" / "questions.jsonl")
    assert main(["check-data", str(planted / "rows" / "rows.json"), "--no-decode", "--against", asked]) == 2
    assert "llava-llama31[contamination]" in capsys.readouterr().err
    fingerprints.hash_version.cache_clear()


@needs_imagehash
def test_an_evaluation_that_cannot_be_read_ends_before_the_data_is_checked(planted, processor, monkeypatch, capsys):
    from llava_llama31.trainer.data.batches import stage_rows
    from llava_llama31.trainer.data.check import check

    rows, asked = planted / "rows" / "rows.json", planted / "asked" / "absent.jsonl"
    for module in (check, stage_rows):
        monkeypatch.setattr(module, "check_sources", None)
    assert main(["check-data", str(rows), "--no-decode", "--against", str(asked)]) == 2
    assert str(asked) in capsys.readouterr().err
    with pytest.raises(UserError, match="absent.jsonl"):
        check_stage(stage_of(planted, {"default": "error"}, against=[str(asked)]), processor, None)
