"""`llava-llama31 evaluate`: a model folder and a question file to answers, scores and a page to browse them."""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava_llama31.trainer.commands.evaluate_pages import print_files, write_page, write_task_pages
from llava_llama31.trainer.commands.evaluate_questions import (
    task_questions,
    tasks_to_ask,
    textvqa_questions,
    with_settings,
)
from llava_llama31.trainer.commands.options import add_json, add_max_pixels, positive
from llava_llama31.trainer.commands.quick_imports import quick_imports
from llava_llama31.trainer.commands.score_tables import print_json, print_report, print_task_report
from llava_llama31.trainer.evaluation.presets import PRESET_NAMES, PRESETS
from llava_llama31.trainer.evaluation.settings import EvaluationSettings


if TYPE_CHECKING:
    from accelerate import PartialState
    from rich.progress import Progress

    from llava_llama31 import LlavaLlama31ForConditionalGeneration
    from llava_llama31.processing import LlavaLlama31Processor
    from llava_llama31.trainer.evaluation.questions import Question
    from llava_llama31.trainer.evaluation.scoring import Report
    from llava_llama31.trainer.evaluation.task_evaluation import TaskEvaluation, TaskToAsk
    from llava_llama31.trainer.evaluation.textvqa import Evaluation


HELP = "ask a model the questions of a TextVQA-format file, a benchmark or a file of your own"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder that stock Transformers opens as LlavaNext")
    parser.add_argument(
        "--data", metavar="FILE", help="questions as JSON lines, official JSON or parquet; a task's may be a folder"
    )
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME|FILE[=DATA]",
        help="a benchmark, a task of your own, or a file of questions; default: TextVQA",
    )
    parser.add_argument("--questions", metavar="FILE", help="the questions that go with VQA-style annotations")
    parser.add_argument("--image-root", metavar="DIR", help="folder of the images; default: the folder of FILE")
    add_max_pixels(parser)
    parser.add_argument("--preset", choices=PRESET_NAMES, default="card", help="whose prompt to use; default: card")
    parser.add_argument("--ocr", choices=("rapidocr",), help="read OCR tokens for --preset llava from the images")
    parser.add_argument(
        "--jpeg-rounds",
        type=int,
        choices=range(10),
        default=0,
        metavar="N",
        help="re-encode each image N times; the card did it twice",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="ask only the first N questions")
    parser.add_argument(
        "--batch-size",
        type=_number_or_auto,
        metavar="N|auto",
        help="questions answered at once; default: auto, by the device's memory",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help=f"longest answer in tokens; default: {EvaluationSettings.max_new_tokens}, or the task's",
    )
    parser.add_argument(
        "--batch-invariant", action="store_true", help="make bfloat16 answers independent of the batch size; slower"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="type to compute in; default: auto, the model's own, or float32 where a CPU emulates it",
    )
    parser.add_argument("--device", metavar="NAME", help="torch's name of a device; default: the GPU if there is one")
    _add_server(parser)
    parser.add_argument("--blind", action="store_true", help="shuffle the images between questions")
    parser.add_argument("--output", metavar="DIR", help="folder of the results; default: one under runs/evaluate")
    parser.add_argument("--no-browser", action="store_true", help="write no HTML file to browse")
    add_json(parser)


def _add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=("vllm",), help="serve MODEL with this engine and ask the server")
    parser.add_argument(
        "--engine-options",
        default="",
        metavar="TEXT",
        help='further options for the engine: "--tensor-parallel-size 2"',
    )
    parser.add_argument("--url", metavar="URL", help="ask an OpenAI-compatible server that serves MODEL already")
    parser.add_argument(
        "--served-model", metavar="NAME", help="MODEL's name there; default: the only one that is served"
    )
    parser.add_argument(
        "--concurrency", type=positive, default=16, metavar="N", help="questions at a time; default: 16"
    )
    parser.add_argument(
        "--compare",
        type=_number_or_none,
        default=16,
        metavar="N",
        help="how many of a server's answers to compare with this package's own; default: 16 per task, 0: none",
    )


def _number_or_auto(text: str) -> int | None:
    return None if text == "auto" else positive(text)


def _number_or_none(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Exit code 0, or 3 if a question could not be answered.

    Under `accelerate launch` the processes share the questions, and the first one prints.
    """
    from llava_llama31.trainer.errors import UserError
    from llava_llama31.trainer.evaluation.scoring import EXIT_INCOMPLETE

    if options.engine is not None or options.url is not None:
        from llava_llama31.trainer.commands.evaluate_served import run_served

        complete = run_served(options)
    elif options.task:
        complete = _run_tasks(options)
    elif options.data is None:
        raise UserError("no questions", where="--data", fix="name their file, or a benchmark with --task")
    else:
        complete = _run_textvqa(options)
    return 0 if complete else EXIT_INCOMPLETE


def _run_textvqa(options: argparse.Namespace) -> bool:
    """Whether every question is answered; true in other processes than the first."""
    # before the weights: it fails faster
    questions = textvqa_questions(options)
    with _launched(options.device) as processes:
        opened = _open(options, processes)
        settings = with_settings(options, opened.revision, PRESETS[options.preset], options.data)
        output = Path(options.output) if options.output else settings.folder(options.model, str(opened.model.dtype))
        is_main = processes is None or processes.is_main_process
        evaluation, page = _evaluate(opened, questions, output, settings, processes, not options.no_browser)
        if is_main:
            _print(options, evaluation, page)
        if processes is not None:
            processes.wait_for_everyone()  # a launcher ends all processes as soon as one ends with another code than 0
    return evaluation.report.complete or not is_main


def _run_tasks(options: argparse.Namespace) -> bool:
    """Ask all tasks together; whether every question is answered, true in other processes than the first."""
    with quick_imports():
        from llava_llama31.trainer.evaluation.task_evaluation import evaluate_tasks

    read = task_questions(options)
    with _launched(options.device) as processes:
        opened = _open(options, processes)
        is_main = processes is None or processes.is_main_process
        asked = tasks_to_ask(options, read, opened.revision, str(opened.model.dtype))
        with _progress(is_main) as progress:
            bar = progress.add_task(f"answering {', '.join(part.task.name for part in asked)}", total=None)

            def advance(done: int, total: int) -> None:
                progress.update(bar, completed=done, total=total)

            evaluations = evaluate_tasks(
                opened.model, opened.processor, asked, processes=processes, on_progress=advance
            )
            pages = write_task_pages(asked, evaluations, progress) if is_main and not options.no_browser else []
        if is_main:
            _print_tasks(options, asked, evaluations, pages)
        if processes is not None:
            processes.wait_for_everyone()
    return all(evaluation.report.complete for evaluation in evaluations) or not is_main


def what_is_kept(options: argparse.Namespace) -> str:
    """Where the same command resumes after a signal."""
    return "answered batches are kept: run the same command to ask the others"


@dataclass(frozen=True)
class _Opened:
    model: "LlavaLlama31ForConditionalGeneration"
    processor: "LlavaLlama31Processor"
    revision: str


def _open(options: argparse.Namespace, processes: "PartialState | None") -> _Opened:
    from llava_llama31.trainer.model.locating import model_folder

    folder = model_folder(options.model, where="MODEL")  # before torch is imported: it fails faster
    with quick_imports():
        import transformers

        from llava_llama31.trainer.distributed.devices import keep_freed_memory, refuse_unused_gpus
        from llava_llama31.trainer.evaluation.precision import answers_in_float32
        from llava_llama31.trainer.evaluation.textvqa import weights_revision
        from llava_llama31.trainer.model.opening import open_model

    transformers.utils.logging.disable_progress_bar()  # ours is enough
    if options.device is None:
        refuse_unused_gpus()
    device = processes.device if processes else options.device
    model, processor = open_model(folder, dtype=options.dtype, device=device)
    if _of_first(lambda: answers_in_float32(model, _say, insists=options.dtype != "auto"), processes):
        model = model.float()
    if model.device.type == "cpu":
        keep_freed_memory()
    return _Opened(model, processor, weights_revision(folder) or "unknown")


def _say(line: str) -> None:
    from llava_llama31.trainer.terminal import Terminal

    Terminal(stderr=True).print(line)


def _of_first(decide: Callable[[], bool], processes: "PartialState | None") -> bool:
    """What the first process decides."""
    from accelerate.utils import broadcast_object_list

    if processes is None:
        return decide()
    return broadcast_object_list([decide() if processes.is_main_process else None])[0]


def _evaluate(
    opened: _Opened,
    questions: "list[Question]",
    output: Path,
    settings: EvaluationSettings,
    processes: "PartialState | None",
    browser: bool,
) -> "tuple[Evaluation[Report], Path | None]":
    """The evaluation and, in the first process and if it is wanted, the page to browse it."""
    from llava_llama31.trainer.evaluation.textvqa import evaluate

    is_main = processes is None or processes.is_main_process
    with _progress(is_main) as progress:
        if settings.ocr is not None:
            questions = _read_by_ocr(questions, output, processes, progress)
        task = progress.add_task("answering", total=len(questions))
        evaluation = evaluate(
            opened.model,
            opened.processor,
            questions,
            output,
            settings,
            processes=processes,
            on_progress=lambda done, _: progress.update(task, completed=done),
        )
        return evaluation, write_page(evaluation, questions, progress) if is_main and browser else None


def _print(options: argparse.Namespace, evaluation: "Evaluation[Report]", page: Path | None) -> None:
    if options.json_output:
        print_json(evaluation.to_json())
        return
    title = f"{Path(options.model).name} on {Path(options.data).name}, prompt {options.preset}"
    print_report(evaluation.report, f"{title}, images shuffled" if options.blind else title)
    print_files(evaluation, None, [] if page is None else [page])


def _print_tasks(
    options: argparse.Namespace,
    asked: "Sequence[TaskToAsk]",
    evaluations: "Sequence[TaskEvaluation]",
    pages: Sequence[Path],
) -> None:
    if options.json_output:
        values = [evaluation.to_json() for evaluation in evaluations]
        print_json(values[0] if len(values) == 1 else {"tasks": values})
        return
    for number, (part, evaluation) in enumerate(zip(asked, evaluations, strict=True)):
        shuffled = ", images shuffled" if options.blind else ""
        title = f"{Path(options.model).name}, {part.task.title}, prompt {options.preset}{shuffled}"
        print_task_report(evaluation.report, title)
        print_files(evaluation, part, pages[number : number + 1])


@contextmanager
def _launched(device: str | None) -> "Iterator[PartialState | None]":
    """Context of the processes that `accelerate launch` or torchrun started, if more than one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    from llava_llama31.trainer.distributed.devices import uses_cpu
    from llava_llama31.trainer.fault_tolerance.peers import launched_processes

    with launched_processes(cpu=device == "cpu" or uses_cpu()) as (processes, _):
        yield processes


def _progress(shown: bool) -> "Progress":
    from llava_llama31.trainer.terminal import Terminal

    return Terminal(stderr=True).progress(visible=shown, counted=True)


def _read_by_ocr(
    questions: "list[Question]", output: Path, processes: "PartialState | None", progress: "Progress"
) -> "list[Question]":
    """Questions with OCR tokens; the first process reads the images, the others its results."""
    from llava_llama31.trainer.evaluation.ocr import with_ocr_tokens

    with processes.main_process_first() if processes else nullcontext():
        task = progress.add_task("reading by OCR")
        cache = output / "ocr_tokens.jsonl"
        return with_ocr_tokens(
            questions, cache, lambda done, total: progress.update(task, completed=done, total=total)
        )
