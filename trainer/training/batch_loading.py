"""The micro-batches of a stage as a rank of it draws them, and the records that they are made of."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from llava_llama31.processing import IGNORE_INDEX
from llava_llama31.trainer.data.batches.batch_order import BatchOrder, Lengths, RankBatches
from llava_llama31.trainer.data.batches.collator import Collator
from llava_llama31.trainer.data.batches.dataset import StageDataset
from llava_llama31.trainer.data.batches.device_tiles import DeviceTiles
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.in_training import TrainingQuestions
from llava_llama31.trainer.fault_tolerance.stage_guard import Guard
from llava_llama31.trainer.fault_tolerance.step_health import Records
from llava_llama31.trainer.fault_tolerance.watchdog import loader_failure, set_up_worker


def sent(value: Any, device: torch.device) -> Any:
    """A tensor on its way to the device, for which nobody waits: the loader's memory is pinned. Other values as is."""
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value


def num_supervised(batch: Mapping[str, Any]) -> int:
    """Labels of a micro-batch on the host that the loss counts: a row's first is never predicted."""
    return int(batch["labels"][..., 1:].ne(IGNORE_INDEX).sum())


@dataclass(frozen=True, kw_only=True)
class StageBatches:
    """What a stage trains and validates on.

    Args:
        order: global batches of the training rows.
        validation_lengths: of the validation rows.
        packed: micro-batches are packed rows.
        device_tiles: makes the tiles of micro-batches that come with `pixels` instead.
        questions: sets asked at every evaluation, beside the loss on the validation rows.
    """

    training: StageDataset
    validation: StageDataset
    collator: Collator
    order: BatchOrder
    validation_lengths: Lengths
    packed: bool
    device_tiles: DeviceTiles | None = None
    questions: Sequence[TrainingQuestions] = ()


class BatchLoader:
    """Loads this rank's share of the batches, and names the records of a step."""

    def __init__(self, batches: StageBatches, args: TrainingArguments, guard: Guard):
        self.batches, self.args, self.guard = batches, args, guard

    def training_batches(self) -> RankBatches:
        return self._share(self.batches.order, self.args.per_device_train_batch_size)

    def validation_batches(self) -> RankBatches:
        order = BatchOrder(
            self.batches.validation_lengths,
            global_batch=self.args.per_device_eval_batch_size * self.args.world_size,
            seed=0,
            keep_last=True,
        )
        return self._share(order, self.args.per_device_eval_batch_size)

    def _share(self, order: BatchOrder, micro_batch: int) -> RankBatches:
        return RankBatches(
            order,
            micro_batch=micro_batch,
            rank=self.args.process_index,
            num_processes=self.args.world_size,
            packed=self.batches.packed,
        )

    def loader(self, dataset: StageDataset, batches: RankBatches) -> DataLoader:
        # not through accelerator.prepare: it would split the batches among the ranks a second time
        num_workers = self.args.dataloader_num_workers
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=self.batches.collator,
            num_workers=num_workers,
            pin_memory=self.args.dataloader_pin_memory and not self.args.use_cpu,
            worker_init_fn=set_up_worker,
            timeout=self.guard.loader_timeout if num_workers else 0,
            # a forked worker would keep a copy of all weights, which training changes
            multiprocessing_context=self.guard.watchdog.worker_context if num_workers else None,
            persistent_workers=False,
        )

    def records(self, step: int) -> Records:
        """Record ids of a step, counted from 1: by rank, micro-batch and sample."""
        name = self.batches.training.record_id
        ranks = self.training_batches().of_ranks(step - 1)
        return [[[name(index) for index in micro_batch] for micro_batch in rank] for rank in ranks]

    def drawn_in_step(self, loader: Iterator[dict[str, Any]], step: int, first: int) -> Iterator[dict[str, Any]]:
        """Micro-batches of a step, counted from 1; `first` is the number of its first one since the loader began."""
        return self.drawn(loader, lambda number: self.records(step)[self.args.process_index][number - first], first)

    def drawn(
        self, loader: Iterator[dict[str, Any]], records: Callable[[int], list[str]], first: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Micro-batches as the loader yields them.

        Args:
            records: record ids of a micro-batch, by its number since the loader began.
            first: number of the first micro-batch.

        Raises:
            UserError: naming the worker that failed, and its records.
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
                # the last two when a worker is gone before its tensors were taken over
                if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader"):
                    raise
                worker, guard = number % self.args.dataloader_num_workers, self.guard
                raise loader_failure(error, worker, records(number), guard.where, guard.loader_timeout) from error
            number += 1
            yield batch
