"""Health checks and stop/save requests during a stage."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.fault_tolerance.signals import Signals
from llava_llama31.trainer.fault_tolerance.step_health import Health, Records, culprits_of, summed
from llava_llama31.trainer.fault_tolerance.watchdog import Watchdog


HEALTH = "health.json"


class StopRequests(TrainerCallback):
    """Acts on requests at the end of a step, on all processes alike, whichever of them received the request.

    The first signal saves and stops. A file `save-now` in the run's folder saves and is then removed.

    Args:
        signals: of this process.
        save_now: path of that file on rank 0, which looks for it; None on the others.
    """

    def __init__(self, signals: Signals, save_now: Path | None):
        self.signals, self.save_now = signals, save_now
        self.stopped = False
        self._stop = self._save = False

    def asked(self) -> tuple[float, float]:
        """Whether this process was asked to stop, and whether to save, as 0 or 1."""
        return float(self.signals.received is not None), float(self.save_now is not None and self.save_now.exists())

    def agree(self, stop: float, save: float) -> None:
        """Set the requests summed over all processes."""
        self._stop, self._save = stop > 0, save > 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self._stop:
            self.stopped = True
            control.should_log = control.should_save = control.should_training_stop = True
        if self._save:
            control.should_log = control.should_save = True
            if self.save_now is not None:
                self.save_now.unlink(missing_ok=True)


@dataclass(frozen=True)
class Guard:
    """Everything that watches a stage.

    Args:
        where: the stage, as messages and `--set` name it.
        health: judges loss and gradient norm.
        requests: from outside, to stop or save.
        watchdog: ends a hung process.
        loader_timeout: seconds that a data worker may take for a micro-batch; 0: no limit.
    """

    where: str
    health: Health
    requests: StopRequests
    watchdog: Watchdog
    loader_timeout: float

    def judge(
        self,
        step: int,
        losses: Sequence[torch.Tensor],
        grad_norm: torch.Tensor | float,
        records: Callable[[], Records],
        device: torch.device,
    ) -> tuple[bool, float]:
        """Judge a step before the optimizer runs; returns whether to skip it, and its gradient norm.

        Every process calls this once a step. It is the step's one collective of ours and one wait for the device,
        which carry requests from outside too.

        Args:
            losses: of this process's micro-batches.
            records: ids of the step; asked for if something is wrong.

        Raises:
            Unhealthy: on all processes alike, if the finding stops the stage.
        """
        num_processes = dist.get_world_size() if dist.is_initialized() else 1
        stop, save, loss, norm = summed([*self.requests.asked(), torch.stack(list(losses)).sum(), grad_norm], device)
        self.requests.agree(stop, save)
        norm /= num_processes
        finding = self.health.judge(loss / num_processes, norm)
        culprits = culprits_of(losses, records) if finding else {}
        self.health.note(step, finding, culprits)
        if finding is not None:
            self.health.act(step, finding, culprits, self.where)
        return finding is not None and finding.action == "skip", norm

    def save(self, folder: Path) -> None:
        """Write the state that a resumed run needs into a checkpoint."""
        atomic_folders.write_json(folder / HEALTH, self.health.state())

    def restore(self, checkpoint: Path) -> None:
        """Restore it; older checkpoints do not contain it."""
        if (checkpoint / HEALTH).is_file():
            self.health.restore(atomic_folders.read_json(checkpoint / HEALTH))
