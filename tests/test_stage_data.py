"""Which rows a stage trains on, and how often."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llava_llama31.trainer.data.batches.stage_rows import weighted


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
