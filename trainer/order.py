"""The order of samples: a pure function of (seed, epoch, step), the same for any number of ranks and workers."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


WINDOW_BATCHES = 64


class BatchOrder:
    """Global batches of an epoch.

    Args:
        num_tokens: length of each sample in tokens.
        global_batch: samples of one optimizer step.
        keep_last: whether an epoch's incomplete last batch is trained on.
        group_by_length: batch samples of like length within shuffled windows of 64 batches.
    """

    def __init__(
        self, num_tokens: np.ndarray, *, global_batch: int, seed: int, keep_last: bool, group_by_length: bool
    ):
        self.num_tokens = np.asarray(num_tokens)
        self.global_batch, self.seed = global_batch, seed
        self.keep_last, self.group_by_length = keep_last, group_by_length

    @property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(len(self.num_tokens), self.global_batch)
        return whole + (rest > 0 and self.keep_last)

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Sample indices of every step of an epoch, shortest sample of a step first."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.num_tokens))
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
        # sorted within the step: micro-batches, and so ranks, get samples of like length
        return [self._by_length(batch) for batch in batches]

    def _by_length(self, indices: np.ndarray) -> np.ndarray:
        return indices[np.argsort(self.num_tokens[indices], kind="stable")]


class RankBatches(Sampler[list[int]]):
    """Micro-batches of one rank: slices of the global batches, so that accumulation x ranks x micro is the batch.

    In an incomplete last batch every rank still gets the same number of micro-batches; where there are more ranks than
    samples, a rank repeats a sample whose index is given negative, -1 - index: it counts for nothing.
    """

    def __init__(self, order: BatchOrder, *, micro_batch: int, rank: int, num_processes: int):
        self.order, self.micro_batch = order, micro_batch
        self.rank, self.num_processes = rank, num_processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def _num_accumulation(self, num_samples: int) -> int:
        return -(-num_samples // (self.micro_batch * self.num_processes))

    def __len__(self) -> int:
        order = self.order
        whole, rest = divmod(len(order.num_tokens), order.global_batch)
        last = self._num_accumulation(rest) if rest and order.keep_last else 0
        return whole * self._num_accumulation(order.global_batch) + last

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.order.batches(self.epoch):
            num_slices = self._num_accumulation(len(batch)) * self.num_processes
            slices = np.array_split(batch, num_slices)
            for micro in slices[self.rank :: self.num_processes]:
                yield micro.tolist() if len(micro) else [-1 - int(batch[0])]
