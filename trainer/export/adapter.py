"""Writes a run's adapters as adapters: PEFT's folder for a named base, which gives the merged export's logits."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaNextForConditionalGeneration

from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.checkpoint import atomic_folders
from llava_llama31.trainer.checkpoint.run_folder import RunFolder
from llava_llama31.trainer.engines.questions import fixed_questions
from llava_llama31.trainer.engines.reference import REFERENCE, inputs_of, record_reference
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.export.export import attachments, card_text, licence_texts, record_of_run
from llava_llama31.trainer.model.locating import hub_id, local_checkpoint
from llava_llama31.trainer.model.opening import ADAPTER_CONFIG, open_model


ADAPTER_WEIGHTS = "adapter_model.safetensors"
# largest difference of logits, in standard deviations of the merged model's; merging rounds to 16 bits
TOLERANCE, TOLERANCE_16_BITS = 1e-3, 0.05
_NAME_IT = "name the model that the stage began with: --base OWNER/NAME@REVISION"


def export_adapter(run: RunFolder, base: str | None = None, output: Path | None = None) -> Path:
    """Export the adapters of a finished run's last stage, for a base that stays where it is.

    Args:
        base: Hub id, with its revision or the newest, or a folder, of the model that the stage began with; default:
            what the recipe names.
        output: default: RUN/export-adapter.

    Raises:
        UserError: the run is not finished, its last stage has no adapters, or no base is named; or adapters and base
            do not give the merged model's logits.
    """
    record = record_of_run(run)
    names = [stage["name"] for stage in record["stages"]]
    final = run.stage(names[-1], names).final
    if not (final / "adapter" / ADAPTER_CONFIG).is_file():
        what = f"its last stage, {names[-1]}, trained no adapters"
        raise UserError(what, where=str(run.path), fix="leave --adapter out, or train the stage with lora")
    folder = (output or run.export.with_name(f"{run.export.name}-adapter")).resolve()
    if folder.exists() and not (folder / atomic_folders.MANIFEST).is_file():
        raise UserError("exists and is not an export", where=str(folder), fix="choose a new folder")
    named = base or _base_of_recipe(record["recipe"], names)
    if named is None:
        raise UserError("the recipe names no base on the Hub for its last stage", where="--base", fix=_NAME_IT)
    based = _pinned(named)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = atomic_folders.staging_folder(folder)
    shutil.copyfile(final / "adapter" / ADAPTER_WEIGHTS, staging / ADAPTER_WEIGHTS)
    config = atomic_folders.read_json(final / "adapter" / ADAPTER_CONFIG)
    atomic_folders.write_json(staging / ADAPTER_CONFIG, config | based | {"inference_mode": True})
    dtype = record["recipe"]["model"]["dtype"]
    merged, processor = open_model(str(final), dtype=dtype)
    adapted, _ = open_model(staging, dtype="float32")
    apart = largest_difference(merged.float(), adapted, processor)
    if apart > (TOLERANCE if dtype == "float32" else TOLERANCE_16_BITS):
        what = (
            f"with these adapters {named} is not the trained model: the logits differ by {apart:.2g} of their spread. "
            "It is another model, or the stage also trained what adapters can't hold (the projector, 4-bit weights)"
        )
        raise UserError(what, where="--base", fix=f"{_NAME_IT}; or publish the merged export")
    record |= {"adapter": based | {"difference": apart}}
    _write_texts(run, record, staging, folder / "README.md", record_reference(adapted, processor))
    atomic_folders.commit(staging, folder, {})
    return folder


def _base_of_recipe(recipe: Mapping[str, Any], names: list[str]) -> str | None:
    """Hub id of the checkpoint that the last stage began with, at its revision; None where it is none of the Hub."""
    origin = recipe["stages"][names[-1]].get("init_from", "previous")
    if origin == "previous":
        origin = recipe["model"].get("checkpoint") if len(names) == 1 else None
    return origin if origin is not None and hub_id(origin) is not None else None


def _pinned(name: str) -> dict[str, Any]:
    """Base and revision as PEFT's configuration has them; a branch is followed to its commit now."""
    folder, named = local_checkpoint(name, where="--base"), hub_id(name)
    if named is None:
        return {"base_model_name_or_path": str(folder.resolve()), "revision": None}
    return {"base_model_name_or_path": named[0], "revision": folder.name}  # a snapshot is called by its commit


@torch.no_grad()
def largest_difference(
    first: LlavaNextForConditionalGeneration,
    second: LlavaNextForConditionalGeneration,
    processor: LlavaLlama31Processor,
) -> float:
    """Largest difference of the logits for the fixed prompts, in standard deviations of the first model's."""
    grids = processor.image_processor.image_grid_pinpoints
    apart = 0.0
    for question in fixed_questions(grids, processor.tile_size):
        inputs = inputs_of(processor, question.messages()).to(first.device)
        logits = [model(**inputs).logits.float() for model in (first, second)]
        apart = max(apart, ((logits[0] - logits[1]).abs().max() / logits[0].std()).item())
    return apart


def _write_texts(run: RunFolder, record: dict[str, Any], staging: Path, former: Path, reference: str) -> None:
    """The card, what it shows, the licences and the reference answers."""
    images, _ = attachments(run, record)
    for name, image in images.items():
        (staging / name).parent.mkdir(exist_ok=True)
        image.save(staging / name)
    # the answers are the merged model's
    record["evaluation"] = {key: value for key, value in record.get("evaluation", {}).items() if key != "predictions"}
    card = card_text(record, former.read_text(encoding="utf-8") if former.is_file() else "")
    texts = {"README.md": card, REFERENCE: reference, **licence_texts(record["base_models"])}
    for name, text in texts.items():
        (staging / name).write_text(text, encoding="utf-8")
