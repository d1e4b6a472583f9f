"""After the last stage: score the model, export it with its card, and sum up the run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.engines.reference import REFERENCE, record_reference
from llava_llama31.trainer.export.export import CURVES, as_logged, attachments, curve_file, write_export
from llava_llama31.trainer.export.provenance import record_of
from llava_llama31.trainer.model.module_groups import GROUPS, group_parameters
from llava_llama31.trainer.model.opening import open_model
from llava_llama31.trainer.runs.context import RunContext
from llava_llama31.trainer.runs.final_evaluation import ask_all, evaluate_run, open_in_turn, question_sets
from llava_llama31.trainer.runs.text_ability import results


def finish(
    run: RunContext, final: Path, stages: Sequence[dict[str, Any]], minutes: Callable[[], float]
) -> dict[str, Any] | None:
    """Evaluate, export and sum up; returns the summary on rank 0. Collective: all processes answer questions.

    Args:
        final: checkpoint of the last stage.
        stages: the stages' records.
        minutes: that the run has taken so far.
    """
    recipe, folder = run.recipe, run.folder
    if not (run.is_main or recipe.evaluations):
        return None
    if recipe.evaluations:
        model, processor = open_in_turn(run, final)
        sets = question_sets(recipe)
        answers = ask_all(run, final, sets, model, processor)
    else:
        model, processor = open_model(final, dtype=recipe.model.dtype)
    if not run.is_main:
        return None
    record = record_of(recipe, run.command)
    record["parameters"] = {group: sum(p.numel() for _, p in group_parameters(model, group)) for group in GROUPS}
    stages = [as_logged(stage) for stage in stages]
    record["stages"] = [{**stage, "curve_image": curve_file(i, stage)} for i, stage in enumerate(stages, start=1)]
    shown = {stage["name"]: {key: stage[key] for key in stage if key not in CURVES} for stage in stages}
    summary: dict[str, Any] = {"recipe": recipe.name, "stages": shown}
    if recipe.text_questions is not None:
        record["text_ability"] = results(folder)
        summary["text_ability"] = {name: found["accuracy"] for name, found in record["text_ability"].items()}
    if recipe.evaluations:
        summary |= evaluate_run(run, sets, answers, record)
    record["minutes"] = round(minutes(), 2)
    atomic_folders.write_json(folder.record, record)
    images, texts = attachments(folder, record)
    texts[REFERENCE] = record_reference(model, processor)
    write_export(folder.export, model, processor, record, images, texts)
    summary["export"], summary["card"] = str(folder.export), str(folder.export / "README.md")
    summary["minutes"] = round(minutes(), 2)
    return summary
