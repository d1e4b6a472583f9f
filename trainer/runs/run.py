"""A recipe from its parts to an evaluated, exported model: every stage in turn, resumed where it stopped."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.distributed.devices import refuse_unbuilt_gpu, refuse_unused_gpus, uses_cpu
from llava_llama31.trainer.distributed.engine import as_launched, forget_deepspeed
from llava_llama31.trainer.distributed.rank import is_launched
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.fault_tolerance.peers import launched_processes
from llava_llama31.trainer.fault_tolerance.signals import Signals
from llava_llama31.trainer.fault_tolerance.watchdog import start_fork_server
from llava_llama31.trainer.model.device_options import prepare_cublas
from llava_llama31.trainer.model.locating import local_checkpoint
from llava_llama31.trainer.publishing.publish_run import publish_run
from llava_llama31.trainer.publishing.pusher import pushing
from llava_llama31.trainer.recipes.schema import Recipe
from llava_llama31.trainer.report.page import write_report
from llava_llama31.trainer.report.run_facts import run_facts
from llava_llama31.trainer.runs.base_model import base_of, prepare
from llava_llama31.trainer.runs.console import make_console, print_summary
from llava_llama31.trainer.runs.context import RunContext, StageRun
from llava_llama31.trainer.runs.final_evaluation import check_evaluations
from llava_llama31.trainer.runs.finish import finish
from llava_llama31.trainer.runs.finished import finished_line
from llava_llama31.trainer.runs.named_paths import check_paths
from llava_llama31.trainer.runs.origins import at_revisions, resolve_revisions
from llava_llama31.trainer.runs.precision import at_precision, settle_precision
from llava_llama31.trainer.runs.preflight import check_inputs, check_publishing, check_shared, check_stages
from llava_llama31.trainer.runs.stage import run_stage
from llava_llama31.trainer.runs.text_ability import BEFORE, check_text, forget_text
from llava_llama31.trainer.runs.trackers import with_trackers


def run_recipe(recipe: Recipe, output: Path, *, command: str, signals: Signals) -> dict[str, Any] | None:
    """Run what is left of a recipe in `output`; returns the summary on rank 0.

    Args:
        signals: what comes in while it runs.

    Raises:
        Interrupted: after a signal; while a stage trained, the checkpoint is written.
        UserError: naming what to fix.
        EndedElsewhere: another process of the run failed first.
    """
    refuse_unused_gpus()
    prepare_cublas(recipe.stages.values())
    if not uses_cpu() and torch.accelerator.device_count() > 1 and not is_launched(cpu=False):
        raise UserError(  # Transformers would share each micro-batch among them
            f"{torch.accelerator.device_count()} GPUs are visible to one process",
            fix="add --devices N, start it with `accelerate launch`, or set CUDA_VISIBLE_DEVICES",
        )
    if any(stage.dataloader_workers for stage in recipe.stages.values()):
        start_fork_server(["llava_llama31.trainer.runs.worker_imports"])
    with launched_processes(cpu=uses_cpu()) as (state, peers):
        transformers.utils.logging.disable_progress_bar()
        refuse_unbuilt_gpu(state.device)
        run = RunContext(
            recipe=recipe,
            folder=RunFolder(output),
            num_processes=state.num_processes,
            is_main=state.is_main_process,
            console=make_console(),
            signals=signals,
            peers=peers,
            command=command,
        )
        with run.folder.claimed(recipe, is_main=run.is_main):
            return _run(run, state)


def _run(run: RunContext, state: PartialState) -> dict[str, Any] | None:
    folder, recipe = run.folder, run.recipe
    with folder.clocked(is_main=run.is_main) as minutes:
        check_shared(folder, state)
        if folder.summary.is_file():
            forget_deepspeed()
            run.console.print(finished_line(recipe, folder))
            if not run.is_main:
                return None
            return publish_run(
                recipe.publish, folder.path, atomic_folders.read_json(folder.summary), run.console.print
            )
        if run.is_main:
            check_paths(recipe, folder.path)
        (settled,) = broadcast_object_list([_settle(run) if run.is_main else None])
        recipe = at_precision(at_revisions(recipe, settled[0]), settled[1])
        stages = {
            name: with_trackers(recipe, name, as_launched(stage, f"stages.{name}"))
            for name, stage in recipe.stages.items()
        }
        run = replace(run, recipe=recipe, launched=stages)
        forget_deepspeed()
        check_stages(stages, recipe.publish, run.num_processes)
        record = None
        if run.is_main:
            prepare(recipe, folder, run.console)
            record = check_publishing(run)
            check_inputs(run)
        run.peers.await_main("checked")
        if state.is_local_main_process and not run.is_main:
            check_evaluations(recipe)  # this machine's processes will ask some of the questions
        with pushing(recipe, folder.path, record, run.console.print) as pusher:
            final, records = _run_stages(replace(run, pusher=pusher))
            summary = finish(run, final, records, minutes)
            if summary is None:
                return None
            if pusher is not None:
                summary["saves"] = pusher.close(finish=True)
        atomic_folders.write_json(folder.summary, summary)
        print_summary(run.console, summary, atomic_folders.read_json(folder.record))
        write_report([run_facts(folder.path)], folder.report)
        run.console.print(f"report: {folder.report}")
        return publish_run(recipe.publish, folder.path, summary, run.console.print)


def _settle(run: RunContext) -> tuple[dict[str, str], dict[str, str]]:
    """Revisions of what comes from the Hub, and the precision of each stage: those that the run began with."""
    recipe, folder, say = run.recipe, run.folder, run.console.print
    precision = settle_precision(recipe, folder, on_cpu=uses_cpu(), say=say)
    return resolve_revisions(recipe, folder, say), precision


def _run_stages(run: RunContext) -> tuple[Path, list[dict[str, Any]]]:
    """Run every stage that has not finished, in turn; returns the weights of the last one, and all records."""
    origin, records = base_of(run.recipe, run.folder), []
    check_text(run, BEFORE, origin, 0)
    for name, stage in run.launched.items():
        folder = run.stage_folder(name)
        if stage.init_from != "previous":
            origin = local_checkpoint(stage.init_from, where=f"stages.{name}.init_from")
        # rank 0 reads all of its weights to be sure; the others believe it
        (record,) = broadcast_object_list([folder.finished_record() if run.is_main else None])
        if record is None:
            folder.path.mkdir(parents=True, exist_ok=True)
            forget_text(run, name)
            record = run_stage(StageRun(context=run, name=name, stage=stage, origin=origin))
        else:
            run.console.print(f"stage {name} has already finished: {folder.final}")
        records.append(record)
        origin = folder.final
        check_text(run, name, origin, record["steps"])
    return origin, records
