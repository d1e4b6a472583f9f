"""Ask a model the questions of a task, and score the answers by the task's protocols."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import LlavaNextForConditionalGeneration

from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.answering import Answers, ToAsk, answer_together
from llava_llama31.trainer.evaluation.judging import judge_of
from llava_llama31.trainer.evaluation.presets import Preset
from llava_llama31.trainer.evaluation.questions import Question
from llava_llama31.trainer.evaluation.settings import EvaluationSettings
from llava_llama31.trainer.evaluation.submissions import submission_file, write_submission
from llava_llama31.trainer.evaluation.task_files import Task
from llava_llama31.trainer.evaluation.task_questions import is_scored, labels_note, load_task_questions
from llava_llama31.trainer.evaluation.task_scoring import TaskReport, answered, protocol_for, score_task
from llava_llama31.trainer.evaluation.textvqa import Evaluation


def questions_to_ask(
    task: Task,
    data: str | None,
    *,
    image_root: str | None = None,
    max_pixels: int | None = None,
    limit: int | None = None,
) -> list[Question]:
    """The questions of a task with their images, and every function that will score them loaded.

    Args:
        task: says where a question's parts are.
        data: file, folder or pattern; default: the task's own.
        image_root: folder of the images; default: that of the data.
        max_pixels: of the largest image that is read, height x width.
        limit: ask only the first N questions.

    Raises:
        UserError: there are no data, a question has no image, or a user's function cannot be had.
    """
    for protocol in task.protocols.values():
        judge_of(task, protocol)
    source = data if data is not None else task.data
    if source is None:
        raise UserError(f"no questions of {task.name}", where="--data", fix="name their file: --data FILE")
    loaded = load_task_questions(task, source, image_root=image_root, max_pixels=max_pixels)
    questions = [question for question in loaded if not question.left_out]
    without = [question for question in questions if not question.image_id]
    if without and not task.only_with_image:
        first = f"{without[0].question_id} ({without[0].question!r:.60})"
        fields = ", ".join(dict.fromkeys(layout.image for layout in task.layouts if layout.image))
        fix = f"give each question one, in {fields or 'a field that a layout names as image'}"
        if task.folder is None and task.dataset is not None:
            fix = "ask only those with one: only_with_image, as scienceqa-img"
        what = f"{len(without)} questions of {task.name} have no image, the first {first}"
        raise UserError(what, where=source, fix=fix)
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


@dataclass(frozen=True)
class TaskToAsk:
    """A task, and its questions with where their answers go."""

    task: Task
    to_ask: ToAsk


@dataclass(frozen=True)
class TaskEvaluation(Evaluation[TaskReport]):
    """A finished evaluation of a task, the file for its server where the answers are not public, and its note."""

    submission: Path | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The report's numbers, then files, seconds, settings and note."""
        more = {"submission": str(self.submission) if self.submission else "", "note": self.note}
        return super().to_json() | {name: value for name, value in more.items() if value}


def evaluate_tasks(
    model: LlavaNextForConditionalGeneration,
    processor: LlavaLlama31Processor,
    asked: Sequence[TaskToAsk],
    *,
    processes: PartialState | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[TaskEvaluation]:
    """Answer the questions of tasks by greedy generation, with one reading of each image, and score the answers.

    Args:
        model: LlavaNext, unwrapped.
        processor: the model's.
        asked: with the questions of `questions_to_ask`, and settings with the task's preset.
        processes: those that evaluate together, each with the whole model.
        on_progress: called with (questions done, all questions).

    Raises:
        UserError: as `answer_together`, or not one question of a task could be answered.
    """
    found = answer_together(
        model, processor, [part.to_ask for part in asked], processes=processes, on_progress=on_progress
    )
    writes = processes is None or processes.is_main_process
    return [score_found(part, answers, writes=writes) for part, answers in zip(asked, found, strict=True)]


def score_found(asked: TaskToAsk, found: Answers, *, writes: bool) -> TaskEvaluation:
    """Score the answers of a task.

    The headline's protocol is the preset's if the task has one of that name, else the task's.

    Args:
        writes: also write scores.json beside the answers, and the submission where the task's answers are not public.

    Raises:
        UserError: not one question could be answered.
    """
    task, questions = asked.task, asked.to_ask.questions
    name = asked.to_ask.settings.preset.name
    protocol = protocol_for(task, "", name if name in task.protocols else None)
    answers = answered(task, questions, found.rows)
    submission = None if is_scored(task, questions) else submission_file(task, found.path.parent)
    report, notes = score_task(task, answers, protocol), [labels_note(questions)]
    if task.hides_options(name):
        notes.append("the prompt does not show the options: the one that an answer names is its choice")
    note = "; ".join(filter(None, notes))
    evaluation = TaskEvaluation(report, found.path, found.seconds, found.settings, submission, note)
    if writes:
        if submission is not None:
            write_submission(task, answers, submission)
        found.write_scores(evaluation.to_json())
    return evaluation


def evaluate_task(
    task: Task,
    model: LlavaNextForConditionalGeneration,
    processor: LlavaLlama31Processor,
    questions: Sequence[Question],
    output: str | Path,
    settings: EvaluationSettings,
) -> TaskEvaluation:
    """`evaluate_tasks` for one task."""
    return evaluate_tasks(model, processor, [TaskToAsk(task, ToAsk(questions, output, settings))])[0]
