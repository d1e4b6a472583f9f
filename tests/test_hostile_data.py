"""Hostile data end to end: whatever a record, an image or a data file holds, a sample or a named reject comes out."""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.data.check.image_decoder import Decoder
from llava_llama31.trainer.data.check.row_checker import Limits, RowChecker
from llava_llama31.trainer.data.sources import json_rows
from llava_llama31.trainer.data.sources.images import ImageRef, image_at
from llava_llama31.trainer.data.sources.records import open_records
from llava_llama31.trainer.data.sources.reject_reasons import REASONS, RecordError
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.questions import load_questions
from llava_llama31.trainer.recipes.schema import DataSource


# FUZZ_SCALE=40 looks forty times as far
SCALE = int(os.environ.get("FUZZ_SCALE", "1"))
TALK = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
GOOD = {"id": "good", "conversations": TALK}


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def reason_of(call) -> str:
    with pytest.raises(RecordError) as caught:
        call()
    assert caught.value.detail and caught.value.reason in REASONS
    return caught.value.reason


# records


SPECIAL = [
    "<image>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|begin_of_text|>",
    "\ud800",
    "\x1b[2J",
    "\0",
    "\u202e",
    "",
]
hostile_text = st.one_of(
    st.sampled_from(SPECIAL),
    st.text(max_size=20),
    st.lists(st.sampled_from(SPECIAL) | st.text(max_size=5), max_size=6).map("".join),
    st.sampled_from(
        ["/dev/zero", "/etc/passwd", "../x.png", "pipe.png", "good.png", "http://h/x", "data:;base64,AAAA"]
    ),
    st.characters(codec=None).map(str),
)
hostile_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | hostile_text,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "text", "image", "url", "bytes", "path", "source", "index", "data"])
            | hostile_text,
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
turn = st.fixed_dictionaries(
    {},
    optional={key: hostile_value for key in ("value", "content", "weight", "train", "tool_calls", "images", "x")}
    | {"from": st.just("human") | hostile_value},
) | st.builds(
    lambda role, value: {"from": role, "value": value}, st.sampled_from(["human", "gpt", "system"]), hostile_text
)
hostile_row = hostile_value | st.fixed_dictionaries(
    {},
    optional={
        "id": hostile_value,
        "image": hostile_value,
        "images": hostile_value,
        "system": hostile_value,
        "system_prompt": hostile_value,
        "file_name": hostile_value,
        "image_path": hostile_value,
        "objects": hostile_value,
        "label": hostile_value,
        "conversations": st.lists(turn, max_size=4) | hostile_value,
        "messages": st.lists(turn, max_size=4) | hostile_value,
        "prompt": hostile_value,
        "completion": hostile_value,
        "texts": st.lists(st.dictionaries(st.sampled_from(["user", "assistant"]), hostile_value), max_size=3),
    },
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    Image.new("RGB", (40, 30)).save(folder / "good.png")
    os.mkfifo(folder / "pipe.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("format", ["llava", "sharegpt", "messages", "cauldron"])
@settings(max_examples=20 * SCALE)
@given(st.lists(hostile_row, min_size=1, max_size=10), st.booleans())
@example([GOOD, {"id": "x", "image": "pipe.png", "conversations": [TALK[0] | {"value": "<image>"}, TALK[1]]}], True)
def test_any_json_is_a_sample_or_a_named_reject(folder, processor, format, rows, ascii_only):
    lines = [json.dumps(row, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass") for row in [GOOD, *rows]]
    (folder / "data.jsonl").write_bytes(b"\n".join(lines))
    store = open_records(DataSource(name="data", path=str(folder / "data.jsonl"), format=format))
    checker = RowChecker(store, processor, Limits(max_tokens=5000), "header")
    found = checker.check(range(len(store)))
    assert sorted([*found.rows, *(reject["row"] for reject in found.rejects)]) == list(range(len(rows) + 1))
    for reject in found.rejects:
        assert reject["reason"] in REASONS and reject["detail"] and reject["id"].isprintable()
        json.dumps(reject).encode()
    for row in found.rows:
        encoding = processor.encode(store[row].messages, [image.size() for image in store[row].images])
        assert_only_our_control_tokens(processor, store[row].messages, encoding.input_ids)


def assert_only_our_control_tokens(processor, messages, input_ids) -> None:
    ids = {token: id for token, id in processor.tokenizer.get_vocab().items() if token.startswith("<|")}
    assert input_ids.count(ids["<|begin_of_text|>"]) == 1
    for token in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"):
        assert input_ids.count(ids[token]) == len(messages)
    others = set(ids) - {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
    assert not {ids[token] for token in others} & set(input_ids)


@settings(max_examples=150)
@given(
    st.lists(st.sampled_from(["<|eot_id|>", "<|", "|>", "eot_id", "<image>", "<|pad", " ", "a", "\n"]), max_size=12)
)
def test_text_never_becomes_a_control_token(processor, pieces):
    messages = [{"role": "user", "content": "".join(pieces)}, {"role": "assistant", "content": "".join(pieces)}]
    encoding = processor.encode(messages)
    assert_only_our_control_tokens(processor, messages, encoding.input_ids)
    assert processor.image_token_id not in encoding.input_ids


def test_ids_can_be_printed(tmp_path):
    ids = ["\x1b]0;owned\x07", "a\u202eb", "\ud800", "line\nbreak", "i" * 10**6, True, 1.5, ["x"], "naïve 7"]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(GOOD | {"id": given}) for given in ids))
    store = open_records(DataSource(name="x", path=str(tmp_path / "x.jsonl")))
    read = [record.id for record in store]
    assert all(id.isprintable() and len(id) < 250 for id in read) and read == [
        store.row_id(n) for n in range(len(ids))
    ]
    assert read[0] == "\\x1b]0;owned\\x07" and read[2] == "\\ud800"
    assert read[5:] == ["x:5", "1.5", "x:7", "naïve 7"]


def test_a_key_given_twice_is_refused(tmp_path):
    twice = '{"id": "a", "image": "x.png", "image": "y.png", "conversations": []}'
    many = "{" + ", ".join(f'"{n}": 0' for n in range(200_000)) + ', "0": 1}'
    (tmp_path / "x.jsonl").write_text(f"{json.dumps(GOOD)}\n{twice}\n{many}\n")
    store = open_records(DataSource(name="x", path=str(tmp_path / "x.jsonl")))
    with pytest.raises(RecordError, match="malformed_json: key 'image' is given twice"):
        store[1]
    with pytest.raises(RecordError, match="key '0' is given twice"):
        store[2]


@pytest.mark.parametrize("depth", [60, 64, 65, 900, 100_000])
def test_nesting_is_bounded_whatever_the_stack(tmp_path, depth):
    row = json.dumps(GOOD)[:-1] + ', "x": ' + "[" * (depth - 1) + "]" * (depth - 1) + ', "y": "[[{' + "[" * 99 + '"}'
    (tmp_path / "x.jsonl").write_text(row)

    def read(frames: int):
        return read(frames - 1) if frames else open_records(DataSource(name="x", path=str(tmp_path / "x.jsonl")))[0]

    for frames in (0, 700):
        if depth > json_rows.MAX_DEPTH:
            with pytest.raises((RecordError, UserError), match="nested too deeply|none of the first"):
                read(frames)
        else:
            assert read(frames).id == "good"


@pytest.mark.slow
def test_malformed_elements_of_an_array_are_skipped_in_one_reading(tmp_path, monkeypatch):
    good = json.dumps(GOOD)
    (tmp_path / "x.json").write_text(f"[{good}" + ', {"a": nonsense}' * 20_000 + f", {good}" * 20_000 + "]")
    reads = []
    read = json_rows.JsonRows.read
    monkeypatch.setattr(
        json_rows.JsonRows, "read", lambda self, start, size: reads.append(size) or read(self, start, size)
    )
    store = open_records(DataSource(name="x", path=str(tmp_path / "x.json")))
    assert len(store) == 40_001 and store[40_000].id == "good"
    # 16 MiB for each of them was minutes
    assert sum(size for size in reads if size > 1000) < 100 * 2**20


def test_long_rows_are_counted_a_few_at_a_time(tmp_path, processor):
    row = GOOD | {"conversations": [TALK[0] | {"value": "word " * 300_000}, TALK[1]]}
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(row | {"id": n, "k": str(n)}) for n in range(60)))
    store = open_records(DataSource(name="x", path=str(tmp_path / "x.jsonl"), format="llava"))
    checker = RowChecker(store, None, Limits(), "header")
    tracemalloc.start()
    found = checker.check(range(60))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.rows) == 60 and peak < 48 * 2**20  # 90 MB of text


def test_rejects_are_short(tmp_path):
    long = "a/" * 10**6
    row = {"id": "i" * 10**6, "image": long, "conversations": [TALK[0] | {"value": "<image>"}, TALK[1]]}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"k" * 10**6: 1, "conversations": []}))
    store = open_records(DataSource(name="x", path=str(tmp_path / "x.jsonl")))
    found = RowChecker(store, None, Limits(), "header").check(range(2))
    assert [len(json.dumps(reject)) < 3000 for reject in found.rejects] == [True, True]


def test_no_escape_sequence_reaches_the_terminal_or_the_log(tmp_path, capfd):
    rows = [{"id": "\x1b[2J\u202e", "image": "\x1b]0;x\x07.png", "conversations": TALK}, {"id": "b", "\x1b[1m": 1}]
    rows.append({"id": "c", "conversations": [{"from": "\x1b[31m", "value": "q"}]})
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "y.jsonl").write_text(json.dumps({"\x1b[1m" * 10**5: 1}))
    questions = tmp_path / "q.jsonl"
    questions.write_text(
        json.dumps({"question_id": "\x1b[2J", "image_id": 1, "question": "?", "answers": ["a"]}) + "\n"
    )
    questions.write_text(questions.read_text() * 2)
    for arguments in (
        ["check-data", str(tmp_path / "x.jsonl"), "--debug"],
        ["check-data", str(tmp_path / "x.jsonl"), "--json", "--on-bad", "skip"],
        ["check-data", str(tmp_path / "y.jsonl"), "--debug"],
        ["check-data", str(tmp_path / "\x1b[2J.jsonl")],
        ["evaluate", str(tmp_path), "--data", str(questions), "--debug"],
    ):
        assert main(arguments) == 2
        out, err = capfd.readouterr()
        assert not {"\x1b", "\x07", "\u202e"} & set(out + err), arguments
        assert len(out + err) < 30_000


# images


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes, pixels: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    end = chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + end


def ifd_bomb(num_tags: int, tag_bytes: int, num_bytes: int) -> bytes:
    """EXIF whose tags all point at the same bytes: read one by one they are terabytes."""
    tags = b"".join(struct.pack("<HHII", 1000 + tag, 7, tag_bytes, 0) for tag in range(num_tags))
    return (b"II*\0" + struct.pack("<IH", 8, num_tags) + tags + b"\0" * 4).ljust(num_bytes, b"\0")


def jpeg_with(marker: bytes, *segments: bytes) -> bytes:
    data = encoded(Image.new("RGB", (8, 8)), "JPEG")
    added = b"".join(marker + struct.pack(">H", len(segment) + 2) + segment for segment in segments)
    return data[:2] + added + data[2:]


def rle_bmp(width: int, height: int, data: bytes) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(data), 0, 0, 1078) + header + b"\0" * 1024 + data


def webp_canvas(width: int, height: int) -> bytes:
    frame = encoded(Image.new("RGB", (16, 16)), "WEBP", lossless=True)[12:]
    side = struct.pack("<I", 15)[:3]
    canvas = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + canvas + b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    frame = b"\0" * 6 + side * 2 + b"\0" * 4 + frame
    body += b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def many_scans(size: int, num_scans: int) -> bytes:
    """A progressive JPEG with one of its scans again and again: each is a pass over all pixels."""
    data = encoded(Image.new("RGB", (size, size)), "JPEG", progressive=True)
    starts = [n for n in range(len(data)) if data[n : n + 2] == b"\xff\xda"]
    scans = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data) - 2], strict=True)]
    refining = [scan.split(b"\xff\xc4")[0] for scan in scans if scan[4] == 1 and scan[7] > 0]
    return data[:-2] + min(refining, key=len) * num_scans + data[-2:]


GIF = encoded(Image.new("P", (4, 4)), "GIF")
FRAME = GIF.index(b",")
BMP = encoded(Image.new("RGB", (4, 4)), "BMP")
JPEG = encoded(Image.new("RGB", (8, 8)), "JPEG")
SOF = JPEG.index(b"\xff\xc0")
EXIF_BOMB = ifd_bomb(60_000, 3_000_000, 4_000_000)
# made where they are used: every process that collects tests reads this
BOMBS = {
    "png of no height": lambda: png(5, 0),
    "png of 2^62 pixels": lambda: png(2**31 - 1, 2**31 - 1),
    "png one pixel high": lambda: png(40_000_000, 1),
    "png one pixel wide": lambda: png(1, 40_000_000, pixels=b"\0\0" * 40_000_000),
    "png with a profile of 300 MB": lambda: png(4, 4, chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(300_000_000)))),
    "png with 400 MB of text": lambda: png(4, 4, *[chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 1_000_000))] * 400),
    "png with 400 MB of itext": lambda: png(
        4, 4, *[chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"a" * 1_000_000))] * 400
    ),
    "png with more rows than it says": lambda: png(4, 4, pixels=bytes(300_000_000)),
    "png with an EXIF bomb": lambda: png(4, 4, chunk(b"eXIf", EXIF_BOMB), pixels=b"\0\0" * 4),
    "jpeg with an EXIF bomb": lambda: jpeg_with(
        b"\xff\xe1", *(b"Exif\0\0" + EXIF_BOMB[n : n + 65_000] for n in range(0, len(EXIF_BOMB), 65_000))
    ),
    "jpeg with a multi-picture bomb": lambda: jpeg_with(b"\xff\xe2", b"MPF\0" + ifd_bomb(5000, 65_000, 65_500)),
    "jpeg of 2^32 pixels": lambda: JPEG[: SOF + 5] + b"\xff\xff\xff\xff" + JPEG[SOF + 9 :],
    "jpeg of no height": lambda: JPEG[: SOF + 5] + b"\0\0\0\x08" + JPEG[SOF + 9 :],
    "jpeg of 3000 scans": lambda: many_scans(6300, 3000),
    "bmp of no width": lambda: BMP[:18] + struct.pack("<ii", 0, 5) + BMP[26:],
    "bmp of negative height": lambda: BMP[:18] + struct.pack("<ii", 4, -(2**31)) + BMP[26:],
    "bmp that leaps 255 rows": lambda: rle_bmp(40_000_000, 1, b"\0\2\0\xff" * 1000),
    "gif of no size": lambda: GIF[:6] + b"\0" * 4 + GIF[10 : FRAME + 5] + b"\0" * 4 + GIF[FRAME + 9 :],
    "gif with a huge frame": lambda: GIF[: FRAME + 5] + b"\xff" * 4 + GIF[FRAME + 9 :],
    "gif with a frame far out": lambda: GIF[: FRAME + 1] + b"\xff" * 4 + GIF[FRAME + 5 :],
    "webp of 268 megapixels": lambda: webp_canvas(16_383, 16_383),
}
PEAK = """
import os, resource, sys
from pathlib import Path
from llava_llama31.trainer.data.sources.images import image_at
from llava_llama31.trainer.data.sources.reject_reasons import RecordError

def look(name):
    print("image", name)
    for call in ("size", "open"):
        try:
            getattr(image_at(name, Path(sys.argv[1])), call)()
            print("read")
        except RecordError as error:
            print(error.reason)
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(int(peak.split()[1]) // 1024, flush=True)

look("small.png")  # imports and decoders; what follows each process alone
for name in sys.argv[2:]:
    if not (child := os.fork()):
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        look(name)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""
READABLE = {"png with an EXIF bomb", "jpeg with an EXIF bomb", "jpeg with a multi-picture bomb"}


def peaks(folder: Path, names: Iterable[str]) -> dict[str, tuple[list[str], int]]:
    """What comes of the size and of the pixels of images, and the MiB that each took in a process of its own."""
    Image.new("RGB", (4, 4)).save(folder / "small.png")
    command = [sys.executable, "-W", "ignore", "-c", PEAK, str(folder.resolve()), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    answers = done.stdout.split("image ")[2:]
    lines = {name: rest for name, *rest in (answer.splitlines() for answer in answers)}
    return {name: (reasons, int(peak)) for name, (*reasons, peak) in lines.items()}


@pytest.fixture(scope="session")
def bombs(make_once) -> dict[str, tuple[list[str], int]]:
    def fill(folder: Path) -> None:
        for name, make in BOMBS.items():
            (folder / name).write_bytes(make())
        (folder / "peaks.json").write_text(json.dumps(peaks(folder, BOMBS)))

    return json.loads((make_once("bombs", fill) / "peaks.json").read_text())


@pytest.mark.parametrize("name", BOMBS)
def test_no_bomb_takes_memory(bombs, name):
    reasons, peak = bombs[name]
    # a header that looks right may promise what the pixels then do not keep
    assert reasons[1] == "read" if name in READABLE else reasons[1] in ("oversized_image", "corrupt_image", "read")
    assert name in READABLE | {"png with more rows than it says"} or "read" not in reasons[1]
    assert peak < 250


# one lossy, one plain, one with transparency; `make torture` has them all
LARGEST = ["JPEG", "PNG", "RGBA WEBP", *(["WEBP", "GIF", "BMP", "RGBA", "CMYK"] if SCALE > 1 else [])]


@pytest.mark.parametrize("format", LARGEST)
@pytest.mark.slow
def test_the_largest_image_that_is_allowed_takes_less_than_a_gigabyte(tmp_path, format):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if format not in ("GIF", "BMP") else {}
    mode = {"GIF": "P", "RGBA": "RGBA", "RGBA WEBP": "RGBA", "CMYK": "CMYK"}.get(format, "RGB")
    kind = {"RGBA": "PNG", "RGBA WEBP": "WEBP", "CMYK": "JPEG"}.get(format, format)
    quick = {"lossless": True, "method": 0} if kind == "WEBP" else {}
    (tmp_path / "x").write_bytes(encoded(Image.new(mode, (6300, 6300), 7), kind, **options, **quick))
    reasons, peak = peaks(tmp_path, ["x"])["x"]
    assert reasons == ["read", "read"] and peak < 1000


def test_a_sparse_file_of_a_terabyte_is_not_read(tmp_path):
    (tmp_path / "x.webp").write_bytes(encoded(Image.new("RGB", (4, 4)), "WEBP"))
    os.truncate(tmp_path / "x.webp", 2**40)
    ref = image_at("x.webp", tmp_path.resolve())
    for call in (ref.size, ref.open, ref.sha256):
        assert reason_of(call) == "oversized_image"


def test_a_multi_picture_jpeg_shows_its_first(make_image):
    frames = [make_image(20, 30, seed) for seed in range(2)]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    with Image.open(BytesIO(data)) as image:
        assert image.format == "MPO" and image.n_frames == 2
        expected = image.convert("RGB").tobytes()
    assert ImageRef("x", data=data).open().tobytes() == expected


@pytest.mark.parametrize("name", ["pipe.png", "dev.png", "null.png", "tty.png"])
def test_devices_and_pipes_are_never_opened(tmp_path, name, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    for link, target in (("dev.png", "/dev/zero"), ("null.png", "/dev/null"), ("tty.png", "/dev/tty")):
        (tmp_path / link).symlink_to(target)
    monkeypatch.setattr("builtins.open", lambda *_: pytest.fail("opened"))
    ref = image_at(name, tmp_path.resolve())
    for call in (ref.size, ref.open, ref.sha256):
        assert reason_of(call) in ("image_not_a_file", "image_symlink_escape")
    unbounded = replace(ref, path="/dev/zero", root="/")
    assert reason_of(unbounded.open) == "image_not_a_file"


# the process that decodes


@dataclass(frozen=True)
class Fatal(ImageRef):
    """An image that kills or stalls whoever unpickles it."""

    def __reduce__(self):
        return (os.abort, ()) if self.name == "abort" else (time.sleep, (1000,))


@pytest.mark.slow
def test_a_decoder_that_dies_or_stalls_is_one_rejects_fault(make_image):
    good = ImageRef("good", data=encoded(make_image(5, 7)))
    with Decoder(10**6, seconds=3) as decoder:
        assert decoder.size(good) == (5, 7)
        with pytest.raises(RecordError, match=r"decoder_died: the decoder died \(exit code -6\)"):
            decoder.size(Fatal("abort"))
        with pytest.raises(RecordError, match=r"decoder_died: not decoded within 3 s \(exit code -9\)"):
            decoder.size(Fatal("stall"))
        assert decoder.size(good) == (5, 7)
        with pytest.raises(RecordError, match="corrupt_image"):
            decoder.size(ImageRef("cut", data=good.data[:40]))


@pytest.mark.slow
def test_the_decoder_has_only_the_memory_of_its_pixels():
    data = encoded(Image.new("RGB", (13_000, 13_000)), compress_level=1)
    with Decoder(10**6) as decoder, pytest.raises(RecordError, match="oversized_image: there is not enough memory"):
        decoder.size(ImageRef("x", data=data, max_pixels=10**9))


def test_the_decoder_ends_with_its_owner(tmp_path):
    code = """
import os, sys
from llava_llama31.trainer.data.check.image_decoder import Decoder
from llava_llama31.trainer.data.sources.images import image_at
from pathlib import Path
decoder = Decoder(10**6)
print(decoder.size(image_at("x.png", Path(sys.argv[1]))), decoder._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    Image.new("RGB", (4, 3)).save(tmp_path / "x.png")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path.resolve())], capture_output=True, text=True)
    *size, pid = done.stdout.split()
    assert done.returncode == -9 and size == ["(3,", "4)"]
    for _ in range(300):
        if not Path("/proc", pid).exists() or Path("/proc", pid, "stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the decoder is still there")


def test_a_decoder_that_cannot_start_is_no_fault_of_the_data(monkeypatch):
    monkeypatch.setattr("llava_llama31.trainer.data.check.image_decoder._CODE", "raise SystemExit('no such module')")
    with pytest.raises(RuntimeError, match="did not start: no such module"):
        Decoder(10**6).size(ImageRef("x", data=b""))


# parquet and saved data sets


def texts(*values: bytes) -> pyarrow.Array:
    """Strings that need not be UTF-8."""
    ends = [sum(map(len, values[:n])) for n in range(len(values) + 1)]
    buffers = [None, pyarrow.py_buffer(struct.pack(f"<{len(ends)}i", *ends)), pyarrow.py_buffer(b"".join(values))]
    return pyarrow.Array.from_buffers(pyarrow.string(), len(values), buffers)


COLUMNS = {
    "bytes that are no UTF-8": ("invalid_text", texts(b"ok", b"\xff\xfe")),
    "a date that is none": ("malformed_record", pyarrow.array([0, 2**62], pyarrow.timestamp("us"))),
    "a time span that is none": ("malformed_record", pyarrow.array([0, 2**62], pyarrow.duration("s"))),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_parquet_row_that_python_cannot_hold_is_one_reject(tmp_path, kind):
    reason, column = COLUMNS[kind]
    pyarrow.parquet.write_table(pyarrow.table({"x": column, "conversations": [TALK] * 2}), tmp_path / "x.parquet")
    store = open_records(DataSource(name="x", path=str(tmp_path / "x.parquet")))
    assert store[0].id == "x:0" and reason_of(lambda: store[1]) == reason and store.source_text(1) == ""


@pytest.mark.parametrize("damage", [b"", b"PAR1" + b"\xff" * 99 + b"PAR1", b"nonsense"])
def test_a_broken_parquet_file_is_one_line(tmp_path, damage):
    (tmp_path / "x.parquet").write_bytes(damage)
    with pytest.raises(UserError) as caught:
        open_records(DataSource(name="x", path=str(tmp_path / "x.parquet")))
    assert "\n" not in str(caught.value)


def test_a_folder_of_parquet_cannot_name_files_elsewhere(tmp_path):
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: asked.append(server.accept()), daemon=True).start()
        for number, place in enumerate(
            (f"http://127.0.0.1:{server.getsockname()[1]}/evil.parquet", "../evil.parquet")
        ):
            data = tmp_path / f"data{number}"
            data.mkdir()
            configs = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {place}\n"
            (data / "README.md").write_text(f"---\n{configs}---\n")
            (data / "data.py").write_text("raise SystemExit('run')")
            for path, id in ((data / "train-0.parquet", "mine"), (tmp_path / "evil.parquet", "evil")):
                pyarrow.parquet.write_table(pyarrow.table({"id": [id], "conversations": [TALK]}), path)
            assert open_records(DataSource(name="x", path=str(data)))[0].id == "mine"
    assert not asked


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", "{}"),
        ("state.json", "[]"),
        ("state.json", "nonsense"),
        ("state.json", '{"_data_files": 3}'),
        ("state.json", '{"_data_files": [{"filename": "../../../etc/passwd"}]}'),
        ("state.json", '{"_data_files": [{"filename": "/etc/passwd"}]}'),
        ("dataset_dict.json", "["),
        ("dataset_dict.json", '{"splits": 3}'),
        ("dataset_dict.json", '{"splits": ["../train"]}'),
        ("dataset_dict.json", '{"splits": ["other"]}'),
    ],
)
def test_a_hostile_saved_data_set_is_one_line(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    (tmp_path / "dataset_info.json").write_text("{}")
    for split in ("train", "../train"):
        with pytest.raises(UserError) as caught:
            open_records(DataSource(name="x", path=str(tmp_path), split=split))
        assert "\n" not in str(caught.value)


def test_a_saved_data_set_cannot_name_files_elsewhere(tmp_path):
    datasets.Dataset.from_list([GOOD]).save_to_disk(tmp_path / "other")
    data = tmp_path / "data"
    shutil.copytree(tmp_path / "other", data)
    state = json.loads((data / "state.json").read_text())
    assert open_records(DataSource(name="x", path=str(data)))[0].id == "good"
    (file,) = state["_data_files"]
    (data / "state.json").write_text(
        json.dumps(state | {"_data_files": [{"filename": f"../other/{file['filename']}"}]})
    )
    with pytest.raises(UserError, match="does not name a file in the folder"):
        open_records(DataSource(name="x", path=str(data)))
    (data / "dataset_dict.json").write_text('{"splits": ["../other"]}')
    with pytest.raises(UserError, match="does not name a file in the folder"):
        open_records(DataSource(name="x", path=str(data), split="../other"))


# questions


QUESTION = {"question_id": 1, "image_id": "x", "question": "?", "answers": ["a"]}


@pytest.mark.slow
@settings(max_examples=100 * SCALE)
@given(st.dictionaries(st.sampled_from([*QUESTION, "image", "ocr_tokens"]), hostile_value, max_size=3))
def test_any_question_row_is_a_question_or_one_line(tmp_path, changes):
    (tmp_path / "q.jsonl").write_text(json.dumps(QUESTION | changes))
    try:
        (question,) = load_questions(tmp_path / "q.jsonl")
    except UserError as error:
        assert "q.jsonl:1" in str(error) and "\n" not in str(error)
        return
    try:
        assert question.image.size()
    except RecordError as error:
        assert error.reason in REASONS


@pytest.mark.parametrize("image", [{"bytes": "text"}, {"bytes": [1]}, {"path": 5}, "n" * 5000, "a\0b"])
def test_a_question_with_an_impossible_image(tmp_path, image):
    (tmp_path / "q.jsonl").write_text(json.dumps(QUESTION | {"image": image}))
    test_any_question_row_is_a_question_or_one_line.hypothesis.inner_test(tmp_path, {"image": image})


def test_a_question_file_that_is_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "q.jsonl")
    with pytest.raises(UserError, match="is not a file"):
        load_questions(tmp_path / "q.jsonl")
    with pytest.raises(UserError, match="no data that can be read"):
        open_records(DataSource(name="x", path=str(tmp_path / "q.jsonl")))


def test_parquet_questions_that_are_not_utf8_are_one_line(tmp_path):
    columns = {key: [value] for key, value in QUESTION.items()}
    written = tmp_path / "q.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns | {"question": texts(b"\xff\xfe")}), written)
    with pytest.raises(UserError, match=r"q\.parquet: holds text that is not UTF-8"):
        load_questions(written)
    pyarrow.parquet.write_table(pyarrow.table(columns), written)
    (tmp_path / "\udcff").mkdir()
    for path in (tmp_path / "\udcff.parquet", tmp_path / "\udcff" / "0.parquet"):
        os.link(written, path)
        with pytest.raises(UserError, match=r"the path is not UTF-8, which pyarrow needs .fix: rename it"):
            load_questions(path)
