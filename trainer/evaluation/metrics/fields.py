"""JSON answers of documents and receipts: which fields of the annotated object the predicted one has.

The measure is Donut's field-level F1 (Kim et al., 2022, "OCR-free Document Understanding Transformer", section 3.3.2):
both objects are flattened to (path, value) pairs; a pair is right if it occurs on the other side, and a list's order
does not count. F1 = matched / (matched + unmatched pairs of both sides / 2), over all documents together.
"""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from llava_llama31.trainer.strict_json import parse_json


@dataclass(frozen=True)
class FieldCounts:
    """Pairs of one document.

    Args:
        matched: pairs that both sides have.
        missing: pairs of the annotation that the prediction lacks.
        extra: pairs of the prediction that the annotation lacks.
        readable: the prediction holds a JSON object.
    """

    matched: int
    missing: int
    extra: int
    readable: bool

    @property
    def exact(self) -> bool:
        """Whether both sides have the same pairs."""
        return self.readable and not (self.missing or self.extra)

    @property
    def f1(self) -> float:
        """In [0, 1]; 1 where both sides are empty."""
        return field_f1(self.matched, self.missing + self.extra) if self.readable else 0.0


def field_f1(matched: float, unmatched: float) -> float:
    """F1 of summed counts, in [0, 1]."""
    return matched / (matched + unmatched / 2) if matched or unmatched else 1.0


def field_counts(prediction: str, answer: str, *, ignore_case: bool = False) -> FieldCounts:
    """Compare the fields of a predicted JSON object with those of the annotated one.

    Args:
        prediction: a JSON object, alone, in a fence of Markdown or with words around it; values count as texts without
            white space around them.
        answer: the annotated object as JSON.
        ignore_case: compare values in lower case.

    Raises:
        ValueError: the annotation is not a JSON object.
    """
    wanted = parse_json(answer)
    if not isinstance(wanted, dict):
        raise ValueError(f"the annotated answer is not a JSON object: {answer!r:.80}")
    gold = Counter(_pairs(wanted, "", ignore_case))
    said = first_object(prediction)
    if said is None:
        return FieldCounts(0, gold.total(), 0, readable=False)
    found = Counter(_pairs(said, "", ignore_case))
    return FieldCounts((gold & found).total(), (gold - found).total(), (found - gold).total(), readable=True)


def first_object(text: str) -> dict[str, Any] | None:
    """The first JSON object in a text that is not inside another one; None where there is none."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            value, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            start = text.find("{", start + 1)
            continue
        return value if isinstance(value, dict) else None
    return None


def _pairs(value: Any, path: str, ignore_case: bool) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _pairs(item, f"{path}.{key}", ignore_case)]
    if isinstance(value, list):
        return [pair for item in value for pair in _pairs(item, path, ignore_case)]
    text = value if isinstance(value, str) else json.dumps(value)
    text = " ".join(text.split())
    return [(path, text.lower() if ignore_case else text)]
