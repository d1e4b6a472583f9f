"""Runs small steps on the fake device in a process of its own; prints their traces as one JSON object.

python tests/fake_cuda/scenarios.py OUTPUT [all]
"""

import io
import json
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from steps import Step, Trace, answer, gpu, sharded, torch, train  # first: it loads the device before torch


sys.path.insert(0, str(Path(__file__).parents[1]))

import roofline
from conftest import PINPOINTS, TILE, make_tokenizer
from fused import Like, least, scheduled

from llava_llama31.packed_llama_llava_llama31 import PLAIN
from llava_llama31.processing import build_processor
from llava_llama31.trainer.training.optimizers import update_in_place


def schedules() -> dict[str, list[Any]]:
    """Bytes of each kernel of the functions that are compiled, at the 8B width, and the least that they can be."""

    def like(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Like:
        return Like(shape, torch.empty(shape, device="meta").stride(), dtype)

    rows, hidden, inner = 9800, 4096, 14_336
    x, wide, weight = like(1, rows, hidden), like(1, rows, inner), like(hidden)
    scale, heads, angles = like(1, rows, 1, dtype=torch.float32), like(1, rows, 32, 128), like(1, rows, 128)
    flat, numbers, seeds = (
        like(n, dtype=t) for n, t in ((inner * 8, torch.bfloat16), (7, torch.float32), (2, torch.int64))
    )
    given: dict[Any, tuple[Any, ...]] = {
        PLAIN.norm: (x, weight, 1e-5, torch.bfloat16),
        PLAIN.sum_norm: (x, x, weight, 1e-5, torch.bfloat16),
        PLAIN.norm_again: (x, weight, scale, torch.bfloat16),
        PLAIN.norm_gradient: (x, x, x, weight, scale, True),
        PLAIN.rotate: (heads, angles, angles),
        PLAIN.rotate_back: (heads, angles, angles),
        PLAIN.gated: (wide, wide),
        PLAIN.gated_gradient: (wide, wide, wide),
        update_in_place: (flat, flat, flat, flat, numbers, seeds),
    }
    return {
        function.__name__: [scheduled(function, arguments), least(function, arguments)]
        for function, arguments in given.items()
    }


def printed_prediction(phases: dict[str, Trace]) -> str:
    """What the benchmark prints with `--json` of a step that has been traced."""
    with redirect_stdout(io.StringIO()) as printed, mock.patch.object(roofline, "train", lambda step, saves: phases):
        assert roofline.main(["--shape", "tiny", "--stage", "instruct", "--device", "h100", "--json"]) == 0
    return printed.getvalue()


def main(output: Path, *, everything: bool) -> None:
    processor = build_processor(
        make_tokenizer(),
        image_size=TILE,
        patch_size=14,
        image_mean=(0.48, 0.46, 0.41),
        image_std=(0.27, 0.26, 0.28),
        image_grid_pinpoints=PINPOINTS,
    )
    small = gpu.SHAPES["small"]
    text = {**small.text, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
    vision = {**small.vision, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "image_size": TILE}
    shape = replace(small, text=text, vision=vision, num_words=processor.image_token_id)
    base = Step(shape, micro_batch=4)

    def plant(model: Any) -> None:
        model.lm_head.register_forward_hook(lambda module, inputs, output: [output.item(), None][1])

    traces = {
        "weights": train(base),
        "autocast": train(replace(base, autocast=True)),
        "lora": train(replace(base, autocast=True, rank=4, images="features")),
        "pixels": train(replace(base, images="pixels"), processor),
        "selective": train(replace(base, checkpointing="selective")),
        "planted": train(base, plant=plant),
        "rank 0": sharded(replace(base, autocast=True), rank=0),
        "rank 1": sharded(replace(base, autocast=True), rank=1),
        "answers": answer(shape, processor, [(60, 90), (28, 28)]),
    }
    if everything:
        traces |= {
            "projector": train(replace(base, stage="projector", autocast=True, checkpointing=0)),
            "features": train(replace(base, images="features")),
            "before ampere": train(replace(base, varlen=False)),
            "unfused": train(replace(base, fused=False)),
        }
    content = {name: {phase: vars(trace) for phase, trace in phases.items()} for name, phases in traces.items()}
    output.write_text(
        json.dumps({**content, "schedules": schedules(), "roofline": printed_prediction(traces["weights"])})
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), everything="all" in sys.argv[2:])
