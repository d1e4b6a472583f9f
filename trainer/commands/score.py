"""`llava-llama31 score`."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_llama31.trainer.commands.options import add_json, add_reading, told_apart
from llava_llama31.trainer.commands.score_tables import (
    print_comparison,
    print_json,
    print_notes,
    print_report,
    print_task_comparison,
    print_task_report,
)


if TYPE_CHECKING:
    from llava_llama31.trainer.evaluation.answer_files import AnswerFile, Reading
    from llava_llama31.trainer.evaluation.questions import Question
    from llava_llama31.trainer.evaluation.task_answers import TaskAnswers
    from llava_llama31.trainer.evaluation.task_files import Task
    from llava_llama31.trainer.evaluation.task_scoring import Answered, TaskReport


HELP = "score a predictions file, or compare two; no model needed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "predictions",
        metavar="PREDICTIONS",
        help="ours, or answers of LLaVA's scripts, lmms-eval, VLMEvalKit or EvalScope",
    )
    parser.add_argument("other", nargs="?", metavar="OTHER", help="a second file, compared with the first")
    parser.add_argument("--task", metavar="NAME|FILE", help="a benchmark, or a task of your own; default: TextVQA")
    parser.add_argument("--protocol", metavar="NAME", help="protocol of the task's headline score")
    parser.add_argument(
        "--annotations",
        metavar="FILE",
        help="annotated questions as JSON lines, JSON, TSV or parquet; a task's may be a folder",
    )
    parser.add_argument(
        "--questions",
        metavar="FILE",
        help="the questions that go with VQA-style annotations, or LLaVA's question file for a task",
    )
    add_reading(parser)
    parser.add_argument("--submission", metavar="FILE", help="write the answers for the task's server, in its format")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Exit code 0, or 3 if answers are missing, failed, doubled or unknown."""
    from llava_llama31.trainer.errors import UserError
    from llava_llama31.trainer.evaluation.answer_files import Reading
    from llava_llama31.trainer.evaluation.row_files import refuse_to_compare_parts

    reading = Reading(options.columns, options.where)
    if options.other is not None:
        refuse_to_compare_parts(Path(options.predictions), Path(options.other))
    if options.task is not None:
        return _score_task(options, reading)
    if options.submission is not None:
        raise UserError("whose server?", where="--submission", fix="name the benchmark with --task")
    if options.annotations is None:
        raise UserError("no annotations", where="--annotations", fix="name the file, or a benchmark with --task")
    if options.protocol is not None:
        fix = "leave it out: without a task all three are printed"
        raise UserError("goes with --task", where="--protocol", fix=fix)
    return _score_textvqa(options, reading)


def _score_textvqa(options: argparse.Namespace, reading: "Reading") -> int:
    from llava_llama31.trainer.evaluation.answer_files import read_answers
    from llava_llama31.trainer.evaluation.questions import load_questions
    from llava_llama31.trainer.evaluation.scoring import EXIT_INCOMPLETE, score_answers

    annotated = load_questions(options.annotations, questions=options.questions, with_images=False)
    annotations = Path(options.annotations).name
    if options.other is not None:
        return _compare(options, annotated, reading)
    file = read_answers(options.predictions, annotated, reading)
    report = score_answers(annotated, file.rows)
    if options.json_output:
        print_json(report.to_json() | _origin(options.predictions, file))
    else:
        print_report(report, f"{Path(options.predictions).name} ({file.layout}) against {annotations}")
        print_notes([file.note])
    return 0 if report.complete else EXIT_INCOMPLETE


def _compare(options: argparse.Namespace, questions: list["Question"], reading: "Reading") -> int:
    from llava_llama31.trainer.evaluation.answer_files import read_answers
    from llava_llama31.trainer.evaluation.scoring import EXIT_INCOMPLETE, compare_answers

    paths = (options.predictions, options.other)
    files = [read_answers(path, questions, reading) for path in paths]
    comparison = compare_answers(questions, files[0].rows, files[1].rows)
    if options.json_output:
        value = comparison.to_json()
        value["first"] |= _origin(paths[0], files[0])
        value["second"] |= _origin(paths[1], files[1])
        print_json(value)
    else:
        names = [f"{name} ({file.layout})" for name, file in zip(told_apart(paths), files, strict=True)]
        annotations = Path(options.annotations).name
        print_comparison(comparison, f"B = {names[1]} against A = {names[0]}, annotations {annotations}")
        print_notes(file.note for file in files)
    return 0 if comparison.first.complete and comparison.second.complete else EXIT_INCOMPLETE


def _score_task(options: argparse.Namespace, reading: "Reading") -> int:
    from llava_llama31.trainer.errors import UserError
    from llava_llama31.trainer.evaluation.scoring import EXIT_INCOMPLETE
    from llava_llama31.trainer.evaluation.task_answers import read_task_answers
    from llava_llama31.trainer.evaluation.task_files import load_task
    from llava_llama31.trainer.evaluation.task_scoring import answered, compare_task, protocol_for, score_task

    task = load_task(options.task)
    paths = [options.predictions, *([options.other] if options.other is not None else [])]
    files = [
        read_task_answers(task, path, annotations=options.annotations, questions=options.questions, reading=reading)
        for path in paths
    ]
    whole, task = task, min((file.task for file in files), key=lambda part: len(part.protocols))
    if options.protocol in whole.protocols and options.protocol not in task.protocols:
        what = f"{options.protocol} needs categories, which the answers do not say"
        raise UserError(what, where="--protocol", fix=f"pass the annotations of {task.name} with --annotations")
    protocol = protocol_for(task, files[0].layout, options.protocol)
    sets = [answered(task, file.questions, file.rows) for file in files]
    submitted = _submit(options, task, sets)
    names = [f"{name} ({file.layout})" for name, file in zip(told_apart(paths), files, strict=True)]
    if len(sets) == 2:
        comparison = compare_task(task, sets[0], sets[1], protocol)
        value = comparison.to_json()
        reports, parts = [comparison.first, comparison.second], [value["first"], value["second"]]
        if not options.json_output:
            print_task_comparison(comparison, f"{task.title}: B = {names[1]} against A = {names[0]}")
    else:
        reports = [score_task(task, sets[0], protocol)]
        value = reports[0].to_json() | submitted
        parts = [value]
        if not options.json_output:
            print_task_report(reports[0], f"{task.title}: {names[0]}")
    files = [_with_unclear(*each) for each in zip(files, reports, sets, strict=True)]
    for part, path, file in zip(parts, paths, files, strict=True):
        part.update(_origin(path, file))
    if options.json_output:
        print_json(value)
    else:
        print_notes([*(file.note for file in files), *submitted.values()])
    return 0 if all(report.complete for report in reports) else EXIT_INCOMPLETE


def _with_unclear(file: "TaskAnswers", report: "TaskReport", found: "Answered") -> "TaskAnswers":
    """The file with a note on answers that say none of what the protocol looks for, where it has some."""
    from llava_llama31.trainer.evaluation.answer_files import VLMEVALKIT
    from llava_llama31.trainer.evaluation.task_scoring import num_yes_for_want_of_no

    if not report.protocols:
        return file
    notes = [file.note]
    if num_unclear := report.protocols[report.protocol].num_unclear:
        notes.append(f"{num_unclear} answers choose nothing by {report.protocol} and are wrong here")
    if num_unclear and file.layout == VLMEVALKIT:
        notes.append("where VLMEvalKit ran with a judge, a language model read them, and its figure differs")
    if num_yes := num_yes_for_want_of_no(file.task, found, report.protocol):
        what = f"{num_yes} answers have no word yes and count as yes by {report.protocol}"
        notes.append(f"{what}, which takes everything for it but no and not")
    return replace(file, note="; ".join(note for note in notes if note))


def _submit(options: argparse.Namespace, task: "Task", sets: "list[Answered]") -> dict[str, str]:
    """Write the submission, if one is asked for; refuse answers that can neither be scored nor be submitted."""
    from llava_llama31.trainer.errors import UserError
    from llava_llama31.trainer.evaluation.submissions import write_submission
    from llava_llama31.trainer.evaluation.task_questions import is_scored

    if options.submission is None and is_scored(task, sets[0].questions):
        return {}
    if options.submission is None:
        what = (
            "these questions have no annotated answers" if task.protocols else "a language model grades these answers"
        )
        raise UserError(what, where=task.name, fix="pass annotations, or --submission FILE for the task's server")
    if len(sets) == 2:
        raise UserError("one file for two sets of answers", where="--submission", fix="pass one set of answers")
    write_submission(task, sets[0], Path(options.submission))
    return {"submission": options.submission}


def _origin(path: str, file: "AnswerFile | TaskAnswers") -> dict[str, Any]:
    return {"predictions": path, "layout": file.layout} | ({"note": file.note} if file.note else {})
