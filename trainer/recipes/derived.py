"""What follows from a stage, its data and the number of devices: accumulation, steps, validation rows."""

import math
from dataclasses import dataclass

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.schema import Stage


@dataclass(frozen=True)
class Derived:
    """What follows from a stage, its number of training samples and the number of devices."""

    num_samples: int
    num_processes: int
    gradient_accumulation: int
    steps_per_epoch: int
    steps: int
    warmup_steps: int


def num_held_out(stage: Stage, num_rows: int) -> int:
    """Validation rows: the stage's fraction, but one at least where there is a fraction."""
    return max(1, int(num_rows * stage.validation_fraction)) if stage.validation_fraction else 0


def derive(stage: Stage, num_samples: int, num_processes: int, *, where: str = "") -> Derived:
    """Accumulation and steps of a stage.

    Raises:
        UserError: when the global batch does not divide among the devices, or no step remains.
    """
    per_pass = stage.micro_batch * num_processes
    if stage.global_batch % per_pass:
        raise UserError(
            f"global_batch {stage.global_batch} is not a multiple of micro_batch {stage.micro_batch} x "
            f"{num_processes} devices = {per_pass}",
            where=where,
            fix="change micro_batch or the number of devices",
        )
    if num_samples == 0:
        held_out = " but those held out" if stage.validation_fraction else ""
        raise UserError(
            f"there is no sample to train on{held_out}",
            where=where,
            fix="add data" + (", or lower validation_fraction" if stage.validation_fraction else ""),
        )
    whole, rest = divmod(num_samples, stage.global_batch)
    steps_per_epoch = whole + (rest > 0 and stage.last_batch == "keep")
    if steps_per_epoch == 0:
        raise UserError(
            f"{num_samples} samples do not fill one batch of {stage.global_batch}",
            where=where,
            fix="add data, lower global_batch, or set last_batch: keep",
        )
    steps = stage.max_steps or math.ceil((stage.epochs or 0) * steps_per_epoch)
    return Derived(
        num_samples=num_samples,
        num_processes=num_processes,
        gradient_accumulation=stage.global_batch // per_pass,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        warmup_steps=math.ceil(steps * stage.warmup_ratio),
    )


def check_evaluations(stage: Stage, num_steps: int, *, where: str) -> None:
    """Check that a stage that keeps its best weights evaluates any.

    Raises:
        UserError: its first evaluation would come after its last step.
    """
    if stage.keep != "last" and stage.eval_steps is not None and stage.eval_steps > num_steps:
        raise UserError(
            f"keep: {stage.keep} has nothing to choose from: the first evaluation is at step {stage.eval_steps}, the "
            f"last step is {num_steps}",
            where=where,
            fix=f"set eval_steps to {num_steps} or less, or keep: last",
        )


def remarks(stage: Stage, derived: Derived) -> list[str]:
    """What a stage does otherwise than its keys seem to say."""
    found = []
    if derived.num_samples < stage.global_batch:
        found.append(
            f"a step has {derived.num_samples} samples, not {stage.global_batch}: there are no more, and batches do "
            "not go past the end of an epoch"
        )
    if stage.eval_steps is not None and stage.eval_steps > derived.steps:
        found.append(
            f"no evaluation before the end: eval_steps is {stage.eval_steps}, the last step is {derived.steps}"
        )
    return found
