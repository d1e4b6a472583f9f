"""What the person at the terminal sees: on stderr, from the main process only."""

import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_llama31.trainer.distributed.engine import engine_of
from llava_llama31.trainer.distributed.parameters import num_elements, num_held
from llava_llama31.trainer.distributed.rank import rank
from llava_llama31.trainer.evaluation.vqa_accuracy import PROTOCOL
from llava_llama31.trainer.model.module_groups import GroupReport
from llava_llama31.trainer.recipes.derived import Derived, remarks
from llava_llama31.trainer.recipes.schema import Stage
from llava_llama31.trainer.redaction import plain
from llava_llama31.trainer.terminal import Terminal


def make_console() -> Terminal:
    """Console on stderr (stdout belongs to --json); silent on all ranks but the first."""
    return Terminal(stderr=True, quiet=rank() != 0)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def print_stage_start(
    console: Terminal, name: str, stage: Stage, derived: Derived, report: list[GroupReport], origin: str
) -> None:
    """The freeze report, what was inherited from where, and the steps."""
    console.rule(f"stage {name}")
    names = ("module group", "parameters", "trainable", "learning rate")
    groups = []
    for line in report:
        rate = f"{line.learning_rate:g}" if line.learning_rate is not None else "frozen"
        groups.append((line.group, f"{line.num_parameters:,}", f"{line.num_trainable:,}", rate))
    console.table(names, groups, numbers=names[1:])
    console.print(f"weights from {plain(origin)}; optimizer and schedule are fresh")
    console.print(
        f"{derived.num_samples:,} samples, {derived.steps:,} steps of {stage.global_batch} "
        f"({stage.micro_batch} x {derived.gradient_accumulation} accumulated x "
        f"{_counted(derived.num_processes, 'device')}), {stage.schedule} schedule, "
        f"{_counted(derived.warmup_steps, 'warm-up step')}, {stage.precision}"
    )
    for remark in remarks(stage, derived):
        console.print(f"note: {remark}", style="yellow")


class StageProgress(TrainerCallback):
    """One line per log: step, loss, learning rate, speed, time left."""

    def __init__(self, console: Terminal, stage: str):
        self.console, self.stage = console, stage
        self.started, self.first_step = 0.0, 0

    def on_train_begin(  # type: ignore[override]  # Transformers passes `model` by name
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: torch.nn.Module,
        **kwargs: object,
    ) -> None:
        self.started, self.first_step = time.monotonic(), state.global_step
        if args.world_size > 1:
            held, total = (sum(map(count, model.parameters())) for count in (num_held, num_elements))
            self.console.print(
                f"{engine_of(args)}: each of {args.world_size} devices keeps {held:,} of {total:,} parameters"
            )

    def on_log(  # type: ignore[override]  # Transformers passes `logs` by name
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, float],
        **kwargs: object,
    ) -> None:
        evaluated = [f"validation loss {logs['eval_loss']:.4f}"] if "eval_loss" in logs else []
        for key in [key for key in logs if key.endswith("accuracy") and key.startswith("eval_")]:
            name = key.removeprefix("eval_").removesuffix("accuracy").rstrip("_")
            evaluated.append(f"{name or 'validation'} accuracy {logs[key]:.1%}")
        if evaluated:
            self.console.print(f"{self.stage} {state.global_step:>6}/{state.max_steps}  {', '.join(evaluated)}")
        if "loss" not in logs:
            return
        done = state.global_step - self.first_step
        left = (time.monotonic() - self.started) / max(done, 1) * (state.max_steps - state.global_step)
        self.console.print(
            f"{self.stage} {state.global_step:>6}/{state.max_steps}  loss {logs['loss']:.4f}  "
            f"lr {logs['learning_rate']:.2e}  {logs['samples_per_second']:.2f} samples/s  MFU {logs['mfu']:.0%}  "
            f"{int(left) // 60}:{int(left) % 60:02d} left"
        )


def print_summary(console: Terminal, summary: dict[str, Any], record: dict[str, Any]) -> None:
    """Stages, scores, samples and where everything is."""
    console.rule(summary["recipe"])
    names = ("stage", "steps", "logged loss,\nfirst -> last", "supervised\ntokens", "supervised\ntokens/s", "minutes")
    rows = [
        (
            stage["name"],
            f"{stage['steps']:,}",
            f"{stage['loss_first']:.3f} -> {stage['loss']:.3f}" if stage["loss"] is not None else "",
            f"{stage['supervised_tokens']:,}",
            f"{stage['supervised_tokens_per_second'] or 0:,.0f}",
            f"{stage['minutes']:.1f}",
        )
        for stage in record["stages"]
    ]
    console.table(names, rows, numbers=names[1:])
    for stage in record["stages"]:
        found = stage.get("loss_by_source") or {}
        if len(found) > 1:
            parts = [f"{name} {values['loss']:.3f} ({values['accuracy']:.0%} right)" for name, values in found.items()]
            console.print(f"{stage['name']}, last loss by source: {', '.join(parts)}")
    for key, label in (
        ("accuracy_before", "before training"),
        ("accuracy_after", "after training"),
        ("accuracy_blind", "blind (images shuffled between questions)"),
    ):
        if key in summary:
            console.print(f"accuracy {label}: {summary[key]:.1%} of {summary['num_questions']} questions ({PROTOCOL})")
    _print_tasks(console, record)
    if "text_ability" in summary:
        found = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in summary["text_ability"].items())
        console.print(f"text accuracy, no images: {found}")
    if "samples" in record:
        samples = []
        for sample in record["samples"]:
            truth = max(set(sample["answers"]), key=sample["answers"].count)
            said = (sample["image"], sample["question"], sample["prediction"] or "", truth)
            samples.append([plain(text) for text in said])
        console.table(("image", "question", "answer", "truth"), samples)
    for entry in summary.get("evaluations", []):
        console.print(f"all answers of {plain(entry['name'])}, to browse: {entry['browser']}")
    console.print(f"model: {summary['export']}\ncard: {summary['card']}\n{summary['minutes']:.1f} minutes")


def _print_tasks(console: Terminal, record: dict[str, Any]) -> None:
    """The headline of each task, with its baselines, and what has no whole answer."""
    for task in record.get("tasks", []):
        unit = " %" if task["unit"] == "%" else f" {task['unit']}"
        shown = [f"{name} {task[name]:.1f}" for name in ("before", "blind") if name in task]
        counted = f"{task['num_questions']:,} questions, {task['failed']} failed, {task['cut']} cut"
        scored = f"{task['headline']} {task['value']:.1f} ({task['low']:.1f} to {task['high']:.1f}){unit}"
        parts = [f"{plain(task['name'])}: {scored}", *shown, counted, task["protocol"]]
        console.print(", ".join(parts))
