"""Questions asked while a stage trains, by one process or many, on a model that is whole or sharded."""

import contextlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlavaNextForConditionalGeneration

from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.errors import naming
from llava_llama31.trainer.evaluation.asker import Asker
from llava_llama31.trainer.evaluation.generation import GreedyAnswerer, undisturbed
from llava_llama31.trainer.evaluation.presets import Preset
from llava_llama31.trainer.evaluation.questions import Question
from llava_llama31.trainer.evaluation.scoring import score_answers
from llava_llama31.trainer.evaluation.settings import EvaluationSettings
from llava_llama31.trainer.evaluation.task_files import Task
from llava_llama31.trainer.evaluation.task_scoring import answered, mean_value, protocol_for, score_task
from llava_llama31.trainer.evaluation.vqa_accuracy import PROTOCOL


logger = logging.getLogger(__name__)

BATCH_SIZE = 4  # beside optimizer and gradients there is little memory


@dataclass(frozen=True)
class TrainingQuestions:
    """What is asked, and how.

    Args:
        questions: the first ones of an evaluation.
        folder: gets one file of answers per evaluation, step-N.jsonl.
        name: what metrics are called after, in characters of a key; empty for the first evaluation, whose metrics are
            `accuracy` and `unanswered`.
        task: how answers are scored; None for TextVQA's protocol.
    """

    questions: Sequence[Question]
    preset: Preset
    max_new_tokens: int
    batch_size: int | None
    folder: Path
    name: str = ""
    task: Task | None = None

    def ask(
        self,
        model: LlavaNextForConditionalGeneration,
        processor: LlavaLlama31Processor,
        *,
        step: int,
        sharded: torch.nn.Module | None = None,
        autocast: AbstractContextManager[Any] | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Metrics now: mean score in [0, 1], number of unanswered questions, a task's headline.

        Every process calls this and gets the same. Training is left as it was: modes, random states, order of data.

        Args:
            model: the model without wrappers.
            sharded: its wrapper, where the weights are spread over the processes; then all of them answer all
                questions in step, for each call gathers what the next one needs. Else they share the questions.
            autocast: what the model's calls run under.
            beat: called after every batch.
        """
        num_processes = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if num_processes > 1 else 0
        answerer = GreedyAnswerer(model, processor, max_new_tokens=self.max_new_tokens, forward=sharded)
        images = {question.image_id: question.image for question in self.questions if question.image is not None}
        settings = EvaluationSettings(revision=f"step-{step}", preset=self.preset, max_new_tokens=self.max_new_tokens)
        asker = Asker(answerer, images, {image_id: image_id for image_id in images}, settings)
        batches = asker.plan(self.questions, self.batch_size or BATCH_SIZE)
        mine = batches if sharded is not None else batches[rank::num_processes]
        with undisturbed(sharded or model), autocast or contextlib.nullcontext():
            rows = []
            for batch in asker.ask_all(mine):
                beat()
                rows += batch
        if sharded is None and num_processes > 1:
            gathered: list[list[dict[str, Any]]] = [[]] * num_processes
            dist.all_gather_object(gathered, rows)
            rows = [row for part in gathered for row in part]
        by_id = {row["question_id"]: row for row in rows}
        rows = [by_id[question.question_id] for question in self.questions]
        if rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            file = self.folder / f"step-{step}.jsonl"
            with naming(file):
                file.write_text(lines, encoding="utf-8")
        failed = [row for row in rows if row["answer"] is None]
        if failed:
            first = f"question {failed[0]['question_id']}: {failed[0]['error']}"
            logger.warning("step %d: %d of %d questions unanswered; %s", step, len(failed), len(rows), first)
        return self._metrics(rows, len(failed))

    def _metrics(self, rows: Sequence[dict[str, Any]], num_failed: int) -> dict[str, float]:
        prefix = f"{self.name}_" if self.name else ""
        unanswered = {f"{prefix}unanswered": num_failed}
        if num_failed == len(rows):  # no reason to end a training of days
            return {f"{prefix}accuracy": 0.0, **unanswered}
        if self.task is None:
            accuracy = score_answers(self.questions, rows).protocols_failed_as_zero[PROTOCOL].accuracy
            return {f"{prefix}accuracy": accuracy, **unanswered}
        preset = self.preset.name
        protocol = protocol_for(self.task, "", preset if preset in self.task.protocols else None)
        found = answered(self.task, self.questions, rows)
        scores = score_task(self.task, found, protocol, intervals=False).protocols[protocol]
        metrics: dict[str, float] = {f"{prefix}accuracy": mean_value(self.task, found, protocol), **unanswered}
        # by its own name only where it says something else
        if self.task.protocols[protocol].summary != "mean":
            metrics[f"{prefix}{scores.headline}"] = scores.unanswered_as_wrong[scores.headline]
        return metrics
