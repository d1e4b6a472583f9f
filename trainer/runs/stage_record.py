"""What the model card and the summary say about a stage."""

from dataclasses import asdict
from typing import Any

from llava_llama31.trainer.data.batches.stage_rows import StageData
from llava_llama31.trainer.model.module_groups import GroupReport
from llava_llama31.trainer.recipes.derived import Derived
from llava_llama31.trainer.recipes.schema import Stage
from llava_llama31.trainer.runs.context import StageRun
from llava_llama31.trainer.training.llava_trainer import LlavaTrainer
from llava_llama31.trainer.training.source_losses import nested


def stage_record(
    run: StageRun, data: StageData, derived: Derived, report: list[GroupReport], trainer: LlavaTrainer
) -> dict[str, Any]:
    """Data, steps, losses and settings of the finished stage."""
    stage, history = run.stage, trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    metrics = _final_metrics(trainer)
    seconds = next((entry["seconds"] for entry in reversed(history) if "seconds" in entry), 0.0)
    steps = trainer.state.global_step  # fewer than planned after a plateau
    tokens = int(trainer.throughput.trained(steps)[1])
    return {
        "name": run.name,
        "trainable": [line.group for line in report if line.num_trainable],
        "groups": [asdict(line) for line in report],
        "learning_rate": stage.learning_rates(),
        "data": data.summary,
        "epochs": stage.epochs or round(steps / derived.steps_per_epoch, 3),
        "steps": steps,
        "global_batch": stage.global_batch,
        "micro_batch": stage.micro_batch,
        "gradient_accumulation": derived.gradient_accumulation,
        "num_processes": run.context.num_processes,
        "num_samples": derived.num_samples,
        "schedule": stage.schedule,
        "warmup_steps": derived.warmup_steps,
        "weight_decay": stage.weight_decay,
        "precision": stage.precision,
        "optimizer": stage.optimizer,
        "fp8": stage.fp8,
        "lora": _lora(stage),
        "init_from": str(run.origin),
        "loss_first": losses[0] if losses else None,
        "loss": losses[-1] if losses else None,
        "loss_by_source": _by_source(history, "loss_by_source"),
        "validation_by_source": nested(metrics).get("eval_loss_by_source"),
        "loss_curve": [(entry["step"], entry["loss"]) for entry in history if "loss" in entry],
        "validation_curve": [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry],
        "health": trainer.guard.health.summary(),
        "weights_of_step": trainer.state.best_global_step or steps,
        "validation_loss": metrics.get("eval_loss"),
        "validation_accuracy": metrics.get("eval_accuracy"),
        "validation_metrics": {name: metrics[name] for name in metrics if name.startswith("eval_")},
        "supervised_tokens": tokens,
        "supervised_tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "minutes": round(seconds / 60, 2),
    }


def _by_source(history: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """The last logged loss, accuracy and tokens of each source, and the first loss that was logged of it."""
    found: dict[str, Any] = {}
    for entry in history:
        for name, values in nested(entry).get(key, {}).items():
            found[name] = {"loss_first": found.get(name, {}).get("loss_first", values["loss"]), **values}
    return found


def _final_metrics(trainer: LlavaTrainer) -> dict[str, Any]:
    """Metrics of the stage's final weights; evaluated now unless they were at their step."""
    step = trainer.state.best_global_step or trainer.state.global_step
    for entry in reversed(trainer.state.log_history):
        if entry["step"] == step and ("eval_loss" in entry or "eval_accuracy" in entry):
            return entry
    measures = len(trainer.batches.validation) > 0 or len(trainer.batches.questions) > 0
    return trainer.evaluate() if measures else {}


def _lora(stage: Stage) -> dict[str, Any] | None:
    """The adapters that the stage trained, with ranks by group."""
    if stage.lora is None:
        return None
    content = stage.lora.model_dump(exclude_none=True)
    left_out = () if "language_model" in stage.adapted else ("r", "alpha", "targets")
    return {key: value for key, value in content.items() if key not in left_out}
