"""Relaxed accuracy: a number within 5 % of the answer is right, any other answer has to be equal.

Definition: Methani et al., 2020 (PlotQA), as ChartQA (Masry et al., 2022, section 5.1) applies it. Evaluators:

| protocol          | definition read from                                                                        |
|-------------------|---------------------------------------------------------------------------------------------|
| `pix2struct`      | `pix2struct/metrics.py`, taken over by Qwen-VL; white space around both texts is removed    |
| `vlmevalkit`      | VLMEvalKit's `vqa_eval.py` until September 2025, which took the two texts in the wrong      |
|                   | order: within 5 % of the prediction, and a prediction of 0 is a text                        |
| `vlmevalkit-2025` | the same since its commit 677e30a5: as pix2struct, and the answer keeps its white space     |
| `lmms-eval`       | lmms-eval's `tasks/chartqa/utils.py`: as pix2struct, and both texts keep their white space  |
| `evalscope`       | EvalScope's `benchmarks/chartqa`: as pix2struct, the answer keeps its white space, and an   |
|                   | answer of 0 is a number                                                                     |
| `paper`           | as the definition says: a percent sign changes nothing on both sides, nor do separators of  |
|                   | thousands                                                                                   |
"""

import math
from collections.abc import Sequence
from functools import partial


TOLERANCE = 0.05
PROTOCOLS = ("pix2struct", "vlmevalkit", "vlmevalkit-2025", "lmms-eval", "evalscope", "paper")


def relaxed_accuracy(prediction: str, answers: Sequence[str], protocol: str = "pix2struct") -> float:
    """1 if the prediction is near enough to one of the answers, else 0.

    An answer of 0 (for `vlmevalkit` a prediction) has no 5 %: it is compared as a number by `paper` and `evalscope`,
    as a text by the others. `nan` and `inf` are texts by `paper`, and numbers that nothing is near to by the others.

    Raises:
        ValueError: no protocol has that name.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"no protocol is named {protocol!r}; there are {', '.join(PROTOCOLS)}")
    if protocol != "lmms-eval":
        prediction = prediction.strip()
    if protocol in ("pix2struct", "paper"):
        answers = [answer.strip() for answer in answers]
    pairs = [(prediction, answer) for answer in answers]
    if protocol == "vlmevalkit":
        pairs = [(answer, prediction) for answer in answers]
    near = partial(_is_near, is_paper=protocol == "paper", counts_zero=protocol in ("evalscope", "paper"))
    return float(any(near(said, wanted) for said, wanted in pairs))


def _is_near(prediction: str, answer: str, *, is_paper: bool, counts_zero: bool) -> bool:
    said, wanted = _number(prediction, is_paper=is_paper), _number(answer, is_paper=is_paper)
    if said is None or wanted is None or (wanted == 0 and not counts_zero):
        return prediction.lower() == answer.lower()
    if wanted == 0:
        return said == wanted
    if not (math.isfinite(said) and math.isfinite(wanted)):
        return False  # as its source, where the share of an infinite number is not a number
    return abs(said - wanted) / abs(wanted) <= TOLERANCE


def _number(text: str, *, is_paper: bool) -> float | None:
    plain = text.replace(",", "") if is_paper else text
    is_percent = plain.endswith("%")
    try:
        value = float(plain.rstrip("%"))
    except ValueError:
        return None
    if is_paper and not math.isfinite(value):
        return None
    return value / 100 if is_percent and not is_paper else value
