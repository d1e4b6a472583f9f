"""What a stage's checkpoints hold, and how they become complete or stay invisible."""

import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.checkpoint.background import Background
from llava_llama31.trainer.distributed.devices import default_device, random_state, set_random_state, uses_cpu
from llava_llama31.trainer.distributed.engine import engine_of, uses_deepspeed
from llava_llama31.trainer.distributed.parameters import held_part, num_elements, sharded_like
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.fault_tolerance.stage_guard import Guard
from llava_llama31.trainer.model.adapters import TRAINABLE_WEIGHTS
from llava_llama31.trainer.training.portable_state import load_portable_state, portable_state


logger = logging.getLogger(__name__)

# with one of these set, a tracker uploads each checkpoint as soon as the Trainer calls it saved
_UPLOADING = ("WANDB_LOG_MODEL", "HF_MLFLOW_LOG_ARTIFACTS", "CLEARML_LOG_MODEL")


def best_checkpoint(args: TrainingArguments, state: TrainerState) -> Path | None:
    """The checkpoint with the best metric, if the stage looks for one."""
    step = state.best_global_step
    return atomic_folders.at_step(args.output_dir, step) if step else None


def whole_best_checkpoint(args: TrainingArguments, state: TrainerState) -> Path | None:
    """The best checkpoint, unless it is the newest one, whose weights the model has.

    Raises:
        UserError: it is damaged.
    """
    best = best_checkpoint(args, state)
    if best is None or state.best_global_step == state.global_step:
        return None
    fault = atomic_folders.verify(best)
    if fault is not None:
        raise UserError(
            f"holds the best weights and is damaged: {fault}",
            where=str(best),
            fix="set the stage's keep to last, or return to an earlier checkpoint",
        )
    logger.info("taking the weights of step %d: %s", state.best_global_step, state.best_metric)
    return best


def _estimated_bytes(args: TrainingArguments, model: torch.nn.Module, only_trainable: bool) -> int:
    """Weights plus two float32 moments; under DeepSpeed weights twice, plus float32 originals."""
    parameters = list(model.parameters())
    saved = [parameter for _, parameter in saved_parameters(model, only_trainable=only_trainable)]
    weights = sum(num_elements(parameter) * parameter.element_size() for parameter in saved)
    trained = sum(num_elements(parameter) for parameter in parameters if parameter.requires_grad)
    return 2 * weights + 12 * trained if uses_deepspeed(args) else weights + 8 * trained


def saved_parameters(model: torch.nn.Module, *, only_trainable: bool) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters that a checkpoint holds, with their names."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad or not only_trainable]


class StageSaves:
    """Saves a stage's checkpoints. All ranks wait until the files are written, but not until they are committed.

    Rank 0 flushes and hashes the files, renames the folder and removes old checkpoints in the background: a checkpoint
    that is not committed does not exist for a resume, and the former one stays until then. A failure ends the stage at
    its next step. A tracker that uploads checkpoints needs whole ones: for it training waits for the commit too.

    Args:
        inputs: digests of what the stage depends on, for the manifest.
        only_trainable: save the trainable parameters alone.
        committed: called in the background with every complete checkpoint and its step.
    """

    def __init__(
        self,
        args: TrainingArguments,
        guard: Guard,
        *,
        inputs: Mapping[str, Any],
        only_trainable: bool,
        committed: Callable[[Path, int], None] | None,
    ):
        self.args, self.guard, self.only_trainable = args, guard, only_trainable
        self.facts = {"num_processes": args.world_size, "engine": engine_of(args), "inputs": dict(inputs)}
        self._committed = committed
        self._commit = Background("commit")

    @contextmanager
    def staged(self, state: TrainerState, model: torch.nn.Module) -> Iterator[Path]:
        """The parent folder in which Transformers saves; what it wrote is committed in the background. Collective.

        Raises:
            UserError: too little space, or writing failed, this checkpoint or the one before.
        """
        self.guard.watchdog.beat("saving")
        self._commit.finish()
        final = atomic_folders.at_step(self.args.output_dir, state.global_step)
        staging = final.parent / atomic_folders.STAGING / final.name
        needed = self._bytes_needed(final.parent, model)
        with atomic_folders.room(final.parent, needed, check=self.args.should_save):
            if self.args.should_save:
                atomic_folders.sweep(final.parent)
                staging.mkdir(parents=True)
            _barrier(self.args)
            try:
                yield staging.parent
            except BaseException:
                if self.args.should_save:
                    atomic_folders.remove(staging.parent)
                raise
            _barrier(self.args)
            if self.args.should_save:
                # Transformers noted the staging folder; `best_checkpoint` owns this fact
                state.best_model_checkpoint = None
                state.save_to_json(str(staging / TRAINER_STATE_NAME))
                self.guard.save(staging)
                facts = {"step": state.global_step, **self.facts}
                best = best_checkpoint(self.args, state)
                self._commit.start(lambda: self._publish(staging, final, facts, best, needed))
                if any(os.environ.get(name) for name in _UPLOADING):
                    self._commit.finish()
        self.guard.watchdog.beat("saved")

    def _publish(self, staging: Path, final: Path, facts: dict[str, Any], best: Path | None, needed: int) -> None:
        """Commit a written checkpoint and remove old ones, in the background."""
        with atomic_folders.room(final.parent, needed, check=False):
            try:
                atomic_folders.commit(staging, final, facts)
            finally:
                atomic_folders.remove(staging.parent)
            assert self.args.save_total_limit is not None
            atomic_folders.rotate(final.parent, self.args.save_total_limit, spare=best)
        if self._committed is not None:
            self._committed(final, facts["step"])

    def check(self) -> None:
        """Raise what a commit failed with, at the next step."""
        self._commit.check()

    @contextmanager
    def completed(self) -> Iterator[None]:
        """Context at whose end the last checkpoint is committed, whether the stage fails or not. Collective."""
        try:
            yield
        except Exception:
            try:
                self._commit.finish()
            except UserError as error:  # must not mask the original error
                logger.warning("the last checkpoint is not complete: %s", error)
            raise
        self.guard.watchdog.beat("saving")
        self._commit.finish()
        _barrier(self.args)

    def _bytes_needed(self, folder: Path, model: torch.nn.Module) -> int:
        former = atomic_folders.newest_committed(folder)
        if former is None:
            return _estimated_bytes(self.args, model, self.only_trainable)
        return atomic_folders.size(former)


def load_weights(model: PreTrainedModel, folder: Path, *, only_trainable: bool) -> None:
    """Restore every weight or fail: Transformers loads with strict=False and only warns (transformers #43701).

    Raises:
        ValueError: the checkpoint lacks weights, or holds others.
    """
    if only_trainable:
        saved = load_file(folder / TRAINABLE_WEIGHTS)
        expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    else:
        saved = {}
        for file in sorted(folder.glob("model*.safetensors")):
            saved.update(load_file(file))
        expected = set(model.state_dict())
        if model.config.tie_word_embeddings:
            expected -= set(model.all_tied_weights_keys)
    if set(saved) != expected:
        wrong = sorted(set(saved) ^ expected)
        raise ValueError(f"{folder}: {len(wrong)} tensors do not belong to this stage, e.g. {wrong[0]}")
    own = model.state_dict()
    with torch.no_grad():
        for name in expected:  # torch's own functions hold a second copy of all weights on the device
            held_part(own[name]).copy_(held_part(sharded_like(saved[name], own[name])))


def save_weights(
    folder: Path, model: PreTrainedModel, weights: dict[str, torch.Tensor] | None, *, only_trainable: bool
) -> None:
    """Weights in Transformers' layout or the trainable ones alone; no training_args.bin, which holds the Hub token."""
    folder.mkdir(parents=True, exist_ok=True)
    if only_trainable:
        assert weights is not None
        save_file(weights, folder / TRAINABLE_WEIGHTS)
    else:
        model.save_pretrained(folder, state_dict=weights)


def save_optimizer(
    folder: Path,
    optimizer: torch.optim.Optimizer | None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    *,
    write: bool,
) -> None:
    """Optimizer and schedule, unsharded. Collective; rank 0 writes."""
    assert optimizer is not None and scheduler is not None
    state = portable_state(optimizer, keep=write)
    if state is not None:
        atomic_folders.save_tree(folder / "optimizer", {"optimizer": state, "scheduler": scheduler.state_dict()})


def load_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer | None, scheduler: torch.optim.lr_scheduler.LRScheduler | None
) -> None:
    assert optimizer is not None and scheduler is not None
    state = atomic_folders.load_tree(folder / "optimizer")
    load_portable_state(optimizer, state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])


def save_rng_state(folder: Path, rank: int) -> None:
    """Every rank saves its own."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    if not uses_cpu():
        state[default_device().type] = random_state(default_device())
    atomic_folders.save_tree(folder / f"rng_state_{rank}", state)


def load_rng_state(folder: Path | None, rank: int) -> None:
    path = (folder or Path()) / f"rng_state_{rank}"
    if folder is None or not path.with_suffix(".json").is_file():
        logger.warning("no random state of rank %d in %s: randomness starts fresh", rank, path)
        return
    state = atomic_folders.load_tree(path)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if not uses_cpu() and default_device().type in state:
        set_random_state(default_device(), state[default_device().type])


def _barrier(args: TrainingArguments) -> None:
    if args.world_size > 1:
        dist.barrier()
