"""Scorers: each rule of the three protocols, the accuracy against its definition, the bootstrap interval."""

import math
import os
import random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llava_llama31.trainer.evaluation.vqa_accuracy import (
    CONTRACTIONS,
    PROTOCOLS,
    mean_score,
    normalize,
    score_all,
    vqa_accuracy,
)


VLMEVALKIT_2024, VLMEVALKIT_2025, M4C = PROTOCOLS

# answer -> normalised under vlmevalkit-2024, vlmevalkit-2025, m4c
WHERE_THEY_DIFFER = {
    "a,b": ("b", "b", "ab"),
    "New York,NY": ("new york ny", "new york ny", "new yorkny"),
    "wendy's": ("wendy's", "wendy's", "wendy 's"),
    "8.": ("8", "8.", "8"),
    "2013.": ("2013", "2013.", "2013"),
    "$5.": ("$5", "$5.", "$5"),
    "what?no": ("what no", "what no", "whatno"),
    "let's go": ("let's go", "let's go", "let 's go"),
    "1,200-1,300": ("12001300", "12001300", "1200 1300"),
    "tom's 7. or so": ("tom's 7 or so", "tom's 7. or so", "tom 's 7 or so"),
}
WHERE_THEY_AGREE = {
    "": "",
    "   ": "",
    "Dakota Digital": "dakota digital",
    "line\nbreak\tand tab": "line break and tab",
    "  many   spaces  ": "many spaces",
    "hyphen-ated": "hyphen ated",
    "beside - space and re-do": "beside space and redo",  # one mark beside a space deletes all of its kind
    "a/b c": "b c",
    "cost -5 re-do": "cost 5 redo",
    "x;y": "x y",
    'say "stop" (now)': "say stop now",
    "x=y+z": "x y z",
    "c:\\dir_name": "c: dir name",
    "[1]{2}<3>@4`5`": "1 2 3 4 5",
    "wow!": "wow",
    "U.S.A.": "usa",
    "3.14": "3.14",
    ".5": ".5",
    "www.site.com": "wwwsitecom",
    "none": "0",
    "Zero one TWO three four five six seven eight nine ten": "0 1 2 3 4 5 6 7 8 9 10",
    "eleven": "eleven",
    "the cat and an owl on a mat": "cat and owl on mat",
    "The": "",
    "dont": "don't",
    "couldntve": "couldntve",
    "couldnt've": "couldn't've",
    "somebody'd": "somebodyd",
    "Im": "im",  # its row is spelt with a capital, and the text is lower case by then
    "100%": "100%",
    "日本語 é": "日本語 é",
    "." * 40: "." * 8,  # no more than 32 periods are deleted
}


@pytest.mark.parametrize("answer", WHERE_THEY_DIFFER)
def test_protocols_differ_where_the_table_says(answer):
    assert tuple(normalize(answer, protocol) for protocol in PROTOCOLS) == WHERE_THEY_DIFFER[answer]


@pytest.mark.parametrize("answer", WHERE_THEY_AGREE)
def test_rules_that_all_protocols_share(answer):
    assert {normalize(answer, protocol) for protocol in PROTOCOLS} == {WHERE_THEY_AGREE[answer]}


def test_contractions_only_move_apostrophes():
    assert len(CONTRACTIONS) == 114
    for spelling, contraction in CONTRACTIONS.items():
        assert spelling != contraction
        assert spelling.replace("'", "") == contraction.replace("'", "")
        for protocol in (VLMEVALKIT_2024, VLMEVALKIT_2025):
            assert normalize(f"so {spelling.upper()} it is", protocol) == f"so {contraction} it is"


def by_definition(prediction: str, answers: list[str]) -> float:
    """Leave one annotator out at a time; exact answers only."""
    scores = []
    for i in range(len(answers)):
        others = answers[:i] + answers[i + 1 :]
        scores.append(min(1, sum(other == prediction for other in others) / 3))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("count", range(4, 13))
def test_accuracy_is_the_leave_one_out_mean(count):
    for matches in range(count + 1):
        answers = ["yes"] * matches + ["no"] * (count - matches)
        random.Random(matches).shuffle(answers)
        for protocol in PROTOCOLS:
            assert vqa_accuracy("Yes!", answers, protocol) == pytest.approx(by_definition("yes", answers), abs=1e-15)


def test_ten_annotators_give_five_values_exactly():
    values = [vqa_accuracy("x", ["x"] * matches + ["y"] * (10 - matches), M4C) for matches in range(11)]
    assert values == [0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1]


def test_fewer_than_four_annotators():
    assert [vqa_accuracy("x", answers, M4C) for answers in (["x"], ["y"], ["x", "x"], ["x"] * 3)] == [1, 0, 1, 1]
    assert vqa_accuracy("x", ["x", "y"], M4C) == 0.5
    assert vqa_accuracy("x", ["x", "x", "y"], M4C) == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="without answers"):
        vqa_accuracy("x", [], M4C)
    with pytest.raises(ValueError, match="'vqa2'.*vlmevalkit-2024, vlmevalkit-2025, m4c"):
        vqa_accuracy("x", ["x"], "vqa2")
    with pytest.raises(ValueError, match="no score"):
        score_all([])


# FUZZ_SCALE=40 looks forty times as far
SCALE = int(os.environ.get("FUZZ_SCALE", "1"))
MARKS = set(';/[]"{}()=+\\_-><@`,?!')
PIECES = st.sampled_from(
    [
        *CONTRACTIONS,
        *("the", "a", "an", "none", "one", "ten", "The"),
        *';/[]"{}()=+\\_-><@`,?!.',
        "'s",
        " ",
        " ",
        "1",
        "7",
        "x",
        "\n",
    ]
)
ANSWERS = st.one_of(st.text(max_size=20), st.lists(PIECES, max_size=8).map("".join))


@pytest.mark.slow
@settings(max_examples=500 * SCALE)
@given(prediction=ANSWERS, wrong=st.lists(ANSWERS, min_size=10, max_size=10), matches=st.integers(0, 10))
def test_any_string_scores_one_of_five_values_in_any_order(prediction, wrong, matches):
    answers = [prediction] * matches + wrong[matches:]
    shuffled = random.Random(len(prediction)).sample(answers, len(answers))
    for protocol in PROTOCOLS:
        score = vqa_accuracy(prediction, answers, protocol)
        assert score in (0, 0.3, 0.6, 0.9, 1)
        assert score >= (0, 0.3, 0.6, 0.9, 1)[min(matches, 4)]
        assert score == vqa_accuracy(prediction, shuffled, protocol)
        normalized = normalize(prediction, protocol)
        assert normalized == " ".join(normalized.split()) and not set(normalized) & MARKS


NUMBER_WORDS = ("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def with_marks_gone(text: str) -> str:
    """Deleted where one of the kind stands beside a space, or where digit, comma, digit occurs; else a space."""
    delete_all = any(
        a.isdecimal() and b == "," and c.isdecimal() for a, b, c in zip(text, text[1:], text[2:], strict=False)
    )
    beside_space = {a for a, b in zip(text, text[1:], strict=False) if b == " "}
    beside_space |= {b for a, b in zip(text, text[1:], strict=False) if a == " "}
    return "".join(c if c not in MARKS else "" if delete_all or c in beside_space else " " for c in text)


def with_periods_gone(text: str, protocol: str) -> str:
    kept, deleted = [], 0
    for before, character, after in zip(" " + text, text, text[1:] + " ", strict=False):
        goes = character == "." and not after.isdecimal() and deleted < 32
        if protocol == VLMEVALKIT_2025:
            goes = goes and not before.isdecimal()
        deleted += goes
        kept += [] if goes else [character]
    return "".join(kept)


def normalized_by_definition(answer: str, protocol: str) -> str:
    """The table of docs/evaluation.md and the text above it, with no regular expression."""
    text = answer
    if protocol == M4C:
        text = " 's".join("".join(c for c in text.lower() if c not in ",?").split("'s")).strip()
    text = "".join(" " if c in "\n\t" else c for c in text).strip()
    words = with_periods_gone(with_marks_gone(text), protocol).lower().split()
    numbers = dict(zip(NUMBER_WORDS, [0, *range(11)], strict=True))
    words = [str(numbers.get(word, word)) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


@pytest.mark.slow
@settings(max_examples=1000 * SCALE)
@given(answer=ANSWERS)
def test_protocols_are_what_the_table_says_and_differ_nowhere_else(answer):
    by_2024, by_2025, by_m4c = (normalize(answer, protocol) for protocol in PROTOCOLS)
    assert [by_2024, by_2025, by_m4c] == [normalized_by_definition(answer, protocol) for protocol in PROTOCOLS]
    # the two versions of VLMEvalKit differ if and only if a period stands behind a digit and not before one
    text = with_marks_gone("".join(" " if c in "\n\t" else c for c in answer).strip())
    if text.count(".") <= 32:
        behind_digit = (
            a.isdecimal() and b == "." and not c.isdecimal()
            for a, b, c in zip(text, text[1:], text[2:] + " ", strict=False)
        )
        assert (by_2024 != by_2025) == any(behind_digit)
    # the context of a capital sigma decides its small form
    if not any(part in answer.lower() for part in (",", "?", "'s")) and "Σ" not in answer:
        assert by_2024 == by_m4c


SPECIAL = {*CONTRACTIONS, *CONTRACTIONS.values(), *NUMBER_WORDS, "a", "an", "the"}
WORDS = st.text("bcdfghijklmnopqrtuvwxyz", min_size=1, max_size=6).filter(lambda word: word not in SPECIAL)


@pytest.mark.slow
@settings(max_examples=2000)
@given(first=WORDS, second=WORDS, number=st.integers(0, 99_999))
def test_each_row_of_the_table_holds_for_any_words(first, second, number):
    assume(first + second not in SPECIAL)
    rows = {
        f"{first},{second}": (f"{first} {second}", f"{first} {second}", f"{first}{second}"),
        f"{first}?{second}": (f"{first} {second}", f"{first} {second}", f"{first}{second}"),
        f"{first.title()} {second},{first.upper()}": (
            f"{first} {second} {first}",
            f"{first} {second} {first}",
            f"{first} {second}{first}",
        ),
        f"{first}z's": (f"{first}z's", f"{first}z's", f"{first}z 's"),
        f"{first} {number}.": (f"{first} {number}", f"{first} {number}.", f"{first} {number}"),
        f"${number}.": (f"${number}", f"${number}.", f"${number}"),
        f"{first}.{second}": (f"{first}{second}",) * 3,
        f"{number}.{number}": (f"{number}.{number}",) * 3,
    }
    for answer, normalized in rows.items():
        assert tuple(normalize(answer, protocol) for protocol in PROTOCOLS) == normalized


def test_interval_is_seeded_and_has_the_right_width():
    scores = [vqa_accuracy("x", ["x"] * (i % 5) + ["y"] * (10 - i % 5), M4C) for i in range(2000)]
    score = mean_score(scores)
    assert score == mean_score(scores) != mean_score(scores, seed=1)
    assert score.accuracy == math.fsum(scores) / len(scores)
    half = 1.96 * np.std(scores) / math.sqrt(len(scores))
    assert score.low == pytest.approx(score.accuracy - half, abs=0.15 * half)
    assert score.high == pytest.approx(score.accuracy + half, abs=0.15 * half)
    assert mean_score([0.3]) == mean_score([0.3], seed=5)


def test_interval_covers_the_true_mean_as_often_as_it_says():
    draw = random.Random(0)
    runs = [mean_score([float(draw.random() < 0.6) for _ in range(150)], resamples=200, seed=i) for i in range(200)]
    assert 0.90 <= sum(run.low <= 0.6 <= run.high for run in runs) / len(runs) <= 0.99


def test_score_all_averages_each_protocol():
    pairs = [("8.", ["8"] * 10), ("wendys", ["wendy's"] * 10), ("new york,ny", ["new york ny"] * 10)]
    scores = {name: score.accuracy for name, score in score_all(pairs).items()}
    expected = {
        name: sum(normalize(p, name) == normalize(a[0], name) for p, a in pairs) / len(pairs) for name in PROTOCOLS
    }
    assert scores == expected == {VLMEVALKIT_2024: 2 / 3, VLMEVALKIT_2025: 1 / 3, M4C: 1 / 3}
