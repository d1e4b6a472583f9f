"""Open questions among multiple-choice ones, as MMMU has them.

Definitions read from:
- MMMU (Yue et al., 2024): `mmmu/utils/eval_utils.py`; lmms-eval took it over; from June 2025 on it found
  no answer right, as it compared the answer's characters one by one, and its 0.7.3 compares as MMMU does again
- VLMEvalKit: `MMMU_preproc` of `vlmeval/dataset/utils/multiple_choice.py`
"""

import re

from llava_llama31.trainer.evaluation.metrics.choices import chosen_letter


# what VLMEvalKit makes the options of an open question: the annotated answer as A, and this as B
OTHER_ANSWERS = "Other Answers"
# an answer may follow one of these words, and in the last line an equals sign
_LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = set(":,.!?;'")
# numbers with separators of thousands, with exponents, and plain ones
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def open_as_choice(prediction: str, answer: str, rule: str) -> float:
    """1 if the prediction chooses the annotated answer rather than `Other Answers`, by VLMEvalKit's `rule`, else 0."""
    return float(chosen_letter(prediction, {"A": answer, "B": OTHER_ANSWERS}, rule) == "A")


def open_match(prediction: str, answer: str) -> float:
    """1 if the prediction's conclusion holds the annotated answer as a text, or its number, else 0.

    Numbers are compared after rounding to two decimals, separators of thousands do not count; a text of one character
    has to stand beside a space.
    """
    wanted = _forms(answer)
    parts = _conclusions(prediction)
    found = [number for part in parts for pattern in _NUMBERS for number in pattern.findall(part)]
    for said in (form for text in [*parts, *found] for form in _forms(text)):
        if isinstance(said, float):
            if said in [number for number in wanted if isinstance(number, float)]:
                return 1.0
        elif any(text in said for text in wanted if isinstance(text, str)):
            return 1.0
    return 0.0


def _conclusions(prediction: str) -> list[str]:
    """What follows the last lead of each line, the shortest where several leads occur; without any, the whole text."""
    text = prediction.strip().strip(".").lower()
    lines = text.split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        shortest = ""
        for lead in (*_LEADS, "=") if number == len(lines) else _LEADS:
            tail = line.split(lead)[-1].strip()
            if lead in line and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in _TRIVIAL:
            found.append(shortest)
    return found or [text]


def _forms(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]
