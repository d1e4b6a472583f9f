"""The order of samples is a pure function of seed, epoch and step, whatever the ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_llama31.trainer.order import BatchOrder, RankBatches


orders = st.builds(
    lambda number, batch, seed, keep, group: BatchOrder(
        np.random.default_rng(number).integers(1, 500, number),
        global_batch=batch,
        seed=seed,
        keep_last=keep,
        group_by_length=group,
    ),
    st.integers(1, 400),
    st.sampled_from([4, 8, 12]),
    st.integers(0, 5),
    st.booleans(),
    st.booleans(),
)


@settings(max_examples=200, deadline=None)
@given(order=orders, epoch=st.integers(0, 3))
def test_an_epoch_has_every_sample_once(order, epoch):
    batches = order.batches(epoch)
    assert len(batches) == order.steps_per_epoch
    seen = np.concatenate(batches) if batches else np.array([], int)
    number = len(order.num_tokens)
    assert len(set(seen)) == len(seen)
    assert len(seen) == (number if order.keep_last else number // order.global_batch * order.global_batch)
    again = order.batches(epoch)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


@settings(max_examples=200, deadline=None)
@given(order=orders, num_processes=st.sampled_from([1, 2, 4]), micro=st.sampled_from([1, 2]))
def test_ranks_share_every_global_batch(order, num_processes, micro):
    if order.global_batch % (num_processes * micro):
        return
    ranks = [
        RankBatches(order, micro_batch=micro, rank=rank, num_processes=num_processes) for rank in range(num_processes)
    ]
    streams = [list(rank) for rank in ranks]
    assert {len(stream) for stream in streams} == {len(ranks[0])}
    accumulation = order.global_batch // (num_processes * micro)
    position = 0
    for batch in order.batches(0):
        slices = -(-len(batch) // (num_processes * micro))
        assert slices == accumulation or len(batch) < order.global_batch
        got = [i for stream in streams for part in stream[position : position + slices] for i in part]
        assert sorted(i for i in got if i >= 0) == sorted(batch)
        assert all(0 < len(part) <= micro for stream in streams for part in stream[position : position + slices])
        position += slices


def test_epochs_and_seeds_differ():
    def first(seed, epoch):
        order = BatchOrder(np.ones(64), global_batch=8, seed=seed, keep_last=True, group_by_length=False)
        return order.batches(epoch)[0].tolist()

    assert len({tuple(first(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_grouping_by_length_saves_padding_and_keeps_batches_shuffled():
    lengths = np.random.default_rng(0).integers(10, 1000, 4096)

    def padded(group):
        order = BatchOrder(lengths, global_batch=32, seed=0, keep_last=True, group_by_length=group)
        batches = order.batches(0)
        means = np.array([lengths[batch].mean() for batch in batches])
        return sum(len(b) * lengths[b].max() for b in batches) / lengths.sum(), np.corrcoef(means[:-1], means[1:])[
            0, 1
        ]

    (grouped, correlation), (plain, _) = padded(True), padded(False)
    assert grouped < 1.05 and plain > 1.5
    assert abs(correlation) < 0.3


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_a_rank_without_a_sample_repeats_one_that_does_not_count(num_processes):
    order = BatchOrder(np.ones(9), global_batch=8, seed=0, keep_last=True, group_by_length=False)
    last = [
        list(RankBatches(order, micro_batch=1, rank=rank, num_processes=num_processes))[-1]
        for rank in range(num_processes)
    ]
    assert sum(i >= 0 for part in last for i in part) == 1 and len(last) == num_processes
