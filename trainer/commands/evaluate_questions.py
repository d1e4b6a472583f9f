"""What `llava-llama31 evaluate` asks: its options as questions and settings, for our own engine and for a server."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llava_llama31.trainer.evaluation.presets import PRESETS, check_ocr
from llava_llama31.trainer.evaluation.settings import EvaluationSettings


if TYPE_CHECKING:
    from llava_llama31.trainer.evaluation.presets import Preset
    from llava_llama31.trainer.evaluation.questions import Question
    from llava_llama31.trainer.evaluation.task_evaluation import TaskToAsk
    from llava_llama31.trainer.evaluation.task_files import Task


def textvqa_questions(options: argparse.Namespace) -> "list[Question]":
    """The questions of --data, checked for what the preset needs."""
    from llava_llama31.trainer.errors import UserError
    from llava_llama31.trainer.evaluation.questions import load_questions, refuse_without_images

    if options.preset not in PRESETS:
        raise UserError("TextVQA's prompt there is that of card", where="--preset", fix="pass --preset card")
    questions = load_questions(
        options.data,
        questions=options.questions,
        image_root=options.image_root,
        max_pixels=options.max_pixels,
        limit=options.limit,
    )
    refuse_without_images(questions, options.data)
    if options.ocr is None:
        check_ocr(PRESETS[options.preset], questions)
    return questions


def task_questions(options: argparse.Namespace) -> "list[tuple[Task, str | None, Preset, list[Question]]]":
    """Each task with its data, its wording and its questions."""
    from llava_llama31.trainer.evaluation.questions import refuse_without_images
    from llava_llama31.trainer.evaluation.task_evaluation import preset_of, questions_to_ask

    read = []
    for task, data in _tasks(options):
        preset = preset_of(task, options.preset)
        questions = questions_to_ask(
            task, data, image_root=options.image_root, max_pixels=options.max_pixels, limit=options.limit
        )
        refuse_without_images(questions, data or str(task.data))
        check_ocr(preset, questions)
        read.append((task, data or task.data, preset, questions))
    return read


def tasks_to_ask(
    options: argparse.Namespace,
    read: "list[tuple[Task, str | None, Preset, list[Question]]]",
    revision: str,
    dtype: str,
) -> "list[TaskToAsk]":
    """The tasks with their settings and folders."""
    from llava_llama31.trainer.evaluation.answering import ToAsk
    from llava_llama31.trainer.evaluation.task_evaluation import TaskToAsk

    asked = []
    for task, data, preset, questions in read:
        settings = with_settings(options, revision, preset, f"{data}#{task.name}", task.max_new_tokens)
        output = settings.folder(options.model, dtype)
        if options.output:
            output = Path(options.output, task.name) if len(read) > 1 else Path(options.output)
        asked.append(TaskToAsk(task, ToAsk(questions, output, settings)))
    return asked


def _tasks(options: argparse.Namespace) -> "list[tuple[Task, str | None]]":
    """The tasks, each with the file that holds its questions."""
    from llava_llama31.trainer.errors import UserError
    from llava_llama31.trainer.evaluation.task_files import load_task

    for name in ("questions", "ocr"):
        if vars(options)[name] is not None:
            raise UserError("does not go with --task", where=f"--{name}", fix="leave it out")
    if options.data is not None and len(options.task) > 1:
        raise UserError("one file for several tasks", where="--data", fix="give each its own: --task NAME=FILE")
    tasks = []
    for text in options.task:
        name, _, data = text.partition("=")
        tasks.append((load_task(name), data or options.data))
    names = [task.name for task, _ in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{twice} is named twice", where="--task", fix="give the tasks different names")
    return tasks


def with_settings(
    options: argparse.Namespace,
    revision: str,
    preset: "Preset",
    data: str,
    max_new_tokens: int = EvaluationSettings.max_new_tokens,
) -> EvaluationSettings:
    """What the options say, for a model and a set of questions."""
    return EvaluationSettings(
        revision=revision,
        preset=preset,
        jpeg_rounds=options.jpeg_rounds,
        blind_seed=0 if options.blind else None,
        max_new_tokens=options.max_new_tokens or max_new_tokens,
        batch_size=options.batch_size,
        batch_invariant=options.batch_invariant,
        data=data,
        limit=options.limit,
        ocr=options.ocr,
    )
