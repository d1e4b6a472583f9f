"""Tasks: what a benchmark asks, where its answers are, and how published evaluators score it; one YAML file a task."""

import difflib
import re
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.metrics import choices, numbers, text, yes_no
from llava_llama31.trainer.evaluation.presets import PLACEHOLDERS, PRESET_NAMES
from llava_llama31.trainer.evaluation.row_files import any_rows
from llava_llama31.trainer.evaluation.vqa_accuracy import PROTOCOLS as VQA_PROTOCOLS
from llava_llama31.trainer.strict_yaml import parse_yaml


TABLES = (".csv", ".tsv", ".json", ".jsonl", ".xlsx")
_NAME_IN_BRACES = re.compile(r"\{([A-Za-z_]\w*)\}")
_PACKAGE, _FOLDER, _SUFFIX = "llava_llama31.trainer.evaluation", "tasks", ".yaml"

Metric = Literal[
    "vqa",
    "exact",
    "contains",
    "relaxed",
    "anls",
    "choice",
    "yes_no",
    "fields",
    "cer",
    "wer",
    "function",
    "per_question",
]
Summary = Literal["mean", "points", "yes_no", "pairs", "hallusionbench", "circular", "fields", "error_rate"]
AnswerKind = Literal["text", "texts", "letter", "index", "yes_no", "binary", "json"]
Units = Literal["image", "circular", "hallusionbench"]

# metric -> rules that it is measured by
RULES: dict[str, tuple[str, ...]] = {
    "vqa": tuple(VQA_PROTOCOLS),
    "exact": tuple(text.EXACT_PROTOCOLS),
    "relaxed": numbers.PROTOCOLS,
    "anls": tuple(text.ANLS_PROTOCOLS),
    "choice": tuple(choices.RULES),
    "yes_no": tuple(yes_no.RULES),
    "fields": ("verbatim", "ignore-case"),
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


# summary -> the metrics that it sums, where these are not all; the names of its figures beside sums, where it does not
# go by `called`; the units that it needs
_SUMMED: dict[str, tuple[str, ...]] = {"yes_no": ("yes_no",), "fields": ("fields",), "error_rate": ("cer", "wer")}
_FIGURES: dict[str, tuple[str, ...]] = {
    "yes_no": ("accuracy", "precision", "recall", "f1", "yes_ratio"),
    "pairs": ("accuracy", "accuracy_of_pairs"),
    "hallusionbench": ("aAcc", "fAcc", "qAcc"),
    "circular": ("accuracy", "accuracy_of_turns"),
    "fields": ("f1", "exact"),
}
_UNITS = {"pairs": "image", "circular": "circular", "hallusionbench": "hallusionbench"}


class Layout(_Frozen):
    """Where a question's parts are in the rows of one kind of file.

    A part is named by a field (`answer`), a way into the row (`conversations.0.value`) or a text with such names in
    braces (`{category}/{image}`). A layout is taken if a file's first row has every field that it names.
    """

    name: str
    files: str | None = None
    """Names of a folder's files, with the name of one field in braces (`{category}.txt`)."""
    columns: list[str] = []
    """Names of the columns of files that have no header; tab-separated."""
    needs: list[str] = []
    """Further fields that its rows have, and another benchmark's lack."""
    id: str | None = None
    """Default: the image's key and a running number."""
    question: str | None = "question"
    """None: the file has the answers alone, and cannot be asked."""
    first_line: bool = False
    """The field's first line alone is the question; LLaVA's files have a prompt below it."""
    image: str | None = None
    """A path, bytes or base64."""
    image_key: str | None = None
    """What answers call the image, where `image` is not a path; a path itself where a row has no `image`."""
    all_with_image: bool = False
    """Every question has an image, also where the file leaves it out."""
    answer: str | None = "answer"
    """None: the file has none, and the answers go to a server."""
    answer_is: AnswerKind = "text"
    options: Literal["columns", "inline", "letters"] | str | list[str] | None = None
    """`columns` A, B, ...; `inline`, in the question's text; `letters`, A to I without texts; one field with a list or
    an object of letters; or one field an option."""
    without_options: dict[str, str] = {}
    """Field -> what it says in rows of open questions."""
    context: str | None = None
    empty: str | None = None
    """What options in columns and the context say where there is none, as the Hub's MMBench says `nan`."""
    groups: list[str] = []
    separator: str | None = None
    """What parts several groups of one field."""
    groups_by_field: dict[str, str] = {}
    """Field -> the group of rows that have it, where a file says a category by the name of a metric."""
    metric: str | None = None
    leave_out: dict[str, str | list[str]] = {}
    """Field -> what it says in rows that do not count, as those of another split; one text or several."""
    size: int | None = None
    """Questions of a whole file, where answers come with their questions and a part could not be told from it."""


class ProtocolOf(_Frozen):
    """How one evaluator scores the answers of a task.

    `over: groups` averages the groups' scores, if `averaged` names some of these (of all questions if there is none of
    them); `weighted: groups` counts a question once for each of its groups.
    """

    source: str
    metric: Metric
    rule: str = ""
    summary: Summary = "mean"
    called: str = "accuracy"
    headline: str
    over: Literal["questions", "groups"] = "questions"
    averaged: list[str] = []
    weighted: Literal["questions", "groups"] = "questions"
    unclear: Literal["no", "left_out"] = "no"
    """What precision and recall make of an answer that says neither yes nor no."""
    list_answers: bool = False
    """An annotated answer that is a Python list gives several answers."""
    formulas: list[str] = []
    """Groups whose answers are formulas."""
    sums: dict[str, list[str]] = {}
    """Name of a sum -> the groups whose scores it adds."""
    reads: Literal["all", "stripped", "answer_line", "answer_line_or_all"] = "all"
    """What of an answer is compared: all; all but white space around it, as lmms-eval does before any of its rules; or
    with a text, what follows its last `ANSWER:`, nothing or all where it has none."""
    layouts: list[str] = []
    """Answer files that are scored by this protocol unless --protocol names another one."""

    @model_validator(mode="after")
    def _known_rule(self) -> "ProtocolOf":
        rules = RULES.get(self.metric, ())
        if rules and self.rule not in rules:
            raise ValueError(f"rule is {self.rule!r}; {self.metric} has {', '.join(rules)}")
        if self.metric == "function" and self.rule.count(":") != 1:
            raise ValueError("rule has to be module:function")
        return self

    @model_validator(mode="after")
    def _known_figures(self) -> "ProtocolOf":
        summed = _SUMMED.get(self.summary, (self.metric,))
        if self.metric not in summed:
            raise ValueError(f"summary {self.summary} is of metric {' or '.join(summed)}, not {self.metric}")
        figures = [*_FIGURES.get(self.summary, (self.called,)), *self.sums]
        figures += ["exact"] if self.summary == "error_rate" else []
        if self.headline not in figures:
            raise ValueError(f"headline is {self.headline!r}; there are {', '.join(figures)}")
        return self


def _own(metric: Metric, rule: str = "") -> ProtocolOf:
    return ProtocolOf(source="the question's own metric", metric=metric, rule=rule, headline="accuracy")


# metric of a question that says itself how it is scored
PER_QUESTION = {
    "exact": _own("exact", "ignore-case"),
    "contains": _own("contains"),
    "number": _own("relaxed", "pix2struct"),
    "anls": _own("anls", "vlmevalkit"),
    "choice": _own("choice", "letter-or-text"),
    "yes_no": _own("yes_no", "words"),
    "fields": _own("fields", "verbatim"),
    "vqa": _own("vqa", "m4c"),
}


class Reproduced(_Frozen):
    """Published answers that a protocol was run on, and the figures that came out."""

    answers: str
    protocol: str
    figures: dict[str, float]
    published: str


class Submission(_Frozen):
    """The file that a benchmark's server or grader takes, for questions that are not scored here.

    An entry's value is a text with names in braces, or one name alone, whose type it then has: {question_id}, {number}
    (the same as a number), {image}, {question}, {A} and further options, {answer} and {letter} (the option that the
    answer chooses).
    """

    source: str
    server: str
    file: Literal["list", "lines", "object", "table"]
    """JSON list of objects; JSON lines; JSON object, of entries `key` and `value`; or Excel table."""
    fields: dict[str, str] = Field(min_length=1)
    normalize: str | None = None
    """The VQA rule in whose normal form answers are sent."""
    rule: str = "letter-or-text"
    """How {letter} is found."""


class Task(_Frozen):
    """A benchmark, or a set of your own questions."""

    name: str
    """Also that of the folder of its answers, where several tasks are asked together."""
    title: str
    dataset: str | None = None
    """Its name on the Hub."""
    sources: list[str] = []
    labels: str | None = None
    """The revision whose labels are meant."""
    protocol: str = ""
    """The protocol of the headline where the answer file's layout does not choose one."""
    protocols: dict[str, ProtocolOf] = {}
    """None: a language model grades the answers; they are written for it as `submission` says."""
    layouts: list[Layout] = Field(min_length=1)
    units: Units | None = None
    unit: str = "%"
    """Unit of the headline, for reports."""
    only_with_image: bool = False
    """Questions without an image are left out."""
    listed_twice: list[str] = []
    """Ids of questions that the benchmark's own file has twice: each counts, and the last answer is that of both."""
    prompts: dict[str, str] = {}
    """Preset -> the words after the image."""
    capitalized: list[str] = []
    """Presets that make the question's first letter upper case and all others lower."""
    max_new_tokens: int = Field(default=64, gt=0)
    submission: Submission | None = None
    reproduced: list[Reproduced] = []
    not_reproduced: str | None = None

    data: str | None = None
    """The annotated questions, relative to the task's file."""
    folder: str | None = None
    """Where the file is; set when it is read."""

    @model_validator(mode="after")
    def _consistent(self) -> "Task":
        if not self.name.strip(" .") or set(self.name) & {"/", "\\"}:
            raise ValueError(
                f"name is {self.name!r}, which no folder can be called (fix: give it one without slashes)"
            )
        if not self.protocols and (self.submission is None or self.protocol):
            raise ValueError("no protocols (fix: give one, or a submission for those who grade the answers)")
        named = {*([self.protocol] if self.protocols else []), *(figure.protocol for figure in self.reproduced)}
        unknown = sorted(named - self.protocols.keys())
        if unknown:
            raise ValueError(f"no protocol is named {unknown[0]!r}; there are {', '.join(self.protocols)}")
        for name, protocol in self.protocols.items():
            units = _UNITS.get(protocol.summary, self.units)
            if self.units != units:
                raise ValueError(f"summary {protocol.summary} of {name} needs units: {units}")
        return self

    def hides_options(self, preset: str) -> bool:
        """Whether the model is not shown the options that the questions have."""
        has_options = any(layout.options not in (None, "inline") for layout in self.layouts)
        return has_options and "{options}" not in self.prompts[preset]

    @model_validator(mode="after")
    def _usable_prompts(self) -> "Task":
        """No word of a prompt is lost: what a name in braces does not mean would be shown to the model as it is."""
        strange = sorted({*self.prompts, *self.capitalized} - set(PRESET_NAMES))
        if strange:
            raise ValueError(f"no preset is named {strange[0]!r}; there are {', '.join(PRESET_NAMES)}")
        is_by_text = any(
            protocol.metric == "choice" and protocol.rule in choices.BY_TEXT for protocol in self.protocols.values()
        )
        for preset, prompt in self.prompts.items():
            named = _NAME_IN_BRACES.findall(prompt)
            unknown = [name for name in named if name not in PLACEHOLDERS]
            if unknown:
                fix = _nearest(unknown[0], [f"{{{name}}}" for name in PLACEHOLDERS])
                raise ValueError(f"the prompt of {preset} has {{{unknown[0]}}}, which stands for nothing (fix: {fix})")
            if "question" not in named:
                raise ValueError(f"the prompt of {preset} has no {{question}}")
            if self.hides_options(preset) and not is_by_text:
                fix = "add {options}, or say options: inline where the question's text lists them"
                raise ValueError(f"the prompt of {preset} does not show the options (fix: {fix})")
        return self


def task_names() -> list[str]:
    """Names of the shipped tasks."""
    files = (resources.files(_PACKAGE) / _FOLDER).iterdir()
    return sorted(file.name.removesuffix(_SUFFIX) for file in files if file.name.endswith(_SUFFIX))


def load_task(name: str | Path) -> Task:
    """A shipped task by its name, or a task of your own by its file.

    Raises:
        UserError: there is no such task, or the file is not a task.
    """
    shipped = task_names()
    if str(name) in shipped:
        content = (resources.files(_PACKAGE) / _FOLDER / f"{name}{_SUFFIX}").read_text(encoding="utf-8")
        return _task(content, str(name))
    path = Path(name)
    if path.suffix.lower() in TABLES:
        return table_task(path)
    if path.suffix not in (".yaml", ".yml"):
        near = difflib.get_close_matches(str(name).lower(), shipped, 1)
        what = f"no task is named {str(name)!r}; there are {', '.join(shipped)}"
        fix = f"name one of them, a .yaml file, or questions in {', '.join(TABLES)}"
        raise UserError(what, where="--task", fix=f"did you mean {near[0]}?" if near else fix)
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", where=str(path), fix="check the path") from error
    task, folder = _task(content, str(path)), path.resolve().parent
    data = None if task.data is None else str(folder / task.data)
    return task.model_copy(update={"folder": str(folder), "data": data})


def table_task(path: Path, *, with_images: bool = True) -> Task:
    """The task that a file of your own questions is: rows of image, question, answer and metric.

    Without images the rows have none, and a column of that name is refused.

    Optional columns: id; options A, B, ...; group. An answer is a text, a list of texts, a letter, yes or no, or a
    JSON object, as the row's metric compares it.

    Raises:
        UserError: the file cannot be read, or has no rows with these columns.
    """
    where, first = next(any_rows(path), ("", {}))
    if not where:
        raise UserError("has no row of a question", where=str(path), fix="give it at least one")
    if "image" in first and not with_images:
        fix = "remove the column, or ask these questions as the evaluation"
        raise UserError("text-only questions have no image", where=str(path), fix=fix)
    needed = ("image", "question", "answer", "metric")[not with_images :]
    lacking = [name for name in needed if name not in first]
    if lacking:
        there = ", ".join(name if name == name.strip() else repr(name) for name in map(str, first) if name)
        what = f"no {', '.join(lacking)}: the rows have {there or 'nothing'}"
        raise UserError(what, where=str(path), fix=f"give each row {', '.join(needed)} ({', '.join(PER_QUESTION)})")
    layout = Layout(
        name="rows",
        id="id" if "id" in first else None,
        image="image" if with_images else None,
        answer_is="texts",
        options="columns" if "A" in first else None,
        groups=["metric", *(["group"] if "group" in first else [])],
        metric="metric",
    )
    own = ProtocolOf(source=str(path), metric="per_question", called="score", headline="score")
    prompts = dict.fromkeys(("card", "llava", "lmms-eval"), "{question}{options}")
    return Task(
        name=path.stem, title=path.name, protocol="own", protocols={"own": own}, layouts=[layout], prompts=prompts,
        data=str(path.resolve()),
    )  # fmt: skip


def _task(content: str, where: str) -> Task:
    try:
        value: Any = parse_yaml(content)
    except yaml.YAMLError as error:
        raise UserError(f"not YAML: {' '.join(str(error).split())}", where=where, fix="repair it") from error
    if not isinstance(value, dict):
        raise UserError("not a mapping", where=where, fix="docs/evaluation.md says what a task has")
    try:
        return Task.model_validate(value)
    except ValidationError as error:
        raise _explained(error, where) from error


def _explained(error: ValidationError, where: str) -> UserError:
    """One fault of a task as one line; an unknown key first, as another one lacks because of it."""
    errors = error.errors(include_url=False)
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    key, fix = ".".join(map(str, first["loc"])), "docs/evaluation.md says what a task has"
    message, _, advice = first["msg"].removeprefix("Value error, ").partition(" (fix: ")
    if first["type"] == "extra_forbidden":
        part: type[BaseModel] = _PARTS[str(first["loc"][0])] if len(first["loc"]) > 1 else Task
        known = [name for name in part.model_fields if name != "folder"]
        message, fix = "no such key", _nearest(str(first["loc"][-1]), known)
    elif first["type"] == "missing":
        message, fix = "this key is missing", "add it"
    elif first["type"] != "value_error":
        message = f"{message}, not {first['input']!r:.60}"
        if first["type"] == "literal_error":
            fix = _nearest(str(first["input"]), re.findall(r"'([^']*)'", first["ctx"]["expected"]))
    return UserError(f"{key}: {message}" if key else message, where=where, fix=advice.removesuffix(")") or fix)


_PARTS: dict[str, type[BaseModel]] = {
    "protocols": ProtocolOf,
    "layouts": Layout,
    "reproduced": Reproduced,
    "submission": Submission,
}


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}"
