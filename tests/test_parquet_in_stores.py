"""Parquet in object storage, read in place by row group: rows, splits and faults as from disk."""

import json
import os
import pickle
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from file_server import FAULTS, serving
from PIL import Image

from llava_llama31.trainer.data.batches.dataset import StageDataset
from llava_llama31.trainer.data.check.check import DataCheck, check_sources
from llava_llama31.trainer.data.shards.writing import write_shards
from llava_llama31.trainer.data.sources import dataset_rows, parquet_rows, remote_files
from llava_llama31.trainer.data.sources.records import open_records
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.schema import DataSource


NUM_ROWS = 21
needs_s3fs = pytest.mark.skipif(find_spec("s3fs") is None, reason="s3fs is not installed")


def png(i: int) -> bytes:
    file = pa.BufferOutputStream()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue().to_pybytes()


def row(i: int) -> dict:
    """With none, one or two images, an id or none, and columns that are not read."""
    images = [{"bytes": png(i + n), "path": f"{i}-{n}.png"} for n in range(i % 3)]
    turns = [{"from": "human", "value": "<image>\n" * len(images) + f"{i}?"}, {"from": "gpt", "value": f"number {i}"}]
    more = {
        "license": "mit",
        "score": i,
        "note": None if i % 2 else "odd",
        "embedding": np.random.default_rng(i).random(3000).tolist(),
    }
    return {"id": f"r{i}" if i % 5 else None, "images": images, "conversations": turns} | more


def parts(rows: list[dict], num_files: int) -> list[pa.Table]:
    table = pa.Table.from_pylist(rows)
    return [table.slice(i * len(rows) // num_files, len(rows) // num_files) for i in range(num_files)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`rows.parquet`, and below `set` the files of two splits."""
    folder = tmp_path_factory.mktemp("parquet")
    rows = [row(i) for i in range(NUM_ROWS)]
    options = {"row_group_size": 4, "write_page_checksum": True}
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", **options)
    (folder / "set" / "data").mkdir(parents=True)
    for split, own in (("train", rows[:15]), ("validation", rows[15:])):
        for i, table in enumerate(parts(own, 3)):
            pq.write_table(table, folder / "set" / "data" / f"{split}-{i:05}-of-00003.parquet", **options)
    (folder / "set" / "README.md").write_text("a card")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with serving() as files:
        yield files


@pytest.fixture
def store(server, folder, monkeypatch, tmp_path):
    """A server without faults that holds the files as they are on disk, and a cache of the test's own."""
    server.faults.clear()
    server.calls.clear()
    server.contents = {
        f"/bucket/{path.relative_to(folder)}": path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(remote_files, "FIRST_WAIT_S", 0.0)
    forget()
    yield server
    forget()


def forget() -> None:
    """As a new process begins."""
    remote_files._opened.cache_clear()
    remote_files._system_at.cache_clear()
    parquet_rows._listed.cache_clear()
    parquet_rows._footer.cache_clear()
    parquet_rows._view.cache_clear()


def source(path: object, **more) -> DataSource:
    return DataSource(name="rows", path=str(path), **more)


def content(given: DataSource) -> list[tuple]:
    """Everything that training takes of each row, and what is not read of it."""
    return [
        (one.id, one.messages, one.not_read, [image.encoded() for image in one.images]) for one in open_records(given)
    ]


def gets(store) -> list[str]:
    return [asked for method, _, asked in store.calls if method == "GET"]


@pytest.mark.parametrize("name", FAULTS)
def test_a_store_gives_the_rows_of_the_disk_under_faults(store, folder, name):
    store.faults = list(FAULTS[name])
    given = source(f"{store.url}/bucket/rows.parquet")
    expected = content(source(folder / "rows.parquet"))
    assert len(expected) == NUM_ROWS and content(given) == expected
    if (
        name == "none"
    ):  # the footer; of 6 row groups the columns that are read, then all, since some rows show no image
        assert len(gets(store)) <= 1 + 6 * 3
        store.calls.clear()
        forget()
        assert content(given) == expected and gets(store) == []  # from the cache


@needs_s3fs
@pytest.mark.parametrize(
    "split", ["train", "validation", "val[:50%]", "train[1:-2]+validation[3:]", "train[:10%]+train[90%:]", "all"]
)
def test_splits_and_slices_of_a_bucket_are_those_of_the_disk(store, folder, split):
    """Files of the Hub's layout, `-00000-of-00003`, with the rounding of `datasets`."""
    assert content(source("s3://bucket/set", split=split)) == content(source(folder / "set", split=split))


@needs_s3fs
def test_a_bucket_that_is_not_whole_is_refused_as_a_folder_is(store, folder):
    def refused(match: str, **more) -> None:
        forget()
        with pytest.raises(UserError, match=match):
            open_records(source("s3://bucket/set", **more))

    refused("there is no split 'test': the files' names say train, validation", split="test")
    store.contents["/bucket/set/data/x.tar"] = b""
    refused("the folder holds both 1 .tar shards and parquet files")
    del store.contents["/bucket/set/data/x.tar"]
    store.contents["/bucket/set/data/more.parquet.part"] = b""
    refused("the file is not complete")
    del store.contents["/bucket/set/data/more.parquet.part"]
    other = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([{"id": 7}]), other)
    whole = store.contents["/bucket/set/data/train-00001-of-00003.parquet"]
    store.contents["/bucket/set/data/train-00001-of-00003.parquet"] = other.getvalue().to_pybytes()
    refused("train-00001-of-00003.parquet: not all files have the columns 'conversations'")
    store.contents["/bucket/set/data/train-00001-of-00003.parquet"] = whole[:-1]
    refused("does not end as a parquet file does")
    del store.contents["/bucket/set/data/train-00001-of-00003.parquet"]
    refused("2 of 3 shards are there, the one called 00001-of-00003 is missing")


def test_columns_that_are_not_read_are_not_fetched(store, monkeypatch, tmp_path):
    monkeypatch.setattr(parquet_rows, "_GAP_BYTES", 0)
    rows = [row(i) for i in range(1, 13) if i % 3]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=4, use_dictionary=False)
    store.contents["/bucket/rows.parquet"] = (tmp_path / "rows.parquet").read_bytes()
    given = source(f"{store.url}/bucket/rows.parquet", where={"score": {"min": 2}})
    with pytest.raises(RecordError, match="filtered"):
        open_records(given)[0]
    given = source(f"{store.url}/bucket/rows.parquet")
    assert content(given) == content(source(tmp_path / "rows.parquet"))
    assert {"embedding", "license", "score"} <= set(content(given)[0][2])
    fetched = sum(int(end) - int(start) for start, end in (asked[6:].split("-") for asked in gets(store)))
    assert fetched < 130_000 < len(store.contents["/bucket/rows.parquet"])
    assert open_records(given).raw(3) == open_records(source(tmp_path / "rows.parquet")).raw(3)  # with all columns
    # shards are written with all columns too
    for name, path in (("here", tmp_path / "rows.parquet"), ("there", given.path)):
        write_shards(source(path), str(tmp_path / name))
    here, there = (sorted((tmp_path / name).glob("*.tar"))[0].read_bytes() for name in ("here", "there"))
    assert here == there


def test_a_column_that_matters_to_a_record_without_images_is_read(store, tmp_path):
    rows = [row(1), row(0) | {"license": "shown.png"}, row(2)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    store.contents["/bucket/rows.parquet"] = (tmp_path / "rows.parquet").read_bytes()
    for path in (tmp_path / "rows.parquet", f"{store.url}/bucket/rows.parquet"):
        with pytest.raises(RecordError, match="image_not_read: `license` gives an image"):
            open_records(source(path))[1]


def test_a_file_that_was_replaced_stops_the_run_and_is_not_the_one_it_was(store, folder):
    given = source(f"{store.url}/bucket/rows.parquet")
    check = DataCheck(num_workers=0, progress=False)
    before = check_sources([given], check).sources[0]
    forget()
    opened = open_records(given)
    remote_files._cache().limit = 0  # nothing is found there
    other = bytearray(store.contents["/bucket/rows.parquet"])
    other[40] ^= 1
    store.contents["/bucket/rows.parquet"] = bytes(other)
    with pytest.raises(UserError, match="was replaced since it was opened .*run again"):
        [opened[i] for i in range(NUM_ROWS)]
    forget()
    with pytest.raises(UserError, match="row group 0 can't be read"):  # by its pages' checksums
        check_sources([given], check)
    other[40] ^= 1
    pq.write_table(pa.Table.from_pylist([row(i) for i in range(NUM_ROWS)]), sink := pa.BufferOutputStream())
    store.contents["/bucket/rows.parquet"] = sink.getvalue().to_pybytes()
    forget()
    after = check_sources([given], check).sources[0]
    assert not after.cached and after.content != before.content and (after.rows == before.rows).all()


def test_row_groups_that_cannot_be_held_name_the_way_out(store, monkeypatch, tmp_path):
    given = source(f"{store.url}/bucket/rows.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(parquet_rows, "MAX_GROUP_BYTES", 100_000)
        with pytest.raises(
            UserError, match=r"row group 0 has .* bytes in 4 rows.* `llava-llama31 shards rows.parquet"
        ):
            open_records(given)
    # few bytes, since a dictionary stands for them
    same = [row(1) | {"embedding": None, "note": "x" * 10_000} for _ in range(1000)]
    pq.write_table(pa.Table.from_pylist(same), tmp_path / "same.parquet", row_group_size=1000)
    store.contents["/bucket/rows.parquet"] = (tmp_path / "same.parquet").read_bytes()
    forget()
    monkeypatch.setattr(parquet_rows, "MAX_GROUP_BYTES", 2_000_000)
    with pytest.raises(UserError, match="row group 0 unpacks to more than 4,000,000 bytes"):
        open_records(given).raw(0)


def test_check_and_samples_are_those_of_the_disk_with_and_without_a_cache(store, folder, processor, monkeypatch):
    here, there = source(folder / "rows.parquet"), source(f"{store.url}/bucket/rows.parquet")
    check = DataCheck(processor=processor, num_workers=0, progress=False)
    local, remote = (check_sources([given], check).sources[0] for given in (here, there))
    assert (local.rows == remote.rows).all() and local.not_read == remote.not_read
    assert all((local.counts[name] == remote.counts[name]).all() for name in local.counts)
    order = [5, 1, 20, 7, 8, 2]
    expected = StageDataset([open_records(here)], [(0, i) for i in range(NUM_ROWS)], processor).__getitems__(order)
    for gigabytes in ("1", "0"):
        monkeypatch.setenv(remote_files.CACHE_VARIABLE, gigabytes)
        opened = pickle.loads(pickle.dumps(open_records(there)))  # as a worker gets it
        found = StageDataset([opened], [(0, i) for i in range(NUM_ROWS)], processor).__getitems__(order)
        for one, other in zip(found, expected, strict=True):
            assert one.input_ids == other.input_ids and one.labels == other.labels and one.images == other.images
            assert (one.pixel_values is None) == (other.pixel_values is None)
            assert one.pixel_values is None or (one.pixel_values == other.pixel_values).all()


def test_forked_workers_read_by_themselves(store, folder):
    opened = open_records(source(f"{store.url}/bucket/rows.parquet"))
    expected = [one.messages for one in open_records(source(folder / "rows.parquet"))]
    assert opened[0].messages == expected[0]
    if not (pid := os.fork()):
        os._exit(0 if [opened[i].messages for i in range(NUM_ROWS)] == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert opened[20].messages == expected[20]


def test_a_damaged_or_removed_file_of_the_cache_is_fetched_again(store, folder, tmp_path):
    given = source(f"{store.url}/bucket/rows.parquet")
    expected = content(given)
    for damage in (lambda path: path.write_bytes(b"?"), Path.unlink):
        for path in (tmp_path / "cache" / "llava-llama31" / "remote").rglob("*"):
            if path.is_file():
                damage(path)
        forget()
        assert content(given) == expected


@pytest.mark.parametrize("split", ["train", "train[:40%]+validation"])
def test_parquet_that_has_no_room_unpacked_is_read_in_place(folder, monkeypatch, tmp_path, split):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "unpacked")
    given = source(folder / "set", split=split)
    usage = dataset_rows.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(dataset_rows.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        in_place = content(given)
        assert not list(tmp_path.rglob("*.arrow"))
        opened = open_records(given)
        file = folder / "set" / "data" / "train-00000-of-00003.parquet"
        os.utime(file, ns=(len(split), len(split)))
        monkeypatch.setenv(remote_files.CACHE_VARIABLE, "0")
        with pytest.raises(UserError, match="was changed since it was opened"):
            opened[0]
    assert content(given) == in_place and list(tmp_path.rglob("*.arrow"))
    with monkeypatch.context() as patch:  # it is there already
        patch.setattr(dataset_rows.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        assert dataset_rows.can_unpack(folder / "set", split)


def test_a_file_that_is_not_parquet_is_refused(store):
    store.contents["/bucket/not.parquet"] = json.dumps([1] * 100).encode()
    with pytest.raises(UserError, match="does not end as a parquet file does"):
        open_records(source(f"{store.url}/bucket/not.parquet"))
    with pytest.raises(UserError, match="there is no such file"):
        open_records(source(f"{store.url}/bucket/none.parquet"))
