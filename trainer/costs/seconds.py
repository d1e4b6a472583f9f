"""Predicts the seconds of a training step on a named GPU; a model of data sheets, not a measurement.

A kernel takes as long as its operations or its bytes, at the shares of accelerators.py. Sharded engines exchange
weights and gradients while they compute, which hides most of the shorter of the two; what other engines exchange comes
on top.
"""

from dataclasses import dataclass

from llava_llama31.trainer.costs.accelerators import ATTENTION, BANDWIDTH, LINK, PRODUCTS, Accelerator
from llava_llama31.trainer.costs.flops import FlopsByPart
from llava_llama31.trainer.costs.memory import Engine, Setup


# bytes that norms, activations, rotary embeddings and residual sums move for each position, layer and hidden number:
# forward (and again where it is recomputed), backward, and what selective checkpointing makes again; fused, as on
# packed rows, and eager. From traces of the 8B step (benchmarks/roofline.py)
_FUSED_BYTES, _EAGER_BYTES, _REMADE_BYTES = (47, 85), (170, 210), 28
# of an optimizer's step with clipping, for each trained parameter
_STEP_BYTES = {"adamw": 36, "adamw_8bit": 24, "adamw_bf16": 28}
# seconds that ZeRO-3's hooks take of Python for a layer and micro-batch; bytes/s between machines, for each device,
# and to the host; bytes/s of the host's memory in its optimizer's step. Assumptions
# the share of the shorter one that is not hidden is one too
_EXPOSED = 0.2
_HOOKS, _NETWORK, _PCIE, _HOST = 4e-3, 25e9, 20e9, 100e9


@dataclass(frozen=True)
class StepWork:
    """What all devices do in a step.

    Args:
        flops: of all micro-batches of all devices.
        positions: of the language model, of all of them.
        micro_batches: of one device.
        fused: rows are packed, whose arithmetic between the products is fused.
    """

    flops: FlopsByPart
    positions: float
    micro_batches: int
    fused: bool = True


def step_seconds(
    setup: Setup, work: StepWork, engine: Engine, gpu: Accelerator, num_devices: int, per_node: int | None = None
) -> float:
    """Seconds of an optimizer's step, all its micro-batches included."""
    computing = _computing(setup, work, gpu) / num_devices
    link = LINK * gpu.link if (per_node or num_devices) >= num_devices else _NETWORK
    each, once = _exchanged(setup, engine, num_devices)
    moved = _to_host(setup, engine, num_devices) / _PCIE
    exchanging = work.micro_batches * (each / link + moved)
    if engine.deepspeed and engine.shards_weights:
        computing += work.micro_batches * setup.model.num_layers * _HOOKS
    whole = computing + exchanging
    if engine.shards_weights:
        whole = max(computing, exchanging) + _EXPOSED * min(computing, exchanging)
    return whole + once / link + _optimizing(setup, engine, gpu, num_devices)


def _computing(setup: Setup, work: StepWork, gpu: Accelerator) -> float:
    peak = gpu.peak(setup.precision)
    attention, total = work.flops.attention.hardware, work.flops.total.hardware
    every = setup.checkpointing
    layers = setup.model.num_layers
    wide = 2 if setup.precision == "float32" else 1
    forward, backward = _FUSED_BYTES if work.fused else _EAGER_BYTES
    a_number: float = forward + backward
    if every == "selective":
        a_number += _REMADE_BYTES
    elif every:
        a_number += forward * -(-layers // every) / layers
    a_number *= wide
    moved = work.positions * layers * setup.model.hidden_size * a_number
    return (
        (total - attention) / (PRODUCTS * peak) + attention / (ATTENTION * peak) + moved / (BANDWIDTH * gpu.bandwidth)
    )


def _exchanged(setup: Setup, engine: Engine, num_devices: int) -> tuple[float, float]:
    """Bytes that a device sends for each micro-batch, and once a step."""
    share = (num_devices - 1) / num_devices
    narrow = 4 if setup.precision == "float32" else 2
    trained, weights = setup.num_trained * share, sum(setup.parameters.groups().values()) * share
    if engine.shards_weights:
        return 2 * weights * narrow + trained * (narrow if engine.deepspeed else 4), 0.0
    if engine.shards_gradients:
        return trained * narrow, trained * narrow
    wide = 2 if setup.precision == "bfloat16-weights" or engine.deepspeed else 4
    return 0.0, 2 * trained * wide


def _to_host(setup: Setup, engine: Engine, num_devices: int) -> float:
    """Bytes between a device and its host for each micro-batch."""
    weights = 2 * 2 * sum(setup.parameters.groups().values()) / num_devices if engine.offloads_weights else 0.0
    return weights + (4 * setup.num_trained / num_devices if engine.offloads_optimizer else 0.0)


def _optimizing(setup: Setup, engine: Engine, gpu: Accelerator, num_devices: int) -> float:
    numbers = setup.num_trained / (num_devices if engine.shards_optimizer else 1)
    if engine.offloads_optimizer:
        return numbers * _STEP_BYTES["adamw"] / (_HOST / num_devices)
    return numbers * _STEP_BYTES[setup.optimizer] / (BANDWIDTH * gpu.bandwidth)
