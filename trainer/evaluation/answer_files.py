"""Answer files to be scored: ours, and those that LLaVA's scripts, lmms-eval, VLMEvalKit and EvalScope write."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llava_llama31.trainer.data.sources.data_folders import parquet_folder
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.answer_matching import (
    NO_ANSWER,
    Answer,
    match_answers,
    question_key,
    refuse_questions,
)
from llava_llama31.trainer.evaluation.questions import Question
from llava_llama31.trainer.evaluation.row_files import (
    Row,
    answers_of_scores,
    any_rows,
    holds_mme_results,
    holds_mmmu_outputs,
    mme_results,
    mmmu_outputs,
    number_or_text,
    parts_of_gpus,
    plain_id,
    value_at,
)
from llava_llama31.trainer.evaluation.vqa_accuracy import is_normalized


ANSWERS, LLAVA, SAMPLES, SUBMISSION, BY_IMAGE, VLMEVALKIT, EVALSCOPE, MME, INTERNVL = (
    "question ids and answers",
    "LLaVA's answers",
    "lmms-eval's samples",
    "lmms-eval's submission",
    "images and answers",
    "VLMEvalKit's predictions",
    "EvalScope's predictions",
    "MME's results",
    "Qwen-VL's and InternVL's results",
)
# what VLMEvalKit writes instead of an answer (`INFER_FAIL_MSG` in its vlmeval/smp/file.py)
VLMEVALKIT_FAILED = "Failed to obtain answer"
NORMALIZED_NOTE = (
    "these answers are in m4c's normal form already, as LLaVA and lmms-eval submit them: m4c compares them as they "
    "stand; the scores under the other protocols are not those of the model's own words, which LLaVA's answers and "
    "lmms-eval's --log_samples keep"
)
# what `evaluate` writes beside every answer
MODEL = "model"
_PREVIOUS = "_PREV"
PREVIOUS_NOTE = (
    "this is VLMEvalKit's file of an earlier, perhaps unfinished run (_PREV); the run's own file has no _PREV"
)
JUDGED_NOTE = (
    "this is VLMEvalKit's result file with a judge's verdicts (hit); its predictions are scored, not the verdicts"
)

ID_FIELDS = ("question_id", "questionId", "index", "id")
# a model's words; an `answer` beside one of them is the annotators'
WORDS_FIELDS = ("prediction", "response", "pred_answer", "pred", "predict", "text")
_ASKED_FIELDS, _IMAGE_FIELDS = ("question", "prompt"), ("image_id", "image", "image_path")
_MME_FIELDS = {"category", "image", "question", "answer", "prediction"}
_PARTS = ("id", "answer", "question", "image")
_ABSENT = object()
# beside an `answer` these are the annotators', so that `answer` is the model's
_ANNOTATED_FIELDS = ("annotation", "gt_answers")
# rows of servers' files, which hold no annotated answers; the last is DocVQA's
_ID_AND_ANSWER, _IMAGE_AND_ANSWER, _DOCVQA = {"question_id", "answer"}, {"image", "answer"}, {"questionId", "answer"}


@dataclass(frozen=True)
class AnswerFile:
    """The answers of a file, in one form whoever wrote it.

    Args:
        layout: what the file was recognised as.
        rows: {question_id, answer}, or {question_id, answer: None, error} where there is none, in the order of the
            file; `normalized` names the protocol whose normal form an answer is in already.
        note: what has to be known about a score of this file; empty where there is nothing to say.
    """

    layout: str
    rows: list[dict[str, Any]]
    note: str = ""


@dataclass(frozen=True)
class AnswerRows:
    """The answers of a file before it is known which questions they belong to.

    Args:
        path: the file.
        layout: what it was recognised as.
        answers: one a row.
        source: the rows as they stand.
        notes: what AnswerFile says in its note.
    """

    path: Path
    layout: str
    answers: list[Answer]
    source: list[Row]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """What the user says about an answer file.

    Args:
        columns: id, answer, question or image -> the field of the rows that has it, or the way into them.
        where: field -> the value that rows have to have to be read.
    """

    columns: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    where: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        unknown = sorted(self.columns.keys() - set(_PARTS))
        if unknown or (self.columns and "answer" not in self.columns):
            what = f"names {unknown[0]}" if unknown else "names no answer"
            raise UserError(what, where="--columns", fix=f"give answer=FIELD and any of {', '.join(_PARTS)}")


def read_predictions(path: str | Path, questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Rows {question_id, answer} or {question_id, error} of any file that `read_answers` reads."""
    return read_answers(path, questions).rows


def read_answers(path: str | Path, questions: Sequence[Question], reading: Reading | None = None) -> AnswerFile:
    """Read an answer file and say which question each answer belongs to.

    | written by | what the file holds                                                                              |
    |------------|--------------------------------------------------------------------------------------------------|
    | evaluate   | `.jsonl`, one {question_id, answer} or {question_id, error} a line                               |
    | LLaVA      | `.jsonl`, one {question_id, prompt, text} a line; the id is the question's or the image's        |
    | lmms-eval  | `.json`, a list of {question_id, answer}, normalised as m4c does (`textvqa_submission_*.json`)   |
    | both       | `.json`, a list of {image, answer}, normalised so: what VizWiz's server takes, where no image has |
    |            | two questions                                                                                    |
    | lmms-eval  | `.jsonl` of `--log_samples`: {filtered_resps, submission: {question_id, ...}}, the model's       |
    |            | words; before 0.2.4 a `.json` with such rows under `logs`                                        |
    | VLMEvalKit | `.xlsx`, `.tsv` or `.json` with {index, question, prediction}; the index is TextVQA's            |
    |            | question_id, or else the rows have to ask the annotated questions in their order                 |
    | MMMU       | `.json`, one object {question id: answer}; or a folder of SUBJECT/output.json                    |
    | EvalScope  | `.jsonl` of predictions: {index, model_output, messages}                                         |
    | Qwen-VL    | and InternVL: `.json`, a list of {answer, annotation} and an id, image or question; the answer   |
    |            | is the model's                                                                                   |
    | MME        | a folder of `.txt`, one a category: image, question, annotated answer and prediction between tabs |
    | others     | rows with one of ID_FIELDS and one of WORDS_FIELDS, or as `reading` says                         |

    Args:
        path: the file, or MME's folder; its suffix says how it is read, the names of its fields what it is.
        questions: the annotated questions.
        reading: which fields and rows count, where the user says so.

    Raises:
        UserError: the file cannot be read or is none of these, or its rows cannot be assigned to the questions.
    """
    file = read_answer_rows(path, reading or Reading())
    rows = match_answers(file.answers, questions, file.path, in_order=in_order(file))
    refuse_questions(file.answers, rows, questions, file.path)
    return AnswerFile(file.layout, rows, "; ".join(file.notes))


def in_order(file: AnswerRows) -> bool:
    """Whether rows that ask the annotated questions in their order are assigned by it."""
    return file.layout == VLMEVALKIT


def read_answer_rows(path: str | Path, reading: Reading) -> AnswerRows:
    """Read an answer file.

    Raises:
        UserError: it cannot be read, is none that `read_answers` knows, or holds no words of a model.
    """
    file = _answer_rows(Path(path), reading)
    # those of `evaluate` are a model's, however little it said
    if not (file.layout == ANSWERS and MODEL in file.source[0][1]):
        _refuse_no_words(file.answers, file.path)
    texts = [answer.text for answer in file.answers if answer.text is not None]
    num_empty = sum(_is_empty(text) for text in texts)
    if not num_empty:
        return file
    note = f"{num_empty} of {len(texts)} answers are empty, or nan, and are scored as they stand"
    return replace(file, notes=(*file.notes, note))


def _parts_note(folder: Path, parts: Sequence[Path]) -> str:
    """How many parts are read as one file, and which other files of the folder are not."""
    others = sorted(file.name for file in folder.iterdir() if file.is_file() and file not in parts)
    unread = f"; not read: {', '.join(others[:5])}{' and more' * (len(others) > 5)}" if others else ""
    return f"{parts[0].name} to {parts[-1].name} are read as one file{unread}"


def _is_empty(text: str) -> bool:
    """Whether a text says nothing, or what pandas makes of an empty cell that it writes as a text."""
    return text.strip() in ("", "nan", "NaN")


def _refuse_no_words(answers: Sequence[Answer], path: Path) -> None:
    """Refuse a file that no model wrote: rules that take all but no for yes would score it like any other."""
    said = [answer for answer in answers if answer.text is not None]
    fix = "pass the file that the model's answers were written to"
    if len(said) > 1 and all(_is_empty(answer.text or "") for answer in said):
        empty = "empty or nan" if any((answer.text or "").strip() for answer in said) else "empty"
        raise UserError(f"the prediction of each of {len(said)} rows is {empty}", where=str(path), fix=fix)
    asked = [answer.asked for answer in said if answer.asked is not None]
    is_echo = len(asked) == len(said) > 1
    if is_echo and all(question_key(a.text or "") == question_key(a.asked or "") for a in said):
        what = f"the prediction of each of {len(said)} rows is its question, the first {said[0].text!r:.80}"
        raise UserError(what, where=str(path), fix=fix)


def _answer_rows(path: Path, reading: Reading) -> AnswerRows:
    read, notes = _read(path)
    rows = _kept(list(read), reading, path)
    if not rows:
        raise UserError("no answers", where=str(path), fix="name a file with at least one answer")
    empty = "" if path.suffix.lower() == ".xlsx" else None  # a cell without text; elsewhere null is no answer
    if reading.columns:
        answers = [_with_category(_by_columns(row, where, reading, empty), row) for where, row in rows]
        return AnswerRows(path, _called(reading), answers, rows, notes)
    layout = _layout(rows[0][1], rows[0][0])
    for where, row in rows:
        if layout is None or _layout(row, where) != layout:
            fix = answers_of_scores(path) or (
                'one {"question_id": ..., "answer": "..."} a line, another layout of docs/evaluation.md, or --columns'
            )
            found = ", ".join(map(str, row)) or "nothing"
            expected = f", the first row those of {layout}" if layout is not None else ""
            raise UserError(f"no question_id, or no answer: the row has {found}{expected}", where=where, fix=fix)
    answers = [_with_category(_answer(row, where, str(layout), empty), row) for where, row in rows]
    # only a server's file is a list of bare pairs; whether it is normalised is seen in the answers themselves
    bare = path.suffix.lower() == ".json" and all(row.keys() in (_ID_AND_ANSWER, _IMAGE_AND_ANSWER) for _, row in rows)
    if bare and all(answer.text is not None and is_normalized(answer.text, "m4c") for answer in answers):
        answers = [answer.with_row({"normalized": "m4c"}) for answer in answers]
        return AnswerRows(path, BY_IMAGE if layout == BY_IMAGE else SUBMISSION, answers, rows, (NORMALIZED_NOTE,))
    return AnswerRows(path, str(layout), answers, rows, _notes(path, rows) if layout == VLMEVALKIT else notes)


def _read(path: Path) -> tuple[Iterable[Row], tuple[str, ...]]:
    """Rows of a file, or of a folder that some evaluator writes, and notes on what was read."""
    if holds_mmmu_outputs(path):
        return mmmu_outputs(path), ()
    if holds_mme_results(path):
        return mme_results(path), ()
    if parts := parts_of_gpus(path):
        return chain.from_iterable(any_rows(part) for part in parts), (_parts_note(path, parts),)
    if path.is_dir() and not parquet_folder(path):
        raise _not_answers(path)
    return any_rows(path, keyed=("question_id", "prediction"), formulas=True), ()


def _not_answers(folder: Path) -> UserError:
    # not above: it builds the schema of recipes, which `score` otherwise does without
    from llava_llama31.trainer.checkpoint.run_folder import PREDICTIONS

    what = (
        "a folder of neither MME's results (texts of image, question, answer and prediction), MMMU's outputs (one "
        "folder per subject, each with an output.json), the parts N_K.jsonl of LLaVA's scripts nor parquet files"
    )
    fix = "name the file of answers"
    if (folder / PREDICTIONS).is_file():
        fix = f"name its {PREDICTIONS}"
    elif any(folder.glob("*.jsonl")):
        fix = f"{fix}, or join its parts: cat {folder}/*.jsonl > joined.jsonl"
    return UserError(what, where=str(folder), fix=fix)


def _kept(rows: list[Row], reading: Reading, path: Path) -> list[Row]:
    for name, value in reading.where.items():
        known = sorted({str(row[name]) for _, row in rows if name in row})
        rows = [(where, row) for where, row in rows if str(row.get(name)) == value]
        if not rows:
            what = f"no row has {name}={value}; there are {', '.join(known[:20]) or 'no rows with that field'}"
            raise UserError(what, where=str(path), fix="pass another --where")
    return rows


def _notes(path: Path, rows: Sequence[Row]) -> tuple[str, ...]:
    notes = [PREVIOUS_NOTE] if path.stem.endswith(_PREVIOUS) else []
    if "hit" in rows[0][1]:
        notes.append(JUDGED_NOTE)
    return tuple(notes)


def _layout(row: dict[str, Any], where: str) -> str | None:
    """What a row is by the names of its fields; None for a stranger."""
    fields = row.keys()
    if "filtered_resps" in fields and {"submission", "doc", "target"} & fields:
        return SAMPLES
    if "index" in fields and ("model_output" in fields or ({"choices", "raw_input"} <= fields)):
        return EVALSCOPE
    if {"index", "sample_score"} <= fields:
        fix = "pass the file of the same name under predictions"
        raise UserError("the row is of EvalScope's reviews, which are scored already", where=where, fix=fix)
    if fields == _MME_FIELDS:
        return MME
    if fields == _IMAGE_AND_ANSWER:
        return BY_IMAGE
    words = [name for name in WORDS_FIELDS if name in fields]
    ids = [name for name in ID_FIELDS if name in fields]
    if "answer" in fields and not words and any(name in fields for name in _ANNOTATED_FIELDS):
        return INTERNVL
    if "prediction" in words and "index" in ids:
        return VLMEVALKIT
    if ids and len(words) > 1:
        raise _ambiguous(words, where, ids[0])
    if ids and "text" in words and "answer" in fields:
        raise _ambiguous(["text", "answer"], where, ids[0])
    if "question_id" in ids and "text" in words:
        return LLAVA
    if ids and words:
        return f"{ids[0]} and {words[0]}"
    return ANSWERS if fields == _DOCVQA or ("question_id" in ids and {"answer", "error"} & fields) else None


def _ambiguous(names: Sequence[str], where: str, id_field: str) -> UserError:
    what = f"the row does not tell which of {' and '.join(names)} the model said, and which is annotated"
    return UserError(what, where=where, fix=f"say so: --columns id={id_field},answer={names[0]}")


def _answer(row: dict[str, Any], where: str, layout: str, empty: str | None) -> Answer:
    if layout == SAMPLES:
        return _sample(row, where)
    if layout == EVALSCOPE:
        return _evalscope(row, where)
    if layout == MME:
        words = _words(row["prediction"], where, empty)
        return Answer(where, None, words, asked=row["question"], image=row["image"])
    if layout == BY_IMAGE:
        return Answer(where, None, _words(row["answer"], where, empty), image=_image(row["image"], where))
    if layout == INTERNVL:
        ids = [_id(row[name], where) for name in ID_FIELDS if name in row]
        asked, image = _first(row, _ASKED_FIELDS), _first(row, _IMAGE_FIELDS)
        return Answer(where, ids[0] if ids else None, _words(row["answer"], where, None), asked=asked, image=image)
    if layout == ANSWERS:
        # what else stands in a row stays: the browser shows some of it
        words = _words(row.get("answer"), where, None)
        question_id = _id(row["questionId" if row.keys() == _DOCVQA else "question_id"], where)
        asked, image = _first(row, ("question",)), _first(row, _IMAGE_FIELDS)
        return Answer(where, question_id, words, str(row.get("error", NO_ANSWER)), asked=asked, image=image, row=row)
    words_field = "text" if layout == LLAVA else next(name for name in WORDS_FIELDS if name in row)
    ids = [row[name] for name in ID_FIELDS if row.get(name) not in (None, "")]
    question_id = _id(ids[0] if ids else next(row[name] for name in ID_FIELDS if name in row), where)
    asked, image = _first(row, _ASKED_FIELDS), _first(row, _IMAGE_FIELDS)
    words = _words(row[words_field], where, empty)
    if layout == LLAVA:
        return Answer(where, question_id, words, asked=asked, image=image, id_may_be_image=True)
    if layout == VLMEVALKIT and words is not None and words.startswith(VLMEVALKIT_FAILED):
        return Answer(where, question_id, None, words, asked=asked)
    return Answer(where, question_id, words, asked=asked, image=None if layout == VLMEVALKIT else image)


def _with_category(answer: Answer, row: Mapping[str, Any]) -> Answer:
    category = row.get("category")
    return replace(answer, category=category) if isinstance(category, str) and category else answer


def _called(reading: Reading) -> str:
    return f"columns {', '.join(f'{part}={name}' for part, name in reading.columns.items())}"


def _by_columns(row: dict[str, Any], where: str, reading: Reading, empty: str | None) -> Answer:
    columns = reading.columns
    said = {part: value_at(row, name, _ABSENT) for part, name in columns.items()}
    lacking = [name for part, name in columns.items() if said[part] is _ABSENT]
    if lacking:
        what = f"no {', '.join(lacking)}: the row has {', '.join(map(str, row)) or 'nothing'}"
        raise UserError(what, where=where, fix="name fields of the rows in --columns")
    words = _words(said["answer"], where, empty)
    question_id = _id(said["id"], where) if "id" in columns else None
    asked, image = (str(said[part]) if part in columns else None for part in ("question", "image"))
    return Answer(where, question_id, words, asked=asked, image=image)


def _sample(row: dict[str, Any], where: str) -> Answer:
    answer = row["filtered_resps"]
    while isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    holders = [value for value in row.values() if isinstance(value, dict)]
    named = [holder[name] for holder in holders for name in ID_FIELDS if name in holder]
    doc, submitted = row.get("doc"), row.get("submission")
    image = _first(submitted, ("image",)) if isinstance(submitted, dict) else None  # VizWiz's server takes no ids
    if image is not None and Path(Path(image).stem).suffix == Path(image).suffix:
        image = Path(image).stem  # it adds .jpg to ids, which may end with it already
    # since its 0.4 lmms-eval keeps the prompt (input) and drops the question (doc)
    is_bare = not isinstance(doc, dict) and ("submission" not in row or image is not None)
    asked = doc.get("question") if isinstance(doc, dict) else row.get("input") if is_bare else None
    if ("submission" in row and not named and image is None) or not isinstance(answer, str) or not (named or asked):
        fix = "pass the samples of a generation task, as --log_samples writes them"
        raise UserError("no question_id in submission, or not one text in filtered_resps", where=where, fix=fix)
    question_id = _id(named[0], where) if named else None
    number = row.get("doc_id")
    return Answer(
        where,
        question_id,
        answer,
        asked=asked if isinstance(asked, str) else None,
        image=image,
        id_may_be_image=asked is not None and Path(str(question_id)).suffix != "",  # MME's is
        number=number if asked is not None and image is None and isinstance(number, int) else None,
    )


def _evalscope(row: dict[str, Any], where: str) -> Answer:
    output = row.get("model_output") or row
    try:
        said = _message_text(output["choices"][0]["message"]["content"])
        asked = [
            _message_text(message["content"]) for message in row.get("messages") or [] if message["role"] == "user"
        ]
    except (KeyError, IndexError, TypeError) as error:
        raise UserError("no text of the model in choices", where=where, fix="pass EvalScope's predictions") from error
    index = _id(row["index"], where)
    number = index if isinstance(index, int) else None
    return Answer(
        where,
        index,
        said,
        asked=asked[0] if asked else None,
        number=number,
        number_may_be_in_category=number is not None,
    )


def _message_text(content: Any) -> str:
    parts = content if isinstance(content, list) else [content]
    return "\n".join(part if isinstance(part, str) else part["text"] for part in parts if _has_text(part))


def _has_text(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("text"), str))


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((str(row[name]) for name in names if isinstance(row.get(name), str | int) and row[name] != ""), None)


def _id(value: Any, where: str) -> int | str:
    return plain_id(value, where, "question_id or index")


def _image(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"the image is {value!r:.80}", where=where, fix="give its file's name")
    return value


def _words(value: Any, where: str, empty: str | None) -> str | None:
    """The model's words; None where there is no answer, as JSON's null and NaN say."""
    if value is None:
        return empty
    return None if isinstance(value, float) and math.isnan(value) else _text(value, where)


def _text(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"the answer is {value!r:.80}", where=where, fix="give a text")
    return number_or_text(value)
