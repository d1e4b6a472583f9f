"""Filters of a source by columns, as FineVision's ratings, of whole rows and of single turns."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llava_llama31.trainer.data.check.check import DataCheck, check_sources
from llava_llama31.trainer.data.sources.records import open_records
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.recipes.schema import DataSource, Where


RATINGS = [[5, 2], [4, 4], [1, 1], [3, 5]]


@pytest.fixture
def finevision(tmp_path, make_image):
    """Rows as FineVision has them: several images, turns, and ratings of each turn and of the row."""

    def png(seed: int) -> dict:
        buffer = io.BytesIO()
        make_image(20, 30, seed=seed).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    rows = [
        {
            "images": [png(2 * i), png(2 * i + 1)] if i % 2 else [png(2 * i)],
            "texts": [{"user": f"what {n} in {i}?", "assistant": f"{n} of {i}"} for n in range(2)],
            "source": "chartqa" if i < 3 else "other",
            "relevance_ratings": RATINGS[i],
            "relevance_min": min(RATINGS[i]),
        }
        for i in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-00000-of-00001.parquet")
    return tmp_path / "train-00000-of-00001.parquet"


def source(path, **where) -> DataSource:
    return DataSource(name="fine", path=str(path), where={name: Where(**given) for name, given in where.items()})


def turns(record) -> list[str]:
    return [p["text"] for m in record.messages if m["role"] == "assistant" for p in m["content"]]


def test_rows_are_filtered_by_columns_and_counted_never_an_error(finevision, tmp_path):
    given = source(finevision, relevance_min={"min": 2}, source={"one_of": ["chartqa"]})
    (report,) = check_sources([given], DataCheck(num_workers=0, progress=False), policy={"default": "error"}).sources
    assert report.rows.tolist() == [0, 1] and report.dropped == {"filtered": 2}
    report_all = check_sources([given], DataCheck(num_workers=0, progress=False))
    report_all.raise_for_policy()  # `filtered` is no error
    rejects = [json.loads(line) for line in report_all.rejects.read_text().splitlines()]
    assert [(r["row"], r["reason"], r["action"]) for r in rejects] == [
        (2, "filtered", "skip"),
        (3, "filtered", "skip"),
    ]
    assert rejects[0]["detail"] == "`relevance_min` is 1"
    assert "relevance_min" not in report.not_read and report.not_read == {"relevance_ratings": 2}
    (others,) = check_sources([source(finevision)], DataCheck(num_workers=0, progress=False)).sources
    assert len(others.rows) == 4  # another filter is another finding


def test_single_turns_are_filtered_by_a_list_column_and_images_stay(finevision):
    store = open_records(source(finevision, relevance_ratings={"min": 4}))
    assert turns(store[0]) == ["0 of 0"] and len(store[0].images) == 1
    assert turns(store[1]) == ["0 of 1", "1 of 1"] and len(store[1].images) == 2
    assert turns(store[3]) == ["1 of 3"] and len(store[3].images) == 2
    with pytest.raises(RecordError, match="filtered: no turn has `relevance_ratings`"):
        store[2]
    whole = open_records(source(finevision))
    assert whole[1].messages[0]["content"][:2] == [{"type": "image"}] * 2 and turns(whole[2]) == ["0 of 2", "1 of 2"]


def test_a_row_without_the_column_and_a_list_that_fits_no_turns_are_named(tmp_path):
    rows = [
        {"texts": [{"user": "a b?", "assistant": "c"}], "score": [1, 2]},
        {"texts": [{"user": "a b?", "assistant": "c"}]},
        {"texts": [{"user": "a b?", "assistant": "c"}], "score": True},
        {"texts": [{"user": "a b?", "assistant": "c"}], "score": 3.5},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = open_records(source(tmp_path / "rows.jsonl", score={"min": 1, "max": 4}))
    with pytest.raises(RecordError, match="malformed_record: `score` has 2 entries for 1"):
        store[0]
    for row, shown in ((1, "None"), (2, "True")):
        with pytest.raises(RecordError, match=f"filtered: `score` is {shown}"):
            store[row]
    assert turns(store[3]) == ["c"]
    with pytest.raises(ValueError, match="it has no condition"):
        Where()
