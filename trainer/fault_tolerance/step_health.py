"""Whether a step's loss and gradient norm are what training may go on with."""

import logging
import math
import os
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from llava_llama31.trainer.errors import Unhealthy


logger = logging.getLogger(__name__)

# a spike is what OLMo's trainer calls one: beyond mean + 6 sigma of the last 128 steps, of which half must be there
WINDOW, SIGMAS, ENOUGH = 128, 6.0, 64
# weights that are broken give no finite step any more
MOST_SKIPPED_IN_A_ROW = 10

Action = Literal["warn", "skip", "stop"]
Records = list[list[list[str]]]  # of a step, by rank and micro-batch


class HealthFinding(NamedTuple):
    """What is wrong with a step."""

    what: str
    is_finite: bool
    action: Action


class Health:
    """Judges steps; every process is shown the same numbers, and so decides alike.

    Spikes and steps that were skipped for one stay in the window, so that a new level is soon no spike any more.

    Args:
        on_nonfinite: what becomes of a step whose loss or gradient norm is not finite.
        on_spike: and of one whose loss or gradient norm is a spike.
        can_skip: whether skipping is to be advised.
    """

    def __init__(self, *, on_nonfinite: Literal["stop", "skip"], on_spike: Action, can_skip: bool = True):
        self.on_nonfinite, self.on_spike, self.can_skip = on_nonfinite, on_spike, can_skip
        self.windows = {name: deque[float](maxlen=WINDOW) for name in ("loss", "gradient norm")}
        self.num_skipped = self.num_spikes = self._in_a_row = 0
        self.events: list[dict[str, Any]] = []

    def judge(self, loss: float, grad_norm: float) -> HealthFinding | None:
        """A step before its optimizer has run; None: nothing is wrong."""
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
            culprits: ids of the records it may come from, by rank.
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
        """Say what was found, or stop.

        Raises:
            Unhealthy: on every process alike.
        """
        blamed = "; ".join(f"rank {rank}: records {_listed(ids)}" for rank, ids in culprits.items())
        line = f"{finding.what}; {blamed}"
        if finding.action == "stop":
            key = "on_spike" if finding.is_finite else "on_nonfinite"
            skipping = f", or go on with --set {where}.{key}=skip" if self.can_skip else ""
            fix = f"look at these records, lower the learning rate{skipping}"
            raise Unhealthy(line, where=f"{where}, step {step}", fix=fix)
        if self._in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise Unhealthy(
                f"the {self._in_a_row}th step in a row that is skipped: {line}",
                where=f"{where}, step {step}",
                fix="lower the learning rate, or remove checkpoints until one that is sound",
            )
        if os.environ.get("RANK", "0") == "0":
            logger.warning("%s, step %d%s: %s", where, step, " skipped" * (finding.action == "skip"), line)

    def summary(self) -> dict[str, Any]:
        """For the stage's record."""
        return {"skipped_steps": self.num_skipped, "spikes": self.num_spikes, "events": self.events}

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        windows = {name: list(window) for name, window in self.windows.items()}
        return {"windows": windows, "in_a_row": self._in_a_row, **self.summary()}

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave, so that a resumed run decides as an uninterrupted one."""
        for name, window in self.windows.items():
            window.clear()
            window.extend(state["windows"][name])
        self._in_a_row, self.events = state["in_a_row"], state["events"]
        self.num_skipped, self.num_spikes = state["skipped_steps"], state["spikes"]


def culprits_of(losses: Sequence[torch.Tensor], records: Callable[[], Records]) -> dict[int, list[str]]:
    """Records that a step's finding may come from, by rank: of the micro-batches whose loss is not finite, else all.

    Every process calls this together; it costs, and is for steps with a finding.

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
    """Each value's sum over the processes: one collective where there are several, one wait for the device."""
    total = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total.tolist()


def _listed(ids: Sequence[str], most: int = 16) -> str:
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")
