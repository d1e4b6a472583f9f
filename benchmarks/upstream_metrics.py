"""Our metrics beside lmms-eval's and EvalScope's own functions on generated answers, exit code 1 if they differ.

make upstream, or python benchmarks/upstream_metrics.py FOLDER, which holds lmms_eval/ and evalscope/

The functions are taken out of their files by name and run alone, because importing the packages takes their whole
environments. They are read at run time from the installed packages; nothing of them is in this project.
"""

import argparse
import ast
import random
import re
import statistics
import string
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import numpy as np

from llava_llama31.trainer.evaluation.metrics.choices import chosen_letter
from llava_llama31.trainer.evaluation.metrics.evalscope import answer_line, answer_line_or_all
from llava_llama31.trainer.evaluation.metrics.numbers import relaxed_accuracy
from llava_llama31.trainer.evaluation.metrics.open_answers import open_match
from llava_llama31.trainer.evaluation.metrics.text import anls, contains_answer, exact_match
from llava_llama31.trainer.evaluation.metrics.yes_no import yes_or_no
from llava_llama31.trainer.evaluation.vqa_accuracy import vqa_accuracy


WORDS = [
    "yes",
    "Yes.",
    "no",
    "No",
    "not",
    "y",
    "N",
    "A",
    "B.",
    "(C)",
    "D",
    "The answer is B.",
    "red",
    "Red",
    "5",
    "5%",
]
WORDS += ["0.05", "10.4", "10", "0", "1,000", "-3", "ß", "İ", "a  b", "x ^ 2", "x^2", "hello", "world", "\n", ".", ""]
WORDS += [
    "ANSWER: B",
    "Answer: ",
    "**answer: ",
    "\nANSWER: C, not",
    "A and B",
    "$\\boxed{B",
    "[B]",
    "YES",
    "NO",
    "yes.",
    "not B",
]
WORDS += ["not B", "DNA", "C.1", "is ", "the answer is", "=", "2.4e1", "24", "1,024", "wendy's", "U.S.", "Red\n"]
FORMULA = "HME100k"


def functions(path: Path, *names: str, **used: Any) -> dict[str, Any]:
    """Functions, classes and values of a Python file by name, with nothing around them but what they use."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            node.decorator_list = []  # they register a metric
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node
    missing = set(names) - found.keys()
    if missing:
        sys.exit(f"{path} has no {', '.join(sorted(missing))}")
    wanted = [found[name] for name in names]
    # where MMMU's rule finds no letter it draws one; here such an answer chooses none
    draw = SimpleNamespace(choice=lambda letters: "")
    space: dict[str, Any] = {"re": re, "string": string, "np": np, "random": draw, **used}
    space |= {"Optional": Optional, "List": list}
    exec(compile(ast.Module(body=wanted, type_ignores=[]), str(path), "exec"), space)
    return space


def vqa_pairs(root: Path) -> dict[str, tuple[Callable[..., float], Callable[..., float]]]:
    """VQA accuracy of each task that has it, of ten annotators; VQAv2 is compared by another rule than the others."""
    processor = functions(root / "tasks/_task_utils/vqa_eval_metric.py", "EvalAIAnswerProcessor")[
        "EvalAIAnswerProcessor"
    ]
    used = {"EvalAIAnswerProcessor": processor, "statistics": statistics}

    def ten(answers: list[str]) -> list[str]:
        return (answers * 10)[:10]

    def pair(task: str, rule: str) -> tuple[Callable[..., float], Callable[..., float]]:
        score = functions(root / f"tasks/{task}/utils.py", f"{task}_process_results", **used)[
            f"{task}_process_results"
        ]

        def theirs(prediction: str, answers: list[str]) -> float:
            given: list[Any] = ten(answers)
            if task == "vqav2":
                given = [{"answer": answer, "answer_id": number} for number, answer in enumerate(given)]
            return float(score({"question_id": 0, "answers": given}, [prediction])["exact_match"])

        return theirs, lambda prediction, answers: vqa_accuracy(prediction, ten(answers), rule)

    rules = {"textvqa": "m4c", "vizwiz_vqa": "m4c", "vqav2": "vlmevalkit-2024"}
    return {f"VQA accuracy, {task}": pair(task, rule) for task, rule in rules.items()}


def by_exact_match(root: Path) -> Callable[[str, str], float]:
    """lmms-eval's `exact_match` as its tasks use it, of a prediction and an answer."""
    text = functions(root / "api/metrics.py", "exact_match_hf_evaluate")

    def score(prediction: str, answer: str) -> float:
        found = text["exact_match_hf_evaluate"]([prediction], [answer], ignore_case=True, ignore_punctuation=True)
        return float(found["exact_match"])

    return score


def choice_pairs(root: Path) -> dict[str, tuple[Callable[..., float], Callable[..., float]]]:
    """Whether B is chosen, by each task with options."""
    science = functions(root / "tasks/scienceqa/utils.py", "sqa_doc_to_target", "sqa_process_results")
    seed = functions(root / "tasks/seedbench/utils.py", "seed_process_result")
    letters = functions(root / "tasks/_task_utils/mmmu_mcq_utils.py", "parse_mmmu_multi_choice_response")
    tables = ("_DEFAULT_CHOICES", "_ANSWER_PHRASES", "_FORMAT_PRIORITY")
    extract = functions(root / "tasks/_task_utils/mcq_extract.py", *tables, "extract_mcq_answer")["extract_mcq_answer"]
    ai2d = functions(root / "tasks/ai2d/utils.py", "MultiChoiceRegexFilter", ExtendedRegexFilter=object)
    exact = by_exact_match(root)
    options = dict(zip("ABCD", ["red", "blue", "hello", "10"], strict=True))
    doc = {"choices": list(options.values()), "answer": 1}

    seed_doc = {"answer": "B", "data_type": "", "question_id": 0}

    return {
        "ScienceQA": (
            lambda p, a: science["sqa_process_results"](doc, [p])["exact_match"],
            lambda p, a: float(chosen_letter(p, options, "lmms-eval-scienceqa") == "B"),
        ),
        "SEED-Bench": (
            lambda p, a: seed["seed_process_result"](seed_doc, [p])["seed_all"]["pred"].lower() == "b",
            lambda p, a: chosen_letter(p, options, "first-letter") == "B",
        ),
        "MMStar and RealWorldQA": (
            lambda p, a: extract(p, choices=list(options)) == "B",
            lambda p, a: chosen_letter(p, options, "lmms-eval-2026") == "B",
        ),
        "AI2D": (
            lambda p, a: exact(ai2d["MultiChoiceRegexFilter"]().apply([[p]], [{}])[0], "B"),
            lambda p, a: float(chosen_letter(p, options, "lmms-eval-ai2d") == "B"),
        ),
        "MMMU": (
            lambda p, a: letters["parse_mmmu_multi_choice_response"](p, list(options), options) == "B",
            lambda p, a: chosen_letter(p, options, "lmms-eval-mmmu") == "B",
        ),
    }


def pairs(root: Path) -> dict[str, tuple[Callable[..., float], Callable[..., float]]]:
    """Metric -> (theirs, ours), each of (prediction, answers)."""
    text = functions(root / "api/metrics.py", "levenshtein_distance", "anls")
    exact = by_exact_match(root)
    chart = functions(root / "tasks/chartqa/utils.py", "relaxed_correctness")
    mme = functions(root / "tasks/mme/utils.py", "parse_pred_ans")
    pope = functions(root / "tasks/pope/utils.py", "pope_process_results")
    ocr = functions(root / "tasks/ocrbench/utils.py", "_fold_fullwidth_ascii", "ocrbench_process_results")
    parsers = ("parse_open_response", "eval_open", "normalize_str", "check_is_number", "extract_numbers")
    openly = functions(root / "tasks/mmmu/utils.py", *parsers)

    def pope_doc(answers: list[str]) -> dict[str, Any]:
        return {"answer": "yes" if len(answers) % 2 else "no", "question_id": 0}

    def ocr_doc(answers: list[str], dataset: str) -> dict[str, Any]:
        return {"answer": answers, "dataset": dataset, "question_type": ""}

    return (
        vqa_pairs(root)
        | choice_pairs(root)
        | {
            "ANLS": (lambda p, a: text["anls"](a, [p])["anls"], lambda p, a: anls(p, a, "lmms-eval")),
            "relaxed accuracy": (
                lambda p, a: float(chart["relaxed_correctness"](p, a[0])),
                lambda p, a: relaxed_accuracy(p, a[:1], "lmms-eval"),
            ),
            "MME": (
                lambda p, a: mme["parse_pred_ans"](p) == "yes",
                lambda p, a: yes_or_no(p, "lmms-eval-mme") == "yes",
            ),
            "POPE": (
                lambda p, a: pope["pope_process_results"](pope_doc(a), [p])["pope_accuracy"]["score"],
                lambda p, a: float(yes_or_no(p, "exact") == pope_doc(a)["answer"]),
            ),
            "exact match": (lambda p, a: exact(p, a[0]), lambda p, a: exact_match(p, a[:1], "lmms-eval")),
            "MMMU, open": (
                lambda p, a: float(openly["eval_open"](a[0], openly["parse_open_response"](p))),
                lambda p, a: open_match(p, a[0]),
            ),
            "OCRBench": (
                lambda p, a: ocr["ocrbench_process_results"](ocr_doc(a, ""), [p])["ocrbench_accuracy"]["score"],
                contains_answer,
            ),
            "OCRBench, formulas": (
                lambda p, a: ocr["ocrbench_process_results"](ocr_doc(a, FORMULA), [p])["ocrbench_accuracy"]["score"],
                lambda p, a: contains_answer(p, a, formula=True),
            ),
        }
    )


def evalscope_pairs(root: Path) -> dict[str, tuple[Callable[..., float], Callable[..., float]]]:
    """EvalScope's rules, as `pairs`."""
    patterns = ("_ANSWER_MARKER_RE", "_BRACKETED_LABEL_RE", "_LATEX_LABEL_PREFIX_RE", "_PLAIN_LABEL_RE")
    labels = ("_LABEL_TOKEN_RE", "_LABEL_CONNECTORS", "_LABEL_CONNECTOR_RE", "_is_label_word", "_label_prefix")
    readers = ("_fallback_parse_answer", "_last_labelled_answer", "answer_character", "parse_answers")
    path = root / "utils/multi_choices.py"
    choices = functions(path, *patterns, *labels, *readers, "extract_answer_line", TaskState=object)
    words = ("_YES_PATTERN", "_NO_PATTERN", "_LOWERCASE_EXACT_PATTERN")
    verdict = functions(root / "utils/yes_no.py", *words, "extract_verdict")["extract_verdict"]
    chart = functions(root / "benchmarks/chartqa/utils.py", "relaxed_correctness")
    parsers = ("parse_open_response", "eval_open", "normalize_str", "check_is_number", "extract_numbers")
    openly = functions(root / "benchmarks/mmmu/utils.py", *parsers)
    line = choices["extract_answer_line"]

    def letter(prediction: str, num_options: int) -> str:
        state = SimpleNamespace(choices=[None] * num_options)
        return "".join(sorted(choices["parse_answers"](state, completion=prediction)))

    return {
        "EvalScope, letters": (
            lambda p, a: letter(p, 3) == "B",
            lambda p, a: chosen_letter(p, dict.fromkeys("ABC", "x"), "evalscope") == "B",
        ),
        "EvalScope, four letters": (
            lambda p, a: letter(p, 4) == "B",
            lambda p, a: chosen_letter(p, dict.fromkeys("ABCDE", "x"), "evalscope-four") == "B",
        ),
        "EvalScope, yes": (
            lambda p, a: (verdict(p, allow_lowercase_exact=True) or "").lower() == "yes",
            lambda p, a: yes_or_no(p, "evalscope") == "yes",
        ),
        "EvalScope, relaxed accuracy": (
            lambda p, a: float(chart["relaxed_correctness"](line(p) or "", a[0])),
            lambda p, a: relaxed_accuracy(answer_line(p) or "", a[:1], "evalscope"),
        ),
        "EvalScope, MMMU, open": (
            lambda p, a: float(
                openly["eval_open"](a[0], openly["parse_open_response"](p.strip() if line(p) is None else line(p)))
            ),
            lambda p, a: open_match(answer_line_or_all(p), a[0]),
        ),
    }


def main() -> int:
    """Compare and print; 1 if a score differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds lmms_eval/ and evalscope/")
    parser.add_argument("--answers", type=int, default=10_000)
    options = parser.parse_args()
    draw, worst = random.Random(0), 0
    compared = pairs(options.folder / "lmms_eval") | evalscope_pairs(options.folder / "evalscope")
    for name, (theirs, ours) in compared.items():
        differing: list[str] = []
        scores: list[float] = []
        for _ in range(options.answers):
            prediction = " ".join(draw.choices(WORDS, k=draw.randrange(4)))
            answers = [" ".join(draw.choices(WORDS, k=draw.randrange(1, 3))) for _ in range(draw.randrange(1, 4))]
            scores.append(float(theirs(prediction, answers)))
            if abs(scores[-1] - float(ours(prediction, answers))) > 1e-12:
                differing.append(f"{prediction!r} against {answers!r}: {scores[-1]}")
        worst = max(worst, len(differing))
        print(f"{name}: {len(differing)} of {options.answers} differ, mean {sum(scores) / len(scores):.4f}")
        for line in differing[:3]:
            print(f"  {line}")
    return int(worst > 0)


if __name__ == "__main__":
    sys.exit(main())
