"""A finished run's model in 8 or 4 bits: quantised, asked the same questions, and its card."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.engines.reference import REFERENCE, read_reference, record_reference
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.precision import answers_in_float32
from llava_llama31.trainer.evaluation.presets import PRESETS
from llava_llama31.trainer.evaluation.questions import load_questions
from llava_llama31.trainer.evaluation.scoring import Difference, compare_answers
from llava_llama31.trainer.evaluation.settings import EvaluationSettings
from llava_llama31.trainer.evaluation.textvqa import evaluate, weights_revision
from llava_llama31.trainer.evaluation.vqa_accuracy import PROTOCOL
from llava_llama31.trainer.export.export import card_text, export_again, public_rows, record_of_run
from llava_llama31.trainer.export.quantized import TWIN, quantize
from llava_llama31.trainer.model.opening import open_model
from llava_llama31.trainer.recipes.schema import Evaluation, Recipe


def export_twin(
    run: RunFolder, scheme: str, output: Path | None = None, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Export a finished run with its decoder's linear layers quantised, and measure what that costs.

    The twin answers the fixed questions and those of the recipe's evaluation, opened by Transformers with
    compressed-tensors, which rounds activations as the scheme does. `twin.json` and the card hold the difference.

    Args:
        scheme: one of `quantized.SCHEMES`.
        output: default: RUN/export-SCHEME.

    Raises:
        UserError: the run is not finished or has no evaluation; or as `quantize`.
    """
    record = record_of_run(run)
    recipe = Recipe.model_validate(record["recipe"])
    spec = next((spec for spec in recipe.evaluations if spec.task is None), None)
    if spec is None or not run.predictions.is_file():
        what = "has no TextVQA-format evaluation, so the loss from quantising can't be measured"
        raise UserError(what, where=str(run.path), fix="train with an `evaluation` without `task` in the recipe")
    folder = (output or run.export.with_name(f"{run.export.name}-{scheme}")).resolve()
    if folder.exists() and not (folder / atomic_folders.MANIFEST).is_file():
        raise UserError("exists and is not an export", where=str(folder), fix="choose a new folder")
    plain = run.export if (run.export / REFERENCE).is_file() else export_again(run)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = atomic_folders.staging_folder(folder)
    left_out = shutil.ignore_patterns(atomic_folders.MANIFEST, "samples", run.predictions.name)
    shutil.copytree(plain, staging, ignore=left_out, dirs_exist_ok=True)
    size = weights_size(staging)
    num_layers = quantize(staging, scheme)
    model, processor = open_model(staging)
    if answers_in_float32(model, say):
        model, _ = open_model(staging, dtype="float32")
    say(f"{num_layers} layers are quantised; asking {spec.name} again")
    (staging / REFERENCE).write_text(record_reference(model, processor), encoding="utf-8")
    difference, scores = _score(run, spec, scheme, staging, model, processor)
    twin = {"scheme": scheme, "layers": num_layers, "bytes_before": size, "bytes": weights_size(staging)}
    twin |= _equal_answers(plain, staging) | {"protocol": PROTOCOL, "dataset": spec.name}
    keys = ("first", "second", "difference", "low", "high", "gained", "lost", "tied")
    twin |= {key: difference.to_json()[key] for key in keys}
    record |= {"name": f"{record['name']}-{scheme}", "quantized": twin, "evaluation": scores, "samples": []}
    former = folder / "README.md"
    card = card_text(record, former.read_text(encoding="utf-8") if former.is_file() else "")
    (staging / "README.md").write_text(card, encoding="utf-8")
    atomic_folders.write_json(staging / TWIN, twin)
    atomic_folders.commit(staging, folder, {})
    return folder


def weights_size(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _equal_answers(plain: Path, twin: Path) -> dict[str, int]:
    """How many of the fixed questions have the same answer before and after."""
    before, after = read_reference(plain).recorded, read_reference(twin).recorded
    equal = sum(one.answer == other.answer for one, other in zip(before, after, strict=True))
    return {"fixed_questions": len(before), "equal_answers": equal}


def _score(
    run: RunFolder, spec: Evaluation, scheme: str, staging: Path, model: Any, processor: LlavaLlama31Processor
) -> tuple[Difference, dict[str, Any]]:
    """The paired difference to the run's own answers, and the twin's scores for its card; writes predictions."""
    assert spec.data is not None
    questions = load_questions(spec.data, image_root=spec.image_root, max_pixels=spec.max_pixels, limit=spec.limit)
    settings = EvaluationSettings(
        revision=weights_revision(staging) or "unknown",
        preset=PRESETS[spec.preset],
        batch_size=spec.batch_size,
        max_new_tokens=spec.max_new_tokens or EvaluationSettings.max_new_tokens,
    )
    answers = run.evaluation / f"{scheme}-{settings.revision[:12]}"
    found = evaluate(model, processor, questions, answers, settings)
    (staging / run.predictions.name).write_text(public_rows(found.predictions), encoding="utf-8")
    before, after = (
        [json.loads(row) for row in file.read_text(encoding="utf-8").splitlines()]
        for file in (run.predictions, found.predictions)
    )
    rows = (staging / run.predictions.name).read_bytes()
    scores = found.report.to_json() | {
        "dataset": spec.name,
        "prompt": "<image>\n" + found.settings["prompt"],
        "decoding": found.settings["decoding"],
        "accuracy_protocol": PROTOCOL,
        "predictions": {"file": run.predictions.name, "sha256": hashlib.sha256(rows).hexdigest()},
    }
    return compare_answers(questions, before, after).protocols[PROTOCOL], scores
