"""WebDataset shards: the same records as from files, and a name for whatever is wrong with a shard or a sample."""

import gzip
import hashlib
import io
import json
import pickle
import random
import tarfile
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.data.sources.records import data_files, open_records
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.data.sources.tar_rows import TarRows
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.schema import DataSource


def turns(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]


def png_bytes(height: int = 4, width: int = 6, colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def pack(shard: Path, files: dict[str, object], **options: object) -> Path:
    """Write files, given as bytes or as what JSON shall hold, into a .tar in their order."""
    with tarfile.open(shard, "w", **options) as tar:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return shard


def records_of(path: Path):
    return open_records(DataSource(name="data", path=str(path)))


ONE = {"conversations": turns("<image>\nWhat?", "Red")}
TWO = {"conversations": turns("<image><image>Same?", "No")}


def test_a_sample_is_a_record_with_the_images_beside_it(tmp_path):
    shard = pack(
        tmp_path / "a.tar",
        {
            "train/000.json": ONE,
            "train/000.png": png_bytes(4, 6),
            "train/001.1.jpg": png_bytes(1, 2),
            "train/001.0.JPG": png_bytes(3, 4),
            "train/001.json": {"id": "own", **TWO},
            "train/001.txt": b"what else a shard may hold",
            "002.json": {"conversations": turns("Hi", "Hello")},
        },
    )
    store = records_of(shard)
    assert store.format == "llava" and len(store) == 3
    first, second, third = store
    assert [record.id for record in store] == ["train/000", "own", "002"]
    assert first.images[0].name == "train/000.png" and first.images[0].size() == (4, 6)
    assert first.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert [image.size() for image in second.images] == [(1, 2), (3, 4)]  # as they stand in the shard
    assert [record.not_read for record in store] == [(), ("*.txt",), ()]
    assert not third.images
    assert json.loads(store.source_text(1)) == {"id": "own", **TWO}
    assert pickle.loads(pickle.dumps(store))[1].images == second.images


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_any_length_and_script_are_read(tmp_path, tar_format):
    key = f"{'d' * 90}/{'n' * 60}" if tar_format == tarfile.USTAR_FORMAT else f"{'d' * 300}/Bäume/絵"
    shard = pack(tmp_path / "a.tar", {f"{key}.json": ONE, f"{key}.png": png_bytes()}, format=tar_format)
    assert records_of(shard)[0].id.removesuffix("...") == key[:200]
    assert records_of(shard)[0].images[0].name == f"{key}.png"


def test_a_record_may_name_the_order_of_its_images(tmp_path):
    files = {"0.a.png": png_bytes(1, 1), "0.b.png": png_bytes(2, 2)}
    named = {"conversations": turns("<image><image><image>", "ok"), "images": ["x/0.b.png", "0.a.png", "0.b.png"]}
    single = {"image": "coco/elsewhere.jpg", **ONE}
    gone = {"conversations": turns("<image><image>", "ok"), "image": ["1.a.png", "2.c.png"]}
    shard = pack(
        tmp_path / "a.tar",
        {**files, "0.json": named, "1.json": single, "1.png": png_bytes(3, 3)}
        | {"2.json": gone, "2.a.png": png_bytes(), "2.b.png": png_bytes()},
    )
    store = records_of(shard)
    assert [image.size() for image in store[0].images] == [(2, 2), (1, 1), (2, 2)]
    assert store[1].images[0].size() == (3, 3)
    with pytest.raises(RecordError, match=r"missing_image: no file '1\.a\.png' in sample '2' of .*a\.tar"):
        store[2]


def encoded(kind: str, colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("turn", ["<image>\nWhat?", "What?"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("0.jfif", "JPEG"), ("0.jpe", "JPEG"), ("0.img", "JPEG"), ("0.bin", "PNG"), ("0.x", "BMP"), ("0.a.b", "WEBP")],
)
def test_an_image_of_any_name_is_an_image(tmp_path, name, kind, turn):
    record = {"messages": [{"role": "user", "content": turn}, {"role": "assistant", "content": "Red"}]}
    store = records_of(pack(tmp_path / "a.tar", {"0.json": record, name: encoded(kind), "0.txt": b"BM, not an image"}))
    assert [image.size() for image in store[0].images] == [(4, 6)]
    assert store[0].messages[0]["content"][0] == {"type": "image"}


@pytest.mark.parametrize("turn", ["<image>\nWhat?", "What?"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("0.tif", encoded("TIFF")),
        ("0.avif", b"\0\0\0\x1cftypavif"),
        ("0.dat", b"\0\0\0\x18ftypheic"),
        ("0.svg", b"<svg/>"),
        ("0.jpg", b"<html>"),
    ],
)
def test_an_image_of_another_format_is_refused_by_its_format(tmp_path, name, content, turn):
    record = {"messages": [{"role": "user", "content": turn}, {"role": "assistant", "content": "Red"}]}
    record = records_of(pack(tmp_path / "a.tar", {"0.json": record, name: content}))[0]
    with pytest.raises(RecordError, match="unsupported_image_format"):
        record.images[0].size()


@pytest.mark.parametrize(("name", "content"), [("0.mp4", b"x"), ("0.bin", b"\0\0\0\x18ftypisom"), ("0.wav", b"RIFF")])
def test_video_and_sound_are_refused_by_name(tmp_path, name, content):
    path = pack(tmp_path / "a.tar", {"0.json": {"conversations": turns("Hi", "Hello")}, name: content})
    store = open_records(DataSource(name="data", path=str(path), format="llava"))
    with pytest.raises(RecordError, match=f"malformed_record: '{name}' in sample '0' of .* is (video|audio)"):
        store[0]


def test_files_of_a_sample_that_are_not_read_are_named(tmp_path):
    files = {
        "0.json": ONE,
        "0.png": png_bytes(),
        "0.cls": b"3",
        "0.meta.json": b"{}",
        "0.b.npy": b"\x93NUMPY",
        "0": b"",
    }
    record = records_of(pack(tmp_path / "a.tar", files))[0]
    assert record.not_read == ("*", "*.b.npy", "*.cls", "*.meta.json") and len(record.images) == 1


def test_what_macos_packs_beside_a_sample_is_passed_over(tmp_path):
    files = {"._0.json": b"\0\x05\x16\x07", "0.json": ONE, "._0.png": b"\0\x05\x16\x07", "0.png": png_bytes()}
    inner = {f"d/{name}": content for name, content in files.items()}
    store = records_of(pack(tmp_path / "a.tar", {"._d": b"x", **files, **inner}))
    assert [record.id for record in store] == ["0", "d/0"]
    assert [len(record.images) for record in store] == [1, 1]


def test_numbered_images_in_the_order_of_names_are_in_that_of_their_numbers(tmp_path):
    def sample(key: str, numbers: list[object]) -> dict[str, object]:
        record = {"conversations": turns("<image>" * len(numbers) + "q", "A")}
        images = {f"{key}.{number}.png": png_bytes(1 + place, 3) for place, number in enumerate(numbers)}
        return {f"{key}.json": record, **images}

    by_name = sorted(range(11), key=str)
    assert by_name[:4] == [0, 1, 10, 2]
    files = sample("a", by_name) | sample("b", list(range(11))) | sample("c", [1, 0]) | sample("d", ["x", "y", 10])
    store = records_of(pack(tmp_path / "a.tar", files))
    shown = [[image.name.split(".")[1] for image in record.images] for record in store]
    ordered = [str(number) for number in range(11)]
    assert shown == [ordered, ordered, ["1", "0"], ["x", "y", "10"]]


def test_shards_of_a_folder_are_one_source(tmp_path):
    """As many samples and shards as there are, in the order of names, each row by itself."""
    draw, expected = random.Random(0), []
    for number in range(7):
        files: dict[str, object] = {}
        for key in range(draw.randint(0, 5)):
            expected.append((f"{number}-{key}", draw.randint(1, 50)))
            files[f"{number}-{key}.json"] = ONE
            files[f"{number}-{key}.png"] = png_bytes(expected[-1][1], 3)
        pack(tmp_path / f"{number:03}.tar", files)
    store = records_of(tmp_path)
    assert [(record.id, record.images[0].size()[0]) for record in store] == expected
    for row in draw.sample(range(len(expected)), len(expected)):
        assert store[row].id == expected[row][0]
    assert [file.name for file in data_files(DataSource(name="x", path=str(tmp_path)))] == [
        f"{number:03}.tar" for number in range(7)
    ]
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"holds both 7 \.tar shards and parquet files"):
        records_of(tmp_path)


def as_shards(data_folder: Path, folder: Path) -> Path:
    """The records of `rows.json` as three shards whose order is that of the file."""
    rows = json.loads((data_folder / "rows.json").read_text())
    folder.mkdir()
    for number in range(3):
        files: dict[str, object] = {}
        for row in rows[number * 15 : (number + 1) * 15]:
            files[f"{row['id']}.json"] = row
            if "image" in row:
                files[f"{row['id']}.png"] = (data_folder / row["image"]).read_bytes()
        pack(folder / f"{number}.tar", files)
    return folder


@pytest.mark.slow
def test_training_on_shards_gives_the_bits_of_training_on_files(recipe_content, data_folder, tmp_path):
    recipe_content["stages"].pop("instruct")
    recipe_content.pop("evaluation")
    hashes = {}
    for name, path in (("files", data_folder / "rows.json"), ("shards", as_shards(data_folder, tmp_path / "tar"))):
        recipe_content["stages"]["projector"]["data"] = [{"name": "rows", "path": str(path)}]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe_content, sort_keys=False))
        assert main(["train", str(tmp_path / f"{name}.yaml"), "--output", str(tmp_path / name)]) == 0
        weights = sorted((tmp_path / name / "export").glob("*.safetensors"))
        hashes[name] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in weights]
    assert hashes["files"] == hashes["shards"] and hashes["files"]


def test_check_data_names_what_is_wrong_with_samples(tmp_path, capsys, base_folder):
    big = {"conversations": turns("<image>", "x" * (16 * 2**20))}
    shard = pack(
        tmp_path / "a.tar",
        {
            "good.json": ONE, "good.png": png_bytes(),
            "caption.png": png_bytes(1, 2), "caption.txt": b"an image without a record",
            "twice.json": ONE, "twice.JSON": ONE,
            "broken.json": b'{"conversations": [', "broken.png": png_bytes(2, 2),
            "list.json": b"[1]", "list.png": png_bytes(2, 3),
            "long.json": big, "long.png": png_bytes(2, 4),
            "corrupt.json": ONE, "corrupt.png": png_bytes(2, 5)[:45],
            "none.json": ONE,
            "more.json": ONE, "more.0.png": png_bytes(2, 6), "more.1.png": png_bytes(2, 7),
            "a/same.json": TWO, "a/same.png": png_bytes(9, 8), "a/same.PNG": png_bytes(9, 9),
            "both.json": {**ONE, "image": "both.png", "images": ["both.png"]}, "both.png": png_bytes(3, 9),
            "again.json": ONE, "again.png": png_bytes(),
        },
    )  # fmt: skip
    rejects = tmp_path / "rejects.jsonl"
    arguments = [str(shard), "--processor", str(base_folder), "--on-bad", "skip", "--rejects", str(rejects), "--json"]
    assert main(["check-data", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    found = {row["id"]: (row["reason"], row["detail"]) for row in map(json.loads, rejects.open())}
    reasons = {
        "a:1": "malformed_record", "a:2": "malformed_record", "a:3": "malformed_json", "a:4": "malformed_record",
        "a:5": "malformed_json", "corrupt": "corrupt_image", "none": "image_count_mismatch",
        "more": "image_count_mismatch", "a:10": "malformed_record", "again": "duplicate",
    }  # fmt: skip
    assert {name: reason for name, (reason, _) in found.items()} == reasons
    assert report["sources"][0]["usable"] == 12 - len(reasons)
    assert f"no .json in sample 'caption' of {shard} among 2 files ('caption.png', 'caption.txt')" in found["a:1"][1]


# hostile and broken shards


def raw_member(name: str = "0.json", size: bytes = b"00000000000\0", kind: bytes = b"0") -> bytes:
    """A ustar header with a checksum that holds."""
    header = bytearray(512)
    header[: len(name)] = name.encode()
    header[100:108], header[124:136], header[156:157] = b"0000644\0", size, kind
    header[257:265] = b"ustar\x0000"
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)


END = bytes(1024)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"no tar at all" * 100, "can't be read as a tar"),
        (gzip.compress(raw_member() + END, mtime=0), r"compressed \(gzip\) .*unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of Git LFS, not the data"),
        (b"<!DOCTYPE html><html>log in</html>" * 20, "is a web page, not the data"),
        (raw_member(), "breaks off at byte 512, without an end mark"),
        (raw_member(size=b"00000001000\0") + bytes(100), "unexpected end of data"),
        (raw_member(kind=b"2") + END, "'0.json' at byte 0 is not a regular file"),
        (raw_member(kind=b"3") + END, "is not a regular file"),
        (raw_member(kind=b"S") + END, "is not a regular file"),
        (raw_member() + b"\1" * 512 + END, "a damaged header, or data behind the end mark, at byte 512"),
        (raw_member() + END + raw_member() + END, "a damaged header, or data behind the end mark, at byte 512"),
        # a size below zero: Python before 3.11.14 goes round for ever
        (raw_member() + raw_member(size=b"\xff" * 11 + b"\x00") + END, "can't be read as a tar"),
        (raw_member(kind=b"x", size=b"\xff" * 10 + b"\xfe\x00") + raw_member() + END, "can't be read as a tar"),
        (raw_member(size=b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7) + END, "can't be read as a tar"),
        # a name of a gigabyte
        (raw_member(kind=b"L", size=b"10000000000\0") + bytes(2048), "a header of 1073741824 bytes"),
        (raw_member(kind=b"x", size=b"10000000000\0") + bytes(2048), "a header of 1073741824 bytes"),
        (raw_member(kind=b"L", size=b"00000000001\0") * 3000 + END, "can't be read as a tar"),
    ],
)
def test_a_broken_shard_is_one_line(tmp_path, content, message):
    shard = tmp_path / "a.tar"
    shard.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        records_of(shard)
    said = str(caught.value)
    assert said.startswith(f"{shard}: ") and "\n" not in said
    assert said.count(str(shard)) == said.count("(fix: ") == 1


def test_a_shard_without_samples_has_no_records(tmp_path):
    with pytest.raises(UserError, match="there are no records"):
        records_of(pack(tmp_path / "a.tar", {}))


def test_compressed_shards_are_not_guessed_at(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(END))
    with pytest.raises(UserError, match="the file is compressed"):
        records_of(tmp_path / "a.tar.gz")


def test_a_shard_that_changes_afterwards_spoils_a_record_and_no_more(tmp_path):
    shard = pack(tmp_path / "a.tar", {"0.json": ONE, "0.png": png_bytes(), "1.json": ONE, "1.png": png_bytes(9, 9)})
    store = records_of(shard)
    content = shard.read_bytes()
    shard.write_bytes(content[: content.rindex(b"1.png")])
    assert store[0].images
    with pytest.raises(RecordError, match="has become shorter"):
        store[1]
    shard.unlink()
    with pytest.raises(RecordError, match="No such file"):
        store[0]


def test_images_of_a_sample_are_bounded_before_they_are_read(tmp_path):
    """A sparse file of a shard: a terabyte by its header, nothing on the disk."""
    shard = tmp_path / "a.tar"
    record = json.dumps(ONE).encode()
    size = 2**40
    image = raw_member("0.png", size=b"\x80" + size.to_bytes(11, "big"))
    pack(shard, {"good.json": ONE, "good.png": png_bytes()})
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size - 10240 + 2048)
        file.write(raw_member("0.json", size=f"{len(record):011o}\0".encode()) + record.ljust(512, b"\0") + image)
        file.seek(size, io.SEEK_CUR)
        file.write(END)
    tracemalloc.start()
    with pytest.raises(RecordError, match=f"oversized_image: {size} bytes of images in sample '0'"):
        records_of(shard)[1]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22


WHOLE = {"0.json": ONE, "0.png": png_bytes(), "1.json": TWO, "1.0.png": png_bytes(1, 1), "1.1.png": png_bytes(2, 2)}


@settings(max_examples=300)
@given(
    changes=st.lists(st.tuples(st.integers(0, 19), st.integers(0, 511), st.integers(0, 255)), max_size=4),
    length=st.integers(0, 20 * 512),
)
@example(changes=[], length=20 * 512)
def test_a_damaged_shard_is_refused_or_read_and_never_shorter_in_silence(tmp_path, changes, length):
    shard = pack(tmp_path / "a.tar", WHOLE)
    content = bytearray(shard.read_bytes())
    assert len(content) == 20 * 512
    for block, offset, value in changes:
        content[512 * block + offset] = value
    del content[length:]
    shard.write_bytes(content)
    started = time.monotonic()
    try:
        rows = TarRows([shard])
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert sum(len(rows._members(row)) for row in range(len(rows))) == len(WHOLE)
        for row in range(len(rows)):
            with suppress(RecordError):
                rows[row]
    assert time.monotonic() - started < 5


@pytest.mark.slow
def test_shards_of_many_files_are_indexed_in_little_memory(tmp_path):
    shard = tmp_path / "a.tar"
    record = json.dumps({"conversations": turns("Hi", "Hello")}).encode()
    with shard.open("wb") as file:
        for number in range(10_000):
            for suffix, body in (("json", record), ("txt", b"")):
                file.write(raw_member(f"{number:06}.{suffix}", size=f"{len(body):011o}\0".encode()))
                file.write(body.ljust(-(-len(body) // 512) * 512, b"\0"))
        file.write(END)
    tracemalloc.start()
    rows = TarRows([shard])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 10_000 and rows[9_999]["id"] == "009999"
    assert peak < 4 * 2**20
