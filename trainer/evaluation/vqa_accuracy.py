"""TextVQA accuracy under the three protocols that published scores use: pure functions on strings, no dependencies.

The measure is the VQA accuracy (Antol et al., 2015, "VQA: Visual Question Answering"; for TextVQA Singh et al., 2019,
"Towards VQA Models That Can Read") in its averaged form: for each of the ten annotators the prediction earns
`min(1, matches among the other nine / 3)`, and the ten values are averaged. Before the comparison both sides are
normalised, and there the published evaluators differ:

| protocol          | definition read from                                                                        |
|-------------------|---------------------------------------------------------------------------------------------|
| `vlmevalkit-2024` | VLMEvalKit until 2025-05-12: `vlmeval/dataset/utils/vqa_eval.py`, `vlmeval/smp/misc.py`      |
| `vlmevalkit-2025` | VLMEvalKit since 2025-05-13: the same files                                                  |
| `m4c`             | LLaVA: `llava/eval/m4c_evaluator.py`; lmms-eval: `lmms_eval/tasks/textvqa/utils.py`          |

The oddities of those definitions are kept on purpose (each is marked below): a score is comparable only if they are.
"""

import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType


PROTOCOL = "vlmevalkit-2024"
"""The protocol of the model card, and of every single score."""
ANNOTATORS_FOR_FULL_SCORE = 3
ARTICLES = frozenset(("a", "an", "the"))
NUMBER_WORDS = MappingProxyType(
    {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
    | {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
)
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# the lookahead `(?!<=\d)` (meant as a lookbehind) can never fail before a period, so a period after a digit goes too
PERIOD_UNLESS_BEFORE_DIGIT = re.compile(r"\.(?!\d)")
PERIOD_AWAY_FROM_DIGITS = re.compile(r"(?<!\d)\.(?!\d)")
# all three evaluators hand `re.UNICODE` (32) to `sub` where the largest number of replacements stands
LARGEST_NUMBER_OF_PERIODS = 32

# contraction -> spellings that become it; spellings with a capital I are left out, as the text is lower case by then
_SPELLINGS = {
    "ain't": "aint", "aren't": "arent", "can't": "cant", "could've": "couldve", "couldn't": "couldnt",
    "couldn't've": "couldn'tve couldnt've", "didn't": "didnt", "doesn't": "doesnt", "don't": "dont",
    "hadn't": "hadnt", "hadn't've": "hadnt've hadn'tve", "hasn't": "hasnt", "haven't": "havent", "he'd": "hed",
    "he'd've": "hed've he'dve", "he's": "hes", "how'd": "howd", "how'll": "howll", "how's": "hows", "isn't": "isnt",
    "it'd": "itd", "it'd've": "itd've it'dve", "it'll": "itll", "ma'am": "maam", "mightn't": "mightnt",
    "mightn't've": "mightnt've mightn'tve", "might've": "mightve", "mustn't": "mustnt", "must've": "mustve",
    "needn't": "neednt", "not've": "notve", "o'clock": "oclock", "oughtn't": "oughtnt",
    "'ow's'at": "ow's'at 'ows'at 'ow'sat", "shan't": "shant", "she'd've": "shed've she'dve", "should've": "shouldve",
    "shouldn't": "shouldnt", "shouldn't've": "shouldnt've shouldn'tve", "somebody'd've": "somebodyd've somebody'dve",
    "somebodyd": "somebody'd",  # the only entry that drops an apostrophe
    "somebody'll": "somebodyll", "somebody's": "somebodys", "someone'd": "someoned",
    "someone'd've": "someoned've someone'dve", "someone'll": "someonell", "someone's": "someones",
    "something'd": "somethingd", "something'd've": "somethingd've something'dve", "something'll": "somethingll",
    "that's": "thats", "there'd": "thered", "there'd've": "thered've there'dve", "there're": "therere",
    "there's": "theres", "they'd": "theyd", "they'd've": "theyd've they'dve", "they'll": "theyll",
    "they're": "theyre", "they've": "theyve", "'twas": "twas", "wasn't": "wasnt", "we'd've": "wed've we'dve",
    "we've": "weve", "weren't": "werent", "what'll": "whatll", "what're": "whatre", "what's": "whats",
    "what've": "whatve", "when's": "whens", "where'd": "whered", "where's": "wheres", "where've": "whereve",
    "who'd": "whod", "who'd've": "whod've who'dve", "who'll": "wholl", "who's": "whos", "who've": "whove",
    "why'll": "whyll", "why're": "whyre", "why's": "whys", "won't": "wont", "would've": "wouldve",
    "wouldn't": "wouldnt", "wouldn't've": "wouldnt've wouldn'tve", "y'all": "yall", "y'all'll": "yall'll y'allll",
    "y'all'd've": "yall'd've y'alld've y'all'dve", "you'd": "youd", "you'd've": "youd've you'dve", "you'll": "youll",
    "you're": "youre", "you've": "youve",
}  # fmt: skip
CONTRACTIONS = MappingProxyType({spelling: form for form, row in _SPELLINGS.items() for spelling in row.split()})
_CONTRACTED = frozenset(_SPELLINGS)


@dataclass(frozen=True)
class Protocol:
    """One published way to normalise an answer.

    Args:
        name: what stands beside every score.
        splits_possessive: lower-case first, delete commas and question marks, and set `'s` apart.
        period: the periods that are deleted.
    """

    name: str
    splits_possessive: bool
    period: re.Pattern[str]


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            Protocol(PROTOCOL, splits_possessive=False, period=PERIOD_UNLESS_BEFORE_DIGIT),
            Protocol("vlmevalkit-2025", splits_possessive=False, period=PERIOD_AWAY_FROM_DIGITS),
            Protocol("m4c", splits_possessive=True, period=PERIOD_UNLESS_BEFORE_DIGIT),
        )
    }
)


@dataclass(frozen=True)
class Score:
    """A mean accuracy with its bootstrap 95 % interval, all in [0, 1]."""

    accuracy: float
    low: float
    high: float


@lru_cache(maxsize=1 << 16)
def normalize(answer: str, protocol: str) -> str:
    """Bring an answer into the form in which `protocol` compares it."""
    rules = _protocol(protocol)
    text = answer
    if rules.splits_possessive:
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    text = without_punctuation(text, protocol)
    words = (NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def without_punctuation(text: str, protocol: str) -> str:
    """A text without the marks and periods that `protocol` deletes before it compares words."""
    return _protocol(protocol).period.sub("", _without_marks(text), count=LARGEST_NUMBER_OF_PERIODS)


def is_normalized(answer: str, protocol: str) -> bool:
    """Whether `answer` can be what `normalize` made of another one.

    A contraction is not looked at: `m4c` sets `'s` apart before it makes `that's` from `thats`, so its own outcome
    would not survive a second round.
    """
    words = [word for word in answer.split(" ") if word not in _CONTRACTED]
    return normalize(" ".join(words), protocol) == " ".join(words)


def vqa_accuracy(
    prediction: str,
    answers: Sequence[str],
    protocol: str,
    *,
    normalized: bool = False,
    answers_normalized: bool = False,
) -> float:
    """Score one prediction against the annotators' answers: 0, 0.3, 0.6, 0.9 or 1 for ten of them.

    With n annotators the prediction earns, for each of them, `min(1, matches among the other n - 1 / 3)`, and the n
    values are averaged. Where the other annotators are fewer than three, all of them have to agree for a full score
    (the divisor is n - 1), and a single annotator is compared with directly; the public definition has always ten.

    Args:
        prediction: the model's answer.
        answers: what the annotators said.
        protocol: one of PROTOCOLS.
        normalized: the prediction is in the protocol's normal form already, and is compared as it stands.
        answers_normalized: the annotators' answers are.

    Raises:
        ValueError: `answers` is empty, or no protocol has that name.
    """
    if not answers:
        raise ValueError("a question without answers cannot be scored")
    wanted, count = prediction if normalized else normalize(prediction, protocol), len(answers)
    said = answers if answers_normalized else [normalize(answer, protocol) for answer in answers]
    matches = sum(answer == wanted for answer in said)
    if count == 1:
        return float(matches)
    full = min(ANNOTATORS_FOR_FULL_SCORE, count - 1)
    # matching annotators see one match fewer among the others; integers, so that the value is exact to the last bit
    earned = matches * min(full, matches - 1) + (count - matches) * min(full, matches)
    return earned / (full * count)


def mean_score(scores: Sequence[float], *, resamples: int = 1000, seed: int = 0) -> Score:
    """Average per-question scores; the interval holds the middle 95 % of the means of `resamples` seeded resamples."""
    if not scores:
        raise ValueError("there is no score to average")
    count, draw = len(scores), random.Random(seed)
    means = sorted(math.fsum(draw.choices(scores, k=count)) / count for _ in range(resamples))
    tail = round(0.025 * resamples)
    return Score(math.fsum(scores) / count, means[tail], means[-1 - tail])


def score_all(
    pairs: Iterable[tuple[str, Sequence[str]]], protocols: Iterable[str] = tuple(PROTOCOLS), *, seed: int = 0
) -> dict[str, Score]:
    """Score (prediction, answers) pairs under each protocol."""
    pairs = list(pairs)
    return {
        name: mean_score([vqa_accuracy(prediction, answers, name) for prediction, answers in pairs], seed=seed)
        for name in protocols
    }


def _protocol(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise ValueError(f"no protocol is named {name!r}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def _without_marks(text: str) -> str:
    """Delete each mark that stands beside a space anywhere, or all marks if `1,2` occurs; the others become spaces."""
    delete_all = DIGIT_COMMA_DIGIT.search(text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        if mark in text:
            beside_space = f"{mark} " in text or f" {mark}" in text
            cleaned = cleaned.replace(mark, "" if delete_all or beside_space else " ")
    return cleaned
