"""`llava-llama31 browse`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llava_llama31.trainer.commands.options import positive
from llava_llama31.trainer.redaction import plain


if TYPE_CHECKING:
    from llava_llama31.trainer.evaluation.browser import Browser


HELP = "one HTML file with every question, image, answer and score"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("predictions", metavar="PREDICTIONS")
    parser.add_argument(
        "--data", metavar="FILE", help="JSON lines, official JSON, or parquet; a task's may be a folder"
    )
    parser.add_argument("--task", metavar="NAME|FILE", help="a benchmark, or a task of one's own; default: TextVQA")
    parser.add_argument("--questions", metavar="FILE", help="LLaVA's questions of a task")
    parser.add_argument("--image-root", metavar="DIR", help="default: the folder of FILE")
    parser.add_argument("--output", metavar="FILE.html", help="default: beside PREDICTIONS, with its name")
    parser.add_argument("--limit", type=positive, metavar="N", help="show only the first N questions")
    parser.add_argument("--image-side", type=positive, metavar="PX", help="longest side of an image; default: 512")


def run(options: argparse.Namespace) -> int:
    """Exit code 0 once the file is written."""
    from llava_llama31.trainer.errors import UserError
    from llava_llama31.trainer.evaluation.answer_files import read_answers
    from llava_llama31.trainer.evaluation.browser import IMAGE_SIDE, write_browser
    from llava_llama31.trainer.evaluation.questions import load_questions
    from llava_llama31.trainer.terminal import Terminal

    if options.task is not None:
        return _browse_task(options)
    if options.data is None or options.questions is not None:
        where = "--data" if options.data is None else "--questions"
        raise UserError("no questions" if options.data is None else "goes with --task", where=where, fix="name a task")
    # all questions, whatever the limit: answers to those beyond it are not unknown
    questions = load_questions(options.data, image_root=options.image_root)
    answers = read_answers(options.predictions, questions)
    shown = questions[: options.limit]
    beyond = {str(question.question_id) for question in questions[len(shown) :]}
    with Terminal(stderr=True).progress() as progress:
        task = progress.add_task("images", total=None)
        browser = write_browser(
            shown,
            [row for row in answers.rows if str(row["question_id"]) not in beyond],
            options.output or Path(options.predictions).with_suffix(".html"),
            title=f"{Path(options.predictions).name} on {Path(options.data).name}",
            note=answers.note,
            image_side=options.image_side or IMAGE_SIDE,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    _print_browser(browser, answers.note)
    return 0


def _browse_task(options: argparse.Namespace) -> int:
    from llava_llama31.trainer.errors import UserError
    from llava_llama31.trainer.evaluation.answer_files import Reading
    from llava_llama31.trainer.evaluation.browser import IMAGE_SIDE
    from llava_llama31.trainer.evaluation.task_answers import read_task_answers
    from llava_llama31.trainer.evaluation.task_browser import write_task_browser
    from llava_llama31.trainer.evaluation.task_files import load_task
    from llava_llama31.trainer.evaluation.task_questions import load_task_questions
    from llava_llama31.trainer.terminal import Terminal

    task = load_task(options.task)
    data = options.data or task.data
    if data is None:
        raise UserError(f"no questions of {task.name}", where="--data", fix="name their file, with the images")
    questions = load_task_questions(task, data, image_root=options.image_root)
    answers = read_task_answers(
        task, options.predictions, annotations=data, questions=options.questions, reading=Reading({}, {})
    )
    shown = questions[: options.limit]
    beyond = {str(question.question_id) for question in questions[len(shown) :]}
    with Terminal(stderr=True).progress() as progress:
        bar = progress.add_task("images", total=None)
        browser = write_task_browser(
            task,
            shown,
            [row for row in answers.rows if str(row["question_id"]) not in beyond],
            Path(options.output or Path(options.predictions).with_suffix(".html")),
            note=answers.note,
            image_side=options.image_side or IMAGE_SIDE,
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    _print_browser(browser, answers.note)
    return 0


def _print_browser(browser: "Browser", note: str) -> None:
    from llava_llama31.trainer.terminal import Terminal

    terminal, megabytes = Terminal(), browser.path.stat().st_size / 1e6
    counted = f"{browser.num_questions} questions, {browser.num_images} images, {megabytes:.1f} MB"
    lines = [f"{browser.path}: {counted}"]
    if browser.num_unanswered:
        lines.append(f"without an answer: {browser.num_unanswered}")
    named = {
        "images not shown": [f"{image_id} ({reason})" for image_id, reason in browser.unreadable.items()],
        "answers left out, as their questions are not in the data": browser.unknown,
    }
    for what, ids in named.items():
        if ids:
            more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
            lines.append(f"{what}: {len(ids)}: {', '.join(map(plain, ids[:5]))}{more}")
    for line in [*lines, f"note: {note}"] if note else lines:
        terminal.print(plain(line))
