"""The loss on a stage's validation rows."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from llava_llama31.trainer.data.batches.dataset import StageDataset
from llava_llama31.trainer.distributed.devices import widest_float
from llava_llama31.trainer.errors import Unhealthy
from llava_llama31.trainer.training.batch_loading import BatchLoader, num_supervised


def validation_loss(
    loader: BatchLoader, dataset: StageDataset, model: torch.nn.Module, loss_of: Callable[[dict[str, Any]], float]
) -> float:
    """Mean loss over the supervised tokens of all ranks. Collective; `model` is in evaluation mode meanwhile.

    Args:
        loss_of: sum of the losses of a micro-batch.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64)  # loss, supervised tokens
    batches = loader.validation_batches()
    rows = list(batches)
    drawn = loader.drawn(
        iter(loader.loader(dataset, batches)), lambda number: [dataset.record_id(index) for index in rows[number]]
    )
    for batch in drawn:
        count = num_supervised(batch)
        totals += torch.tensor([loss_of(batch), count], dtype=torch.float64)
    if loader.args.world_size > 1:
        totals = totals.to(loader.args.device, widest_float(loader.args.device))
        dist.all_reduce(totals)
    model.train(was_training)
    return (totals[0] / totals[1]).item()


def check_finite(name: str, value: float, where: str) -> None:
    """Refuse to train on weights whose validation loss is not a number.

    Raises:
        Unhealthy: naming the metric and the step.
    """
    if not math.isfinite(value):
        fix = "lower the learning rate, or look at the validation rows"
        raise Unhealthy(f"{name} is {value}", where=where, fix=fix)
