"""The type that answers are computed in: float32 where a CPU would have to emulate the model's bfloat16."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from llava_llama31.trainer.costs.matrix_peak import CpuSpeed, measure_cpu_speed


def answers_in_float32(
    model: PreTrainedModel,
    say: Callable[[str], None],
    *,
    insists: bool = False,
    measure: Callable[[], CpuSpeed] = measure_cpu_speed,
) -> bool:
    """Whether a model in bfloat16 should answer in float32, which holds its weights exactly; one line says why.

    Args:
        model: where it will answer.
        say: prints the line.
        insists: bfloat16 was asked for by name; then the line is a warning and the answer is no.
        measure: measures this CPU, where that matters.
    """
    if model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return False
    speed = measure()
    if not speed.is_slow_in_bfloat16:
        return False
    say(f"warning: answering in bfloat16, and {speed}" if insists else f"answering in float32: {speed}")
    return not insists
