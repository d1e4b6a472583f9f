"""Gradients and buffers of DeepSpeed's ZeRO, in bytes, on the device that holds most of them.

From the source of DeepSpeed 0.19.8 (`zero/stage_1_and_2.py`, `zero/stage3.py`, `comm/coalesced_collectives.py`), with
`contiguous_gradients`, its default. `tests/test_memory.py` compares it with traced steps of the engine.

A gradient moves into a bucket as soon as it is there. A full bucket is reduced; of it, this device keeps its share. A
weight larger than a bucket is reduced alone. ZeRO-1 keeps such a gradient whole on every device until the backward
pass ends, ZeRO-2 only on the devices that have a share in it. Between the micro-batches of a step, ZeRO-1 keeps all
gradients, ZeRO-2 and ZeRO-3 their shares.
"""

from dataclasses import dataclass
from typing import NamedTuple


class GradientsCome(NamedTuple):
    """Bytes of gradients in the course of a backward pass.

    Args:
        at_head: when the head's gradient comes.
        in_layers: at the decoder's last layer, whose backward pass is the first.
        of_layer: what each layer adds.
        at_end: when the embedding's gradient comes.
    """

    at_head: float
    in_layers: float
    of_layer: float
    at_end: float


@dataclass(frozen=True)
class ZeroSettings:
    """A DeepSpeed file's buffer sizes, in elements.

    Args:
        reduce_bucket: None: Transformers' value for "auto".
        max_live: parameters that ZeRO-3 has gathered when it stops gathering ahead; the last weight comes on top.
        prefetch: parameters that it gathers together, ahead of their use. None: Transformers' value for "auto".
        sub_group: parameters that ZeRO-3's optimizer steps at once.
        overlap: whether reducing overlaps the backward pass.
        wide_sums: gradients add up in float32, whatever their type.
    """

    reduce_bucket: float | None = None
    max_live: float = 1e9
    prefetch: float | None = 5e7
    sub_group: float = 1e9
    overlap: bool = True
    wide_sums: bool = False


@dataclass(frozen=True)
class ZeroGradients:
    """What the engine holds besides weights and optimizer.

    Args:
        stage: 1 to 3.
        bucket: numbers in a bucket.
        width: bytes of a number of a gradient.
        num_trained, num_devices: parameters with a gradient, and devices that share them.
        matrix: numbers of the largest trained weight: embedding or head; 0: neither is trained.
        linears: numbers of a decoder layer's trained weights, one by one.
        accumulates: a step has several micro-batches.
    """

    settings: ZeroSettings
    stage: int
    bucket: float
    width: int
    num_trained: int
    num_devices: int
    matrix: int
    linears: tuple[int, ...]
    accumulates: bool

    @property
    def share(self) -> float:
        """Trained parameters of a device."""
        return self.num_trained / self.num_devices

    @property
    def summed(self) -> int:
        """Bytes of a number where the gradients of several micro-batches add up."""
        return 4 if self.settings.wide_sums else self.width

    @property
    def own(self) -> float:
        """This device's share of the averaged gradients; unless they are widened, a weight in part in it is whole."""
        if self.stage == 3 or self.summed > self.width:
            return self.share * self.summed
        return max(self.share, self.matrix) * self.summed

    @property
    def holds_all(self) -> bool:
        """ZeRO-1 reduces in the last backward pass of a step; without `overlap_comm` after it."""
        return self.stage == 1 and (self.accumulates or not self.settings.overlap)

    @property
    def between(self) -> float:
        """Gradients between the micro-batches of a step."""
        if not self.accumulates:
            return 0.0
        return float(self.num_trained * self.summed) if self.stage == 1 else self.own

    @property
    def standing(self) -> float:
        """ZeRO-3's only bucket is there from the start."""
        return self.bucket * self.width if self.stage == 3 else 0.0

    @property
    def buckets(self) -> float:
        """ZeRO-1 and ZeRO-2 make theirs in each backward pass, and fill one while the other is being reduced."""
        if self.stage == 3:
            return 0.0
        width = self.summed if self.stage == 1 else self.width
        return self.bucket * width * (1 + self.settings.overlap)

    @property
    def reducing(self) -> float:
        """Beside a full bucket: its numbers in the order of the devices, and one weight of it in the sums' type."""
        if self.num_devices == 1:
            return 0.0
        copied = min(self.bucket, self.num_trained) * self.width
        if self.stage == 3:
            return copied + (self.summed > self.width) * copied / self.width * self.summed / self.num_devices
        return copied + (self.summed > self.width) * self.summed * min(max(self.linears, default=0), self.share)

    @property
    def widened_matrix(self) -> float:
        """This device's share of the head or embedding in the sums' type."""
        of_device = self.matrix / self.num_devices if self.stage == 3 else min(self.matrix, self.share)
        return (self.summed > self.width) * self.summed * of_device

    @property
    def reducing_matrix(self) -> float:
        """As `reducing` for head or embedding, alone; what a single device has of it is not put in order first."""
        if self.num_devices == 1:
            return 0.0
        is_spread = self.stage < 3 and self.matrix > self.share
        return max(self.reducing, is_spread * self.matrix * self.width + self.widened_matrix)

    @property
    def kept_matrix(self) -> float:
        """The head's gradient, whole until the backward pass ends; under ZeRO-2 on its own device."""
        is_alone = self.stage < 3 and self.matrix > self.bucket
        return float(is_alone * self.matrix * self.width)

    def come(self, num_layers: int) -> GradientsCome:
        """Gradients in a backward pass, without buckets; a device's share may be the first to arrive."""
        if self.stage == 3:
            return GradientsCome(0.0, 0.0, 0.0, 0.0)
        # a device with a part of head or embedding is not the one that keeps both
        share = self.share * self.summed
        if self.stage == 2:  # the head's device is not the embedding's, which widens
            at_end = share + max(0.0, self.kept_matrix - self.widened_matrix)
            return GradientsCome(share, share + self.kept_matrix, 0.0, at_end)
        of_layer = float(sum(n for n in self.linears if n > self.bucket) * self.summed)
        at_end = share + self.kept_matrix + num_layers * of_layer
        if self.holds_all:
            whole = float(self.num_trained * self.summed)
            return GradientsCome(whole, whole + max(share - self.kept_matrix, 0.0), 0.0, at_end)
        return GradientsCome(share, share + self.kept_matrix, of_layer, at_end)

    @property
    def stepping(self) -> float:
        """Beside a device's gradients in a step: a flat copy, widened; before it a weight in float64, for its norm."""
        if self.stage == 3:
            return min(self.share, self.settings.sub_group) * (self.width + 4 if self.summed < 4 else 4)
        flat = self.share * (self.width + 4 * (self.width < 4)) if self.summed == self.width else 0.0
        return max(flat, 8 * min(max((self.matrix, *self.linears)), self.share))
