"""What a run checks before its first step, without the run: nothing is written but caches."""

from collections.abc import Callable
from pathlib import Path

from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.data.batches.device_tiles import DeviceTiles
from llava_llama31.trainer.data.batches.stage_rows import check_stage
from llava_llama31.trainer.distributed.devices import refuse_unused_gpus
from llava_llama31.trainer.export.export import licence_texts
from llava_llama31.trainer.export.provenance import base_models_of
from llava_llama31.trainer.recipes.schema import Recipe
from llava_llama31.trainer.runs.base_model import base_processor
from llava_llama31.trainer.runs.final_evaluation import check_evaluations
from llava_llama31.trainer.runs.named_paths import check_paths
from llava_llama31.trainer.runs.preflight import check_stages
from llava_llama31.trainer.runs.trackers import with_trackers


def dry_run(recipe: Recipe, output: Path, *, num_processes: int, say: Callable[[str], None]) -> None:
    """Check settings, paths, licences, the records of all stages and the questions; downloads go to the Hub's cache.

    Args:
        output: the run's folder, which need not be there.
        num_processes: that the run would have.
        say: prints a line on what can't be checked, and why.

    Raises:
        UserError: naming what to fix.
    """
    refuse_unused_gpus()
    folder = RunFolder(output)
    folder.refuse_other(recipe)
    check_paths(recipe, output)
    stages = {name: with_trackers(recipe, name, stage) for name, stage in recipe.stages.items()}
    check_stages(stages, recipe.publish, num_processes)
    if recipe.publish is not None:
        say(
            f"not checked: whether {recipe.publish.repo_id} can be written; `train` asks the Hub before the first step"
        )
    if recipe.prepare in ("tiny", "tiny-siglip") and not folder.prepared.is_dir():
        say("not checked: the data and the model's parts, which the run makes itself")
        return
    licence_texts(base_models_of(recipe))
    processor = base_processor(recipe, folder)
    for name, stage in recipe.stages.items():
        if stage.device_tiles:
            DeviceTiles(processor, where=f"stages.{name}.device_tiles")
        for source in check_stage(stage, processor, None).sources:
            say(f"stages.{name}: {source.name}: {len(source.rows):,} of {source.num_rows:,} records usable")
    check_evaluations(recipe)
