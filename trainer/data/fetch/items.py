"""What a recipe or a data set consists of: one item per file, with its size and licence, and whether it is here."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llava_llama31.trainer.checkpoint.atomic_folders import read_json
from llava_llama31.trainer.data.registry.registry import (
    Dataset,
    RemoteFile,
    dataset_at,
    dataset_named,
    weights,
    with_needs,
)
from llava_llama31.trainer.data.sources.dataset_rows import DatasetId
from llava_llama31.trainer.data.sources.remote_files import is_remote
from llava_llama31.trainer.model.locating import hub_id
from llava_llama31.trainer.recipes.schema import MODEL_PARTS, Recipe


RECORDS = ".fetched"  # folder of the data root: what was fetched into it
_ROUNDED = 0.05  # of a published size
# of recipes whose parts examples/prepare_smol.py takes from packages
_PACKAGES = ("smollm2-135m", "dinov2-s-focus", "easy-vqa")


@dataclass(frozen=True)
class Item:
    """One file to fetch.

    Args:
        name: `DATA SET/FILE` or `OWNER/NAME/FILE`.
        owner: registry name of its data set, or Hub id of its checkpoint.
        url: where it is published.
        bytes: None where nobody has said.
        license: as its publisher gives it.
        accept: why the licence has to be accepted; empty where it need not be.
        rows: that the file holds, where it is the data set's only file of rows.
        have: it is here.
        root: the data root, for files of data sets.
        file: as the registry has it; None for checkpoints.
        exact: `bytes` is not rounded.
    """

    name: str
    owner: str
    url: str
    bytes: int | None
    license: str
    have: bool
    accept: str = ""
    rows: int | None = None
    root: Path | None = None
    file: RemoteFile | None = None
    exact: bool = False

    def to_dict(self) -> dict:
        """The item ready for JSON."""
        return {
            "name": self.name,
            "url": self.url,
            "bytes": self.bytes,
            "exact": self.exact,
            "license": self.license,
            "accept": self.accept,
            "rows": self.rows,
            "have": self.have,
            "to": str(place(self)) if self.file is not None and self.root is not None else None,
        }


def items_of_dataset(name: str, root: Path, known: Mapping[str, Dataset]) -> list[Item]:
    """The files of a data set and of all that it needs, below `root`; archives before rows."""
    return [item for needed in with_needs(name, dict(known)) for item in _own_items(needed, root, known)]


def items_of_recipe(recipe: Recipe, root: Path | None, known: Mapping[str, Dataset]) -> tuple[list[Item], list[str]]:
    """The files of everything that a recipe names, and the paths that the registry does not know.

    Args:
        root: of the data; default: what the recipe's paths have before the data sets' own.
    """
    found: dict[tuple[str, str], Item] = {}
    unknown: list[str] = []
    for path, owner, license_name in _named_data(recipe):
        at = dataset_at(path, dict(known))
        if at is None and DatasetId.parse(path) is not None:
            items = [_hub_dataset(path, license_name)]
        elif at is None:
            is_there = is_remote(path) or Path(path).exists() or recipe.prepare is not None
            unknown += [] if is_there else [f"{owner}: {path}"]
            continue
        else:
            items = items_of_dataset(at[0], root or Path(at[1]), known)
        found |= {(item.name, str(item.root)): item for item in items}
    for name in _named_checkpoints(recipe):
        found |= {(item.name, ""): item for item in _weight_items(name)}
    if recipe.prepare == "smol":
        for name in _PACKAGES:
            found |= {(item.name, ""): item for item in _own_items(name, root or Path("data"), known)}
    return list(found.values()), list(dict.fromkeys(unknown))


def datasets_of_recipe(recipe: Recipe, root: Path | None, known: Mapping[str, Dataset]) -> list[tuple[str, Path]]:
    """(registry name, data root) of the data sets whose rows a recipe names, each once."""
    found = {}
    for path, _, _ in _named_data(recipe):
        at = dataset_at(path, dict(known))
        if at is not None:
            found[at[0]] = root or Path(at[1])
    return list(found.items())


def place(item: Item) -> Path:
    """Where a data set's file goes: itself, or the folder that it is unpacked into."""
    assert item.file is not None and item.root is not None
    folder = Path(os.path.normpath(item.root / item.file.to))
    return folder if item.file.unpack or "*" in item.file.name else folder / item.file.name


def record_of(item: Item) -> Path:
    """The file that says that an item is here as a whole; it is written last."""
    assert item.root is not None
    return item.root / RECORDS / f"{item.name.replace('/', '__')}.json"


def _named_data(recipe: Recipe) -> Iterator[tuple[str, str, str | None]]:
    """(path, its key in the recipe, licence that the recipe gives) of all data."""
    for name, stage in recipe.stages.items():
        for number, source in enumerate(stage.data):
            yield source.path, f"stages.{name}.data.{number}.path", source.license
    for number, spec in enumerate(recipe.evaluations):
        if spec.data is not None:
            yield spec.data, f"{recipe.where_evaluation(number)}.data", None


def _named_checkpoints(recipe: Recipe) -> list[str]:
    named = [getattr(recipe.model, part) for part in MODEL_PARTS]
    named += [stage.init_from for stage in recipe.stages.values()]
    return list(dict.fromkeys(name for name in named if name not in (None, "previous") and hub_id(name) is not None))


def _own_items(name: str, root: Path, known: Mapping[str, Dataset]) -> list[Item]:
    dataset = dataset_named(name, dict(known))
    files = sorted(dataset.files, key=lambda file: not file.unpack)  # rows are not there before their images
    row_files = [file for file in files if not file.unpack]
    items = []
    for file in files:
        item = Item(
            name=f"{name}/{file.name}",
            owner=name,
            url=file.url,
            bytes=file.bytes,
            license=dataset.license,
            have=False,
            accept=dataset.accept,
            rows=dataset.rows if [file] == row_files else None,
            root=root,
            file=file,
            exact=file.exact,
        )
        items.append(replace(item, have=is_here(item)))
    return items


def is_here(item: Item) -> bool:
    """Whether a data set's file, or what its archive held, is on this machine as a whole."""
    assert item.file is not None
    if item.url.startswith("pypi:"):
        package, _, wanted = item.url.removeprefix("pypi:").partition("==")
        try:
            return version(package) == wanted
        except PackageNotFoundError:
            return False
    record = _record(item)
    if "*" in item.file.name:
        return record is not None and _sizes_agree(place(item), record.get("files", {}))
    if not item.file.unpack:
        return _file_is_here(place(item), item.file, record)
    if record is not None:
        entries: Mapping[str, int] = record.get("entries", {})
        return bool(entries) and all(_num_files(place(item) / name) >= number for name, number in entries.items())
    if item.file.images is None:
        return False
    folders = [place(item) / name for name in item.file.makes] or [place(item)]
    return sum(map(_num_files, folders)) >= item.file.images


def _file_is_here(path: Path, file: RemoteFile, record: dict | None) -> bool:
    if not path.is_file():
        return False
    size = path.stat().st_size
    if record is not None:
        return size == record["bytes"]
    if file.bytes is None:
        return True
    return size == file.bytes if file.exact else abs(size - file.bytes) <= _ROUNDED * file.bytes


def _sizes_agree(folder: Path, files: Mapping[str, int]) -> bool:
    paths = [(folder / name, size) for name, size in files.items()]
    return bool(paths) and all(path.is_file() and path.stat().st_size == size for path, size in paths)


def _record(item: Item) -> dict | None:
    try:
        found = read_json(record_of(item))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("url") == item.url else None


def _num_files(folder: Path) -> int:
    """Files of a folder and its subfolders, without what is still being unpacked or fetched; 1 of a file."""
    if not folder.is_dir():
        return int(folder.is_file())
    total = 0
    for _, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        total += sum(not name.startswith(".") for name in files)
    return total


def _hub_dataset(path: str, license_name: str | None) -> Item:
    """A data set of the Hub that the registry does not have."""
    named = DatasetId.parse(path)
    assert named is not None
    name = license_name or f"not known: see https://huggingface.co/datasets/{named.name}"
    return Item(path, path, f"hf://datasets/{named.name}", None, name, have=False)


def _weight_items(name: str) -> Sequence[Item]:
    named = hub_id(name)
    assert named is not None
    repo, revision = named
    known = weights().get(repo)
    if known is None:
        license_name = f"not known: see https://huggingface.co/{repo}"
        return [
            Item(name, name, f"hf://{repo}", None, license_name, have=_in_hub_cache(repo, "config.json", revision))
        ]
    files = {file: (size, file) for file, size in known.files.items()}
    files["config, tokenizer and licence"] = (known.other_bytes, "config.json")
    return [
        Item(
            name=f"{repo}/{file}",
            owner=name,
            url=f"hf://{repo}/{looked_for}",
            bytes=size,
            license=known.license,
            have=_in_hub_cache(repo, looked_for, revision),
            accept=known.accept,
        )
        for file, (size, looked_for) in files.items()
    ]


def _in_hub_cache(repo: str, file: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, file, revision=revision), str)
