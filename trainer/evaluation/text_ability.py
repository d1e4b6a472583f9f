"""What a model knows without an image: text-only questions, asked between stages and scored by their metrics."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlavaNextForConditionalGeneration

from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.generation import GreedyAnswerer
from llava_llama31.trainer.evaluation.judging import judge_of
from llava_llama31.trainer.evaluation.questions import Question
from llava_llama31.trainer.evaluation.task_files import Task, table_task
from llava_llama31.trainer.evaluation.task_questions import load_task_questions
from llava_llama31.trainer.evaluation.task_scoring import answered, score_task


@dataclass(frozen=True)
class TextQuestions:
    """Questions without images, and the task that scores them."""

    task: Task
    questions: list[Question]


def load_text_questions(path: str, *, limit: int | None = None) -> TextQuestions:
    """Read a table of questions: rows of question, answer and metric, as your own questions about images.

    Raises:
        UserError: the file can't be read, lacks a column, or has images.
    """
    file = Path(path).expanduser()
    task = table_task(file, with_images=False)
    for protocol in task.protocols.values():
        judge_of(task, protocol)
    return TextQuestions(task, load_task_questions(task, file, limit=limit, with_images=False))


def ask_text(
    model: LlavaNextForConditionalGeneration,
    processor: LlavaLlama31Processor,
    asked: TextQuestions,
    *,
    max_new_tokens: int,
    batch_size: int | None = None,
    beat: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Greedy answers in batches: {accuracy, num_questions, groups}, and one row a question.

    Raises:
        UserError: a question can't be answered; nothing is left out of the accuracy.
    """
    answerer = GreedyAnswerer(model, processor, max_new_tokens=max_new_tokens)
    prompts = [answerer.prompt(_messages(question)) for question in asked.questions]
    size = batch_size or answerer.auto_batch_size(0)
    # like length beside like; the longest first, where memory that lacks shows early
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number].input_ids))
    texts: dict[int, str] = {}
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        try:
            found = answerer.answer([prompts[number] for number in batch])
        except (RuntimeError, ValueError) as error:
            names = ", ".join(str(asked.questions[number].question_id) for number in batch[:3])
            raise UserError(
                f"questions {names} can't be answered: {error}",
                where="text_questions",
                fix="shorten them, or lower text_questions.batch_size",
            ) from error
        texts |= {number: answerer.text(ids) for number, ids in zip(batch, found, strict=True)}
        beat()
    rows = [
        {"question_id": question.question_id, "question": question.question, "answer": texts[number]}
        for number, question in enumerate(asked.questions)
    ]
    report = score_task(asked.task, answered(asked.task, asked.questions, rows), asked.task.protocol)
    scores = report.protocols[report.protocol]
    headline = scores.headline  # in percent
    groups = {name: metrics[headline] / 100 for name, metrics in scores.groups.items() if headline in metrics}
    summary = {"accuracy": scores.metrics[headline] / 100, "num_questions": report.num_questions, "groups": groups}
    return summary, rows


def _messages(question: Question) -> list[dict[str, Any]]:
    options = "".join(f"\n{letter}. {text}" for letter, text in question.options)
    return [{"role": "user", "content": [{"type": "text", "text": f"{question.question}{options}"}]}]
