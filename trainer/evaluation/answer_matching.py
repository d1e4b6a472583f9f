"""Which question an answer belongs to: by id, by image and prompt, or by text, and never by its position alone."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.questions import IMAGE_SUFFIXES, Question
from llava_llama31.trainer.evaluation.row_files import any_rows, number_or_text


# what evaluators put around a question; a prompt with it asks the same
_INSTRUCTIONS = re.compile(
    r"<image(?: \d+)?>|answer the question using a single word or phrase\.?|answer the question with a single word\.?"
    r"|answer with the option's letter from the given choices directly\.?|please answer yes or no\.?",
    re.IGNORECASE,
)


_IMAGE_SUFFIX = re.compile(f"(?:{'|'.join(map(re.escape, IMAGE_SUFFIXES))})$", re.IGNORECASE)

NO_ANSWER = "no answer"


@dataclass(frozen=True)
class Answer:
    """One answer of a file.

    Args:
        where: file and line.
        question_id: what the row calls its question, or in LLaVA's files its image.
        text: the model's words; None where there are none.
        error: why there are none.
        asked: the question or the whole prompt, where the row says it.
        image: the image's name, where the row says it.
        group: the question's category, where it is known.
        category: what the row itself calls the question's category; it decides where several questions could be meant.
        id_may_be_image: the id is the question's or the image's, as in LLaVA's files.
        number: the question's in the data set, from 0, as in EvalScope's and lmms-eval's files.
        number_may_be_in_category: it is that in the data set or in one category, as in EvalScope's files.
        row: what else of the row is kept.
    """

    where: str
    question_id: int | str | None
    text: str | None
    error: str = NO_ANSWER
    asked: str | None = None
    image: str | None = None
    group: str | None = None
    category: str | None = None
    id_may_be_image: bool = False
    number: int | None = None
    number_may_be_in_category: bool = False
    row: Mapping[str, Any] = field(default_factory=dict)

    def with_row(self, more: Mapping[str, Any]) -> "Answer":
        """The same answer with more that is kept."""
        return replace(self, row={**self.row, **more})

    def under(self, question_id: int | str) -> dict[str, Any]:
        """The row that is scored: {question_id, answer}, or {question_id, answer: None, error}."""
        found: dict[str, Any] = {**self.row, "question_id": question_id, "answer": self.text}
        return found if self.text is not None else found | {"error": self.error}


def match_answers(
    answers: Sequence[Answer], questions: Sequence[Question], path: Path, *, in_order: bool, labels: str | None = None
) -> list[dict[str, Any]]:
    """Rows {question_id, answer} in the order of the file; an id that is not annotated stays as it is.

    1. By id, if the rows that name an annotated one ask what it asks; if none does, by ids that are images with or
       without a suffix, as VizWiz's.
    2. By the number in the data set or in one of its categories, if every row has one and asks the question with it.
    3. By position, if the rows name neither id nor image, are as many as the questions, and each asks the question at
       its position (POPE's own answers).
    4. By image and prompt, or by the text alone where one question only asks it.
    5. `in_order`: by position, if every row asks the question at its position (VLMEvalKit's running numbers).

    Args:
        answers: of one file.
        questions: the annotated ones.
        path: the file.
        in_order: the fifth rule applies, and not the fourth.
        labels: the revision of the annotations that is meant, for errors.

    Raises:
        UserError: none of these fits all rows.
    """
    if named := _ids_by_name(answers, questions):
        return [answer.under(question_id) for answer, question_id in zip(answers, named, strict=True)]
    if _ids_fit(answers, questions, running=in_order):
        return [answer.under("" if answer.question_id is None else answer.question_id) for answer in answers]
    ids = _ids_by_number(answers, questions, path) or _ids_by_place(answers, questions)
    if not ids:
        ids = _ids_by_order(answers, questions, path) if in_order else _ids_by_content(answers, questions, labels)
    return [answer.under(question_id) for answer, question_id in zip(answers, ids, strict=True)]


def place_answers(answers: Sequence[Answer], questions: str | Path) -> list[Answer]:
    """Answers with the image, the text and the category that LLaVA's question file has for their ids.

    The ids stay: where they are the annotated ones too, they tell apart what is asked twice of an image, as in GQA.
    Answers without an id name their images themselves.

    Raises:
        UserError: an id is not in the file, or its prompt is not what the file asks there.
    """
    path = Path(questions)
    asked: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for where, row in any_rows(path):
        if not {"question_id", "image", "text"} <= row.keys():
            fix = "LLaVA's question files have question_id, image and text; pass labels as --annotations"
            raise UserError(f"the row has {', '.join(row) or 'nothing'}", where=where, fix=fix)
        asked[number_or_text(row["question_id"])].append(row)
    placed = []
    for answer in answers:
        if answer.question_id is None:
            placed.append(answer)
            continue
        rows = asked[str(answer.question_id)]
        if answer.asked is not None:
            same = [row for row in rows if question_key(str(row["text"])) == question_key(answer.asked)]
            rows = same or [row for row in rows if asks(answer.asked, str(row["text"]))]
        if len(rows) != 1:
            what = f"question_id {answer.question_id} asks {answer.asked!r:.80}; {path.name} has {len(rows)} such rows"
            raise UserError(what, where=answer.where, fix="pass the questions that the answers were made for")
        group = rows[0].get("category")
        image, text = str(rows[0]["image"]), str(rows[0]["text"])
        placed.append(replace(answer, image=image, asked=text, group=group))
    return placed


def refuse_questions(
    answers: Sequence[Answer], rows: Sequence[Mapping[str, Any]], questions: Sequence[Question], path: Path
) -> None:
    """Refuse a file of questions or labels, whose `text` LLaVA and POPE call as LLaVA calls an answer.

    Args:
        answers: of the file.
        rows: what each of them became.
        questions: the annotated ones.
        path: the file.

    Raises:
        UserError: every row names an image and no prompt, and says a question.
    """
    annotated = {str(question.question_id): question.question for question in questions}

    def is_question(answer: Answer, question: str | None) -> bool:
        names_image = answer.asked is None and answer.image is not None
        said = answer.text or ""
        return names_image and (question_key(said) in keys or (question is not None and asks(said, question)))

    keys = {question_key(question.question) for question in questions}
    pairs = zip(answers, (annotated.get(str(row["question_id"])) for row in rows), strict=True)
    if all(is_question(answer, question) for answer, question in pairs):
        what = f"these are questions: the text of each row is one, the first {answers[0].text!r:.80}"
        raise UserError(what, where=str(path), fix="pass the model's answers, and this file as --questions")


@lru_cache(maxsize=1 << 16)
def question_key(text: str) -> str:
    """What is compared of a question: its words without instructions, in lower case."""
    return " ".join(_INSTRUCTIONS.sub(" ", unicodedata.normalize("NFC", text)).split()).casefold()


def asks(prompt: str, question: str) -> bool:
    """Whether a prompt asks a question: it is the question, or holds it between other words."""
    said, wanted = question_key(prompt), question_key(question)
    start = said.find(wanted)
    while start >= 0 and wanted:
        end = start + len(wanted)
        if not (said[start - 1 : start].isalnum() and wanted[0].isalnum()) and not (
            said[end : end + 1].isalnum() and wanted[-1].isalnum()
        ):
            return True
        start = said.find(wanted, start + 1)
    return said == wanted


def image_key(image: str) -> str:
    """What is compared of an image's name: neither folder nor suffix."""
    # macOS takes the accents of file names apart
    name = unicodedata.normalize("NFC", image).replace("\\", "/").rsplit("/", 1)[-1]
    stem, dot, suffix = name.rpartition(".")
    return (stem if dot and suffix.isalnum() and len(suffix) <= 4 else name).casefold()


def _ids_fit(answers: Sequence[Answer], questions: Sequence[Question], *, running: bool) -> bool:
    """Whether the ids are those of the questions; `running` ones may happen to be those of others."""
    if all(answer.question_id is None or answer.number_may_be_in_category for answer in answers):
        return False
    # POPE's ids start again in each category; the numbers do not
    if all(answer.number is not None for answer in answers) and _repeats(answers):
        return False
    annotated = {str(question.question_id): question for question in questions}
    pairs = [(annotated.get(str(answer.question_id)), answer) for answer in answers]
    known = [question is not None for question, _ in pairs]
    if all(answer.asked is None for answer in answers) and not running:
        images = {image_key(question.image_id) for question in questions}
        return any(known) or not any(_image(answer) in images for answer in answers)
    return any(known) and all(_fits(answer, question, unsaid=all(known)) for question, answer in pairs)


def _ids_by_name(answers: Sequence[Answer], questions: Sequence[Question]) -> list[int | str]:
    """The annotated ids that are the rows' but for an image's suffix; none if a row's is not, or asks otherwise."""
    annotated = {str(question.question_id) for question in questions}
    if any(str(answer.question_id) in annotated for answer in answers):
        return []
    by_name = {_IMAGE_SUFFIX.sub("", str(question.question_id)): question for question in questions}
    ids: list[int | str] = []
    for answer in answers:
        question = by_name.get(_IMAGE_SUFFIX.sub("", str(answer.question_id)))
        if question is None or not (answer.asked is None or asks(answer.asked, question.question)):
            return []
        ids.append(question.question_id)
    return ids if len(by_name) == len(questions) else []


def _repeats(answers: Sequence[Answer]) -> bool:
    return len({str(answer.question_id) for answer in answers}) < len(answers)


def _fits(answer: Answer, question: Question | None, *, unsaid: bool) -> bool:
    """Whether an answer may be one to an annotated question, or to one that is not annotated."""
    if answer.asked is None:
        return unsaid  # taken at its word only if no id is unknown
    return question is None or asks(answer.asked, question.question)


def _ids_by_number(answers: Sequence[Answer], questions: Sequence[Question], path: Path) -> list[int | str]:
    """The ids of the questions with the rows' numbers, in the data set or in one category.

    EvalScope writes a file for each category, and lmms-eval has tasks of one category, such as pope_pop. None if a row
    does not ask the one with its number. Where several categories ask the same, the file's name decides, which
    EvalScope ends with the category's.

    Raises:
        UserError: it does not.
    """
    if any(answer.number is None for answer in answers):
        return []
    found = [fitting] if (fitting := _numbered(answers, dict(enumerate(questions)))) else []
    in_category = all(answer.number_may_be_in_category for answer in answers)
    if in_category or not (found or any(answer.id_may_be_image for answer in answers)):
        parts: dict[str, list[Question]] = defaultdict(list)
        for question in questions:
            for group in question.groups:
                parts[group].append(question)
        by_group = {group: _numbered(answers, dict(enumerate(part))) for group, part in parts.items()}
        by_id = {question.question_id: question for question in questions if isinstance(question.question_id, int)}
        by_id = by_id if in_category else {}
        found += [fitting for fitting in (_numbered(answers, by_id), *by_group.values()) if fitting]
        named = [fitting for group, fitting in by_group.items() if fitting and path.stem.endswith(f"_{group}")]
        found = named or found
    same = {
        tuple((question.question, question.image_id, question.answers) for question in fitting) for fitting in found
    }
    if len(same) > 1 and not in_category:
        return []
    if len(same) > 1:
        what = "several categories ask what the rows ask, in the same order"
        fix = (
            "name the file as EvalScope does, with the category at its end, or pass that category's annotations alone"
        )
        raise UserError(what, where=str(path), fix=fix)
    return [question.question_id for question in found[0]] if found else []


def _numbered(answers: Sequence[Answer], numbered: Mapping[int, Question]) -> list[Question]:
    found = []
    for answer in answers:
        question = None if answer.number is None else numbered.get(answer.number)
        if question is None or not asks(answer.asked or "", question.question):
            return []
        found.append(question)
    return found


def _ids_by_place(answers: Sequence[Answer], questions: Sequence[Question]) -> list[int | str]:
    """The ids of the questions at the rows' places; none if a row says more than a question, or asks another one."""
    if len(answers) != len(questions):
        return []
    fit = all(
        answer.question_id is None
        and answer.image is None
        and answer.asked is not None
        and question_key(answer.asked) == question_key(question.question)
        for answer, question in zip(answers, questions, strict=True)
    )
    return [question.question_id for question in questions] if fit else []


def _ids_by_order(answers: Sequence[Answer], questions: Sequence[Question], path: Path) -> list[int | str]:
    what = "the indices are not the annotated question_ids, and the rows do not ask the annotated questions in order"
    fix = "pass the annotations that the answers were made for, or give the rows a column question_id"
    if len(answers) > len(questions):
        raise UserError(f"{what}: {len(answers)} rows for {len(questions)} questions", where=str(path), fix=fix)
    for question, answer in zip(questions, answers, strict=False):
        if answer.asked is None or question_key(answer.asked) != question_key(question.question):
            asked = f"{answer.asked!r:.80} instead of {question.question!r:.80}"
            raise UserError(f"{what}: {asked}", where=answer.where, fix=fix)
    return [question.question_id for question in questions[: len(answers)]]


def _ids_by_content(answers: Sequence[Answer], questions: Sequence[Question], labels: str | None) -> list[int | str]:
    by_image: dict[str | None, list[Question]] = defaultdict(list)
    by_text: dict[str, list[Question]] = defaultdict(list)
    by_id: dict[str | None, list[Question]] = defaultdict(list)
    named = {group for question in questions for group in question.groups}
    if not any(answer.group in named for answer in answers):  # LLaVA's files say `default` where there are none
        answers = [replace(answer, group=None) for answer in answers]
    for question in questions:
        by_image[image_key(question.image_id)].append(question)
        by_text[question_key(question.question)].append(question)
        if not question.image_id:  # VizWiz's ids are its images
            by_id[image_key(str(question.question_id))].append(question)
    ids: list[int | str] = []
    strangers: list[Answer] = []
    for answer in answers:
        candidates: Iterable[Question] = by_image.get(_image(answer), ())
        if answer.image is None and not candidates and answer.asked is not None:
            candidates = by_text.get(question_key(answer.asked), ())
        if answer.image is not None and not candidates:
            candidates = by_id.get(_image(answer), ())
        found = _asked_of(answer, candidates)
        if len(found) > 1:
            what = f"{len(found)} annotated questions could be meant by {_said(answer)}"
            fix = "give the rows question_ids, or the prompt and the image"
            groups = list(dict.fromkeys(group for question in found for group in question.groups))
            if answer.image is not None and answer.asked is not None and len(groups) == len(found):
                unsaid, other = "the answers do not say the", f"{answer.category!r:.40} is no such"
                fix = f"{unsaid if answer.category is None else other} category"
                fix = f"{fix}: pass the annotations of {' or '.join(groups)} alone"
            elif answer.id_may_be_image and answer.image is None:
                fix = "pass the questions that LLaVA's scripts asked as --questions: they say the image"
            raise UserError(what, where=answer.where, fix=fix)
        if found:
            ids.append(found[0].question_id)
        else:
            strangers.append(answer)
    if strangers:
        first = strangers[0]
        what = f"{len(strangers)} of {len(answers)} answers are to questions that are not annotated"
        what = f"{what}, the first {_said(first)}"
        fix = f"pass the annotations that the answers were made for{f': {labels}' if labels else ''}"
        if first.question_id is None and first.image is None and first.asked is None:
            what, fix = "the row does not say which question it answers", "name a field that does: --columns id=FIELD"
        raise UserError(what, where=first.where, fix=fix)
    return ids


def _image(answer: Answer) -> str | None:
    """The key of the image that an answer names."""
    name = str(answer.question_id) if answer.image is None and answer.id_may_be_image else answer.image
    return None if name is None else image_key(name)


def _said(answer: Answer) -> str:
    """What an answer says of its question."""
    image = f"image {answer.image!r:.80}" if answer.image is not None else f"id {answer.question_id!r:.80}"
    return image if answer.asked is None else f"{answer.asked!r:.80} about {image}"


def _asked_of(answer: Answer, candidates: Iterable[Question]) -> list[Question]:
    """The questions among candidates that an answer may belong to; the longest where one holds another."""
    image = str(answer.image or answer.question_id)
    found = [question for question in candidates if _same_folders(image, question.image_id)]
    if answer.group is not None:
        found = [question for question in found if answer.group in question.groups]
    if answer.asked is not None:
        found = [question for question in found if asks(answer.asked, question.question)]
    if len(found) > 1 and answer.asked is not None:
        longest = max(len(question_key(question.question)) for question in found)
        found = [question for question in found if len(question_key(question.question)) == longest]
    if len(found) > 1:
        found = [question for question in found if set(question.groups) & _folders(image)] or found
    if len(found) > 1:
        found = [question for question in found if answer.category in question.groups] or found
    return found


def _folders(image: str) -> set[str]:
    return set(image.replace("\\", "/").split("/")[:-1])


def _same_folders(image: str, other: str) -> bool:
    """Whether two names may be of one image: each may leave out folders that the other has."""
    first, second = _folders(image), _folders(other)
    return first <= second or second <= first
