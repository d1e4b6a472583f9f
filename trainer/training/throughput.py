"""Samples, tokens and seconds of a stage, logged beside its loss."""

import time

import numpy as np
from transformers import TrainerState

from llava_llama31.trainer.data.batches.batch_order import BatchOrder
from llava_llama31.trainer.training.meter import Meter
from llava_llama31.trainer.training.source_losses import SourceLosses


_COUNTED = ("tokens", "supervised_tokens", "samples")


class Throughput:
    """Counts what the steps trained on, from the batch order, and completes the logs with it."""

    def __init__(self, order: BatchOrder, meter: Meter, sources: SourceLosses):
        self.order, self.meter, self.sources = order, meter, sources
        self._counts: dict[int, np.ndarray] = {}

    def start(self, state: TrainerState) -> None:
        """Start the clock, after the seconds that earlier starts of the stage logged."""
        earlier = [entry["seconds"] for entry in state.log_history if "seconds" in entry]
        self._seconds_before = earlier[-1] if earlier else 0.0
        self._started = time.monotonic()
        self._logged_step = state.global_step
        self._last_log = self.trained(state.global_step)
        self.meter.restart()

    @property
    def logged_step(self) -> int:
        return self._logged_step

    def complete(self, logs: dict[str, float], step: int, num_skipped: int) -> None:
        """Add rates, meters and seconds since the last log; the loss becomes the mean of the steps that were taken.

        Args:
            num_skipped: of the steps since the last log, those that changed no weight.
        """
        num_steps, self._logged_step = step - self._logged_step, step
        if num_skipped:
            logs["skipped_steps"] = num_skipped
            loss = logs.pop("loss")
            if num_skipped < num_steps:
                logs["loss"] = loss * num_steps / (num_steps - num_skipped)
        now, trained = time.monotonic(), self.trained(step)
        seconds, meters = self.meter.read()
        logs["supervised_tokens"] = int(trained[1])
        for name, count in zip(_COUNTED, trained - self._last_log, strict=True):
            logs[f"{name}_per_second"] = round(float(count) / seconds, 2)
        logs |= meters | self.sources.read()
        logs["seconds"] = round(self._seconds_before + now - self._started, 3)
        self._last_log = trained

    def trained(self, step: int) -> np.ndarray:
        """Tokens, supervised tokens and samples (3,) of the first `step` steps, computed from the batch order."""
        epochs, rest = divmod(step, self.order.steps_per_epoch)
        total = sum((self._epoch(epoch)[-1] for epoch in range(epochs)), np.zeros(3, np.int64))
        return total + self._epoch(epochs)[rest - 1] if rest else total

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._counts:
            lengths = self.order.lengths
            counts = [
                (lengths.num_tokens[batch].sum(), lengths.num_supervised_tokens[batch].sum(), len(batch))
                for batch in self.order.batches(epoch)
            ]
            self._counts[epoch] = np.cumsum(counts, axis=0, dtype=np.int64)
        return self._counts[epoch]
