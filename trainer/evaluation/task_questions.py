"""Questions of a task from the files in which its benchmark is distributed."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from llava_llama31.trainer.data.sources.data_folders import parquet_folder
from llava_llama31.trainer.data.sources.images import ImageRef
from llava_llama31.trainer.data.sources.remote_files import check_is_path
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.annotated import check_annotated
from llava_llama31.trainer.evaluation.metrics.choices import LETTERS, inline_options
from llava_llama31.trainer.evaluation.metrics.open_answers import OTHER_ANSWERS
from llava_llama31.trainer.evaluation.questions import (
    LONGEST_IMAGE_INDEX,
    ImagePlace,
    Question,
    decoded_base64,
    only_once,
    python_list,
    shared_image,
)
from llava_llama31.trainer.evaluation.row_files import Row, any_rows, number_or_text, plain_id, value_at
from llava_llama31.trainer.evaluation.task_files import PER_QUESTION, Layout, ProtocolOf, Task
from llava_llama31.trainer.recipes.data_formats import MAX_PIXELS


_PLACEHOLDER = re.compile(r"\{([^{}:]+)(?::0(\d+))?\}")
# lmms-eval's number of a question in its data set; its samples have no images, and for some tasks no other name
DOC_ID = "doc_id"
# VLMEvalKit counts the turns of a circular question in millions
_TURNS = 10**6
# MMMU's questions have at most nine
_MOST_OPTIONS = 9


def load_task_questions(
    task: Task,
    source: str | Path | Sequence[Row],
    *,
    image_root: str | Path | None = None,
    max_pixels: int | None = None,
    limit: int | None = None,
    with_images: bool = True,
) -> list[Question]:
    """Read the questions of a task in the order of the file, those without an image too.

    Args:
        task: says where a question's parts are.
        source: file, folder or pattern; or rows that were read before.
        image_root: folder of the images; by default that of `source`.
        max_pixels: of the largest image that is read, height x width.
        limit: read no more than this many.
        with_images: False leaves the images out, as scoring needs none.

    Raises:
        UserError: no layout of the task fits, or a row lacks a part, doubles an id or has an answer of another kind.
    """
    for given in (source, image_root):
        check_is_path(given)
    layout, rows = _rows_of(task, source, with_images)
    if with_images and layout.question is None:
        what = f"{layout.name} has answers without questions"
        raise UserError(what, where=str(source), fix=f"pass the questions of {task.name}")
    path = Path(source) if isinstance(source, str | Path) else Path()
    root = Path(path if path.is_dir() else path.parent) if image_root is None else Path(image_root)
    images: dict[str, tuple[ImageRef, str]] = {}
    numbers: Counter[str] = Counter()
    seen: dict[str, str] = {}
    questions: list[Question] = []
    rows = list(rows)
    holders = {str(row.get(layout.id or "")): row for _, row in rows}
    for where, row in rows if limit is None else rows[:limit]:
        question = _question(task, layout, row, where, numbers)
        check_annotated(task, layout, question, where, normalized=DOC_ID in row)
        if str(question.question_id) in task.listed_twice and str(question.question_id) in seen:
            question = replace(question, question_id=second_id(question.question_id))
        only_once(str(question.question_id), layout.id or "question", where, seen)
        if with_images and question.image_id:
            shown = {"image": _image(layout, row, holders, where)}
            place = ImagePlace(root.resolve(), max_pixels or MAX_PIXELS)
            question = replace(question, image=shared_image(shown, question.image_id, place, where, images))
        questions.append(question)
    if not questions:
        raise UserError("no questions", where=str(path), fix="name a file with at least one question")
    if all(question.left_out for question in questions):
        left_out = ", ".join(f"{name} {' or '.join(_texts(value))}" for name, value in layout.leave_out.items())
        raise UserError(
            f"all rows are of {left_out}, which {task.name} leaves out", where=rows[0][0], fix="name another"
        )
    _all_or_none_annotated(questions, rows[0][0])
    _refuse_other_turns(task, questions, rows[0][0])
    _refuse_without_category(task, questions, rows[0][0])
    _refuse_without_letters(layout, questions, rows[0][0])
    return questions


def _refuse_without_letters(layout: Layout, questions: Sequence[Question], where: str) -> None:
    wrong = without_right_option(questions)
    if 2 * len(wrong) > len(questions):
        what = f"{layout.answer} is {wrong[0].answers[0]!r:.80}, and {len(wrong)} of {len(questions)} are not a letter"
        raise UserError(what, where=where, fix="give the letter of the right option")


def _refuse_other_turns(task: Task, questions: Sequence[Question], where: str) -> None:
    """Refuse turns of one circular question that ask different things: their indices are those of other rows."""
    asked: dict[str, Question] = {}
    for question in questions if task.units == "circular" else ():
        first = asked.setdefault(question.units[0], question)
        if first.question != question.question:
            ids = f"{first.question_id} and {question.question_id}"
            what = f"{ids} are turns of one question by their numbers, and ask {first.question!r:.60} and"
            fix = f"number turns as VLMEvalKit does: the same question again {_TURNS:,} on"
            raise UserError(f"{what} {question.question!r:.60}", where=where, fix=fix)


def turns_note(task: Task, questions: Sequence[Question]) -> str:
    """That no circular question has a second turn, as in a renumbered table; empty where some have."""
    if task.units != "circular" or len({question.units for question in questions}) < len(questions):
        return ""
    what = "no question has a second turn, so each counts by itself and the figure is no circular one"
    return f"{what}: VLMEvalKit's index numbers the turns of a question in steps of {_TURNS:,}"


def second_id(question_id: int | str) -> str:
    """What the second row of a question is called that the benchmark lists twice."""
    return f"{question_id}#2"


def without_right_option(questions: Sequence[Question]) -> list[Question]:
    """Questions whose annotated answer is not the letter of one of their options, so that no answer is right."""
    return [q for q in questions if q.options and q.answers and q.answers[0] not in dict(q.options)]


def counted(task: Task, questions: Sequence[Question]) -> list[Question]:
    """The questions that a task counts: not those of another split, nor those without an image where it needs one."""
    asked = [question for question in questions if not question.left_out]
    return [question for question in asked if question.image_id or not task.only_with_image]


def labels_note(questions: Sequence[Question]) -> str:
    """That some annotated answers are not the letter of an option; empty where all are."""
    wrong = without_right_option(questions)
    if not wrong:
        return ""
    first = f"question {wrong[0].question_id}: {wrong[0].answers[0]!r:.40}"
    what = f"{len(wrong)} annotated answers are not the letter of an option ({first})"
    return f"{what}, so no answer to them is right by a rule that looks for options"


def is_scored(task: Task, questions: Sequence[Question]) -> bool:
    """Whether answers to these questions can be scored: the task has protocols, and the right answers are known."""
    return bool(task.protocols) and any(question.answers for question in questions)


def _all_or_none_annotated(questions: Sequence[Question], where: str) -> None:
    without = [question.question_id for question in questions if not question.answers]
    if without and len(without) < len(questions):
        what = f"{len(without)} of {len(questions)} questions have no annotated answer, the first {without[0]}"
        raise UserError(what, where=where, fix="give all of them one, or none")


def _refuse_without_category(task: Task, questions: Sequence[Question], where: str) -> None:
    """Refuse questions outside the categories that a protocol averages or adds, which would count for nothing."""
    for name, protocol in task.protocols.items():
        if not needs_categories(protocol):
            continue
        added = (
            [part for parts in protocol.sums.values() for part in parts]
            if protocol.headline in protocol.sums
            else None
        )
        for question in questions:
            if not question.groups or (added is not None and not set(added) & set(question.groups)):
                what = f"question {question.question_id} is of category {', '.join(question.groups) or 'none'!r}"
                known = f"one of {', '.join(added)}" if added is not None else "a category"
                what = f"{what}, and {task.name}'s {protocol.headline} by {name} needs {known}"
                raise UserError(what, where=where, fix="pass the benchmark's own file, with its column of categories")


def needs_categories(protocol: ProtocolOf) -> bool:
    """Whether a protocol's headline averages or adds categories, so that a question without one counts for nothing."""
    averages = "groups" in (protocol.over, protocol.weighted) and not protocol.averaged
    return averages or protocol.headline in protocol.sums


def layout_of(task: Task, rows: Sequence[Row]) -> Layout:
    """The layout that an answer file's rows have.

    Raises:
        UserError: they have none of the task's.
    """
    return _layout_of(task, rows, "the answer file")


def holds_questions(task: Task, rows: Sequence[Row], *, annotated: bool = True) -> bool:
    """Whether rows of an answer file hold the questions, as VLMEvalKit's do.

    Args:
        annotated: with their annotated answers.
    """
    layouts = [layout for layout in task.layouts if layout.files is None and (layout.answer or not annotated)]
    if not annotated:
        layouts = [layout.model_copy(update={"answer": None}) for layout in layouts]
    return bool(rows) and any(_fits(layout, rows[0][1]) for layout in layouts)


def _rows_of(task: Task, source: str | Path | Sequence[Row], with_images: bool) -> tuple[Layout, Iterable[Row]]:
    if not isinstance(source, str | Path):
        return _layout_of(task, source, "the answer file"), source
    path = Path(source)
    for layout in task.layouts:
        named = _named_rows(path, layout) if layout.files else []
        if named:
            return layout, named
    named_files = [layout.files for layout in task.layouts if layout.files]
    if named_files and path.is_dir() and not parquet_folder(path):
        what = f"no {' or '.join(named_files)} and no parquet file there"
        raise UserError(what, where=str(path), fix=f"pass the annotations of {task.name}")
    # without an id the image names a question, and it may decide whether one is asked
    needed = {layout.image for layout in task.layouts if with_images or task.only_with_image or layout.id is None}
    unused = [layout.image for layout in task.layouts if layout.image is not None and layout.image not in needed]
    rows = list(any_rows(path, leave_out=unused))
    return _layout_of(task, rows, str(path)), rows


def _layout_of(task: Task, rows: Sequence[Row], where: str) -> Layout:
    first = rows[0][1] if rows else {}
    for layout in task.layouts:
        if layout.files is None and _fits(layout, first):
            _refuse_options(task, layout, first, where)
            return layout
    for layout in task.layouts if task.submission is not None else ():
        # of a split whose answers are not public
        unannotated = layout.model_copy(update={"answer": None})
        if layout.files is None and _fits(unannotated, first):
            return unannotated
    needed = "; ".join(f"{layout.name} has {', '.join(sorted(_names(layout)))}" for layout in task.layouts)
    what = f"these are not questions of {task.name}: the rows have {', '.join(map(str, first)) or 'nothing'}; {needed}"
    raise UserError(what, where=where, fix="pass the task's annotations")


def _refuse_options(task: Task, layout: Layout, row: Mapping[str, Any], where: str) -> None:
    """Refuse multiple-choice rows for a benchmark without options, of which it would compare letters as texts."""
    if task.folder is not None or layout.options is not None:
        return
    # lmms-eval's prompts hold them
    letters = [letter for letter, _ in inline_options(str(row["input"]))] if layout.question == "input" else []
    if all(letter in letters or _field(row, letter) not in (None, "") for letter in "AB"):
        what = f"the rows have options A, B, and questions of {task.name} have none"
        raise UserError(what, where=where, fix="name the task that these questions are of with --task")


def _texts(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _fits(layout: Layout, row: Mapping[str, Any]) -> bool:
    return all(name.split(".")[0] in row for name in _names(layout))


def _names(layout: Layout) -> set[str]:
    """Fields that a row of a layout has, apart from images and categories, which files may leave out."""
    options = [layout.options] if isinstance(layout.options, str) else layout.options or []
    if layout.options in ("columns", "inline", "letters"):
        options = [LETTERS[0]] if layout.options == "columns" else []
    specs = [layout.id, layout.question, layout.answer, *options, *layout.needs]
    return {name for spec in specs if spec for name in ([found[0] for found in _PLACEHOLDER.findall(spec)] or [spec])}


def _named_rows(source: Path, layout: Layout) -> list[Row]:
    """Rows of a file, or of all files of a folder, that have a layout's name, with what the name says."""
    pattern = layout.files or ""
    name = _PLACEHOLDER.search(pattern)
    if name is None:
        raise UserError(f"files is {pattern!r}", where=layout.name, fix="put one field in braces")
    before, after = pattern.split(name[0])
    rows: list[Row] = []
    for path in sorted(source.iterdir()) if source.is_dir() else [source]:
        if path.name.startswith(before) and path.name.endswith(after) and path.is_file():
            value = path.name[len(before) : len(path.name) - len(after)]
            rows += [(where, {name[1]: value} | row) for where, row in any_rows(path, columns=layout.columns)]
    return rows


def _image(layout: Layout, row: Mapping[str, Any], holders: Mapping[str, Mapping[str, Any]], where: str) -> Any:
    """A path or bytes; VLMEvalKit's tables have base64, or the index of the row that has it."""
    image = _field(row, layout.image) if layout.image else None
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if isinstance(image, str) and image in holders and layout.image in row:
        held = holders[image].get(str(layout.image))
        if isinstance(held, str) and held != image and held in holders:
            what = f"image is {image!r}, the index of a row that names row {held}"
            raise UserError(what, where=where, fix="name the row that holds the image")
        image = held
    if isinstance(image, str) and (paths := python_list(image)) is not None:
        raise UserError(f"image lists {len(paths)} images", where=where, fix="give the one of the question")
    if isinstance(image, str) and _is_base64(image):
        return {"bytes": decoded_base64(image, where)}
    named = _field(row, layout.image_key) if layout.image_key and image in (None, "") else None
    return named if isinstance(named, str) and Path(named).suffix else image


def _is_base64(text: str) -> bool:
    return len(text) > LONGEST_IMAGE_INDEX and not Path(text[-LONGEST_IMAGE_INDEX:]).suffix


def _question(task: Task, layout: Layout, row: dict[str, Any], where: str, numbers: Counter[str]) -> Question:
    text = _field(row, layout.question) if layout.question else ""
    if layout.question and (not isinstance(text, str) or not text.strip()):
        raise UserError(f"{layout.question} is {text!r:.80}", where=where, fix="give each question a text")
    text = text.replace("<image>", "").strip()
    if layout.first_line:
        text = text.partition("\n")[0].strip()
    image_id = _image_id(layout, row)
    if layout.id is None and row.get(DOC_ID) is not None:
        question_id: int | str = plain_id(row[DOC_ID], where, DOC_ID)
        image_id = image_id or f"{DOC_ID} {question_id}"
    elif layout.id is None:
        numbers[image_id] += 1
        question_id = f"{image_id}#{numbers[image_id]}"
    else:
        question_id = plain_id(_field(row, layout.id), where, layout.id)
        if not image_id and (layout.all_with_image or not (layout.image or layout.image_key)):
            image_id = str(question_id)
    options = _options(layout, row, text, where)
    answers = _answers(task, layout, row, where)
    if layout.options == "columns" and options == (("A", *answers), ("B", OTHER_ANSWERS)):
        options = ()  # VLMEvalKit's result files show an open question so, with the answer's text and no letter
    context = _filled(layout, row, layout.context) if layout.context else None
    metric = _field(row, layout.metric) if layout.metric else None
    if layout.metric and metric not in PER_QUESTION:
        raise UserError(f"{layout.metric} is {metric!r:.80}", where=where, fix=f"one of {', '.join(PER_QUESTION)}")
    groups = _groups(layout, row)
    named = [group for group in groups if group != metric and group in PER_QUESTION]
    if layout.metric and named:
        what = f"the group {named[0]!r} has the name of a metric, whose questions it would join"
        raise UserError(what, where=where, fix="give the group another name")
    return Question(
        question_id,
        image_id,
        None,
        text,
        answers,
        options=options,
        context="" if context is None else str(context).strip(),
        groups=groups,
        left_out=any(row.get(name) in _texts(value) for name, value in layout.leave_out.items()),
        units=_units(task, question_id, image_id, row),
        metric=str(metric or ""),
        ocr_tokens=tuple(map(str, row["ocr_tokens"])) if isinstance(row.get("ocr_tokens"), list) else None,
    )


def _field(row: Mapping[str, Any], spec: str) -> Any:
    """What a field, a way into the row, or a text with fields in braces says; `{name:012}` pads a number."""
    if _PLACEHOLDER.search(spec):
        return _PLACEHOLDER.sub(lambda found: str(_field(row, found[1])).zfill(int(found[2] or 0)), spec)
    return _said(value_at(row, spec))


def _filled(layout: Layout, row: Mapping[str, Any], spec: str) -> Any:
    """What a field says, or None where it says that it is empty."""
    value = _field(row, spec)
    return None if layout.empty is not None and value == layout.empty else value


def _said(value: Any) -> Any:
    """A value, or None for the NaN that pandas writes into JSON where a cell is empty."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _image_id(layout: Layout, row: Mapping[str, Any]) -> str:
    """The image's name, the hash of its content if it has no name, or an empty string if there is no image."""
    named = _field(row, layout.image_key) if layout.image_key else None
    value = named if named not in (None, "") else _field(row, layout.image) if layout.image else None
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return sha256(value).hexdigest()
    if isinstance(value, str) and _is_base64(value):
        return str(_field(row, layout.id or "")) if layout.id else sha256(value.encode()).hexdigest()
    return "" if value in (None, "") else str(value)


def _options(layout: Layout, row: Mapping[str, Any], question: str, where: str) -> tuple[tuple[str, str], ...]:
    if layout.options is None or any(row.get(name) == value for name, value in layout.without_options.items()):
        return ()
    if layout.options == "letters":
        return tuple((letter, "") for letter in LETTERS[:_MOST_OPTIONS])
    if layout.options == "inline":
        return inline_options(question)
    if layout.options == "columns":
        texts = ((letter, _filled(layout, row, letter)) for letter in LETTERS)
        return tuple((letter, _option(text, where)) for letter, text in texts if text not in (None, ""))
    names = layout.options if isinstance(layout.options, list) else None
    if names is None and isinstance(lettered := _field(row, str(layout.options)), dict):
        return tuple((str(letter), _option(text, where)) for letter, text in lettered.items())
    values = [_field(row, name) for name in names] if names else _listed(_field(row, str(layout.options)))
    if len(values) > len(LETTERS):
        what = f"{len(values)} options, and {len(LETTERS)} letters"
        raise UserError(what, where=where, fix="ask with fewer options")
    # an empty option keeps its letter: the right answer names the letter by its column
    lettered = zip(LETTERS, values, strict=False)
    return tuple((letter, _option(value, where)) for letter, value in lettered if _said(value) not in (None, ""))


def _option(value: Any, where: str) -> str:
    if not isinstance(value, str | int | float):
        raise UserError(f"an option is {value!r:.80}", where=where, fix="give a text; format dates in a table as text")
    return number_or_text(value)


def _answers(task: Task, layout: Layout, row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if layout.answer is None:
        return ()
    value = _field(row, layout.answer)
    if task.submission is not None and value in (None, "", [], "?"):  # MMMU's sign for an answer that is not public
        return ()
    if layout.answer_is == "json" or (layout.metric and isinstance(value, dict)):
        return (value if isinstance(value, str) else json.dumps(value),)
    # MMMU's own labels list several right answers; a text that looks like a list is one answer there
    is_list = layout.answer_is == "texts" or (layout.answer_is == "letter" and isinstance(value, list))
    answers = [] if value is None else _listed(value) if is_list else [value]
    answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    if not answers or any(isinstance(answer, bool) or not isinstance(answer, str | int | float) for answer in answers):
        fix = "give the annotated answer, or a list of them; format dates in a table as text"
        fix = "write it as a text, such as yes or no" if any(isinstance(a, bool) for a in answers) else fix
        raise UserError(f"{layout.answer} is {value!r:.80}", where=where, fix=fix)
    texts = [number_or_text(answer) for answer in answers]
    if layout.answer_is == "letter" or (layout.metric and _field(row, layout.metric) == "choice"):
        return tuple(text.strip() for text in texts)
    if layout.answer_is == "index":
        return (_letter_at(texts[0], layout.answer, where),)
    if layout.answer_is in ("yes_no", "binary"):
        said = texts[0].strip().rstrip(".").lower()
        said = {"1": "yes", "0": "no"}.get(said, "") if layout.answer_is == "binary" else said
        if said not in ("yes", "no"):
            raise UserError(f"{layout.answer} is {value!r:.80}, not yes or no", where=where, fix="give yes or no")
        return (said,)
    return tuple(texts)


def _letter_at(index: str, name: str, where: str) -> str:
    if not index.isascii() or not index.isdigit() or int(index) >= len(LETTERS):
        raise UserError(f"{name} is {index!r}", where=where, fix="give the number of the right option, from 0")
    return LETTERS[int(index)]


def _listed(value: Any) -> list[Any]:
    """A list as it stands or as Python writes it; nothing is executed."""
    if isinstance(value, list | tuple):
        return list(value)
    read = python_list(value) if isinstance(value, str) else None
    return [value] if read is None else read


def _groups(layout: Layout, row: Mapping[str, Any]) -> tuple[str, ...]:
    groups: list[str] = []
    for spec in layout.groups:
        value = _field(row, spec)
        if value not in (None, ""):
            groups += str(value).split(layout.separator) if layout.separator else [str(value)]
    groups += [group for name, group in layout.groups_by_field.items() if name in row]
    return tuple(dict.fromkeys(group.strip() for group in groups))


def _units(task: Task, question_id: int | str, image_id: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    if task.units == "image":
        return (image_id,)
    if task.units == "circular":
        number = str(question_id)
        return (str(int(number) % _TURNS) if number.isascii() and number.isdigit() else number,)
    if task.units == "hallusionbench":
        return _hallusionbench_units(str(question_id), row)
    return ()


def _hallusionbench_units(index: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    """The figure and the question across figures, of `VD_illusion_1_0_0_0` or of the benchmark's own fields."""
    category = row.get("l2-category") or f"{row.get('category')}_{row.get('subcategory')}"
    # a column that was sorted alone has the indices of other rows
    if f"_{category}_" not in f"_{index}" and row.get("l2-category") and row.get("set_id") is None:
        what = f"index {index!r:.80} is not of the row's category {category}"
        raise UserError(what, where="HallusionBench", fix="give each row the index that its question has")
    if row.get("set_id") is not None:
        parts = [str(row.get(name)) for name in ("set_id", "figure_id", "question_id")]
    else:
        parts = index.split("_")[3:6]
    if len(parts) < 3:
        raise UserError(
            f"index {index!r:.80} names no set, figure and question", where="HallusionBench", fix="keep its index"
        )
    return f"{category} {parts[0]} figure {parts[1]}", f"{category} {parts[0]} question {parts[2]}"
