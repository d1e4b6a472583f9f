"""Metrics beyond VQA accuracy: every rule by hand, the papers' definitions, and what has to hold for any text."""

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_llama31.trainer.evaluation.metrics import choices, lmms_eval_choices, numbers, text, yes_no
from llava_llama31.trainer.evaluation.metrics.choices import chosen_letter, multiple_choice
from llava_llama31.trainer.evaluation.metrics.evalscope import FOUR_LABELS, LABEL, answer_line, answer_line_or_all
from llava_llama31.trainer.evaluation.metrics.fields import field_counts, field_f1, first_object
from llava_llama31.trainer.evaluation.metrics.lmms_eval_choices import open_answer_is_right
from llava_llama31.trainer.evaluation.metrics.numbers import relaxed_accuracy
from llava_llama31.trainer.evaluation.metrics.open_answers import open_as_choice, open_match
from llava_llama31.trainer.evaluation.metrics.text import (
    anls,
    contains_answer,
    edit_distance,
    error_counts,
    exact_match,
)
from llava_llama31.trainer.evaluation.metrics.yes_no import yes_no_rates, yes_or_no


ANY_TEXT = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(
            ["yes", "No", "not", ".", ",", "A", "(B)", "C.", "The answer is D.", "5%", "0", "nan", "inf", "1e999"]
            + ['{"a":', "}", "[", "Z", "\n", "ß", "İ", "red car", " "]
        ),
        max_size=8,
    ).map(" ".join),
)
OPTIONS = {"A": "red", "B": "blue car", "C": "a car", "D": "42"}


@pytest.mark.parametrize(
    ("prediction", "answer", "equal_under"),
    [
        ("yes", "yes", {"verbatim", "ignore-case", "llava-gqa", "lmms-eval"}),
        (" yes\n", "yes", {"verbatim", "ignore-case"}),
        ("Yes", "yes", {"ignore-case", "llava-gqa", "lmms-eval"}),
        ("Yes..", "yes", {"llava-gqa", "lmms-eval"}),
        ("t-shirt", "tshirt", {"lmms-eval"}),
        ("no", "yes", set()),
    ],
)
def test_exact_match(prediction, answer, equal_under):
    assert {p for p in text.EXACT_PROTOCOLS if exact_match(prediction, ["?", answer], p)} == equal_under


@pytest.mark.parametrize(
    ("prediction", "answers", "as_text", "as_formula"),
    [
        ('the word "Centre" is there', ["CENTRE"], 1, 0),
        ("new\nyork", ["New York"], 1, 0),
        ("x ^ 2 + 1", ["x^2+1"], 0, 1),
        ("12", ["3", "2"], 1, 1),
        ("", ["a"], 0, 0),
        ("a", [], 0, 0),
    ],
)
def test_containment(prediction, answers, as_text, as_formula):
    assert contains_answer(prediction, answers) == as_text
    assert contains_answer(prediction, answers, formula=True) == as_formula


@pytest.mark.parametrize(
    ("prediction", "answers", "scores"),
    [
        ("Hello", ["hello"], (1, 1, 1)),
        ("hello  World ", ["hello world"], (1, 1, 1)),
        ("dog\n", ["cat", "dot"], (2 / 3, 0.75, 0.75)),  # the line's end counts for the length
        ("helo", ["hello"], (0.8, 0.8, 0.8)),
        ("abc", ["abcdef"], (0, 0.5, 0.5)),
        ("abc", ["abcde"], (0.6, 0.6, 0.6)),
        ("abcdef", ["abcxyz"], (0, 0.5, 0.5)),  # at the threshold the paper's inequality is strict
        ("abcdefg", ["abcxyzw"], (0, 0, 0)),
        ("ab  d", ["abxd"], (0.75, 0.8, 0.8)),  # divided by the length before white space is collapsed
        ("dog", ["cat", "dot", "do"], (2 / 3, 2 / 3, 2 / 3)),
        ("", [""], (1, 1, 1)),
        ("a", [""], (0, 0, 0)),
    ],
)
def test_anls(prediction, answers, scores):
    for protocol, score in zip(("paper", "vlmevalkit", "lmms-eval"), scores, strict=True):
        assert anls(prediction, answers, protocol) == pytest.approx(score), protocol


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2), ("same", "same", 0), ("ab", "ba", 2)],
)
def test_edit_distance(first, second, distance):
    assert edit_distance(first, second) == edit_distance(second, first) == distance
    assert edit_distance(first.split(), second.split()) == (first != second)


def test_error_rates_count_edits_to_the_nearest_answer():
    assert error_counts("the cat sat", ["the hat sat"], "word") == (1, 3)
    assert error_counts("the cat sat", ["the hat sat"], "character") == (1, 11)
    assert error_counts("a  b", ["a b"], "character") == (0, 3)
    assert error_counts("one two three", ["four", "one two"], "word") == (1, 2)
    assert error_counts("a b c", [""], "word") == (3, 0)
    with pytest.raises(ValueError, match="no unit is named 'line'"):
        error_counts("a", ["a"], "line")


@pytest.mark.parametrize(
    ("prediction", "answer", "pix2struct", "paper"),
    [
        ("14", "14.0", 1, 1),
        ("105", "100", 1, 1),  # within 5 % of the answer
        ("95", "100", 1, 1),
        ("105.1", "100", 0, 0),
        ("100", "95.2", 0, 0),  # 5 % of the answer, not of the prediction
        ("Navy Blue", "navy blue", 1, 1),
        ("blue", "navy blue", 0, 0),
        ("25%", "0.25", 1, 0),  # a percentage is a hundredth there
        ("25", "25%", 0, 1),
        ("1,000", "1000", 0, 1),
        ("0", "0", 1, 1),
        ("0.0", "0", 0, 1),  # an answer of 0 is compared as a text there
        ("0.01", "0", 0, 0),
        ("-98", "-100", 1, 1),
        ("nan", "5", 0, 0),
        ("inf", "5", 0, 0),
        ("", "", 1, 1),
        ("five", "5", 0, 0),
    ],
)
def test_relaxed_accuracy(prediction, answer, pix2struct, paper):
    assert relaxed_accuracy(prediction, [answer]) == pix2struct
    assert relaxed_accuracy(prediction, [answer], "paper") == paper
    assert relaxed_accuracy(prediction, ["?", answer], "paper") == paper
    assert [relaxed_accuracy(prediction, [answer], name) for name in ("vlmevalkit-2025", "lmms-eval")] == [
        pix2struct
    ] * 2
    # it passed the two texts in the wrong order
    assert relaxed_accuracy(prediction, [answer], "vlmevalkit") == relaxed_accuracy(answer, [prediction])


@pytest.mark.parametrize(
    ("prediction", "answers", "until_2025", "since"),
    [
        ("19", ["20"], 0, 1),  # answers of VILA-1.5-13B to ChartQA
        ("10.4", ["10.94"], 0, 1),
        ("50.18", ["47.68"], 1, 0),
        ("0", ["0.0"], 0, 0),
        ("0.0", ["0"], 0, 0),
        ("0%", ["0"], 0, 0),
        ("100", ["1", "105"], 1, 1),
        ("blue ", ["blue"], 1, 1),
        ("blue", ["blue "], 0, 0),
    ],
)
def test_vlmevalkit_took_five_percent_of_the_prediction_until_september_2025(prediction, answers, until_2025, since):
    assert relaxed_accuracy(prediction, answers, "vlmevalkit") == until_2025
    assert relaxed_accuracy(prediction, answers, "vlmevalkit-2025") == since


@pytest.mark.parametrize(
    ("prediction", "answer", "equal_under"),
    [
        ("Blue\n", "blue", ["pix2struct", "vlmevalkit", "vlmevalkit-2025", "evalscope", "paper"]),
        ("blue", "blue ", ["pix2struct", "paper"]),
        ("blue ", "blue ", ["pix2struct", "lmms-eval", "paper"]),
        (" 14\n", "14 ", list(numbers.PROTOCOLS)),  # Python's numbers have none
    ],
)
def test_white_space_around_relaxed_answers(prediction, answer, equal_under):
    assert [name for name in numbers.PROTOCOLS if relaxed_accuracy(prediction, [answer], name)] == equal_under


@pytest.mark.parametrize(
    ("prediction", "chosen"),
    [
        ("B", "BBBBBBBB"),
        ("b", ".BB....."),
        ("B.", ".BBBBBB."),
        ("B. blue car", "BBBBB.B."),
        ("B) blue car", "..BBB..."),
        ("The answer is B.", "B..BBBB."),
        ("The answer is B. The answer is C.", ".....CC."),
        ("(C)", "...CCCC."),
        ("I think (A), no, (B)", ".....BB."),
        ("It is a blue car", "....B..."),
        ("Is it a car, or a blue car?", ".....BB."),
        ("What I see in it is all red", "....AAA."),
        ("A or B", "..A..BB."),
        ("E", "........"),
        ("Z", "...ZZ..."),
        ("Cannot determine the answer: A", "..CZZAA."),
        ("Failed to obtain answer via API. A", ".....AA."),
        ("", "........"),
        ("42", "....D..."),
        ("the DNA of it", "......A."),
        ("see C.1 there", "...CC.C."),
    ],
)
def test_which_option_is_chosen(prediction, chosen):
    rules = ("llava-scienceqa", "lmms-eval-scienceqa", "first-letter", "letter", "letter-or-text", "mmmu")
    rules += ("lmms-eval-mmmu", "verbatim")
    others = {"letter-or-text-2025", "letter-or-text-2026", LABEL, FOUR_LABELS, *lmms_eval_choices.RULES}
    assert set(rules) | others == set(choices.RULES)
    assert "".join(chosen_letter(prediction, OPTIONS, rule) or "." for rule in rules) == chosen
    letters = zip(rules, chosen, strict=True)
    assert all(multiple_choice(prediction, OPTIONS, "B", rule) == (letter == "B") for rule, letter in letters)


@pytest.mark.parametrize(
    ("prediction", "chosen"),
    [
        ("B", "BBB"),
        ("B is the one", "BBB"),  # the fourth word from the end
        ("B is the right one", "B.."),  # the fifth
        ("The answer is **c**: nothing else here can be", "..C"),
        ("The answer is B. It is seen at the far end", "B.B"),
        ("The answer is E. It is seen at the far end", "..."),  # no option
        ("Cannot determine the answer, so the answer is A", "ZZZ"),
        ("Failed to obtain answer via API, the answer is A", "..."),
        ("a blue car", "BBB"),
        ("a blue car" + 34 * "x", "BBB"),  # twice the options' 22 characters
        ("a blue car" + 35 * "x", "B.."),
        ("a red", "AAA"),
    ],
)
def test_vlmevalkit_chooses_otherwise_since_august_2025_and_june_2026(prediction, chosen):
    options = {"A": "a red", "B": "a blue car", "C": "green", "D": "42"}
    rules = ("letter-or-text", "letter-or-text-2025", "letter-or-text-2026")
    assert "".join(chosen_letter(prediction, options, rule) or "." for rule in rules) == chosen


@pytest.mark.parametrize(
    ("prediction", "answer", "as_options", "by_mmmu"),
    [
        ("24", "24", 1, 1),
        ("It is 24.", "24", 1, 1),
        ("so 23, which gives x = 24", "24", 1, 1),
        ("24.001", "24", 1, 1),  # rounded to two decimals; the text occurs for VLMEvalKit
        ("23.999", "24", 0, 1),
        ("1,024 in all", "1024", 0, 1),
        ("2.4e1", "24", 0, 1),
        ("125", "5", 1, 0),  # a text in another one, but another number
        ("A", "24", 1, 0),  # the letter of the annotated answer
        ("B", "24", 0, 0),
        ("The answer is the Golden Gate", "golden gate", 1, 1),
        ("golden gate is what I see, so none", "golden gate", 1, 0),  # the conclusion does not hold it
        ("first line is red\nsecond line", "red", 1, 1),
        ("x", "x", 1, 1),
        ("xyz", "x", 1, 0),  # one character needs a space beside it
        ("x or y", "x", 1, 1),
        ("", "24", 0, 0),
        ("is ", "red", 0, 0),
    ],
)
def test_open_questions_among_multiple_choice(prediction, answer, as_options, by_mmmu):
    assert open_as_choice(prediction, answer, "letter-or-text") == as_options
    assert open_match(prediction, answer) == by_mmmu


@pytest.mark.parametrize(
    ("prediction", "chosen"),  # by mmstar, lmms-eval-ai2d, lmms-eval-realworldqa and lmms-eval-2026
    [
        ("B", "BBBB"),
        ("b", "BBB."),
        ("B.", "BBBB"),
        (" B. blue", "BBCB"),
        ("(B)", "BBBB"),
        ("(b) or so", "B..."),
        ("Option B", "B..B"),
        ("The answer is B", "B..B"),
        ("the answer is (B)", ".  B".replace(" ", ".")),
        ("blue", "B.C."),
        ("a blue one", "A.C."),
        ("The correct answer is red", "..A."),
        ("two", "..D."),
        ("Blue!", "B.BB"),  # a capital B anywhere, if there is no better sign
        ("B is wrong, the answer is C because D", "B..B"),
        ("I choose C, not the D here", "...D"),
        ("It may be (A) or C: yes", "...A"),
        ("Zebra A) or B: no", "...B"),
        ("CAT A", "C..A"),
        ("\nC\n", "C.CC"),
        ("Blue or red", "B.BB"),
        ("Xb (", "...."),
        ("(A) is not XB", "A..A"),
        ("the answer is C, not (A) but D1", "C..D"),
        ("(A) (B) (A) x", "A..A"),
        ("", "...."),
        ("?!", "...."),
    ],
)
def test_how_lmms_eval_finds_a_letter(prediction, chosen):
    options = {"A": "red", "B": "Blue", "C": "blue", "D": "2"}
    rules = ("mmstar", "lmms-eval-ai2d", "lmms-eval-realworldqa", "lmms-eval-2026")
    assert "".join(chosen_letter(prediction, options, rule) or "." for rule in rules) == chosen


@pytest.mark.parametrize(
    ("prediction", "answer", "until_2026", "since"),
    [
        ("Two", "2", True, False),
        ("None", "0", False, False),
        ("2.", "2", True, True),
        ("Uphill!", "uphill", True, False),
        ("up", "down", False, False),
    ],
)
def test_open_questions_of_realworldqa(prediction, answer, until_2026, since):
    assert open_answer_is_right(prediction, answer, "lmms-eval-realworldqa") == until_2026
    assert open_answer_is_right(prediction, answer, "lmms-eval-2026") == since


@pytest.mark.parametrize(
    ("prediction", "chosen"),  # by evalscope and evalscope-four; there are A, B and C
    [
        ("ANSWER: B", "BB"),
        ("First A, then C.\n**Answer: B**", "BB"),
        ("answer:**(B)** since C", "BB"),
        ("ANSWER: [LETTER]\nANSWER: B\nANSWER: unsure", "BB"),  # the last one that letters follow
        ("ANSWER: B, not C", "BB"),
        ("ANSWER: B and that is all", "BB"),
        ("ANSWER: A and B", ".."),
        ("ANSWER: (A/B)", ".."),
        ("ANSWER: AB", ".."),
        ("ANSWER: $\\boxed{\\text{B}}$", "BB"),
        ("ANSWER: D", ".."),
        ("ANSWER: DA\nso C", "C."),
        ("B", "BB"),
        ("b", ".."),
        ("It is B, as The text says", ".."),  # the last capital is T
        ("Not A but C, I see", ".."),
        ("the first is A, the other C", "CC"),
        ("", ".."),
    ],
)
def test_how_evalscope_finds_a_letter(prediction, chosen):
    options = {"A": "red", "B": "Blue", "C": "blue"}
    rules = (LABEL, FOUR_LABELS)
    assert "".join(chosen_letter(prediction, options, rule) or "." for rule in rules) == chosen


@pytest.mark.parametrize(
    ("prediction", "line", "line_or_all"),
    [
        ("It grows.\nANSWER: 45 %\nDone.", "45 %", "45 %"),
        ("ANSWER: 1\n**Answer: two**", "two", "two"),
        ("ANSWER:", "", ""),
        (" forty \n", None, "forty"),
    ],
)
def test_the_line_that_evalscope_compares(prediction, line, line_or_all):
    assert answer_line(prediction) == line and answer_line_or_all(prediction) == line_or_all


def test_what_evalscope_makes_of_zero_and_of_white_space():
    assert [relaxed_accuracy(said, ["0"], "evalscope") for said in ("0.0", "0%", "0.01", "zero")] == [1, 1, 0, 0]
    assert anls("ab  d", ["abxd"], "evalscope") == 0.75 and anls("abcdef", ["abcxyz"], "evalscope") == 0.5


def test_options_whose_texts_are_equal_or_begin_alike():
    options = {"A": "red", "B": "red", "C": "blue", "D": "blue sky"}
    assert [chosen_letter(said, options, "lmms-eval-realworldqa") for said in ("red", "blue sky")] == ["B", "C"]


def test_a_letter_without_an_option_is_not_chosen():
    assert chosen_letter("D", {"A": "x", "B": "y"}, "llava-scienceqa") == ""
    assert chosen_letter("The answer is D.", {"A": "x"}, "llava-scienceqa") == ""


@pytest.mark.parametrize(
    ("prediction", "said"),
    [
        ("Yes", "yyyyyy"),
        ("no", "nnnnnn"),
        ("No, there is no dog.", "nnnn.n"),
        ("Yes, there is.", "yyyy.y"),
        ("There is not.", "n....."),
        ("A dog. No cat.", "y..n.n"),
        ("Yes and no", "nyy..y"),
        ("know", "ynn..."),  # within the first four characters
        ("y", "y.y..."),
        ("Y.", "y.y..."),
        (" Yes", "yyyyyy"),
        ("", "y....."),
        ("unsure", "y....."),
        ("NO", "ynnnnn"),
        ("yes!", "yyyy.y"),
        ("It says yes", "y..y.."),
        ("YES, not NO", "nyy..."),
        ("Note: Yes", "ynny.y"),
    ],
)
def test_what_a_prediction_says(prediction, said):
    rules = ("llava-pope", "mme", "lmms-eval-mme", "words", "exact", "evalscope")
    assert set(rules) == set(yes_no.RULES)
    assert "".join(yes_or_no(prediction, rule)[:1] or "." for rule in rules) == said


def test_rates_of_yes():
    rates = yes_no_rates(true_yes=30, false_yes=10, false_no=20, true_no=40)
    assert rates["accuracy"] == 70 and rates["precision"] == 75 and rates["recall"] == 60 and rates["yes_ratio"] == 40
    assert rates["f1"] == pytest.approx(200 / 3)
    assert yes_no_rates(0, 0, 0, 0) == dict.fromkeys(rates, 0.0)
    assert yes_no_rates(0, 0, 5, 5) == dict.fromkeys(rates, 0.0) | {"accuracy": 50.0}


RECEIPT = {"company": "ACME  Ltd", "total": "9.50", "items": [{"name": "tea", "n": 2}, {"name": "cup", "n": 1}]}


@pytest.mark.parametrize(
    ("prediction", "counts", "readable"),
    [
        (RECEIPT, (6, 0, 0), True),
        (RECEIPT | {"items": RECEIPT["items"][::-1]}, (6, 0, 0), True),  # the order of a list does not count
        (RECEIPT | {"total": 9.5}, (5, 1, 1), True),
        (RECEIPT | {"company": "acme ltd"}, (5, 1, 1), True),
        (RECEIPT | {"date": "today"}, (6, 0, 1), True),
        ({"total": "9.50"}, (1, 5, 0), True),
        ({"items": RECEIPT["items"] + RECEIPT["items"][:1]}, (4, 2, 2), True),  # once too often
        ({}, (0, 6, 0), True),
        ("no JSON at all", (0, 6, 0), False),
        ("[1, 2]", (0, 6, 0), False),
        ('{"total": ', (0, 6, 0), False),
    ],
)
def test_fields(prediction, counts, readable):
    said = prediction if isinstance(prediction, str) else json.dumps(prediction)
    found = field_counts(said, json.dumps(RECEIPT))
    assert (found.matched, found.missing, found.extra, found.readable) == (*counts, readable)
    assert found.exact == (counts == (6, 0, 0))
    assert found.f1 == pytest.approx(counts[0] / (counts[0] + (counts[1] + counts[2]) / 2))


@pytest.mark.slow
def test_objects_are_found_among_words():
    assert first_object('Sure!\n```json\n{"a": {"b": 1}}\n```\n{"c": 2}') == {"a": {"b": 1}}
    assert first_object('{oops} {"a": 1}') == {"a": 1}
    assert first_object("[" * 5_000 + '{"a":' * 5_000) is None
    assert field_counts('{"a": "X"}', '{"a": "x"}', ignore_case=True).exact
    assert field_f1(0, 0) == 1 and field_f1(0, 3) == 0
    with pytest.raises(ValueError, match="not a JSON object"):
        field_counts("{}", "[]")


@pytest.mark.parametrize("word", ["nan", "-inf", "1e999", "Infinity"])
def test_numbers_that_are_not_finite(word):
    assert relaxed_accuracy(word, [word], "pix2struct") == 0  # |x - x| / |x| is not a number in its source
    assert relaxed_accuracy(word.upper(), [word], "paper") == 1 and relaxed_accuracy("5", [word], "paper") == 0


@pytest.mark.slow
@settings(max_examples=300)
@given(ANY_TEXT, st.lists(ANY_TEXT, min_size=1, max_size=4), st.randoms())
def test_any_text_has_a_score_in_range_that_the_order_of_answers_does_not_change(prediction, answers, draw):
    shuffled = draw.sample(answers, len(answers))
    scores = [(anls, p) for p in text.ANLS_PROTOCOLS] + [(relaxed_accuracy, p) for p in numbers.PROTOCOLS]
    scores += [(exact_match, p) for p in text.EXACT_PROTOCOLS]
    for metric, protocol in scores:
        value = metric(prediction, answers, protocol)
        assert 0 <= value <= 1 and metric(prediction, shuffled, protocol) == value
        if metric is not relaxed_accuracy or protocol == "paper":
            assert metric(answers[0], answers, protocol) == 1
    assert contains_answer(prediction, answers) == contains_answer(prediction, shuffled)
    for unit in ("character", "word"):
        edits, length = error_counts(prediction, answers, unit)
        assert edits >= 0 and length >= 0 and error_counts(answers[0], answers, unit)[0] == 0
        other = error_counts(prediction, shuffled, unit)
        assert edits * max(1, other[1]) == other[0] * max(1, length)


@settings(max_examples=300)
@given(ANY_TEXT, st.dictionaries(st.sampled_from("ABCDE"), ANY_TEXT, max_size=5), st.randoms())
def test_any_text_chooses_an_option_or_none(prediction, options, draw):
    shuffled = dict(draw.sample(list(options.items()), len(options)))
    for rule in choices.RULES:
        letter = chosen_letter(prediction, options, rule)
        assert letter in {*options, "", "Z"}
        assert rule.endswith("mmmu") or chosen_letter(prediction, shuffled, rule) == letter
        assert open_as_choice(prediction, "24", rule) in (0, 1)
    for rule in yes_no.RULES:
        assert yes_or_no(prediction, rule) in ("yes", "no", "")
    assert all(open_match(prediction, text) in (0, 1) for text in options.values())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200)
@given(ANY_TEXT, st.dictionaries(st.text(max_size=3), JSON, max_size=3))
def test_any_text_has_fields_or_none(prediction, annotated):
    answer = json.dumps(annotated)
    assert 0 <= field_counts(prediction, answer).f1 <= 1
    assert field_counts(answer, answer).exact and field_counts(answer, answer).f1 == 1


@settings(max_examples=200)
@given(*[st.integers(0, 50)] * 4)
def test_rates_are_in_range_and_those_of_their_definition(true_yes, false_yes, false_no, true_no):
    rates = yes_no_rates(true_yes, false_yes, false_no, true_no)
    assert all(0 <= rate <= 100 for rate in rates.values())
    if true_yes:
        assert math.isclose(rates["f1"], 200 * true_yes / (2 * true_yes + false_yes + false_no))


@pytest.mark.parametrize(
    "call",
    [
        lambda: exact_match("a", ["a"], "x"),
        lambda: anls("a", ["a"], "x"),
        lambda: relaxed_accuracy("a", ["a"], "x"),
        lambda: chosen_letter("a", {}, "x"),
        lambda: yes_or_no("a", "x"),
        lambda: anls("a", []),
        lambda: error_counts("a", [], "word"),
    ],
)
def test_unknown_protocols_and_questions_without_answers_are_refused(call):
    with pytest.raises(ValueError, match="no protocol is named 'x'|no rule is named 'x'|without answers"):
        call()


def test_edit_distance_against_its_recursive_definition():
    def slow(first, second):
        if not first or not second:
            return len(first) + len(second)
        if first[-1] == second[-1]:
            return slow(first[:-1], second[:-1])
        return 1 + min(slow(first[:-1], second), slow(first, second[:-1]), slow(first[:-1], second[:-1]))

    draw = random.Random(0)
    for _ in range(200):
        first, second = ("".join(draw.choices("ab", k=draw.randrange(6))) for _ in range(2))
        assert edit_distance(first, second) == slow(first, second)
