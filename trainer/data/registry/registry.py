"""The registry of published data sets and weights: its schema, and what a name or a recipe's path stands for in it."""

import difflib
import importlib.resources
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.strict_yaml import parse_yaml


NOT_VERIFIED = "not verified here"

Fact = Literal["where", "rows", "images", "bytes", "license", "holes", "evaluation_images"]
Text = Annotated[str, Field(min_length=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RemoteFile(_Frozen):
    """A file of a data set.

    Args:
        url: `https://...`; `hf://datasets/OWNER/NAME/PATH` and `hf://OWNER/NAME/PATH` of the Hub, where `*` names all
            files that match; `pypi:NAME==VERSION` for a package that pip installs.
        to: folder below the data root that it is put or unpacked into.
        bytes: of the file as it is published.
        exact: `bytes` is the size to the byte; otherwise it is rounded.
        unpack: it is an archive.
        images: files that the archive holds.
        makes: folders of `to` that the archive becomes; empty: many, or not known.
        sha256: of the whole file.
    """

    url: Text
    to: str = "."
    bytes: PositiveInt | None = None
    exact: bool = False
    unpack: bool = False
    images: PositiveInt | None = None
    makes: list[Text] = []
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    @property
    def name(self) -> str:
        """Its own name, the last part of the URL."""
        return self.url.rpartition("/")[2].removeprefix("pypi:")

    def in_subset(self, subset: str, size: int | None) -> "RemoteFile":
        named = {"url": self.url.replace("{subset}", subset), "to": self.to.replace("{subset}", subset)}
        return self.model_copy(update=named | {"bytes": size})


class Hole(_Frozen):
    """Images that are known to be missing: how many (None: not known), in which folder, and why."""

    reason: Text
    folder: str = ""
    images: PositiveInt | None = None
    names: list[Text] = []


class EvaluationImages(_Frozen):
    """Images of an evaluation's split that a data set holds; `evaluation` as the benchmarks call it."""

    evaluation: Text
    split: str = ""
    images: PositiveInt | None = None
    folder: str = ""
    note: Text


class Dataset(_Frozen):
    """A published set of rows, images or questions.

    Args:
        path: its rows below the data root; empty for images alone.
        image_root: below the data root, what the rows' image paths are relative to; default: the folder of `path`.
        rows_of: rows by the first folder of their image.
        needs: data sets that hold the images which its rows name.
        accept: why its licence has to be accepted by name before anything is fetched.
        readable: why its rows can't be trained on as they are.
        subsets: `{subset}` in paths is chosen by `NAME:SUBSET`.
        subset_rows: rows of the subsets whose number is known.
        subset_bytes: of all files of a subset together, where they are known.
        evaluation: it is the questions of this evaluation.
        columns: numbers that `where` of a recipe's source can filter by.
        evidence: where each fact is from; `not verified here` marks those that could not be looked up.
    """

    title: Text
    page: Text
    license: Text
    accept: str = ""
    hub_id: str | None = None
    path: str = ""
    image_root: str | None = None
    format: str = ""
    readable: str = ""
    subsets: bool = False
    subset_rows: dict[Text, PositiveInt] = {}
    subset_bytes: dict[Text, PositiveInt] = {}
    evaluation: str = ""
    rows: PositiveInt | None = None
    rows_of: dict[str, PositiveInt] = {}
    images: PositiveInt | None = None
    bytes: PositiveInt | None = None
    columns: list[Text] = []
    files: list[RemoteFile] = Field(min_length=1)
    needs: list[Text] = []
    known_holes: list[Hole] = []
    evaluation_images: list[EvaluationImages] = []
    evidence: dict[Fact, Text]

    @model_validator(mode="after")
    def _whole(self) -> "Dataset":
        missing = [fact for fact in get_args(Fact) if fact not in self.evidence]
        if missing:
            raise ValueError(f"evidence lacks {', '.join(missing)}")
        if self.rows_of and sum(self.rows_of.values()) != self.rows:
            raise ValueError(f"rows_of adds up to {sum(self.rows_of.values())}, not to rows {self.rows}")
        if self.subset_bytes and len(self.files) != 1:
            raise ValueError("subset_bytes is the size of one file or pattern, and there are several")
        unsafe = [file.to for file in self.files if ".." in PurePosixPath(file.to).parts or file.to.startswith("/")]
        if unsafe:
            raise ValueError(f"{unsafe[0]} is not below the data root")
        return self


class Weights(_Frozen):
    """A published checkpoint: bytes of its weight files, of all other files together, and its licence."""

    license: Text
    accept: str = ""
    files: dict[str, PositiveInt]
    other_bytes: PositiveInt
    evidence: Text


Entry = TypeVar("Entry", bound=BaseModel)


@cache
def shipped_datasets() -> dict[str, Dataset]:
    """The data sets of the package, by name."""
    found = _read("datasets.yaml", Dataset)
    _check_needs(found, "datasets.yaml")
    return found


def with_own(file: Path | None) -> dict[str, Dataset]:
    """The data sets of the package, and those of a user's file of the same form, which come first.

    Raises:
        UserError: the file can't be read, or an entry is not of the registry's form.
    """
    if file is None:
        return shipped_datasets()
    try:
        content = parse_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        what = f"cannot be read: {' '.join(str(error).split())}"
        raise UserError(what, where=str(file), fix="give a UTF-8 YAML file") from None
    found = _entries(content, Dataset, str(file)) | {
        name: dataset for name, dataset in shipped_datasets().items() if name not in (content or {})
    }
    _check_needs(found, str(file))
    return found


def _check_needs(found: dict[str, Dataset], where: str) -> None:
    for name, dataset in found.items():
        unknown = [needed for needed in dataset.needs if needed not in found]
        if unknown:
            raise UserError(f"{name} needs {unknown[0]}, which is not listed", where=where, fix="list it")


@cache
def weights() -> dict[str, Weights]:
    """All checkpoints by Hub id."""
    return _read("weights.yaml", Weights)


def _read(file: str, kind: type[Entry]) -> dict[str, Entry]:
    text = (importlib.resources.files("llava_llama31.trainer.data.registry") / file).read_text(encoding="utf-8")
    return _entries(yaml.safe_load(text), kind, file)


def _entries(content: object, kind: type[Entry], where: str) -> dict[str, Entry]:
    """Entries by name.

    Raises:
        UserError: naming the entry and its first fault.
    """
    if not isinstance(content, dict):
        raise UserError("is not a mapping of names to data sets", where=where, fix="see docs/fetch.md")
    found = {}
    for name, fields in content.items():
        try:
            found[str(name)] = kind.model_validate(fields)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            fix = "docs/fetch.md lists the keys"
            raise UserError(first["msg"], where=f"{where}: {name}{f': {key}' if key else ''}", fix=fix) from None
    return found


def dataset_named(name: str, known: dict[str, Dataset]) -> Dataset:
    """The data set of a name such as `llava-pretrain` or `finevision:chartqa`.

    Raises:
        UserError: there is none of that name, or the subset is missing or one too many.
    """
    base, _, subset = name.partition(":")
    if base not in known:
        near = difflib.get_close_matches(base, known, n=1)
        fix = f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}"
        raise UserError("the registry has no such data set", where=name, fix=fix)
    dataset = known[base]
    if dataset.subsets and not subset:
        raise UserError("is fetched by subset", where=name, fix=f"name one, as its page lists them: {base}:SUBSET")
    if subset and not dataset.subsets:
        raise UserError("has no subsets", where=name, fix=f"name {base} without a subset")
    if subset:
        update: dict[str, Any] = {"path": dataset.path.replace("{subset}", subset)}
        size = dataset.subset_bytes.get(subset)
        update |= {"files": [file.in_subset(subset, size) for file in dataset.files]}
        update |= {"images": None, "bytes": size}  # not those of all subsets together
        update["rows"] = dataset.subset_rows.get(subset)
        dataset = dataset.model_copy(update=update)
    return dataset


def dataset_at(path: str, known: dict[str, Dataset]) -> tuple[str, str] | None:
    """(name, data root) of the data set whose rows a recipe's path names, such as `data/LLaVA-Pretrain/...json`."""
    parts = PurePosixPath(path).parts
    for name, dataset in known.items():
        own = PurePosixPath(dataset.path).parts
        if not own or len(parts) < len(own):
            continue
        tail, root = parts[-len(own) :], parts[: -len(own)]
        if tail == own:
            return name, str(PurePosixPath(*root))
        if own[-1] == "{subset}" and tail[:-1] == own[:-1]:
            return f"{name}:{tail[-1]}", str(PurePosixPath(*root))
    return None


def with_needs(name: str, known: dict[str, Dataset]) -> Iterator[str]:
    """The names of a data set and of all that it needs, the images first and each once."""
    seen: set[str] = set()

    def visit(current: str) -> Iterator[str]:
        if current in seen:
            return
        seen.add(current)
        for needed in dataset_named(current, known).needs:
            yield from visit(needed)
        yield current

    yield from visit(name)
