"""TextVQA: ask a model every question, keep each answer with what made it, and score the answers three ways.

`evaluate` serves a training run (live model and processor), `evaluate_command` the command line.
"""

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.predictions import PREDICTIONS, PredictionsFile
from llava_llama31.trainer.evaluation.questions import Question, load_questions
from llava_llama31.trainer.evaluation.scoring import EXIT_INCOMPLETE, Report, print_json, print_report, score_answers
from llava_llama31.trainer.hub import local_checkpoint
from llava_llama31.trainer.images import ImageRef
from llava_llama31.trainer.reasons import RecordError


if TYPE_CHECKING:
    from transformers import LlavaNextForConditionalGeneration

    from llava_llama31.processing import LlavaLlama31Processor
    from llava_llama31.trainer.evaluation.generation import GreedyAnswerer, Prompt


CARD_PROMPT = "{question}\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: its scores, where its answers lie, and what they were made with."""

    report: Report
    predictions: Path
    seconds: float
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The report's numbers, then file, seconds and settings."""
        rest = {"predictions": str(self.predictions), "seconds": self.seconds, "settings": self.settings}
        return self.report.to_json() | rest


def evaluate(
    model: "LlavaNextForConditionalGeneration",
    processor: "LlavaLlama31Processor",
    questions: Sequence[Question],
    output: str | Path,
    *,
    revision: str,
    batch_size: int = 16,
    max_new_tokens: int = 16,
    prompt: str = CARD_PROMPT,
    blind_seed: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Answer every question by greedy generation and score the answers.

    Answers are appended batch by batch to `output/predictions.jsonl`, pictures with few tokens first and questions of
    one picture side by side. Called again with the same settings it goes on where it stopped, and the file ends the
    same. The model's modes and configuration and all random states are left as they were found.

    Args:
        model: LlavaNext, unwrapped.
        output: folder for predictions.jsonl, settings.json and scores.json.
        revision: what names these weights: a hash, a run's step.
        prompt: the text after the picture, with `{question}` where the question goes.
        blind_seed: show each question another question's picture, by a derangement of the pictures with this seed.
        on_progress: called with (questions done, all questions) after each batch.

    Raises:
        UserError: `output` holds the answers of another evaluation, or not one question could be answered.
    """
    from llava_llama31.trainer.evaluation.generation import GreedyAnswerer, undisturbed

    if "{question}" not in prompt:
        raise UserError("the prompt has no {question}", where=repr(prompt), fix="say where the question goes")
    pictures = {question.image_id: question.image for question in questions if question.image is not None}
    shown = {image_id: image_id for image_id in pictures} if blind_seed is None else derangement(pictures, blind_seed)
    settings = {
        "revision": revision,
        "prompt": prompt,
        "blind_seed": blind_seed,
        "decoding": f"greedy, at most {max_new_tokens} new tokens",
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "num_questions": len(questions),
        "questions_sha256": _digest((q.question_id, q.image_id, q.question) for q in questions),
    }
    started = time.monotonic()
    with PredictionsFile(output, settings, batch_size) as file, undisturbed(model):
        answerer = GreedyAnswerer(model, processor, max_new_tokens=max_new_tokens)
        asker = _Asker(answerer, pictures, shown, prompt, revision)
        plan = asker.plan(questions)
        for start in range(len(file.rows), len(plan), batch_size):
            file.append(asker.ask(plan[start : start + batch_size]))
            if on_progress is not None:
                on_progress(len(file.rows), len(plan))
    report = score_answers(questions, file.rows)
    evaluation = Evaluation(report, file.path, time.monotonic() - started, settings)
    scores = json.dumps(evaluation.to_json() | {"predictions": PREDICTIONS}, indent=2)
    file.path.with_name("scores.json").write_text(scores + "\n", encoding="utf-8")
    return evaluation


def derangement(image_ids: Iterable[str], seed: int) -> dict[str, str]:
    """Another picture for every picture: one random cycle through all of them.

    Raises:
        UserError: there are fewer than two pictures.
    """
    before = sorted(image_ids)
    if len(before) < 2:
        raise UserError("the blind baseline needs at least two pictures", fix="raise --limit or leave out --blind")
    after, draw = list(before), random.Random(seed)
    for last in range(len(after) - 1, 0, -1):
        # strictly below `last` (Sattolo, 1986): a single cycle, in which nothing keeps its place
        other = draw.randrange(last)
        after[last], after[other] = after[other], after[last]
    return dict(zip(before, after, strict=True))


def weights_revision(folder: str | Path) -> str | None:
    """SHA-256 over the weight files and the config of a folder; None where it has none."""
    files = sorted(
        p for p in Path(folder).glob("*") if p.suffix in (".safetensors", ".bin") or p.name == "config.json"
    )
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest() if files else None


def evaluate_command(
    model: str,
    *,
    data: str,
    image_root: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 16,
    dtype: str = "auto",
    device: str | None = None,
    blind: bool = False,
    output: str | None = None,
    json_output: bool = False,
) -> int:
    """`llava-llama31 evaluate`: exit code 0, or 3 if a question could not be answered."""
    questions = load_questions(data, image_root=image_root, limit=limit)  # before the weights: it fails faster
    from rich.console import Console
    from rich.progress import Progress

    from llava_llama31.trainer.evaluation.generation import load_model

    folder = local_checkpoint(model, where="MODEL")
    loaded, processor = load_model(folder, dtype=dtype, device=device)
    revision = weights_revision(folder) or "unknown"
    if output is None:
        asked = _digest([revision, data, limit, batch_size, max_new_tokens, str(loaded.dtype), blind])
        output = str(Path("runs", "evaluate", f"{Path(model).name}-{Path(data).stem}-{asked[:8]}"))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("answering", total=len(questions))
        evaluation = evaluate(
            loaded,
            processor,
            questions,
            output,
            revision=revision,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            blind_seed=0 if blind else None,
            on_progress=lambda done, _: progress.update(task, completed=done),
        )
    if json_output:
        print_json(evaluation.to_json())
    else:
        title = f"{Path(model).name} on {Path(data).name}{', pictures shuffled' if blind else ''}"
        print_report(evaluation.report, title)
        Console().print(f"answers: {evaluation.predictions} ({evaluation.seconds:.1f} s)", markup=False)
    return 0 if evaluation.report.complete else EXIT_INCOMPLETE


class _Asker:
    """Turns questions into prediction rows; a question that cannot be answered becomes a row that says why."""

    def __init__(
        self,
        answerer: "GreedyAnswerer",
        pictures: dict[str, ImageRef],
        shown: dict[str, str],
        prompt: str,
        revision: str,
    ):
        self.answerer, self.processor = answerer, answerer.processor
        self.pictures, self.shown = pictures, shown
        self.prompt, self.revision = prompt, revision

    def plan(self, questions: Sequence[Question]) -> list[Question]:
        """All questions, those of one picture side by side: unreadable pictures first, then by number of tokens."""
        tokens = {}
        for image_id, image in self.pictures.items():
            try:
                tokens[image_id] = self.processor.num_image_tokens(image.size())
            except RecordError:
                tokens[image_id] = 0
        order = {image_id: (tokens[shown], shown) for image_id, shown in self.shown.items()}
        return sorted(questions, key=lambda question: order.get(question.image_id, (0, "")))

    def ask(self, batch: Sequence[Question]) -> list[dict[str, Any]]:
        """Prediction rows of one batch, in its order."""
        started = time.perf_counter()
        results: list[list[int] | str] = [""] * len(batch)
        prompts: dict[int, Prompt] = {}
        opened: dict[str, Any] = {}
        for i, question in enumerate(batch):
            try:
                prompts[i] = self._prompt(question, opened)
            except RecordError as error:
                results[i] = str(error)
        for i, result in zip(prompts, self._answers(list(prompts.values())), strict=True):
            results[i] = result
        seconds = (time.perf_counter() - started) / len(batch)
        return [self._row(question, result, seconds) for question, result in zip(batch, results, strict=True)]

    def _prompt(self, question: Question, opened: dict[str, Any]) -> "Prompt":
        if question.image_id not in self.shown:
            raise RecordError("missing_image", "the question has no picture")
        shown = self.shown[question.image_id]
        if shown not in opened:
            image = self.pictures[shown].open()
            opened[shown] = self.processor.tiles(image), (image.height, image.width)
        tiles, size = opened[shown]
        text = self.prompt.replace("{question}", question.question)
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        return self.answerer.prompt_from_tiles(messages, [tiles], [size])

    def _answers(self, prompts: "list[Prompt]") -> "list[list[int] | str]":
        """Token ids of each answer; where generation fails, smaller batches, and in the end the reason."""
        if not prompts:
            return []
        try:
            return list(self.answerer.answer(prompts))
        except (RuntimeError, ValueError, IndexError) as error:
            if len(prompts) == 1:
                return [f"{type(error).__name__}: {error}"]
        half = len(prompts) // 2
        return self._answers(prompts[:half]) + self._answers(prompts[half:])

    def _row(self, question: Question, result: list[int] | str, seconds: float) -> dict[str, Any]:
        row: dict[str, Any] = {"question_id": question.question_id, "image_id": question.image_id}
        if self.shown.get(question.image_id, question.image_id) != question.image_id:
            row["shown_image_id"] = self.shown[question.image_id]
        row["question"] = question.question
        if isinstance(result, str):
            row |= {"answer": None, "error": result}
        else:
            row |= {"answer": self.answerer.text(result), "token_ids": result}
        prompt = self.prompt.replace("{question}", question.question)
        return row | {"prompt": prompt, "model": self.revision, "seconds": round(seconds, 6)}


def _digest(values: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()
