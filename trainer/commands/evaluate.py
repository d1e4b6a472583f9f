"""`llava-llama31 evaluate`: a model folder and a question file to answers, scores and a page to browse them."""

import argparse
import atexit
import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from llava_llama31.trainer.commands.options import add_json, positive
from llava_llama31.trainer.commands.score_tables import print_json, print_report
from llava_llama31.trainer.evaluation.presets import PRESETS, check_ocr
from llava_llama31.trainer.evaluation.settings import EvaluationSettings


if TYPE_CHECKING:
    from accelerate import PartialState
    from rich.progress import Progress

    from llava_llama31 import LlavaLlama31ForConditionalGeneration
    from llava_llama31.processing import LlavaLlama31Processor
    from llava_llama31.trainer.evaluation.questions import Question
    from llava_llama31.trainer.evaluation.textvqa import Evaluation


HELP = "ask a model the questions of a TextVQA-format file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder that stock Transformers opens as LlavaNext")
    parser.add_argument("--data", required=True, metavar="FILE", help="JSON lines, official JSON, or parquet")
    parser.add_argument("--questions", metavar="FILE", help="the questions that go with VQA-style annotations")
    parser.add_argument("--image-root", metavar="DIR", help="default: the folder of FILE")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="card", help="whose prompt; default: card")
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
        "--batch-size", type=_number_or_auto, metavar="N|auto", help="default: auto, by the device's memory"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=EvaluationSettings.max_new_tokens, metavar="N")
    parser.add_argument(
        "--batch-invariant", action="store_true", help="bfloat16 answers that no batch size changes; slower"
    )
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", metavar="NAME", help="torch's name; default: the GPU where there is one")
    parser.add_argument("--blind", action="store_true", help="shuffle the images between questions")
    parser.add_argument("--output", metavar="DIR", help="default: a folder under runs/evaluate")
    parser.add_argument("--no-browser", action="store_true", help="write no HTML file to browse")
    add_json(parser)


def _number_or_auto(text: str) -> int | None:
    return None if text == "auto" else positive(text)


def run(options: argparse.Namespace) -> int:
    """Exit code 0, or 3 if a question could not be answered.

    Under `accelerate launch` the processes share the questions, and the first one prints.
    """
    from llava_llama31.trainer.evaluation.questions import load_questions
    from llava_llama31.trainer.evaluation.scoring import EXIT_INCOMPLETE

    # before the weights: it fails faster
    questions = load_questions(
        options.data, questions=options.questions, image_root=options.image_root, limit=options.limit
    )
    if options.ocr is None:
        check_ocr(PRESETS[options.preset], questions)
    processes = _processes(options.device)
    model, processor, settings = _open(options, processes)
    output = Path(options.output) if options.output else settings.folder(options.model, str(model.dtype))
    is_main = processes is None or processes.is_main_process
    evaluation, page = _evaluate(model, processor, questions, output, settings, processes, not options.no_browser)
    if is_main:
        _print(options, evaluation, page)
    if processes is not None:
        processes.wait_for_everyone()  # a launcher ends all processes as soon as one ends with another code than 0
    return 0 if evaluation.report.complete or not is_main else EXIT_INCOMPLETE


def what_is_kept(options: argparse.Namespace) -> str:
    """From where the same command goes on after a signal."""
    return "the batches that are answered are kept: run the same command to ask the others"


def _open(
    options: argparse.Namespace, processes: "PartialState | None"
) -> "tuple[LlavaLlama31ForConditionalGeneration, LlavaLlama31Processor, EvaluationSettings]":
    """Model and processor, and the settings of their evaluation."""
    import transformers

    from llava_llama31.trainer.distributed.devices import refuse_unused_gpus
    from llava_llama31.trainer.evaluation.precision import answers_in_float32
    from llava_llama31.trainer.evaluation.textvqa import weights_revision
    from llava_llama31.trainer.model.locating import model_folder
    from llava_llama31.trainer.model.opening import open_model

    transformers.utils.logging.disable_progress_bar()  # ours is enough
    if options.device is None:
        refuse_unused_gpus()
    folder = model_folder(options.model, where="MODEL")
    device = processes.device if processes else options.device
    model, processor = open_model(folder, dtype=options.dtype, device=device)
    if _of_first(lambda: answers_in_float32(model, _say, insists=options.dtype != "auto"), processes):
        model = model.float()
    settings = EvaluationSettings(
        revision=weights_revision(folder) or "unknown",
        preset=PRESETS[options.preset],
        jpeg_rounds=options.jpeg_rounds,
        blind_seed=0 if options.blind else None,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        batch_invariant=options.batch_invariant,
        data=options.data,
        limit=options.limit,
        ocr=options.ocr,
    )
    return model, processor, settings


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
    model: "LlavaLlama31ForConditionalGeneration",
    processor: "LlavaLlama31Processor",
    questions: "list[Question]",
    output: Path,
    settings: EvaluationSettings,
    processes: "PartialState | None",
    browser: bool,
) -> "tuple[Evaluation, Path | None]":
    """The evaluation and, in the first process and if it is wanted, the page to browse it."""
    from llava_llama31.trainer.evaluation.textvqa import evaluate

    is_main = processes is None or processes.is_main_process
    with _progress(is_main) as progress:
        if settings.ocr is not None:
            questions = _read_by_ocr(questions, output, processes, progress)
        task = progress.add_task("answering", total=len(questions))
        evaluation = evaluate(
            model,
            processor,
            questions,
            output,
            settings,
            processes=processes,
            on_progress=lambda done, _: progress.update(task, completed=done),
        )
        return evaluation, _write_browser(evaluation, questions, progress) if is_main and browser else None


def _print(options: argparse.Namespace, evaluation: "Evaluation", page: Path | None) -> None:
    from llava_llama31.trainer.terminal import Terminal

    if options.json_output:
        print_json(evaluation.to_json())
        return
    title = f"{Path(options.model).name} on {Path(options.data).name}, prompt {options.preset}"
    print_report(evaluation.report, f"{title}, images shuffled" if options.blind else title)
    terminal = Terminal()
    terminal.print(f"answers: {evaluation.predictions} ({evaluation.seconds:.1f} s)")
    if page is not None:
        terminal.print(f"to browse: {page}")


def _write_browser(evaluation: "Evaluation", questions: Sequence["Question"], progress: "Progress") -> Path:
    from llava_llama31.trainer.evaluation.browser import write_browser

    with evaluation.predictions.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    page = evaluation.predictions.with_suffix(".html")
    task = progress.add_task("writing the browser")
    write_browser(
        questions, rows, page, on_progress=lambda done, total: progress.update(task, completed=done, total=total)
    )
    return page


def _processes(device: str | None) -> "PartialState | None":
    """The processes that `accelerate launch` or torchrun started, if more than one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import PartialState

    from llava_llama31.trainer.distributed.devices import uses_cpu

    # the first process may read images by OCR for hours
    processes = PartialState(cpu=device == "cpu" or uses_cpu(), timeout=timedelta(hours=24))
    atexit.register(processes.destroy_process_group)  # its threads abort a process whose interpreter is gone
    return processes


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
