"""Runs small steps on the fake device in a process of its own; prints their traces as one JSON object.

python tests/fake_cuda/scenarios.py OUTPUT
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from steps import Step, answer, gpu, train  # first: it loads the device before torch


sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import PINPOINTS, TILE, make_tokenizer

from llava_llama31.processing import build_processor


def main(output: Path) -> None:
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
        "projector": train(replace(base, stage="projector", autocast=True, checkpointing=0)),
        "lora": train(replace(base, autocast=True, rank=4)),
        "features": train(replace(base, images="features")),
        "pixels": train(replace(base, images="pixels"), processor),
        "before ampere": train(replace(base, varlen=False)),
        "planted": train(base, plant=plant),
        "answers": answer(shape, processor, [(60, 90), (28, 28)]),
    }
    content = {name: {phase: vars(trace) for phase, trace in phases.items()} for name, phases in traces.items()}
    output.write_text(json.dumps(content))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
