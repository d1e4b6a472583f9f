"""The order of samples: a pure function of (seed, epoch, step), the same for any number of ranks and workers."""

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from llava_llama31.trainer.recipes.schema import Stage


WINDOW_BATCHES = 64


@dataclass(frozen=True)
class Lengths:
    """What the check found of each sample, in tokens.

    Args:
        num_tokens: of the whole sample.
        num_supervised_tokens: of those that are trained on.
        num_prefix_tokens: up to the end of its images, which samples of equal `prefixes` may share.
        prefixes: equal for samples that begin with the same turns and images; 0: nothing to share.
    """

    num_tokens: np.ndarray
    num_supervised_tokens: np.ndarray
    num_prefix_tokens: np.ndarray
    prefixes: np.ndarray

    def __len__(self) -> int:
        return len(self.num_tokens)

    def __getitem__(self, rows: np.ndarray) -> "Lengths":
        return Lengths(
            self.num_tokens[rows],
            self.num_supervised_tokens[rows],
            self.num_prefix_tokens[rows],
            self.prefixes[rows],
        )


class BatchOrder:
    """Global batches of an epoch.

    Args:
        lengths: of every sample.
        global_batch: samples of one optimizer step.
        keep_last: whether an epoch's incomplete last batch is trained on.
        group_by_length: batch samples of like length within shuffled windows of 64 batches.
        equal_tokens: cut the epoch into as many batches of nearly as many supervised tokens each, instead of samples.
        share_prefix: bring samples of equal prefix together, this many at most; 1: none. Groups are shuffled as
            single samples are, and drawn again every epoch; a group may be cut where a batch ends.
    """

    def __init__(
        self,
        lengths: Lengths,
        *,
        global_batch: int,
        seed: int,
        keep_last: bool,
        group_by_length: bool = False,
        equal_tokens: bool = False,
        share_prefix: int = 1,
    ):
        self.lengths = lengths
        self.global_batch, self.seed = global_batch, seed
        self.keep_last, self.group_by_length = keep_last, group_by_length
        self.equal_tokens, self.share_prefix = equal_tokens, share_prefix

    @property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(len(self.lengths), self.global_batch)
        return whole + (rest > 0 and self.keep_last)

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Sample indices of every step of an epoch; without sharing, shortest sample of a step first."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        if self.share_prefix > 1:
            order = self._grouped(order, rng)
        if self.equal_tokens:
            return self._of_equal_tokens(order)
        whole = len(order) // self.global_batch * self.global_batch
        body, rest = order[:whole], order[whole:]
        if self.group_by_length:
            window = WINDOW_BATCHES * self.global_batch
            parts = [self._by_length(body[i : i + window]) for i in range(0, whole, window)]
            batches = [b for part in parts for b in rng.permutation(part.reshape(-1, self.global_batch))]
        else:
            batches = list(body.reshape(-1, self.global_batch))
        if self.keep_last and len(rest):
            batches.append(rest)
        if self.share_prefix > 1:
            return batches
        # sorted within the step: micro-batches, and so ranks, get samples of like length
        return [self._by_length(batch) for batch in batches]

    def _of_equal_tokens(self, order: np.ndarray) -> list[np.ndarray]:
        steps = np.arange(1, self.steps_per_epoch)
        counts = self.lengths.num_supervised_tokens[order].astype(np.int64)
        # a sample belongs where its middle token does
        middles = np.cumsum(counts) - counts / 2
        cuts = np.searchsorted(middles, steps * counts.sum() / (len(steps) + 1))
        # every batch holds a sample, however long its neighbours' are
        cuts = np.maximum.accumulate(np.maximum(cuts, steps) - steps) + steps
        cuts = np.minimum(cuts, len(order) - (len(steps) + 1) + steps)
        return np.split(order, cuts) if self.steps_per_epoch else []

    def _by_length(self, indices: np.ndarray) -> np.ndarray:
        return indices[np.argsort(self.lengths.num_tokens[indices], kind="stable")]

    def _grouped(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The permutation with each group's members side by side, and the groups in random order."""
        keys = self.lengths.prefixes[order]
        by_key = np.argsort(keys, kind="stable")  # members of a key stay in the permutation's order
        sorted_keys = keys[by_key]
        begins = np.flatnonzero(np.r_[True, sorted_keys[1:] != sorted_keys[:-1]]) if len(order) else order
        rank = np.arange(len(order)) - np.repeat(begins, np.diff(np.r_[begins, len(order)]))
        opens = (rank % self.share_prefix == 0) | (sorted_keys == 0)
        group = np.cumsum(opens) - 1
        # numbered by first appearance, not by key: keys hash paths, which are not part of the data
        number = np.argsort(np.argsort(by_key[opens]))
        place = rng.permutation(len(number))[number]
        return order[by_key[np.argsort(place[group], kind="stable")]]

    def rows(self, batch: np.ndarray, num_rows: int) -> list[list[int]]:
        """A batch packed into this many rows of nearly equal length, longest first; each holds a sample at least.

        Longest group to shortest row, a rule within 4/3 of the best (Graham, 1969). Groups stay whole unless there are
        more rows than groups.
        """
        units = self.units(batch)
        while len(units) < num_rows:
            longest = max(units, key=len)
            units.remove(longest)
            units += [longest[: len(longest) // 2], longest[len(longest) // 2 :]]
        length_of = self._length_of(batch)
        costs = [length_of(unit) for unit in units]
        heap = [(0, row) for row in range(num_rows)]
        rows: list[list[int]] = [[] for _ in heap]
        for unit in sorted(range(len(units)), key=lambda unit: -costs[unit]):
            length, row = heapq.heappop(heap)
            rows[row] += units[unit]
            heapq.heappush(heap, (length + costs[unit], row))
        return sorted(rows, key=length_of, reverse=True)

    def units(self, batch: np.ndarray) -> list[list[int]]:
        """Samples of a batch that stand side by side with equal prefixes."""
        if self.share_prefix == 1:
            return [[index] for index in batch.tolist()]
        units: list[list[int]] = []
        before = 0
        for index, key in zip(batch.tolist(), self.lengths.prefixes[batch].tolist(), strict=True):
            shared = key and key == before and len(units[-1]) < self.share_prefix
            if shared:
                units[-1].append(index)
            else:
                units.append([index])
            before = key
        return units

    def row_length(self, row: list[int]) -> int:
        """Tokens of a packed row; a prefix counts once."""
        return self._length_of(np.array(row))(row)

    def _length_of(self, batch: np.ndarray) -> Callable[[list[int]], int]:
        """`row_length` of rows of these samples, by plain numbers: reading an array's one by one is slow."""
        lengths, most = self.lengths, self.share_prefix
        columns = lengths.num_tokens[batch], lengths.prefixes[batch], lengths.num_prefix_tokens[batch]
        samples = dict(zip(batch.tolist(), zip(*(column.tolist() for column in columns), strict=True), strict=True))

        def length(row: list[int]) -> int:
            total = before = num_sharing = shared = 0
            for index in row:
                tokens, key, prefix = samples[index]
                if key and key == before and num_sharing < most:
                    num_sharing += 1
                    total -= shared
                else:
                    num_sharing, shared = 1, prefix
                total += tokens
                before = key
            return total

        return length


class RankBatches:
    """Micro-batches of one rank: parts of the global batches, so that accumulation x ranks x micro is the batch.

    Packed, a global batch becomes rows of nearly equal length; else it is cut into slices of `micro_batch` samples. In
    an incomplete last batch every rank still gets the same number of micro-batches; where there are more of them than
    samples, a rank repeats a sample whose index is given negative, -1 - index: it counts for nothing.
    """

    def __init__(self, order: BatchOrder, *, micro_batch: int, rank: int, num_processes: int, packed: bool = False):
        self.order, self.micro_batch, self.packed = order, micro_batch, packed
        self.rank, self.num_processes = rank, num_processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def _num_accumulation(self, num_samples: int) -> int:
        num_samples = self.order.global_batch if self.order.equal_tokens else num_samples
        return -(-num_samples // (self.micro_batch * self.num_processes))

    def __len__(self) -> int:
        order = self.order
        if order.equal_tokens:
            return order.steps_per_epoch * self._num_accumulation(order.global_batch)
        whole, rest = divmod(len(order.lengths), order.global_batch)
        last = self._num_accumulation(rest) if rest and order.keep_last else 0
        return whole * self._num_accumulation(order.global_batch) + last

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.order.batches(self.epoch):
            for micro in self.micro_batches(batch)[self.rank :: self.num_processes]:
                yield micro or [-1 - int(batch[0])]

    def of_ranks(self, step: int) -> list[list[list[int]]]:
        """Sample indices of a step of all epochs, by rank and micro-batch."""
        epoch, index = divmod(step, self.order.steps_per_epoch)
        batch = self.order.batches(epoch)[index]
        micro_batches = [micro or [-1 - int(batch[0])] for micro in self.micro_batches(batch)]
        return [micro_batches[rank :: self.num_processes] for rank in range(self.num_processes)]

    def micro_batches(self, batch: np.ndarray) -> list[list[int]]:
        """Micro-batches of all ranks for one global batch; empty ones last."""
        number = self._num_accumulation(len(batch)) * self.num_processes
        if not self.packed:
            return [part.tolist() for part in np.array_split(batch, number)]
        rows = self.order.rows(batch, min(number, len(batch)))
        return rows + [[]] * (number - len(rows))


def batch_order(stage: Stage, lengths: Lengths, seed: int) -> BatchOrder:
    """The stage's global batches."""
    return BatchOrder(
        lengths,
        global_batch=stage.global_batch,
        seed=seed,
        keep_last=stage.last_batch == "keep",
        group_by_length=stage.group_by_length,
        equal_tokens=stage.batch_by == "supervised_tokens",
        share_prefix=stage.share_prefix if stage.packing else 1,
    )


def within_row_limit(stage: Stage, lengths: Lengths, seed: int, num_processes: int) -> Stage:
    """The stage with the largest micro-batch whose packed rows keep within `max_row_tokens`, as all samples do."""
    limit, order = stage.max_row_tokens, batch_order(stage, lengths, seed)
    if limit is None:
        return stage
    epochs = math.ceil(stage.epochs or (stage.max_steps or 0) / max(1, order.steps_per_epoch))
    batches = [batch for epoch in range(epochs) for batch in order.batches(epoch)]
    samples = stage.global_batch // num_processes

    def fits(micro_batch: int) -> bool:
        rows = RankBatches(order, micro_batch=micro_batch, rank=0, num_processes=num_processes, packed=True)
        return all(order.row_length(row) <= limit for batch in batches for row in rows.micro_batches(batch)[:1])

    sizes = (size for size in range(samples, 0, -1) if samples % size == 0 and fits(size))
    return stage.model_copy(update={"micro_batch": next(sizes, 1)})
