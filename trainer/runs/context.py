"""What a run knows from its start, and what a stage of it adds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llava_llama31.trainer.checkpoint.run_folder import RunFolder, StageFolder
from llava_llama31.trainer.fault_tolerance.peers import Peers
from llava_llama31.trainer.fault_tolerance.signals import Signals
from llava_llama31.trainer.publishing.pusher import Pusher
from llava_llama31.trainer.recipes.schema import Recipe, Stage
from llava_llama31.trainer.terminal import Terminal


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """A run, made once by every process of it.

    Args:
        recipe: with its Hub ids at their resolved revisions.
        launched: the recipe's stages, with what the launcher decides for them.
        is_main: whether this process is rank 0.
        command: that started the run.
        pusher: pushes saves while stages train, on rank 0 of a run that asks for it.
    """

    recipe: Recipe
    folder: RunFolder
    num_processes: int
    is_main: bool
    console: Terminal
    signals: Signals
    peers: Peers
    command: str
    launched: Mapping[str, Stage] = field(default_factory=dict)
    pusher: Pusher | None = None

    def stage_folder(self, name: str) -> StageFolder:
        return self.folder.stage(name, self.recipe.stages)


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """A stage of a run.

    Args:
        origin: checkpoint that it starts from.
    """

    context: RunContext
    name: str
    stage: Stage
    origin: Path

    @property
    def folder(self) -> StageFolder:
        return self.context.stage_folder(self.name)

    @property
    def where(self) -> str:
        """The stage, as messages and `--set` name it."""
        return f"stages.{self.name}"

    @property
    def seed(self) -> int:
        return self.context.recipe.seed
