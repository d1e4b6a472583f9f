"""`llava-llama31 evaluate`: a model folder and a question file to answers, scores and a page to browse them."""

import atexit
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from llava_llama31.trainer.evaluation.presets import PRESETS, check_ocr
from llava_llama31.trainer.evaluation.questions import Question, load_questions
from llava_llama31.trainer.evaluation.scoring import EXIT_INCOMPLETE, print_json, print_report
from llava_llama31.trainer.model.locating import local_checkpoint


if TYPE_CHECKING:
    from accelerate import PartialState
    from rich.progress import Progress

    from llava_llama31.trainer.evaluation.textvqa import Evaluation


def evaluate_command(
    model: str,
    *,
    data: str,
    questions_file: str | None = None,
    image_root: str | None = None,
    preset: str = "card",
    ocr: str | None = None,
    jpeg_rounds: int = 0,
    limit: int | None = None,
    batch_size: int | None = None,
    max_new_tokens: int = 64,
    batch_invariant: bool = False,
    dtype: str = "auto",
    device: str | None = None,
    blind: bool = False,
    output: str | None = None,
    browser: bool = True,
    json_output: bool = False,
) -> int:
    """`llava-llama31 evaluate`: exit code 0, or 3 if a question could not be answered.

    Under `accelerate launch` the processes share the questions, and the first one prints.
    """
    # before the weights: it fails faster
    questions = load_questions(data, questions=questions_file, image_root=image_root, limit=limit)
    if ocr is None:
        check_ocr(PRESETS[preset], questions)
    import transformers

    from llava_llama31.trainer.evaluation.asker import digest
    from llava_llama31.trainer.evaluation.textvqa import evaluate, weights_revision
    from llava_llama31.trainer.model.opening import open_model

    transformers.utils.logging.disable_progress_bar()  # ours is enough
    processes = _processes(device)
    folder = local_checkpoint(model, where="MODEL")
    loaded, processor = open_model(folder, dtype=dtype, device=processes.device if processes else device)
    revision = weights_revision(folder) or "unknown"
    if output is None:
        asked = [revision, data, limit, preset, ocr, jpeg_rounds, batch_size, max_new_tokens, batch_invariant, blind]
        asked_hash = digest([*asked, str(loaded.dtype)])
        output = str(Path("runs", "evaluate", f"{Path(model).name}-{Path(data).stem}-{asked_hash[:8]}"))
    is_main = processes is None or processes.is_main_process
    with _progress(is_main) as progress:
        if ocr is not None:
            questions = _read_by_ocr(questions, output, processes, progress)
        task = progress.add_task("answering", total=len(questions))
        evaluation = evaluate(
            loaded,
            processor,
            questions,
            output,
            revision=revision,
            preset=PRESETS[preset],
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            batch_invariant=batch_invariant,
            jpeg_rounds=jpeg_rounds,
            blind_seed=0 if blind else None,
            processes=processes,
            on_progress=lambda done, _: progress.update(task, completed=done),
        )
        if is_main and browser:
            page = _write_browser(evaluation, questions, progress)
    if is_main:
        from rich.console import Console

        if json_output:
            print_json(evaluation.to_json())
        else:
            title = f"{Path(model).name} on {Path(data).name}, prompt {preset}{', pictures shuffled' if blind else ''}"
            print_report(evaluation.report, title)
            console = Console(soft_wrap=True)
            console.print(f"answers: {evaluation.predictions} ({evaluation.seconds:.1f} s)", markup=False)
            if browser:
                console.print(f"to browse: {page}", markup=False)
    if processes is not None:
        processes.wait_for_everyone()  # a launcher ends all processes as soon as one ends with another code than 0
    return 0 if evaluation.report.complete or not is_main else EXIT_INCOMPLETE


def _write_browser(evaluation: "Evaluation", questions: Sequence[Question], progress: "Progress") -> Path:
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
    """Those that `accelerate launch` or torchrun started, if more than one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    import torch
    from accelerate import PartialState

    # the first process may read pictures by OCR for hours
    processes = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=timedelta(hours=24))
    atexit.register(processes.destroy_process_group)  # its threads abort a process whose interpreter is gone
    return processes


def _progress(shown: bool) -> "Progress":
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown)


def _read_by_ocr(
    questions: list[Question], output: str, processes: "PartialState | None", progress: "Progress"
) -> list[Question]:
    """Questions with OCR tokens; the first process reads the pictures, the others its results."""
    from llava_llama31.trainer.evaluation.ocr import with_ocr_tokens

    with processes.main_process_first() if processes else nullcontext():
        task = progress.add_task("reading by OCR")
        cache = Path(output, "ocr_tokens.jsonl")
        return with_ocr_tokens(
            questions, cache, lambda done, total: progress.update(task, completed=done, total=total)
        )
