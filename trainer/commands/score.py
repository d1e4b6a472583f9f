"""`llava-llama31 score`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_llama31.trainer.commands.options import add_json
from llava_llama31.trainer.commands.score_tables import print_comparison, print_json, print_notes, print_report


if TYPE_CHECKING:
    from llava_llama31.trainer.evaluation.answer_files import AnswerFile
    from llava_llama31.trainer.evaluation.questions import Question


HELP = "score a predictions file, or compare two; no model needed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "predictions", metavar="PREDICTIONS", help="ours, LLaVA's answers, lmms-eval's JSON, VLMEvalKit's TSV or xlsx"
    )
    parser.add_argument("other", nargs="?", metavar="OTHER", help="a second file, compared with the first")
    parser.add_argument("--annotations", required=True, metavar="FILE", help="JSON lines, JSON, TSV or parquet")
    parser.add_argument("--questions", metavar="FILE", help="the questions that go with VQA-style annotations")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Exit code 0, or 3 if answers are missing, failed, doubled or unknown."""
    from llava_llama31.trainer.evaluation.answer_files import read_answers
    from llava_llama31.trainer.evaluation.questions import load_questions
    from llava_llama31.trainer.evaluation.scoring import EXIT_INCOMPLETE, score_answers

    annotated = load_questions(options.annotations, questions=options.questions, with_images=False)
    annotations = Path(options.annotations).name
    if options.other is not None:
        return _compare(options.predictions, options.other, annotated, annotations, options.json_output)
    file = read_answers(options.predictions, annotated)
    report = score_answers(annotated, file.rows)
    if options.json_output:
        print_json(report.to_json() | _origin(options.predictions, file))
    else:
        print_report(report, f"{Path(options.predictions).name} ({file.layout}) against {annotations}")
        print_notes([file])
    return 0 if report.complete else EXIT_INCOMPLETE


def _compare(first: str, second: str, questions: list["Question"], annotations: str, json_output: bool) -> int:
    from llava_llama31.trainer.evaluation.answer_files import read_answers
    from llava_llama31.trainer.evaluation.scoring import EXIT_INCOMPLETE, compare_answers

    files = [read_answers(path, questions) for path in (first, second)]
    comparison = compare_answers(questions, files[0].rows, files[1].rows)
    if json_output:
        value = comparison.to_json()
        value["first"] |= _origin(first, files[0])
        value["second"] |= _origin(second, files[1])
        print_json(value)
    else:
        names = [f"{Path(path).name} ({file.layout})" for path, file in zip((first, second), files, strict=True)]
        print_comparison(comparison, f"B = {names[1]} against A = {names[0]}, annotations {annotations}")
        print_notes(files)
    return 0 if comparison.first.complete and comparison.second.complete else EXIT_INCOMPLETE


def _origin(path: str, file: "AnswerFile") -> dict[str, Any]:
    return {"predictions": path, "layout": file.layout} | ({"note": file.note} if file.note else {})
