"""Shards with an index and object storage: rows, order and batches of the source on disk, under faults too."""

import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from file_server import FAULTS, serving
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from llava_llama31.trainer.chat.conversation import Conversation
from llava_llama31.trainer.checkpoint.atomic_folders import remove
from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.data.batches.dataset import StageDataset
from llava_llama31.trainer.data.check.check import DataCheck, check_sources
from llava_llama31.trainer.data.shards.writing import write_shards
from llava_llama31.trainer.data.sources import remote_files
from llava_llama31.trainer.data.sources.images import image_at
from llava_llama31.trainer.data.sources.records import open_records
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.data.sources.tar_rows import TarRows
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.questions import load_questions
from llava_llama31.trainer.evaluation.task_files import load_task
from llava_llama31.trainer.evaluation.task_questions import load_task_questions
from llava_llama31.trainer.recipes.schema import DataSource


NUM_ROWS = 23
TEXT = {"type": "text", "text": "what?"}


def record(i: int, num_images: int) -> dict:
    text = "<image>\n" * num_images + f"what is in {i}?"
    images = [f"{i}-{n}.png" for n in range(num_images)]
    row = {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": f"number {i}"}], "note": i}
    if i % 5:
        row["id"] = f"r{i}"
    return row | ({"image": images[0]} if num_images == 1 else {"image": images} if images else {})


@pytest.fixture(scope="module")
def rows_folder(tmp_path_factory) -> Path:
    """JSON rows with none, one or two images."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [record(i, i % 3) for i in range(NUM_ROWS)]
    for i in range(NUM_ROWS):
        for n in range(i % 3):
            pixels = np.random.default_rng([i, n]).integers(0, 256, (20 + i, 30 + n, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}-{n}.png")
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def sharded(rows_folder, tmp_path_factory) -> Path:
    to = tmp_path_factory.mktemp("sharded")
    assert main(["shards", str(rows_folder / "rows.json"), "--to", str(to), "--shards", "4", "--json"]) == 0
    return to / "rows"


@pytest.fixture(scope="module")
def server(sharded, rows_folder):
    with serving() as files:
        for path in sharded.iterdir():
            files.contents[f"/bucket/rows/{path.name}"] = path.read_bytes()
        for path in rows_folder.iterdir():
            files.contents[f"/bucket/plain/{path.name}"] = path.read_bytes()
        yield files


@pytest.fixture
def store_server(server, monkeypatch, tmp_path):
    """The server without faults, and a cache of the test's own."""
    server.faults.clear()
    server.calls.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote_files, "FIRST_WAIT_S", 0.0)
    remote_files._opened.cache_clear()
    remote_files._system_at.cache_clear()
    yield server
    remote_files._opened.cache_clear()
    remote_files._system_at.cache_clear()


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def source(path: object, **more) -> DataSource:
    return DataSource(name="rows", path=str(path), **more)


def content(given: DataSource) -> list[tuple]:
    """Everything that training takes of each row."""
    return [
        (one.id, one.messages, one.not_read, [image.encoded() for image in one.images]) for one in open_records(given)
    ]


def test_shards_are_balanced_and_hold_the_rows_in_their_order(rows_folder, sharded):
    index = json.loads((sharded / "index.json").read_text())
    assert [shard["rows"] for shard in index["shards"]] == [5, 6, 6, 6] and index["rows"] == NUM_ROWS
    assert content(source(sharded)) == content(source(rows_folder / "rows.json"))
    # any reader of WebDataset sees the same, as does ours without the index
    plain = TarRows(sorted(sharded.glob("*.tar")))
    assert [plain[i] for i in range(NUM_ROWS)] == [open_records(source(sharded)).raw(i) for i in range(NUM_ROWS)]
    with tarfile.open(sharded / "shard-00001-of-00004.tar") as tar:
        assert tar.getnames()[:2] == ["000000005.json", "000000005.0.png"]
    copy = pickle.loads(pickle.dumps(open_records(source(sharded))))  # as a worker gets it
    assert copy[7].messages == open_records(source(sharded))[7].messages


def test_parquet_and_parts_become_shards_too(rows_folder, tmp_path):
    images = [(rows_folder / f"{i}-0.png").read_bytes() for i in (1, 2)]
    rows = [
        {"images": [{"bytes": images[0], "path": None}], "texts": [{"user": "a?", "assistant": "b"}], "score": 3},
        {"images": [{"bytes": data, "path": None} for data in images], "texts": [{"user": "c?", "assistant": "d"}] * 2}
        | {"score": 1},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "fine.parquet")
    talk = [{"type": "image", "image": str(rows_folder / "1-0.png")}, {"type": "text", "text": "what <image>?"}]
    turns = [{"role": "user", "content": talk[:1] + [{"type": "text", "text": "what?"}]}]
    (tmp_path / "parts.jsonl").write_text(json.dumps({"messages": [*turns, {"role": "assistant", "content": "it"}]}))
    command = ["shards", str(tmp_path / "fine.parquet"), str(tmp_path / "parts.jsonl"), "--to", str(tmp_path / "out")]
    assert main([*command, "--image-root", "/"]) == 0
    for name, file in (("fine", "fine.parquet"), ("parts", "parts.jsonl")):
        before, after = content(source(tmp_path / file, image_root="/")), content(source(tmp_path / "out" / name))
        assert [row[1:2] + row[3:] for row in before] == [row[1:2] + row[3:] for row in after]
    filtered = open_records(source(tmp_path / "out" / "fine", where={"score": {"min": 2}}))
    assert filtered[0].messages and pytest.raises(RecordError, filtered.__getitem__, 1)


def test_numbered_image_parts_show_the_same_images_from_shards(rows_folder, tmp_path):
    images = ["1-0.png", "2-0.png"]
    rows = [
        {
            "images": images,
            "messages": [
                {"role": "user", "content": [*({"type": "image", "index": n} for n in numbers), TEXT]},
                {"role": "assistant", "content": "it"},
            ],
        }
        for numbers in ((0, 1), (1, 0), (1, 0, 1))
    ]
    (tmp_path / "numbered.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = source(tmp_path / "numbered.jsonl", image_root=str(rows_folder))
    write_shards(given, str(tmp_path / "out"))
    before, after = content(given), content(source(tmp_path / "out"))
    assert [row[1] for row in before] == [row[1] for row in after]
    assert [row[3] for row in before] == [row[3] for row in after] and before[0][3] == before[1][3][::-1]


def test_one_name_for_two_folders_of_images_is_refused(rows_folder, tmp_path, capsys):
    rows = {"name": "rows", "path": str(rows_folder / "rows.json")}
    stage = {"trainable": ["multi_modal_projector"], "learning_rate": 0.1, "global_batch": 8, "epochs": 1}
    stages = {
        name: {**stage, "data": [rows | {"image_root": str(root)}]}
        for name, root in (("a", rows_folder), ("b", tmp_path))
    }
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"name": "mine", "model": {"checkpoint": "base"}, "stages": stages}))
    assert main(["shards", str(recipe), "--to", str(tmp_path / "out")]) == 2
    assert "two sources are called rows and would share one folder" in capsys.readouterr().err


def test_files_of_a_sample_that_are_not_written_are_counted(tmp_path, caplog):
    talk = {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("0.json", json.dumps(talk)), ("0.txt", "x"), ("1.json", json.dumps(talk)), ("1.txt", "x")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data.encode()))
    write_shards(source(tmp_path / "a.tar"), str(tmp_path / "out"))
    assert f"{tmp_path / 'a.tar'}: not written: *.txt of 2 rows" in caplog.messages


def test_bad_rows_stop_the_writing_or_are_listed_and_an_index_is_not_overwritten(rows_folder, tmp_path, capsys):
    rows = [record(0, 0), record(1, 1) | {"image": "gone.png"}, {"id": "x"}, record(2, 0)]
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    command = ["shards", str(tmp_path / "bad.json"), "--to", str(tmp_path / "out"), "--shards", "2"]
    assert main(command) == 2 and "row 1 (r1) can't be written: missing_image" in capsys.readouterr().err
    assert not (tmp_path / "out" / "bad" / "index.json").exists()
    assert main([*command, "--on-bad", "skip"]) == 0
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad" / "rejects.jsonl").read_text().splitlines()]
    assert [(one["row"], one["reason"]) for one in listed] == [(1, "missing_image"), (2, "malformed_record")]
    assert [one[1][1]["content"][0]["text"] for one in content(source(tmp_path / "out" / "bad"))] == [
        "number 0",
        "number 2",
    ]
    assert main(command) == 2 and "an index of shards already exists here" in capsys.readouterr().err


def test_damage_is_found_when_it_is_read_or_before(sharded, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(sharded, own)
    shard = own / "shard-00002-of-00004.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1  # in the first record
    shard.write_bytes(data)
    store = open_records(source(own))
    assert store[0].messages
    with pytest.raises(RecordError, match="corrupt_image: 000000011.json of shard-00002-of-00004.tar is not what was"):
        store[11]
    shard.write_bytes(data[:-512])
    with pytest.raises(UserError, match="bytes long"):
        open_records(source(own))
    shard.unlink()
    with pytest.raises(UserError, match="is missing"):
        open_records(source(own))


@pytest.mark.parametrize("name", FAULTS)
def test_a_store_gives_the_rows_of_the_disk_under_faults(store_server, rows_folder, name):
    store_server.faults = list(FAULTS[name])
    expected = content(source(rows_folder / "rows.json"))
    assert content(source(f"{store_server.url}/bucket/rows")) == expected
    if name == "none":  # index, its two arrays, and one range a row; the probe for the format reads the first again
        gets = [call for call in store_server.calls if call[0] == "GET"]
        assert len(gets) == 3 + NUM_ROWS
        num_calls = len(gets)
        assert content(source(f"{store_server.url}/bucket/rows")) == expected  # from the cache
        assert len([call for call in store_server.calls if call[0] == "GET"]) == num_calls


def test_a_process_that_imports_no_more_reads_from_a_store(store_server):
    """`fsspec.asyn` was there only where datasets or a test had imported it."""
    script = (
        "from llava_llama31.trainer.data.sources.records import open_records\n"
        "from llava_llama31.trainer.recipes.schema import DataSource\n"
        f"print(len(open_records(DataSource(name='rows', path='{store_server.url}/bucket/rows'))))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == (f"{NUM_ROWS}\n", "")


@pytest.mark.parametrize("name", ["none", "cut", "429 and 503"])
def test_json_and_an_image_root_in_a_store(store_server, rows_folder, name):
    store_server.faults = list(FAULTS[name])
    url = f"{store_server.url}/bucket/plain"
    expected = content(source(rows_folder / "rows.json"))
    assert content(source(f"{url}/rows.json")) == expected
    assert content(source(rows_folder / "rows.json", image_root=url)) == expected


def test_what_a_store_lacks_or_refuses_is_said(store_server, tmp_path):
    url = store_server.url
    with pytest.raises(UserError, match=r"^[^ ]*/bucket/plain: there is no index.json .fix: write the shards again"):
        open_records(source(f"{url}/bucket/plain"))
    with pytest.raises(UserError, match="there is no such file"):
        open_records(source(f"{url}/bucket/none.json"))
    for name, reason in (("some.tar", "reading all of it"), ("a.csv", "as JSON, as parquet, or as a folder")):
        with pytest.raises(UserError, match=rf"{reason}.*download it, and write it with `llava-llama31 shards"):
            open_records(source(f"{url}/bucket/{name}"))
    store_server.faults = [403]
    with pytest.raises(UserError, match="the server answers 403 .*in the environment"):
        open_records(source(f"{url}/bucket/rows"))
    store_server.faults = [503] * 50
    with pytest.raises(UserError, match="after 6 attempts"):
        open_records(source(f"{url}/bucket/plain/rows.json"))
    store_server.faults = []
    row = {"id": "a", "image": "../secret.png", "conversations": record(1, 1)["conversations"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"image": "gone.png"}))
    given = source(tmp_path / "rows.jsonl", image_root=f"{url}/bucket/plain")
    (report,) = check_sources([given], DataCheck(num_workers=0, progress=False)).sources
    assert report.dropped == {"image_outside_root": 1, "missing_image": 1}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (404, "missing_image: no file .*/plain/a%20b.png$"),
        (400, "the server answers 400 .fix: correct the URL, or give credentials"),
        (401, "the server answers 401 .fix: give credentials in the environment"),
        (429, "after 6 attempts: the server answers 429 Too Many Requests .fix: check the connection"),
        ("cut:10", "after 6 attempts: the connection ended before the file did .fix: check the connection"),
        ("short:5", r"after 6 attempts: \d+ of \d+ bytes arrived .fix: check the connection"),
    ],
)
def test_a_fault_at_an_images_url_is_said_in_words(store_server, make_image, fault, said):
    store_server.contents["/bucket/plain/a b.png"] = png(make_image(9, 9))
    image = image_at("a b.png", f"{store_server.url}/bucket/plain")
    assert image.open().size == (9, 9)
    store_server.faults = [fault] * 9
    remote_files._cache().folder = Path("/none")
    with pytest.raises((UserError, RecordError), match=said):
        image.open()


@pytest.mark.parametrize("name", ["a#b.png", "a?b.png", "a%20b.png", "50%.png", "[1].png", "{x}::y.png", "é&+=.png"])
def test_a_name_below_a_url_is_a_name(store_server, make_image, name):
    """Asked for as it stands, `a?b.png` is `a` and `a%20b.png` is `a b.png`, so another image would be shown."""
    shown, other = make_image(9, 9), make_image(7, 7)
    for path in ("a", "a b.png"):
        store_server.contents[f"/bucket/plain/{path}"] = png(other)
    store_server.contents[f"/bucket/plain/{name}"] = png(shown)
    assert image_at(name, f"{store_server.url}/bucket/plain").open().size == (9, 9)


def test_errors_of_a_stores_own_library_are_the_users(store_server, monkeypatch):
    """botocore, httpx and Google's libraries raise errors that are not an OSError."""

    class Refusal(Exception):
        pass

    def refuse(url):
        raise Refusal("of https://me:secret@host/k?X-Amz-Signature=secret")

    monkeypatch.setattr(remote_files, "_system", refuse)
    with pytest.raises(
        UserError, match="s3://b/k: can't be read after 6 attempts: Refusal: of .* credentials"
    ) as raised:
        remote_files.open_remote("s3://b/k")
    assert "secret" not in str(raised.value)
    with pytest.raises(UserError, match="http:///k: this is not a URL"):
        monkeypatch.undo()
        remote_files.open_remote("http:///k")


@pytest.mark.parametrize("given", ["s3://b/rows", "HTTP://host/rows", "file:///rows", "ftp://host/rows"])
def test_a_url_where_a_path_is_wanted_is_named_and_not_made_one(rows_folder, tmp_path, given):
    """A `Path` of it is a relative path, which is then missing."""
    (tmp_path / "q.jsonl").write_text("{}")
    doors = [
        lambda: load_questions(given),
        lambda: load_questions(tmp_path / "q.jsonl", image_root=given),
        lambda: load_task_questions(load_task("pope"), given),
        lambda: Conversation.add_image(None, given),
    ]
    if given[0] == "f":
        doors += [
            lambda: open_records(source(given)),
            lambda: open_records(source(rows_folder / "rows.json", image_root=given)),
        ]
    for door in doors:
        with pytest.raises(UserError, match=rf"^{given}: .* .fix: (leave out file://|download it)"):
            door()


def test_bytes_that_are_not_those_that_were_written_are_refused(store_server):
    """A shard that was replaced by one of the same length."""
    path = "/bucket/rows/shard-00000-of-00004.tar"
    before = store_server.contents[path]
    store_server.contents[path] = before[:600] + b"?" + before[601:]
    try:
        with pytest.raises(RecordError, match="corrupt_image: 000000000.json of shard-00000"):
            open_records(source(f"{store_server.url}/bucket/rows", format="llava"))[0]
    finally:
        store_server.contents[path] = before


def test_check_batches_and_content_are_those_of_the_disk(store_server, sharded, processor):
    """Same report, same digest of the content (so a run moves between disk and store), same samples, read ahead."""
    there = source(f"{store_server.url}/bucket/rows")
    check = DataCheck(processor=processor, num_workers=0, progress=False)
    local, remote = (check_sources([given], check).sources[0] for given in (source(sharded), there))
    assert (local.rows == remote.rows).all() and local.content == remote.content
    assert all((local.counts[name] == remote.counts[name]).all() for name in local.counts)
    order = [5, 1, 22, 7, 8, 2]
    places = [(0, row) for row in range(NUM_ROWS)]
    samples = [
        StageDataset([open_records(given)], places, processor).__getitems__(order)
        for given in (source(sharded), there)
    ]
    for one, other in zip(*samples, strict=True):
        assert (one.record_id, one.input_ids, one.labels) == (other.record_id, other.input_ids, other.labels)
        assert (one.pixel_values is None) == (other.pixel_values is None)
        assert one.pixel_values is None or bool((one.pixel_values == other.pixel_values).all())


def test_forked_workers_read_by_themselves(store_server, rows_folder):
    store = open_records(source(f"{store_server.url}/bucket/rows"))
    expected = [one.messages for one in open_records(source(rows_folder / "rows.json"))]
    pid = os.fork()
    if not pid:
        os._exit(0 if [store[row].messages for row in range(NUM_ROWS)] == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert store[3].messages == expected[3]


def test_the_cache_stays_within_its_limit_and_can_be_left_out(store_server, monkeypatch, tmp_path):
    folder = tmp_path / "cache" / "llava-llama31" / "remote"
    cache = remote_files._RangeCache(folder, 100_000)
    for i in range(200):
        cache.store(f"key{i}", bytes(2000))
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    assert 50_000 < sum(sizes) <= 100_000 + 100_000 // 16
    assert cache.load("key199") == bytes(2000) and cache.load("key0") is None
    monkeypatch.setenv("LLAVA_LLAMA31_REMOTE_CACHE_GB", "0")
    url = f"{store_server.url}/bucket/plain/rows.json"
    for _ in range(2):
        remote_files.open_remote(url).read(0, 100)
    assert len([call for call in store_server.calls if call[0] == "GET"]) == 2
    monkeypatch.setenv("LLAVA_LLAMA31_REMOTE_CACHE_GB", "lots")
    with pytest.raises(UserError, match="'lots' is not a number"):
        remote_files.open_remote(url).read(0, 100)


@pytest.mark.skipif(find_spec("s3fs") is None, reason="s3fs is not installed")
def test_a_bucket_gives_the_rows_of_the_disk_under_faults(store_server, rows_folder, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", store_server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    expected = content(source(rows_folder / "rows.json"))
    assert content(source("s3://bucket/rows")) == expected
    assert any(path == "/bucket/rows/index.json" for _, path, _ in store_server.calls)
    store_server.faults = [503, "cut:100", 500]
    assert content(source("s3://bucket/plain/rows.json")) == expected


@pytest.mark.parametrize("scheme, folder", [("gs", "bucket/rows"), ("hf", "datasets/me/set@main/rows")])
def test_other_stores_give_the_rows_of_the_disk(monkeypatch, tmp_path, sharded, rows_folder, scheme, folder):
    """Their URLs through fsspec's own door, to a file system in memory."""
    from fsspec.registry import _registry

    class Stub(MemoryFileSystem):
        protocol = scheme
        store: ClassVar[dict] = {}
        pseudo_dirs: ClassVar[list] = [""]
        reads: ClassVar[list] = []

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.removeprefix(f"{scheme}://").strip("/")

        def cat_file(self, path, start=None, end=None, **kwargs):
            self.reads.append((path, start, end))
            return super().cat_file(path, start, end, **kwargs)

    monkeypatch.setitem(_registry, scheme, Stub)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote_files._opened.cache_clear()
    remote_files._system_at.cache_clear()
    for path in (*sharded.iterdir(), rows_folder / "rows.json"):
        Stub().pipe_file(f"/{folder}/{path.name}", path.read_bytes())
    there = open_records(source(f"{scheme}://{folder}"))
    there.prefetch([0, 7, 22])
    shards = [(start, end) for path, start, end in Stub.reads if path.endswith(".tar")]
    assert len(shards) == 3 and all(end - start < 10_000 for start, end in shards)
    assert content(source(f"{scheme}://{folder}")) == content(source(sharded))
    assert len(open_records(source(f"{scheme}://{folder}/rows.json"))) == NUM_ROWS
    with pytest.raises(UserError, match="there is no such file"):
        open_records(source(f"{scheme}://{folder}/none.json"))
    remote_files._opened.cache_clear()
    remote_files._system_at.cache_clear()


def test_a_store_without_its_package_names_it(monkeypatch):
    import fsspec

    def absent(url):
        raise ImportError("Install gcsfs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    remote_files._opened.cache_clear()
    remote_files._system_at.cache_clear()
    with pytest.raises(UserError, match="gs:// is read by gcsfs, which is not installed .fix: pip install gcsfs"):
        open_records(source("gs://bucket/rows"))


def test_shards_are_written_to_a_store(rows_folder, tmp_path):
    """Through fsspec's memory, which is no store of ours, so by the writer alone."""
    from llava_llama31.trainer.data.shards import writing

    class Memory(writing._Place):
        def __init__(self, to):
            super().__init__(to)
            self._folder = None

        def _system(self):
            import fsspec

            return fsspec.core.url_to_fs(self._to.replace("s3://", "memory://"))

    original, writing._Place = writing._Place, Memory
    try:
        written = writing.write_shards(source(rows_folder / "rows.json"), "s3://out/rows", num_shards=2)
    finally:
        writing._Place = original
    import fsspec

    system = fsspec.filesystem("memory")
    names = sorted(Path(path).name for path in system.ls("/out/rows", detail=False))
    assert written.shards == 2 and {"index.json", "shard-00000-of-00002.tar"} <= set(names)
    with tarfile.open(fileobj=io.BytesIO(system.cat_file("/out/rows/shard-00000-of-00002.tar"))) as tar:
        assert tar.getnames()[0] == "000000000.json"


@pytest.mark.torture
@pytest.mark.parametrize("kind", ["shards", "parquet"])
def test_training_from_a_store_gives_the_bits_of_the_disk_and_resumes_to_them(
    recipe_content, data_folder, store_server, tmp_path, kind
):
    """From files on disk, from the store under faults, and from the store resumed from an earlier checkpoint."""
    place, url = tmp_path / "out" / "rows", f"{store_server.url}/bucket/train"
    if kind == "shards":
        assert main(["shards", str(data_folder / "rows.json"), "--to", str(tmp_path / "out"), "--shards", "3"]) == 0
    else:
        place.mkdir(parents=True)
        rows = [
            open_records(source(data_folder / "rows.json"))[i]
            for i in range(len(json.loads((data_folder / "rows.json").read_text())))
        ]
        table = [
            {"images": [{"bytes": image.encoded()} for image in row.images], "messages": row.messages} for row in rows
        ]
        pq.write_table(pa.Table.from_pylist(table), place / "rows.parquet", row_group_size=3)
        place, url = place / "rows.parquet", f"{url}/rows.parquet"
    for path in (tmp_path / "out" / "rows").iterdir():
        store_server.contents[f"/bucket/train/{path.name}"] = path.read_bytes()
    recipe_content["stages"].pop("instruct")
    recipe_content.pop("evaluation")
    hashes = {}
    for name, path in (("disk", str(place)), ("store", url)):
        recipe_content["stages"]["projector"]["data"] = [{"name": "rows", "path": path}]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe_content, sort_keys=False))
        store_server.faults = [503, "cut:200", 429, "short:30"]
        command = ["train", str(tmp_path / f"{name}.yaml"), "--output", str(tmp_path / name)]
        assert main(command) == 0
        hashes[name] = digests(tmp_path / name)
    assert hashes["disk"] and hashes["disk"] == hashes["store"]
    run = RunFolder(tmp_path / "store")
    stage = run.stage("projector", {"projector": None})
    kept, *_ = sorted(stage.path.glob("checkpoint-*"))
    for path in [run.summary, run.export, *stage.path.iterdir()]:
        if path != kept:
            remove(path)
    assert main(command) == 0 and digests(tmp_path / "store") == hashes["disk"]


def digests(run: Path) -> list[str]:
    weights = sorted((run / "export").glob("*.safetensors"))
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in weights]


@pytest.mark.parametrize("status", [0, 503, 404])
def test_a_server_that_does_not_answer_is_not_a_missing_file(tmp_path, monkeypatch, status):
    """An image that is taken for missing would be dropped under `on_bad_record: skip`."""
    monkeypatch.setattr(remote_files, "FIRST_WAIT_S", 0.0)

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(status)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        url = f"http://127.0.0.1:{server.server_port}/gone.jpg"
        if status:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        else:
            server.server_close()  # refuses connections
        with pytest.raises(UserError) as caught:
            remote_files.open_remote(url)
        if status:
            server.shutdown()
    assert isinstance(caught.value, remote_files.Missing) == (status == 404)
    assert status == 404 or "after 6 attempts" in str(caught.value)
