"""Answers that are texts: equality, containment, ANLS, and error rates of characters and words.

| function          | measure                             | source                                                    |
|-------------------|-------------------------------------|-----------------------------------------------------------|
| `exact_match`     | equality after a named rule         | GQA (Hudson and Manning, 2019), LLaVA, lmms-eval          |
| `contains_answer` | the answer occurs in the prediction | OCRBench (Liu et al., 2023), VLMEvalKit, lmms-eval        |
| `anls`            | normalised Levenshtein similarity   | ST-VQA (Biten et al., 2019), DocVQA (Mathew et al., 2021) |
| `error_counts`    | edits and length, for CER and WER   | Levenshtein (1966); summed edits over summed lengths      |
"""

import string
from collections.abc import Mapping, Sequence
from types import MappingProxyType


WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)

EXACT_PROTOCOLS: Mapping[str, str] = MappingProxyType(
    {
        "verbatim": "the texts as they stand, without white space around them",
        "ignore-case": "lower case, white space around them removed (VLMEvalKit's `accuracy`)",
        "llava-gqa": "LLaVA's scripts/convert_gqa_for_eval.py: periods at the end removed, lower case",
        "lmms-eval": "lmms-eval's exact_match with ignore_case and ignore_punctuation: lower case, ASCII punctuation "
        "deleted",
    }
)

ANLS_THRESHOLD = 0.5
ANLS_PROTOCOLS: Mapping[str, str] = MappingProxyType(
    {
        "paper": "Biten et al., 2019, equation 1: a similarity counts only where the distance is below 0.5",
        "vlmevalkit": "VLMEvalKit's vlmeval/dataset/utils/vqa_eval.py: a similarity of exactly 0.5 counts too, and "
        "the distance is divided by the length before white space is collapsed, in upper case",
        "lmms-eval": "lmms-eval's api/metrics.py, after Qwen-VL: the same",
        "evalscope": "EvalScope's metrics/nlp/metrics.py: a similarity of exactly 0.5 counts; divided by the length "
        "after white space is collapsed",
    }
)


def exact_match(prediction: str, answers: Sequence[str], protocol: str = "verbatim") -> float:
    """1 if the prediction equals one of the answers, else 0.

    Raises:
        ValueError: no protocol of EXACT_PROTOCOLS has that name.
    """
    wanted = _exact_form(prediction, protocol)
    return float(any(_exact_form(answer, protocol) == wanted for answer in answers))


def _exact_form(text: str, protocol: str) -> str:
    if protocol == "verbatim":
        return text.strip()
    if protocol == "ignore-case":
        return text.strip().lower()
    if protocol == "llava-gqa":
        return text.rstrip(".").lower()
    if protocol == "lmms-eval":
        return text.lower().translate(WITHOUT_PUNCTUATION)
    raise _unknown(protocol, EXACT_PROTOCOLS)


def contains_answer(prediction: str, answers: Sequence[str], *, formula: bool = False) -> float:
    """1 if one of the answers occurs in the prediction, else 0.

    Args:
        prediction: the model's answer.
        answers: accepted texts.
        formula: case counts and spaces do not, as OCRBench compares handwritten formulas.
    """
    wanted = _contained_form(prediction, formula)
    return float(any(_contained_form(answer, formula) in wanted for answer in answers))


def _contained_form(text: str, formula: bool) -> str:
    if formula:
        return text.strip().replace("\n", " ").replace(" ", "")
    return text.lower().strip().replace("\n", " ")


def anls(prediction: str, answers: Sequence[str], protocol: str = "vlmevalkit") -> float:
    """Average normalised Levenshtein similarity of one question, in [0, 1]: that of the nearest answer.

    Lower case, runs of white space as one space; below the threshold of 0.5 the score is 0.

    Raises:
        ValueError: there is no answer, or no protocol of ANLS_PROTOCOLS has that name.
    """
    if protocol not in ANLS_PROTOCOLS:
        raise _unknown(protocol, ANLS_PROTOCOLS)
    if not answers:
        raise ValueError("a question without answers cannot be scored")
    distance = min(_normalized_distance(prediction, answer, protocol) for answer in answers)
    counts = distance < ANLS_THRESHOLD if protocol == "paper" else 1 - distance >= ANLS_THRESHOLD
    return 1 - distance if counts else 0.0


def _normalized_distance(prediction: str, answer: str, protocol: str) -> float:
    said, wanted = (" ".join(text.lower().split()) for text in (prediction, answer))
    length = max(len(said), len(wanted))
    if protocol in ("vlmevalkit", "lmms-eval"):
        length = max(len(prediction.upper()), len(answer.upper()))
    if abs(len(said) - len(wanted)) > length * ANLS_THRESHOLD:
        return 1.0  # it is no less than the difference of the lengths, and then the score is 0
    # lower case can be longer than upper case
    return min(1.0, edit_distance(said, wanted) / length) if length else 0.0


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Fewest insertions, deletions and substitutions that make one sequence of the other (Levenshtein, 1966)."""
    if first == second:
        return 0
    if len(first) > len(second):
        first, second = second, first
    row = list(range(len(first) + 1))
    for i, item in enumerate(second, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(first, 1):
            substituted = diagonal + (item != other)
            diagonal = row[j]
            row[j] = min(substituted, row[j] + 1, row[j - 1] + 1)
    return row[-1]


def error_counts(prediction: str, answers: Sequence[str], unit: str) -> tuple[int, int]:
    """Edits to the nearest answer, and that answer's length, both in characters or words.

    Args:
        prediction: the model's answer.
        answers: accepted texts; the one with the lowest rate counts.
        unit: "character", with runs of white space as one space, or "word".

    Raises:
        ValueError: there is no answer, or no such unit.
    """
    if unit not in ("character", "word"):
        raise ValueError(f"no unit is named {unit!r}; there are character, word")
    if not answers:
        raise ValueError("a question without answers cannot be scored")
    said = _units(prediction, unit)
    counts = [(edit_distance(said, wanted), len(wanted)) for wanted in (_units(answer, unit) for answer in answers)]
    return min(counts, key=lambda pair: pair[0] / max(1, pair[1]))


def _units(text: str, unit: str) -> Sequence[str]:
    words = text.split()
    return words if unit == "word" else " ".join(words)


def _unknown(protocol: str, protocols: Mapping[str, str]) -> ValueError:
    return ValueError(f"no protocol is named {protocol!r}; there are {', '.join(protocols)}")
