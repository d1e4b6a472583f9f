"""The browser of answers: one HTML file with questions, images, answers and scores of one file of answers, or of two.

The file needs nothing else and asks for nothing: its Content-Security-Policy allows only its own style, its own script
and `data:` images. What the data says enters the page as escaped JSON and leaves it as text nodes, never as markup.
"""

import json
import os
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import resources
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Any, TextIO

from PIL import Image

from llava_llama31.trainer.data.sources.images import ImageRef
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.questions import Question
from llava_llama31.trainer.evaluation.vqa_accuracy import PROTOCOLS, normalize, vqa_accuracy


IMAGE_SIDE = 512
JPEG_QUALITY = 80
CUT = "length"  # what a row's `ended` says of an answer that ran into the token limit


@dataclass(frozen=True)
class Browser:
    """A written browser, and what it could not show.

    Args:
        path: the HTML file.
        num_questions: questions in it, answered or not.
        num_unanswered: those of them whose answer is missing or failed.
        num_images: images in it, unreadable ones not counted.
        unreadable: image_id -> why its image is not shown.
        unknown: answered question_ids that are not among the questions, so not shown.
    """

    path: Path
    num_questions: int
    num_unanswered: int
    num_images: int
    unreadable: Mapping[str, str]
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class Marking:
    """How answers are marked.

    Args:
        protocols: names, in the order of all scores.
        mark: question and its row, or None -> what the page says of it: `answers`, and `error` or `prediction` with
            `scores`.
        measure: what the mean of the scores is called.
    """

    protocols: tuple[str, ...]
    mark: Callable[[Question, Mapping[str, Any] | None], dict[str, Any]]
    measure: str


@dataclass(frozen=True)
class Answers:
    """One file of answers.

    Args:
        rows: as `write_browser` takes them.
        name: what the page calls the file; needed to compare two.
        note: what has to be known about its scores.
    """

    rows: Iterable[Mapping[str, Any]]
    name: str = ""
    note: str = ""


def write_browser(
    questions: Sequence[Question],
    rows: Iterable[Mapping[str, Any]],
    path: str | Path,
    *,
    title: str = "",
    note: str = "",
    image_side: int = IMAGE_SIDE,
    on_progress: Callable[[int, int], None] | None = None,
    marking: Marking | None = None,
) -> Browser:
    """Write the browser of one evaluation; the file appears when it is complete.

    One image at a time is in memory, and each is stored once however many questions it has.

    Args:
        questions: with their images; they are listed in this order.
        rows: `{question_id, answer}` or `{question_id, answer: null, error}`, as in predictions.jsonl; of several rows
            to one question the first counts, as in the score. Heeded where a row has them: `ended` ("length": the
            answer was cut), `shown_image_id` (the image that a blind evaluation showed instead) and `normalized`
            (the protocol whose normal form the answer is in already).
        path: the HTML file; its folder is made if it is not there.
        title: what the page is called; by default the file's name.
        note: what has to be known about all of the scores.
        image_side: longest side of a stored image, in pixels.
        on_progress: called with (images done, all images) after each image.
        marking: how answers are marked; by default as TextVQA's.

    Raises:
        UserError: there are no questions, `image_side` is not positive, or the file cannot be written.
    """
    answers = Answers(rows, note=note)
    return _write_browser(questions, [answers], Path(path), title, image_side, on_progress, marking)


def write_comparison(
    questions: Sequence[Question],
    first: Answers,
    second: Answers,
    path: str | Path,
    *,
    title: str = "",
    image_side: int = IMAGE_SIDE,
    on_progress: Callable[[int, int], None] | None = None,
    marking: Marking | None = None,
) -> Browser:
    """Write the browser of two files of answers to the same questions: A's and B's answer and scores side by side.

    Args:
        questions: as `write_browser` takes them, and so are the other arguments.
        first: the answers that the page calls A.
        second: those that it calls B.

    Raises:
        UserError: as `write_browser`.
    """
    return _write_browser(questions, [first, second], Path(path), title, image_side, on_progress, marking)


def _write_browser(
    questions: Sequence[Question],
    files: Sequence[Answers],
    path: Path,
    title: str,
    image_side: int,
    on_progress: Callable[[int, int], None] | None,
    marking: Marking | None,
) -> Browser:
    if not questions:
        raise UserError("there are no questions to browse", fix="pass at least one")
    if image_side < 1:
        raise UserError(f"an image cannot be {image_side} pixels long", where="image_side", fix="pass 1 or more")
    if path.is_dir():
        raise UserError("is a folder", where=str(path), fix="name an .html file, in that folder or elsewhere")
    images = _images(questions)
    marking = marking or Marking(tuple(PROTOCOLS), _answered, "accuracy")
    entries, unknown = _entries(questions, files, {image_id: i for i, image_id in enumerate(images)}, marking)
    data = {
        "title": title or path.stem,
        "note": "; ".join(dict.fromkeys(file.note for file in files if file.note)),
        "protocols": list(marking.protocols),
        "measure": marking.measure,
        "questions": entries,
        "unknown": unknown,
    }
    if len(files) > 1:
        data["names"] = [file.name for file in files]
    described = _write_page(path, data, lambda file: _write_images(file, images, image_side, on_progress))
    unreadable = {image["id"]: image["error"] for image in described if "error" in image}
    return Browser(
        path,
        num_questions=len(entries),
        num_unanswered=sum("error" in entry or "error" in entry.get("second", {}) for entry in entries),
        num_images=len(images) - len(unreadable),
        unreadable=unreadable,
        unknown=tuple(unknown),
    )


def _write_page(
    path: Path, data: Mapping[str, Any], write_images: Callable[[TextIO], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Write the whole page in one piece; returns what `write_images` does, the descriptions of the images."""
    head, tail = _page()
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("w", encoding="utf-8", newline="\n") as file:
                file.write(head)
                described = write_images(file)
                content = _json({**data, "images": described})
                file.write(f'<script type="application/json" id="data">{content}</script>\n{tail}')
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        fix = "free some space, or pass another --output"
        raise UserError(f"cannot be written: {error.strerror or error}", where=str(path), fix=fix) from error
    return described


def _images(questions: Sequence[Question]) -> dict[str, ImageRef | None]:
    """The image of every image_id, in the order of the questions."""
    images: dict[str, ImageRef | None] = {}
    for question in questions:
        if images.get(question.image_id) is None:
            images[question.image_id] = question.image
    return images


def _write_images(
    file: TextIO,
    images: Mapping[str, ImageRef | None],
    side: int,
    on_progress: Callable[[int, int], None] | None,
) -> list[dict[str, Any]]:
    """Write each thumbnail into an element of its own; (id, width, height) or (id, error) of each."""
    described: list[dict[str, Any]] = []
    for index, (image_id, image) in enumerate(images.items()):
        try:
            if image is None:
                raise RecordError("missing_image", "the question has no image")
            jpeg, (width, height) = _thumbnail(image, side)
        except RecordError as error:
            described.append({"id": image_id, "error": str(error)})
        else:
            # base64 holds no `<`; a type other than a script's keeps it inert text, decoded when it is looked at
            file.write(f'<script type="text/plain" id="image-{index}">{b64encode(jpeg).decode()}</script>\n')
            described.append({"id": image_id, "width": width, "height": height})
        if on_progress is not None:
            on_progress(index + 1, len(images))
    return described


def _thumbnail(image: ImageRef, side: int) -> tuple[bytes, tuple[int, int]]:
    """(JPEG, (width, height)) with no side longer than `side`; a smaller image keeps its size.

    Raises:
        RecordError: the image cannot be read.
    """
    opened = image.open()
    opened.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = BytesIO()
    # a comment in the original would come along
    opened.save(file, "JPEG", quality=JPEG_QUALITY, optimize=True, comment=b"")
    return file.getvalue(), opened.size


def _entries(
    questions: Sequence[Question],
    files: Sequence[Answers],
    image_index: Mapping[str, int],
    marking: Marking,
) -> tuple[list[dict[str, Any]], list[str]]:
    """What the page says of each question, and the ids that are answered but not among the questions."""
    answered = [_first_rows(file.rows) for file in files]
    entries = []
    for question in questions:
        sides = [_side(question, rows.get(str(question.question_id)), image_index, marking) for rows in answered]
        entry = {
            "id": str(question.question_id),  # as text: a number above 2**53 would not survive JavaScript
            "image": image_index[question.image_id],
            "question": question.question,
            **sides[0],
        }
        if len(sides) > 1:
            entry["second"] = _beside(sides[1])
        entries.append(entry)
    known = {entry["id"] for entry in entries}
    return entries, [key for key in dict.fromkeys(key for rows in answered for key in rows) if key not in known]


def _first_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[Mapping[str, Any], int]]:
    """The first row to each question, and how many there are."""
    first: dict[str, tuple[Mapping[str, Any], int]] = {}
    for row in rows:
        kept, times = first.get(str(row["question_id"]), (row, 0))
        first[str(row["question_id"])] = (kept, times + 1)
    return first


def _side(
    question: Question,
    found: tuple[Mapping[str, Any], int] | None,
    image_index: Mapping[str, int],
    marking: Marking,
) -> dict[str, Any]:
    """What the page says of one file's answer to a question."""
    row, times = found or (None, 0)
    side = marking.mark(question, row)
    if times > 1:
        side["times"] = times
    shown = None if row is None else row.get("shown_image_id")
    if shown is not None:
        side["shown"] = {"id": str(shown), "image": image_index.get(str(shown))}
    return side


def _beside(side: dict[str, Any]) -> dict[str, Any]:
    """The second file's answer without what the question and the first file's answer say already."""
    matches = {answer["text"]: answer["matches"] for answer in side["answers"] if any(answer.get("matches", ()))}
    kept = {
        name: side[name] for name in ("error", "prediction", "scores", "said", "cut", "times", "shown") if name in side
    }
    return kept | {"matches": matches}


def _answered(question: Question, row: Mapping[str, Any] | None) -> dict[str, Any]:
    """The prediction of one row, or why there is none, and the annotators' answers grouped, the commonest first."""
    answers = Counter(question.answers).most_common()
    if row is None or row.get("answer") is None:
        error = "no row answers this question" if row is None else str(row.get("error", "no answer"))
        return {"error": error, "answers": [{"text": text, "count": count} for text, count in answers]}
    prediction, done = str(row["answer"]), row.get("normalized")
    scores = [vqa_accuracy(prediction, question.answers, name, normalized=name == done) for name in PROTOCOLS]
    compared = [prediction if name == done else normalize(prediction, name) for name in PROTOCOLS]
    grouped = []
    for text, count in answers:
        matches = [normalize(text, name) == wanted for name, wanted in zip(PROTOCOLS, compared, strict=True)]
        grouped.append({"text": text, "count": count, "matches": matches})
    entry: dict[str, Any] = {"prediction": prediction, "scores": scores, "answers": grouped}
    if row.get("ended") == CUT:
        entry["cut"] = True
    if len(set(scores)) > 1:
        forms = [Counter(normalize(text, name) for text in question.answers).most_common() for name in PROTOCOLS]
        entry["compared"] = [
            {"prediction": wanted, "answers": [{"text": text, "count": count} for text, count in form]}
            for wanted, form in zip(compared, forms, strict=True)
        ]
    return entry


def _json(value: Any) -> str:
    """JSON in ASCII that no HTML parser can take for markup."""
    # U+2028, U+2029 and lone surrogates are escapes in ASCII; without `<` no tag or comment can begin
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _page() -> tuple[str, str]:
    """The page before and after the data; the policy allows style and script by their hashes alone."""
    folder = resources.files(__package__)
    style, script, page = (
        folder.joinpath(f"browser.{suffix}").read_text(encoding="utf-8") for suffix in ("css", "js", "html")
    )
    filled = Template(page).substitute(
        style=style, style_hash=_source_hash(style), script=script, script_hash=_source_hash(script)
    )
    head, _, tail = filled.partition("<!-- data -->\n")
    return head, tail


def _source_hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
