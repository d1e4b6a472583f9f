"""The evaluations of a recipe: their questions before a run, and at its end their scores, answers and pages."""

import copy
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from transformers import LlavaNextForConditionalGeneration

from llava_llama31 import LlavaLlama31ForConditionalGeneration
from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.answering import Answers, ToAsk, answer_together, derangement
from llava_llama31.trainer.evaluation.browser import write_browser
from llava_llama31.trainer.evaluation.precision import answers_in_float32
from llava_llama31.trainer.evaluation.presets import PRESETS, Preset, check_ocr
from llava_llama31.trainer.evaluation.questions import Question, load_questions, refuse_without_images
from llava_llama31.trainer.evaluation.scoring import score_answers
from llava_llama31.trainer.evaluation.settings import EvaluationSettings
from llava_llama31.trainer.evaluation.task_browser import write_task_browser
from llava_llama31.trainer.evaluation.task_evaluation import TaskToAsk, preset_of, questions_to_ask, score_found
from llava_llama31.trainer.evaluation.task_files import Task, load_task
from llava_llama31.trainer.evaluation.task_questions import is_scored
from llava_llama31.trainer.evaluation.textvqa import weights_revision
from llava_llama31.trainer.evaluation.vqa_accuracy import PROTOCOL, vqa_accuracy
from llava_llama31.trainer.export.export import public_rows
from llava_llama31.trainer.model.opening import open_model
from llava_llama31.trainer.recipes.schema import Evaluation, Recipe, slug
from llava_llama31.trainer.runs.base_model import base_of
from llava_llama31.trainer.runs.context import RunContext


NUM_SAMPLES = 6
Row = dict[str, Any]


@dataclass(frozen=True)
class QuestionSet:
    """One evaluation of a recipe, with its questions.

    Args:
        task: None for TextVQA-format questions by themselves.
    """

    spec: Evaluation
    task: Task | None
    preset: Preset
    questions: Sequence[Question]

    @property
    def max_new_tokens(self) -> int:
        """Length at which an answer is cut."""
        default = EvaluationSettings.max_new_tokens if self.task is None else self.task.max_new_tokens
        return self.spec.max_new_tokens or default


def question_set(spec: Evaluation, *, where: str, limit: int | None = None) -> QuestionSet:
    """Read the questions of an evaluation.

    Args:
        where: its key in the recipe.
        limit: number of questions; default: the evaluation's.

    Raises:
        UserError: they can't be read, asked as the preset asks, or scored.
    """
    limit = limit if limit is not None else spec.limit
    if spec.task is None:
        assert spec.data is not None
        questions = load_questions(spec.data, image_root=spec.image_root, max_pixels=spec.max_pixels, limit=limit)
        task, preset = None, PRESETS[spec.preset]
    else:
        task = load_task(spec.task)
        preset = preset_of(task, spec.preset)
        questions = questions_to_ask(
            task, spec.data, image_root=spec.image_root, max_pixels=spec.max_pixels, limit=limit
        )
        if not is_scored(task, questions):
            what = f"the answers to these questions of {task.name} are not public, so nothing can be scored"
            raise UserError(what, where=where, fix="give annotated questions; `evaluate` writes files for servers")
    refuse_without_images(questions, where)
    check_ocr(preset, questions)
    return QuestionSet(spec, task, preset, questions)


def check_evaluations(recipe: Recipe) -> None:
    """Read the questions of all evaluations, and check that they can be asked.

    Raises:
        UserError: naming what to fix.
    """
    for number, spec in enumerate(recipe.evaluations):
        found = question_set(spec, where=recipe.where_evaluation(number))
        if spec.baselines:
            derangement({question.image_id for question in found.questions}, recipe.seed)


def question_sets(recipe: Recipe) -> list[QuestionSet]:
    """The questions of all evaluations."""
    return [question_set(spec, where=recipe.where_evaluation(i)) for i, spec in enumerate(recipe.evaluations)]


def evaluate_run(
    run: RunContext,
    sets: Sequence[QuestionSet],
    answers: Mapping[str, Mapping[int, Answers]],
    record: dict[str, Any],
) -> dict[str, Any]:
    """Score all answers, fill in the record, write pages and samples; returns the summary's share."""
    summary: dict[str, Any] = {}
    entries = []
    for number, asked in enumerate(sets):
        found = {name: answers[name][number] for name in answers if number in answers[name]}
        if asked.task is None:
            summary = _textvqa(run, asked, found, record)
            entries.append(_textvqa_entry(asked, record["evaluation"], summary))
        else:
            entries.append(_task(run, asked.task, asked, found, record))
    return summary | {"evaluations": entries}


def open_in_turn(run: RunContext, folder: Path) -> tuple[LlavaLlama31ForConditionalGeneration, LlavaLlama31Processor]:
    """Open a checkpoint on every process. Collective.

    The processes of a machine take turns, for its host may not hold the weights once for each of its devices.
    """
    dtype, state = run.recipe.model.dtype, PartialState()
    if run.num_processes == 1:
        return open_model(folder, dtype=dtype)
    opened = None
    for turn in range(1 + max(gather_object([state.local_process_index]))):
        if turn == state.local_process_index:
            opened = open_model(folder, dtype=dtype)
        state.wait_for_everyone()
    assert opened is not None
    return opened


def ask_all(
    run: RunContext,
    final: Path,
    sets: Sequence[QuestionSet],
    model: LlavaNextForConditionalGeneration,
    processor: LlavaLlama31Processor,
) -> dict[str, dict[int, Answers]]:
    """Answers of the finished model, the one before training, and blind: name -> number of the set -> answers.

    Collective: the processes share the questions. An image that several evaluations show is read once.
    """
    processes = PartialState() if run.num_processes > 1 else None
    (in_float32,) = broadcast_object_list([answers_in_float32(model, run.console.print) if run.is_main else None])
    if in_float32:  # the copy holds the weights as they are exported
        model = copy.deepcopy(model).float()
    numbers = list(range(len(sets)))
    baselines = [number for number in numbers if sets[number].spec.baselines]

    def ask(
        name: str, weights: LlavaNextForConditionalGeneration, revision: str, which: list[int]
    ) -> dict[int, Answers]:
        blind_seed = run.recipe.seed if name == "blind" else None
        asked = [_to_ask(run, sets[number], name, revision, blind_seed) for number in which]
        found = answer_together(weights, processor, asked, processes=processes) if asked else []
        return dict(zip(which, found, strict=True))

    revision = weights_revision(final) or "unknown"
    answers = {"after": ask("after", model, revision, numbers)}
    if baselines:
        base = base_of(run.recipe, run.folder)
        before, _ = open_in_turn(run, base)
        before = before.float() if in_float32 else before
        answers["before"] = ask("before", before, weights_revision(base) or "unknown", baselines)
        answers["blind"] = ask("blind", model, revision, baselines)
    return answers


def _to_ask(run: RunContext, asked: QuestionSet, name: str, revision: str, blind_seed: int | None) -> ToAsk:
    folder = run.folder.evaluation if asked.task is None else run.folder.task_evaluation(slug(asked.spec.name))
    settings = EvaluationSettings(
        revision=revision,
        preset=asked.preset,
        batch_size=asked.spec.batch_size,
        max_new_tokens=asked.max_new_tokens,
        blind_seed=blind_seed,
        data=asked.spec.name,
    )
    return ToAsk(asked.questions, folder / name, settings)


def _textvqa(
    run: RunContext, asked: QuestionSet, answers: Mapping[str, Answers], record: dict[str, Any]
) -> dict[str, Any]:
    """Score TextVQA-format questions; returns the summary's keys of this evaluation."""
    folder, after = run.folder, answers["after"]
    scores: dict[str, Any] = {}
    for name, found in answers.items():
        report = score_answers(asked.questions, found.rows).to_json()
        found.write_scores(
            report | {"predictions": str(found.path), "seconds": found.seconds, "settings": found.settings}
        )
        if name == "after":
            scores |= report | {
                "dataset": asked.spec.name,
                "prompt": "<image>\n" + after.settings["prompt"],
                "decoding": after.settings["decoding"],
                "accuracy_protocol": PROTOCOL,
            }
        scores[f"accuracy_{name}"] = report["protocols"][PROTOCOL]["accuracy"]
    record["evaluation"] = scores
    record["samples"], images = _samples(asked.questions, after.rows)
    for name, image in images.items():
        (folder.path / name).parent.mkdir(exist_ok=True)
        image.save(folder.path / name)
    scores["predictions"] = _published(after.path, folder.predictions)
    note = f"{run.recipe.name}, {scores['dataset']}: {100 * scores['accuracy_after']:.1f} % ({PROTOCOL})"
    write_browser(asked.questions, after.rows, folder.browser, title=run.recipe.name, note=note)
    keys = ("accuracy_before", "accuracy_after", "accuracy_blind", "num_questions")
    return {key: scores[key] for key in keys if key in scores} | {"browser": str(folder.browser)}


def _published(answers: Path, file: Path) -> dict[str, str]:
    """Copy the answers into the run's folder; name and hash of what the export will have."""
    shutil.copyfile(answers, file)
    return {"file": file.name, "sha256": hashlib.sha256(public_rows(file).encode()).hexdigest()}


def _textvqa_entry(asked: QuestionSet, scores: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary's entry of TextVQA-format questions, in the terms of tasks."""
    score = scores["protocols"][PROTOCOL]
    values = {name: scores.get(f"accuracy_{name}") for name in ("before", "blind")}
    return {
        "name": asked.spec.name,
        "task": "textvqa",
        "protocol": PROTOCOL,
        "headline": "accuracy",
        "value": 100 * score["accuracy"],
        "low": 100 * score["low"],
        "high": 100 * score["high"],
        **{name: 100 * value for name, value in values.items() if value is not None},
        **{name: scores[name] for name in ("num_questions", "failed", "missing", "cut")},
        "predictions": scores["predictions"]["file"],
        "browser": summary["browser"],
    }


def _task(
    run: RunContext, task: Task, asked: QuestionSet, answers: Mapping[str, Answers], record: dict[str, Any]
) -> dict[str, Any]:
    """Score a task's questions, add to the record; returns the summary's entry."""
    reports = {
        name: score_found(TaskToAsk(task, _to_ask(run, asked, name, "", None)), found, writes=True).report
        for name, found in answers.items()
    }
    report, after = reports["after"], answers["after"]
    chosen = report.protocols[report.protocol]
    file = run.folder.task_predictions(slug(asked.spec.name))
    entry: dict[str, Any] = {
        "name": asked.spec.name,
        "task": task.name,
        "protocol": report.protocol,
        "headline": chosen.headline,
        "value": chosen.metrics[chosen.headline],
        "low": chosen.low,
        "high": chosen.high,
        **{name: _headline(reports[name]) for name in ("before", "blind") if name in reports},
        **{name: report.to_json()[name] for name in ("num_questions", "failed", "missing", "cut")},
    }
    protocols = {
        name: {"headline": scores.headline, "metrics": scores.metrics, "low": scores.low, "high": scores.high}
        for name, scores in report.protocols.items()
    }
    record.setdefault("tasks", []).append(
        entry
        | {
            "title": task.title,
            "dataset": task.dataset,
            "unit": task.unit,
            "protocols": protocols,
            "prompt": "<image>\n" + after.settings["prompt"],
            "decoding": after.settings["decoding"],
            "predictions": _published(after.path, file),
        }
    )
    page = file.with_suffix(".html")
    note = f"{run.recipe.name}, {asked.spec.name}: {chosen.headline} {entry['value']:.1f} ({report.protocol})"
    write_task_browser(task, asked.questions, after.rows, page, note=note)
    return entry | {"predictions": file.name, "browser": str(page)}


def _headline(report: Any) -> float:
    scores = report.protocols[report.protocol]
    return scores.metrics[scores.headline]


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
