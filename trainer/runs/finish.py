"""After the last stage: score the model, export the two-door folder with its card, and sum the run up."""

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from llava_llama31.model_card.card import CardError, licence_files, public, render_card
from llava_llama31.model_card.curves import draw_curve
from llava_llama31.model_card.sections import edited_sections
from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.export.dialects import NATIVE, TRANSFORMERS_4, to_transformers_4
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.browser import write_browser
from llava_llama31.trainer.evaluation.generation import load_model
from llava_llama31.trainer.evaluation.presets import PRESETS
from llava_llama31.trainer.evaluation.questions import Question, load_questions
from llava_llama31.trainer.evaluation.textvqa import Evaluation, evaluate, weights_revision
from llava_llama31.trainer.evaluation.vqa_accuracy import vqa_accuracy
from llava_llama31.trainer.model.locating import local_checkpoint
from llava_llama31.trainer.model.module_groups import GROUPS, group_parameters
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.recipes.schema import Recipe


logger = logging.getLogger(__name__)

PROTOCOL = "vlmevalkit-2024"
EXPORT, RECORD, PREDICTIONS, BROWSER = "export", "record.json", "predictions.jsonl", "predictions.html"
SUMMARY = "summary.json"
NUM_SAMPLES = 6
LOCK = "constraints.txt"
CURVES = ("loss_curve", "validation_curve")
PACKAGES = ("llava-llama31", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "pillow")


def finish(
    recipe: Recipe,
    output: Path,
    base: Path,
    final: Path,
    stages: Sequence[dict[str, Any]],
    console: Console,
    *,
    command: str,
    minutes: Callable[[], float],
) -> dict[str, Any]:
    """Evaluate, export and sum up; returns the summary.

    Args:
        base: checkpoint before the first stage.
        final: checkpoint of the last stage.
        stages: the stages' records.
        minutes: that the run has taken so far.
    """
    model, processor = load_model(str(final), dtype=recipe.model.dtype)
    record = record_of(recipe, command)
    record["parameters"] = {group: sum(p.numel() for _, p in group_parameters(model, group)) for group in GROUPS}
    record["stages"] = [{**stage, "curve_image": _curve_file(i, stage)} for i, stage in enumerate(stages, start=1)]
    told = {stage["name"]: {key: stage[key] for key in stage if key not in CURVES} for stage in stages}
    summary: dict[str, Any] = {"recipe": recipe.name, "stages": told}
    pictures: dict[str, Image.Image] = {}
    if recipe.evaluation is not None:
        scores, questions, answers = _evaluate(recipe, output, base, model, processor)
        record["evaluation"] = scores
        record["samples"], pictures = _samples(questions, answers)
        for key in ("accuracy_before", "accuracy_after", "accuracy_blind", "num_questions"):
            if key in scores:
                summary[key] = scores[key]
        shutil.copyfile(output / "evaluation" / "after" / PREDICTIONS, output / PREDICTIONS)
        sha256 = hashlib.sha256(_public_rows(output / PREDICTIONS).encode()).hexdigest()
        record["evaluation"]["predictions"] = {"file": PREDICTIONS, "sha256": sha256}
        note = f"{recipe.name}, {scores['dataset']}: {100 * scores['accuracy_after']:.1f} % ({PROTOCOL})"
        summary["browser"] = str(output / BROWSER)
        write_browser(questions, answers, output / BROWSER, title=recipe.name, note=note)
    for name, picture in pictures.items():
        (output / name).parent.mkdir(exist_ok=True)
        picture.save(output / name)
    record["minutes"] = round(minutes(), 2)
    atomic_folders.write_json(output / RECORD, record)
    write_export(output / EXPORT, model, processor, record, *_attachments(output, record))
    summary["export"], summary["card"] = str(output / EXPORT), str(output / EXPORT / "README.md")
    summary["minutes"] = round(minutes(), 2)
    print_summary(console, summary, record)
    return summary


def record_of(recipe: Recipe, command: str) -> dict[str, Any]:
    """What the card tells that is known before the first step."""
    return {
        "name": recipe.name,
        "recipe": recipe.model_dump(mode="json"),
        "command": command,
        "commit": _commit(),
        "lock": _lock(),
        "licence": recipe.model.licence,
        "base_models": base_models_of(recipe),
        "environment": _environment(),
    }


def write_export(
    folder: Path,
    model: torch.nn.Module,
    processor: LlavaLlama31Processor,
    record: dict[str, Any],
    pictures: Mapping[str, Image.Image],
    texts: Mapping[str, str] = MappingProxyType({}),
    *,
    dialect: str = NATIVE,
) -> None:
    """The folder that opens through two doors, with its card and what its licences ask for.

    A card that is there already keeps what a person wrote into it.

    Args:
        pictures: relative path in the folder -> picture that the card shows.
        texts: likewise, further files.
        dialect: one of `dialects.DIALECTS`; any but the native one opens through stock classes only.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with atomic_folders.room(folder.parent, weights):
        staging = atomic_folders.staging_folder(folder)
        model.save_pretrained(staging, max_shard_size="5GB")
        processor.save_pretrained(staging)
        if dialect == TRANSFORMERS_4:
            to_transformers_4(staging)
            record = record | {"stock_only": True}
        for name, picture in pictures.items():
            (staging / name).parent.mkdir(exist_ok=True)
            picture.save(staging / name)
        former = folder / "README.md"
        card = card_text(record, former.read_text(encoding="utf-8") if former.is_file() else "")
        for name, text in {**texts, "README.md": card, **licence_texts(record["base_models"])}.items():
            (staging / name).write_text(text, encoding="utf-8")
        atomic_folders.commit(staging, folder, {})


def licence_texts(base_models: list[dict[str, Any]]) -> dict[str, str]:
    """Licence files that must go with a model made from these.

    Raises:
        UserError: when an agreement is due and its text is not with the base model.
    """
    try:
        return licence_files(base_models)
    except CardError as error:
        raise UserError(str(error)) from error


def card_text(record: dict[str, Any], previous: str = "") -> str:
    """The card of a record, around what a person wrote into the previous one.

    Raises:
        UserError: when it can't be written.
    """
    kept = edited_sections(previous)
    if kept:
        logger.warning("README.md: sections that were edited stay as they are: %s", ", ".join(kept))
    try:
        return render_card(record, previous)
    except CardError as error:
        raise UserError(str(error)) from error


def _attachments(run: Path, record: Mapping[str, Any]) -> tuple[dict[str, Image.Image], dict[str, str]]:
    """Pictures and further texts of a run's export."""
    pictures, texts = {}, {}
    for sample in record.get("samples", []):
        with Image.open(run / sample["image"]) as picture:
            pictures[sample["image"]] = picture.copy()
    for stage in record["stages"]:
        if stage.get("curve_image"):
            pictures[stage["curve_image"]] = draw_curve(f"stage {stage['name']}", *(stage[key] for key in CURVES))
    if "predictions" in record.get("evaluation", {}):
        texts[PREDICTIONS] = _public_rows(run / PREDICTIONS)
    return pictures, texts


def _public_rows(file: Path) -> str:
    """A predictions file without this machine's paths, which reasons of failures hold."""
    with file.open(encoding="utf-8") as rows:
        return "".join(json.dumps(public(json.loads(row)), ensure_ascii=False) + "\n" for row in rows)


def _curve_file(number: int, stage: Mapping[str, Any]) -> str | None:
    return f"curves/{number}-{stage['name']}.png" if stage.get("loss_curve") else None


def _evaluate(
    recipe: Recipe,
    output: Path,
    base: Path,
    model: torch.nn.Module,
    processor: LlavaLlama31Processor,
) -> tuple[dict[str, Any], list[Question], list[dict[str, Any]]]:
    spec = recipe.evaluation
    questions = load_questions(spec.data, image_root=spec.image_root, limit=spec.limit)

    def ask(name: str, weights: torch.nn.Module, revision: str, blind_seed: int | None = None) -> Evaluation:
        return evaluate(
            weights,
            processor,
            questions,
            output / "evaluation" / name,
            revision=revision,
            preset=PRESETS[spec.preset],
            batch_size=spec.batch_size,
            max_new_tokens=spec.max_new_tokens,
            blind_seed=blind_seed,
        )

    final_stage = list(recipe.stages)[-1]
    revision = weights_revision(output / "stages" / f"{len(recipe.stages)}-{final_stage}" / "final") or "unknown"
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
        before, _ = load_model(str(base), dtype=recipe.model.dtype)
        for name, done in (
            ("before", ask("before", before, weights_revision(base) or "unknown")),
            ("blind", ask("blind", model, revision, blind_seed=recipe.seed)),
        ):
            scores[f"accuracy_{name}"] = done.report.to_json()["protocols"][PROTOCOL]["accuracy"]
    with after.predictions.open(encoding="utf-8") as file:
        answers = [json.loads(line) for line in file]
    return scores, questions, answers


def _samples(
    questions: Sequence[Question], answers: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Image.Image]]:
    """Questions whose answers score and, half of them, questions whose answers do not; and their pictures."""
    given = {row["question_id"]: row["answer"] for row in answers if row["answer"] is not None}
    asked = [question for question in questions if question.question_id in given]
    accuracy = {q.question_id: vqa_accuracy(given[q.question_id], q.answers, PROTOCOL) for q in asked}
    good = [question for question in asked if accuracy[question.question_id] > 0]
    bad = [question for question in asked if accuracy[question.question_id] == 0]
    num_bad = min(len(bad), max(NUM_SAMPLES // 2, NUM_SAMPLES - len(good)))
    samples, pictures = [], {}
    for number, question in enumerate([*_spread(good, NUM_SAMPLES - num_bad), *_spread(bad, num_bad)], start=1):
        name = f"samples/{number}.png"
        try:
            pictures[name] = question.image.open()
        except RecordError:  # it has gone since it was asked about
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
    return samples, pictures


def _spread(questions: Sequence[Question], number: int) -> list[Question]:
    """At most so many of them, at equal distances."""
    number = min(number, len(questions))
    return [questions[i * len(questions) // number] for i in range(number)]


def print_summary(console: Console, summary: dict[str, Any], record: dict[str, Any]) -> None:
    """Stages, scores, samples and where everything lies."""
    console.rule(f"[bold]{summary['recipe']}")
    table = Table("stage", "steps", "loss", "supervised tokens", "tokens/s", "minutes", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for stage in record["stages"]:
        table.add_row(
            stage["name"],
            f"{stage['steps']:,}",
            f"{stage['loss_first']:.3f} -> {stage['loss']:.3f}" if stage["loss"] is not None else "",
            f"{stage['supervised_tokens']:,}",
            f"{stage['supervised_tokens_per_second'] or 0:,.0f}",
            f"{stage['minutes']:.1f}",
        )
    console.print(table)
    for key, label in (
        ("accuracy_before", "before training"),
        ("accuracy_after", "after training"),
        ("accuracy_blind", "blind (pictures shuffled between questions)"),
    ):
        if key in summary:
            console.print(f"accuracy {label}: {summary[key]:.1%} of {summary['num_questions']} questions ({PROTOCOL})")
    if "samples" in record:
        samples = Table("picture", "question", "answer", "truth", box=None, pad_edge=False)
        for sample in record["samples"]:
            truth = max(set(sample["answers"]), key=sample["answers"].count)
            samples.add_row(sample["image"], sample["question"], sample["prediction"] or "", truth)
        console.print(samples)
    if "browser" in summary:
        console.print(f"all answers, to browse: {summary['browser']}")
    console.print(f"model: {summary['export']}\ncard: {summary['card']}\n{summary['minutes']:.1f} minutes")


def base_models_of(recipe: Recipe) -> list[dict[str, Any]]:
    """What the model is made from, for the card and the licences."""
    model = recipe.model
    if model.checkpoint is not None:
        named = [("checkpoint", model.checkpoint, model.licence)]
    else:
        named = [
            ("vision_tower", model.vision_tower, model.vision_tower_licence),
            ("language_model", model.language_model, model.licence),
        ]
    return [
        {
            "role": role,
            # a local folder is called by its name: a card has no paths
            "id": Path(name).name if Path(name).exists() else name,
            "licence": licence,
            "folder": str(local_checkpoint(name, where=f"model.{role}")),
        }
        for role, name, licence in named
    ]


def _commit() -> str | None:
    """Commit of the project when it runs from a checkout, with `-dirty` where that was changed."""
    if _checkout() is None:
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _lock() -> dict[str, str] | None:
    """The checkout's file of pinned versions, and its hash."""
    checkout = _checkout()
    if checkout is None or not (checkout / LOCK).is_file():
        return None
    return {"file": LOCK, "sha256": atomic_folders.sha256(checkout / LOCK)}


def _checkout() -> Path | None:
    """Root of the project's own repository, where this file is one of it and not installed into another one."""
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name)
    root = _git("rev-parse", "--show-toplevel") if tracked else None
    return Path(root) if root else None


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def _environment() -> dict[str, Any]:
    if torch.cuda.is_available():
        hardware = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        hardware = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    versions = {name.replace("-", "_"): importlib.metadata.version(name) for name in PACKAGES}
    return {"hardware": hardware, "python": platform.python_version(), **versions}


def export_again(run: Path, output: Path | None = None, dialect: str = NATIVE) -> Path:
    """Write the two-door folder of a finished run anew from its last stage and its record.

    Args:
        output: default: RUN/export, and RUN/export-DIALECT for another dialect than the native one.

    Raises:
        UserError: when the run is not finished.
    """
    if not (run / RECORD).is_file():
        raise UserError("this is not a finished run", where=str(run), fix=f"train it to its end: {RECORD} is missing")
    record = atomic_folders.read_json(run / RECORD)
    last = len(record["stages"])
    final = run / "stages" / f"{last}-{record['stages'][-1]['name']}" / "final"
    folder = (output or run / (EXPORT if dialect == NATIVE else f"{EXPORT}-{dialect}")).resolve()
    if folder.exists() and not (folder / atomic_folders.MANIFEST).is_file():
        raise UserError("is there and is not an export", where=str(folder), fix="choose a new folder")
    model, processor = load_model(str(final), dtype=record["recipe"]["model"]["dtype"])
    write_export(folder, model, processor, record, *_attachments(run, record), dialect=dialect)
    return folder
