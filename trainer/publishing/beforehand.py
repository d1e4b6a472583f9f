"""Checks before the first step everything that could keep the finished run from being published."""

import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import logging as hub_logging

from llava_llama31.model_card.card import CardError, render_card
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.export.export import licence_texts
from llava_llama31.trainer.export.provenance import record_of
from llava_llama31.trainer.publishing.contents import CARD, Contents, GateFinding
from llava_llama31.trainer.publishing.gate import check_card, check_licence
from llava_llama31.trainer.publishing.gate_files import check_paths, check_secrets
from llava_llama31.trainer.publishing.hub_calls import redact
from llava_llama31.trainer.publishing.publish import check_free_space, check_target, refuse
from llava_llama31.trainer.publishing.release import check_repo_id
from llava_llama31.trainer.recipes.schema import Publish, Recipe, Stage


logger = logging.getLogger(__name__)

RULES = (check_card, check_licence, check_secrets, check_paths)


def check_strategy(spec: Publish, stages: Mapping[str, Stage]) -> None:
    """Refuse interim pushes that a stage cannot make the way it is launched.

    Raises:
        UserError: a stage cannot push; names the stage and the key.
    """
    if spec.hub_strategy == "end":
        return
    for name, stage in stages.items():
        if stage.lora is not None and stage.lora.quantize:
            raise UserError(
                f"the adapters of stage {name} cannot be merged into 4-bit weights during training",
                where="publish.hub_strategy",
                fix=f"set it to `end`, or remove stages.{name}.lora.quantize",
            )
        if stage.deepspeed is not None and spec.hub_strategy == "checkpoint":
            raise UserError(
                f"the training state of stage {name} is in DeepSpeed's pickled format",
                where="publish.hub_strategy",
                fix="set it to `every_save` or `end`, or train the stage without DeepSpeed",
            )


def check_beforehand(
    recipe: Recipe, spec: Publish, base: Path, *, command: str, begun: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Check name, licence, card, ids, free space, token, rights and collection; returns the provisional card record.

    Args:
        base: checkpoint that the first stage starts from; the finished model has the same size.
        begun: the run has checkpoints, and so continues even if the Hub does not answer.

    Raises:
        UserError: something would keep the run from being published; names it and the fix.
    """
    check_repo_id(spec.repo_id, "publish.repo_id")
    record = provisional_record(recipe, spec, command)
    card = _check_card(record, spec.repo_id.rpartition("/")[2])
    left_out = _left_out(record, card)
    if left_out:
        say(f"the card will not list these base models and data sets, which have no Hub id: {', '.join(left_out)}")
    check_free_space(sum(file.stat().st_size for file in base.glob("*.safetensors")))
    hub_logging.set_verbosity_error()  # its warnings show signed URLs
    try:
        check_target(HfApi(), spec.repo_id, card, spec.collection, resume="run again")
    except UserError as error:
        if not begun:
            raise UserError(redact(str(error))) from None
        logger.warning("the run continues, but it could not be published now: %s", redact(str(error)))
    return record


def provisional_record(recipe: Recipe, spec: Publish, command: str) -> dict[str, Any]:
    """The card's record before anything is trained."""
    stages = [
        {"name": name, "data": [source.model_dump(include={"name", "license", "hub_id"}) for source in stage.data]}
        for name, stage in recipe.stages.items()
    ]
    named = {"name": spec.repo_id.rpartition("/")[2], "model_id": spec.repo_id}
    return record_of(recipe, command) | named | {"stages": stages}


def _check_card(record: dict[str, Any], name: str) -> str:
    """Render the card and check it and its licence files against the gate's rules."""
    try:
        card = render_card(record)
    except CardError as error:
        raise UserError(str(error), where="publish") from error
    with tempfile.TemporaryDirectory(prefix="llava-llama31-card-") as folder:
        contents = Contents(Path(folder), name)
        files = {CARD: card, **licence_texts(record["base_models"])}
        for file, text in files.items():
            Path(folder, file).write_text(text, encoding="utf-8")
        findings = [finding for rule in RULES for finding in rule(contents)]
    if "LICENSE" not in files:
        fix = (
            "name a licence whose text is included (llama3, llama3.1, llama3.2, apache-2.0); or train without "
            "`publish`, put the text into the run's export/LICENSE, and use the command `publish`"
        )
        findings.append(GateFinding("complete", "LICENSE", f"the text of {record['licence']!r} is not included", fix))
    refuse(findings, where="publish")
    return card


def _left_out(record: dict[str, Any], card: str) -> list[str]:
    """Base models and data sources that the card's metadata does not name."""
    data = ModelCard(card).data
    listed = {*(data.get("base_model") or []), *(data.get("datasets") or [])}
    sources = [source["hub_id"] or source["name"] for stage in record["stages"] for source in stage["data"]]
    given = [str(model["id"]) for model in record["base_models"]] + sources
    return [name for name in dict.fromkeys(given) if name not in listed]
