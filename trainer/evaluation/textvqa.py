"""TextVQA: ask a model every question, keep each answer with what made it, and score the answers three ways."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from accelerate import PartialState
from transformers import LlavaNextForConditionalGeneration

from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.evaluation.answering import answer_questions
from llava_llama31.trainer.evaluation.questions import Question
from llava_llama31.trainer.evaluation.scoring import Report, score_answers
from llava_llama31.trainer.evaluation.settings import EvaluationSettings
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
