"""Experiment trackers of a recipe: one run a stage, named RECIPE/STAGE, which a resumed stage continues."""

import os
import uuid
from pathlib import Path
from typing import Any

from transformers.integrations import INTEGRATION_TO_CALLBACK, TensorBoardCallback, WandbCallback

from llava_llama31.trainer.recipes.schema import Recipe, Stage
from llava_llama31.trainer.runs.context import StageRun
from llava_llama31.trainer.training.llava_trainer import LlavaTrainer


def with_trackers(recipe: Recipe, name: str, stage: Stage) -> Stage:
    """A stage that reports to the recipe's trackers; what it says itself counts."""
    if not recipe.report_to and "report_to" not in stage.trainer_args:
        return stage
    named: dict[str, Any] = {
        "report_to": list(recipe.report_to),
        "run_name": f"{recipe.name}/{name}",
        "project": recipe.name,
    }
    return stage.model_copy(update={"trainer_args": named | stage.trainer_args})


def continue_trackers(run: StageRun, trainer: LlavaTrainer, step: int) -> None:
    """Let each tracker have one run a stage, which a resumed stage continues.

    TensorBoard's has no steps after `step` that an earlier start logged. trackio finds its run by project and name.
    """
    if not run.context.is_main:
        return
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.tb_writer = _summary_writer(tensorboard_folder(run), purge_step=step + 1)
        elif isinstance(callback, WandbCallback):
            _open_wandb(run, trainer.args.run_name or run.name, resumed=step > 0)


def _open_wandb(run: StageRun, name: str, *, resumed: bool) -> None:
    """Open the stage's run, which the callback then takes: by itself it would use a project of all and a new run."""
    import wandb

    file = run.folder.wandb_id
    if not (resumed and file.is_file()):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(uuid.uuid4().hex, encoding="utf-8")
    wandb.init(
        project=os.environ.get("WANDB_PROJECT", run.context.recipe.name),
        name=name,
        id=file.read_text(encoding="utf-8"),
        resume="allow",
        dir=os.environ.get("WANDB_DIR", str(run.context.folder.path)),
    )


def end_trackers(trainer: LlavaTrainer) -> None:
    """Log no more to trackers: after the end of training each would begin another run for it."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, WandbCallback):
            import wandb

            wandb.finish()  # an open run would take the next stage's figures
    for kind in INTEGRATION_TO_CALLBACK.values():
        trainer.remove_callback(kind)


def tensorboard_folder(run: StageRun) -> Path:
    """Where a stage's events are: RUN/tensorboard/STAGE, or below TENSORBOARD_LOGGING_DIR."""
    named = os.environ.get("TENSORBOARD_LOGGING_DIR")
    root = Path(named).expanduser() / run.context.recipe.name if named else run.context.folder.path / "tensorboard"
    return root / run.name


def _summary_writer(folder: Path, *, purge_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # Transformers takes either
        from tensorboardX import SummaryWriter as OtherWriter

        return OtherWriter(log_dir=str(folder), purge_step=purge_step)
    return SummaryWriter(log_dir=str(folder), purge_step=purge_step)
