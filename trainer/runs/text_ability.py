"""Text ability before and after: the recipe's text-only questions, asked before the first and after each stage.

Rank 0 asks. A result is written once: a resumed run reads it.
"""

import gc
import json
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.distributed.devices import release_cached_memory
from llava_llama31.trainer.errors import Unhealthy, naming
from llava_llama31.trainer.evaluation.text_ability import ask_text, load_text_questions
from llava_llama31.trainer.model.opening import open_model
from llava_llama31.trainer.runs.context import RunContext
from llava_llama31.trainer.runs.run_log import append_entry


BEFORE = "before"


def check_text(run: RunContext, stage: str, checkpoint: Path, step: int) -> None:
    """Ask the text questions of a stage's weights; `stage` is BEFORE for those of the first one's origin. Collective.

    Raises:
        Unhealthy: more accuracy is lost than the recipe allows.
    """
    spec = run.recipe.text_questions
    if spec is None:
        return
    result = None
    if run.is_main:
        result = _result(run, stage, checkpoint, step)
    (result,) = broadcast_object_list([result])
    if stage == BEFORE or spec.max_drop is None or not run.is_main:
        return
    before = results(run.folder)[BEFORE]["accuracy"]
    if before - result["accuracy"] > spec.max_drop:
        raise Unhealthy(
            f"text accuracy fell from {before:.1%} to {result['accuracy']:.1%} in stage {stage}, more than "
            f"text_questions.max_drop {spec.max_drop:.1%} allows",
            where=f"stages.{stage}",
            fix="lower its learning rate, add text-only rows to its data, or train adapters; its weights are in "
            f"{checkpoint}",
        )


def results(folder: RunFolder) -> dict[str, dict[str, Any]]:
    """What has been found so far, in order: BEFORE, then the stages."""
    files = sorted(folder.text_ability.glob("*.json"), key=lambda file: int(file.name.partition("-")[0]))
    return {file.stem.partition("-")[2]: atomic_folders.read_json(file) for file in files}


def forget_text(run: RunContext, stage: str) -> None:
    """Drop what was found of a stage that is about to be trained: a damaged one is trained again."""
    if run.is_main:
        _file(run, stage).unlink(missing_ok=True)


def _file(run: RunContext, stage: str) -> Path:
    number = 0 if stage == BEFORE else 1 + list(run.recipe.stages).index(stage)
    return run.folder.text_ability / f"{number}-{stage}.json"


def _result(run: RunContext, stage: str, checkpoint: Path, step: int) -> dict[str, Any]:
    spec = run.recipe.text_questions
    assert spec is not None
    file = _file(run, stage)
    if file.is_file():
        return atomic_folders.read_json(file)
    asked = load_text_questions(spec.data, limit=spec.limit)
    model, processor = open_model(str(checkpoint), dtype=run.recipe.model.dtype)
    found, rows = ask_text(model, processor, asked, max_new_tokens=spec.max_new_tokens, batch_size=spec.batch_size)
    del model
    gc.collect()
    release_cached_memory()
    file.parent.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    answers = file.with_suffix(".jsonl")
    with naming(answers):
        answers.write_text(lines, encoding="utf-8")
    atomic_folders.write_json(file, found)
    # of the first stage, at its beginning: a log has no stage before it
    logged = next(iter(run.recipe.stages)) if stage == BEFORE else stage
    append_entry(run.folder.log, logged, {"event": "text", "step": step, "text_accuracy": found["accuracy"]})
    when = "before training" if stage == BEFORE else f"after {stage}"
    run.console.print(f"text accuracy {when}: {found['accuracy']:.1%} of {found['num_questions']} questions")
    return found
