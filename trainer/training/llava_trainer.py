"""The one Trainer: Transformers' hooks, each handed to the part of this room that does the work.

| hook of Transformers | what it does here |
|---|---|
| `get_train_dataloader`, `get_batch_samples` | this rank's micro-batches in the stage's order, counted and timed |
| `_prepare_inputs` | the batch on the device, images as tiles |
| `create_optimizer` | a learning rate per module group |
| `training_step` | keeps the losses of the step |
| `_get_grad_norm` | judges the step before the optimizer runs; may skip it |
| `log` | adds throughput, meters and seconds |
| `evaluate` | exact validation loss, and accuracy on questions |
| `_save_checkpoint`, `_get_output_dir` | saves into a staging folder, which is committed in the background |
| `save_model`, `_save`, `_load_from_checkpoint` | whole weights on rank 0, every one of them or an error |
| `_save_*_state`, `_load_*_state`, `_*_optimizer_and_scheduler` | state without pickle |
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch.utils.data import DataLoader, Dataset
from transformers import (
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from llava_llama31.packed_llama_llava_llama31 import to_device
from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.data.batches.batch_order import RankBatches
from llava_llama31.trainer.distributed.engine import fsdp_plugin, uses_fsdp
from llava_llama31.trainer.distributed.parameters import unsharded, whole_parameters
from llava_llama31.trainer.fault_tolerance.stage_guard import Guard
from llava_llama31.trainer.training.batch_loading import BatchLoader, StageBatches, num_supervised, sent
from llava_llama31.trainer.training.meter import Meter
from llava_llama31.trainer.training.optimizers import make_optimizer, parameter_groups
from llava_llama31.trainer.training.source_losses import SourceLosses
from llava_llama31.trainer.training.stage_checkpoints import (
    StageSaves,
    load_optimizer,
    load_rng_state,
    load_weights,
    save_optimizer,
    save_rng_state,
    save_weights,
    saved_parameters,
    whole_best_checkpoint,
)
from llava_llama31.trainer.training.throughput import Throughput
from llava_llama31.trainer.training.validation import check_finite, validation_loss


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """How a stage optimises and saves.

    Args:
        learning_rates: peak learning rate of each trainable module group.
        bfloat16_moments: optimise with AdamWBfloat16, not with what `args.optim` names.
        decay_all_parameters: apply weight decay to norms and biases too.
        only_trainable: save the trainable parameters alone (adapters); the rest comes from the stage's origin.
        inputs: digests of the stage's data and origin, kept in every checkpoint.
        sources: names of the data sources, in order.
        layers: classes that FSDP shards one by one.
        committed: called in a thread with every complete checkpoint and its step.
    """

    learning_rates: Mapping[str, float]
    bfloat16_moments: bool = False
    decay_all_parameters: bool = False
    only_trainable: bool = False
    inputs: Mapping[str, Any] = field(default_factory=dict)
    sources: Sequence[str] = ()
    layers: Sequence[str] = ()
    committed: Callable[[Path, int], None] | None = None


def _with_bucket_views(given: dict[str, Any]) -> dict[str, Any]:
    """Accelerator's arguments, with which gradients exist once, not in DDP's buckets besides."""
    for handler in given["kwargs_handlers"]:
        if isinstance(handler, DistributedDataParallelKwargs):
            handler.gradient_as_bucket_view = True
    return given


class LlavaTrainer(Trainer):
    """Transformers' Trainer for one stage.

    Args:
        model: the model, or a PEFT model around it, already frozen as the stage asks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        batches: StageBatches,
        processor: LlavaLlama31Processor,
        meter: Meter,
        guard: Guard,
        options: TrainerOptions,
        callbacks: list[TrainerCallback] | None = None,
    ):
        self.batches, self.processor, self.options = batches, processor, options
        self.meter, self.guard = meter, guard
        self.loader = BatchLoader(batches, args, guard)
        self.saving_to: Path | None = None
        only_trainable, committed = options.only_trainable, options.committed
        self.saves = StageSaves(args, guard, inputs=options.inputs, only_trainable=only_trainable, committed=committed)
        self._losses: list[torch.Tensor] = []  # of the step's micro-batches so far
        self.num_drawn = 0  # micro-batches from the epoch's loader
        self.sources = SourceLosses(options.sources, args.device)
        self.throughput = Throughput(batches.order, meter, self.sources)
        super().__init__(
            model,
            args,
            data_collator=batches.collator,
            train_dataset=batches.training,
            eval_dataset=batches.validation,
            processing_class=processor,
            callbacks=[_Epochs(self), *(callbacks or []), guard.requests],
        )
        if args.bf16 and not self._is_sharded:
            self._base(model).get_submodule("lm_head").register_forward_pre_hook(_assert_autocast)

    def _build_accelerator_args(self, **kwargs: object) -> dict[str, Any]:
        own = {"fsdp_plugin": fsdp_plugin(bfloat16=self.args.bf16, layers=self.options.layers)} if uses_fsdp() else {}
        return _with_bucket_views(super()._build_accelerator_args(**kwargs) | own)

    def get_train_dataloader(self) -> DataLoader:
        return self.loader.loader(self.batches.training, self.loader.training_batches())

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | int | None]:
        """The micro-batches of a step, still on the host, for the meters."""
        with self.meter.waiting():
            drawn = self.loader.drawn_in_step(epoch_iterator, self.state.global_step + 1, self.num_drawn)
            batches, num_items = super().get_batch_samples(drawn, num_batches, device)
        self.num_drawn += len(batches)
        for batch in batches:
            self.meter.add(batch)
        return batches, num_items

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> torch.Tensor | int | None:
        """Supervised tokens of a step on all processes; Transformers' own count waits for the device."""
        if not batch_samples:
            return None
        number = to_device([sum(map(num_supervised, batch_samples))], device)
        return self.accelerator.gather(number).sum() if self.args.world_size > 1 else number[0]

    def _prepare_input(self, data: Any) -> Any:
        return super()._prepare_input(sent(data, self.args.device))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch on the device, its images as tiles; rows that are not packed ask for supervised positions only."""
        inputs = super()._prepare_inputs(inputs)
        if "packing" not in inputs:
            inputs["supervised_only"] = True
        if "pixels" in inputs:
            assert self.batches.device_tiles is not None
            inputs["pixel_values"] = self.batches.device_tiles(inputs.pop("pixels"))
        return self.sources.ask(inputs, torch.promote_types(self._stage_model.dtype, torch.float32))

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            target = cast(PreTrainedModel, self.model if model is None else model)
            decayed = None if self.options.decay_all_parameters else self.get_decay_parameter_names(target)
            rates = self.options.learning_rates
            groups = parameter_groups(target, self._base(target), rates, self.args.weight_decay, decayed)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, target)
            narrow, device = self.options.bfloat16_moments, self.args.device
            self.optimizer = make_optimizer(kind, groups, options, bfloat16_moments=narrow, device=device)
        return self.optimizer

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Loss of a micro-batch, kept for the step's judgement."""
        number, step = len(self._losses) + 1, self.state.global_step + 1
        self.guard.watchdog.beat(f"training on micro-batch {number} of step {step}")
        self.saves.check()
        if not self._losses:
            self._loss_before = self._tr_loss.clone()
        self._losses.append(super().training_step(model, inputs, num_items_in_batch))
        return self._losses[-1]

    def _get_grad_norm(
        self, model: torch.nn.Module, grad_norm: torch.Tensor | float | None = None
    ) -> torch.Tensor | float | None:
        """Judge the step before it changes a weight (DeepSpeed has taken it); a skipped step loses its gradients."""
        norm = unsharded(super()._get_grad_norm(model, grad_norm))
        if self.accelerator.optimizer_step_was_skipped:
            norm = math.inf  # the engine's own may be that of an earlier step
        losses, self._losses = self._losses, []
        step = self.state.global_step + 1
        skip, norm = self.guard.judge(step, losses, norm, lambda: self.loader.records(step), self.args.device)
        self.sources.keep(taken=not skip)
        if not skip:
            return norm
        model.zero_grad()  # without gradients an optimizer changes neither weights nor moments
        self._tr_loss.copy_(self._loss_before)
        return None

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:  # type: ignore[override]
        """Train under the watchdog, to the last commit; a resumed stage keeps its judgement of steps."""
        if resume_from_checkpoint:
            self.guard.restore(Path(str(resume_from_checkpoint)))
        with self.guard.watchdog.watching(), self.saves.completed():
            return super().train(resume_from_checkpoint)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            skipped = self.guard.health.skipped_after(self.throughput.logged_step)
            self.throughput.complete(logs, self.state.global_step, skipped)
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss over the supervised tokens of the validation rows and accuracy on the questions, where given."""
        assert eval_dataset is None
        metrics: dict[str, float] = {}
        with self.meter.aside():
            if len(self.batches.validation):
                loss = validation_loss(self.loader, self.batches.validation, self.model_wrapped, self._loss_of)
                check_finite(f"{metric_key_prefix}_loss", loss, f"{self.guard.where}, step {self.state.global_step}")
                metrics |= {f"{metric_key_prefix}_loss": loss, **self.sources.read_evaluation(metric_key_prefix)}
            for asked in self.batches.questions:
                found = asked.ask(
                    self._base(self._stage_model),
                    self.processor,
                    step=self.state.global_step,
                    sharded=self.model_wrapped if self._is_sharded else None,
                    # the wrapped model's forward enters autocast; the modules inside it don't
                    autocast=self.accelerator.autocast(),
                    beat=lambda: self.guard.watchdog.beat("answering questions"),
                )
                metrics |= {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def _stage_model(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.model)

    def _base(self, model: torch.nn.Module) -> LlavaNextForConditionalGeneration:
        """The model without wrappers and adapters."""
        base: Any = self.accelerator.unwrap_model(model)
        return base.get_base_model() if self.options.only_trainable else base

    @property
    def _is_sharded(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _loss_of(self, batch: dict[str, Any]) -> float:
        with self.compute_loss_context_manager():
            return self.model_wrapped(**self._prepare_inputs(batch), num_items_in_batch=1).loss.item()

    def restore_best(self) -> None:
        """Take the weights of the best evaluation, where the stage looks for them (UserError: they are damaged)."""
        best = whole_best_checkpoint(self.args, self.state)
        if best is not None and self.is_deepspeed_enabled:
            deepspeed_load_checkpoint(self.model_wrapped, str(best), load_module_strict=True)
        elif best is not None:
            self._load_from_checkpoint(str(best))

    def restore(self, checkpoint: Path) -> None:
        """Take weights and state of a checkpoint, wrapped as for training, without training."""
        if not self._is_sharded:
            self._load_from_checkpoint(str(checkpoint))
        self._prepare_for_training(self.args.max_steps, self.get_train_dataloader(), str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self.guard.restore(checkpoint)
        self.throughput.start(self.state)

    def _get_output_dir(self, trial: object | None) -> str:
        return str(self.saving_to or self.args.output_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        with self.meter.aside(), self.saves.staged(self.state, self._stage_model) as self.saving_to:
            super()._save_checkpoint(model, trial)
        self.saving_to = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Whole weights and processor in one folder. Collective."""
        self._save(output_dir, self.whole_weights())

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """What rank 0 saves; None: what its model holds. Collective."""
        if not (self.options.only_trainable or self._is_sharded):
            return None
        saved = saved_parameters(self._stage_model, only_trainable=self.options.only_trainable)
        return whole_parameters(saved, deepspeed=self.is_deepspeed_enabled)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self._stage_model)
            folder = Path(str(output_dir or self.args.output_dir))
            save_weights(folder, model, state_dict, only_trainable=self.options.only_trainable)
            self.processor.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_weights(self._stage_model, Path(resume_from_checkpoint), only_trainable=self.options.only_trainable)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
        else:
            save_optimizer(Path(output_dir), self.optimizer, self.lr_scheduler, write=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _save_rng_state(self, output_dir: str) -> None:
        save_rng_state(Path(output_dir), self.args.process_index)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        load_rng_state(Path(checkpoint) if checkpoint else None, self.args.process_index)


class _Epochs(TrainerCallback):
    """Sets the epoch of the batches, starts the clock, and logs before every save and at the end."""

    def __init__(self, trainer: LlavaTrainer):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.trainer.throughput.start(state)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        batches: RankBatches = kwargs["train_dataloader"].batch_sampler
        batches.set_epoch(state.global_step // self.trainer.batches.order.steps_per_epoch)
        self.trainer.num_drawn = 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True


def _assert_autocast(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    # only the wrapped model's own forward enters autocast: whatever bypasses it would run in float32, unnoticed
    assert torch.is_autocast_enabled(inputs[0].device.type), "the step runs in float32 and not in bfloat16"
