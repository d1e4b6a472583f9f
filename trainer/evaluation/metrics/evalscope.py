"""Answers as EvalScope reads them, whose prompts ask for a last line `ANSWER: ...`.

Definitions read from EvalScope 1.14.1: `utils/multi_choices.py` (the letter and the line), `utils/yes_no.py` and the
benchmarks' adapters. Its earlier versions read some answers otherwise.
"""

import re
from collections.abc import Collection


LABEL = "evalscope"
FOUR_LABELS = "evalscope-four"

_MARKER = re.compile(r"answer\s*:\s*\**\s*", re.IGNORECASE)
# a letter may stand in formulas: `$B$`, `\(B\)`, `\boxed{\text{B}}`
_FORMULA = re.compile(r"(?:(?:\$+|\\\(|\\(?:boxed|fbox|text|textbf|mathbf|mathrm)\s*\{)\s*)*")
_COMMA = ",\uff0c/\u3001"
_IN_BRACKETS = re.compile(
    rf"[(\[\uff08\u3010]\s*([A-Za-z\d](?:\s*[{_COMMA}]\s*[A-Za-z\d])*)\s*[)\]\uff09\u3011]",
)
_PLAIN = re.compile(rf"([A-Za-z\d][A-Za-z\d {_COMMA}]*)")
_WORD = re.compile(r"[A-Za-z\d]+")
_BETWEEN = ("and", "or")
_YES, _NO = re.compile(r"\b(?:Yes|YES)\b"), re.compile(r"\b(?:No|NO)\b")
_BARE = re.compile(r"(yes|no)[.!]?")


def answer_line(prediction: str) -> str | None:
    """What follows the last `ANSWER:` on its line, without bold marks; None where there is none."""
    markers = list(_MARKER.finditer(prediction))
    if not markers:
        return None
    return prediction[markers[-1].end() :].split("\n", 1)[0].strip().strip("*").strip()


def answer_line_or_all(prediction: str) -> str:
    """The answer line, or else the whole prediction."""
    line = answer_line(prediction)
    return prediction.strip() if line is None else line


def chosen_label(prediction: str, letters: Collection[str]) -> str:
    """The letter after the last `ANSWER:` that is followed by letters of options, else the last capital of all.

    Empty where several letters follow, or the last capital is none of them.
    """
    for marker in reversed(list(_MARKER.finditer(prediction))):
        tail = prediction[marker.end() :]
        formula = _FORMULA.match(tail)
        tail = tail[formula.end() if formula else 0 :]
        for form in (_IN_BRACKETS, _PLAIN):
            found = form.match(tail)
            labels = _leading_labels(found[1], letters) if found else []
            if labels:
                return labels[0] if len(labels) == 1 and labels[0] in letters else ""
    last = next((mark for mark in reversed(prediction) if mark.isupper()), "")
    return last if last in letters else ""


def _leading_labels(text: str, letters: Collection[str]) -> list[str]:
    """The words at the start that hold nothing but letters of options; `and` and `or` may stand between two."""
    words = _WORD.findall(text)
    labels: list[str] = []
    for number, word in enumerate(words):
        following = words[number + 1 : number + 2]
        if set(word) <= set(letters):
            labels.append(word)
        elif not (labels and word.lower() in _BETWEEN and following and set(following[0]) <= set(letters)):
            break
    return labels


def verdict(prediction: str) -> str:
    """ "yes" or "no" if the prediction has one of Yes, YES, No and NO as a word, or is the lower-case word alone."""
    bare = _BARE.fullmatch(prediction.strip())
    if bare:
        return bare[1]
    says_yes, says_no = bool(_YES.search(prediction)), bool(_NO.search(prediction))
    return "" if says_yes == says_no else "yes" if says_yes else "no"
