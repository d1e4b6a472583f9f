"""Yes and no: what a prediction says, and precision, recall and F1 of yes.

| rule               | definition read from                                                                       |
|--------------------|--------------------------------------------------------------------------------------------|
| `llava-pope`       | LLaVA: `llava/eval/eval_pope.py`, after POPE's own `evaluate.py` (Li et al., 2023)         |
| `mme`              | MME (Fu et al., 2023): `eval_tool/calculation.py`                                          |
| `lmms-eval-mme`    | lmms-eval: `lmms_eval/tasks/mme/utils.py`: as mme, without periods, and y and n alone count |
| `words`            | VLMEvalKit: `YOrN_Extraction` of `vlmeval/dataset/utils/yorn.py`                           |
| `exact`            | lmms-eval: `lmms_eval/tasks/pope/utils.py`                                                 |
| `evalscope`        | EvalScope: `utils/yes_no.py`; see `evalscope.py`                                           |
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

from llava_llama31.trainer.evaluation.metrics.evalscope import verdict
from llava_llama31.trainer.evaluation.vqa_accuracy import without_punctuation


YES, NO, NEITHER = "yes", "no", ""
_WORDS = re.compile(r"\w+")

RULES: Mapping[str, str] = MappingProxyType(
    {
        "llava-pope": "no if No, no or not is a word of the first sentence without its commas, else yes",
        "mme": "the whole answer, or else yes or no within its first four characters, in any case",
        "lmms-eval-mme": "as mme after deleting periods; a single y or n counts",
        "words": "yes if yes is a word and no is not, no if it is the other way round",
        "exact": "the whole answer, in any case",
        "evalscope": "the only one of Yes, YES, No and NO that is a word of the answer, or the lower-case word alone",
    }
)


def yes_or_no(prediction: str, rule: str) -> str:
    """ "yes", "no", or empty where the prediction says neither.

    Raises:
        ValueError: no rule of RULES has that name.
    """
    if rule == "llava-pope":
        words = prediction.split(".")[0].replace(",", "").split(" ")
        return NO if {"No", "not", "no"} & set(words) else YES
    if rule == "exact":
        said = prediction.lower().strip()
        return said if said in (YES, NO) else NEITHER
    if rule == "words":
        words = without_punctuation(prediction.lower(), "vlmevalkit-2024").split()
        return NEITHER if (YES in words) == (NO in words) else YES if YES in words else NO
    if rule == "evalscope":
        return verdict(prediction)
    if rule in ("mme", "lmms-eval-mme"):
        return _by_prefix(prediction, deletes_periods=rule == "lmms-eval-mme")
    raise ValueError(f"no rule is named {rule!r}; there are {', '.join(RULES)}")


def is_yes_for_want_of_no(prediction: str, rule: str) -> bool:
    """Whether a rule takes a prediction for yes in which the word is not; `llava-pope` alone does."""
    if rule != "llava-pope" or YES in _WORDS.findall(prediction.lower()):
        return False
    return yes_or_no(prediction, rule) == YES


def _by_prefix(prediction: str, *, deletes_periods: bool) -> str:
    said = prediction.lower()
    if deletes_periods:
        said = said.strip().replace(".", "")
        if len(said) == 1:
            return {"y": YES, "n": NO}.get(said, NEITHER)
    prefix = said[:4]
    return YES if YES in prefix else NO if NO in prefix else NEITHER


def yes_no_rates(
    true_yes: float, false_yes: float, false_no: float, true_no: float, wrong: float = 0
) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and share of yes, in percent; a quotient by 0 is 0.

    Args:
        true_yes: questions with the answer yes that are answered so.
        false_yes: questions with the answer no that are answered yes.
        false_no: questions with the answer yes that are answered otherwise.
        true_no: questions with the answer no that are answered so.
        wrong: all others, which count for accuracy and share alone.
    """
    total = true_yes + false_yes + false_no + true_no + wrong
    precision = _share(true_yes, true_yes + false_yes)
    recall = _share(true_yes, true_yes + false_no)
    return {
        "accuracy": 100 * _share(true_yes + true_no, total),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "f1": 100 * _share(2 * precision * recall, precision + recall),
        "yes_ratio": 100 * _share(true_yes + false_yes, total),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
