"""The product's own runs: the command line stopped and resumed, with fp8 and NF4; its evaluator."""

import json
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gpu_checks.place import Detail, NotHere, Place, expect
from gpu_checks.small_runs import (
    Used,
    check_resume,
    first_step,
    make_parts,
    make_recipe,
    train_apart,
    train_here,
    used_at_the_end,
)
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.questions import load_questions
from llava_llama31.trainer.evaluation.settings import EvaluationSettings
from llava_llama31.trainer.evaluation.textvqa import evaluate
from llava_llama31.trainer.model.device_options import check_device_options
from llava_llama31.trainer.model.opening import open_model
from llava_llama31.trainer.recipes.loading import load_recipe


FP8: dict[str, Any] = {"fp8": True, "compile": True, "precision": "bfloat16"}
NF4: dict[str, Any] = {"lora": {"r": 4, "alpha": 8, "quantize": "nf4"}}
# a narrow layer's class, a part of its operations' names, and how many of them it runs forward and backward
Narrow = tuple[str, str, int]
FLOAT8: Narrow = ("torchao.Float8Linear", "_scaled_mm", 3)
FOUR_BITS: Narrow = ("bitsandbytes.Linear4bit", "4bit", 2)
BATCH_SIZES = (64, 3)
# a run that gets a signal when it has saved, and has steps left then
LONG_ENOUGH: dict[str, Any] = {"max_steps": 30, "save_steps": 5}


def command(place: Place) -> Detail:
    """`train` to its export, and again with SIGTERM and the same command: it ends with the same bits."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = make_recipe(folder, place, **LONG_ENOUGH)
        started = time.monotonic()
        tensors = check_resume(train_apart, recipe, folder)
        for run in ("whole", "stopped"):
            expect((folder / run / "summary.json").is_file(), f"{run}: no summary.json")
        return {"tensors": len(tensors), "seconds": round(time.monotonic() - started, 1)}


def fp8(place: Place) -> Detail:
    """Steps with float8 products, compiled and really run; saved and resumed with the same bits."""
    return _resumed_with(place, FP8, FLOAT8)


def nf4(place: Place) -> Detail:
    """Steps of adapters over 4-bit weights (QLoRA), really computed with; saved and resumed with the same bits."""
    if find_spec("peft") is None:
        raise NotHere("adapters need peft: pip install 'llava-llama31[peft]'")
    return _resumed_with(place, NF4, FOUR_BITS)


def _resumed_with(place: Place, keys: dict[str, Any], narrow: Narrow) -> Detail:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = make_recipe(folder, place, **keys)
        refuse_what_is_not_here(recipe)
        with used_at_the_end() as used:
            tensors = check_resume(train_here, recipe, folder)
        layers = expect_narrow(used[0], *narrow)
        return {"first_step": first_step(folder / "whole"), "tensors": len(tensors), "narrow_layers": layers}


def expect_narrow(used: Used, kind: str, part: str, each: int) -> int:
    """How many layers of a stage's model are of this kind, all of which have to run their own operations."""
    layers = used.modules[kind]
    expect(layers > 0, f"no layer of the stage's model is a {kind}")
    ran = sum(number for name, number in used.operations.items() if part in name)
    expect(ran >= each * layers, f"{layers} layers are {kind}, and a micro-batch ran {ran} operations *{part}*")
    return layers


def refuse_what_is_not_here(recipe: Path) -> None:
    """NotHere, in the words in which `train` refuses a stage that this device can't run."""
    try:
        for name, stage in load_recipe(str(recipe)).stages.items():
            check_device_options(stage, f"stages.{name}")
    except UserError as error:
        raise NotHere(str(error)) from error


def evaluation(place: Place) -> Detail:
    """Questions asked by the evaluator: all are answered, with the same tokens whatever the batch's size."""
    number, images = (12, 4) if place.small else (200, 100)
    dtype = torch.float32 if place.device.type == "cpu" else torch.bfloat16
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_parts(folder, place, number, images)
        model, processor = open_model(folder / "model", dtype=str(dtype).removeprefix("torch."), device=place.device)
        questions = load_questions(folder / "questions.jsonl")
        found: Detail = {"questions": number, "seconds": {}}
        answers: dict[str, list[Any]] = {}
        for invariant, size in ((True, BATCH_SIZES[0]), (True, BATCH_SIZES[1]), (False, BATCH_SIZES[0])):
            key = f"{'one by one, ' * invariant}batches of {size}"
            settings = EvaluationSettings(revision="", batch_size=size, max_new_tokens=8, batch_invariant=invariant)
            done = evaluate(model, processor, questions, folder / key, settings)
            rows = [json.loads(line) for line in done.predictions.read_text().splitlines()]
            failed = [row["error"] for row in rows if row.get("error")]
            expect(not failed and len(rows) == number, f"{key}: {len(failed)} without an answer: {failed[:1]}")
            answers[key] = [row["token_ids"] for row in rows]
            found["seconds"][key] = round(done.seconds, 2)
    one, other, together = answers.values()
    differing = sum(a != b for a, b in zip(one, other, strict=True))
    expect(not differing, f"{differing} of {number} answers depend on the batch's size")
    # that they do is no fault here; on a CPU in float32 they don't
    return found | {"same_together": sum(a == b for a, b in zip(one, together, strict=True))}
