"""Multiple choice as lmms-eval reads it from answers to MMStar, AI2D and RealWorldQA.

| rule                    | definition read from                                                                     |
|-------------------------|------------------------------------------------------------------------------------------|
| `mmstar`                | MMStar's own, and lmms-eval's `tasks/mmstar/utils.py` until April 2026                   |
| `lmms-eval-ai2d`        | lmms-eval: `tasks/ai2d/utils.py`, then `exact_match` without case and punctuation        |
| `lmms-eval-realworldqa` | lmms-eval: `tasks/realworldqa/utils.py` until April 2026, then `exact_match` in that way |
| `lmms-eval-2026`        | lmms-eval: `tasks/_task_utils/mcq_extract.py`, since April 2026                          |
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

from llava_llama31.trainer.evaluation.metrics.text import WITHOUT_PUNCTUATION
from llava_llama31.trainer.evaluation.vqa_accuracy import NUMBER_WORDS


RULES: Mapping[str, str] = MappingProxyType(
    {
        "mmstar": "the first character in either case, or the one after '(', 'option ' or 'the answer is '",
        "lmms-eval-ai2d": "a capital letter with '.' after it at the start, or the letter alone",
        "lmms-eval-realworldqa": "the first option whose text occurs in the answer, or the letter alone",
        "lmms-eval-2026": "the letter at the start, else the end, else the last after 'answer is' or the like, else "
        "the last '(X)', 'X.', 'X:', 'X)' or 'X '",
    }
)

_LEADS_OF_MMSTAR = ("(", "option ", "the answer is ")
_LETTER_AND_PERIOD = re.compile(r"\s*([A-Z])\.")
_MARKS = re.compile(r"[^\w\s]")
_DIGITS = {word: digit for word, digit in NUMBER_WORDS.items() if word != "none"}
_STRIPPED = ",.!?;:'\""
# lmms-eval looks for these alone, whatever the question's options are
_LETTERS = "ABCD"
_NAMED = [*("answer", "correct answer", "best answer"), *("correct option", "best option", "choice", "correct choice")]
_PHRASES = (
    *(f"{article}{named} is" for named in _NAMED for article in ("the ", "")),
    *("my answer is", "my choice is", "i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
# what stands around a letter, the stronger sign first
_FORMS = ("({})", "{}.", "{}:", "{})", "{} ", "{}")


def chosen_letter_of_lmms_eval(prediction: str, options: Mapping[str, str], rule: str) -> str:
    """The letter of the option that a prediction chooses; empty where it chooses none.

    Args:
        prediction: the model's answer.
        options: letter -> text.
        rule: one of RULES.
    """
    if rule == "lmms-eval-2026":
        letter = _extracted(prediction)
        return letter if letter in options else ""
    if rule == "mmstar":
        said = _of_mmstar(prediction.lower().replace("\n", " ").strip(), options)
    elif rule == "lmms-eval-ai2d":
        found = _LETTER_AND_PERIOD.match(prediction)
        said = found[1] if found else prediction
    else:
        said = plain_answer(prediction)
        # of two texts at one place the first option's counts, and of two options of one text the last
        letters = {text: letter for letter, text in sorted(options.items())}
        places = [(said.find(text), number, text) for number, text in enumerate(letters) if text and text in said]
        said = letters[min(places)[2]] if places else said
    form = said.lower().translate(WITHOUT_PUNCTUATION)
    return next((letter for letter in options if letter.lower() == form), "")


def open_answer_is_right(prediction: str, answer: str, rule: str) -> bool:
    """Whether the answer to a question without options is the annotated one."""
    if rule == "lmms-eval-2026":
        return prediction.lower().strip().rstrip(".") == answer.strip().lower()
    said = plain_answer(prediction) if rule == "lmms-eval-realworldqa" else prediction
    return said.lower().translate(WITHOUT_PUNCTUATION) == answer.lower().translate(WITHOUT_PUNCTUATION)


def plain_answer(prediction: str) -> str:
    """A prediction without marks; a number word alone becomes its digits."""
    return _MARKS.sub("", _DIGITS.get(prediction.lower(), prediction)).strip()


def _of_mmstar(said: str, options: Mapping[str, str]) -> str:
    letters = {letter.lower() for letter in options}
    if said[:1] in letters:
        return said[:1]
    lead = next((lead for lead in _LEADS_OF_MMSTAR if said.startswith(lead)), "")
    return said[len(lead) : len(lead) + 1] if lead else ""


def _extracted(prediction: str) -> str:
    text = prediction.strip()
    for mark in _STRIPPED:
        text = text.strip(mark)
    bare, text = text.strip(), f" {text} "
    for letter in _LETTERS:
        if bare.startswith(letter) and not bare[1:2].isalpha():
            return letter
    for letter in _LETTERS:
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            return letter
    lower = text.lower()
    ends = [lower.find(phrase) + len(phrase) for phrase in _PHRASES if phrase in lower]
    found = [(text.find(letter, end), letter) for end in ends for letter in _LETTERS]
    if (last := max(found, default=(-1, ""))) and last[0] >= 0:
        return last[1]
    for form in _FORMS:
        place, letter = max((text.rfind(form.format(letter)), letter) for letter in _LETTERS)
        if place >= 0:
            return letter
    return ""
