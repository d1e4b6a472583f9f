"""Multiple choice: which option a prediction chooses, by its letter or by the option's text.

| rule                  | definition read from                                                                      |
|-----------------------|-------------------------------------------------------------------------------------------|
| `llava-scienceqa`     | LLaVA: `llava/eval/eval_science_qa.py`                                                    |
| `lmms-eval-scienceqa` | lmms-eval: `lmms_eval/tasks/scienceqa/utils.py`                                           |
| `verbatim`            | LLaVA: `scripts/convert_seed_for_submission.py`                                           |
| `first-letter`        | lmms-eval: `lmms_eval/tasks/seedbench/utils.py`                                           |
| `letter`              | VLMEvalKit: `can_infer_option` of `vlmeval/utils/matching_util.py`                        |
| `letter-or-text`      | the same file's `can_infer`: the letter, or else the only option whose text occurs        |
| `letter-or-text-2025` | VLMEvalKit since August 2025: a letter counts among the last four words, a text in short  |
|                       | answers                                                                                   |
| `letter-or-text-2026` | VLMEvalKit since June 2026: as 2025, and an answer that says `answer is X`                |
| `mmmu`                | MMMU: `mmmu/utils/eval_utils.py`, without its random guess where nothing is found         |
| `lmms-eval-mmmu`      | lmms-eval: `lmms_eval/tasks/_task_utils/mmmu_mcq_utils.py`, without its random guess      |
| `evalscope`           | EvalScope: `parse_answers` of `utils/multi_choices.py`; see `evalscope.py`                |
| `evalscope-four`      | the same with the letters A to D, as for MMStar, however many options there are           |
| others                | `lmms_eval_choices.py`                                                                    |

VLMEvalKit asks a language model where its rules find nothing; here such an answer chooses nothing.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

from llava_llama31.trainer.evaluation.metrics import lmms_eval_choices
from llava_llama31.trainer.evaluation.metrics.evalscope import FOUR_LABELS, LABEL, chosen_label


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# what VLMEvalKit's `can_infer_option` deletes before it looks for a letter that stands alone
_AROUND_LETTERS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
# what MMMU's evaluator strips from an answer, one after the other
_ENDS = ",.!?;:'"
_FAILED = "Failed to obtain answer via API"
# how near the end the letter has to be since August 2025
_LAST_WORDS = 4
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
# VLMEvalKit's letter for "none of them"
_NONE_OF_THEM = "Z"

RULES: Mapping[str, str] = MappingProxyType(
    {
        "llava-scienceqa": "a letter A to E alone, with '. ' after it at the start, or in the one 'The answer is X.'",
        "lmms-eval-scienceqa": "the letter alone in either case, or a capital letter with '.' after it at the start",
        "verbatim": "the whole answer is the letter",
        "first-letter": "the first character, in either case",
        "letter": "the only option letter that stands alone among the words",
        "letter-or-text": "as letter, or else the only option whose text occurs in the answer",
        "letter-or-text-2025": "as letter-or-text, but the letter is one of the last four words, and for a text the "
        "answer has at most twice the characters of all options",
        "letter-or-text-2026": "as letter-or-text-2025, and where no letter is found, the first 'answer is X'",
        "mmmu": "the last '(X)', else the last 'X' alone, else the last option text of an answer of over five words",
        "lmms-eval-mmmu": "as mmmu, but the 'X' alone may be the end of a word, or be followed by a period",
        LABEL: "the letter after the last 'ANSWER:' that letters of options follow, else the last capital letter",
        FOUR_LABELS: "as evalscope with the letters A to D",
        **lmms_eval_choices.RULES,
    }
)


# rules that compare the letter with the right one, whatever the options are
LETTER_ALONE = ("verbatim", "first-letter")
# rules that find an option by its text too, so that a model need not see the letters
BY_TEXT = ("letter-or-text", "letter-or-text-2025", "letter-or-text-2026")


def chosen_letter(prediction: str, options: Mapping[str, str], rule: str) -> str:
    """The letter of the option that a prediction chooses; empty where it chooses none or more than one.

    Args:
        prediction: the model's answer.
        options: letter -> text.
        rule: one of RULES.

    Raises:
        ValueError: no rule has that name.
    """
    if rule == "llava-scienceqa":
        return _llava_scienceqa(prediction, options)
    if rule == "lmms-eval-scienceqa":
        return _lmms_eval_scienceqa(prediction.strip(), options)
    if rule == "verbatim":
        return prediction if prediction in options else ""
    if rule == "first-letter":
        first = prediction.strip()[:1].upper()
        return first if first in options else ""
    if rule == "letter":
        return _letter_alone(prediction, options)
    if rule == "letter-or-text":
        return _letter_alone(prediction, options) or _only_text(prediction, options)
    if rule in ("letter-or-text-2025", "letter-or-text-2026"):
        letter = _letter_alone(prediction, options, last=_LAST_WORDS)
        if not letter and rule == "letter-or-text-2026":
            letter = _letter_of_sentence(prediction, options)
        return letter or _only_text_of_short(prediction, options)
    if rule in (LABEL, FOUR_LABELS):
        letter = chosen_label(prediction, options if rule == LABEL else LETTERS[:4])
        return letter if letter in options else ""
    if rule in lmms_eval_choices.RULES:
        return lmms_eval_choices.chosen_letter_of_lmms_eval(prediction, options, rule)
    if rule in ("mmmu", "lmms-eval-mmmu"):
        return _mmmu(prediction, options, of_lmms_eval=rule == "lmms-eval-mmmu")
    raise ValueError(f"no rule is named {rule!r}; there are {', '.join(RULES)}")


def _llava_scienceqa(prediction: str, options: Mapping[str, str]) -> str:
    letters = LETTERS[:5]
    letter = ""
    if prediction and prediction in tuple(letters):
        letter = prediction
    elif len(prediction) >= 3 and prediction[0] in letters and prediction[1:3] == ". ":
        letter = prediction[0]
    else:
        found = re.findall(r"The answer is ([A-Z]).", prediction)
        letter = found[0] if len(found) == 1 else ""
    return letter if letter in options else ""


def _lmms_eval_scienceqa(prediction: str, options: Mapping[str, str]) -> str:
    if len(prediction) >= 2 and prediction[0].isupper() and prediction[1] == ".":
        return prediction[0] if prediction[0] in options else ""
    letter = prediction.upper()
    return letter if letter in options else ""


def _letter_alone(prediction: str, options: Mapping[str, str], last: int | None = None) -> str:
    if _FAILED in prediction:
        return ""
    if any(refusal in prediction for refusal in _REFUSALS):
        return _NONE_OF_THEM
    words = prediction.translate(_AROUND_LETTERS).split()
    found = [letter for letter in options if letter in words]
    if len(found) == 1:
        return found[0] if last is None or words.index(found[0]) >= len(words) - last else ""
    return _NONE_OF_THEM if not found and _NONE_OF_THEM in words else ""


def _only_text(prediction: str, options: Mapping[str, str]) -> str:
    said = prediction.lower()
    found = [letter for letter, text in options.items() if text.lower() in said]
    return found[0] if len(found) == 1 else ""


def _only_text_of_short(prediction: str, options: Mapping[str, str]) -> str:
    is_short = len(prediction.lower()) <= 2 * sum(len(text) for text in options.values())
    return _only_text(prediction, options) if is_short else ""


def _letter_of_sentence(prediction: str, options: Mapping[str, str]) -> str:
    if _FAILED in prediction:
        return ""
    said = _ANSWER_IS.search(prediction)
    letter = said[1].upper() if said else ""
    return letter if letter in options else ""


def _mmmu(prediction: str, options: Mapping[str, str], *, of_lmms_eval: bool) -> str:
    said = prediction
    for mark in _ENDS:
        said = said.strip(mark)
    # so that a letter at either end stands alone too
    said = f" {said} "
    bracketed = [letter for letter in options if f"({letter})" in said]
    if bracketed:
        return max(bracketed, key=lambda letter: said.rfind(f"({letter})"))
    for form in ("{} ", "{}.") if of_lmms_eval else (" {} ",):
        alone = [letter for letter in options if form.format(letter) in said]
        if alone:
            return max(alone, key=lambda letter: said.rfind(f" {letter} "))
    lower, texts = said.lower(), {letter: text.lower() for letter, text in options.items()}
    found = [letter for letter, text in texts.items() if text and text in lower] if len(said.split()) > 5 else []
    return max(found, key=lambda letter: lower.rfind(texts[letter]), default="")


def multiple_choice(prediction: str, options: Mapping[str, str], answer: str, rule: str) -> float:
    """1 if the prediction chooses the option with the letter `answer`, else 0."""
    return float(chosen_letter(prediction, options, rule) == answer)


def inline_options(question: str) -> tuple[tuple[str, str], ...]:
    """(letter, text) of the options that a question itself lists: `A. one`, `A: one` or `A) one`, from A on.

    Questions and hints speak of `figure A.` too: the last list counts that begins a line or follows `Options:`, or
    else the longest.
    """
    lists = [(_opens_list(question, first), _list_from(question, first)) for first in _label("A").finditer(question)]
    if not lists:
        return ()
    ranked = [(opens and len(starts) > 1, 0 if opens else len(starts), starts) for opens, starts in lists]
    starts = max(reversed(ranked), key=lambda ranks: ranks[:2])[2]
    ends = [*(match.start() for match in starts[1:]), len(question)]
    spans = [question[match.end() : end].strip(" ,(\n") for match, end in zip(starts, ends, strict=False)]
    return tuple((letter, span.split("\n")[0]) for letter, span in zip(LETTERS, spans, strict=False))


def _label(letter: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![A-Za-z]){letter}[.:)]\s")


def _opens_list(question: str, first: re.Match[str]) -> bool:
    """Whether a letter A begins a line or follows `Options:`."""
    before = question[: first.start()].rstrip(" (")
    return not before or before.endswith("\n") or before.lower().endswith("options:")


def _list_from(question: str, first: re.Match[str]) -> list[re.Match[str]]:
    """The labels of a list from its A on; where A and B begin lines, all of them do."""
    starts = [first]
    on_lines = not question[: first.start()].rpartition("\n")[2].strip(" (")
    for letter in LETTERS[1:]:
        place = starts[-1].end()
        found = re.compile(rf"(?<=\n)[ (]*{letter}[.:)]\s").search(question, place) if on_lines else None
        if found is None and (not on_lines or len(starts) == 1):
            found, on_lines = _label(letter).search(question, place), False
        if found is None:
            break
        starts.append(found)
    return starts
