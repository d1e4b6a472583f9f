"""The model card and the licence files of an exported model, written from the run's own record and from nothing else.

A record is a JSON-like dict (name, recipe, command, commit, licence, base_models, parameters, stages, evaluation,
samples, environment; model_id, if it is on the Hub). What it does not hold is listed on the card as not recorded. All
its strings are data: they are escaped for Markdown, HTML and YAML, and absolute paths are cut down to their last part.
"""

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData
from jinja2.sandbox import SandboxedEnvironment
from markupsafe import Markup


LLAMA31 = "llama3.1"
LLAMA31_TITLE = "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT"
LLAMA31_NOTICE = (
    "Llama 3.1 is licensed under the Llama 3.1 Community License, "
    "Copyright © Meta Platforms, Inc. All Rights Reserved."
)
LLAMA31_POLICY = "https://llama.meta.com/llama3_1/use-policy"
LICENCE_NAMES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
# the Hub's identifiers that occur here; any other licence is given as `other` with its name
HUB_LICENCES = frozenset(
    ("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0")
    + ("openrail", "gemma", "llama2", "llama3", LLAMA31, "llama3.2", "llama3.3", "llama4", "unknown")
)
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
    "loss_first": "training loss, first",
    "loss": "training loss, last",
    "validation_loss": "validation loss",
    "supervised_tokens": "supervised tokens",
    "supervised_tokens_per_second": "supervised tokens per second",
    "minutes": "minutes",
}
# shown where a stage has them; a stage without them lacks nothing
OPTIONAL_STAGE_FACTS = {"num_samples": "samples", "lora": "LoRA on the language model"}
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
}
EVALUATION_FACTS = {
    "dataset": "evaluation set",
    "num_questions": "number of questions",
    "failed": "number of failed questions",
    "prompt": "evaluation prompt",
    "decoding": "decoding",
    "protocols": "scores",
    "accuracy_before": "accuracy before training",
    "accuracy_blind": "accuracy with shuffled pictures",
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DATA_SUFFIX = re.compile(r"\.(jsonl?|parquet|ya?ml|csv|tsv|tar|zip|txt)$", re.IGNORECASE)
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/\\~<-])(?:(?:file://|~)?/|[A-Za-z]:[\\/])[^\s'\",;=<>|]+")
_MARKDOWN = re.compile(r"([\\`*_\[\]~$^#])")
_JOINERS = "\u200c\u200d"


_USAGE = """\
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model_id = "MODEL_ID"
model = AutoModelForImageTextToText.from_pretrained(model_id, dtype="auto")
processor = AutoProcessor.from_pretrained(model_id)

question = "What does the sign say?\\nAnswer the question using a single word or phrase."
content = [{"type": "image", "image": Image.open("picture.jpg")}, {"type": "text", "text": question}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)
output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
_USAGE_REMOTE = """\
model = AutoModelForImageTextToText.from_pretrained(model_id, dtype="auto", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(model_id, trust_remote_code=True)"""


class CardError(ValueError):
    """The card or a licence file cannot be written; one line that says what is wrong and how to mend it."""


def render_card(record: Mapping[str, Any]) -> str:
    """Model card (README.md) of a run.

    Raises:
        CardError: the record has no name, or a number in it is NaN or infinite.
    """
    if not isinstance(record.get("name"), str) or not record["name"].strip():
        raise CardError("the record has no name: give the run one")
    _refuse_non_finite(record, "")
    record = {key: value if key == "samples" else _public(value) for key, value in record.items()}
    view = _view(record)
    body = re.sub(r"\n{3,}", "\n\n", _template().render(view))
    return f"---\n{_metadata(record).to_yaml()}\n---\n\n{body.strip()}\n"


def licence_files(base_models: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Name -> text of the licence files that must go with weights made from these models.

    Args:
        base_models: {"role", "id", "licence", "folder"?}; the licence is what the entry says and is never guessed from
            the id. The agreement of Llama 3.1 is copied from the base model's own folder (`folder`, or `id` if that is
            one), where Meta ships it.

    Raises:
        CardError: the agreement is due and not found there; names the file to put there.
    """
    files: dict[str, str] = {}
    notices: list[str] = []
    licences = [model.get("licence") for model in base_models]
    for model in base_models:
        if model.get("licence") == LLAMA31 and "LICENSE" not in files:
            files["LICENSE"] = _llama31_agreement(model)
            notices.append(LLAMA31_NOTICE)
    if "apache-2.0" in licences:
        text = resources.files(__package__).joinpath("licences", "apache-2.0.txt").read_text(encoding="utf-8")
        files["LICENSE-Apache-2.0" if files else "LICENSE"] = text
        changed = ", ".join(_public(str(m["id"])) for m in base_models if m.get("licence") == "apache-2.0")
        notices.append(
            f"This model contains modified weights of {changed}, licensed under the Apache License, Version 2.0."
        )
    if notices:
        files["NOTICE"] = "\n\n".join(notices) + "\n"
    return files


def licence_problems(record: Mapping[str, Any]) -> list[str]:
    """What keeps the model of this record from being published under its base models' licences."""
    if not _built_with_llama(record):
        return []
    problems = []
    if not str(record.get("name", "")).startswith("Llama"):
        problems.append(f"the name {record.get('name')!r} must begin with 'Llama' (Llama 3.1 licence, 1.b.i)")
    if record.get("licence") != LLAMA31:
        problems.append(f"the licence is {record.get('licence')!r}, but a base model is under {LLAMA31}")
    return problems


def _llama31_agreement(model: Mapping[str, Any]) -> str:
    folder = Path(str(model.get("folder") or model["id"]))
    found = next((folder / name for name in LICENCE_NAMES if (folder / name).is_file()), None)
    fix = f"put Meta's LICENSE of Llama 3.1 at {folder / 'LICENSE'} (it comes with the weights)"
    if found is None:
        raise CardError(f"{model['id']}: the Llama 3.1 agreement must go with the model and is not there (fix: {fix})")
    text = found.read_text(encoding="utf-8")
    if LLAMA31_TITLE not in text.upper():
        raise CardError(f"{found}: not the Llama 3.1 agreement, its title is missing (fix: {fix})")
    return text


def _view(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows, as plain strings and rows."""
    stages = record.get("stages") or []
    evaluation = record.get("evaluation") or {}
    # a name that is no plain repository name or folder must not reach Python code
    model_id = record.get("model_id") or record["name"]
    model_id = model_id if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_id) else "path/to/this/model"
    return {
        "name": record["name"],
        "usage": _USAGE.replace("MODEL_ID", model_id),
        "usage_remote": _USAGE_REMOTE,
        "built_with_llama": _built_with_llama(record),
        "notice": LLAMA31_NOTICE,
        "policy_link": Markup(LLAMA31_POLICY),
        "licence": record.get("licence"),
        "base_models": [
            [m.get("role"), m.get("id"), m.get("licence") or "not stated"] for m in record.get("base_models") or []
        ],
        "parameters": [[group, _text(count)] for group, count in (record.get("parameters") or {}).items()],
        "data": [_data_row(stage, source) for stage in stages for source in stage.get("data") or []],
        "stage_names": [_text(stage.get("name")) for stage in stages],
        "stage_rows": [
            [label, *(_text(stage.get(key)) for stage in stages)]
            for key, label in (STAGE_FACTS | OPTIONAL_STAGE_FACTS).items()
            if any(stage.get(key) is not None for stage in stages)
        ],
        "accuracy_protocol": evaluation.get("accuracy_protocol"),
        "evaluation": {key: evaluation[key] for key in EVALUATION_FACTS if evaluation.get(key) is not None},
        "scores": [
            [name, f"{100 * score['accuracy']:.3f} %", f"{_percent(score['low'])} to {_percent(score['high'])}"]
            for name, score in (evaluation.get("protocols") or {}).items()
        ],
        "samples": [_sample_row(sample) for sample in record.get("samples") or []],
        "environment_rows": [[key, _text(value)] for key, value in (record.get("environment") or {}).items()],
        "command": record.get("command"),
        "commit": record.get("commit"),
        "not_recorded": _not_recorded(record),
    }


def _not_recorded(record: Mapping[str, Any]) -> list[str]:
    names = [label for key, label in RECORD_FACTS.items() if not record.get(key)]
    for stage in record.get("stages") or []:
        lacking = [label for key, label in (STAGE_FACTS | {"data": "data"}).items() if stage.get(key) is None]
        if lacking:
            names.append(f"of stage {_text(stage.get('name'))}: {', '.join(lacking)}")
    evaluation = record.get("evaluation")
    if evaluation:
        names += [label for key, label in EVALUATION_FACTS.items() if evaluation.get(key) is None]
    return names


def _data_row(stage: Mapping[str, Any], source: Mapping[str, Any]) -> list[str]:
    dropped = source.get("dropped")
    reasons = None if dropped is None else ", ".join(f"{why}: {_text(n)}" for why, n in dropped.items()) or "none"
    facts = [stage.get("name"), source.get("name"), source.get("rows"), source.get("usable"), reasons]
    return [_text(fact) for fact in (*facts, source.get("license"))]


def _sample_row(sample: Mapping[str, Any]) -> list[Any]:
    image = sample.get("image")
    shown: Any = _text(None)
    if isinstance(image, str) and _is_relative(image):
        shown = Markup('<img src="{}" width="200">').format(image)
    answers = sample.get("answers")
    texts = None if answers is None else ", ".join(dict.fromkeys(map(str, answers)))
    return [shown, *(_text(fact) for fact in (sample.get("question"), sample.get("prediction"), texts))]


def _metadata(record: Mapping[str, Any]) -> ModelCardData:
    licence = record.get("licence")
    known = licence in HUB_LICENCES
    base_models = [_line(m["id"]) for m in record.get("base_models") or [] if _is_hub_id(m.get("id"))]
    sources = [source for stage in record.get("stages") or [] for source in stage.get("data") or []]
    datasets = dict.fromkeys(source["name"] for source in sources if _is_hub_id(source.get("name")))
    optional: dict[str, Any] = {
        "base_model_relation": "finetune" if base_models else None,
        "license_name": None if known or licence is None else _line(licence),
        "license_link": "LICENSE" if _built_with_llama(record) else None,
    }
    return ModelCardData(
        model_name=_line(record["name"]),
        license=licence if known else None if licence is None else "other",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=[*TAGS, *(["llama-3.1"] if _built_with_llama(record) else [])],
        base_model=base_models or None,
        datasets=list(datasets) or None,
        eval_results=_eval_results(record.get("evaluation") or {}) or None,
        **{key: value for key, value in optional.items() if value is not None},
    )


def _eval_results(evaluation: Mapping[str, Any]) -> list[EvalResult]:
    dataset = evaluation.get("dataset")
    if dataset is None:
        return []
    counts = {key: evaluation[key] for key in ("num_questions", "failed") if evaluation.get(key) is not None}
    return [
        EvalResult(
            task_type="image-text-to-text",
            task_name="Visual question answering",
            dataset_type=dataset if _is_hub_id(dataset) else re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-"),
            dataset_name=_line(dataset),
            metric_type="accuracy",
            metric_name=f"accuracy in %, protocol {_line(protocol)}",
            metric_value=round(100 * score["accuracy"], 3),
            metric_args={
                "protocol": _line(protocol),
                "interval_95": [round(100 * score["low"], 3), round(100 * score["high"], 3)],
                **counts,
            },
        )
        for protocol, score in (evaluation.get("protocols") or {}).items()
    ]


def _built_with_llama(record: Mapping[str, Any]) -> bool:
    licences = [model.get("licence") for model in record.get("base_models") or []]
    return LLAMA31 in (record.get("licence"), *licences)


def _is_hub_id(name: object) -> bool:
    """Whether a name can be a Hub repository: owner/name, no data file and nothing that lies here."""
    return (
        isinstance(name, str)
        and _HUB_ID.fullmatch(name) is not None
        and _DATA_SUFFIX.search(name) is None
        and not Path(name).exists()
    )


def _is_relative(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and ".." not in parts and re.fullmatch(r"[\w][\w./ -]*", path) is not None


def _refuse_non_finite(value: Any, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise CardError(f"{where.lstrip('.')} is {value}: a card never shows such a number; look into that stage")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_non_finite(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _refuse_non_finite(item, f"{where}[{number}]")


def _public(value: Any) -> Any:
    """The same value with absolute paths, which name a person's machine, cut down to their last part."""
    if isinstance(value, str):
        return _ABSOLUTE_PATH.sub(lambda match: re.split(r"[/\\]", match[0].rstrip("/\\"))[-1], value)
    if isinstance(value, Mapping):
        return {_public(key): _public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_public(item) for item in value]
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
    """Text that means itself in Markdown, in a table cell as well, and in HTML."""
    if isinstance(value, Markup):
        return value
    text = _MARKDOWN.sub(r"\\\1", html.escape(_line(value), quote=False))
    # GitHub-flavoured Markdown makes links of bare addresses
    return Markup(text.replace("|", "&#124;").replace("://", ":\\//").replace("www.", "www\\."))


def _fenced(code: object, language: str = "") -> Markup:
    """A code block that its content cannot leave."""
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
        finalize=_escaped,  # every value that the template prints goes through here
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(fenced=_fenced, percent=_percent, text=_text)
    environment.globals["table"] = _table
    return environment.from_string(resources.files(__package__).joinpath("README.md.jinja").read_text("utf-8"))
