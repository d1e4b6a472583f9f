"""Rows of a Hugging Face dataset: parquet, a folder of `save_to_disk`, or a dataset on the Hub."""

import base64
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.errors import UserError


_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:@([\w./-]+))?")


class DatasetId(NamedTuple):
    """A data set on the Hub: `OWNER/NAME`, `OWNER/NAME:CONFIG`, either with `@REVISION`."""

    name: str
    config: str | None
    revision: str | None

    @classmethod
    def parse(cls, path: str) -> "DatasetId | None":
        """What a source's path names on the Hub; None for a path of this machine."""
        match = None if Path(path).exists() else _HUB_ID.fullmatch(path)
        return cls(*match.groups()) if match else None

    def at(self, revision: str) -> str:
        return f"{self.name}{f':{self.config}' if self.config else ''}@{revision}"


class DatasetRows:
    """Rows of a Hugging Face dataset as Python values, images as `{"bytes", "path"}`, still encoded."""

    def __init__(self, path: str, split: str):
        self.dataset = _load_dataset(path, split).with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> object:
        from pyarrow import ArrowException

        try:
            return self.dataset[row].to_pylist()[0]
        except UnicodeDecodeError as error:
            raise RecordError("invalid_text", f"{error.reason} at byte {error.start} of a text") from None
        except (ArrowException, OverflowError, ValueError) as error:  # a date that no calendar has
            raise RecordError("malformed_record", f"a value that can't be read: {error}") from None

    def text(self, row: int) -> str:
        return json.dumps(self[row], default=_encoded)


def _load_dataset(path: str, split: str) -> Any:
    import datasets

    folder = Path(path)
    try:
        if folder.is_file() and folder.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files={split: path}, split=split)
        if (folder / "dataset_dict.json").is_file():
            return _saved_dataset(_saved_split(folder, split))
        if (folder / "state.json").is_file():
            return _saved_dataset(folder)
        if folder.is_dir() and next(folder.rglob("*.parquet"), None):
            # by its builder's name: opened as a folder, its README may name files elsewhere, and URLs
            return datasets.load_dataset("parquet", data_dir=path, split=split)
        if (on_hub := DatasetId.parse(path)) is not None:
            return datasets.load_dataset(on_hub.name, on_hub.config, split=split, revision=on_hub.revision)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(str(error).strip().split("\n")[0], where=path, fix="check `path` and `split`") from error
    what = "holds no data that can be read" if folder.exists() else "does not exist"
    kinds = "a .json, .jsonl, .tar or .parquet file, a folder of the last two or of save_to_disk, or OWNER/NAME"
    raise UserError(f"the path {what}", where=path, fix=f"name {kinds}")


def _saved_split(folder: Path, split: str) -> Path:
    """Folder of one split of a data set that `save_to_disk` wrote."""
    splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    if split not in splits:
        raise UserError(f"there is no split {split!r}", where=str(folder), fix="name one that is there in `split`")
    return _inside(folder, split)


def _saved_dataset(folder: Path) -> Any:
    import datasets

    for file in json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]:
        _inside(folder, file["filename"])
    return datasets.load_from_disk(str(folder))


def _inside(folder: Path, name: str) -> Path:
    """A file of a saved data set, which its own description may not take from elsewhere."""
    if Path(name).name != name:
        raise ValueError(f"{name[:80]!r} is no name of a file in the folder")
    return folder / name


def _encoded(value: object) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
