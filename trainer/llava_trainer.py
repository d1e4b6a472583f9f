"""The one Trainer: learning rate per module group, exact data order, checkpoints that are complete or invisible."""

import logging
import math
import random
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
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

from llava_llama31.trainer import checkpoints
from llava_llama31.trainer.collator import Collator
from llava_llama31.trainer.engine import engine_of, fsdp_plugin, uses_fsdp, whole_parameters
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.in_training import TrainingQuestions
from llava_llama31.trainer.meter import Meter
from llava_llama31.trainer.module_groups import group_parameters
from llava_llama31.trainer.optimizers import AdamWBfloat16, load_portable_state, portable_state
from llava_llama31.trainer.order import BatchOrder, Lengths, RankBatches


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
        meter: counts what the steps need.
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
        self.meter = meter
        self._counts: dict[int, np.ndarray] = {}
        super().__init__(
            model,
            args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            callbacks=[_Epochs(self), *(callbacks or [])],
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
        batches = RankBatches(
            self.order,
            micro_batch=self.args.per_device_train_batch_size,
            rank=self.args.process_index,
            num_processes=self.args.world_size,
            packed=self.packed,
        )
        return self._loader(self.train_dataset, batches)

    def _loader(self, dataset: Dataset, batches: RankBatches) -> DataLoader:
        # not through accelerator.prepare: it would split the batches among the ranks a second time
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and not self.args.use_cpu,
            worker_init_fn=_quiet_worker,
            # a forked worker would keep a copy of all weights that the training goes on to change
            multiprocessing_context="forkserver" if self.args.dataloader_num_workers else None,
            persistent_workers=False,
        )

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
            wrong = [
                f"{name} is {logs[name]}" for name in ("loss", "grad_norm") if not math.isfinite(logs.get(name, 0))
            ]
            if wrong:
                raise UserError(
                    f"not finite: {', '.join(wrong)}",
                    where=f"step {self.state.global_step}",
                    fix="lower the learning rate, or go back to a checkpoint before it and look at the data there",
                )
            now, step = time.monotonic(), self.state.global_step
            trained = self.trained(step)
            seconds, meters = self.meter.read()
            logs["supervised_tokens"] = int(trained[1])
            for name, count in zip(_COUNTED, trained - self._last_log, strict=True):
                logs[f"{name}_per_second"] = round(float(count) / seconds, 2)
            logs |= meters
            logs["seconds"] = round(self._seconds_before + now - self._started, 3)
            self._last_log = trained
        super().log(logs, start_time)

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
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            self.meter.add(batch)
        return batches, num_items

    def start_clock(self) -> None:
        earlier = [entry["seconds"] for entry in self.state.log_history if "seconds" in entry]
        self._seconds_before = earlier[-1] if earlier else 0.0
        self._started = time.monotonic()
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
        for batch in self._loader(dataset, batches):
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
        fault = checkpoints.verify(best)
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
        with self.meter.aside():
            self._save_whole(model, trial)

    def _save_whole(self, model: PreTrainedModel, trial: object | None) -> None:
        final = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        staging = final.parent / checkpoints.STAGING / final.name
        if self.args.should_save:
            for leftover in final.parent.glob(checkpoints.STAGING + "*"):
                checkpoints.remove(leftover)
            staging.mkdir(parents=True)
        self._barrier()
        self.saving_to = staging.parent
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.saving_to = None
        self._barrier()
        if self.args.should_save:
            # the parent noted the staging folder; best_checkpoint owns this fact
            self.state.best_model_checkpoint = None
            self.state.save_to_json(str(staging / TRAINER_STATE_NAME))
            facts = {
                "step": self.state.global_step,
                "num_processes": self.args.world_size,
                "engine": engine_of(self.args),
            }
            checkpoints.publish(staging, final, facts)
            checkpoints.remove(staging.parent)
            checkpoints.rotate(final.parent, self.args.save_total_limit, spare=self.best_checkpoint)
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
        self.start_clock()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = {"optimizer": portable_state(self.optimizer), "scheduler": self.lr_scheduler.state_dict()}
        if self.args.should_save:
            checkpoints.save_tree(Path(output_dir, "optimizer"), state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = checkpoints.load_tree(Path(checkpoint, "optimizer"))
        load_portable_state(self.optimizer, state["optimizer"])
        self.lr_scheduler.load_state_dict(state["scheduler"])

    def _save_rng_state(self, output_dir: str) -> None:
        state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        checkpoints.save_tree(Path(output_dir, f"rng_state_{self.args.process_index}"), state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        path = Path(checkpoint or "", f"rng_state_{self.args.process_index}")
        if checkpoint is None or not path.with_suffix(".json").is_file():
            logger.warning("no random state of rank %d in %s: randomness starts anew", self.args.process_index, path)
            return
        state = checkpoints.load_tree(path)
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

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True  # a loss that is not finite stops the run before it is saved


class StopOnSignal(TrainerCallback):
    """The first Ctrl-C or SIGTERM saves and stops at the next step, on all ranks; the second one stops at once."""

    def __init__(self):
        self.signal: int | None = None  # received by this process
        self.agreed = False  # received by any, and acted on by all
        self._former: dict[int, object] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._former[number] = signal.signal(number, self._receive)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        received = self.signal or 0
        if args.world_size > 1:
            flag = torch.tensor(received, device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            received = int(flag)
        if received and state.global_step < state.max_steps:
            self.agreed = True
            control.should_log = control.should_save = control.should_training_stop = True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = number
        logger.warning("%s: saving at the end of this step; once more stops at once", signal.Signals(number).name)


def _assert_autocast(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    # only the wrapped model's own forward enters autocast: whatever goes round it would run in float32, unnoticed
    assert torch.is_autocast_enabled(inputs[0].device.type), "the step runs in float32 and not in bfloat16"


def _quiet_worker(worker_id: int) -> None:
    # signals reach the whole process group; the main process decides when its workers end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
