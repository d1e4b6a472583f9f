"""Questions with annotated answers, read from the files in which TextVQA is handed around."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.images import ImageRef, image_at
from llava_llama31.trainer.reasons import RecordError


IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg")


@dataclass(frozen=True)
class Question:
    """One question about one picture.

    Args:
        question_id: as the file has it, a number or a string.
        image_id: key of the picture; questions with the same key share it.
        image: the picture, or None where only scores are wanted.
        question: text as the file has it.
        answers: what the annotators said, ten in TextVQA.
        ocr_tokens: words that a reader found in the picture, in its order; None where the file has none.
    """

    question_id: int | str
    image_id: str
    image: ImageRef | None
    question: str
    answers: tuple[str, ...]
    ocr_tokens: tuple[str, ...] | None = None


def load_questions(
    data: str | Path, *, image_root: str | Path | None = None, limit: int | None = None, with_images: bool = True
) -> list[Question]:
    """Read questions in the order of the file.

    Formats, told apart by the suffix: `.jsonl` with one {question_id, image_id, question, answers} a line, and `image`
    and `ocr_tokens` where there are any; `.json` with a list of them, alone or under "data" (TextVQA's official files);
    `.parquet` in lmms-lab's layout (the picture inside), one file, or a folder or pattern of the shards of one split. A
    picture is `image_root / image`, or without `image` the file `image_root / image_id` + .jpg, .png or .jpeg.

    Args:
        data: file, folder or pattern.
        image_root: folder of the pictures; by default the folder of `data`.
        limit: read no more than this many.
        with_images: False leaves the pictures out, as scoring needs none.

    Raises:
        UserError: a missing file, a row without a field, a doubled question_id, a picture outside `image_root`.
    """
    path = Path(data)
    root = Path(path.parent if image_root is None else image_root).resolve()
    questions: list[Question] = []
    pictures: dict[str, ImageRef] = {}
    seen: set[str] = set()
    for where, row in _rows(path, with_images):
        if limit is not None and len(questions) >= limit:
            break
        question = _question(row, where)
        if str(question.question_id) in seen:
            raise UserError(f"question_id {question.question_id} occurs twice", where=where, fix="make ids unique")
        seen.add(str(question.question_id))
        if with_images:
            if question.image_id not in pictures:
                pictures[question.image_id] = _picture(row, question.image_id, root, where)
            question = replace(question, image=pictures[question.image_id])
        questions.append(question)
    if not questions:
        raise UserError("no questions", where=str(data), fix="name a file with at least one question")
    return questions


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a JSON Lines file, each with the place it stands at."""
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", _object(line, f"{path}:{number}")


def _rows(path: Path, with_images: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".parquet" or path.is_dir() or "*" in path.name:
        yield from _parquet_rows(path, with_images)
    elif path.suffix == ".json":
        with _open_text(path) as file:
            content = _json(file.read(), str(path))
        rows = content.get("data") if isinstance(content, dict) else content
        if not isinstance(rows, list):
            raise UserError("neither a list nor an object with a list under 'data'", where=str(path), fix="see --help")
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise UserError("not an object", where=f"{path}[{number}]", fix="give one object per question")
            yield f"{path}[{number}]", row
    else:
        yield from json_lines(path)


def _parquet_rows(path: Path, with_images: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    files = sorted(path.parent.glob(path.name) if "*" in path.name else path.glob("*.parquet"))
    files = [path] if path.is_file() else files
    if not files:
        raise UserError("no parquet file there", where=str(path), fix="name a .parquet file, a folder or a pattern")
    splits = sorted({file.name.split("-")[0] for file in files})
    if len(splits) > 1:
        raise UserError(
            f"parquet files of several splits ({', '.join(splits)})", where=str(path), fix=f"'{path}/{splits[-1]}-*'"
        )
    for file in files:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            columns = [
                name
                for name in table.schema_arrow.names
                if name in (*_REQUIRED, "ocr_tokens") or with_images and name == "image"
            ]
            number = 0
            for batch in table.iter_batches(batch_size=64, columns=columns):
                for row in batch.to_pylist():
                    yield f"{file}[{number}]", row
                    number += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"cannot be read: {error}", where=str(file), fix="download it again") from error


_REQUIRED = ("question_id", "image_id", "question", "answers")


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


def _picture(row: dict[str, Any], image_id: str, root: Path, where: str) -> ImageRef:
    image = row.get("image")
    if isinstance(image, dict) and image.get("bytes") is not None:
        return ImageRef(image_id, data=image["bytes"])
    name = image.get("path") if isinstance(image, dict) else image
    names = [name] if name else [image_id + suffix for suffix in IMAGE_SUFFIXES]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"image is a {type(name).__name__}", where=where, fix="give a path relative to the image root")
    try:
        images = [image_at(name, root) for name in names]
    except RecordError as error:
        raise UserError(f"{names[0]}: {error}", where=where, fix="keep all pictures under --image-root") from None
    # a picture that is not there is a question that fails and is counted, not a file that cannot be read
    return next((image for image in images if image.path is not None and image.path.is_file()), images[0])


def _open_text(path: Path) -> Any:
    try:
        return path.open(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), fix="check the path") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"not JSON: {error}", where=where, fix="repair or remove it") from error


def _object(text: str, where: str) -> dict[str, Any]:
    value = _json(text, where)
    if not isinstance(value, dict):
        raise UserError("not an object", where=where, fix="give one JSON object per line")
    return value
