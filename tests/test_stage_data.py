"""Which rows a stage trains on, and how often."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.data.batches.stage_rows import check_stage, split_rows, weighted
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.schema import Stage


@given(
    st.lists(st.integers(0, 2), max_size=60),
    st.lists(st.floats(0.01, 4), min_size=3, max_size=3),
    st.integers(0, 9),
)
def test_an_epoch_sees_each_source_as_often_as_its_weight_says(sources, weights, seed):
    sources = np.array(sources, dtype=np.int64)
    rows = 100 + np.arange(len(sources))
    seen = weighted(rows, sources, weights, seed)
    assert (np.diff(seen) >= 0).all()
    for source, weight in enumerate(weights):
        own = rows[sources == source]
        times = np.array([(seen == row).sum() for row in own])
        assert ((times == int(weight)) | (times == int(weight) + 1)).all()
        assert abs(times.sum() - weight * len(own)) <= 0.5 + 1e-9
    assert np.array_equal(seen, weighted(rows, sources, weights, seed))


def test_a_weight_of_one_changes_nothing():
    rows = np.arange(50)
    assert np.array_equal(weighted(rows, rows % 3, [1.0, 1.0, 1.0], 7), rows)
    a, b = (weighted(rows, rows % 3, [0.5, 0.5, 0.5], seed) for seed in (1, 2))
    assert len(a) == len(b) and not np.array_equal(a, b)


def stage_of(paths: list[str], weights: list[float], **options: object) -> Stage:
    data = [{"name": f"s{n}", "path": path, "weight": weights[n]} for n, path in enumerate(paths)]
    common = {"trainable": ["multi_modal_projector"], "learning_rate": 1e-3, "global_batch": 4, "epochs": 1}
    return Stage.model_validate(common | {"data": data} | options)


def test_a_weight_that_leaves_nothing_of_a_source_is_refused():
    sources = np.repeat([0, 1], 40)
    with pytest.raises(UserError, match=r"data: s1: weight 0\.01 of 40 rows .*weight above 0\.0125"):
        split_rows(stage_of(["a", "b"], [1.0, 0.01]), sources, 3)
    trained, _ = split_rows(stage_of(["a", "b"], [1.0, 0.0126]), sources, 3)
    assert (sources[trained] == 1).sum() == 1
    with pytest.raises(UserError, match="s1: weight 0.0126 of 2. rows"):  # the others are held out
        split_rows(stage_of(["a", "b"], [1.0, 0.0126], validation_fraction=0.5), sources, 3)


def test_such_a_weight_is_found_by_the_check_before_the_first_stage(tmp_path, base_folder):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    for name in ("a", "b"):
        rows = [{"id": n, "conversations": [turns[0] | {"value": f"{name}{n}"}, turns[1]]} for n in range(40)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    stage = stage_of([str(tmp_path / "a.json"), str(tmp_path / "b.json")], [1.0, 0.01])
    with pytest.raises(UserError, match="data: s1: weight 0.01 of 40 rows"):
        check_stage(stage, LlavaLlama31Processor.from_pretrained(base_folder), None)
