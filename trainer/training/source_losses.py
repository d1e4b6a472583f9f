"""Loss and accuracy of each data source, from scores of the supervised tokens that the training pass computes anyway.

Sums are exact: the tokens' own losses are added up in float64, so the sources' sums are a partition of the whole one.
Flat names (`loss_by_source/NAME`) go through Transformers' logs, which trackers take; `nested` makes one mapping of
them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from llava_llama31.trainer.distributed.devices import widest_float


_FIELDS = ("loss", "accuracy", "tokens")
_KEY = "_by_source/"


class SourceLosses:
    """Adds up the micro-batches of this process: by step, and by what was trained since the last reading.

    Args:
        names: of the stage's sources, in order.
    """

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names = list(names)
        # rows: sources; columns: sum of losses, number of hits, number of tokens
        self._step = torch.zeros(len(self.names), 3, dtype=widest_float(device), device=device)
        self._since = torch.zeros_like(self._step)
        self._asked: tuple[torch.Tensor, torch.Tensor] | None = None

    def ask(self, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """A micro-batch's inputs with room for the scores of its tokens, in place of what source each is from."""
        self._add()
        sources = inputs.pop("sources", None)
        if sources is not None and len(sources):
            owners = torch.as_tensor(sources, dtype=torch.long).to(self._step.device, non_blocking=True)
            scores = torch.zeros(2, len(owners), dtype=dtype, device=self._step.device)
            inputs["token_scores"] = scores
            self._asked = owners, scores
        return inputs

    def _add(self) -> None:
        """Add the micro-batch that was asked for last; the device is not waited for."""
        if self._asked is None:
            return
        owners, scores = self._asked
        self._asked = None
        wide = torch.cat([scores.to(self._step.dtype), torch.ones_like(scores[:1], dtype=self._step.dtype)])
        # not index_add_, for which CUDA has no deterministic kernel
        for number in range(len(self.names)):
            self._step[number] += torch.where(owners == number, wide, 0.0).sum(dim=1)

    def keep(self, *, taken: bool) -> None:
        """End a step; one that changed no weight does not count."""
        self._add()
        if taken:
            self._since += self._step
        self._step.zero_()

    def read(self) -> dict[str, float]:
        """What was trained since the last reading, on all ranks, as flat logs. Collective."""
        found = _logged(self._since, self.names, "")
        self._since.zero_()
        return found

    def read_evaluation(self, prefix: str) -> dict[str, float]:
        """What was asked for outside of a step, on all ranks, as flat logs. Collective."""
        self._add()
        found = _logged(self._step, self.names, f"{prefix}_")
        self._step.zero_()
        return found


def _logged(sums: torch.Tensor, names: Sequence[str], prefix: str) -> dict[str, float]:
    sums = sums.clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    rows = sums.tolist()
    total, num_tokens = sum(row[0] for row in rows), sum(row[2] for row in rows)
    if not num_tokens:
        return {}
    logs: dict[str, float] = {f"{prefix}token_loss": total / num_tokens}
    for name, (loss, hits, tokens) in zip(names, rows, strict=True):
        if tokens:
            logs |= {
                f"{prefix}loss{_KEY}{name}": loss / tokens,
                f"{prefix}accuracy{_KEY}{name}": hits / tokens,
                f"{prefix}tokens{_KEY}{name}": int(tokens),
            }
    return logs


def nested(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Logs with `loss_by_source: {NAME: {loss, accuracy, tokens}}` in place of the flat names."""
    found: dict[str, Any] = {}
    for key, value in logs.items():
        field, separator, name = key.partition(_KEY)
        prefix, _, kind = field.rpartition("_")
        if separator and kind in _FIELDS:
            group = f"{prefix}_loss_by_source" if prefix else "loss_by_source"
            found.setdefault(group, {}).setdefault(name, {})[kind] = value
        else:
            found[key] = value
    return found
