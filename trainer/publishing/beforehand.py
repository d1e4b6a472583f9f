"""What would keep a run from being published at its end, found before its first step."""

import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import logging as hub_logging

from llava_llama31.model_card.card import CardError, render_card
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.publishing.contents import CARD, Contents, GateFinding
from llava_llama31.trainer.publishing.gate import check_card, check_licence
from llava_llama31.trainer.publishing.gate_files import check_paths, check_secrets
from llava_llama31.trainer.publishing.hub_calls import redact
from llava_llama31.trainer.publishing.publish import check_free_space, check_target, refuse
from llava_llama31.trainer.publishing.release import check_repo_id
from llava_llama31.trainer.recipes.schema import Publish, Recipe, Stage
from llava_llama31.trainer.runs.finish import licence_texts, record_of


logger = logging.getLogger(__name__)

RULES = (check_card, check_licence, check_secrets, check_paths)


def check_strategy(spec: Publish, stages: Mapping[str, Stage]) -> None:
    """Refuse interim pushes that a stage, as it is launched, cannot make.

    Raises:
        UserError: naming the stage and the key.
    """
    if spec.hub_strategy == "end":
        return
    for name, stage in stages.items():
        if stage.lora is not None and stage.lora.quantize:
            raise UserError(
                f"adapters of stage {name} cannot be merged into 4-bit weights while they are trained",
                where="publish.hub_strategy",
                fix=f"set it to end, or remove stages.{name}.lora.quantize",
            )
        if stage.deepspeed is not None and spec.hub_strategy == "checkpoint":
            raise UserError(
                f"the training state of stage {name} is DeepSpeed's own format, which is pickled",
                where="publish.hub_strategy",
                fix="set it to every_save or end; or train the stage without DeepSpeed",
            )


def check_beforehand(
    recipe: Recipe, spec: Publish, base: Path, *, command: str, begun: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Check name, licence, card, ids, free space, token, rights and collection; returns the record of the card so far.

    Args:
        base: checkpoint that the first stage starts from; the finished model is as large.
        begun: a run that has checkpoints goes on though the Hub does not answer.

    Raises:
        UserError: naming what to mend.
    """
    check_repo_id(spec.repo_id, "publish.repo_id")
    record = provisional_record(recipe, spec, command)
    card = _check_card(record, spec.repo_id.rpartition("/")[2])
    left_out = _left_out(record, card)
    if left_out:
        say(f"not on the card's list of base models and data sets, being no ids of the Hub: {', '.join(left_out)}")
    check_free_space(sum(file.stat().st_size for file in base.glob("*.safetensors")))
    hub_logging.set_verbosity_error()  # its warnings show signed addresses
    try:
        check_target(HfApi(), spec.repo_id, card, spec.collection, resume="run again")
    except UserError as error:
        if not begun:
            raise UserError(redact(str(error))) from None
        logger.warning("the run goes on, but as things are it could not be published: %s", redact(str(error)))
    return record


def provisional_record(recipe: Recipe, spec: Publish, command: str) -> dict[str, Any]:
    """What the card tells before anything is trained."""
    stages = [
        {"name": name, "data": [source.model_dump(include={"name", "license", "hub_id"}) for source in stage.data]}
        for name, stage in recipe.stages.items()
    ]
    named = {"name": spec.repo_id.rpartition("/")[2], "model_id": spec.repo_id}
    return record_of(recipe, command) | named | {"stages": stages}


def _check_card(record: dict[str, Any], name: str) -> str:
    """The card, if the gate takes it and the licence files that would go with it."""
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
        fix = "name a licence whose text comes along (llama3.1, apache-2.0); or train without `publish`, put the text "
        fix += "into the run's export/LICENSE, and use the command `publish`"
        findings.append(GateFinding("complete", "LICENSE", f"there is no text of {record['licence']!r}", fix))
    refuse(findings, where="publish")
    return card


def _left_out(record: dict[str, Any], card: str) -> list[str]:
    """Base models and data sources that the card's metadata does not name."""
    data = ModelCard(card).data
    listed = {*(data.get("base_model") or []), *(data.get("datasets") or [])}
    sources = [source["hub_id"] or source["name"] for stage in record["stages"] for source in stage["data"]]
    given = [str(model["id"]) for model in record["base_models"]] + sources
    return [name for name in dict.fromkeys(given) if name not in listed]
