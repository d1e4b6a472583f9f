"""Predicts seconds and MFU of a micro-batch on a GPU, from a trace of the step on a fake CUDA device.

A prediction, not a measurement: the trace counts every kernel, its FLOP and the bytes that it must move; a kernel is
assumed to take the longer of the two at fixed shares of the data sheet's figures. Functions that torch.compile fuses
count as the kernels of Inductor's own schedule for an H100. Communication, the loader and the optimizer's step are not
in it. Needs no GPU and no Triton, but a CPU build of PyTorch and g++.

python benchmarks/roofline.py --shape 8b --stage instruct --device h100 --json
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fake_cuda"))

from steps import Step, Trace, gpu, train  # first: it loads the device before torch

from llava_llama31.trainer.costs.accelerators import ACCELERATORS, ATTENTION, BANDWIDTH, PRODUCTS, Accelerator
from llava_llama31.trainer.costs.flops import FlopsByPart, ModelShape, Work, needed_flops


COUNTED = ("inputs", "forward", "backward")
LAUNCH = 7e-6  # seconds of the host per kernel


def micro_batch_flops(step: Step) -> FlopsByPart:
    """FLOP of the second micro-batch, which `train` traces."""
    work = gpu.Workload(
        step.shape, gpu.card_stage(step.stage), num_samples=2 * step.micro_batch, samples_per_step=step.micro_batch
    )
    row = work.micro_batches(gpu.SHARED, step.micro_batch)[-1][-1]
    batch = work.collator(gpu.SHARED)(row)
    layout = work._layouts.feature_layout(batch["image_sizes"])[0]
    counted = Work.pruned(
        batch["packing"],
        batch["supervised_positions"],
        num_tiles=len(batch["pixel_values"]),
        num_image_features=int((layout >= 0).sum()),
    )
    trainable = gpu.card_stage(step.stage).trainable
    return needed_flops(
        ModelShape.of(step.shape.config), counted, trainable, checkpointing=step.checkpointing, lora_rank=step.rank
    )


def seconds_by_part(traces: dict[str, Trace], flops: FlopsByPart, device: Accelerator) -> Counter[str]:
    """Seconds of products, attention and everything else, whose time is that of its bytes."""
    seconds: Counter[str] = Counter()
    peak, bandwidth = PRODUCTS * device.bfloat16, BANDWIDTH * device.bandwidth
    for phase in COUNTED:
        for name, operations, size in traces[phase].work:
            part = "products" if operations else "attention" if "varlen" in name else "other"
            seconds[part] += max(operations / peak, size / bandwidth)
    seconds["attention"] = max(seconds["attention"], flops.attention.hardware / (ATTENTION * device.bfloat16))
    return seconds


def predict(step: Step, device: Accelerator) -> dict[str, Any]:
    """What `--json` prints, and more: seconds by part, bytes by operation, copies from pageable memory."""
    traces = train(step, saves=False)
    flops = micro_batch_flops(step)
    parts = seconds_by_part(traces, flops, device)
    kernels = sum(sum(traces[phase].kernels.values()) for phase in COUNTED)
    sizes: Counter[str] = Counter()
    for phase in COUNTED:
        sizes.update(traces[phase].bytes)
    seconds = max(sum(parts.values()), kernels * LAUNCH)
    return {
        "waits": sum(sum(traces[phase].waits.values()) for phase in COUNTED),
        "kernels": kernels,
        "gigabytes": round(sum(sizes.values()) / 1e9, 1),
        "seconds": round(seconds, 4),
        "mfu": round(flops.total.needed / seconds / device.bfloat16, 4),
        "parts": {name: round(value, 4) for name, value in parts.items()},
        "bytes": dict(sizes.most_common(12)),
        "pageable": max((size for phase in COUNTED for size in traces[phase].pageable.values()), default=0),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(gpu.SHAPES), default="8b")
    parser.add_argument("--stage", choices=("projector", "instruct"), default="instruct", help="of llama31-8b-card")
    parser.add_argument("--device", choices=tuple(ACCELERATORS), default="h100")
    parser.add_argument("--micro-batch", type=int, default=8, metavar="N", help="samples; default: 8")
    parser.add_argument(
        "--checkpointing",
        type=lambda text: text if text == "selective" else int(text),
        default="selective",
        metavar="N",
        help="of every Nth layer; 0: none; default: selective",
    )
    parser.add_argument("--unfused", action="store_true", help="norms, rotary embeddings and MLPs in eager kernels")
    parser.add_argument("--autocast", action="store_true", help="float32 weights, computed with in bfloat16")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    step = Step(
        gpu.SHAPES[options.shape],
        options.stage,
        micro_batch=options.micro_batch,
        autocast=options.autocast,
        checkpointing=options.checkpointing,
        fused=not options.unfused,
    )
    device = ACCELERATORS[options.device]
    with redirect_stdout(sys.stderr if options.json else sys.stdout):
        found = predict(step, device)
    if options.json:
        print(json.dumps({key: found[key] for key in ("waits", "kernels", "gigabytes", "seconds", "mfu")}))
        return 0
    what = f"one micro-batch of {step.micro_batch} samples, {options.stage} at {options.shape}"
    print(f"prediction for {what}, {device.name}")
    for key, value in found.items():
        print(f"  {key:10} {value}")
    print(
        f"assumed: products at {PRODUCTS:.0%} of {device.bfloat16 / 1e12:.0f} TFLOP/s, attention at {ATTENTION:.0%},"
        f" memory at {BANDWIDTH:.0%} of {device.bandwidth / 1e12:.2f} TB/s, {LAUNCH * 1e6:.0f} us a launch;"
        " each input read once, nothing found in caches;"
        " fused functions as the kernels that Inductor schedules for an H100, each compiled alone;"
        " forward and backward only"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
