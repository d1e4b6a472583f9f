"""The one Trainer: learning rate per module group, exact data order, checkpoints that are complete or invisible."""

import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils.data import DataLoader, Dataset
from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.data.batches.batch_order import BatchOrder, Lengths, RankBatches
from llava_llama31.trainer.data.batches.collator import Collator
from llava_llama31.trainer.data.batches.device_tiles import DeviceTiles
from llava_llama31.trainer.distributed.engine import (
    engine_of,
    fsdp_plugin,
    num_elements,
    unsharded,
    uses_deepspeed,
    uses_fsdp,
    whole_parameters,
)
from llava_llama31.trainer.errors import Unhealthy, UserError
from llava_llama31.trainer.evaluation.in_training import TrainingQuestions
from llava_llama31.trainer.fault_tolerance.stage_guard import Guard
from llava_llama31.trainer.fault_tolerance.step_health import Records
from llava_llama31.trainer.fault_tolerance.watchdog import loader_failure, set_up_worker
from llava_llama31.trainer.model.module_groups import group_parameters
from llava_llama31.trainer.training.meter import Meter
from llava_llama31.trainer.training.optimizers import AdamWBfloat16, load_portable_state, portable_state


logger = logging.getLogger(__name__)

TRAINABLE_WEIGHTS = "trainable.safetensors"
_COUNTED = ("tokens", "supervised_tokens", "samples")


class LlavaTrainer(Trainer):
    """Transformers' Trainer for one stage.

    Args:
        model: the model, or a PEFT model around it, already frozen as the stage wants it.
        learning_rates: peak learning rate of each trainable module group.
        order: global batches of the training set.
        eval_lengths: of the validation rows.
        packed: micro-batches are packed rows.
        device_tiles: makes the tiles of batches that come with `pixels` instead.
        meter: counts what the steps need.
        guard: watches over the steps.
        bfloat16_moments: optimise with AdamWBfloat16, not with what `args.optim` names.
        decay_all_parameters: apply weight decay to norms and biases too.
        only_trainable: save the trainable parameters alone (adapters); the rest comes from the stage's origin.
        questions: asked at every evaluation, beside the loss on the validation rows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        collator: Collator,
        train_dataset: Dataset,
        eval_dataset: Dataset,
        processor: ProcessorMixin,
        learning_rates: Mapping[str, float],
        order: BatchOrder,
        eval_lengths: Lengths,
        packed: bool,
        meter: Meter,
        guard: Guard,
        device_tiles: DeviceTiles | None = None,
        bfloat16_moments: bool = False,
        decay_all_parameters: bool = False,
        only_trainable: bool = False,
        questions: TrainingQuestions | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        self.learning_rates, self.order = dict(learning_rates), order
        self.eval_lengths, self.packed = eval_lengths, packed
        self.decay_all_parameters, self.only_trainable = decay_all_parameters, only_trainable
        self.bfloat16_moments, self.questions = bfloat16_moments, questions
        self.saving_to: Path | None = None
        self.meter, self.guard, self.device_tiles = meter, guard, device_tiles
        self._counts: dict[int, np.ndarray] = {}
        self._losses: list[torch.Tensor] = []  # of the step's micro-batches so far
        self._num_drawn = 0  # micro-batches from the epoch's loader
        super().__init__(
            model,
            args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            callbacks=[_Epochs(self), *(callbacks or []), guard.requests],
        )
        if args.bf16 and not self.is_deepspeed_enabled and not self.is_fsdp_enabled:
            base = model.get_base_model() if only_trainable else model
            base.lm_head.register_forward_pre_hook(_assert_autocast)

    def _build_accelerator_args(self, **kwargs: object) -> dict[str, Any]:
        options = super()._build_accelerator_args(**kwargs)
        if uses_fsdp():
            options["fsdp_plugin"] = fsdp_plugin(bfloat16=self.args.bf16)
        return options

    # data

    def get_train_dataloader(self) -> DataLoader:
        return self._loader(self.train_dataset, self._rank_batches())

    def _rank_batches(self) -> RankBatches:
        return RankBatches(
            self.order,
            micro_batch=self.args.per_device_train_batch_size,
            rank=self.args.process_index,
            num_processes=self.args.world_size,
            packed=self.packed,
        )

    def _loader(self, dataset: Dataset, batches: RankBatches) -> DataLoader:
        # not through accelerator.prepare: it would split the batches among the ranks a second time
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and not self.args.use_cpu,
            worker_init_fn=set_up_worker,
            timeout=self.guard.loader_timeout if self.args.dataloader_num_workers else 0,
            # a forked worker would keep a copy of all weights that the training goes on to change
            multiprocessing_context="forkserver" if self.args.dataloader_num_workers else None,
            persistent_workers=False,
        )

    def records(self, step: int) -> Records:
        """Ids of the records of a step, counted from 1."""
        name = self.train_dataset.record_id
        ranks = self._rank_batches().of_ranks(step - 1)
        return [[[name(index) for index in micro_batch] for micro_batch in rank] for rank in ranks]

    def _drawn(
        self, loader: Iterator[dict[str, Any]], records: Callable[[int], list[str]], first: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Micro-batches as they come.

        Args:
            records: ids of one, by its number since the loader began.
            first: number of the first one.

        Raises:
            UserError: naming the worker and the records that it failed at.
        """
        number = first
        while True:
            self.guard.watchdog.beat(f"waiting for data, micro-batch {number} of this loader")
            try:
                batch = next(loader)
            except StopIteration:
                return
            except UserError as error:  # with the worker's traceback, if it comes from there
                raise UserError(str(error).rpartition("UserError: ")[2]) from error
            except (RuntimeError, ConnectionError, EOFError) as error:
                # the latter when a worker is gone before its tensors were taken over
                if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader"):
                    raise
                worker = number % self.args.dataloader_num_workers
                guard = self.guard
                raise loader_failure(error, worker, records(number), guard.where, guard.loader_timeout) from error
            number += 1
            yield batch

    # optimisation

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        target = self.model if model is None else model
        decay = set(self.get_decay_parameter_names(target))
        name_of = {id(parameter): name for name, parameter in target.named_parameters()}
        base = self.accelerator.unwrap_model(target)
        base = base.get_base_model() if self.only_trainable else base
        groups = []
        for group, learning_rate in self.learning_rates.items():
            trained = [p for _, p in group_parameters(base, group) if p.requires_grad]
            for decays in (True, False):
                chosen = [p for p in trained if (self.decay_all_parameters or name_of[id(p)] in decay) == decays]
                if chosen:
                    weight_decay = self.args.weight_decay if decays else 0.0
                    groups.append({"params": chosen, "lr": learning_rate, "weight_decay": weight_decay})
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, target)
        if self.bfloat16_moments:
            self.optimizer = AdamWBfloat16(groups, options["lr"], options["betas"], options["eps"])
        else:
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    # meters

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add seconds of training so far, and the meters since the last log."""
        if "loss" in logs:
            now, step = time.monotonic(), self.state.global_step
            self._leave_out_skipped(logs)
            trained = self.trained(step)
            seconds, meters = self.meter.read()
            logs["supervised_tokens"] = int(trained[1])
            for name, count in zip(_COUNTED, trained - self._last_log, strict=True):
                logs[f"{name}_per_second"] = round(float(count) / seconds, 2)
            logs |= meters
            logs["seconds"] = round(self._seconds_before + now - self._started, 3)
            self._last_log = trained
        super().log(logs, start_time)

    def _leave_out_skipped(self, logs: dict[str, float]) -> None:
        """The loss is the mean of the steps that were taken; the others are counted, and stand in health.json."""
        num_skipped = self.guard.health.skipped_after(self._logged_step)
        num_steps = self.state.global_step - self._logged_step
        self._logged_step = self.state.global_step
        if num_skipped:
            logs["skipped_steps"] = num_skipped
            loss = logs.pop("loss")
            if num_skipped < num_steps:
                logs["loss"] = loss * num_steps / (num_steps - num_skipped)

    def trained(self, step: int) -> np.ndarray:
        """Tokens, supervised tokens and samples of the first `step` steps, from the order, which is known."""
        epochs, rest = divmod(step, self.order.steps_per_epoch)
        total = sum((self._epoch_counts(epoch)[-1] for epoch in range(epochs)), np.zeros(3, np.int64))
        return total + self._epoch_counts(epochs)[rest - 1] if rest else total

    def _epoch_counts(self, epoch: int) -> np.ndarray:
        if epoch not in self._counts:
            lengths = self.order.lengths
            counts = [
                (lengths.num_tokens[batch].sum(), lengths.num_supervised_tokens[batch].sum(), len(batch))
                for batch in self.order.batches(epoch)
            ]
            self._counts[epoch] = np.cumsum(counts, axis=0, dtype=np.int64)
        return self._counts[epoch]

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | int | None]:
        """The micro-batches of a step, still on the host, for the meters."""
        with self.meter.waiting():
            step, first = self.state.global_step + 1, self._num_drawn
            drawn = self._drawn(
                epoch_iterator, lambda number: self.records(step)[self.args.process_index][number - first], first
            )
            batches, num_items = super().get_batch_samples(drawn, num_batches, device)
        self._num_drawn += len(batches)
        for batch in batches:
            self.meter.add(batch)
        return batches, num_items

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch on the device, its pictures as tiles."""
        inputs = super()._prepare_inputs(inputs)
        if "pixels" not in inputs:
            return inputs
        assert self.device_tiles is not None
        pixels = inputs["pixels"]
        return {k: v for k, v in inputs.items() if k != "pixels"} | {"pixel_values": self.device_tiles(pixels)}

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Loss of a micro-batch, kept for the step's judgement."""
        step, number = self.state.global_step + 1, len(self._losses) + 1
        self.guard.watchdog.beat(f"training on micro-batch {number} of step {step}")
        if not self._losses:
            self._loss_before = self._tr_loss.clone()
        self._losses.append(super().training_step(model, inputs, num_items_in_batch))
        return self._losses[-1]

    def _get_grad_norm(
        self, model: torch.nn.Module, grad_norm: torch.Tensor | float | None = None
    ) -> torch.Tensor | float | None:
        """Judge the step, which has its gradients and has not changed a weight; a skipped one loses its gradients.

        Under DeepSpeed it has taken the step; what it found not finite it did not take.
        """
        norm = unsharded(super()._get_grad_norm(model, grad_norm))
        if self.accelerator.optimizer_step_was_skipped:
            norm = math.inf  # the engine's own may be that of an earlier step
        losses, self._losses = self._losses, []
        step = self.state.global_step + 1
        skip, norm = self.guard.judge(step, losses, norm, lambda: self.records(step), self.args.device)
        if not skip:
            return norm
        model.zero_grad()  # without gradients an optimizer changes neither weights nor moments
        self._tr_loss.copy_(self._loss_before)
        return None

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:  # type: ignore[override]
        """Train under the watchdog; a checkpoint's judgement of steps goes on too."""
        if resume_from_checkpoint:
            self.guard.restore(Path(str(resume_from_checkpoint)))
        with self.guard.watchdog.watching():
            return super().train(resume_from_checkpoint)

    def start_epoch(self) -> None:
        self._num_drawn = 0

    def start_clock(self) -> None:
        earlier = [entry["seconds"] for entry in self.state.log_history if "seconds" in entry]
        self._seconds_before = earlier[-1] if earlier else 0.0
        self._started = time.monotonic()
        self._logged_step = self.state.global_step
        self._last_log = self.trained(self.state.global_step)
        self.meter.restart()

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss over the supervised tokens of the validation rows and accuracy on the questions, where given."""
        with self.meter.aside():
            return self._measure(self.eval_dataset if eval_dataset is None else eval_dataset, metric_key_prefix)

    def _measure(self, dataset: Dataset, metric_key_prefix: str) -> dict[str, float]:
        metrics = {f"{metric_key_prefix}_loss": self._validation_loss(dataset)} if len(dataset) else {}
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise Unhealthy(
                    f"{name} is {value}",
                    where=f"{self.guard.where}, step {self.state.global_step}",
                    fix="lower the learning rate, or look at the validation rows",
                )
        if self.questions is not None:
            sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
            base = self.accelerator.unwrap_model(self.model)
            accuracy, num_unanswered = self.questions.ask(
                base.get_base_model() if self.only_trainable else base,
                self.processing_class,
                step=self.state.global_step,
                sharded=self.model_wrapped if sharded else None,
                # the wrapped model's forward has its own; what is inside it has none
                autocast=self.accelerator.autocast(),
                beat=lambda: self.guard.watchdog.beat("answering questions"),
            )
            metrics[f"{metric_key_prefix}_accuracy"] = accuracy
            metrics[f"{metric_key_prefix}_unanswered"] = num_unanswered
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _validation_loss(self, dataset: Dataset) -> float:
        order = BatchOrder(
            self.eval_lengths,
            global_batch=self.args.per_device_eval_batch_size * self.args.world_size,
            seed=0,
            keep_last=True,
        )
        batches = RankBatches(
            order,
            micro_batch=self.args.per_device_eval_batch_size,
            rank=self.args.process_index,
            num_processes=self.args.world_size,
            packed=self.packed,
        )
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        totals = torch.zeros(2, dtype=torch.float64)
        rows = list(batches)
        loader = iter(self._loader(dataset, batches))
        for batch in self._drawn(loader, lambda number: [dataset.record_id(index) for index in rows[number]]):
            count = int((batch["labels"][:, 1:] != -100).sum())
            with self.compute_loss_context_manager():
                loss = model(**self._prepare_inputs(batch), num_items_in_batch=1).loss
            totals += torch.tensor([loss.item(), count], dtype=torch.float64)
        if self.args.world_size > 1:
            totals = totals.to(self.args.device)
            dist.all_reduce(totals)
        model.train(was_training)
        return (totals[0] / totals[1]).item()

    def final_metrics(self) -> dict[str, float]:
        """Those of the weights that the stage ends with; evaluated now unless an evaluation chose them."""
        step = self.state.best_global_step
        for entry in self.state.log_history:
            if step and entry["step"] == step and f"{self.args.metric_for_best_model}" in entry:
                return entry
        return self.evaluate() if len(self.eval_dataset) or self.questions is not None else {}

    def restore_best(self) -> None:
        """Take the weights of the best evaluation, where the stage looks for them.

        Raises:
            UserError: their checkpoint is damaged.
        """
        best = self.best_checkpoint
        if best is None or self.state.best_global_step == self.state.global_step:
            return
        fault = atomic_folders.verify(best)
        if fault is not None:
            raise UserError(
                f"holds the best weights and is not whole: {fault}",
                where=str(best),
                fix="set the stage's keep to last, or go back to an earlier checkpoint",
            )
        logger.info("taking the weights of step %d: %s", self.state.best_global_step, self.state.best_metric)
        if self.is_deepspeed_enabled:
            deepspeed_load_checkpoint(self.model_wrapped, str(best), load_module_strict=True)
        else:
            self._load_from_checkpoint(str(best), self.model_wrapped)

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint with the best metric, if one is looked for."""
        step = self.state.best_global_step
        return Path(self.args.output_dir, f"checkpoint-{step}") if step else None

    # checkpoints

    def _get_output_dir(self, trial: object | None) -> str:
        return str(self.saving_to or self.args.output_dir)

    def _save_checkpoint(self, model: PreTrainedModel, trial: object | None) -> None:
        self.guard.watchdog.beat("saving")
        with self.meter.aside(), self._room():
            self._save_whole(model, trial)
        self.guard.watchdog.beat("saved")

    def _room(self) -> AbstractContextManager[None]:
        """The main process makes sure of the space that a checkpoint needs; DeepSpeed writes on all of them."""
        folder = Path(self.args.output_dir)
        former = atomic_folders.newest_committed(folder)
        needed = self._estimated_bytes() if former is None else atomic_folders.size(former)
        return atomic_folders.room(folder, needed, check=self.args.should_save)

    def _estimated_bytes(self) -> int:
        """Of a checkpoint: weights, and two moments in float32; under DeepSpeed weights twice, and originals."""
        parameters = list(self.model.parameters())
        saved = [parameter for parameter in parameters if parameter.requires_grad or not self.only_trainable]
        weights = sum(num_elements(parameter) * parameter.element_size() for parameter in saved)
        trained = sum(num_elements(parameter) for parameter in parameters if parameter.requires_grad)
        return 2 * weights + 12 * trained if uses_deepspeed(self.args) else weights + 8 * trained

    def _save_whole(self, model: PreTrainedModel, trial: object | None) -> None:
        final = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        staging = final.parent / atomic_folders.STAGING / final.name
        if self.args.should_save:
            atomic_folders.sweep(final.parent)
            staging.mkdir(parents=True)
        self._barrier()
        self.saving_to = staging.parent
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            if self.args.should_save:
                atomic_folders.remove(staging.parent)
            raise
        finally:
            self.saving_to = None
        self._barrier()
        if self.args.should_save:
            # the parent noted the staging folder; best_checkpoint owns this fact
            self.state.best_model_checkpoint = None
            self.state.save_to_json(str(staging / TRAINER_STATE_NAME))
            self.guard.save(staging)
            facts = {
                "step": self.state.global_step,
                "num_processes": self.args.world_size,
                "engine": engine_of(self.args),
            }
            atomic_folders.commit(staging, final, facts)
            atomic_folders.remove(staging.parent)
            atomic_folders.rotate(final.parent, self.args.save_total_limit, spare=self.best_checkpoint)
        self._barrier()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Weights and processor in one folder, whatever spreads them over the processes; all of these call it."""
        self._save(output_dir, self.whole_weights())

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """What the main process saves; None: what its model holds."""
        if not (self.only_trainable or self.is_deepspeed_enabled or self.is_fsdp_enabled):
            return None
        named = self.model.named_parameters()
        chosen = [(name, p) for name, p in named if p.requires_grad or not self.only_trainable]
        return whole_parameters(chosen, deepspeed=self.is_deepspeed_enabled)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Weights and processor; no pickled arguments, which would hold the Hub token."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if self.only_trainable:
            assert state_dict is not None
            save_file(state_dict, folder / TRAINABLE_WEIGHTS)
        else:
            self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state_dict)
        self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        """Restore every weight or fail: the parent loads with strict=False and only warns (transformers #43701)."""
        folder = Path(resume_from_checkpoint)
        if self.only_trainable:
            saved = load_file(folder / TRAINABLE_WEIGHTS)
            expected = {n for n, p in self.model.named_parameters() if p.requires_grad}
        else:
            saved = {}
            for file in sorted(folder.glob("model*.safetensors")):
                saved.update(load_file(file))
            expected = set(self.model.state_dict())
            if self.model.config.tie_word_embeddings:
                expected -= set(self.model.all_tied_weights_keys)
        if set(saved) != expected:
            wrong = sorted(set(saved) ^ expected)
            raise ValueError(f"{folder}: {len(wrong)} tensors do not belong to this stage, e.g. {wrong[0]}")
        set_model_state_dict(self.model, saved, options=StateDictOptions(full_state_dict=True, strict=False))

    def restore(self, checkpoint: Path) -> None:
        """Take weights and state of a checkpoint, wrapped as for training, without training on."""
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self._load_from_checkpoint(str(checkpoint))
        self._prepare_for_training(self.args.max_steps, self.get_train_dataloader(), str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self.guard.restore(checkpoint)
        self.start_clock()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = {"optimizer": portable_state(self.optimizer), "scheduler": self.lr_scheduler.state_dict()}
        if self.args.should_save:
            atomic_folders.save_tree(Path(output_dir, "optimizer"), state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = atomic_folders.load_tree(Path(checkpoint, "optimizer"))
        load_portable_state(self.optimizer, state["optimizer"])
        self.lr_scheduler.load_state_dict(state["scheduler"])

    def _save_rng_state(self, output_dir: str) -> None:
        state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        atomic_folders.save_tree(Path(output_dir, f"rng_state_{self.args.process_index}"), state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        path = Path(checkpoint or "", f"rng_state_{self.args.process_index}")
        if checkpoint is None or not path.with_suffix(".json").is_file():
            logger.warning("no random state of rank %d in %s: randomness starts anew", self.args.process_index, path)
            return
        state = atomic_folders.load_tree(path)
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])

    def _barrier(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()


class _Epochs(TrainerCallback):
    """Tells the batches which epoch it is, starts the clock, and logs before every save and at the end."""

    def __init__(self, trainer: LlavaTrainer):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.trainer.start_clock()

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        train_dataloader: DataLoader,
        **kwargs: object,
    ) -> None:
        train_dataloader.batch_sampler.set_epoch(state.global_step // self.trainer.order.steps_per_epoch)
        self.trainer.start_epoch()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True


def _assert_autocast(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    # only the wrapped model's own forward enters autocast: whatever goes round it would run in float32, unnoticed
    assert torch.is_autocast_enabled(inputs[0].device.type), "the step runs in float32 and not in bfloat16"
