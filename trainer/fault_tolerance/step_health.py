"""Detects non-finite losses and loss spikes."""

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from llava_llama31.trainer.distributed.devices import widest_float
from llava_llama31.trainer.distributed.rank import rank
from llava_llama31.trainer.errors import Unhealthy


logger = logging.getLogger(__name__)

# a spike as OLMo's trainer defines it: above mean + 6 sigma of the last 128 steps, once half of them are recorded
WINDOW, SIGMAS, ENOUGH = 128, 6.0, 64
# broken weights never give a finite step again
MOST_SKIPPED_IN_A_ROW = 10

Action = Literal["warn", "skip", "stop"]
Records = list[list[list[str]]]  # record ids of a step, by rank and micro-batch


class HealthFinding(NamedTuple):
    """What is wrong with a step.

    Args:
        what: for the user.
        is_finite: a spike; otherwise a loss or gradient norm that is not finite.
        action: what the recipe says to do about it.
    """

    what: str
    is_finite: bool
    action: Action


class Health:
    """Judges steps; every process sees the same numbers and so decides alike.

    Spikes, skipped or not, stay in the window, so that a new level soon stops counting as a spike.

    Args:
        on_nonfinite: what to do with a step whose loss or gradient norm is not finite.
        on_spike: what to do with a step whose loss or gradient norm is a spike.
        can_skip: whether messages may advise skipping.
    """

    def __init__(self, *, on_nonfinite: Literal["stop", "skip"], on_spike: Action, can_skip: bool = True):
        self.on_nonfinite, self.on_spike, self.can_skip = on_nonfinite, on_spike, can_skip
        self.windows = {name: deque[float](maxlen=WINDOW) for name in ("loss", "gradient norm")}
        self.num_skipped = self.num_spikes = self._in_a_row = 0
        self.events: list[dict[str, Any]] = []

    def judge(self, loss: float, grad_norm: float) -> HealthFinding | None:
        """Judge a step before its optimizer runs; None: nothing is wrong."""
        values = {"loss": loss, "gradient norm": grad_norm}
        if wrong := [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]:
            return HealthFinding(", ".join(wrong), False, self.on_nonfinite)
        spikes = []
        for name, value in values.items():
            window = self.windows[name]
            if len(window) >= ENOUGH:
                mean, sigma = statistics.fmean(window), statistics.pstdev(window)
                if value > mean + SIGMAS * sigma:
                    spikes.append(f"{name} {value:.4g} is a spike ({mean:.4g} +- {sigma:.2g} before)")
            window.append(value)
        return HealthFinding(", ".join(spikes), True, self.on_spike) if spikes else None

    def note(self, step: int, finding: HealthFinding | None, culprits: dict[int, list[str]]) -> None:
        """Count a judged step.

        Args:
            culprits: ids of the records that may have caused the finding, by rank.
        """
        skipped = finding is not None and finding.action == "skip"
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if finding is None:
            return
        self.num_skipped += skipped
        self.num_spikes += finding.is_finite
        records = {str(rank): ids for rank, ids in culprits.items()}
        self.events.append({"step": step, "what": finding.what, "action": finding.action, "records": records})

    def skipped_after(self, step: int) -> int:
        """How many steps after this one were skipped."""
        return sum(event["action"] == "skip" and event["step"] > step for event in self.events)

    def act(self, step: int, finding: HealthFinding, culprits: dict[int, list[str]], where: str) -> None:
        """Report a finding, or stop.

        Raises:
            Unhealthy: on every process alike, if the run stops.
        """
        blamed = "; ".join(f"rank {rank}: records {_listed(ids)}" for rank, ids in culprits.items())
        line = f"{finding.what}; {blamed}"
        if finding.action == "stop":
            key = "on_spike" if finding.is_finite else "on_nonfinite"
            skipping = f", or skip such steps with --set {where}.{key}=skip" if self.can_skip else ""
            fix = f"look at these records, lower the learning rate{skipping}"
            raise Unhealthy(line, where=f"{where}, step {step}", fix=fix)
        if self._in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise Unhealthy(
                f"{self._in_a_row} steps in a row were skipped: {line}",
                where=f"{where}, step {step}",
                fix="lower the learning rate, or remove the newest checkpoints back to a healthy one",
            )
        if rank() == 0:
            logger.warning("%s, step %d%s: %s", where, step, " skipped" * (finding.action == "skip"), line)

    def summary(self) -> dict[str, Any]:
        """Summary for the stage's stage.json."""
        return {"skipped_steps": self.num_skipped, "spikes": self.num_spikes, "events": self.events}

    def state(self) -> dict[str, Any]:
        """State to store in a checkpoint, as JSON."""
        windows = {name: list(window) for name, window in self.windows.items()}
        return {"windows": windows, "in_a_row": self._in_a_row, **self.summary()}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned, so that a resumed run decides like an uninterrupted one."""
        for name, window in self.windows.items():
            window.clear()
            window.extend(state["windows"][name])
        self._in_a_row, self.events = state["in_a_row"], state["events"]
        self.num_skipped, self.num_spikes = state["skipped_steps"], state["spikes"]


def culprits_of(losses: Sequence[torch.Tensor], records: Callable[[], Records]) -> dict[int, list[str]]:
    """Records that may have caused a finding, by rank: those of micro-batches with a non-finite loss, else all.

    Collective and slow; only for steps with a finding.

    Args:
        losses: of this process's micro-batches.
        records: ids of the step.
    """
    mine = [loss.item() for loss in losses]
    by_rank = [mine]
    if dist.is_initialized():
        by_rank = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(by_rank, mine)
    wrong = [[not math.isfinite(loss) for loss in losses] for losses in by_rank]
    everything = not any(map(any, wrong))
    found = {
        rank: [
            record
            for ids, is_wrong in zip(micro_batches, wrong[rank], strict=True)
            if everything or is_wrong
            for record in ids
        ]
        for rank, micro_batches in enumerate(records())
    }
    return {rank: ids for rank, ids in found.items() if ids}


def summed(values: Sequence[torch.Tensor | float], device: torch.device) -> list[float]:
    """Sum each value over the processes: one collective if there are several, and one device sync."""
    dtype = widest_float(device)
    there = [
        # copied from the host, each number would make it wait
        value.to(device, dtype)
        if isinstance(value, torch.Tensor)
        else torch.full((), value, dtype=dtype, device=device)
        for value in values
    ]
    total = torch.stack(there)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total.tolist()


def _listed(ids: Sequence[str], most: int = 16) -> str:
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")
