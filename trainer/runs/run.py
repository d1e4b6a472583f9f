"""A recipe from its parts to an evaluated, exported model: every stage in turn, resumed where it stopped."""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from pydantic import ValidationError
from rich.console import Console

from llava_llama31.processing import CHAT_TEMPLATE, LlavaLlama31Processor
from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.model.assemble import assemble
from llava_llama31.trainer.data.check.check import check_policy
from llava_llama31.trainer.runs.console import make_console
from llava_llama31.trainer.model.device_options import check_device_options
from llava_llama31.trainer.data.batches.device_tiles import DeviceTiles
from llava_llama31.trainer.distributed.engine import as_launched, forget_deepspeed
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.presets import PRESETS, check_ocr
from llava_llama31.trainer.evaluation.questions import load_questions
from llava_llama31.trainer.evaluation.textvqa import derangement
from llava_llama31.trainer.runs.finish import SUMMARY, base_models_of, finish, licence_texts
from llava_llama31.trainer.fault_tolerance.stage_guard import SAVE_NOW
from llava_llama31.trainer.model.locating import local_checkpoint
from llava_llama31.trainer.fault_tolerance.peers import Peers
from llava_llama31.trainer.publishing.beforehand import check_beforehand, check_strategy
from llava_llama31.trainer.publishing.command import publish_run
from llava_llama31.trainer.publishing.pusher import Pusher, pushing
from llava_llama31.trainer.recipes.schema import CHANGEABLE, Recipe, Stage, derive
from llava_llama31.trainer.fault_tolerance.signals import Signals
from llava_llama31.trainer.data.batches.stage_rows import check_stage
from llava_llama31.trainer.runs.stage import FINAL, StageRun, finished_record, run_stage
from llava_llama31.trainer.training.training_args import check_deepspeed, check_trainer_args
from llava_llama31.trainer.fault_tolerance.watchdog import start_fork_server


logger = logging.getLogger(__name__)

RECIPE, ELAPSED, BASE, SHARED = "recipe.json", "elapsed.json", "base", ".shared"


def run_recipe(recipe: Recipe, output: Path, *, command: str, signals: Signals) -> dict[str, Any] | None:
    """Run what is left of a recipe in `output`; returns the summary on the main process.

    Args:
        signals: what comes in while it runs.

    Raises:
        Interrupted: after a signal; while a stage trained, the checkpoint is written.
        UserError: naming what to mend.
        EndedElsewhere: another process of the run failed first.
    """
    if torch.cuda.device_count() > 1 and "RANK" not in os.environ:
        raise UserError(
            f"{torch.cuda.device_count()} GPUs are visible to one process",
            fix="start it with `accelerate launch examples/train.py RECIPE`, or set CUDA_VISIBLE_DEVICES",
        )
    # preparation and checks of the main process may take hours, during which the others wait
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=24))
    transformers.utils.logging.disable_progress_bar()
    start_fork_server()
    peers = Peers.connect(state.process_index, state.num_processes)
    try:
        with peers.together():
            return _run(recipe, output, command, signals, state, peers)
    finally:
        # threads of theirs that outlive the interpreter abort the process: another exit code, and a core dump
        state.destroy_process_group()
        peers.close()


def _run(
    recipe: Recipe, output: Path, command: str, signals: Signals, state: PartialState, peers: Peers
) -> dict[str, Any] | None:
    console = make_console()
    with claimed(recipe, output, state.is_main_process), _clocked(output, state.is_main_process) as minutes:
        check_shared(output, state)
        stages = {name: as_launched(stage, f"stages.{name}") for name, stage in recipe.stages.items()}
        forget_deepspeed()
        if (output / SUMMARY).is_file():
            console.print(f"{recipe.name} is done: {output / SUMMARY}")
            if not state.is_main_process:
                return None
            return publish_run(recipe.publish, output, atomic_folders.read_json(output / SUMMARY), console.print)
        preflight(recipe.model_copy(update={"stages": stages}), state.num_processes)
        record = None
        if state.is_main_process:
            prepare(recipe, output, console)
            record = _check_publishing(recipe, output, console, command)
            _check_all(recipe, output)
        state.wait_for_everyone()
        with pushing(recipe, output, record, console.print) as pusher:
            base, origin, records = _run_stages(recipe, stages, output, console, signals, state, peers, pusher)
            if not state.is_main_process:
                return None
            summary = finish(recipe, output, base, origin, records, console, command=command, minutes=minutes)
            if pusher is not None:
                summary["saves"] = pusher.close(finish=True)
        atomic_folders.write_json(output / SUMMARY, summary)
        return publish_run(recipe.publish, output, summary, console.print)


def _run_stages(
    recipe: Recipe,
    stages: Mapping[str, Stage],
    output: Path,
    console: Console,
    signals: Signals,
    state: PartialState,
    peers: Peers,
    pusher: Pusher | None,
) -> tuple[Path, Path, list[dict[str, Any]]]:
    """Every stage that is not done, in turn; returns the base, the weights of the last one, and the records."""
    base = base_of(recipe, output)
    origin, records = base, []
    for name, stage in stages.items():
        folder = stage_folder(output, recipe, name)
        if stage.init_from != "previous":
            origin = local_checkpoint(stage.init_from, where=f"stages.{name}.init_from")
        # the main process reads all of its weights to be sure; the others believe it
        (record,) = broadcast_object_list([finished_record(folder) if state.is_main_process else None])
        if record is None:
            folder.mkdir(parents=True, exist_ok=True)
            run = StageRun(
                name,
                stage,
                folder,
                origin,
                recipe.seed,
                state.num_processes,
                state.is_main_process,
                console,
                signals,
                peers,
                recipe.evaluation,
                output / SAVE_NOW if state.is_main_process else None,
                pusher,
            )
            record = run_stage(run)
        else:
            console.print(f"stage {name} is done: {folder / FINAL}")
        records.append(record)
        origin = folder / FINAL
    return base, origin, records


def _check_publishing(recipe: Recipe, output: Path, console: Console, command: str) -> dict[str, Any] | None:
    """What would keep the run from being published; the record of its cards, where it is to be."""
    if recipe.publish is None:
        return None
    base, begun = base_of(recipe, output), _has_begun(output)
    return check_beforehand(recipe, recipe.publish, base, command=command, begun=begun, say=console.print)


def check_shared(output: Path, state: PartialState) -> None:
    """Every process has to see the run's folder: the main one writes weights there that all read.

    Raises:
        UserError: on all processes, naming the machines that do not.
    """
    if state.num_processes == 1:
        return
    mark = output / SHARED
    (token,) = broadcast_object_list([uuid4().hex])
    if state.is_main_process:
        mark.write_text(token, encoding="utf-8")
    state.wait_for_everyone()
    sees = mark.is_file() and mark.read_text(encoding="utf-8") == token
    blind = sorted({host for host, there in gather_object([(socket.gethostname(), sees)]) if not there})
    if blind:
        raise UserError(
            f"not the same folder on {', '.join(blind)}",
            where=str(output),
            fix="choose an --output on a file system that all machines share",
        )


@contextmanager
def _clocked(output: Path, is_main: bool) -> Iterator[Callable[[], float]]:
    """Gives the minutes that a run has taken, over all the times that it was started."""
    file, started = output / ELAPSED, time.monotonic()
    before = atomic_folders.read_json(file)["minutes"] if file.is_file() else 0.0

    def minutes() -> float:
        return before + (time.monotonic() - started) / 60

    try:
        yield minutes
    finally:
        if is_main:
            try:
                atomic_folders.write_json(file, {"minutes": minutes()})
            except OSError as error:  # which must not hide why the run ends
                logger.warning("%s is not written: %s", file, error)


def preflight(recipe: Recipe, num_processes: int) -> None:
    """Find what would stop a later stage before the first one starts.

    Raises:
        UserError: naming what to mend.
    """
    if recipe.publish is not None:
        check_strategy(recipe.publish, recipe.stages)
    for name, stage in recipe.stages.items():
        where = f"stages.{name}"
        derive(stage, stage.global_batch, num_processes, where=where)
        check_trainer_args(stage.trainer_args, where)
        check_policy(stage.on_bad_record)
        check_device_options(stage, where)
        if stage.deepspeed:
            check_deepspeed(stage, where)
        if stage.init_from != "previous":
            folder = local_checkpoint(stage.init_from, where=f"{where}.init_from")
            if not _is_ours(folder):
                raise UserError(
                    f"{folder} has another processor than ours",
                    where=f"{where}.init_from",
                    fix="join its parts with `llava-llama31 assemble` first, or name it as model.checkpoint",
                )


def _check_all(recipe: Recipe, output: Path) -> None:
    """Check licences, the data of all stages, and the questions, before the first step of any."""
    licence_texts(base_models_of(recipe))
    processor = LlavaLlama31Processor.from_pretrained(base_of(recipe, output))
    for name, stage in recipe.stages.items():
        if stage.device_tiles:
            DeviceTiles(processor, where=f"stages.{name}.device_tiles")  # now, and not before a later stage
        check_stage(stage, processor, stage_folder(output, recipe, name) / "rejects.jsonl")
    if recipe.evaluation is not None:
        spec = recipe.evaluation
        questions = load_questions(spec.data, image_root=spec.image_root, limit=spec.limit)
        check_ocr(PRESETS[spec.preset], questions)
        if spec.baselines:
            derangement({question.image_id for question in questions}, recipe.seed)


def prepare(recipe: Recipe, output: Path, console: Console) -> None:
    """Make the parts that a recipe makes by itself, and the checkpoint that the first stage starts from."""
    if recipe.prepare == "tiny":
        from llava_llama31.trainer.demo.parts import prepare as prepare_tiny  # needs the `demo` extra

        prepare_tiny(output / "prepared", seed=recipe.seed, progress=console.print)
    model, base = recipe.model, output / BASE
    if base.exists() or (model.checkpoint and _is_ours(local_checkpoint(model.checkpoint, where="model.checkpoint"))):
        return
    if model.checkpoint is not None:  # llava-hf's or LLaVA's own layout: the same parts, our processor
        tower = language = projector = local_checkpoint(model.checkpoint, where="model.checkpoint")
    else:
        tower = local_checkpoint(model.vision_tower, where="model.vision_tower")
        language = local_checkpoint(model.language_model, where="model.language_model")
        projector = local_checkpoint(model.projector, where="model.projector", file=True) if model.projector else None
    counts = assemble(
        tower,
        language,
        base,
        projector=projector,
        image_grid_pinpoints=model.image_grid_pinpoints,
        vision_feature_layer=model.vision_feature_layer,
        add_chat_tokens=model.add_chat_tokens,
        dtype=model.dtype,
        seed=recipe.seed,
    )
    console.print(f"assembled {base}: " + ", ".join(f"{part} {count:,}" for part, count in counts.items()))


def stage_folder(output: Path, recipe: Recipe, name: str) -> Path:
    return output / "stages" / f"{list(recipe.stages).index(name) + 1}-{name}"


def base_of(recipe: Recipe, output: Path) -> Path:
    """The checkpoint that the first stage starts from; `prepare` has made it."""
    base = output / BASE
    return base if base.exists() else local_checkpoint(recipe.model.checkpoint, where="model.checkpoint")


def _is_ours(folder: Path) -> bool:
    """Whether a checkpoint has our processor, so that a stage can start from it as it is."""
    template = folder / "chat_template.jinja"
    own_code = folder / "processing_llava_llama31.py"
    return template.is_file() and own_code.is_file() and template.read_text(encoding="utf-8") == CHAT_TEMPLATE


@contextmanager
def claimed(recipe: Recipe, output: Path, is_main: bool) -> Iterator[None]:
    """Hold the run's folder for this run alone, and refuse one that belongs to another recipe."""
    if not is_main:
        yield
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"cannot be written: {error.strerror}", where=str(output), fix="choose another --output"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                "another run works in this folder", where=str(output), fix="wait for it, or choose another --output"
            ) from None
        _settle_recipe(recipe, output)
        yield


def _settle_recipe(recipe: Recipe, output: Path) -> None:
    """Write down what the folder is for; before the first checkpoint of a run it may still change."""
    now = recipe.model_dump(mode="json")
    before = _recipe_of(output) if (output / RECIPE).is_file() else now
    if _has_begun(output):
        _refuse_changes(before, now, output)
    elif before["model"] != now["model"] or before["seed"] != now["seed"]:
        atomic_folders.remove(output / BASE)
    atomic_folders.write_json(output / RECIPE, now)


def _has_begun(output: Path) -> bool:
    """Whether there is a checkpoint."""
    return any(output.glob("stages/*/checkpoint-*")) or any(output.glob(f"stages/*/{FINAL}"))


def _recipe_of(output: Path) -> dict[str, Any]:
    """The recipe that a run began with; keys that it did not have yet have their defaults."""
    before = atomic_folders.read_json(output / RECIPE)
    try:
        return Recipe.model_validate(before).model_dump(mode="json")
    except ValidationError:
        return before


def _refuse_changes(before: dict[str, Any], now: dict[str, Any], output: Path) -> None:
    free = ("description", "device_watts", "hub_id", *CHANGEABLE)
    before, now = before | {"publish": None}, now | {"publish": None}  # which changes nothing of the training
    changes = [change for change in _differences(before, now) if change[0].rpartition(".")[2] not in free]
    if changes:
        listed = "; ".join(f"{key}: {old!r} -> {new!r}" for key, old, new in changes[:5])
        more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
        raise UserError(
            f"this run began with another recipe: {listed}{more}",
            where=str(output),
            fix="choose another --output, or undo the change",
        )


def _differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif before != now:
        yield key, before, now
