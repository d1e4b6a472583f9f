"""`llava-llama31 browse`."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llava_llama31.trainer.commands.options import add_max_pixels, add_reading, counted, positive, told_apart
from llava_llama31.trainer.redaction import plain


if TYPE_CHECKING:
    from llava_llama31.trainer.evaluation.browser import Answers, Browser, Marking
    from llava_llama31.trainer.evaluation.questions import Question


HELP = "write one HTML file with every question, image, answer and score; two answer files side by side"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("predictions", metavar="PREDICTIONS", help="what `evaluate` wrote, or another tool's answers")
    parser.add_argument("other", nargs="?", metavar="OTHER", help="a second file, shown beside the first")
    parser.add_argument(
        "--data", metavar="FILE", help="questions as JSON lines, official JSON or parquet; a task's may be a folder"
    )
    parser.add_argument("--task", metavar="NAME|FILE", help="a benchmark, or a task of your own; default: TextVQA")
    parser.add_argument("--questions", metavar="FILE", help="LLaVA's question file for a task")
    parser.add_argument("--image-root", metavar="DIR", help="folder of the images; default: the folder of FILE")
    add_max_pixels(parser)
    parser.add_argument(
        "--output", metavar="FILE.html", help="page to write; default: beside PREDICTIONS, with its name"
    )
    add_reading(parser)
    parser.add_argument("--limit", type=positive, metavar="N", help="show only the first N questions")
    parser.add_argument("--image-side", type=positive, metavar="PX", help="longest side of an image; default: 512")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")


def run(options: argparse.Namespace) -> int:
    """Exit code 0 once the file is written."""
    from llava_llama31.trainer.errors import UserError
    from llava_llama31.trainer.evaluation.browser import IMAGE_SIDE, write_browser, write_comparison
    from llava_llama31.trainer.terminal import Terminal

    if options.task is None and (options.data is None or options.questions is not None):
        where = "--data" if options.data is None else "--questions"
        raise UserError("no questions" if options.data is None else "goes with --task", where=where, fix="name a task")
    questions, files, title, marking = _task_answers(options) if options.task is not None else _answers(options)
    # all questions were read, whatever the limit: answers to those beyond it are not unknown
    shown = questions[: options.limit]
    beyond = {str(question.question_id) for question in questions[len(shown) :]}
    files = [replace(file, rows=[row for row in file.rows if str(row["question_id"]) not in beyond]) for file in files]
    ending = ".html" if len(files) == 1 else ".compared.html"
    output = Path(options.output or Path(options.predictions).with_suffix(ending))
    with Terminal(stderr=True).progress() as progress:
        task = progress.add_task("images", total=None)

        def on_progress(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        side = options.image_side or IMAGE_SIDE
        if len(files) == 1:
            browser = write_browser(
                shown,
                files[0].rows,
                output,
                title=title,
                note=files[0].note,
                image_side=side,
                on_progress=on_progress,
                marking=marking,
            )
        else:
            first, second = files
            browser = write_comparison(
                shown, first, second, output, title=title, image_side=side, on_progress=on_progress, marking=marking
            )
    _print_browser(browser, files)
    if options.open:
        import webbrowser

        webbrowser.open(output.resolve().as_uri())
    return 0


def _paths(options: argparse.Namespace) -> list[str]:
    return [options.predictions] if options.other is None else [options.predictions, options.other]


def _answers(options: argparse.Namespace) -> "tuple[list[Question], list[Answers], str, Marking | None]":
    """Questions as TextVQA's, the files of answers, the page's title, and how answers are marked."""
    from llava_llama31.trainer.evaluation.answer_files import Reading, read_answers
    from llava_llama31.trainer.evaluation.browser import Answers
    from llava_llama31.trainer.evaluation.questions import load_questions

    questions = load_questions(options.data, image_root=options.image_root, max_pixels=options.max_pixels)
    paths, reading = _paths(options), Reading(options.columns, options.where)
    read = [read_answers(path, questions, reading) for path in paths]
    files = [Answers(file.rows, name, file.note) for name, file in zip(told_apart(paths), read, strict=True)]
    what = Path(options.predictions).name if len(files) == 1 else "Two files of answers"
    return questions, files, f"{what} on {Path(options.data).name}", None


def _task_answers(options: argparse.Namespace) -> "tuple[list[Question], list[Answers], str, Marking | None]":
    """The same for a task."""
    from llava_llama31.trainer.errors import UserError
    from llava_llama31.trainer.evaluation.answer_files import Reading
    from llava_llama31.trainer.evaluation.browser import Answers
    from llava_llama31.trainer.evaluation.task_answers import read_task_answers
    from llava_llama31.trainer.evaluation.task_browser import marking_of
    from llava_llama31.trainer.evaluation.task_files import load_task
    from llava_llama31.trainer.evaluation.task_questions import counted as counted_of
    from llava_llama31.trainer.evaluation.task_questions import load_task_questions

    task = load_task(options.task)
    data = options.data or task.data
    if data is None:
        raise UserError(f"no questions of {task.name}", where="--data", fix="name their file, with the images")
    questions = load_task_questions(task, data, image_root=options.image_root, max_pixels=options.max_pixels)
    paths, reading = _paths(options), Reading(options.columns, options.where)
    read = [
        read_task_answers(task, path, annotations=data, questions=options.questions, reading=reading) for path in paths
    ]
    shown = counted_of(task, questions)
    known = {str(question.question_id) for question in shown}
    others = {str(question.question_id) for question in questions} - known
    files = []
    for name, file in zip(told_apart(paths), read, strict=True):
        rows = [row for row in file.rows if str(row["question_id"]) not in others]
        files.append(Answers(rows, name, file.note))
    return shown, files, task.title, marking_of(task)


def _print_browser(browser: "Browser", files: "Sequence[Answers]") -> None:
    from llava_llama31.trainer.terminal import Terminal, shown_size

    terminal, size = Terminal(), shown_size(browser.path.stat().st_size)
    held = f"{counted(browser.num_questions, 'question')}, {counted(browser.num_images, 'image')}, {size}"
    lines = [f"{browser.path}: {held}"]
    if browser.num_unanswered:
        lines.append(f"without an answer: {browser.num_unanswered}")
    named = {
        "images not shown": [f"{image_id} ({reason})" for image_id, reason in browser.unreadable.items()],
        "answers left out because their questions are not in the data": browser.unknown,
    }
    for what, ids in named.items():
        if ids:
            more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
            lines.append(f"{what}: {len(ids)}: {', '.join(map(plain, ids[:5]))}{more}")
    for line in [*lines, *(f"note: {note}" for note in dict.fromkeys(file.note for file in files) if note)]:
        terminal.print(plain(line))
