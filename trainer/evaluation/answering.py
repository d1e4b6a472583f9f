"""Questions to answers: every question asked of a model, each answer kept with what made it, in resumable files."""

import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import LlavaNextForConditionalGeneration

from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.checkpoint.run_folder import PREDICTIONS
from llava_llama31.trainer.data.sources.images import ImageRef
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.errors import UserError, naming
from llava_llama31.trainer.evaluation.asker import Asker, take_turns
from llava_llama31.trainer.evaluation.generation import GreedyAnswerer, Prefixes, undisturbed
from llava_llama31.trainer.evaluation.predictions import PredictionsFile
from llava_llama31.trainer.evaluation.presets import check_ocr
from llava_llama31.trainer.evaluation.questions import Question
from llava_llama31.trainer.evaluation.settings import EvaluationSettings, digest


# batches of each set that one process asks before the next one's turn
NEIGHBOURS = 4


@dataclass(frozen=True)
class Answers:
    """The answers to all questions, before they are scored.

    Args:
        rows: of predictions.jsonl, in the order of the questions.
        path: the file.
        seconds: what this call took.
        settings: what the answers were made with.
    """

    rows: list[dict[str, Any]]
    path: Path
    seconds: float
    settings: dict[str, Any]

    def write_scores(self, scores: dict[str, Any]) -> None:
        """Write scores.json beside the answers."""
        text = json.dumps(scores | {"predictions": PREDICTIONS}, indent=2)
        file = self.path.with_name("scores.json")
        with naming(file):
            file.write_text(text + "\n", encoding="utf-8")


def answer_questions(
    model: LlavaNextForConditionalGeneration,
    processor: LlavaLlama31Processor,
    questions: Sequence[Question],
    output: str | Path,
    settings: EvaluationSettings,
    *,
    processes: PartialState | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """Answer every question by greedy generation.

    Answers are appended batch by batch to `output/predictions.jsonl`; called again with the same settings it resumes
    where it stopped, and the file ends the same, in the order of the questions. The model's modes and configuration
    and all random states are left as they were found.

    Args:
        model: LlavaNext, unwrapped.
        output: folder for predictions.jsonl, settings.json and scores.json.
        settings: everything that the answers depend on, beside model and questions.
        processes: those that evaluate together, each with the whole model; all of them call this. Default: this alone.
        on_progress: called with (questions done, all questions) after each batch; other processes are estimated.

    Raises:
        UserError: `output` holds the answers of another evaluation, or the preset asks for OCR tokens that a question
            does not have.
    """
    asked = ToAsk(questions, output, settings)
    return answer_together(model, processor, [asked], processes=processes, on_progress=on_progress)[0]


@dataclass(frozen=True)
class ToAsk:
    """Questions whose answers go into one folder, and everything else that these depend on."""

    questions: Sequence[Question]
    output: str | Path
    settings: EvaluationSettings


@dataclass(frozen=True)
class _Asked:
    """Questions on their way: who asks them, in which batches, and what is answered already."""

    to_ask: ToAsk
    asker: Asker
    batches: dict[int | str, list[Question]]
    written: dict[str, Any]

    def open(self, processes: PartialState | None) -> PredictionsFile:
        """The file of the answers.

        Raises:
            UserError: see `PredictionsFile`, or the processes do not read the same images.
        """
        ids = [[question.question_id for question in batch] for batch in self.batches.values()]
        if _of_first_process(digest(ids), processes) != digest(ids):
            raise UserError("this process reads other images than the first", fix="give all of them the same files")
        return PredictionsFile(self.to_ask.output, self.written, ids, processes, self.asker.check)


def answer_together(
    model: LlavaNextForConditionalGeneration,
    processor: LlavaLlama31Processor,
    asked: Sequence[ToAsk],
    *,
    processes: PartialState | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Answers]:
    """Answer several sets of questions as `answer_questions` does one, each into its own folder.

    An image that several sets show is decoded and read once, if its bytes are the same; what it is called there does
    not matter. In float32 the answers are those of each set by itself. In half precision they depend on the batches,
    and these on what is asked together, unless the settings say `batch_invariant`: settings.json then names it.

    Args:
        asked: with one revision, as it is one model.
        on_progress: called with (questions done, all questions) of all sets.

    Raises:
        UserError: as `answer_questions`.
    """
    prefixes = Prefixes()
    parts = _parts(model, processor, asked, prefixes, processes)
    num_questions = sum(len(part.to_ask.questions) for part in parts)
    started, seconds = time.monotonic(), [0.0] * len(parts)
    with ExitStack() as stack:
        files = [stack.enter_context(part.open(processes)) for part in parts]
        stack.enter_context(undisturbed(model))
        before = sum(file.num_answered for file in files)
        left = [
            (part.asker.place(part.batches[ids[0]]), number, ids[0])
            for number, (part, file) in enumerate(zip(parts, files, strict=True))
            for ids in file.left
        ]
        if len(parts) > 1:
            left.sort(key=lambda entry: entry[:2])
        left = _share(left, len(parts), processes)
        turns = [(parts[number].asker, parts[number].batches[first]) for _, number, first in left]
        for (_, number, _), rows in zip(left, take_turns(turns, prefixes), strict=True):
            files[number].append(rows)
            seconds[number] += time.monotonic() - started - sum(seconds)
            if on_progress is not None:  # the other processes are about as far
                done = sum(file.num_answered for file in files) - before
                on_progress(
                    min(before + done * (processes.num_processes if processes else 1), num_questions), num_questions
                )
        rows_of = [
            file.finish([question.question_id for question in part.to_ask.questions])
            for part, file in zip(parts, files, strict=True)
        ]
    return [
        Answers(rows, file.path, spent, part.written)
        for rows, file, spent, part in zip(rows_of, files, seconds, parts, strict=True)
    ]


def _share(left: list[Any], num_parts: int, processes: PartialState | None) -> list[Any]:
    """This process's batches: every n-th, or of several sets every n-th run of neighbours, which share images."""
    if processes is None:
        return left
    run = 1 if num_parts == 1 else NEIGHBOURS * num_parts
    rank, num_processes = processes.process_index, processes.num_processes
    return [entry for place, entry in enumerate(left) if place // run % num_processes == rank]


def _parts(
    model: LlavaNextForConditionalGeneration,
    processor: LlavaLlama31Processor,
    asked: Sequence[ToAsk],
    prefixes: Prefixes,
    processes: PartialState | None,
) -> list[_Asked]:
    contents = _contents(asked)
    parts = []
    for to_ask, names in zip(asked, contents, strict=True):
        questions, settings = to_ask.questions, to_ask.settings
        check_ocr(settings.preset, questions)
        asker = _asker(model, processor, to_ask, names, prefixes)
        largest = max(asker.num_image_tokens.values(), default=0)
        batch_size = settings.batch_size or asker.answerer.auto_batch_size(largest)
        batch_size = _of_first_process(batch_size, processes)
        if len(asked) > 1:  # of one set, an image's batches follow one another
            prefixes.most = max(prefixes.most, batch_size)
        batches = {batch[0].question_id: batch for batch in asker.plan(questions, batch_size)}
        written = _written_settings(settings, model, questions, batch_size)
        if len(asked) > 1 and model.dtype != torch.float32 and not settings.batch_invariant:
            written["asked_with"] = [other.settings.data for other in asked if other is not to_ask]
        parts.append(_Asked(to_ask, asker, batches, written))
    return parts


def _contents(asked: Sequence[ToAsk]) -> list[dict[str, str] | None]:
    """For each set, image id -> what names the image's content in all sets; None where there is one set."""
    if len(asked) == 1:
        return [None]
    digests: dict[str, str] = {}

    def content(image: ImageRef, image_id: str) -> str:
        if image.key() not in digests:
            try:
                digests[image.key()] = image.sha256()
            except RecordError:  # its questions will say why
                digests[image.key()] = image_id
        return digests[image.key()]

    return [
        {q.image_id: content(q.image, q.image_id) for q in to_ask.questions if q.image is not None} for to_ask in asked
    ]


def _asker(
    model: LlavaNextForConditionalGeneration,
    processor: LlavaLlama31Processor,
    to_ask: ToAsk,
    contents: dict[str, str] | None,
    prefixes: Prefixes,
) -> Asker:
    settings = to_ask.settings
    images = {question.image_id: question.image for question in to_ask.questions if question.image is not None}
    seed = settings.blind_seed
    shown = {image_id: image_id for image_id in images} if seed is None else derangement(images, seed)
    answerer = GreedyAnswerer(
        model,
        processor,
        max_new_tokens=settings.max_new_tokens,
        batch_invariant=settings.batch_invariant,
        prefixes=prefixes,
    )
    return Asker(answerer, images, shown, settings, contents)


def _written_settings(
    settings: EvaluationSettings,
    model: LlavaNextForConditionalGeneration,
    questions: Sequence[Question],
    batch_size: int,
) -> dict[str, Any]:
    """The content of settings.json."""
    return settings.to_json() | {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "batch_size": None if settings.batch_invariant else batch_size,
        "num_questions": len(questions),
        "questions_sha256": digest((q.question_id, q.image_id, settings.preset.text(q)) for q in questions),
    }


def _of_first_process(value: Any, processes: PartialState | None) -> Any:
    return value if processes is None else broadcast_object_list([value])[0]


def derangement(image_ids: Iterable[str], seed: int) -> dict[str, str]:
    """Another image for every image: one random cycle through all of them.

    Raises:
        UserError: there are fewer than two images.
    """
    before = sorted(image_ids)
    if len(before) < 2:
        raise UserError("the blind baseline needs at least two images", fix="raise --limit or leave out --blind")
    after, draw = list(before), random.Random(seed)
    for last in range(len(after) - 1, 0, -1):
        # strictly below `last` (Sattolo, 1986): a single cycle, in which nothing keeps its place
        other = draw.randrange(last)
        after[last], after[other] = after[other], after[last]
    return dict(zip(before, after, strict=True))
