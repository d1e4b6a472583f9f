"""Questions with annotated answers, read from the files in which TextVQA is distributed."""

import ast
import os
import re
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_llama31.trainer.data.sources.fields import names_images
from llava_llama31.trainer.data.sources.images import ImageRef, image_at
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.data.sources.remote_files import check_is_path
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.row_files import (
    Row,
    json_lines,
    json_objects,
    json_value,
    parquet_rows,
    tsv_rows,
)
from llava_llama31.trainer.recipes.data_formats import MAX_PIXELS


IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg")
# VLMEvalKit's own line between an image in base64 and the index of the row that holds it
LONGEST_IMAGE_INDEX = 64
LONGEST_ANSWER_LIST = 100_000
_LAST_NUMBER = re.compile(r"\d+$")
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/=]")

_REQUIRED = ("question_id", "image_id", "question", "answers")


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Args:
        question_id: as the file has it, a number or a string.
        image_id: key of the image; questions with the same key share it.
        image: the image, or None where only scores are wanted.
        question: text as the file has it.
        answers: what the annotators said, ten in TextVQA.
        ocr_tokens: words that a reader found in the image, in its order; None where the file has none.
        options: (letter, text) of a multiple-choice question; `answers` is then the right letter.
        context: what is said before the question, e.g. ScienceQA's hint.
        groups: categories that a task reports by.
        units: what is right only as a whole, e.g. all turns of a circular question; the task says what for.
        metric: how this question is scored, where each says so itself.
        left_out: the file has it and the task does not count it, as MMMU's of another split.
        answers_normalized: the VQA protocol in whose normal form the answers are already.
    """

    question_id: int | str
    image_id: str
    image: ImageRef | None
    question: str
    answers: tuple[str, ...]
    ocr_tokens: tuple[str, ...] | None = None
    options: tuple[tuple[str, str], ...] = ()
    context: str = ""
    groups: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    metric: str = ""
    left_out: bool = False
    answers_normalized: str = ""


@dataclass(frozen=True)
class ImagePlace:
    """Where a file's images are, and how many pixels each may have."""

    root: Path
    max_pixels: int


def load_questions(
    data: str | Path,
    *,
    questions: str | Path | None = None,
    image_root: str | Path | None = None,
    max_pixels: int | None = None,
    limit: int | None = None,
    with_images: bool = True,
) -> list[Question]:
    """Read annotated questions in the order of the file.

    | suffix     | what it holds                                                                                    |
    |------------|--------------------------------------------------------------------------------------------------|
    | `.jsonl`   | one {question_id, image_id, question, answers} a line                                            |
    | `.json`    | a list of them, alone or under "data" (TextVQA's official files); or VQA's annotations, with      |
    |            | their questions in a file of their own                                                           |
    | `.tsv`     | VLMEvalKit's {index, image, question, answer}, the image in base64 or as another row's index    |
    | `.parquet` | lmms-lab's rows, the image inside: a file, or a folder or pattern of the shards of one split    |

    JSON rows may also have `image`, a path under `image_root`; without it the image is `image_root / image_id` with
    .jpg, .png or .jpeg. JSON and parquet rows may have `ocr_tokens`.

    Args:
        data: file, folder or pattern.
        questions: the questions file that goes with VQA's annotations, and with no other format.
        image_root: folder of the images; by default the folder of `data`.
        max_pixels: of the largest image that is read, height x width; by default that of training data.
        limit: read no more than this many.
        with_images: False leaves the images out, as scoring needs none.

    Raises:
        UserError: a missing file, a row without a field, a doubled question_id, two images under one image_id, an
            image outside `image_root`.
    """
    for given in (data, questions, image_root):
        check_is_path(given)
    path = Path(data)
    root = Path(path.parent if image_root is None else image_root).resolve()
    place = ImagePlace(root, max_pixels or MAX_PIXELS)
    loaded: list[Question] = []
    images: dict[str, tuple[ImageRef, str]] = {}
    seen: dict[str, str] = {}
    for where, row in _rows(path, questions, with_images):
        if limit is not None and len(loaded) >= limit:
            break
        question = _question(row, where)
        only_once(str(question.question_id), "question_id", where, seen)
        if with_images:
            question = replace(question, image=shared_image(row, question.image_id, place, where, images))
        loaded.append(question)
    if not loaded:
        raise UserError("no questions", where=str(data), fix="name a file with at least one question")
    return loaded


def vqa_pair(annotations: str | Path, questions: str | Path | None) -> list[Row]:
    """Rows {question_id, image_id, question, answers} of VQA's pair of files; none if `annotations` is not one of it.

    Raises:
        UserError: the two files are not of one split, or the questions are not given.
    """
    path = Path(annotations)
    content = json_value(path) if path.suffix.lower() == ".json" else None
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        return list(_vqa_rows(content["annotations"], path, questions))
    return []


def _rows(path: Path, questions: str | Path | None, with_images: bool) -> Iterator[Row]:
    suffix = path.suffix.lower()
    content = json_value(path) if suffix == ".json" else None
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        yield from _vqa_rows(content["annotations"], path, questions)
    elif questions is not None:
        what = "questions in a file of their own go with VQA-style annotations, which this is not"
        raise UserError(what, where=str(path), fix='name a .json file with a list under "annotations"')
    elif suffix == ".json":
        yield from json_objects(_listed(content, "data", path), path)
    elif suffix == ".parquet" or path.is_dir() or ("*" in path.name and not path.is_file()):
        yield from parquet_rows(path, (*_REQUIRED, "ocr_tokens", *(["image"] if with_images else [])))
    elif suffix == ".tsv":
        yield from _vlmevalkit_rows(path, with_images)
    elif suffix in (".csv", ".xlsx"):
        what = "TextVQA's questions are not in such a table"
        raise UserError(what, where=str(path), fix=f"questions of your own go with --task: --task {path}")
    else:
        yield from json_lines(path)


def _listed(content: Any, key: str, path: Path) -> list[Any]:
    rows = content.get(key) if isinstance(content, dict) else content
    if not isinstance(rows, list):
        keys = f"; it has {', '.join(content)}" if isinstance(content, dict) and content else ""
        fix = "docs/evaluation.md lists the formats"
        raise UserError(f"neither a list nor an object with a list under '{key}'{keys}", where=str(path), fix=fix)
    return rows


def _vqa_rows(annotations: list[Any], path: Path, questions: str | Path | None) -> Iterator[Row]:
    """VQA's pair of files (visualqa.org): {question_id, image_id, question} and, under the same id, the answers.

    LLaVA's question file, {question_id, image, text} a line, may stand for the first.
    """
    if questions is None:
        raise UserError("annotations without their questions", where=str(path), fix="name the file with --questions")
    source = Path(questions)
    asked: dict[str, dict[str, Any]] = {}
    places: dict[str, str] = {}
    lines = source.suffix.lower() == ".jsonl"
    rows = json_lines(source) if lines else json_objects(_listed(json_value(source), "questions", source), source)
    for where, row in rows:
        if "question_id" not in row:
            raise UserError("no question_id", where=where, fix="give each question one")
        only_once(str(row["question_id"]), "question_id", where, places)
        asked[str(row["question_id"])] = _llava_question(row) if {"image", "text"} <= row.keys() else row
    annotated: dict[str, str] = {}
    for where, annotation in json_objects(annotations, path):
        only_once(str(annotation.get("question_id")), "question_id", where, annotated)
        question = asked.pop(str(annotation.get("question_id")), None)
        if question is None:
            what = f"question_id {annotation.get('question_id')} is not in {source.name}"
            raise UserError(what, where=where, fix="pass the two files of one split")
        if annotation.get("image_id") != question.get("image_id"):
            what = f"image_id {annotation.get('image_id')}, but {question.get('image_id')} in {source.name}"
            raise UserError(what, where=where, fix="pass the two files of one split")
        answers = annotation.get("answers")
        if isinstance(answers, list):
            answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
        yield where, question | {"answers": answers}
    if asked:
        what = f"{len(asked)} questions have no annotation, the first {next(iter(asked))}"
        raise UserError(what, where=str(source), fix="pass the two files of one split")


def _llava_question(row: dict[str, Any]) -> dict[str, Any]:
    """A row of LLaVA's question file as VQA's own, whose image_id is the number at the end of the image's name."""
    number = _LAST_NUMBER.search(Path(str(row["image"])).stem)
    image_id = int(number[0]) if number else row["image"]
    return {"question_id": row["question_id"], "image_id": image_id, "question": str(row["text"]).partition("\n")[0]}


def only_once(key: str, name: str, where: str, places: dict[str, str]) -> None:
    """Keep the place of a key.

    Raises:
        UserError: another place has it already.
    """
    first = places.setdefault(key, where)
    if first != where:
        raise UserError(f"{name} {key:.80} occurs twice, first in {first}", where=where, fix="make ids unique")


def _vlmevalkit_rows(path: Path, with_images: bool) -> Iterator[Row]:
    """VLMEvalKit's table (`vlmeval/dataset/image_base.py`); in its TextVQA_VAL the index is TextVQA's question_id."""
    read: list[tuple[str, dict[str, Any], str]] = []
    places: dict[str, str] = {}
    images: dict[str, bytes] = {}
    for where, cells in tsv_rows(path):
        index, image = cells.get("index") or cells.get("question_id"), cells.get("image") or ""
        if not index or not cells.get("answer"):
            raise _lacks("index" if not index else "answer", cells, where)
        only_once(index, "index", where, places)
        # an image is stored once, and the other rows that show it name that row
        holder = image if 0 < len(image) <= LONGEST_IMAGE_INDEX else index
        if with_images and image and holder == index:
            images[index] = decoded_base64(image, where)
        read.append((where, _vlmevalkit_row(cells, index, holder, where), holder if image else ""))
    for where, row, holder in read:
        if with_images and holder:
            if holder not in images:
                what = f"image is {holder!r}, neither base64 nor the index of a row that holds an image"
                raise UserError(what, where=where, fix="give base64; a path goes into a column `image_path`")
            row["image"] = {"bytes": images[holder]}
        yield where, row


def _lacks(column: str, cells: dict[str, str], where: str) -> UserError:
    """What is wrong with a row without a cell that it needs."""
    there = ", ".join(ascii(name)[1:-1][:40] for name in list(cells)[:10])
    what = f"{column} is empty" if column in cells else f"there is no column {column}; the first line names {there}"
    return UserError(what, where=where, fix="VLMEvalKit's tables have index, image, question and answer")


def _vlmevalkit_row(cells: dict[str, str], index: str, holder: str, where: str) -> dict[str, Any]:
    path = cells.get("image_path")
    if path is not None and (paths := python_list(path)) is not None:
        if len(paths) != 1 or not isinstance(paths[0], str):
            raise UserError(f"image_path lists {len(paths)} images", where=where, fix="name the one of the question")
        path = paths[0]
    if not cells.get("question"):
        raise _lacks("question", cells, where)
    return {
        "question_id": plain_number(cells.get("question_id") or index),
        "image_id": cells.get("image_id") or (Path(path).stem if path and not cells.get("image") else holder),
        "question": cells.get("question"),
        "answers": _answer_list(cells["answer"], where),
        "image": path,
    }


def plain_number(text: str) -> int | str:
    """A number that is written as a number is, and any other text as it stands."""
    return int(text) if text.isascii() and text.isdigit() and str(int(text)) == text else text


def python_list(text: str) -> list[Any] | None:
    """The list that a text is in Python's spelling, or None; nothing is executed."""
    if not text.lstrip().startswith("[") or len(text) > LONGEST_ANSWER_LIST:
        return None
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _answer_list(text: str, where: str) -> list[str]:
    answers = python_list(text)
    if not answers or not all(isinstance(answer, str) for answer in answers):
        shown = repr(text) if len(text) <= 80 else f"{text[:80]!r}... ({len(text):,} characters)"
        fix = "write the annotators' answers as Python does: ['one', 'two']"
        raise UserError(f"answer is {shown}, not a list of texts", where=where, fix=fix)
    return answers


def decoded_base64(text: str, where: str) -> bytes:
    """The bytes of an image, whose base64 may have lines and a `data:` before it.

    Raises:
        UserError: the text is not base64.
    """
    body = "".join(text.split())
    if body[:5].lower() == "data:":
        body = body.partition(",")[2]
    try:
        return b64decode(body, validate=True)
    except (Base64Error, ValueError) as error:
        foreign = _NOT_BASE64.search(body)
        reason = f"it has {foreign[0]!r}" if foreign else "its base64 is cut short"
        what = f"image begins {text[:20]!r} and is neither base64 nor the index of another row: {reason}"
        raise UserError(what, where=where, fix="download the file again, or give one image in base64") from error


def _question(row: dict[str, Any], where: str) -> Question:
    missing = [field for field in _REQUIRED if row.get(field) is None]
    if missing:
        raise UserError(f"no {', '.join(missing)}", where=where, fix=f"each row needs {', '.join(_REQUIRED)}")
    question_id, answers = row["question_id"], row["answers"]
    if not isinstance(question_id, int | str) or not isinstance(row["question"], str):
        raise UserError("question_id or question of a wrong type", where=where, fix="question_id: number or text")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise UserError("answers is not a list of texts", where=where, fix="give the annotators' answers as a list")
    return Question(
        question_id,
        str(row["image_id"]),
        None,
        row["question"],
        tuple(answers),
        _ocr_tokens(row.get("ocr_tokens"), where),
    )


def _ocr_tokens(tokens: Any, where: str) -> tuple[str, ...] | None:
    if tokens is None:
        return None
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise UserError("ocr_tokens is not a list of texts", where=where, fix="give a list, or leave the field out")
    return tuple(tokens)


def shared_image(
    row: dict[str, Any], image_id: str, place: ImagePlace, where: str, images: dict[str, tuple[ImageRef, str]]
) -> ImageRef:
    """The row's image, which is one object for all rows that show it.

    Raises:
        UserError: another row has another image under the same `image_id`.
    """
    named = _named_image(row, where)
    found = _image_of(named, image_id, place, where)
    first, first_where = images.setdefault(image_id, (found, where))
    names_none = named in (None, "") and not (found.path and os.path.isfile(found.path))
    if not (names_none or _is_same(found, first)):
        what = f"image_id {image_id} is another image here than in {first_where}"
        raise UserError(what, where=where, fix="give each image an image_id of its own")
    return first


def refuse_without_images(questions: Sequence[Question], where: str) -> None:
    """Refuse questions of which not one has its image: their folder is another one.

    Raises:
        UserError: no image is there.
    """
    images = {question.image.key(): question.image for question in questions if question.image is not None}
    if images and not any(map(_may_be_there, images.values())):
        first = next(iter(images.values()))
        try:
            first.size()
        except RecordError as error:
            what = f"none of the {len(images)} images is there; the first: {error}"
            fix = "name the images' folder: --image-root, or image_root of a recipe's evaluation"
            raise UserError(what, where=where, fix=fix) from error


def _may_be_there(image: ImageRef) -> bool:
    return image.path is None or image.is_remote or os.path.lexists(image.path)


def _is_same(image: ImageRef, other: ImageRef) -> bool:
    if image.key() == other.key():
        return True
    try:
        return image.sha256() == other.sha256()
    except RecordError:
        return False


def _named_image(row: dict[str, Any], where: str) -> Any:
    """What the row gives as its image, also under a name of other tools, such as `image_path`; None: nothing.

    Raises:
        UserError: it gives several.
    """
    if row.get("image") not in (None, ""):
        return row["image"]
    keys = [key for key, value in row.items() if key != "image_id" and names_images(key, value) and not _is_url(value)]
    images = row[keys[0]] if len(keys) == 1 else keys
    if not isinstance(images, list):
        return images
    if len(keys) > 1 or len(images) > 1:
        what = f"{' and '.join(keys)} give {max(len(keys), len(images))} images"
        raise UserError(what, where=where, fix="name the one image of the question in `image`")
    return images[0] if images else None


def _is_url(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("http://", "https://"))


def _image_of(image: Any, image_id: str, place: ImagePlace, where: str) -> ImageRef:
    if isinstance(image, bytes):
        return ImageRef(image_id, data=image, max_pixels=place.max_pixels)
    if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
        return ImageRef(image_id, data=image["bytes"], max_pixels=place.max_pixels)
    name = image.get("path") if isinstance(image, dict) else image
    names = [name] if name else [image_id + suffix for suffix in IMAGE_SUFFIXES]
    if not all(isinstance(name, str) for name in names):
        what = f"image lists {len(name)} images" if isinstance(name, list) else f"image is {name!r:.80}"
        fix = "give the one of the question" if isinstance(name, list) else "give a path relative to the image root"
        raise UserError(what, where=where, fix=fix)
    try:
        images = [image_at(name, place.root, place.max_pixels) for name in names]
    except RecordError as error:
        fix = "keep all images under --image-root, and name their paths"
        raise UserError(f"{names[0]}: {error}", where=where, fix=fix) from None
    # an image that is not there is a question that fails and is counted, not a file that cannot be read
    return next((image for image in images if image.path is not None and os.path.isfile(image.path)), images[0])
