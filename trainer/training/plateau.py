"""Ends a stage whose evaluations no longer get better."""

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_llama31.trainer.recipes.schema import Stage


class StopOnPlateau(TrainerCallback):
    """Stops after this many evaluations in a row without a better one, judged by the log: a resumed stage agrees."""

    def __init__(self, stage: Stage):
        self.stage = stage

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if is_flat(state.log_history, self.stage):
            control.should_training_stop = True


def is_flat(history: Sequence[dict[str, Any]], stage: Stage) -> bool:
    """Whether the stage's last evaluations, as many as it allows, were none better than the best before them."""
    if stage.stop_on_plateau is None:
        return False
    metric = metric_of(stage)
    values = [entry[metric] for entry in history if metric in entry]
    if not values:
        return False
    best = (max if metric == "eval_accuracy" else min)(values)
    return len(values) - 1 - values.index(best) >= stage.stop_on_plateau


def metric_of(stage: Stage) -> str:
    """What decides: accuracy where the stage keeps the most accurate weights or holds no rows out, else the loss."""
    by_accuracy = stage.keep == "best_accuracy" or not stage.validation_fraction
    return "eval_accuracy" if by_accuracy else "eval_loss"
