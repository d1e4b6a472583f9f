"""Which files a path of this machine is read from: every file that holds its rows, or a refusal that names one.

What `datasets` or a glob would silently skip is decided here: splits in file names, suffixes in capitals,
compressed and unfinished files, shards that are missing. Names are taken as they are and never as patterns.
"""

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from llava_llama31.trainer.errors import UserError


logger = logging.getLogger(__name__)

Kind = Literal["json", "tar", "parquet", "arrow"]

_KINDS: dict[str, Kind] = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".tar": "tar",
    ".parquet": "parquet",
    ".parq": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
}
_PACKED_TARS = (".tbz", ".tbz2", ".tgz", ".txz", ".tzst")
_COMPRESSED = (".7z", ".br", ".bz2", ".gz", ".lz4", ".xz", ".zip", ".zst", ".zstd")
# what programs append to a file that they have not written whole
_UNFINISHED = (".aria2", ".crdownload", ".download", ".incomplete", ".part", ".partial", ".tmp")
# what nobody takes for data that was not read: images, documents, code, settings, checksums
_NO_DATA = {
    "image": ".avif .bmp .gif .heic .heif .ico .jfif .jp2 .jpe .jpeg .jpg .jxl .pjpeg .png .psd .svg .tif .tiff .webp",
    "document": ".bib .cff .css .html .ipynb .js .log .md .pdf .py .rst .sh .tex .txt",
    "setting": ".cfg .ini .lock .toml .yaml .yml",
    "checksum": ".asc .crc .md5 .sha1 .sha256 .sha512 .sig",
}
_NO_DATA_SUFFIXES = frozenset(suffix for suffixes in _NO_DATA.values() for suffix in suffixes.split())

# the words that `datasets` takes for splits in the names of files and folders
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "dev": "validation",
    "val": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
_BETWEEN_WORDS = re.compile(r"[-._ 0-9]+|(?<=[a-z])(?=[A-Z])")
_NUMBER = re.compile(r"(?:^|[-_.])\d+(?=[-_.]|$)")
_SHARD_OF = re.compile(r"(?:^|[-_. (])(\d+)[-_ ]?of[-_ ]?(\d+)(?!\d)")
_SURROGATE = re.compile(r"[\ud800-\udfff]")  # what Python puts for a byte that is not UTF-8
_SPLIT = re.compile(r"\w+(\.\w+)*")


@dataclass(frozen=True)
class DataFiles:
    """The files of one kind that a path is read from, in the order of their names.

    Args:
        beside: the folder's files that are neither read nor images, documents and the like.
    """

    kind: Kind
    files: list[Path]
    beside: tuple[str, ...] = ()


# of save_to_disk
_SAVED_FACTS = frozenset({"state.json", "dataset_info.json", "dataset_dict.json"})


def data_files_at(path: Path) -> DataFiles | None:
    """All data files of a file's path or of a folder and its subfolders; None where there are none.

    Names that begin with `._` are macOS's metadata of other files and passed over.

    Raises:
        UserError: a file is compressed, unfinished, hidden or no regular file, or the folder holds files of two kinds.
    """
    if path.is_file():
        _refuse_packed(path)
        kind = _kind(path.name)
        return DataFiles(kind, [path]) if kind and kind != "arrow" else None
    if not path.is_dir():
        return None
    return _by_kind(path, _walk(path), _check_entry, str(path))


def listed_files(names: Sequence[str], where: str) -> DataFiles | None:
    """The same of a folder in a store, by the names of its files below it."""
    entries = (os.path.split(name) for name in names)
    return _by_kind(Path(), ((parent, name) for parent, name in entries), _check_visible, where)


def _by_kind(
    path: Path, entries: Iterable[tuple[str, str]], check: Callable[[Path], None], where: str
) -> DataFiles | None:
    found: dict[Kind, list[Path]] = {}
    beside: list[str] = []
    for parent, name in entries:
        kind = _kind(name)
        if kind is not None and kind != "json":
            check(file := Path(parent, name))
            found.setdefault(kind, []).append(file)
            continue
        inner = _inner(name)
        if _kind(inner) not in (None, "json"):
            _refuse_packed(Path(parent, name))
        suffix = _suffix(inner) or _suffix(name)
        hidden = name.startswith(".") and kind is None
        if suffix and not hidden and suffix not in _NO_DATA_SUFFIXES and name not in _SAVED_FACTS:
            beside.append(os.path.relpath(os.path.join(parent, name), path))
    if len(found) > 1:
        (first, files), (second, _) = sorted(found.items(), key=lambda item: item[0] != "tar")[:2]
        count = f"{len(files)} .tar shards" if first == "tar" else f"{len(files)} {first} files"
        what = f"the folder holds both {count} and {second} files"
        raise UserError(what, where=where, fix="name a folder with files of one kind")
    for kind, files in found.items():
        return DataFiles(kind, sorted(files), tuple(sorted(beside)))
    return None


def log_beside(path: Path | str, found: DataFiles) -> None:
    """Name the files of a folder that are not read, where there are any."""
    if found.beside:
        _warn_once(f"{path}: its {found.kind} files are read; not read: {_listed(found.beside)}")


@lru_cache(64)  # a folder is opened more than once
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def refuse_json(folder: Path) -> None:
    """Refuse a folder of JSON, which is read from files that are named.

    Raises:
        UserError: naming its files.
    """
    files = [os.path.join(parent, name) for parent, name in _walk(folder) if _kind(name) == "json"]
    if files:
        what = f"a folder of JSON is not read as a whole; it holds {_listed(sorted(files))}"
        raise UserError(what, where=str(folder), fix="name each file as a source of its own")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(map(ascii, names[:3]))}{more}"


def parquet_splits(path: Path, asked: str) -> dict[str, list[Path]]:
    """The parquet files of each split that `asked` names: `train`, or as in `datasets` `train[:10%]+test`, or `all`.

    A file belongs to the split that its name, or else the nearest folder's, holds as a word (`train`, `val`, ...).
    Files of which none names another split than `train` are all read.

    Raises:
        UserError: there is no such split, a file names none while another one does, or a shard is missing.
    """
    found = data_files_at(path)
    files = found.files if found is not None else []
    if path.is_file():
        return dict.fromkeys(split_names(asked, str(path)), files)
    return splits_of(path, files, asked, str(path))


def split_names(asked: str, where: str) -> list[str]:
    """The names in `train[:10%]+test`.

    Raises:
        UserError: it is none.
    """
    names = list(dict.fromkeys(re.sub(r"\[.*?\]", "", asked).split("+")))
    if not all(_SPLIT.fullmatch(name) for name in names):
        raise UserError(f"{asked!r} is not a split", where=where, fix="name one in `split`, such as train")
    return names


def splits_of(folder: Path, files: list[Path], asked: str, where: str) -> dict[str, list[Path]]:
    """The files of each split that `asked` names, among those below a folder; as `parquet_splits`."""
    chosen = {name: _of_split(folder, files, name, where) for name in split_names(asked, where)}
    for chosen_files in chosen.values():
        check_whole(chosen_files, where)
    return chosen


def one_split(files: Sequence[Path], folder: Path) -> None:
    """Check that the names of files differ in nothing but the number of the shard.

    Raises:
        UserError: they name several splits or several sets.
    """
    groups: dict[tuple[str, frozenset[str]], list[Path]] = {}
    for file in files:
        relative = file.relative_to(folder)
        groups.setdefault((_before_number(relative), _words(relative)), []).append(file)
    if len(groups) == 1:
        return
    names = ", ".join(sorted(prefix or members[0].name for (prefix, _), members in groups.items()))
    prefix, members = max((prefix, members) for (prefix, _), members in groups.items())
    pattern = f"{prefix}-*{members[0].suffix}"
    parents = {member.parent for member in members}
    matched = [file for file in files if file.parent in parents and matches(file.name, pattern)]
    fix = f"move the files of each into a separate folder and name one, or name one file, such as '{members[0]}'"
    if len(members) > 1 and len(parents) == 1 and sorted(matched) == sorted(members):
        fix = f"name those of one split: '{members[0].parent / pattern}'"
    raise UserError(f"parquet files of several splits ({names})", where=str(folder), fix=fix)


def matches(name: str, pattern: str) -> bool:
    """Whether a file's name is like a pattern, in which `*` matches anything and nothing else is special."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name, re.DOTALL) is not None


def check_whole(files: Sequence[Path], where: Path | str) -> None:
    """Check that shards whose names say `-00000-of-00003` are all there, and once.

    Raises:
        UserError: naming the first that is missing, or two that are one shard.
    """
    sets: dict[tuple[Path, str], dict[int, Path]] = {}
    totals: dict[tuple[Path, str], tuple[int, Path, int]] = {}
    for file in files:
        found = list(_SHARD_OF.finditer(file.stem))
        if not found:
            continue
        number, total = int(found[-1][1]), int(found[-1][2])
        key = (file.parent, file.stem[: found[-1].start()])
        first_total, first_file, _ = totals.setdefault(key, (total, file, len(found[-1][1])))
        if total != first_total or number in sets.setdefault(key, {}):
            other = sets[key].get(number, first_file)
            what = f"{file.name} and {other.name} are shards of two sets of one name"
            raise UserError(what, where=str(where), fix="remove the one that is out of date")
        sets[key][number] = file
    for key, shards in sets.items():
        total, file, width = totals[key]
        if len(shards) == total and (min(shards), max(shards)) in ((0, total - 1), (1, total)):
            continue
        start = 1 if total in shards and 0 not in shards else 0
        missing = next(number for number in range(start, start + len(shards) + 1) if number not in shards)
        name = f"{missing:0{width}}-of-{total:0{width}}"
        what = f"{len(shards)} of {total} shards are there, the one called {name} is missing beside {file.name}"
        raise UserError(what, where=str(where), fix="fetch the missing shards, or name each file separately")


def check_name_for_datasets(path: Path) -> None:
    """Check that `datasets` opens a path and no part of it.

    Raises:
        UserError: the path holds `::`, or is not UTF-8.
    """
    check_name_for_parquet(path)
    if "::" in str(path.absolute()):
        what = "`datasets` would take a part of the path for another file, since it holds `::`"
        raise UserError(what, where=str(path), fix="rename it")


def check_name_for_parquet(path: Path) -> None:
    """Check that pyarrow can open a path.

    Raises:
        UserError: the path is not UTF-8.
    """
    if _SURROGATE.search(str(path.absolute())):
        raise UserError("the path is not UTF-8, which pyarrow needs", where=str(path), fix="rename it")


def parquet_folder(folder: Path) -> list[Path]:
    """All parquet files of a folder.

    Raises:
        UserError: as `data_files_at`.
    """
    found = data_files_at(folder)
    if found is None or found.kind != "parquet":
        return []
    log_beside(folder, found)
    return found.files


def _suffix(name: str) -> str:
    # os.path.splitext finds none in `.tar` and `..tar`
    return f".{name.rpartition('.')[2].lower()}" if "." in name else ""


def _kind(name: str) -> Kind | None:
    return None if name.startswith("._") else _KINDS.get(_suffix(name))


def _inner(name: str) -> str:
    """The name of what is compressed or unfinished; empty where nothing is."""
    suffix = _suffix(name)
    if name.startswith("._"):
        return ""
    if suffix in _PACKED_TARS:
        return f"{name}.tar"
    return name[: -len(suffix)] if suffix in (*_COMPRESSED, *_UNFINISHED) else ""


def _refuse_packed(file: Path) -> None:
    if _kind(_inner(file.name)) is None:
        return
    if _suffix(file.name) in _UNFINISHED:
        raise UserError("the file is not complete", where=str(file), fix="fetch it again, or remove it")
    raise UserError("the file is compressed", where=str(file), fix="unpack it")


def _check_visible(file: Path) -> None:
    if file.name.startswith("."):
        what = "a hidden file that looks like data"
        raise UserError(what, where=str(file), fix="rename it to have it read, or remove it")


def _check_entry(file: Path) -> None:
    _check_visible(file)
    if not file.is_file():
        what = "points to no file" if file.is_symlink() else "is not a file"
        raise UserError(what, where=str(file), fix="fetch the data again, or remove it")


def _walk(folder: Path) -> Iterator[tuple[str, str]]:
    """(folder, name) of all entries that are not folders, through links to folders too, each folder once."""
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_refuse_folder):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()  # so that of two links to one folder the same one is followed on every machine
        yield from ((parent, name) for name in files)


def _refuse_folder(error: OSError) -> None:
    raise UserError(
        f"the folder can't be read: {error.strerror}", where=str(error.filename), fix="check its permissions"
    ) from error


def _of_split(folder: Path, files: list[Path], asked: str, where: str) -> list[Path]:
    if asked == "all":
        return files
    wanted = _SPLIT_WORDS.get(asked.lower(), asked)
    named = {file: _splits(file.relative_to(folder), asked) for file in files}
    if wanted == "train" and not any(splits - {wanted} for splits in named.values()):
        return files
    clear = next((file for file, splits in named.items() if len(splits) == 1), None)
    unclear = next((file for file, splits in named.items() if len(splits) != 1), None)
    if clear is not None and unclear is not None:
        splits = " and ".join(sorted(named[unclear])) or "no split"
        what = f"{unclear.relative_to(folder)} names {splits}"
        what += f", but {clear.relative_to(folder)} names {min(named[clear])}"
        fix = "give the files of each split a separate folder, or name each file separately"
        raise UserError(what, where=where, fix=fix)
    chosen = [file for file, splits in named.items() if splits == {wanted}]
    if not chosen:
        there = ", ".join(sorted({split for splits in named.values() for split in splits})) or "no other"
        what = f"there is no split {asked!r}: the files' names say {there}"
        raise UserError(what, where=where, fix="name one that is there in `split`")
    return chosen


def _splits(relative: Path, asked: str) -> frozenset[str]:
    prefix = _before_number(relative)
    if asked in (prefix, relative.parent.name):
        return frozenset({_SPLIT_WORDS.get(asked.lower(), asked)})
    if relative.parent.name == "data" and _SHARD_OF.search(relative.stem):
        # the Hub's own layout, data/SPLIT-00000-of-00001.parquet: any name is a split
        return frozenset({_SPLIT_WORDS.get(prefix.lower(), prefix)})
    words = _words(relative)
    # of a split that is none of the usual words, every other name is another split
    return words if words or asked.lower() in _SPLIT_WORDS else frozenset({prefix or relative.stem})


def _words(relative: Path) -> frozenset[str]:
    """The splits that the file's name, or else the nearest folder's, holds as words."""
    for part in (relative.stem, *(parent.name for parent in relative.parents)):
        found = frozenset(
            _SPLIT_WORDS[word] for word in map(str.lower, _BETWEEN_WORDS.split(part)) if word in _SPLIT_WORDS
        )
        if found:
            return found
    return frozenset()


def _before_number(relative: Path) -> str:
    """What comes before the number of the shard in a file's name."""
    match = _NUMBER.search(relative.stem)
    return relative.stem[: match.start()] if match else relative.stem
