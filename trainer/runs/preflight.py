"""What would stop a run later, found before its first step."""

import socket
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.data.batches.device_tiles import DeviceTiles
from llava_llama31.trainer.data.batches.stage_rows import check_stage
from llava_llama31.trainer.data.check.report import check_policy
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.export.export import licence_texts
from llava_llama31.trainer.export.provenance import base_models_of
from llava_llama31.trainer.model.device_options import check_device_options
from llava_llama31.trainer.model.locating import local_checkpoint
from llava_llama31.trainer.publishing.beforehand import check_beforehand, check_strategy
from llava_llama31.trainer.recipes.derived import check_evaluations as check_best
from llava_llama31.trainer.recipes.derived import derive
from llava_llama31.trainer.recipes.schema import Publish, Stage
from llava_llama31.trainer.runs.base_model import base_of, is_ours
from llava_llama31.trainer.runs.context import RunContext
from llava_llama31.trainer.runs.final_evaluation import check_evaluations
from llava_llama31.trainer.runs.inputs import run_inputs, settle_inputs
from llava_llama31.trainer.training.training_args import check_deepspeed, check_training_arguments


def check_shared(folder: RunFolder, state: PartialState) -> None:
    """Every process has to see the run's folder: rank 0 writes weights there that all read.

    Raises:
        UserError: on all processes, naming the machines that do not.
    """
    if state.num_processes == 1:
        return
    mark = folder.shared_mark
    (token,) = broadcast_object_list([uuid4().hex])
    if state.is_main_process:
        mark.write_text(token, encoding="utf-8")
    state.wait_for_everyone()
    sees = mark.is_file() and mark.read_text(encoding="utf-8") == token
    blind = sorted({host for host, there in gather_object([(socket.gethostname(), sees)]) if not there})
    if blind:
        raise UserError(
            f"not the same folder on {', '.join(blind)}",
            where=str(folder.path),
            fix="choose an --output on a file system that all machines share",
        )


def check_stages(stages: Mapping[str, Stage], publish: Publish | None, num_processes: int) -> None:
    """Check the settings of all stages, as they are launched.

    Raises:
        UserError: naming the key and its fix.
    """
    if publish is not None:
        check_strategy(publish, stages)
    for name, stage in stages.items():
        where = f"stages.{name}"
        derived = derive(stage, stage.global_batch, num_processes, where=where)
        if stage.max_steps:  # of epochs, the steps are known with the data
            check_best(stage, stage.max_steps, where=where)
        check_policy(stage.on_bad_record)
        check_device_options(stage, where)
        if stage.deepspeed:
            check_deepspeed(stage, where)
        check_training_arguments(stage, derived, where=where)
        if stage.init_from != "previous":
            folder = local_checkpoint(stage.init_from, where=f"{where}.init_from")
            if not is_ours(folder):
                raise UserError(
                    f"{folder} does not have this package's processor",
                    where=f"{where}.init_from",
                    fix="join its parts with `llava-llama31 assemble` first, or name it as model.checkpoint",
                )


def check_publishing(run: RunContext) -> dict[str, Any] | None:
    """What would keep the run from being published; the record of its cards, where it is to be."""
    recipe = run.recipe
    if recipe.publish is None:
        return None
    base, begun = base_of(recipe, run.folder), run.folder.has_begun()
    return check_beforehand(recipe, recipe.publish, base, command=run.command, begun=begun, say=run.console.print)


def check_inputs(run: RunContext) -> None:
    """Check licences, the data of all stages, the questions, and that all are what the run began with.

    Raises:
        UserError: naming what to fix.
    """
    recipe = run.recipe
    licence_texts(base_models_of(recipe))
    processor = LlavaLlama31Processor.from_pretrained(base_of(recipe, run.folder))
    reports = {}
    for name, stage in recipe.stages.items():
        if stage.device_tiles:
            DeviceTiles(processor, where=f"stages.{name}.device_tiles")  # fail here rather than at a later stage
        reports[name] = check_stage(stage, processor, run.stage_folder(name).rejects)
        for source in reports[name].sources:
            if source.not_read:
                run.console.print(f"stages.{name}: {source.name}: {source.not_read_line()}")
    settle_inputs(run, run_inputs(run, reports))
    check_evaluations(recipe)
