"""Looks for an evaluation's images and questions in checked rows, and applies a stage's policy about them.

A training image is `exact` where its encoded bytes are an evaluation image's, `near` where its perceptual hash differs
in at most `near_bits` bits from that of an evaluation image, as it is or mirrored.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from llava_llama31.trainer.data.check.cache import (
    CheckCache,
    WatchedFiles,
    file_signature,
    fingerprint,
    write_atomically,
)
from llava_llama31.trainer.data.check.check import Adjust, default_cache_dir
from llava_llama31.trainer.data.check.report import SourceReport
from llava_llama31.trainer.data.check.row_checker import num_cores
from llava_llama31.trainer.data.contamination import fingerprints
from llava_llama31.trainer.data.contamination.fingerprints import (
    NUM_BITS,
    EvaluationImage,
    hash_version,
    nearest,
    question_key,
)
from llava_llama31.trainer.data.sources.records import RecordStore, data_files, open_records, what_is_read
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.questions import Question, load_questions
from llava_llama31.trainer.evaluation.row_files import question_files
from llava_llama31.trainer.worker_pools import spawned_pool


if TYPE_CHECKING:
    from llava_llama31.trainer.recipes.schema import DataSource, Stage


__all__ = ["NEAR_BITS", "Contamination", "Evaluation", "contamination_check", "find_in_sources", "load_evaluation"]

logger = logging.getLogger(__name__)

# docs/data.md has the recall and the false alarms at this limit
NEAR_BITS = 40
_CHUNK_ROWS = 64
_ROWS_PER_WORKER = 1000


@dataclass(frozen=True)
class Evaluation:
    """What is looked for: the images of a file of questions, and the questions by their words."""

    name: str
    images: list[EvaluationImage]
    questions: dict[bytes, str]
    unreadable: int = 0

    def counted(self, near_bits: int, matches: "list[Match]") -> "Contamination":
        return Contamination(self.name, near_bits, matches, len(self.images), self.unreadable)


@dataclass(frozen=True)
class Match:
    """A row of the training data that holds something of an evaluation.

    Args:
        kind: exact, near or question.
        of: the evaluation's image_id or question_id.
        bits: different bits of a near duplicate's hash.
        mirrored: it is the mirror image.
    """

    source: str
    row: int
    id: str
    kind: str
    of: str
    image: str | None = None
    bits: int = 0
    mirrored: bool = False


@dataclass
class Contamination:
    """What was found: rows by kind; a row with an exact image is not counted as near too."""

    evaluation: str
    near_bits: int
    matches: list[Match] = field(default_factory=list)
    num_images: int = 0
    unreadable: int = 0

    def rows(self, kind: str) -> set[tuple[str, int]]:
        return {(match.source, match.row) for match in self.matches if match.kind == kind}

    def to_dict(self) -> dict[str, Any]:
        """Rows by kind, ready for JSON."""
        exact = self.rows("exact")
        return {
            "exact": len(exact),
            "near": len(self.rows("near") - exact),
            "questions": len(self.rows("question")),
            "evaluation": self.evaluation,
            "evaluation_images": self.num_images,
            "unreadable": self.unreadable,
            "near_bits": self.near_bits,
        }

    def write(self, path: Path) -> None:
        """List all matches as JSON lines."""
        write_atomically(path, (json.dumps(vars(match)) + "\n" for match in self.matches))


def load_evaluation(
    data: str | Path, image_root: str | Path | None = None, *, cache_dir: Path | None = None
) -> Evaluation:
    """The images and questions of a file that `evaluate` reads; images that can't be read are counted and logged.

    Raises:
        UserError: the file can't be read, or none of its images.
    """
    cache = CheckCache(cache_dir or default_cache_dir())
    files = [file_signature(file) for file in question_files(Path(data))]
    key = fingerprint(files, None, {"evaluation": [NUM_BITS, hash_version(), str(image_root)]})
    if (entry := cache.load(key)) is not None:
        return _stored(str(data), entry[0], entry[1])
    asked = load_questions(data, image_root=image_root)
    known: dict[str, EvaluationImage | None] = {}
    watched = WatchedFiles()
    for question in asked:
        if question.image is not None and question.image_id not in known:
            known[question.image_id] = _image_of(question)
            if question.image.path is not None:
                watched.add(question.image.path, question.image.stat())
    images = [image for image in known.values() if image is not None]
    if not images:
        what = f"none of its {len(known)} images can be read"
        raise UserError(what, where=str(data), fix="name their folder with --against-images, or `image_root`")
    questions: dict[bytes, str] = {}
    for question in asked:
        words = question_key(question.question)
        if words is not None:
            questions.setdefault(words, str(question.question_id))
    found = Evaluation(str(data), images, questions, len(known) - len(images))
    summary = {"ids": [image.image_id for image in images], "unreadable": found.unreadable}
    summary["questions"] = {words.hex(): question for words, question in questions.items()}
    arrays = {
        "digests": np.array([np.frombuffer(image.digest, np.uint8) for image in images]),
        "bits": np.array([image.bits for image in images]),
        "mirrored": np.array([image.mirrored for image in images]),
    }
    _store(cache, key, summary, arrays | watched.to_arrays())
    return found


def _stored(name: str, summary: dict, arrays: dict[str, np.ndarray]) -> Evaluation:
    """An evaluation from the cache."""
    columns = (summary["ids"], arrays["digests"], arrays["bits"], arrays["mirrored"])
    images = [
        EvaluationImage(image_id, digest.tobytes(), bits, mirrored)
        for image_id, digest, bits, mirrored in zip(*columns, strict=True)
    ]
    questions = {bytes.fromhex(words): question for words, question in summary["questions"].items()}
    return Evaluation(name, images, questions, summary["unreadable"])


def _store(cache: CheckCache, key: str, summary: dict, arrays: dict[str, np.ndarray]) -> None:
    spool = cache.folder / f".fingerprints.{uuid4().hex[:8]}"  # an entry has a file of rejects, here an empty one
    spool.touch()
    cache.store(key, summary, arrays, spool)


def _image_of(question: Question) -> EvaluationImage | None:
    assert question.image is not None
    try:
        return fingerprints.evaluation_image(question.image_id, question.image)
    except RecordError as error:
        logger.warning("image %s of the evaluation can't be read: %s", question.image_id, error)
        return None


@dataclass
class RowFingerprints:
    """Fingerprints of the rows of one source, as parallel arrays.

    Args:
        image_rows, digests, bits: int64 (N,), uint8 (N, 16) and bool (N, NUM_BITS) of each image of each row.
        question_rows, questions: int64 (M,) and uint64 (M,) of each user turn.
    """

    image_rows: np.ndarray
    digests: np.ndarray
    bits: np.ndarray
    question_rows: np.ndarray
    questions: np.ndarray


def fingerprints_of(source: "DataSource", rows: np.ndarray, cache: CheckCache) -> RowFingerprints:
    """Fingerprints of a source's usable rows, from the cache if data and images have not changed."""
    files = [file_signature(file) for file in data_files(source)]
    settings = {"contamination": [NUM_BITS, hash_version()], "source": what_is_read(source)}
    key = fingerprint(files, None, settings | {"rows": hashlib.sha256(rows.tobytes()).hexdigest()})
    if (entry := cache.load(key)) is not None:
        arrays = entry[1]
    else:
        arrays = _fingerprint(open_records(source), rows)
        _store(cache, key, {}, arrays)
    bits = np.unpackbits(arrays["bits"], axis=1).astype(bool)
    return RowFingerprints(arrays["image_rows"], arrays["digests"], bits, arrays["question_rows"], arrays["questions"])


def _fingerprint(store: RecordStore, rows: np.ndarray) -> dict[str, np.ndarray]:
    chunks = [rows[start : start + _CHUNK_ROWS].tolist() for start in range(0, len(rows), _CHUNK_ROWS)]
    watched = WatchedFiles()
    image_rows: list[int] = []
    question_rows: list[int] = []
    bits: list[np.ndarray] = []
    digests, questions = bytearray(), bytearray()
    for found in _chunks_of(store, chunks):
        for row, image in found.images:
            image_rows.append(row)
            digests += image.digest
            bits.append(np.packbits(image.bits))
        for row, key in found.questions:
            question_rows.append(row)
            questions += key
        for path, signature in found.files.items():
            watched.add(path, signature)
    arrays: dict[str, np.ndarray] = {
        "image_rows": np.array(image_rows, np.int64),
        "digests": np.frombuffer(digests, np.uint8).reshape(-1, 16),
        "bits": np.array(bits, np.uint8).reshape(-1, NUM_BITS // 8),
        "question_rows": np.array(question_rows, np.int64),
        "questions": np.frombuffer(questions, np.uint64),
    }
    return arrays | watched.to_arrays()


@dataclass
class _Chunk:
    images: list[tuple[int, fingerprints.Fingerprint]] = field(default_factory=list)
    questions: list[tuple[int, bytes]] = field(default_factory=list)
    files: dict[str, tuple[int, int]] = field(default_factory=dict)


def _chunks_of(store: RecordStore, chunks: list[list[int]]) -> Iterator[_Chunk]:
    num_workers = min(num_cores(), sum(map(len, chunks)) // _ROWS_PER_WORKER)
    if num_workers < 2:
        yield from (_chunk(store, chunk) for chunk in chunks)
        return
    with spawned_pool(num_workers, _start_worker, store) as pool:
        yield from pool.map(_chunk_in_worker, chunks)


def _chunk(store: RecordStore, rows: list[int]) -> _Chunk:
    found = _Chunk()
    known: dict[str, fingerprints.Fingerprint] = {}
    for row in rows:
        record = store[row]
        for image in record.images:
            name = image.key()
            if name not in known:
                known[name] = fingerprints.fingerprint(image)
                if image.path is not None and not image.is_remote:
                    found.files[image.path] = image.stat()
            found.images.append((row, known[name]))
        for message in record.messages:
            if message["role"] == "user":
                key = question_key(" ".join(part.get("text", "") for part in message["content"]))
                if key is not None:
                    found.questions.append((row, key))
    return found


_worker_store: RecordStore | None = None


def _start_worker(store: RecordStore) -> None:
    global _worker_store
    _worker_store = store


def _chunk_in_worker(rows: list[int]) -> _Chunk:
    assert _worker_store is not None
    return _chunk(_worker_store, rows)


def find_in_source(
    source: "DataSource", rows: np.ndarray, evaluation: Evaluation, near_bits: int, cache: CheckCache
) -> list[Match]:
    """The rows of a source that hold something of an evaluation, in the order of their numbers.

    Args:
        rows: int64 (N,), the usable ones.
        near_bits: of NUM_BITS, in which hashes of near duplicates may differ.
    """
    known = fingerprints_of(source, rows, cache)
    store = open_records(source)
    matches = [*_images_found(source.name, store, known, evaluation, near_bits)]
    keys = np.array([int.from_bytes(key, "little") for key in evaluation.questions], np.uint64)
    ids = dict(zip(keys.tolist(), evaluation.questions.values(), strict=True))
    for position in np.flatnonzero(np.isin(known.questions, keys)):
        row = int(known.question_rows[position])
        matches.append(Match(source.name, row, store.row_id(row), "question", ids[int(known.questions[position])]))
    return sorted(set(matches), key=lambda match: (match.row, match.kind, match.of))


def _images_found(
    name: str, store: RecordStore, known: RowFingerprints, evaluation: Evaluation, near_bits: int
) -> Iterator[Match]:
    if not len(known.bits):
        return
    images = evaluation.images
    by_digest = {image.digest: image.image_id for image in images}
    others = np.array([image.bits for image in images] + [image.mirrored for image in images])
    position, distance = nearest(known.bits, others)
    seen: Counter[int] = Counter()
    for number, row in enumerate(known.image_rows.tolist()):
        own = seen[row]  # which of the row's images it is
        seen[row] += 1
        exact = by_digest.get(known.digests[number].tobytes())
        if exact is None and distance[number] > near_bits:
            continue
        image = store[row].images[own].name
        if exact is not None:
            yield Match(name, row, store.row_id(row), "exact", exact, image)
            continue
        at = int(position[number])
        of, is_mirrored = images[at % len(images)].image_id, at >= len(images)
        yield Match(name, row, store.row_id(row), "near", of, image, int(distance[number]), is_mirrored)


def find_in_sources(
    sources: Sequence["DataSource"],
    rows: Mapping[str, np.ndarray],
    evaluation: Evaluation,
    *,
    near_bits: int = NEAR_BITS,
    cache_dir: Path | None = None,
) -> Contamination:
    """What the sources hold of an evaluation.

    Args:
        rows: int64 (N,), the usable rows of each source, by its name.
        near_bits: of NUM_BITS, in which hashes of near duplicates may differ.
    """
    cache = CheckCache(cache_dir or default_cache_dir())
    found = evaluation.counted(near_bits, [])
    for source in sources:
        found.matches += find_in_source(source, rows[source.name], evaluation, near_bits, cache)
    return found


def contamination_check(stage: "Stage") -> Adjust | None:
    """What a stage's `contamination` makes of the report of a source; None where the stage has none.

    Raises:
        UserError: an evaluation can't be read. Here, since checking the sources may take hours.
    """
    spec = stage.contamination
    if spec is None:
        return None
    evaluations = [load_evaluation(file, spec.image_root) for file in spec.against]

    def adjust(source: "DataSource", report: SourceReport) -> SourceReport:
        cache = CheckCache(default_cache_dir())
        matches: list[Match] = []
        found = []
        for evaluation in evaluations:
            own = find_in_source(source, report.rows, evaluation, spec.near_bits, cache)
            matches += own
            found.append(evaluation.counted(spec.near_bits, own).to_dict() | {"reject": spec.reject})
        content = dict(report.content)
        if spec.reject != "nothing":
            report = rejecting(report, matches, cache.folder, questions=spec.reject == "images_and_questions")
            content["rows"] = hashlib.sha256(report.rows.tobytes()).hexdigest()[:32]
        return replace(report, content=content, contamination=tuple(found))

    return adjust


def rejecting(report: SourceReport, matches: Sequence[Match], folder: Path, *, questions: bool) -> SourceReport:
    """The report without the rows that hold an evaluation's images, which become rejects of their own reason.

    Args:
        matches: of the source.
        folder: of the file to write, which lists the report's rejects and these.
        questions: reject rows that ask one of the evaluation's questions too.
    """
    reasons: dict[int, tuple[str, str, str | None]] = {}
    for match in matches:
        if match.kind == "question":
            if questions:
                what = f"asks question {match.of} of the evaluation"
                reasons.setdefault(match.row, ("evaluation_question", what, None))
            continue
        how = "" if match.kind == "exact" else f", {match.bits} bits apart{', mirrored' * match.mirrored}"
        reasons[match.row] = ("evaluation_image", f"image {match.of} of the evaluation{how}", match.image)
    ids = {match.row: match.id for match in matches}
    added = [
        {"row": row, "id": ids[row], "image": image, "reason": reason, "detail": detail}
        for row, (reason, detail, image) in sorted(reasons.items())
    ]
    lines = [json.dumps(reject) + "\n" for reject in added]
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()[:8]  # stages may look for other evaluations
    rejects = folder / f"{report.rejects.stem}.{digest}.jsonl"
    write_atomically(rejects, [*(json.dumps(reject) + "\n" for reject in report.rejected()), *lines])
    kept = ~np.isin(report.rows, np.array(sorted(reasons), np.int64))
    dropped, first_ids = dict(report.dropped), dict(report.first_ids)
    for row, (reason, _, _) in sorted(reasons.items()):
        dropped[reason] = dropped.get(reason, 0) + 1
        first_ids[reason] = [*first_ids.get(reason, []), ids[row]][:5]
    return replace(
        report,
        rows=report.rows[kept],
        counts={name: values[kept] for name, values in report.counts.items()},
        prefixes=report.prefixes[kept],
        dropped=dropped,
        first_ids=first_ids,
        rejects=rejects,
    )
