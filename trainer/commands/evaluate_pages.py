"""The files of an evaluation: pages to browse its answers, and where all of them are."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_llama31.trainer.commands.score_tables import print_notes


if TYPE_CHECKING:
    from rich.progress import Progress

    from llava_llama31.trainer.evaluation.questions import Question
    from llava_llama31.trainer.evaluation.task_evaluation import TaskEvaluation, TaskToAsk
    from llava_llama31.trainer.evaluation.textvqa import Evaluation


def write_task_pages(
    asked: "Sequence[TaskToAsk]", evaluations: "Sequence[TaskEvaluation]", progress: "Progress"
) -> list[Path]:
    """Write the page of each task beside its answers."""
    from llava_llama31.trainer.evaluation.task_browser import write_task_browser

    pages = []
    for part, evaluation in zip(asked, evaluations, strict=True):
        pages.append(evaluation.predictions.with_suffix(".html"))
        progress.add_task(f"writing the browser of {part.task.name}")
        write_task_browser(part.task, part.to_ask.questions, _rows(evaluation.predictions), pages[-1])
    return pages


def write_page(evaluation: "Evaluation[Any]", questions: "Sequence[Question]", progress: "Progress") -> Path:
    """Write the page of TextVQA's questions beside their answers."""
    from llava_llama31.trainer.evaluation.browser import write_browser

    page = evaluation.predictions.with_suffix(".html")
    task = progress.add_task("writing the browser")
    write_browser(
        questions,
        _rows(evaluation.predictions),
        page,
        on_progress=lambda done, total: progress.update(task, completed=done, total=total),
    )
    return page


def _rows(predictions: Path) -> list[dict[str, Any]]:
    with predictions.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def print_files(evaluation: "Evaluation[Any]", part: "TaskToAsk | None", pages: Sequence[Path]) -> None:
    """Say where answers, submission and page are, and what has to be known about the scores."""
    from llava_llama31.trainer.evaluation.task_evaluation import TaskEvaluation
    from llava_llama31.trainer.terminal import Terminal

    Terminal().print(f"answers: {evaluation.predictions} ({evaluation.seconds:.1f} s)")
    if isinstance(evaluation, TaskEvaluation):
        print_notes([evaluation.note])
        if evaluation.submission is not None and part is not None and part.task.submission is not None:
            Terminal().print(f"for {part.task.submission.server}: {evaluation.submission}")
    for page in pages:
        Terminal().print(f"to browse: {page}")
