"""TextVQA: ask a model every question, keep each answer with what made it, and score the answers three ways."""

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import LlavaNextForConditionalGeneration

from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.asker import Asker
from llava_llama31.trainer.evaluation.generation import GreedyAnswerer, undisturbed
from llava_llama31.trainer.evaluation.predictions import PREDICTIONS, PredictionsFile
from llava_llama31.trainer.evaluation.presets import check_ocr
from llava_llama31.trainer.evaluation.questions import Question
from llava_llama31.trainer.evaluation.scoring import Report, score_answers
from llava_llama31.trainer.evaluation.settings import EvaluationSettings, digest
from llava_llama31.trainer.model.opening import ADAPTER_CONFIG, adapted_base


# beside the weights
ANSWER_FILES = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


class Scored(Protocol):
    """A report of scores, which JSON can hold."""

    def to_json(self) -> dict[str, Any]: ...


AnyReport = TypeVar("AnyReport", bound=Scored)


@dataclass(frozen=True)
class Evaluation(Generic[AnyReport]):
    """A finished evaluation: its scores, the file of its answers, and what they were made with."""

    report: AnyReport
    predictions: Path
    seconds: float
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The report's numbers, then file, seconds and settings."""
        rest = {"predictions": str(self.predictions), "seconds": self.seconds, "settings": self.settings}
        return self.report.to_json() | rest


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
        self.path.with_name("scores.json").write_text(text + "\n", encoding="utf-8")


def evaluate(
    model: LlavaNextForConditionalGeneration,
    processor: LlavaLlama31Processor,
    questions: Sequence[Question],
    output: str | Path,
    settings: EvaluationSettings,
    *,
    processes: PartialState | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation[Report]:
    """Answer every question as `answer_questions` does, and score the answers by TextVQA's protocols.

    Raises:
        UserError: as `answer_questions`, or not one question could be answered.
    """
    found = answer_questions(
        model, processor, questions, output, settings, processes=processes, on_progress=on_progress
    )
    evaluation = Evaluation(score_answers(questions, found.rows), found.path, found.seconds, found.settings)
    if processes is None or processes.is_main_process:
        found.write_scores(evaluation.to_json())
    return evaluation


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
    check_ocr(settings.preset, questions)
    asker = _asker(model, processor, questions, settings)
    largest = max(asker.num_image_tokens.values(), default=0)
    batch_size = settings.batch_size or asker.answerer.auto_batch_size(largest)
    batch_size = _of_first_process(batch_size, processes)
    written = _written_settings(settings, model, questions, batch_size)
    started = time.monotonic()
    batches = {batch[0].question_id: batch for batch in asker.plan(questions, batch_size)}
    ids = [[question.question_id for question in batch] for batch in batches.values()]
    if _of_first_process(digest(ids), processes) != digest(ids):
        raise UserError("this process reads other images than the first", fix="give all of them the same files")
    with PredictionsFile(output, written, ids, processes, asker.check) as file, undisturbed(model):
        before = file.num_answered
        for rows in asker.ask_all([batches[batch[0]] for batch in file.left]):
            file.append(rows)
            if on_progress is not None:  # the other processes are about as far
                done = before + (file.num_answered - before) * (processes.num_processes if processes else 1)
                on_progress(min(done, len(questions)), len(questions))
        rows = file.finish([question.question_id for question in questions])
    return Answers(rows, file.path, time.monotonic() - started, written)


def _asker(
    model: LlavaNextForConditionalGeneration,
    processor: LlavaLlama31Processor,
    questions: Sequence[Question],
    settings: EvaluationSettings,
) -> Asker:
    images = {question.image_id: question.image for question in questions if question.image is not None}
    seed = settings.blind_seed
    shown = {image_id: image_id for image_id in images} if seed is None else derangement(images, seed)
    answerer = GreedyAnswerer(
        model, processor, max_new_tokens=settings.max_new_tokens, batch_invariant=settings.batch_invariant
    )
    return Asker(answerer, images, shown, settings)


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


def weights_revision(folder: str | Path) -> str | None:
    """SHA-256 over the files of a folder that answers depend on, and its adapters' base; None where it has none."""
    files = sorted(p for p in Path(folder).glob("*") if p.suffix in (".safetensors", ".bin") or p.name in ANSWER_FILES)
    content = hashlib.sha256()
    if Path(folder, ADAPTER_CONFIG).is_file():
        content.update(str(weights_revision(adapted_base(folder))).encode())
    for path in files:
        content.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                content.update(chunk)
    return content.hexdigest() if files else None
