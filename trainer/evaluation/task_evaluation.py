"""Ask a model the questions of a task, and score the answers by the task's protocols."""

from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import PartialState
from transformers import LlavaNextForConditionalGeneration

from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.judging import judge_of
from llava_llama31.trainer.evaluation.presets import Preset
from llava_llama31.trainer.evaluation.questions import Question
from llava_llama31.trainer.evaluation.settings import EvaluationSettings
from llava_llama31.trainer.evaluation.task_files import Task
from llava_llama31.trainer.evaluation.task_questions import load_task_questions
from llava_llama31.trainer.evaluation.task_scoring import TaskReport, answered, protocol_for, score_task
from llava_llama31.trainer.evaluation.textvqa import Evaluation, answer_questions


def questions_to_ask(
    task: Task, data: str | None, *, image_root: str | None = None, limit: int | None = None
) -> list[Question]:
    """The questions of a task with their images, and every function that will score them loaded.

    Args:
        task: says where a question's parts are.
        data: file, folder or pattern; default: the task's own.
        image_root: folder of the images; default: that of the data.
        limit: the first so many questions.

    Raises:
        UserError: there are no data, a question has no image, or a user's function cannot be had.
    """
    for protocol in task.protocols.values():
        judge_of(task, protocol)
    source = data if data is not None else task.data
    if source is None:
        raise UserError(f"no questions of {task.name}", where="--data", fix="name their file: --data FILE")
    questions = load_task_questions(task, source, image_root=image_root)
    without = [question.question_id for question in questions if not question.image_id]
    if without and not task.only_with_image:
        what = f"{len(without)} questions of {task.name} have no image, the first {without[0]}"
        raise UserError(what, where=source, fix="ask only those with one: only_with_image, as scienceqa-img")
    return [question for question in questions if question.image_id][:limit]


def preset_of(task: Task, name: str) -> Preset:
    """How a preset words a task's questions.

    Raises:
        UserError: the task has no such preset.
    """
    if name not in task.prompts:
        fix = f"one of {', '.join(task.prompts)}" if task.prompts else "give the task prompts"
        raise UserError(f"{task.name} has no prompt of {name}", where="--preset", fix=fix)
    return Preset(name, task.prompts[name], capitalize=name in task.capitalized)


def evaluate_task(
    task: Task,
    model: LlavaNextForConditionalGeneration,
    processor: LlavaLlama31Processor,
    questions: Sequence[Question],
    output: str | Path,
    settings: EvaluationSettings,
    *,
    processes: PartialState | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation[TaskReport]:
    """Answer a task's questions by greedy generation and score the answers.

    The headline's protocol is the preset's if the task has one of that name, else the task's.

    Args:
        task: says how answers are scored.
        model: LlavaNext, unwrapped.
        processor: the model's.
        questions: those of `questions_to_ask`.
        output: folder for predictions.jsonl, settings.json and scores.json.
        settings: with the task's preset.
        processes: those that evaluate together, each with the whole model.
        on_progress: called with (questions done, all questions).

    Raises:
        UserError: as `answer_questions`, or not one question could be answered.
    """
    found = answer_questions(
        model, processor, questions, output, settings, processes=processes, on_progress=on_progress
    )
    name = settings.preset.name
    protocol = protocol_for(task, "", name if name in task.protocols else None)
    report = score_task(task, answered(task, questions, found.rows), protocol)
    evaluation = Evaluation(report, found.path, found.seconds, found.settings)
    if processes is None or processes.is_main_process:
        found.write_scores(evaluation.to_json())
    return evaluation
