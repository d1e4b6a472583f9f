"""Which files a folder or a name is read from: all of them, or a refusal that names one."""

import gzip
import io
import json
import logging
import os
import string
import tarfile
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_llama31.trainer.data.sources.records import data_files, open_records
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.questions import load_questions
from llava_llama31.trainer.recipes.schema import DataSource


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


TURNS = [{"user": "q", "assistant": "a"}]


def parquet(path: Path, *ids: str, **columns: list) -> Path:
    """A parquet file of text records with these ids, and further columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"id": list(ids), "texts": [TURNS] * len(ids), **columns}), path)
    return path


def shard(path: Path, *ids: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in ids:
            data = json.dumps({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]})
            member = tarfile.TarInfo(f"{name}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data.encode()))
    return path


def source(path: Path, split: str = "train") -> DataSource:
    return DataSource(name="x", path=str(path), split=split)


def ids(path: Path, split: str = "train") -> list[str]:
    return [record.id for record in open_records(source(path, split))]


def refusal(path: Path, split: str = "train") -> str:
    """The one line with which both the reader and the fingerprint's list of files refuse a path."""
    said = []
    for call in (open_records, data_files):
        with pytest.raises(UserError) as caught:
            call(source(path, split))
        said.append(str(caught.value))
    assert said[0] == said[1] and "\n" not in said[0] and "(fix: " in said[0]
    return said[0]


# --- splits in file names

SPLITS = {
    "words of no other split": (["chartqa", "docvqa", "llava-train-mix"], {"train": "chartqa docvqa llava-train-mix"}),
    "the Hub's shards": (
        ["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"],
        {"train": "train-00000-of-00002 train-00001-of-00002", "validation": "validation-00000-of-00001"},
    ),
    "two sets": (["chartqa-train", "chartqa_test", "docvqa-train"], {"train": "chartqa-train docvqa-train"}),
    "words in one": (["trainData", "myTestSet"], {"train": "trainData", "test": "myTestSet"}),
    "other words": (["val2014", "training_0", "dev.1"], {"validation": "dev.1 val2014", "train": "training_0"}),
    "folders": (["train/0000", "train/0001", "test/0000"], {"train": "train/0000 train/0001", "test": "test/0000"}),
    "a split of any name": (
        ["data/testmini-00000-of-00001", "data/test-00000-of-00001"],
        {"testmini": "data/testmini-00000-of-00001", "test": "data/test-00000-of-00001"},
    ),
    "no number": (["0000", "0001"], {"train": "0000 0001", "all": "0000 0001"}),
    "train alone": (["train-0", "more"], {"train": "more train-0"}),
    "several": (["train-0", "test-0"], {"train+test": "train-0 test-0", "train[:1]": "train-0"}),
}


@pytest.mark.parametrize("case", SPLITS)
def test_every_file_of_a_split_is_read(tmp_path, case):
    names, expected = SPLITS[case]
    for name in names:
        parquet(tmp_path / f"{name}.parquet", name)
    for split, found in expected.items():
        assert ids(tmp_path, split) == found.split()
        files = {str(file.relative_to(tmp_path).with_suffix("")) for file in data_files(source(tmp_path, split))}
        assert files == {name for name in names if name in found.split()}


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (["my-test-set", "other"], "train", "other.parquet names no split, but my-test-set.parquet names test"),
        (["train-0", "test-0", "chartqa"], "train", "chartqa.parquet names no split, but "),
        (["train-0", "train-test-mix"], "train", "train-test-mix.parquet names test and train, but train-0.parquet"),
        (["test-0"], "train", "there is no split 'train': the files' names say test"),
        (["chartqa"], "validation", "there is no split 'validation'"),
        (["train-0"], "../train", "'../train' is not a split"),
    ],
)
def test_splits_that_are_not_clear_are_refused_by_name(tmp_path, names, split, message):
    for name in names:
        parquet(tmp_path / f"{name}.parquet", name)
    assert message in refusal(tmp_path, split)


# --- suffixes, and files that are no data


def test_suffixes_in_capitals_are_suffixes(tmp_path):
    shard(tmp_path / "tar" / "0.tar", "a")
    shard(tmp_path / "tar" / "sub" / "1.TAR", "b")
    parquet(tmp_path / "parquet" / "0.parquet", "c")
    parquet(tmp_path / "parquet" / "1.PARQUET", "d")
    (tmp_path / "DATA.JSON").write_text(json.dumps([{"id": "e", "texts": TURNS}]))
    assert ids(tmp_path / "tar") == ["a", "b"] and ids(tmp_path / "tar" / "sub" / "1.TAR") == ["b"]
    assert ids(tmp_path / "parquet") == ["c", "d"] and ids(tmp_path / "parquet" / "1.PARQUET") == ["d"]
    assert ids(tmp_path / "DATA.JSON") == ["e"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("1.tar.gz", "1.tar.gz: the file is compressed (fix: unpack it)"),
        ("1.TGZ", "1.TGZ: the file is compressed"),
        ("sub/1.tar.zst", "1.tar.zst: the file is compressed"),
        ("1.tar.part", "1.tar.part: the file is not complete"),
        ("1.parquet.incomplete", "1.parquet.incomplete: the file is not complete"),
        (".1.tar", ".1.tar: a hidden file that looks like data"),
        (".tar", ".tar: a hidden file that looks like data"),
        ("..parquet", "..parquet: a hidden file that looks like data"),
        ("1.arrow", "holds both 1 .tar shards and arrow files"),
    ],
)
def test_what_looks_like_data_and_is_not_read_is_named(tmp_path, name, message):
    shard(tmp_path / "0.tar", "a")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(gzip.compress(b"x"))
    assert message in refusal(tmp_path)


def test_a_folder_of_json_is_refused_by_its_files(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.json", "sub/B.JSONL"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(
        UserError, match=r"a folder of JSON is not read as a whole; it holds '.*a\.json', '.*B\.JSONL'"
    ):
        open_records(source(tmp_path))


def test_a_file_that_a_saved_data_set_does_not_name_is_refused(tmp_path, caplog):
    saved = datasets.Dataset.from_list([{"id": "a", "texts": TURNS}])
    saved.save_to_disk(tmp_path)
    (tmp_path / "cache-0123.arrow").write_bytes(b"")  # as `datasets` leaves beside it
    with caplog.at_level(logging.WARNING):
        assert ids(tmp_path) == ["a"] and not caplog.records
        (tmp_path / "more.jsonl").write_text("{}")
        assert ids(tmp_path) == ["a"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: its arrow files are read; not read: 'more.jsonl'"
    ]
    (tmp_path / "data-00001-of-00002.arrow").write_bytes((tmp_path / "data-00000-of-00001.arrow").read_bytes())
    with pytest.raises(UserError, match=r"data-00001-of-00002\.arrow: the file is not one of those that state\.json"):
        open_records(source(tmp_path))


def test_a_link_to_nothing_is_named_and_a_link_to_a_folder_is_followed(tmp_path):
    shard(tmp_path / "set" / "0.tar", "a")
    shard(tmp_path / "disk" / "1.tar", "b")
    (tmp_path / "set" / "more").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "round").symlink_to(tmp_path / "set")
    assert ids(tmp_path / "set") == ["a", "b"]
    (tmp_path / "set" / "2.tar").symlink_to(tmp_path / "none")
    assert "2.tar: points to no file" in refusal(tmp_path / "set")


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.tar.gz", "x.parquet.zst"])
def test_a_compressed_file_is_called_so(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"{}"))
    with pytest.raises(UserError, match="the file is compressed .fix: unpack it"):
        open_records(source(tmp_path / name))


def test_files_that_are_no_shards_may_lie_beside_them(tmp_path, caplog):
    parquet(tmp_path / "0000.parquet", "a")
    for name in ("LICENSE", "README.md", "images/a.png", "._0000.parquet", ".DS_Store", "__MACOSX/._0000.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    with caplog.at_level(logging.WARNING):
        assert ids(tmp_path) == ["a"] and not caplog.records
        (tmp_path / "notes.jsonl").write_text("{}")
        assert ids(tmp_path) == ["a"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: its parquet files are read; not read: 'notes.jsonl'"
    ]


# name: what it is in a folder
MIXED = {
    "a.parquet": "parquet",
    "B.PARQUET": "parquet",
    "sub/c.pq": "parquet",
    "d.tar": "tar",
    "sub/E.TAR": "tar",
    "f.tar.gz": "packed",
    "G.TGZ": "packed",
    "h.parquet.zst": "packed",
    "i.parquet.part": "packed",
    ".j.tar": "packed",
    "k.json": "beside",
    "L.JSONL": "beside",
    "sub/m.ndjson.gz": "beside",
    "n.csv": "beside",
    "u.feather": "beside",
    "V.TFRECORD": "beside",
    "w.parquet.bak": "beside",
    "x.zip": "beside",
    "o.tsv.zip": "beside",
    "p.jsonl.part": "beside",
    "LICENSE": "",
    "README.md": "",
    "q.png": "",
    "r.txt.gz": "",
    "y.parquet.sha256": "",
    ".z.parquet.crc": "",
    "._s.parquet": "",
    "sub/._t.tar": "",
}


@settings(max_examples=40)
@given(names=st.sets(st.sampled_from(sorted(MIXED)), min_size=1))
def test_a_folder_of_mixed_files_is_read_whole_or_refused_by_a_files_name(tmp_path_factory, caplog, names):
    folder = tmp_path_factory.mktemp("mixed")
    for name in names:
        make = {"parquet": parquet, "tar": shard}.get(MIXED[name])
        (folder / name).parent.mkdir(exist_ok=True)
        if make is None:
            (folder / name).write_bytes(b"\0")
        else:
            make(folder / name, name if make is parquet else "0")
    caplog.clear()
    kinds = {MIXED[name] for name in names}
    rows = {kind: sorted(name for name in names if MIXED[name] == kind) for kind in kinds}
    if "packed" in kinds or len(kinds & {"parquet", "tar"}) != 1:
        said = refusal(folder) if kinds & {"parquet", "tar", "packed"} else ""
        assert not said or any(name.rpartition("/")[2] in said for name in rows.get("packed", [])) or "both" in said
        with pytest.raises(UserError):
            open_records(source(folder))
        return
    with caplog.at_level(logging.WARNING):
        (kind,) = kinds & {"parquet", "tar"}
        assert sorted(ids(folder)) == (rows[kind] if kind == "parquet" else ["0"] * len(rows[kind]))
    told = " ".join(record.getMessage() for record in caplog.records)
    assert len(caplog.records) == ("beside" in kinds)
    assert sum(name in told for name in rows.get("beside", [])) == min(3, len(rows.get("beside", [])))


# --- shards that are missing

GAPS = {
    "in the midst": (["train-00000-of-00003", "train-00002-of-00003"], "2 of 3 .* 00001-of-00003 is missing"),
    "the last": (["part_0_of_2"], "1 of 2 .* 1-of-2 is missing"),
    "from one on": (["train-1-of-3", "train-3-of-3"], "2 of 3 .* 2-of-3 is missing"),
    "without separators": (["train_0of3", "train_2of3"], "2 of 3 .* 1-of-3 is missing"),
    "in brackets": (["train (1 of 3)", "train (3 of 3)"], "2 of 3 .* 2-of-3 is missing"),
    "a huge number": (["train-00000-of-99999999999"], "1 of 99999999999"),
    "two sets": (["train-0-of-1", "train-0-of-2", "train-1-of-2"], "train-0-of-2.* are shards of two sets"),
    "a shard twice": (["train-0-of-1-aaaa1111", "train-0-of-1-bbbb2222"], "are shards of two sets"),
}


@pytest.mark.parametrize("case", GAPS)
def test_missing_shards_are_named(tmp_path, case):
    names, message = GAPS[case]
    for name in names:
        parquet(tmp_path / "parquet" / f"{name}.parquet", name)
        shard(tmp_path / "tar" / f"{name}.tar", name)
    for folder in ("parquet", "tar"):
        with pytest.raises(UserError, match=message):
            open_records(source(tmp_path / folder))
    # a file that is named is what is wanted
    assert ids(tmp_path / "parquet" / f"{names[0]}.parquet") == [names[0]]
    assert ids(tmp_path / "tar" / f"{names[0]}.tar") == [names[0]]


def test_a_gap_in_another_split_does_not_matter(tmp_path):
    for name in ("train-1-of-2", "train-2-of-2", "test-00000-of-00009"):
        parquet(tmp_path / f"{name}.parquet", name)
    assert ids(tmp_path) == ["train-1-of-2", "train-2-of-2"]
    with pytest.raises(UserError, match="1 of 9 shards"):
        open_records(source(tmp_path, "test"))


# --- names are no patterns

NAMES = ["data[1].parquet", "what?.parquet", "d*.parquet", "{a,b}.parquet", "a b%20c#d.parquet"]


@pytest.mark.parametrize("name", NAMES)
def test_the_file_of_that_name_is_read_and_no_other(tmp_path, monkeypatch, name):
    for other in ("data1.parquet", "whats.parquet", "dog.parquet", "a.parquet", "b.parquet"):
        parquet(tmp_path / other, "wrong")
        parquet(tmp_path / Path(other).stem / "0.parquet", "wrong")
    right = parquet(tmp_path / name, "right")
    parquet(tmp_path / Path(name).stem / "sub" / name, "right")
    assert ids(right) == ids(tmp_path / Path(name).stem) == ["right"]
    assert data_files(source(right)) == [right]
    monkeypatch.chdir(tmp_path)
    assert ids(Path(name)) == ["right"]
    right.unlink()
    with pytest.raises(UserError, match="does not exist"):
        open_records(source(right))


# besides what is printable: what shells, globs, URLs and terminals take for something else
PIECES = [
    *(string.punctuation + string.whitespace).replace("/", ""),
    "::",
    "**",
    "%20",
    "$HOME",
    "{a,b}",
    "s3:",
    "é",
    "e\u0301",
    "😀",
]
PIECES += ["\u202e", "\x1b[2J", "\x7f", "\udcff"]
SHAPES = ("{}b", "a{}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "tar", "parquet", "folder of parquet", "save_to_disk"])
def test_a_path_of_any_name_is_read_or_refused_by_that_name(tmp_path, kind):
    suffix = kind.rpartition(" ")[2]
    sample = tmp_path / f"sample.{suffix}"
    if suffix == "jsonl":
        sample.write_text(json.dumps({"id": "right", "texts": TURNS}))
    elif suffix == "save_to_disk":
        datasets.Dataset.from_list([{"id": "right", "texts": TURNS}]).save_to_disk(sample)
    else:
        (shard if suffix == "tar" else parquet)(sample, "right")
    refused = set()
    for number, piece in enumerate(PIECES):
        for shape in SHAPES:
            path = tmp_path / str(number) / f"{shape.format(piece)}{'' if ' ' in kind else f'.{suffix}'}"
            path.parent.mkdir(exist_ok=True)
            if " " in kind:
                path.mkdir()
            link = os.symlink if sample.is_dir() else os.link
            link(sample, path / f"0{piece}.parquet" if " " in kind else path)
            try:
                assert ids(path) == ["right"] and data_files(source(path)), path
            except UserError as error:
                assert path.name in str(error) and "rename it" in str(error)
                refused.add(piece)
    by_datasets = {"::", "\udcff"} | ({"$HOME"} if "parquet" in kind else set())
    assert refused == (by_datasets if suffix in ("parquet", "save_to_disk") else set())


def test_a_variable_in_a_name_is_not_filled_in(tmp_path, monkeypatch):
    monkeypatch.setenv("WHICH", "other")
    parquet(tmp_path / "other.parquet", "wrong")
    for place in (tmp_path / "$WHICH.parquet", tmp_path / "${WHICH}" / "0.parquet"):
        with pytest.raises(UserError, match="value of an environment variable .* holds `\\$` .fix: rename it"):
            open_records(source(parquet(place, "right")))


def test_a_name_that_datasets_would_cut_is_refused(tmp_path):
    parquet(tmp_path / "a.parquet", "wrong").rename(tmp_path / "a")
    path = parquet(tmp_path / "a::b.parquet", "right")
    with pytest.raises(UserError, match=r"a::b\.parquet: .* it holds `::` \(fix: rename it\)"):
        open_records(source(path))


def test_a_file_that_has_changed_is_read_again(tmp_path):
    path = parquet(tmp_path / "x.parquet", "first")
    assert ids(path) == ["first"]
    parquet(path, "second", "third")
    assert ids(path) == ids(tmp_path) == ["second", "third"]


# --- parquet files that `datasets` stops at


def test_a_file_without_rows_has_no_rows(tmp_path):
    parquet(tmp_path / "set" / "0.parquet")
    parquet(tmp_path / "set" / "1.parquet", "a")
    parquet(tmp_path / "set" / "2.parquet")
    assert ids(tmp_path / "set") == ["a"] and len(data_files(source(tmp_path / "set"))) == 3
    for path in (tmp_path / "set" / "0.parquet", parquet(tmp_path / "none" / "0.parquet").parent):
        with pytest.raises(UserError, match="there are no records"):
            open_records(source(path))


def test_columns_that_differ_are_named_with_their_file(tmp_path):
    first = parquet(tmp_path / "a.parquet", "a", score=[1])
    second = parquet(tmp_path / "b.parquet", "b", mark=["x"])
    said = f"{second}: its columns are not those of a.parquet: it also has 'mark'; it lacks 'score'"
    with pytest.raises(UserError) as caught:
        open_records(source(tmp_path))
    assert said in str(caught.value)
    parquet(second, "b", score=[[{"x": 1}]])
    with pytest.raises(UserError, match=r"b\.parquet: column 'score' is list<.*, but int64 in a\.parquet"):
        open_records(source(tmp_path))
    first.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match=r"a\.parquet: can't be read as parquet"):
        open_records(source(tmp_path))
    first.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=r"a\.parquet: the file is a pointer of Git LFS, not the data .*git lfs pull"):
        open_records(source(tmp_path))


def test_a_column_that_is_empty_in_one_file_has_the_type_of_the_others(tmp_path):
    parquet(tmp_path / "a.parquet", "a", note=[None])
    parquet(tmp_path / "b.parquet", "b", note=["x"])
    store = open_records(source(tmp_path))
    assert [json.loads(store.source_text(row))["note"] for row in range(2)] == [None, "x"]


def test_reading_parquet_shows_no_bars(tmp_path, capfd):
    parquet(tmp_path / "a.parquet", "a")
    assert ids(tmp_path) == ["a"]
    assert capfd.readouterr() == ("", "")


# --- questions


def questions(path: Path, *question_ids: int, **columns: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {
        "question_id": list(question_ids),
        "image_id": [str(number) for number in question_ids],
        "question": ["?"] * len(question_ids),
        "answers": [["a"]] * len(question_ids),
    }
    pyarrow.parquet.write_table(pyarrow.table(rows | columns), path)
    return path


def asked(path: Path | str) -> list[int | str]:
    return [question.question_id for question in load_questions(path, with_images=False)]


@pytest.mark.parametrize(
    "names",
    [
        ["0000", "0001"],
        ["my-set-00000", "my-set-00001"],
        ["sub/validation-0", "sub/validation-1"],
        ["validation-00000-of-00002-aaaa1111", "validation-00001-of-00002-bbbb2222"],
        ["part-00000-0a1b-c000.snappy", "part-00001-0a1b-c000.snappy"],
    ],
)
def test_all_shards_of_questions_are_asked(tmp_path, names):
    for number, name in enumerate(names):
        questions(tmp_path / f"{name}.{'PARQUET' if number else 'parquet'}", number)
    assert asked(tmp_path) == [0, 1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["my-set-00000", "my-set-test"], r"several splits \(my-set, my-set-test\)"),
        (["vqa-2-train-0", "vqa-2-test-0"], "several splits"),
        (["validation-00000-of-00003", "validation-00002-of-00003"], "00001-of-00003 is missing"),
        (["train-0", "train-1", "validation-0", "validation-1"], r"fix: .*'.*/validation-\*\.parquet'"),
    ],
)
def test_folders_of_questions_that_are_not_clear_are_refused(tmp_path, names, message):
    for number, name in enumerate(names):
        questions(tmp_path / f"{name}.parquet", number)
    with pytest.raises(UserError, match=message):
        asked(tmp_path)
    if "fix" in message:
        assert asked(tmp_path / "validation-*.parquet") == [2, 3]


def test_a_name_of_a_question_file_is_no_pattern_but_for_its_star(tmp_path):
    for number, name in enumerate(["q[1]-0", "q[1]-1", "q1-0", "q*"]):
        questions(tmp_path / f"{name}.parquet", number)
    assert asked(tmp_path / "q[1]-*.parquet") == [0, 1]
    assert asked(tmp_path / "q*.parquet") == [3]  # the file of that name
    with pytest.raises(UserError, match="no parquet file there"):
        asked(tmp_path / "q?-*.parquet")
