"""Records: the same conversation from every format, row by row, and a reason for each row that can't be used."""

import base64
import bz2
import gzip
import io
import json
import lzma
import pickle
import re
import tarfile
import tracemalloc
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_llama31.trainer.data.sources import json_rows, records
from llava_llama31.trainer.data.sources.images import ImageRef
from llava_llama31.trainer.data.sources.records import data_files, open_records
from llava_llama31.trainer.data.sources.reject_reasons import REASONS, RecordError
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.questions import load_questions
from llava_llama31.trainer.recipes.schema import DataSource


IMAGE = {"type": "image"}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def user(*parts: dict) -> dict:
    return {"role": "user", "content": list(parts)}


def assistant(value: str) -> dict:
    return {"role": "assistant", "content": [text(value)]}


@pytest.fixture
def read(tmp_path):
    """Write rows as JSON lines and open them."""

    def open_rows(*rows: object, format: str = "auto", **options):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return open_records(DataSource(name="data", path=str(path), format=format), **options)

    return open_rows


def turns(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]


def chat(*values: object) -> list[dict]:
    return [{"role": ("user", "assistant")[n % 2], "content": value} for n, value in enumerate(values)]


def png(height: int = 4, width: int = 6) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


# formats


def test_llava(read, tmp_path):
    store = read(
        {"id": 17, "image": "a/x.png", "conversations": turns("<image>\nWhat?\n", "A cat.", "Why?", "No.")},
        {"image": ["x.png", "y.png"], "conversations": turns("<image>\n<image>\n\nSame?", "Yes")},
        {"id": "t", "conversations": turns("Hi", "Hello"), "system": "Be brief."},
        {"id": "", "image": "x.png", "conversations": turns("What?\n<image>", "Blue")},
    )
    assert store.format == "llava" and len(store) == 4
    first, second, third, fourth = store
    assert first.id == "17"
    root = tmp_path.resolve()
    assert first.images == (ImageRef("a/x.png", path=str(root / "a/x.png"), root=str(root)),)
    assert first.messages == [user(IMAGE, text("What?\n")), assistant("A cat."), user(text("Why?")), assistant("No.")]
    assert second.id == "data:1" and [image.name for image in second.images] == ["x.png", "y.png"]
    assert second.messages[0] == user(IMAGE, IMAGE, text("\nSame?"))
    assert third.messages[0] == {"role": "system", "content": [text("Be brief.")]} and not third.images
    assert fourth.id == "data:3" and fourth.messages[0] == user(text("What?\n"), IMAGE)


def test_the_newline_after_the_marker_can_be_kept(read):
    row = {"image": "x.png", "conversations": turns("<image>\nWhat?", "A")}
    assert read(row, keep_data_newline=True)[0].messages[0] == user(IMAGE, text("\nWhat?"))


def test_sharegpt(read):
    row = {
        "images": ["x.png"],
        "conversations": [{"from": "system", "value": "S"}, *turns("See <image> there", "ok")],
    }
    store = read(row)
    assert store.format == "sharegpt"
    assert store[0].messages == [
        {"role": "system", "content": [text("S")]},
        user(text("See "), IMAGE, text(" there")),
        assistant("ok"),
    ]
    roles = {"images": ["x.png"], "messages": chat("<image>q", "a")}
    assert read(roles, format="sharegpt")[0].messages == [user(IMAGE, text("q")), assistant("a")]


def test_messages(read, tmp_path):
    uri = "data:image/png;base64," + base64.b64encode(png()).decode()
    store = read(
        {"image": "x.png", "messages": chat([text("a"), IMAGE, text("b")], [text("c")])},
        {"images": ["x.png", "y.png"], "messages": chat("no places", "c")},
        {"images": ["x.png"], "prompt": chat("<image>\nq"), "completion": [{"role": "assistant", "content": "a"}]},
        {"prompt": "q", "completion": "a"},
        {"messages": chat([{"type": "image_url", "image_url": {"url": "x.png"}}, text("q")], "a")},
        {"messages": chat([{"type": "image_url", "image_url": uri}, {"type": "image", "image": "y.png"}], "a")},
        {"images": ["b.png"], "messages": chat([{"type": "image", "path": "a.png", "text": None}, IMAGE], "a")},
    )
    assert store.format == "messages"
    assert store[0].messages == [user(text("a"), IMAGE, text("b")), assistant("c")]
    assert store[1].messages[0] == user(IMAGE, IMAGE, text("no places"))
    assert store[2].messages == [user(IMAGE, text("q")), assistant("a")]
    assert store[3].messages == [user(text("q")), assistant("a")]
    assert store[4].images[0].path == str(tmp_path.resolve() / "x.png")
    assert store[5].images[0].size() == (4, 6) and store[5].images[1].name == "y.png"
    assert [image.name for image in store[6].images] == ["a.png", "b.png"]


def test_cauldron(read):
    store = read({"images": ["x.png"], "texts": [{"user": "q", "assistant": "a", "source": "s"}] * 2})
    assert store.format == "cauldron"
    assert store[0].messages == [user(IMAGE, text("q")), assistant("a"), user(text("q")), assistant("a")]


# every format gives the same record

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda value: value.strip() and "<image>" not in value and not value.startswith("\n")
)
names = st.text("abcé /", min_size=1, max_size=8).map(lambda value: f"f{value}.png")


@st.composite
def conversations(draw) -> tuple[list[str], list[dict]]:
    messages = [{"role": "system", "content": [text(draw(words))]}] if draw(st.booleans()) else []
    num_images = draw(st.integers(0, 3))
    for turn in range(draw(st.integers(1, 3))):
        messages += [
            user(*[IMAGE] * (num_images if turn == 0 else 0), text(draw(words))),
            assistant(draw(words)),
        ]
    return draw(st.lists(names, min_size=num_images, max_size=num_images)), messages


def flat(message: dict) -> str:
    return "".join("<image>\n" if part["type"] == "image" else part["text"] for part in message["content"])


def as_llava(key: str, images: list[str], messages: list[dict]) -> dict:
    speakers = {"user": "human", "assistant": "gpt", "system": "system"}
    talk = [{"from": speakers[message["role"]], "value": flat(message)} for message in messages]
    shown = {} if not images else {"image": images[0] if len(images) == 1 else images}
    return {"id": key, "conversations": talk} | shown


def as_sharegpt(key: str, images: list[str], messages: list[dict]) -> dict:
    return {"id": key, "images": images, "conversations": as_llava(key, images, messages)["conversations"]}


def as_messages(key: str, images: list[str], messages: list[dict]) -> dict:
    return {"id": key, "images": images, "messages": messages}


def as_plain_messages(key: str, images: list[str], messages: list[dict]) -> dict:
    plain = [{"role": message["role"], "content": flat(message)} for message in messages]
    return {"id": key, "images": images, "prompt": plain[:-1], "completion": plain[-1:]}


def as_cauldron(key: str, images: list[str], messages: list[dict]) -> dict:
    talk = [message for message in messages if message["role"] != "system"]
    plain = ["".join(part.get("text", "") for part in message["content"]) for message in talk]
    pairs = zip(plain[::2], plain[1::2], strict=True)
    return {"id": key, "images": images, "texts": [{"user": q, "assistant": a, "source": "s"} for q, a in pairs]}


WRITERS = {
    "llava": (as_llava,),
    "sharegpt": (as_sharegpt,),
    "messages": (as_messages, as_plain_messages),
    "cauldron": (as_cauldron,),
}


@settings(max_examples=60)
@given(st.lists(conversations(), min_size=1, max_size=4), st.booleans(), st.integers(0, 3))
def test_round_trip_through_every_json_format(tmp_path, rows, as_array, indent):
    for data_format, writers in WRITERS.items():
        for write in writers:
            values = [write(f"r{n}", *row) for n, row in enumerate(rows)]
            path = tmp_path / ("data.json" if as_array else "data.jsonl")
            lines = (json.dumps(value, ensure_ascii=indent == 1) + "\n" for value in values)
            content = json.dumps(values, ensure_ascii=indent == 1, indent=indent) if as_array else "".join(lines)
            path.write_bytes(content.encode())
            store = open_records(DataSource(name="x", path=str(path), format=data_format))
            for n, (record, (images, messages)) in enumerate(zip(store, rows, strict=True)):
                kept = [m for m in messages if m["role"] != "system"] if data_format == "cauldron" else messages
                assert record.id == f"r{n}" and record.messages == kept
                assert [image.name for image in record.images] == images
                assert [image.path for image in record.images] == [str(tmp_path.resolve() / name) for name in images]


@pytest.mark.parametrize("kind", ["parquet", "folder of parquet", "save_to_disk", "splits on disk"])
@pytest.mark.parametrize("data_format", ["messages", "cauldron", "sharegpt"])
def test_datasets_keep_images_encoded(tmp_path, monkeypatch, data_format, kind):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    messages = [user(IMAGE, IMAGE, text("same?")), assistant("no")]
    (write, *_) = WRITERS[data_format]
    # the Image feature embeds files when it is written; plain parquet may hold paths
    second = {"bytes": None, "path": "y.png"} if "parquet" in kind else {"bytes": png(8, 9), "path": "y.png"}
    row = write("7", [], messages) | {"images": [{"bytes": png(5, 6), "path": None}, second]}
    features = datasets.Dataset.from_list([row]).features
    if "parquet" not in kind:
        features["images"] = datasets.List(datasets.Image())
    data = datasets.Dataset.from_list([row, row], features=features)
    path = tmp_path / "data"
    path.mkdir()
    Image.new("RGB", (9, 8)).save((path if kind != "parquet" else tmp_path) / "y.png")
    if kind == "parquet":
        path = tmp_path / "data.parquet"
        data.to_parquet(path)
    elif kind == "folder of parquet":
        data.to_parquet(path / "train-00000-of-00001.parquet")
        data.select([0]).to_parquet(path / "validation-00000-of-00001.parquet")
    elif kind == "save_to_disk":
        data.save_to_disk(path)
    else:
        datasets.DatasetDict(train=data, other=data.select([0])).save_to_disk(path)
    monkeypatch.setattr(datasets.Image, "decode_example", None)
    source = DataSource(name="x", path=str(path))
    store = open_records(source)
    assert store.format == data_format and len(store) == 2
    for record in (store[1], pickle.loads(pickle.dumps(store))[1]):
        assert record.id == "7" and record.messages == messages
        assert [image.size() for image in record.images] == [(5, 6), (8, 9)]
    assert data_files(source) and all(file.is_file() for file in data_files(source))
    assert json.loads(store.source_text(0))["images"][0]["bytes"] == base64.b64encode(png(5, 6)).decode()
    if kind == "splits on disk":
        with pytest.raises(UserError, match="no split 'test'"):
            open_records(DataSource(name="x", path=str(path), split="test"))


# fields that change what a record means

ASKED = {"messages": chat("q", "a")}
SHAPES = {
    "llava": {"conversations": turns("q", "a")},
    "sharegpt": {"images": [], "conversations": turns("q", "a")},
    "messages": ASKED,
    "prompt": {"prompt": "q", "completion": "a"},
    "cauldron": {"texts": [{"user": "q", "assistant": "a"}]},
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}


def reason_of(store, row: int = 0) -> str:
    with pytest.raises(RecordError) as caught:
        store[row]
    assert caught.value.reason in REASONS and caught.value.detail
    return caught.value.reason


def talk_with(*fields: dict) -> dict:
    """Messages whose turns have further fields."""
    answers = chat("q", "a", "r", "b")
    return {"messages": [turn | more for turn, more in zip(answers, fields, strict=False)] + answers[len(fields) :]}


@pytest.mark.parametrize("field", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_system_field_is_the_system_turn_in_every_format(read, shape, field):
    format = "messages" if shape == "prompt" else shape
    store = read(SHAPES[shape] | {field: "Be brief."}, format=format)
    assert store[0].messages == [{"role": "system", "content": [text("Be brief.")]}, user(text("q")), assistant("a")]
    for absent in (None, "", [], " \n"):
        assert read(SHAPES[shape] | {field: absent}, format=format)[0].messages == [user(text("q")), assistant("a")]


def test_two_system_turns_have_to_agree(read):
    system = {"from": "system", "value": "S "}
    row = {"system": "S", "system_prompt": [text("S")], "conversations": [system, *turns("q", "a")]}
    assert read(row)[0].messages[0] == {"role": "system", "content": [text("S")]}
    assert len(read(row)[0].messages) == 3 and read(row)[0].not_read == ()
    assert reason_of(read(row | {"system": "T"})) == "conflicting_system"
    assert reason_of(read(row | {"system_prompt": "T"})) == "conflicting_system"
    assert reason_of(read(row | {"conversations": [{"from": "system", "value": "T"}, *turns("q", "a")]}))


def test_a_system_turn_without_text_is_left_out(read):
    for system in ("", " \n"):
        row = {"conversations": [{"from": "system", "value": system}, *turns("q", "a")]}
        assert read(row)[0].messages == [user(text("q")), assistant("a")]
    only_system = {"conversations": [{"from": "system", "value": ""}]}
    assert reason_of(read(only_system)) == "no_supervised_token"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("field", ["video", "videos", "video_path", "audio", "audios", "audio_url"])
def test_video_and_audio_are_refused_by_their_field(read, shape, field):
    format = "messages" if shape == "prompt" else shape
    for value in ("x.mp4", ["x.mp4"], {"bytes": None, "path": "x.mp4"}):
        assert reason_of(read(SHAPES[shape] | {field: value}, format=format)) == "video_or_audio"
    for absent in (None, "", [], [None], {"bytes": None, "path": None}):
        store = read(SHAPES[shape] | {field: absent}, format=format)
        assert store[0].not_read == () and store[0].messages == [user(text("q")), assistant("a")]


def test_video_in_a_turn_is_refused_and_its_marker_alone_is_text(read):
    assert reason_of(read(talk_with({"videos": ["x.mp4"]}))) == "video_or_audio"
    for part in ({"type": "video", "video": "x"}, {"type": "input_audio", "input_audio": {}}):
        assert reason_of(read({"messages": chat([part, text("q")], "a")})) == "video_or_audio"
    assert read({"messages": chat("What is <video> in HTML?", "a")})[0].messages[0] == user(
        text("What is <video> in HTML?")
    )


@pytest.mark.parametrize(
    "field", ["image_path", "image_paths", "img", "image_url", "image_file", "picture", "file_name", "path"]
)
def test_images_under_another_name_are_read(read, field, tmp_path):
    store = read({field: "a.png"} | ASKED, {field: ["a.png", "b.PNG"]} | ASKED, {field: None} | ASKED)
    assert [[image.name for image in record.images] for record in store] == [["a.png"], ["a.png", "b.PNG"], []]
    assert store[0].messages[0] == user(IMAGE, text("q")) and not any(record.not_read for record in store)
    marked = read({field: "a.png", "conversations": turns("<image>q", "a")})[0]
    assert marked.images[0].path == str(tmp_path.resolve() / "a.png")
    assert reason_of(read({field: "../a.png"} | ASKED)) == "image_outside_root"
    assert reason_of(read({field: "http://h/a.png"} | ASKED)) == "image_url"
    assert reason_of(read({field: "a.png", "conversations": turns("q", "a")})) == "image_count_mismatch"
    # beside an image of the record it says where that is from
    beside = read({field: "a.png", "image": "x.png"} | ASKED)[0]
    assert [image.name for image in beside.images] == ["x.png"] and beside.not_read == (field,)


def test_an_image_under_an_unknown_name_is_refused(read):
    for value in ("a.png", ["a.jpg", "b.jpg"], {"bytes": None, "path": "x.webp"}, "data:image/png;base64,AAAA"):
        assert reason_of(read({"thing": value} | ASKED)) == "image_not_read"
    assert reason_of(read({"img": "a.png", "image_path": "b.png"} | ASKED)) == "image_not_read"
    for field in ("images", "image", "image_path", "thing"):
        assert reason_of(read(talk_with({field: ["a.png"]}))) == "image_not_read"
    assert reason_of(read({"messages": chat([text("q") | {"image": "a.png"}], "a")})) == "image_not_read"
    told = {"file_name": "chapter.txt", "thing": "This is a.png", "note": 3} | ASKED
    assert read(told)[0].not_read == ("file_name", "note", "thing") and not read(told)[0].images


def test_an_image_part_shows_its_own_image(read):
    data = base64.b64encode(png(5, 6)).decode()
    source = {"type": "base64", "media_type": "image/png", "data": data}
    rows = {"images": ["b.png"], "messages": chat([{"type": "image", "source": source}, IMAGE, text("q")], "a")}
    own, column = read(rows)[0].images
    assert own.size() == (5, 6) and column.name == "b.png"
    alone = {"images": ["b.png"], "messages": chat([{"type": "image", "source": source}, text("q")], "a")}
    assert reason_of(read(alone)) == "image_count_mismatch"
    url = {"type": "url", "url": "http://h/x.png"}
    assert reason_of(read({"messages": chat([{"type": "image", "source": url}], "a")})) == "image_url"
    named = {"messages": chat([{"type": "image", "source": "x.png"}, {"type": "image", "image_url": "y.png"}], "a")}
    assert [image.name for image in read(named)[0].images] == ["x.png", "y.png"]
    for field in ("source", "file", "data", "image_path"):
        part = {"type": "image", field: {"type": "file", "file_id": "f"}}
        assert reason_of(read({"images": ["b.png"], "messages": chat([part], "a")})) == "image_not_read"
    captioned = {"type": "image", "text": "a caption"}
    assert reason_of(read({"images": ["b.png"], "messages": chat([captioned], "a")})) == "malformed_record"


def test_the_index_of_an_image_part_chooses_among_the_images(read):
    def asked(*numbers: object) -> dict:
        parts = [{"type": "image", "index": number, "text": None} for number in numbers]
        return {"images": ["x.png", "y.png"], "messages": chat([*parts, text("q") | {"index": None}], "a")}

    for name in ("image_index", "imageIdx"):
        part = {"type": "image", name: 1}
        other = {"images": ["x.png", "y.png"], "messages": chat([part, part | {name: 0}, text("q")], "a")}
        assert [image.name for image in read(other)[0].images] == ["y.png", "x.png"]
    store = read(asked(0, 1), asked(1, 0), asked(0, 1, 0), asked(None, None))
    shown = [[image.name[0] for image in record.images] for record in store]
    assert shown == [["x", "y"], ["y", "x"], ["x", "y", "x"], ["x", "y"]] and store[1].not_read == ()
    for numbers in ((0, 2), (0,), (0, 1, 2)):
        assert reason_of(read(asked(*numbers))) == "image_count_mismatch"
    for numbers in ((0, None), (0, -1), (0, "1"), (True, 0)):
        assert reason_of(read(asked(*numbers))) == "malformed_record"


@pytest.mark.parametrize("field", ["weight", "loss", "train", "training", "loss_mask"])
def test_a_turn_of_weight_0_is_not_learnt_from(read, field):
    silent = assistant("a") | {"weight": 0}
    learnt = [user(text("q")), assistant("a"), user(text("r")), assistant("b")]
    for value in (0, False, 0.0):
        store = read(talk_with({}, {field: value}, {}, {field: not value}))
        assert store[0].messages == [learnt[0], silent, *learnt[2:]] and store[0].not_read == ()
    for value in (1, True, 1.0, None):
        assert read(talk_with({field: 0}, {field: value}))[0].messages == learnt
    for value in (0.5, 2, -1, "0", [0], {}):
        assert reason_of(read(talk_with({}, {field: value}))) == "turn_weight"
    assert reason_of(read(talk_with({}, {field: 0}, {}, {field: 0}))) == "no_supervised_token"
    assert read(talk_with({field: 1}))[0].not_read == (f"messages[].{field}",)
    same = [record.digest() for record in read(talk_with(), talk_with({}, {field: 1}), talk_with({}, {field: 0}))]
    assert same[0] == same[1] != same[2]


def test_weights_that_disagree_or_belong_to_parts_are_refused(read):
    assert reason_of(read(talk_with({}, {"weight": 0, "train": True}))) == "turn_weight"
    assert read(talk_with({}, {"weight": 0, "train": False}))[0].messages[1]["weight"] == 0
    part = {"messages": chat("q", [text("a"), text("b") | {"weight": 0}])}
    assert reason_of(read(part)) == "turn_weight"
    item = {"texts": [{"user": "q", "assistant": "a", "weight": 0}, {"user": "r", "assistant": "b"}]}
    assert read(item)[0].messages[1] == assistant("a") | {"weight": 0}


@pytest.mark.parametrize("field", ["mask", "masked", "ignore", "no_loss", "skip"])
def test_a_turn_that_is_left_out_by_a_flag_is_not_learnt_from(read, field):
    silent = assistant("a") | {"weight": 0}
    for value in (1, True):
        record = read(talk_with({field: value}, {field: value}))[0]
        assert record.messages[1] == silent and record.not_read == ()
        assert reason_of(read(talk_with({}, {field: value, "weight": 1}))) == "turn_weight"
        assert reason_of(read({"messages": chat("q", [text("a") | {field: value}])})) == "turn_weight"
    for value in (0, False):
        assert read(talk_with({}, {field: value}))[0].messages[1] == assistant("a")
    # a mask of another kind is none of the loss
    assert read(talk_with({}, {field: "User"}))[0].not_read == (f"messages[].{field}",)


def test_a_record_that_is_to_be_left_out_whole_is_refused(read):
    for field, value in [("weight", 0), ("loss", False), ("train", 0.0), ("trainable", False), ("masked", True)]:
        assert reason_of(read({field: value} | ASKED)) == "turn_weight"
    for field, value in [("weight", 1), ("weight", 0.5), ("train", True), ("masked", False), ("mask", "User")]:
        assert read({field: value} | ASKED)[0].not_read == (field,)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("Video", "x.mp4", "video_or_audio"),
        ("audioPath", "x.wav", "video_or_audio"),
        ("toolCalls", [CALL], "tool_calls"),
        ("Rejected-Response", "b", "preference"),
        ("response_rejected", "b", "preference"),
        ("rejected_conversations", turns("q", "b"), "preference"),
        ("KTO_tag", "False", "preference"),
        ("negative_messages", [chat("q", "b")], "preference"),
        ("clip", "x.mp4", "video_or_audio"),
        ("media", [{"type": "sound", "path": "x.flac"}], "video_or_audio"),
        ("media", {"images": ["x.png"]}, "image_not_read"),
        ("multi_modal_data", {"image": [{"bytes": None, "path": "x.png"}]}, "image_not_read"),
        ("extra", {"deep": {"er": [["x.webp"]]}}, "image_not_read"),
    ],
)
def test_other_spellings_and_deeper_places_are_known(read, field, value, reason):
    if reason == "tool_calls":
        assert reason_of(read(talk_with({}, {field: value}))) == reason
        return
    assert reason_of(read({field: value} | ASKED)) == reason
    assert read({field: None} | ASKED)[0].not_read == ()


@pytest.mark.parametrize("field", ["System", "systemPrompt", "SYSTEM_MESSAGE", "system-prompt", "system_instruction"])
def test_a_system_field_in_another_spelling_is_the_system_turn(read, field):
    for shape in SHAPES:
        record = read(SHAPES[shape] | {field: "S"}, format="messages" if shape == "prompt" else shape)[0]
        assert record.messages[0] == {"role": "system", "content": [text("S")]} and record.not_read == ()
    assert reason_of(read(ASKED | {field: "S", "system": "T"})) == "conflicting_system"


def test_image_fields_in_another_spelling_are_read(read):
    for field in ("Image", "IMAGES", "imagePath", "Image-URL"):
        record = read({field: ["x.png"]} | ASKED)[0]
        assert [image.name for image in record.images] == ["x.png"] and record.not_read == ()
        assert reason_of(read(talk_with({field: "x"}))) == "image_not_read"


def test_fields_of_an_image_that_are_not_read_are_named(read):
    shown = {"bytes": None, "path": "x.png", "url": "http://h/x.png"}
    store = read(
        {"image": shown | {"crop": [0, 0, 1, 1]}} | ASKED,
        {"images": [shown, {"path": "y.png", "rotate": 90, "id": None}]} | ASKED,
        {"img": shown | {"rotate": 90}} | ASKED,
        {"image": shown} | ASKED,
    )
    assert [record.not_read for record in store] == [("image.crop",), ("images.rotate",), ("img.rotate",), ()]


def test_calls_of_tools_are_refused(read):
    assert reason_of(read(talk_with({}, {"tool_calls": [CALL]}))) == "tool_calls"
    assert reason_of(read(talk_with({}, {"function_call": CALL["function"]}))) == "tool_calls"
    assert read(talk_with({}, {"tool_calls": []}))[0].not_read == ()


def test_boxes_for_placeholders_are_refused(read):
    objects = {"objects": {"ref": ["cat"], "bbox": [[1, 2, 3, 4]]}}
    assert reason_of(read(objects | {"messages": chat("find <ref-object>", "<bbox>")})) == "grounding"
    assert reason_of(read({"bbox": [1, 2, 3, 4], "messages": chat("find", "<bbox>")})) == "grounding"
    assert read(objects | ASKED)[0].not_read == ("objects",)
    assert read({"messages": chat("find", "<bbox>")})[0].messages[1] == assistant("<bbox>")


def test_comparisons_of_answers_are_refused(read):
    for field, value in [
        ("rejected_response", "b"),
        ("rejected", "b"),
        ("rejected_images", ["x.png"]),
        ("chosen", chat("q", "a")),
        ("label", False),
        ("kto_tag", False),
    ]:
        assert reason_of(read({field: value} | ASKED)) == "preference"
    assert reason_of(read({"prompt": "q", "chosen": "a", "rejected": "b"})) == "preference"
    for field, value in [("rejected", None), ("rejected", ""), ("rejected", False), ("label", True), ("label", 0)]:
        assert read({field: value} | ASKED)[0].messages == [user(text("q")), assistant("a")]


def test_fields_that_are_not_read_are_named_with_their_place(read):
    first = chat([text("q") | {"cache_control": {}}], "a")
    first[1] |= {"reasoning_content": "because", "name": None}
    store = read(
        {"messages": first, "tools": [CALL], "model": None, "conversations": turns("x", "y")},
        {"prompt": chat("q"), "completion": [{"role": "assistant", "content": "a", "name": "Bo"}]},
        {"messages": chat([{"type": "image_url", "image_url": "x.png", "detail": "low"}], "a")},
        {"messages": chat([{"type": "image_url", "image_url": {"url": "x.png", "detail": "low"}}], "a")},
    )
    assert store[0].not_read == (
        "conversations",
        "messages[].content[].cache_control",
        "messages[].reasoning_content",
        "tools",
    )
    assert store[1].not_read == ("completion[].name",)
    assert store[2].not_read == ("messages[].content[].detail",)
    assert store[3].not_read == ("messages[].content[].image_url.detail",)
    item = {"texts": [{"user": "q", "assistant": "a", "source": "s"}] * 2, "license": "x"}
    assert read(item)[0].not_read == ("license", "texts[].source")
    talk = {"conversations": [turn | {"seconds": 3} for turn in turns("q", "a")]}
    assert read(talk)[0].not_read == ("conversations[].seconds",)


# line ends, bytes, null


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_any_line_end_after_the_marker_is_one_newline(read, line_end):
    row = {"image": ["x.png", "y.png"], "conversations": turns(f"<image>{line_end}<image>{line_end * 2}q", "a")}
    assert read(row)[0].messages[0] == user(IMAGE, IMAGE, text(f"{line_end}q"))
    kept = read(row, keep_data_newline=True)[0].messages[0]
    assert kept == user(IMAGE, text("\n"), IMAGE, text(f"\n{line_end}q"))


def test_image_columns_of_plain_bytes_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        ("image", png(5, 6), [(5, 6)]),
        ("images", [png(5, 6), png(7, 8)], [(5, 6), (7, 8)]),
        ("image_bytes", png(5, 6), [(5, 6)]),
        ("image", None, []),
        ("images", [None], []),
    ]
    for number, (field, value, sizes) in enumerate(rows):
        path = tmp_path / f"{number}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({field: [value, value]} | {"messages": [chat("q", "a")] * 2}), path)
        record = open_records(DataSource(name="x", path=str(path)))[1]
        assert [image.size() for image in record.images] == sizes
    pyarrow.parquet.write_table(
        pyarrow.table({"thing": [png()], "messages": [chat("q", "a")]}), tmp_path / "x.parquet"
    )
    assert reason_of(open_records(DataSource(name="x", path=str(tmp_path / "x.parquet")))) == "image_not_read"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_base64_without_data_is_named(read, format):
    file = io.BytesIO()
    Image.new("RGB", (20, 10)).save(file, format)
    bare = base64.b64encode(file.getvalue()).decode()
    part = {"type": "image", "image": bare}
    store = read({"image": bare} | ASKED, {"messages": chat([part], "a")}, {"image_url": bare} | ASKED)
    for row in range(3):
        with pytest.raises(RecordError, match="base64 text is not a path") as caught:
            store[row]
        assert caught.value.reason == "invalid_image_path" and len(str(caught.value)) < 200
    assert read({"image": f"data:image/png;base64,{bare}"} | ASKED)[0].images[0].size() == (10, 20)
    with pytest.raises(RecordError, match="base64 goes into a"):
        read({"image": {"bytes": bare, "path": None}} | ASKED)[0]


def test_null_is_absent(read):
    empty = {"id": None, "image": None, "images": None, "texts": None, "prompt": None, "completion": None}
    talk = [user(text("q")), assistant("a")]
    store = read(empty | {"conversations": turns("q", "a"), "messages": None})
    assert store.format == "llava" and store[0].messages == talk and store[0].not_read == ()
    store = read(empty | {"conversations": None} | ASKED)
    assert store.format == "messages" and store[0].messages == talk
    store = read(empty | {"messages": None, "texts": [{"user": "q", "assistant": "a", "source": None}]})
    assert store.format == "cauldron" and store[0].messages == talk and store[0].not_read == ()
    store = read(dict.fromkeys(["conversations", "messages"]), {"messages": None, "conversations": turns("q", "a")})
    assert store.format == "llava" and store[1].messages == talk
    # turns and parts of merged columns
    both = [
        turn | {"from": None, "value": None} for turn in chat([IMAGE | {"text": None, "url": None}, text("q")], "a")
    ]
    shown = read({"image": "x.png", "messages": both})[0]
    assert shown.messages == [user(IMAGE, text("q")), assistant("a")] and shown.not_read == ()
    for image in ([None], {"bytes": None, "path": None}, [{"bytes": None, "path": None}]):
        assert read({"images": image} | ASKED)[0].images == ()
    # an image that is null in a list has no place; the number of a part counts it
    for images in (
        ["x.png", None],
        [None, "x.png"],
        [{"bytes": None, "path": None}, {"bytes": None, "path": "x.png"}],
    ):
        record = read({"images": images, "messages": chat([IMAGE, text("q")], "a")})[0]
        assert [image.name for image in record.images] == ["x.png"]
    numbered = {"images": ["x.png", None], "messages": chat([IMAGE | {"index": 0}, text("q")], "a")}
    assert reason_of(read(numbered)) == "image_count_mismatch"


def test_a_turn_with_both_kinds_of_fields_says_one_thing(read):
    both = [{"from": "human", "value": "q", "role": "user", "content": "q"}, {"from": "gpt", "value": "a"}]
    for last in ({"role": "assistant"}, {"content": "a"}, {"role": "gpt", "content": None}):
        record = read({"conversations": [both[0], both[1] | last]})[0]
        assert record.messages == [user(text("q")), assistant("a")] and record.not_read == ()
    for other in ({"role": "user"}, {"role": "tool"}, {"content": "b"}, {"content": [text("a")]}):
        assert reason_of(read({"conversations": [both[0], both[1] | other]})) == "malformed_record"


def test_a_system_text_of_a_turn_is_honoured_or_refused(read):
    item = {"user": "q", "assistant": "a"}
    assert read({"texts": [item | {"system": "s"}]})[0].messages[0]["content"] == [text("s")]
    assert read({"texts": [item | {"system": None}]})[0].messages == [user(text("q")), assistant("a")]
    assert reason_of(read({"texts": [item, item | {"system": "s"}]})) == "non_alternating_turns"
    for turn in range(2):
        talk = chat("q", "a")
        talk[turn] = talk[turn] | {"systemPrompt": "s"}
        assert reason_of(read({"messages": talk})) == "conflicting_system"


@pytest.mark.parametrize("field", ["loss_mask", "weights", "train", "masked"])
def test_a_list_of_weights_of_a_record_is_refused(read, field):
    learnt = 0 if field == "masked" else 1
    assert read({field: [learnt, bool(learnt)]} | ASKED)[0].not_read == (field,)
    for values in ([0, 1], [0.5], [learnt, None], [[learnt]]):
        assert reason_of(read({field: values} | ASKED)) == "turn_weight"


@pytest.mark.parametrize("marker", ["<image 1>", "<|image|>", "<IMAGE>", "<img>", "<image_1>", "[IMG]"])
def test_a_marker_of_another_tool_is_named(read, marker):
    row = {"image": "x.png", "conversations": turns(f"{marker} q", "a")}
    with pytest.raises(RecordError, match=rf"image_count_mismatch: {re.escape(marker)} in the text .* write <image>$"):
        read(row)[0]
    assert read({"conversations": turns(f"{marker} q", "a")})[0].images == ()


def test_html_is_no_marker(read):
    asked = [{"type": "image", "index": 0}, {"type": "text", "text": 'write <img src="logo.png"> as Markdown'}]
    talk = chat(asked, "<picture></picture><img>")
    assert len(read({"images": ["x.png"], "messages": talk})[0].images) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\0\0\0\x18ftypisom" + b"0" * 9, "video_or_audio"),
        (b"RIFF\1\0\0\0WAVEfmt ", "video_or_audio"),
        (b"ID3\4", "video_or_audio"),
        (b"\0\0\0\x1cftypavif", "image_not_read"),
        (b"II*\0", "image_not_read"),
        (b"some bytes", ""),
    ],
)
@pytest.mark.parametrize("deep", [False, True])
def test_bytes_under_an_unknown_name_are_what_they_begin_as(tmp_path, monkeypatch, content, reason, deep):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    value = [{"bytes": content, "path": None}] if deep else content
    pyarrow.parquet.write_table(
        pyarrow.table({"thing": [value], "messages": [chat("q", "a")]}), tmp_path / "x.parquet"
    )
    store = open_records(DataSource(name="x", path=str(tmp_path / "x.parquet")))
    assert (reason_of(store) == reason) if reason else (store[0].not_read == ("thing",))


def test_an_answer_without_text_is_an_assistant_turn(read):
    with pytest.raises(RecordError, match="the text of an assistant turn is missing"):
        read({"messages": chat("q", None)})[0]


# rows that can't be used

GOOD = {"id": "g", "conversations": turns("q", "a")}
BAD_ROWS: list[tuple[str, object]] = [
    ("malformed_record", [1]),
    ("malformed_record", {"id": "x"}),
    ("malformed_record", {"conversations": []}),
    ("malformed_record", {"conversations": {"from": "human"}}),
    ("malformed_record", {"conversations": ["hi", "ho"]}),
    ("malformed_record", {"conversations": [{"from": "human"}]}),
    ("malformed_record", {"conversations": [{"from": None, "value": "q"}]}),
    ("malformed_record", {"conversations": [{"from": "human", "value": 3}]}),
    ("malformed_record", {"conversations": [{"from": "human", "value": None}]}),
    ("malformed_record", {"conversations": [{"from": "human", "value": [{"type": "file"}]}]}),
    ("video_or_audio", {"conversations": [{"from": "human", "value": [{"type": "video"}]}]}),
    ("malformed_record", {"conversations": [{"from": "human", "value": [{"type": "text"}]}]}),
    ("malformed_record", {"conversations": [{"from": "human", "value": ["text"]}]}),
    ("malformed_record", {"image": 5, "conversations": turns("<image>q", "a")}),
    ("malformed_record", {"image": {"size": 3}, "conversations": turns("<image>q", "a")}),
    ("malformed_record", {"image": ["x.png", None], "conversations": turns("<image><image>q", "a")}),
    ("image_count_mismatch", {"image": {"path": None}, "conversations": turns("<image>q", "a")}),
    ("malformed_record", {"image": "x.png", "images": ["x.png"], "conversations": turns("<image>q", "a")}),
    ("unknown_role", {"conversations": [{"from": "tool", "value": "q"}]}),
    ("unknown_role", {"conversations": [{"from": "Human", "value": "q"}]}),
    ("invalid_text", {"conversations": turns("q\ud800", "a")}),
    ("invalid_text", {"conversations": turns("é", "a\udfff")}),
    ("non_alternating_turns", {"conversations": turns("q", "a", "q")}),
    ("non_alternating_turns", {"conversations": turns("q", "a", "q", "a")[1:]}),
    ("non_alternating_turns", {"conversations": turns("q", "a")[:1] * 2 + turns("q", "a")[1:]}),
    ("non_alternating_turns", {"conversations": [*turns("q", "a"), {"from": "system", "value": "s"}]}),
    ("empty_question", {"conversations": turns(" \n", "a")}),
    ("empty_answer", {"conversations": turns("q", "")}),
    ("empty_answer", {"conversations": turns("q", "a", "q", " \n")}),
    ("no_supervised_token", {"conversations": turns("q")}),
    ("no_supervised_token", {"system": "s", "conversations": turns("q")}),
    ("image_count_mismatch", {"conversations": turns("<image>\nq", "a")}),
    ("image_count_mismatch", {"image": "x.png", "conversations": turns("q", "a")}),
    ("image_count_mismatch", {"image": "x.png", "conversations": turns("<image><image>q", "a")}),
    ("image_count_mismatch", {"image": ["x.png", "y.png"], "conversations": turns("<image>q", "a")}),
    ("misplaced_image", {"image": "x.png", "conversations": turns("q", "<image>a")}),
    ("misplaced_image", {"image": "x.png", "system": "<image>", "conversations": turns("q", "a")}),
    ("image_url", {"image": "http://h/x.png", "conversations": turns("<image>q", "a")}),
    ("image_outside_root", {"image": "../x.png", "conversations": turns("<image>q", "a")}),
    ("invalid_image_path", {"image": "x\0.png", "conversations": turns("<image>q", "a")}),
    ("corrupt_image", {"image": "data:image/png;base64,%", "conversations": turns("<image>q", "a")}),
]


@pytest.mark.parametrize(("reason", "row"), BAD_ROWS)
def test_a_bad_row_has_its_reason_and_spoils_no_other(read, reason, row):
    store = read(GOOD, row, GOOD, format="llava")
    with pytest.raises(RecordError) as caught:
        store[1]
    assert caught.value.reason == reason and caught.value.detail and reason in REASONS
    assert store[0].id == store[2].id == "g"
    assert store.row_id(1) == (row.get("id", "data:1") if isinstance(row, dict) else "data:1")
    assert json.loads(store.source_text(1)) == row


def test_url_in_messages_is_refused(read):
    for part in (
        {"type": "image_url", "image_url": {"url": "https://h/x.png"}},
        {"type": "image_url", "image_url": "http://h/x.png"},
        {"type": "image", "url": "http://h/x.png"},
    ):
        with pytest.raises(RecordError, match="image_url"):
            read({"messages": chat([part, text("q")], "a")})[0]


MALFORMED = {
    "open": b"{",
    "word": b"nonsense",
    "comma": b'{"id": "x", }',
    "deep array": b"[" * 100_000 + b"]" * 100_000,
    "deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "digits": b'{"id": ' + b"9" * 5000 + b"}",
    "control": b'{"conversations": "\x01"}',
    "inner BOM": "\ufeff{}".encode(),
    "17 MiB": b'{"id": "' + b"x" * (17 * 2**20) + b'"}',
}


# in an array, an element that never ends or is too long is an error of the file, tested below
@pytest.mark.parametrize(
    ("kind", "as_array"),
    [(k, False) for k in MALFORMED] + [(k, True) for k in MALFORMED if k not in ("open", "17 MiB")],
)
def test_malformed_json_is_one_row(tmp_path, kind, as_array):
    good, line = json.dumps(GOOD).encode(), MALFORMED[kind]
    path = tmp_path / "data.json"
    path.write_bytes(b"[" + b",\n".join([good, line, good]) + b"]" if as_array else b"\n".join([good, line, good]))
    store = open_records(DataSource(name="x", path=str(path)))
    assert len(store) == 3 and store[0].id == store[2].id == "g"
    with pytest.raises(RecordError) as caught:
        store[1]
    assert caught.value.reason == "malformed_json" and f"byte {len(good) + 1 + 2 * as_array}" in caught.value.detail
    assert store.row_id(1) == "data:1"


def test_bytes_that_are_not_utf8_spoil_one_row(tmp_path):
    rows = [json.dumps({"id": n, "conversations": turns("qé", "a")}, ensure_ascii=False).encode() for n in range(3)]
    rows[1] = rows[1].replace("é".encode(), b"\xe9")
    for name, content in (("data.json", b"[" + b",".join(rows) + b"]"), ("data.jsonl", b"\n".join(rows))):
        (tmp_path / name).write_bytes(content)
        store = open_records(DataSource(name="x", path=str(tmp_path / name)))
        assert (store[0].id, store[2].id) == ("0", "2")
        with pytest.raises(RecordError, match="invalid_text"):
            store[1]


# files that can't be used


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        (" \n ", "empty"),
        ("[]", "no records"),
        ("[", "byte 1"),
        ('[{"a": 1}', "byte 9"),
        ('[{"a": 1}, {"b": ', "byte 17"),
        ('[{"a": "b}, {"c": 1}]', "byte 21"),
        ('[{"a": 1} {"b": 2}]', "byte 10"),
        ('[{"a": 1},]', "byte 10"),
        ('[{"a": 1}] x', "byte 11"),
        ('{"a":\n1}', "neither a JSON array nor JSON lines"),
        ('{"data": [1]}', "none of the known shapes"),
        (
            '[{"image": "a.png", "question": "b", "answer": "c"}]',
            r"none of the known shapes.*write each row as \{.image",
        ),
        ("[1, 2]", "none of the first 2 rows is a JSON object with a conversation; row 0: it is a number"),
        ('[{"a": 1, "a": 2}]', "row 0: malformed_json: key 'a' is given twice"),
        ('[{"messages": null}]', "row 0: its conversation is null"),
        ('[{"é": "' + "x" * (17 * 2**20) + '"}]', "row 0, at byte 1, is longer than"),
    ],
)
def test_a_file_that_is_no_data_is_named_with_the_byte(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        open_records(DataSource(name="x", path=str(path)))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_without_a_usable_row_tells_the_first_ones_reason(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD, indent=1))
    with pytest.raises(UserError, match=r"row 0: malformed_json: Expecting property name .*each line holds one"):
        open_records(DataSource(name="x", path=str(path)))
    path.write_text("version https://git-lfs.github.com/spec/v1\nsize 12345\n")
    with pytest.raises(
        UserError, match=r"row 0: malformed_json: Expecting value .*, which begins 'version https://git-"
    ):
        open_records(DataSource(name="x", path=str(path)))
    with tarfile.open(tmp_path / "data.tar", "w") as shard:
        for name in ("0.a.json", "0.b.json"):
            member = tarfile.TarInfo(name)
            member.size = len(json.dumps(GOOD))
            shard.addfile(member, io.BytesIO(json.dumps(GOOD).encode()))
    with pytest.raises(UserError, match="row 0: malformed_record: no .json in sample '0'"):
        open_records(DataSource(name="x", path=str(tmp_path / "data.tar")))


def test_missing_and_strange_paths_are_named(tmp_path):
    (tmp_path / "x.txt").write_text("hello")
    (tmp_path / "x.csv").write_text("file,question,answer\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos/day").mkdir(parents=True)
    (tmp_path / "photos/day/a.JPG").touch()
    for path, message in [
        ("none.json", "does not exist"),
        ("x.txt", "no data that can be read"),
        ("x.csv", "tables are not read.*own-data"),
        ("photos", "holds images, but no rows.*own-data"),
        ("empty", "no data that can be read"),
    ]:
        with pytest.raises(UserError, match=message):
            open_records(DataSource(name="x", path=str(tmp_path / path)))
    (tmp_path / "utf16.json").write_text("[]", encoding="utf-16")
    with pytest.raises(UserError, match="UTF-16"):
        open_records(DataSource(name="x", path=str(tmp_path / "utf16.json")))
    (tmp_path / "x.jsonl").write_text(json.dumps(GOOD))
    with pytest.raises(UserError, match="image_root .* is not a folder"):
        open_records(DataSource(name="x", path=str(tmp_path / "x.jsonl"), image_root=str(tmp_path / "none")))


TEXTS = {"json": [GOOD], "jsonl": GOOD}


@pytest.mark.parametrize("suffix", TEXTS)
@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "utf-8", "utf-8-sig"]
)
def test_the_encoding_of_a_file_is_named(tmp_path, suffix, encoding):
    path = tmp_path / f"x.{suffix}"
    path.write_text(json.dumps(TEXTS[suffix]), encoding=encoding)
    if encoding.startswith("utf-8"):
        assert open_records(DataSource(name="x", path=str(path)))[0].id == "g"
        return
    for read_file in (lambda: open_records(DataSource(name="x", path=str(path))), lambda: load_questions(path)):
        with pytest.raises(UserError, match=f"the file is {encoding[:6].upper()} .fix: convert it to UTF-8"):
            read_file()


@pytest.mark.parametrize("module", [gzip, bz2, lzma])
def test_a_compressed_file_of_any_name_is_called_so(tmp_path, module):
    path = tmp_path / "x.jsonl"
    path.write_bytes(module.compress(json.dumps(GOOD).encode()))
    for read_file in (lambda: open_records(DataSource(name="x", path=str(path))), lambda: load_questions(path)):
        with pytest.raises(UserError, match=r"the file is compressed \((gzip|bzip2|xz)\) .fix: unpack it"):
            read_file()


def test_links_into_the_cache_of_the_hub_come_with_their_fix(tmp_path, read):
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "blobs").mkdir()
    (tmp_path / "hub" / "blobs" / "d1").write_bytes(png())
    (snapshot / "a.png").symlink_to("../../blobs/d1")
    (snapshot / "x.jsonl").write_text(json.dumps({"image": "a.png", "conversations": turns("<image>q", "a")}))
    record = open_records(DataSource(name="x", path=str(snapshot / "x.jsonl")))[0]
    with pytest.raises(RecordError, match=r"image_symlink_escape: .*hf download ID .*--local-dir DIR"):
        record.images[0].size()


@pytest.mark.parametrize("path", ["data/nosuch.json", "data/nosuch.PARQUET", "a/b.tar@main", "a/b.jsonl:config"])
def test_the_name_of_a_file_is_never_asked_at_the_hub(monkeypatch, path):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked at the Hub"))
    with pytest.raises(UserError, match="does not exist"):
        open_records(DataSource(name="x", path=path))


def test_a_hub_id_goes_to_load_dataset(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return datasets.Dataset.from_list([as_cauldron("1", [], [user(text("q")), assistant("a")])])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    store = open_records(DataSource(name="x", path="owner/the_set:ai2d", split="test"))
    assert store[0].messages == [user(text("q")), assistant("a")]
    assert asked == [(("owner/the_set", "ai2d"), {"split": "test", "revision": None})]


# indexing

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=150)
@given(st.lists(json_values, max_size=12), st.integers(2, 40), st.integers(0, 2), st.booleans(), st.booleans())
def test_index_equals_json_load(tmp_path, monkeypatch, values, chunk_bytes, indent, ascii_only, bom):
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", chunk_bytes)
    content = json.dumps(values, ensure_ascii=ascii_only, indent=indent or None).encode("utf-8", "surrogatepass")
    path = tmp_path / "values.json"
    path.write_bytes(b"\xef\xbb\xbf" * bom + b" \r\n" * indent + content + b"\n")
    rows = json_rows.JsonRows(path)
    try:
        expected = [json.dumps(value) for value in values]
        assert [json.dumps(rows[row]) for row in range(len(rows))] == expected
    except AssertionError:
        assert "\\ud" in "".join(expected)  # a lone surrogate is not UTF-8
    lines = [json.dumps({"": value}, ensure_ascii=ascii_only).encode("utf-8", "replace") for value in values]
    path = tmp_path / "values.jsonl"
    path.write_bytes(b"\n \r\n".join([b"{}", *lines]) + b"\n" * indent)
    rows = json_rows.JsonRows(path)
    assert [rows.text(row).strip().encode() for row in range(len(rows))] == [b"{}", *lines]


def test_a_huge_line_is_never_held(tmp_path):
    path = tmp_path / "data.jsonl"
    with open(path, "wb") as file:
        file.write(json.dumps(GOOD).encode() + b"\n")
        file.seek(200 * 2**20, io.SEEK_CUR)
        file.write(b"\n" + json.dumps(GOOD).encode())
    tracemalloc.start()
    store = open_records(DataSource(name="x", path=str(path)))
    with pytest.raises(RecordError, match="longer than"):
        store[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(store) == 3 and store[2].id == "g" and store.source_text(1) == "" and peak < 48 * 2**20


def test_a_store_pickles_and_reads_after_the_file_was_replaced(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD))
    store = open_records(DataSource(name="x", path=str(path)))
    assert pickle.loads(pickle.dumps(store))[0] == store[0]
    path.with_suffix(".new").write_text("{}")
    path.with_suffix(".new").replace(path)
    assert store[0].id == "g"


def test_digest_sees_images_and_words(read):
    rows = [
        {"id": n, "image": image, "conversations": turns(f"<image>{question}", "a")}
        for n, (image, question) in enumerate([("x.png", "q"), ("x.png", "q"), ("y.png", "q"), ("x.png", "q ")])
    ]
    digests = [record.digest() for record in read(*rows)]
    assert digests[0] == digests[1] and len(set(digests)) == 3
    two_parts = read({"messages": chat([text("s"), text("q")], "a")})[0]
    assert two_parts.digest() != read({"system": "s", "conversations": turns("q", "a")})[0].digest()


def test_every_reason_is_documented():
    page = Path(__file__).parents[1] / "docs" / "data.md"
    table = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    documented = {line.split("`")[1]: line.split("|")[2].strip() for line in table}
    assert {reason: documented.get(reason) for reason in REASONS} == REASONS
    assert records.REASONS is REASONS
