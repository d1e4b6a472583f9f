"""After the last stage: score the model, export it with its card, and sum up the run."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import LlavaNextForConditionalGeneration

from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.engines.reference import REFERENCE, record_reference
from llava_llama31.trainer.evaluation.browser import write_browser
from llava_llama31.trainer.evaluation.precision import answers_in_float32
from llava_llama31.trainer.evaluation.presets import PRESETS
from llava_llama31.trainer.evaluation.questions import Question, load_questions
from llava_llama31.trainer.evaluation.scoring import Report
from llava_llama31.trainer.evaluation.settings import EvaluationSettings
from llava_llama31.trainer.evaluation.textvqa import Evaluation, evaluate, weights_revision
from llava_llama31.trainer.evaluation.vqa_accuracy import PROTOCOL, vqa_accuracy
from llava_llama31.trainer.export.export import CURVES, as_logged, attachments, curve_file, public_rows, write_export
from llava_llama31.trainer.export.provenance import record_of
from llava_llama31.trainer.model.module_groups import GROUPS, group_parameters
from llava_llama31.trainer.model.opening import open_model
from llava_llama31.trainer.runs.base_model import base_of
from llava_llama31.trainer.runs.context import RunContext
from llava_llama31.trainer.runs.text_ability import results


NUM_SAMPLES = 6


def finish(
    run: RunContext, final: Path, stages: Sequence[dict[str, Any]], minutes: Callable[[], float]
) -> dict[str, Any]:
    """Evaluate, export and sum up; returns the summary.

    Args:
        final: checkpoint of the last stage.
        stages: the stages' records.
        minutes: that the run has taken so far.
    """
    recipe, folder = run.recipe, run.folder
    model, processor = open_model(str(final), dtype=recipe.model.dtype)
    record = record_of(recipe, run.command)
    record["parameters"] = {group: sum(p.numel() for _, p in group_parameters(model, group)) for group in GROUPS}
    stages = [as_logged(stage) for stage in stages]
    record["stages"] = [{**stage, "curve_image": curve_file(i, stage)} for i, stage in enumerate(stages, start=1)]
    shown = {stage["name"]: {key: stage[key] for key in stage if key not in CURVES} for stage in stages}
    summary: dict[str, Any] = {"recipe": recipe.name, "stages": shown}
    if recipe.text_questions is not None:
        record["text_ability"] = results(folder)
        summary["text_ability"] = {name: found["accuracy"] for name, found in record["text_ability"].items()}
    if recipe.evaluation is not None:
        summary |= _evaluate(run, final, record, model, processor)
    record["minutes"] = round(minutes(), 2)
    atomic_folders.write_json(folder.record, record)
    images, texts = attachments(folder, record)
    texts[REFERENCE] = record_reference(model, processor)
    write_export(folder.export, model, processor, record, images, texts)
    summary["export"], summary["card"] = str(folder.export), str(folder.export / "README.md")
    summary["minutes"] = round(minutes(), 2)
    return summary


def _evaluate(
    run: RunContext,
    final: Path,
    record: dict[str, Any],
    model: LlavaNextForConditionalGeneration,
    processor: LlavaLlama31Processor,
) -> dict[str, Any]:
    """Score the model, fill in the record, write answers, page and samples; returns the summary's share."""
    recipe, folder = run.recipe, run.folder
    scores, questions, answers = _score(run, final, model, processor)
    record["evaluation"] = scores
    record["samples"], images = _samples(questions, answers)
    for name, image in images.items():
        (folder.path / name).parent.mkdir(exist_ok=True)
        image.save(folder.path / name)
    sha256 = hashlib.sha256(public_rows(folder.predictions).encode()).hexdigest()
    scores["predictions"] = {"file": folder.predictions.name, "sha256": sha256}
    note = f"{recipe.name}, {scores['dataset']}: {100 * scores['accuracy_after']:.1f} % ({PROTOCOL})"
    write_browser(questions, answers, folder.browser, title=recipe.name, note=note)
    keys = ("accuracy_before", "accuracy_after", "accuracy_blind", "num_questions")
    return {key: scores[key] for key in keys if key in scores} | {"browser": str(folder.browser)}


def _score(
    run: RunContext, final: Path, model: LlavaNextForConditionalGeneration, processor: LlavaLlama31Processor
) -> tuple[dict[str, Any], list[Question], list[dict[str, Any]]]:
    """Scores with their settings, the questions, and the rows of answers."""
    recipe, spec = run.recipe, run.recipe.evaluation
    assert spec is not None
    questions = load_questions(spec.data, image_root=spec.image_root, limit=spec.limit)

    def ask(
        name: str, weights: LlavaNextForConditionalGeneration, revision: str, blind_seed: int | None = None
    ) -> Evaluation[Report]:
        return evaluate(
            weights,
            processor,
            questions,
            run.folder.evaluation / name,
            EvaluationSettings(
                revision=revision,
                preset=PRESETS[spec.preset],
                batch_size=spec.batch_size,
                max_new_tokens=spec.max_new_tokens,
                blind_seed=blind_seed,
            ),
        )

    in_float32 = answers_in_float32(model, run.console.print)
    if in_float32:  # the copy holds the weights as they are exported
        model = copy.deepcopy(model).float()
    revision = weights_revision(final) or "unknown"
    after = ask("after", model, revision)
    scores = after.report.to_json()
    scores |= {
        "dataset": spec.name,
        "prompt": "<image>\n" + after.settings["prompt"],
        "decoding": after.settings["decoding"],
        "accuracy_protocol": PROTOCOL,
        "accuracy_after": scores["protocols"][PROTOCOL]["accuracy"],
    }
    if spec.baselines:
        base = base_of(recipe, run.folder)
        before, _ = open_model(str(base), dtype=recipe.model.dtype)
        before = before.float() if in_float32 else before
        for name, done in (
            ("before", ask("before", before, weights_revision(base) or "unknown")),
            ("blind", ask("blind", model, revision, blind_seed=recipe.seed)),
        ):
            scores[f"accuracy_{name}"] = done.report.to_json()["protocols"][PROTOCOL]["accuracy"]
    shutil.copyfile(after.predictions, run.folder.predictions)
    with after.predictions.open(encoding="utf-8") as file:
        return scores, questions, [json.loads(line) for line in file]


def _samples(
    questions: Sequence[Question], answers: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Image.Image]]:
    """Questions whose answers score and, half of them, questions whose answers do not; and their images."""
    given = {row["question_id"]: row["answer"] for row in answers if row["answer"] is not None}
    asked = [question for question in questions if question.question_id in given]
    accuracy = {q.question_id: vqa_accuracy(given[q.question_id], q.answers, PROTOCOL) for q in asked}
    good = [question for question in asked if accuracy[question.question_id] > 0]
    bad = [question for question in asked if accuracy[question.question_id] == 0]
    num_bad = min(len(bad), max(NUM_SAMPLES // 2, NUM_SAMPLES - len(good)))
    samples, images = [], {}
    for number, question in enumerate([*_spread(good, NUM_SAMPLES - num_bad), *_spread(bad, num_bad)], start=1):
        name = f"samples/{number}.png"
        assert question.image is not None
        try:
            images[name] = question.image.open()
        except RecordError:  # the file has gone since the question was asked
            continue
        samples.append(
            {
                "question": question.question,
                "prediction": given[question.question_id],
                "answers": list(question.answers),
                "accuracy": accuracy[question.question_id],
                "image": name,
            }
        )
    return samples, images


def _spread(questions: Sequence[Question], number: int) -> list[Question]:
    """At most `number` of them, evenly spread."""
    number = min(number, len(questions))
    return [questions[i * len(questions) // number] for i in range(number)]
