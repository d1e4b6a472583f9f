"""The precision that a run computes in, settled once: float32 where its CPU would have to emulate bfloat16."""

from collections.abc import Callable, Mapping

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.costs.matrix_peak import CpuSpeed, measure_cpu_speed
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.recipes.schema import Recipe, Stage


_FAST = "a GPU, or a CPU with AVX512-BF16 or AMX"


def settle_precision(
    recipe: Recipe,
    folder: RunFolder,
    *,
    on_cpu: bool,
    say: Callable[[str], None],
    measure: Callable[[], CpuSpeed] = measure_cpu_speed,
) -> dict[str, str]:
    """The precision of every stage: the one that the run began with, also after a resume. For rank 0 alone.

    When a run begins, a stage without `precision` gets float32 if this CPU is slow in bfloat16. The choice is
    written to the run's folder.

    Args:
        on_cpu: whether the stages train on this machine's CPU.
        say: prints one line on what was chosen and why.
        measure: measures this CPU, where that matters.

    Raises:
        UserError: the recipe insists on a precision that is slow here, or that the run did not begin with.
    """
    begun = folder.has_begun()
    recorded = atomic_folders.read_json(folder.precision) if begun and folder.precision.is_file() else {}
    settled = {name: recorded.get(name, stage.precision) for name, stage in recipe.stages.items()}
    for name, stage in recipe.stages.items():
        if _is_explicit(stage) and stage.precision != settled[name]:
            raise UserError(
                f"this run began in {settled[name]}",
                where=f"stages.{name}.precision",
                fix="remove the key, or choose another --output",
            )
    narrow = [name for name, precision in settled.items() if precision != "float32"]
    speed = measure() if on_cpu and narrow else None
    if speed is not None and speed.is_slow_in_bfloat16:
        if begun:
            say(f"warning: {_listed(narrow)} in bfloat16, as this run began, and {speed}; it is faster on {_FAST}")
        else:
            for name in narrow:
                _refuse_explicit(recipe.stages[name], f"stages.{name}.precision", speed)
            settled |= dict.fromkeys(narrow, "float32")
            say(f"{_listed(narrow)} in float32: {speed}")
    if not begun:
        atomic_folders.write_json(folder.precision, settled)
    return settled


def at_precision(recipe: Recipe, settled: Mapping[str, str]) -> Recipe:
    """The recipe with its stages in this precision."""
    stages = {
        name: stage.model_copy(update={"precision": settled[name]}) if stage.precision != settled[name] else stage
        for name, stage in recipe.stages.items()
    }
    return recipe.model_copy(update={"stages": stages})


def _refuse_explicit(stage: Stage, where: str, speed: CpuSpeed) -> None:
    if _is_explicit(stage):
        raise UserError(
            f"{stage.precision} is emulated here: {speed}",
            where=where,
            fix=f"--set {where}=float32, or train on {_FAST}",
        )


def _is_explicit(stage: Stage) -> bool:
    return "precision" in stage.model_fields_set


def _listed(names: list[str]) -> str:
    return f"stage {names[0]} computes" if len(names) == 1 else f"stages {', '.join(names)} compute"
