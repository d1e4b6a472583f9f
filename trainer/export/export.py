"""Writes the exported folder, which opens through two doors, with its card and licence files."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image
from transformers import PreTrainedModel

from llava_llama31.model_card.card import CardError, licence_files, public, render_card
from llava_llama31.model_card.curves import draw_curve
from llava_llama31.model_card.sections import edited_sections
from llava_llama31.processing import CHAT_TEMPLATE, LlavaLlama31Processor
from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.engines.reference import REFERENCE, record_reference
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.export.dialects import PORTABLE, to_portable
from llava_llama31.trainer.export.templates import is_own_template
from llava_llama31.trainer.model.opening import open_model


logger = logging.getLogger(__name__)

CURVES = ("loss_curve", "validation_curve")
MAX_SHARD = 5 * 10**9  # bytes


def write_export(
    folder: Path,
    model: PreTrainedModel,
    processor: LlavaLlama31Processor,
    record: dict[str, Any],
    images: Mapping[str, Image.Image],
    texts: Mapping[str, str] = MappingProxyType({}),
    *,
    dialect: str = PORTABLE,
) -> None:
    """The folder that opens through two doors, with its card and what its licences ask for.

    An existing card keeps what a user wrote into it.

    Args:
        images: relative path in the folder -> image that the card shows.
        texts: relative path -> content of further files.
        dialect: one of `dialects.DIALECTS`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with atomic_folders.room(folder.parent, weights + min(weights, MAX_SHARD)):  # one shard is there twice for a while
        staging = atomic_folders.staging_folder(folder)
        model.save_pretrained(staging, max_shard_size=MAX_SHARD)
        if is_own_template(processor.chat_template):  # a former version's refuses less
            processor.chat_template = CHAT_TEMPLATE
        processor.save_pretrained(staging)
        if dialect == PORTABLE:
            to_portable(staging)
        for name, image in images.items():
            (staging / name).parent.mkdir(exist_ok=True)
            image.save(staging / name)
        former = folder / "README.md"
        card = card_text(record, former.read_text(encoding="utf-8") if former.is_file() else "")
        for name, text in {**texts, "README.md": card, **licence_texts(record["base_models"])}.items():
            (staging / name).write_text(text, encoding="utf-8")
        atomic_folders.commit(staging, folder, {})


def export_again(run: RunFolder, output: Path | None = None, dialect: str = PORTABLE) -> Path:
    """Export a finished run again, from its last stage and its record.

    Args:
        output: default: RUN/export, and RUN/export-DIALECT for another dialect than the portable one.

    Raises:
        UserError: the run is not finished.
    """
    record = record_of_run(run)
    names = [stage["name"] for stage in record["stages"]]
    default = run.export if dialect == PORTABLE else run.export.with_name(f"{run.export.name}-{dialect}")
    folder = (output or default).resolve()
    if folder.exists() and not (folder / atomic_folders.MANIFEST).is_file():
        raise UserError("exists and is not an export", where=str(folder), fix="choose a new folder")
    model, processor = open_model(str(run.stage(names[-1], names).final), dtype=record["recipe"]["model"]["dtype"])
    images, texts = attachments(run, record)
    texts[REFERENCE] = record_reference(model, processor)
    write_export(folder, model, processor, record, images, texts, dialect=dialect)
    return folder


def write_openings(run: RunFolder, folder: Path, opened: Sequence[Mapping[str, Any]]) -> None:
    """Put into an export's card where it was opened and with what result.

    Args:
        opened: of each, what `Opened` has.
    """
    card = folder / "README.md"
    text = card_text({**record_of_run(run), "opened": list(opened)}, card.read_text(encoding="utf-8"))
    card.write_text(text, encoding="utf-8")
    manifest = atomic_folders.read_manifest(folder)
    facts = {"name": card.name, "size": card.stat().st_size, "sha256": atomic_folders.sha256(card)}
    manifest["files"] = [facts if entry["name"] == card.name else entry for entry in manifest["files"]]
    del manifest[atomic_folders.SEAL]
    atomic_folders.write_manifest(folder, manifest)


def record_of_run(run: RunFolder) -> dict[str, Any]:
    """What the card of a finished run is made from.

    Raises:
        UserError: the run is not finished.
    """
    if not run.record.is_file():
        what = "this is not a finished run"
        raise UserError(what, where=str(run.path), fix=f"train it to its end: {run.record.name} is missing")
    record = atomic_folders.read_json(run.record)
    record["stages"] = [as_logged(stage) for stage in record["stages"]]
    return record


def licence_texts(base_models: list[dict[str, Any]]) -> dict[str, str]:
    """Licence files that must go with a model made from these base models.

    Raises:
        UserError: an agreement is required, but the base model's folder lacks its text.
    """
    try:
        return licence_files(base_models)
    except CardError as error:
        raise UserError(str(error)) from error


def card_text(record: dict[str, Any], previous: str = "") -> str:
    """The card of a record, keeping what a user wrote into the previous one.

    Raises:
        UserError: it can't be written.
    """
    kept = edited_sections(previous)
    if kept:
        logger.warning("README.md: edited sections are kept: %s", ", ".join(kept))
    try:
        return render_card(record, previous)
    except CardError as error:
        raise UserError(str(error)) from error


def attachments(run: RunFolder, record: Mapping[str, Any]) -> tuple[dict[str, Image.Image], dict[str, str]]:
    """Images and further texts of a run's export."""
    images, texts = {}, {}
    for sample in record.get("samples", []):
        with Image.open(run.path / sample["image"]) as image:
            images[sample["image"]] = image.copy()
    for stage in record["stages"]:
        if stage.get("curve_image"):
            images[stage["curve_image"]] = draw_curve(f"stage {stage['name']}", *(stage[key] for key in CURVES))
    if "predictions" in record.get("evaluation", {}):
        texts[run.predictions.name] = public_rows(run.predictions)
    for task in record.get("tasks", []):
        texts[task["predictions"]["file"]] = public_rows(run.path / task["predictions"]["file"])
    return images, texts


def public_rows(file: Path) -> str:
    """A predictions file without this machine's paths, which reasons for failures contain."""
    with file.open(encoding="utf-8") as rows:
        return "".join(json.dumps(public(json.loads(row)), ensure_ascii=False) + "\n" for row in rows)


def as_logged(stage: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's record whose `loss` is its last log entry; earlier versions recorded the mean of the last five."""
    curve = stage.get("loss_curve")
    return {**stage, "loss": curve[-1][1]} if curve else dict(stage)


def curve_file(number: int, stage: Mapping[str, Any]) -> str | None:
    return f"curves/{number}-{stage['name']}.png" if stage.get("loss_curve") else None
