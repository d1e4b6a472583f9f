"""The model card and licence files of an exported model, written only from the run's own record.

A record is a JSON-like dict (name, recipe, command, commit, lock, licence, base_models, parameters, stages, minutes,
evaluation, tasks, samples, environment; model_id, if it is on the Hub; opened, if it was checked). The card lists
whatever is missing as not recorded. All strings in it are data: they are escaped for Markdown, HTML and YAML, and
absolute paths are cut down to their last part.
"""

import html
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData, constants
from jinja2.sandbox import SandboxedEnvironment
from markupsafe import Markup

from llava_llama31.model_card.sections import change_sections, join_sections


@dataclass(frozen=True)
class LlamaLicence:
    """What one of Meta's community licences asks of whoever publishes a model made from its weights (its section 1.b).

    Args:
        key: as the Hub names the licence.
        family: what the agreement calls the models.
        title: of the agreement, in capitals.
        built_with: words that the card shows.
        name_begins: what the published model's name has to begin with.
        policy: address of the Acceptable Use Policy.
    """

    key: str
    family: str
    title: str
    built_with: str
    name_begins: str
    policy: str

    @property
    def tag(self) -> str:
        """The card's tag: `llama-3.1`."""
        return self.key.replace("llama", "llama-")

    @property
    def notice(self) -> str:
        """The line that a file `NOTICE` beside the weights has to hold."""
        return (
            f"{self.family} is licensed under the {self.family} Community License, "
            "Copyright © Meta Platforms, Inc. All Rights Reserved."
        )

    def takes_name(self, name: str) -> bool:
        """Whether a model may be called so; repositories can't have spaces, so hyphens stand for them."""
        return re.sub(r"[-_]", " ", name).startswith(self.name_begins)


# the agreements of 2024-04-18, 2024-07-23 and 2024-09-25
LLAMA_LICENCES = {
    licence.key: licence
    for licence in (
        LlamaLicence(
            "llama3",
            "Meta Llama 3",
            "META LLAMA 3 COMMUNITY LICENSE AGREEMENT",
            "Built with Meta Llama 3",
            "Llama 3",
            "https://llama.meta.com/llama3/use-policy",
        ),
        LlamaLicence(
            "llama3.1",
            "Llama 3.1",
            "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT",
            "Built with Llama",
            "Llama",
            "https://llama.meta.com/llama3_1/use-policy",
        ),
        LlamaLicence(
            "llama3.2",
            "Llama 3.2",
            "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT",
            "Built with Llama",
            "Llama",
            "https://www.llama.com/llama3_2/use-policy",
        ),
    )
}
LICENCE_NAMES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
# the Hub's licence ids in use here; any other licence is given as `other` with its name
HUB_LICENCES = frozenset(
    ("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0")
    + ("openrail", "gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "unknown")
)
QUANTIZATIONS = {
    "fp8": "fp8: weights in float8 (E4M3), a scale a row; activations in float8, a scale a token",
    "int8": "int8: weights in 8-bit integers, a scale a row; activations too, a scale a token",
    "w4a16": "w4a16: weights in 4-bit integers, a scale a group of columns; activations as they are",
}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
TAGS = ("llava", "llava-next", "visual-question-answering", "conversational")

STAGE_FACTS = {
    "trainable": "trainable parts",
    "learning_rate": "learning rate",
    "schedule": "schedule",
    "warmup_steps": "warm-up steps",
    "weight_decay": "weight decay",
    "epochs": "epochs",
    "steps": "steps",
    "global_batch": "global batch",
    "micro_batch": "batch per device",
    "gradient_accumulation": "gradient accumulation",
    "num_processes": "processes",
    "precision": "precision",
    "loss_first": "training loss, first log entry",
    "loss": "training loss, last log entry",
    "validation_loss": "validation loss",
    "supervised_tokens": "supervised tokens",
    "supervised_tokens_per_second": "supervised tokens per second",
    "minutes": "minutes",
}
# shown if a stage has them; never listed as not recorded
OPTIONAL_STAGE_FACTS = {"num_samples": "samples", "lora": "LoRA"}
# from the recipe's stage, shown the same way
RECIPE_FACTS = {
    "optimizer": "optimizer",
    "adam_beta1": "Adam beta 1",
    "adam_beta2": "Adam beta 2",
    "adam_epsilon": "Adam epsilon",
    "max_grad_norm": "maximum gradient norm",
    "warmup_ratio": "warm-up, share of steps",
    "batch_by": "batches balanced by",
    "last_batch": "incomplete last batch",
    "packing": "packed rows",
    "max_text_tokens": "longest record, text tokens",
    "max_tokens": "longest record, all tokens",
    "deepspeed": "DeepSpeed",
    "activation_checkpointing": "activation checkpointing",
    "compile": "compiled",
    "fp8": "float8 products",
    "validation_fraction": "share held out for validation",
    "eval_steps": "steps between evaluations",
    "save_steps": "steps between checkpoints",
    "save_total_limit": "checkpoints kept",
    "keep": "weights kept",
    "on_bad_record": "policy for bad records",
    "quirks": "quirks",
}
RECORD_FACTS = {
    "licence": "licence of this model",
    "base_models": "base models",
    "parameters": "parameter counts",
    "stages": "training stages",
    "evaluation": "evaluation",
    "samples": "sample answers",
    "environment": "environment",
    "command": "command",
    "commit": "commit",
    "lock": "lock file",
}
EVALUATION_FACTS = {
    "dataset": "evaluation set",
    "num_questions": "number of questions",
    "failed": "number of failed questions",
    "prompt": "evaluation prompt",
    "decoding": "decoding",
    "protocols": "scores",
    "predictions": "predictions file",
    "accuracy_before": "accuracy before training",
    "accuracy_blind": "accuracy with shuffled images",
}

# front matter that the run writes; a user may add any other key
METADATA_KEYS = frozenset(
    ("license", "license_name", "license_link", "library_name", "pipeline_tag", "tags", "base_model", "datasets")
    + ("base_model_relation", "model-index")
)
ENERGY_FORMULA = (
    "Energy = hours of training x processes x mean power of a process's device, summed over the stages; the power is "
    "the recipe's device_watts. Hosts, cooling and other runs are not included."
)

QUESTION = "what does the sign say?"  # about an image that is not known
_PLAIN_QUESTION = re.compile(r"[A-Za-z0-9 ,.?'-]{1,80}")  # as text of Python code

_FRONT_MATTER = re.compile(r"\A---\n(.*?)^---$\n?", re.DOTALL | re.MULTILINE)
_BLANK_LINES = re.compile(r"^(`{3,}).*?^\1$|\n{3,}", re.DOTALL | re.MULTILINE)  # keeps those in code
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DATA_SUFFIX = re.compile(r"\.(jsonl?|parquet|ya?ml|csv|tsv|tar|zip|txt)$", re.IGNORECASE)
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/\\~<-])(?:(?:file://|~)?/|[A-Za-z]:[\\/])[^\s'\",;=<>|]+")
_MARKDOWN = re.compile(r"([\\`*_\[\]~$^#])")
_JOINERS = "\u200c\u200d"


class CardError(ValueError):
    """The card or a licence file cannot be written; one line says what is wrong and how to fix it."""


def render_card(record: Mapping[str, Any], previous: str = "") -> str:
    """Render the model card (README.md) of a run.

    Args:
        record: the run's record; see the module's docstring.
        previous: the former card, whose edited and added text is kept.

    Raises:
        CardError: the record has no name, a number in it is NaN or infinite, or the front matter of `previous` is
            broken.
    """
    if not isinstance(record.get("name"), str) or not record["name"].strip():
        raise CardError("the record has no name: name the run")
    _refuse_non_finite(record, "")
    record = {key: value if key == "samples" else public(value) for key, value in record.items()}
    context = _template().new_context(_view(record))
    sections = {
        name: _BLANK_LINES.sub(lambda match: match[0] if match[1] else "\n\n", "".join(block(context))).strip()
        for name, block in _template().blocks.items()
    }
    metadata = _joined_metadata(_metadata(record).to_dict(), previous)
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=10_000)
    body = join_sections({name: text for name, text in sections.items() if text}, _FRONT_MATTER.sub("", previous))
    return f"---\n{front}---\n\n{body}\n"


def quick_snippet(model_id: str, *, image: str = "", question: str = QUESTION) -> str:
    """The twelve lines that card and README show: one answer, by stock classes.

    Args:
        model_id: OWNER/NAME of the Hub, or a folder.
        image: a file of that repository or folder; without one the code opens `sign.png`.
        question: plain text without quotes.
    """
    code = _usage_template("usage_quick.txt").replace("MODEL_ID", model_id).replace("QUESTION", question)
    if image and _HUB_ID.fullmatch(model_id):
        return code.replace("IMAGE", image)
    code = code.replace("from huggingface_hub import hf_hub_download\n", "")
    where = f'f"{{repo}}/{image}"' if image else '"sign.png"'
    return code.replace('hf_hub_download(repo, "IMAGE")', where)


def usage_snippet(model_id: str) -> str:
    """The code by which `publish` opens a model in every way: five texts, which have to be the same."""
    return _usage_template("usage.txt").replace("MODEL_ID", model_id)


def card_for(card: str, model_id: str) -> str:
    """A card of an exported folder whose code opens OWNER/NAME of the Hub; a section that somebody edited stays."""
    name = re.compile(r'^(repo|adapter) = "[\w./-]+"$', re.MULTILINE)  # of the usage templates
    image = re.compile(r'f"\{repo\}/([\w./-]+)"')
    imports = "from transformers import AutoModelForImageTextToText, AutoProcessor\n\nrepo ="

    def named(text: str) -> str:
        text = name.sub(lambda match: f'{match[1]} = "{model_id}"', text)
        if image.search(text):
            text = image.sub(r'hf_hub_download(repo, "\1")', text)
            text = text.replace(imports, f"from huggingface_hub import hf_hub_download\n{imports}")
        return text

    return change_sections(card, named)


def adapter_snippet(model_id: str) -> str:
    """The code that opens adapters on their base, as their card shows it."""
    return _usage_template("usage_adapter.txt").replace("ADAPTER_ID", model_id)


def twin_snippet(model_id: str) -> str:
    """The code that opens a quantised model, as its card shows it."""
    return _usage_template("usage_twin.txt").replace("MODEL_ID", model_id)


def _snippet_of(record: Mapping[str, Any]) -> Callable[[str], str]:
    if record.get("adapter"):
        return adapter_snippet
    if record.get("quantized"):
        return twin_snippet
    samples: list[Mapping[str, Any]] = record.get("samples") or []
    sample = next((one for one in samples if _is_file(one.get("image"), *IMAGE_SUFFIXES)), {})
    asked = str(sample.get("question") or "")
    question = asked if _PLAIN_QUESTION.fullmatch(asked) else QUESTION
    return partial(quick_snippet, image=sample.get("image", ""), question=question)


def _adapter_of(record: Mapping[str, Any]) -> dict[str, Any] | None:
    adapter = record.get("adapter")
    if not adapter:
        return None
    base, revision = adapter["base_model_name_or_path"], adapter["revision"]
    return {"base": f"{base} at {revision}" if revision else base, "difference": f"{adapter['difference']:.1g}"}


def _quantized_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """What was quantised, and what that cost; empty for a model that is not."""
    twin = record.get("quantized")
    if not twin:
        return []
    interval = f"{_points(twin['low'])} to {_points(twin['high'])}"
    return [
        ["scheme", QUANTIZATIONS[twin["scheme"]]],
        ["quantised", f"{twin['layers']} linear layers of the decoder; tower, projector, embeddings and head are not"],
        ["weights", f"{twin['bytes']:,} bytes, {twin['bytes_before']:,} before"],
        [f"accuracy on {twin['dataset']} before, after", f"{_percent(twin['first'])}, {_percent(twin['second'])}"],
        ["difference, paired 95 % interval", f"{_points(twin['difference'])} points, {interval}"],
        ["questions that gained, lost, tied", f"{twin['gained']}, {twin['lost']}, {twin['tied']}"],
        ["same answer to the fixed questions", f"{twin['equal_answers']} of {twin['fixed_questions']}"],
    ]


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"


def _joined_metadata(metadata: dict[str, Any], previous: str) -> dict[str, Any]:
    """The run's front matter, plus the keys and tags that a user added to the former one."""
    match = _FRONT_MATTER.match(previous)
    if match is None:
        return metadata
    try:
        former = yaml.safe_load(match[1])
        if not isinstance(former, dict):
            raise ValueError("it is not a mapping")
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CardError(
            f"README.md: its front matter cannot be read: {reason} (fix: correct it, or remove the file)"
        ) from None
    tags = former.get("tags")
    added = {key: value for key, value in former.items() if key not in METADATA_KEYS}
    _refuse_non_finite(added, "README.md")
    return {
        **metadata,
        "tags": list(dict.fromkeys([*metadata["tags"], *(tags if isinstance(tags, list) else [])])),
        **added,
    }


def _at_revision(base_model: Mapping[str, Any]) -> str | None:
    revision = base_model.get("revision")
    return f"{base_model['id']} at {revision}" if revision else base_model.get("id")


def licence_files(base_models: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Name -> text of the licence files that must go with weights made from these models.

    Args:
        base_models: {"role", "id", "licence", "folder"?}; the licence is taken from the entry, never guessed from the
            id. A Llama agreement is copied from the base model's own folder (`folder`, or `id` if that is one),
            where Meta ships it.

    Raises:
        CardError: the agreement is required but missing; names the file to put there.
    """
    files: dict[str, str] = {}
    notices: list[str] = []
    licences = [model.get("licence") for model in base_models]
    for model in base_models:
        licence = LLAMA_LICENCES.get(str(model.get("licence")))
        if licence is not None and licence.notice not in notices:
            files["LICENSE" if not files else f"LICENSE-{licence.key}"] = _llama_agreement(model, licence)
            notices.append(licence.notice)
    if "apache-2.0" in licences:
        text = resources.files(__package__).joinpath("licences", "apache-2.0.txt").read_text(encoding="utf-8")
        files["LICENSE-Apache-2.0" if files else "LICENSE"] = text
        changed = ", ".join(public(str(m["id"])) for m in base_models if m.get("licence") == "apache-2.0")
        notices.append(
            f"This model contains modified weights of {changed}, licensed under the Apache License, Version 2.0."
        )
    if notices:
        files["NOTICE"] = "\n\n".join(notices) + "\n"
    return files


def licence_problems(record: Mapping[str, Any]) -> list[str]:
    """Why the base models' licences do not allow publishing this record's model; empty if they do."""
    problems = []
    for licence in _llama_licences(record):
        if not licence.takes_name(str(record.get("name", ""))):
            problems.append(
                f"the name {record.get('name')!r} must begin with {licence.name_begins!r} "
                f"({licence.family} licence, 1.b.i)"
            )
        if record.get("licence") != licence.key:
            problems.append(f"the licence is {record.get('licence')!r}, but a base model is under {licence.key}")
    return problems


def _llama_agreement(model: Mapping[str, Any], licence: LlamaLicence) -> str:
    folder = Path(str(model.get("folder") or model["id"]))
    found = next((folder / name for name in LICENCE_NAMES if (folder / name).is_file()), None)
    family = licence.family.removeprefix("Meta ")
    fix = f"put Meta's LICENSE of {family} at {folder / 'LICENSE'} (it comes with the weights)"
    if found is None:
        what = f"the {licence.family} agreement must go with the model but is missing"
        raise CardError(f"{model['id']}: {what} (fix: {fix})")
    text = found.read_text(encoding="utf-8")
    if licence.title not in text.upper():
        raise CardError(f"{found}: not the {licence.family} agreement, its title is missing (fix: {fix})")
    return text


def _view(record: Mapping[str, Any]) -> dict[str, Any]:
    """The template's context, as plain strings and rows."""
    stages = record.get("stages") or []
    evaluation = record.get("evaluation") or {}
    shown = (*EVALUATION_FACTS, "missing", "cut")  # older records lack these two, which is no gap
    # only a plain repository name or folder may reach Python code
    model_id = record.get("model_id") or record["name"]
    model_id = model_id if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_id) else "path/to/this/model"
    return {
        "name": record["name"],
        "usage": _snippet_of(record)(model_id),
        "adapter": _adapter_of(record),
        "quantized": _quantized_rows(record),
        "built_with": next((licence.built_with for licence in _llama_licences(record)), None),
        "llama_licences": [(licence.notice, Markup(licence.policy)) for licence in _llama_licences(record)],
        "licence": record.get("licence"),
        "base_models": [
            [m.get("role"), _at_revision(m), m.get("licence") or "not stated"] for m in record.get("base_models") or []
        ],
        "parameters": [[group, _text(count)] for group, count in (record.get("parameters") or {}).items()],
        "opened": [
            [way["engine"], way["door"], f"{way['equal']} of {way['asked']}", way["note"]]
            for way in record.get("opened") or []
        ],
        "data": [_data_row(stage, source) for stage in stages for source in stage.get("data") or []],
        "contamination": [
            _contamination_row(stage, source, found)
            for stage in stages
            for source in stage.get("data") or []
            for found in source.get("contamination") or []
        ],
        "stage_names": [_text(stage.get("name")) for stage in stages],
        "stage_rows": _stage_rows(record),
        "text_rows": [
            ["before training" if name == "before" else f"after {_text(name)}"]
            + [f"{found['accuracy']:.1%}", _text(found["num_questions"])]
            for name, found in (record.get("text_ability") or {}).items()
        ],
        "curves": [
            _image(stage["curve_image"], 640, f"Loss curve of stage {number}")
            for number, stage in enumerate(stages, start=1)
            if _is_file(stage.get("curve_image"), *IMAGE_SUFFIXES)
        ],
        "cost": _cost_rows(record),
        "energy_formula": ENERGY_FORMULA if _energy_kwh(record) is not None else None,
        "accuracy_protocol": evaluation.get("accuracy_protocol"),
        "evaluation": {key: evaluation[key] for key in shown if evaluation.get(key) is not None},
        "scores": [
            [name, f"{100 * score['accuracy']:.3f} %", f"{_percent(score['low'])} to {_percent(score['high'])}"]
            for name, score in (evaluation.get("protocols") or {}).items()
        ],
        "predictions_link": _predictions_link(evaluation),
        "tasks": [row for task in record.get("tasks") or [] for row in _task_rows(task)],
        "task_baselines": [_baselines_row(task) for task in record.get("tasks") or [] if _has_baselines(task)],
        "task_facts": [_task_facts(task) for task in record.get("tasks") or []],
        "samples_scored": any(sample.get("accuracy") is not None for sample in record.get("samples") or []),
        "samples": [_sample_row(sample) for sample in record.get("samples") or []],
        "environment_rows": [[key, _text(value)] for key, value in (record.get("environment") or {}).items()],
        "command": record.get("command"),
        "reproduction": _reproduction(record),
        "not_recorded": _not_recorded(record),
    }


def _not_recorded(record: Mapping[str, Any]) -> list[str]:
    told = {"evaluation"} if record.get("tasks") else set()
    names = [label for key, label in RECORD_FACTS.items() if not record.get(key) and key not in told]
    for stage in record.get("stages") or []:
        lacking = [
            label
            for key, label in (STAGE_FACTS | {"data": "data", "curve_image": "loss curve"}).items()
            if stage.get(key) is None
        ]
        if lacking:
            names.append(f"of stage {_text(stage.get('name'))}: {', '.join(lacking)}")
    if record.get("stages") and _energy_kwh(record) is None:
        names.append("energy (the recipe has no device_watts)")
    evaluation = record.get("evaluation")
    if evaluation:
        names += [label for key, label in EVALUATION_FACTS.items() if evaluation.get(key) is None]
    return names


def _stage_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """One column per stage: facts that the run recorded, then settings of its recipe."""
    stages = record.get("stages") or []
    recipe = record.get("recipe") or {}
    rows = [
        (label, [stage.get(key) for stage in stages]) for key, label in (STAGE_FACTS | OPTIONAL_STAGE_FACTS).items()
    ]
    asked = [(recipe.get("stages") or {}).get(stage.get("name")) or {} for stage in stages]
    for key, label in RECIPE_FACTS.items():
        # null in a recipe is a fact: "none"
        rows.append((label, [stage.get(key) if stage.get(key, 0) is not None else [] for stage in asked]))
    rows.append(("seed", [recipe.get("seed")] * len(stages)))
    for name in dict.fromkeys(name for stage in stages for name in stage.get("loss_by_source") or {}):
        of_stages = [_source_fact(stage, name) for stage in stages]
        rows.append((f"loss and accuracy on {_text(name)}, last log entry", of_stages))
    return [
        [label, *("none" if value in ([], {}) else _text(value) for value in values)]
        for label, values in rows
        if any(value not in (None, [], {}) for value in values)
    ]


def _source_fact(stage: Mapping[str, Any], name: str) -> str | None:
    """Loss and accuracy of a stage's source on the tokens trained last, and on its validation rows where there are."""
    trained = (stage.get("loss_by_source") or {}).get(name)
    if trained is None:
        return None
    fact = f"{trained['loss']:.4g}, {trained['accuracy']:.1%}"
    held_out = (stage.get("validation_by_source") or {}).get(name)
    return fact if held_out is None else f"{fact}; validation {held_out['loss']:.4g}, {held_out['accuracy']:.1%}"


def _device_hours(record: Mapping[str, Any]) -> float | None:
    """Hours of training times processes, over all stages; None if a stage lacks either."""
    stages = record.get("stages") or []
    spent = [(stage.get("minutes"), stage.get("num_processes")) for stage in stages]
    if not spent or any(fact is None for facts in spent for fact in facts):
        return None
    return sum(minutes * processes for minutes, processes in spent) / 60


def _energy_kwh(record: Mapping[str, Any]) -> float | None:
    watts, hours = (record.get("recipe") or {}).get("device_watts"), _device_hours(record)
    return None if watts is None or hours is None else hours * watts / 1000


def _cost_rows(record: Mapping[str, Any]) -> list[list[str]]:
    hours = _device_hours(record)
    facts = {
        "hardware": (record.get("environment") or {}).get("hardware"),
        "hours of training x processes": hours,
        "hours of the whole run": None if record.get("minutes") is None else record["minutes"] / 60,
        "mean power of a device in W, from the recipe": (record.get("recipe") or {}).get("device_watts"),
        "energy of the devices in kWh": _energy_kwh(record),
    }
    return [[label, _text(fact)] for label, fact in facts.items() if fact is not None]


def _reproduction(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = []
    if record.get("commit"):
        facts.append(("commit of the code", record["commit"]))
    lock = record.get("lock")
    if lock:
        facts.append(("lock file", f"{lock['file']}, SHA-256 {lock['sha256']}"))
    return facts


def _contamination_row(stage: Mapping[str, Any], source: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What a source holds of an evaluation, and which of these rows were not trained on."""
    file = str(found.get("evaluation", "")).rstrip("/").rpartition("/")[2]
    rejected = {"images": "rows with images", "images_and_questions": "rows with images or questions"}
    left_out = rejected.get(str(found.get("reject")), "none")
    counts = [found.get(key) for key in ("evaluation_images", "exact", "near", "questions")]
    return [_text(fact) for fact in (stage.get("name"), source.get("name"), file, *counts, left_out)]


def _data_row(stage: Mapping[str, Any], source: Mapping[str, Any]) -> list[str]:
    dropped = source.get("dropped")
    reasons = None if dropped is None else ", ".join(f"{why}: {_text(n)}" for why, n in dropped.items()) or "none"
    hub_id, name = source.get("hub_id"), source.get("name")
    named = f"{name} ({hub_id})" if hub_id not in (None, name) else name
    facts = [stage.get("name"), named, *(source.get(key) for key in ("rows", "usable", "selected")), reasons]
    return [_text(fact) for fact in (*facts, source.get("license"))]


def _sample_row(sample: Mapping[str, Any]) -> list[Any]:
    image = sample.get("image")
    shown: Any = _image(image, 200, "Image of the question") if _is_file(image, *IMAGE_SUFFIXES) else _text(None)
    answers = sample.get("answers")
    counts = Counter(map(str, answers or ())).most_common()
    texts = None if answers is None else ", ".join(f"{text} x {n}" if n > 1 else text for text, n in counts)
    accuracy = sample.get("accuracy")
    facts = (sample.get("question"), sample.get("prediction"), texts, None if accuracy is None else _percent(accuracy))
    return [shown, *(_text(fact) for fact in facts)]


def _image(file: Any, width: int, alt: str) -> Markup:
    """An image tag; the name must have passed `_is_file`, and `alt` is ours."""
    return Markup(f'<img src="{file}" width="{width}" alt="{alt}">')


def _task_rows(task: Mapping[str, Any]) -> list[list[Any]]:
    """Per protocol, the one of the headline first: what it measured, with the interval."""
    protocols = task.get("protocols") or {}
    order = sorted(protocols, key=lambda name: name != task.get("protocol"))
    rows = []
    for name in order:
        scores = protocols[name]
        headline = scores["headline"]
        others = {key: round(value, 3) for key, value in scores["metrics"].items() if key != headline}
        rows.append(
            [
                task.get("title") or task.get("name"),
                name,
                headline if task.get("unit") == "%" else f"{headline} ({task.get('unit')})",
                f"{scores['metrics'][headline]:.3f}",
                f"{scores['low']:.2f} to {scores['high']:.2f}",
                _text(others) if others else "",
            ]
        )
    return rows


def _has_baselines(task: Mapping[str, Any]) -> bool:
    return task.get("before") is not None or task.get("blind") is not None


def _baselines_row(task: Mapping[str, Any]) -> list[str]:
    values = (task.get("before"), task.get("value"), task.get("blind"))
    named = [task.get("title") or task.get("name"), task.get("protocol")]
    return [*map(_text, named), *("" if value is None else f"{value:.3f}" for value in values)]


def _task_facts(task: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in a list under the scores."""
    counts = {"questions": "num_questions", "failed": "failed", "unanswered": "missing", "cut": "cut"}
    told = [f"{label} {_text(task[key])}" for label, key in counts.items() if task.get(key) is not None]
    return {
        "title": task.get("title") or task.get("name"),
        "dataset": task.get("dataset"),
        "counts": ", ".join(told),
        "decoding": task.get("decoding"),
        "link": _predictions_link(task),
        "sha256": (task.get("predictions") or {}).get("sha256"),
        "prompt": task.get("prompt"),
    }


def _predictions_link(evaluation: Mapping[str, Any]) -> Markup | None:
    file = (evaluation.get("predictions") or {}).get("file")
    return Markup(f"[{file}]({file})") if _is_file(file, ".jsonl") else None


def _metadata(record: Mapping[str, Any]) -> ModelCardData:
    licence = record.get("licence")
    known = licence in HUB_LICENCES
    base_models = [_line(m["id"]) for m in record.get("base_models") or [] if _is_hub_id(m.get("id"))]
    relation, adapter = "finetune", record.get("adapter")
    if adapter:
        name = adapter["base_model_name_or_path"]
        base_models, relation = ([_line(name)] if _is_hub_id(name) else []), "adapter"
    sources = [source for stage in record.get("stages") or [] for source in stage.get("data") or []]
    names = (source.get("hub_id") or source.get("name") for source in sources)
    datasets = dict.fromkeys(name for name in names if _is_hub_id(name))
    optional: dict[str, Any] = {
        "base_model_relation": relation if base_models else None,
        "license_name": None if known or licence is None else _line(licence),
        "license_link": "LICENSE" if _llama_licences(record) else None,
    }
    return ModelCardData(
        model_name=_line(record["name"]),
        license=licence if known else None if licence is None else "other",
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=[*TAGS, *(licence.tag for licence in _llama_licences(record))],
        base_model=base_models or None,
        datasets=list(datasets) or None,
        eval_results=_eval_results(record) or None,
        **{key: value for key, value in optional.items() if value is not None},
    )


def _eval_results(record: Mapping[str, Any]) -> list[EvalResult]:
    tasks = [result for task in record.get("tasks") or [] for result in _task_results(record, task)]
    evaluation = record.get("evaluation") or {}
    dataset = evaluation.get("dataset")
    return (_textvqa_results(record, evaluation, dataset) if dataset is not None else []) + tasks


def _counts_and_source(
    record: Mapping[str, Any], evaluation: Mapping[str, Any], names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Counts with the predictions file, and where that file is on the Hub."""
    counts = {key: evaluation[key] for key in names if evaluation.get(key) is not None}
    source: dict[str, Any] = {}
    if _predictions_link(evaluation):
        predictions, model_id = evaluation["predictions"], record.get("model_id")
        counts |= {"predictions": predictions["file"], "predictions_sha256": predictions["sha256"]}
        if _is_hub_id(model_id):
            url = f"{constants.ENDPOINT}/{model_id}/blob/main/{predictions['file']}"
            source = {"source_name": "predictions", "source_url": url}
    return counts, source


def _dataset_type(dataset: str) -> str:
    return dataset if _is_hub_id(dataset) else re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-")


def _task_results(record: Mapping[str, Any], task: Mapping[str, Any]) -> list[EvalResult]:
    counts, source = _counts_and_source(record, task, ("num_questions", "failed", "missing", "cut"))
    dataset = str(task.get("dataset") or task["name"])
    return [
        EvalResult(
            task_type="image-text-to-text",
            task_name="Visual question answering",
            dataset_type=_dataset_type(dataset),
            dataset_name=_line(task.get("title") or task["name"]),
            metric_type=_line(scores["headline"]),
            metric_name=_line(f"{scores['headline']} in {task.get('unit')}, protocol {protocol}"),
            metric_value=round(scores["metrics"][scores["headline"]], 3),
            metric_args={
                "protocol": _line(protocol),
                "interval_95": [round(scores["low"], 3), round(scores["high"], 3)],
                **counts,
            },
            **source,
        )
        for protocol, scores in (task.get("protocols") or {}).items()
    ]


def _textvqa_results(record: Mapping[str, Any], evaluation: Mapping[str, Any], dataset: str) -> list[EvalResult]:
    counts, source = _counts_and_source(record, evaluation, ("num_questions", "failed", "missing", "cut"))
    return [
        EvalResult(
            task_type="image-text-to-text",
            task_name="Visual question answering",
            dataset_type=_dataset_type(dataset),
            dataset_name=_line(dataset),
            metric_type="accuracy",
            metric_name=f"accuracy in %, protocol {_line(protocol)}",
            metric_value=round(100 * score["accuracy"], 3),
            metric_args={
                "protocol": _line(protocol),
                "interval_95": [round(100 * score["low"], 3), round(100 * score["high"], 3)],
                **counts,
            },
            **source,
        )
        for protocol, score in (evaluation.get("protocols") or {}).items()
    ]


def _llama_licences(record: Mapping[str, Any]) -> list[LlamaLicence]:
    """Meta's licences that the model or one of its base models is under."""
    named = (record.get("licence"), *(model.get("licence") for model in record.get("base_models") or []))
    return [licence for key, licence in LLAMA_LICENCES.items() if key in named]


def _is_hub_id(name: object) -> bool:
    """Whether a name can be a Hub repository: owner/name, not a data file and not a local path."""
    return (
        isinstance(name, str)
        and _HUB_ID.fullmatch(name) is not None
        and _DATA_SUFFIX.search(name) is None
        and not Path(name).exists()
    )


def _is_file(path: Any, *suffixes: str) -> bool:
    """Whether this names a file of such a type in the model's folder, in characters that need no escaping."""
    if not isinstance(path, str) or PurePosixPath(path).suffix not in suffixes:
        return False
    return ".." not in PurePosixPath(path).parts and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_./-]*", path) is not None


def _refuse_non_finite(value: Any, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise CardError(f"{where.lstrip('.')} is {value}, which a card never shows; look into that stage")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_non_finite(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _refuse_non_finite(item, f"{where}[{number}]")


def public(value: Any) -> Any:
    """The value with absolute paths, which reveal a user's machine, cut down to their last part."""
    if isinstance(value, str):
        return _ABSOLUTE_PATH.sub(lambda match: re.split(r"[/\\]", match[0].rstrip("/\\"))[-1], value)
    if isinstance(value, Mapping):
        return {public(key): public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    return value


def _text(value: Any) -> str:
    """A fact as text, not yet escaped."""
    if value is None:
        return "not recorded"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else re.sub(r"e([+-])0+", r"e\1", f"{value:.4g}")
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return str(value)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _line(value: object) -> str:
    """Text on one line, without control, bidirectional and other invisible characters."""
    kept = (character if character.isprintable() or character in _JOINERS else " " for character in str(value))
    return " ".join("".join(kept).split())


def _escaped(value: object) -> Markup:
    """Text escaped for Markdown, table cells and HTML."""
    if isinstance(value, Markup):
        return value
    text = _MARKDOWN.sub(r"\\\1", html.escape(_line(value), quote=False))
    # GitHub-flavoured Markdown turns bare URLs into links
    return Markup(text.replace("|", "&#124;").replace("://", ":\\//").replace("www.", "www\\."))


def _fenced(code: object, language: str = "") -> Markup:
    """A code block whose content cannot close it."""
    lines = [
        "".join(c if c.isprintable() or c in _JOINERS else " " for c in line.expandtabs(4))
        for line in str(code).split("\n")
    ]
    text = "\n".join(lines)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}{language}\n{text}\n{fence}")


def _table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    lines = [f"| {' | '.join(map(_escaped, row))} |" for row in (header, *rows)]
    lines.insert(1, f"|{' --- |' * len(header)}")
    return Markup("\n".join(lines))


@cache
def _template() -> jinja2.Template:
    environment = SandboxedEnvironment(
        undefined=jinja2.StrictUndefined,
        finalize=_escaped,  # applied to every value that the template prints
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(fenced=_fenced, percent=_percent, text=_text)
    environment.globals["table"] = _table
    return environment.from_string(resources.files(__package__).joinpath("README.md.jinja").read_text("utf-8"))


@cache
def _usage_template(file: str) -> str:
    return resources.files(__package__).joinpath(file).read_text("utf-8").rstrip()
