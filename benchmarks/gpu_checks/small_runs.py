"""Runs of `train` on a small model that is made here: whole, and stopped and resumed, whose bits are compared."""

import io
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import evaluation
import torch
import yaml
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gpu_checks.place import Place, expect
from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.cli import main
from llava_llama31.trainer.errors import EXIT_INTERRUPTED
from llava_llama31.trainer.fault_tolerance.stage_guard import StopRequests
from llava_llama31.trainer.training.llava_trainer import LlavaTrainer


# Llama and CLIP, for a GPU and for a CPU
TEXT, TEXT_SMALL = (
    evaluation.TEXT | {"num_hidden_layers": 4},
    {
        "vocab_size": 640,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
)
VISION, VISION_SMALL = (
    evaluation.VISION | {"num_hidden_layers": 4},
    {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "projection_dim": 32,
    },
)
STAGE = "instruct"
# trains a recipe into a folder, asks it to stop in a step; returns exit code and output
Train = Callable[[Path, Path, int | None], tuple[int, str]]


def make_parts(folder: Path, place: Place, num_questions: int, num_images: int) -> list[dict[str, Any]]:
    """A model in `model/`, images and `questions.jsonl`; returns the questions."""
    text, vision = (TEXT_SMALL, VISION_SMALL) if place.small else (TEXT, VISION)
    evaluation.make_model(folder / "model", text, vision)
    evaluation.make_questions(folder, num_questions, num_images)
    return [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]


def make_recipe(folder: Path, place: Place, **keys: Any) -> Path:
    """A recipe of one stage of three steps with these keys, without evaluation, and all that it needs."""
    rows = []
    for row in make_parts(folder, place, num_questions=12, num_images=4):
        turns = [{"from": "human", "value": f"<image>\n{row['question']}"}, {"from": "gpt", "value": "the sign"}]
        rows.append({"id": f"r{row['question_id']}", "image": row["image"], "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    stage = {
        "trainable": ["multi_modal_projector", "language_model"],
        "learning_rate": 1e-3,
        "data": [{"name": "rows", "path": str(folder / "rows.json")}],
        "global_batch": 4,
        "micro_batch": 2,
        "max_steps": 3,
        "precision": "float32" if place.small else "bfloat16",
        "deterministic": True,
        "logging_steps": 1,
        "save_steps": 3,
        "dataloader_workers": 0,
    }
    model = {"checkpoint": str(folder / "model"), "dtype": "float32"}
    content = {"name": "gpu-check", "seed": 1, "model": model, "stages": {STAGE: stage | keys}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "recipe.yaml"


def train_here(recipe: Path, folder: Path, stop_in: int | None) -> tuple[int, str]:
    """In this process."""

    def on_step_begin(
        self: TrainerCallback,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **others: object,
    ) -> None:
        if state.global_step + 1 == stop_in:
            signal.raise_signal(signal.SIGTERM)

    said = io.StringIO()
    with mock.patch.object(StopRequests, "on_step_begin", on_step_begin), redirect_stdout(said), redirect_stderr(said):
        code = main(["train", str(recipe), "--output", str(folder)])
    return code, said.getvalue()


def train_apart(recipe: Path, folder: Path, stop_in: int | None) -> tuple[int, str]:
    """In a process of its own, which gets SIGTERM as soon as it has saved, in whatever step."""
    command = [sys.executable, "-m", "llava_llama31.trainer.cli", "train", str(recipe), "--output", str(folder)]
    log = folder.with_suffix(".txt")
    with log.open("w") as output:
        job = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while stop_in is not None and job.poll() is None:
            if any(folder.glob("stages/*/checkpoint-*")):
                job.send_signal(signal.SIGTERM)
                break
            time.sleep(0.01)
        job.wait()
    return job.returncode, log.read_text()


def check_resume(train: Train, recipe: Path, folder: Path, stop_in: int = 2) -> dict[str, torch.Tensor]:
    """Whether a run that was stopped ends with the bits of one that was not; returns its tensors."""
    for name, stop, expected in (
        ("whole", None, 0),
        ("stopped", stop_in, EXIT_INTERRUPTED),
        ("stopped", None, 0),
    ):
        code, said = train(recipe, folder / name, stop)
        expect(code == expected, f"{name}: exit code {code} and not {expected}: {said[-400:]}")
    expect("resuming from" in said, f"the stopped run started over: {said[-400:]}")
    whole, resumed = (trained_tensors(folder / name) for name in ("whole", "stopped"))
    expect(whole.keys() == resumed.keys(), f"only one run has {sorted(whole.keys() ^ resumed.keys())[:3]}")
    other = [name for name in whole if not torch.equal(whole[name], resumed[name])]
    expect(not other, f"{len(other)} of {len(whole)} tensors have other bits after a resume, e.g. {other[:1]}")
    return whole


def trained_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Final weights and the optimizer's state; DeepSpeed keeps its own in other files."""
    (stage,) = (run / "stages").iterdir()
    newest = max(stage.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    files = [*sorted((stage / "final").glob("*.safetensors")), *newest.glob("optimizer.safetensors")]
    return {f"{file.stem}.{name}": tensor for file in files for name, tensor in load_file(file).items()}


def first_step(run: Path) -> tuple[float, float]:
    """Loss and gradient norm that a run logged of its first step."""
    rows = (json.loads(line) for line in RunFolder(run).log.read_text().splitlines())
    row = next(row for row in rows if "loss" in row)
    return row["loss"], row["grad_norm"]


class Used(NamedTuple):
    """What a micro-batch was computed with: modules by package and class, and operations by name."""

    modules: Counter[str]
    operations: Counter[str]


@contextmanager
def used_at_the_end() -> Iterator[list[Used]]:
    """Context; the list then has what each micro-batch of a run's last step used, when nothing is left to compile."""
    original, found = LlavaTrainer.training_step, []

    def training_step(self: LlavaTrainer, model: torch.nn.Module, *others: Any) -> torch.Tensor:
        if self.state.global_step + 1 < self.state.max_steps:
            return original(self, model, *others)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            loss = original(self, model, *others)
        kinds = (type(module) for module in model.modules())
        modules = Counter(f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in kinds)
        found.append(Used(modules, Counter({event.key: event.count for event in profiled.key_averages()})))
        return loss

    with mock.patch.object(LlavaTrainer, "training_step", training_step):
        yield found
