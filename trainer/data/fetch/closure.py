"""Whether every image that a data set's rows name is there; what is not is listed with its reason."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from llava_llama31.trainer.data.check.cache import write_atomically
from llava_llama31.trainer.data.check.row_checker import Limits, RowChecker, check_rows
from llava_llama31.trainer.data.registry.registry import NOT_VERIFIED, Dataset, Hole
from llava_llama31.trainer.data.sources.records import open_records
from llava_llama31.trainer.recipes.schema import DataSource


# reasons that are about the image as a file; others are about the record, which `check-data` looks at
_OF_IMAGES = ("missing_image", "corrupt_image", "unreadable_image", "image_not_a_file", "image_symlink_escape")


@dataclass(frozen=True)
class Closure:
    """What the rows of one data set name.

    Args:
        rows: of the data set.
        expected: rows of the published file; None where the registry does not say, or nobody has counted them.
        missing: rows whose image can't be read, by reason.
        explained: of them, those in a folder of which the registry knows a hole.
        first: the first of the others, as `image: detail`.
        listed: JSON lines with row, id, image, reason and detail of all of them.
    """

    name: str
    rows: int
    expected: int | None
    missing: dict[str, int]
    explained: int
    first: tuple[str, ...]
    listed: Path

    @property
    def unexplained(self) -> int:
        return sum(self.missing.values()) - self.explained

    def to_dict(self) -> dict:
        """The finding ready for JSON."""
        return {
            "name": self.name,
            "rows": self.rows,
            "expected_rows": self.expected,
            "missing": self.missing,
            "known_holes": self.explained,
            "unexplained": self.unexplained,
            "listed": str(self.listed),
        }


def closure_of(name: str, dataset: Dataset, root: Path, listed: Path) -> Closure:
    """Look at every image that the rows of a fetched data set name, by its header.

    Args:
        root: the data root.
        listed: file of JSON lines to write.

    Raises:
        UserError: the rows can't be read.
    """
    image_root = root / dataset.image_root if dataset.image_root is not None else None
    source = DataSource(name=name, path=str(root / dataset.path), image_root=str(image_root) if image_root else None)
    store = open_records(source)
    missing: Counter[str] = Counter()
    explained = 0
    first: list[str] = []
    lines: list[str] = []
    for found in check_rows(RowChecker(store, None, Limits(), "header")):
        for reject in found.rejects:
            if reject["reason"] not in _OF_IMAGES:
                continue
            hole = _hole(dataset, str(reject["image"]))
            missing[reject["reason"]] += 1
            explained += hole is not None
            if hole is None and len(first) < 3:
                first.append(f"{reject['image']}: {reject['detail']}")
            lines.append(json.dumps(reject | {"known": hole.reason if hole is not None else None}) + "\n")
    write_atomically(listed, lines)
    expected = None if NOT_VERIFIED in dataset.evidence["rows"] else dataset.rows
    return Closure(name, len(store), expected, dict(missing), explained, tuple(first), listed)


def _hole(dataset: Dataset, image: str) -> Hole | None:
    """The known hole that an image falls into."""
    path = PurePosixPath(image)
    for hole in dataset.known_holes:
        is_in_folder = not hole.folder or PurePosixPath(hole.folder) in path.parents
        if is_in_folder and (not hole.names or path.name in hole.names):
            return hole
    return None
