"""TextVQA: ask a model every question, keep each answer with what made it, and score the answers three ways.

`evaluate` serves a training run (live model and processor), `evaluate_command` the command line.
"""

import hashlib
import io
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.predictions import PREDICTIONS, PredictionsFile
from llava_llama31.trainer.evaluation.questions import Question, load_questions
from llava_llama31.trainer.evaluation.scoring import EXIT_INCOMPLETE, Report, print_json, print_report, score_answers
from llava_llama31.trainer.hub import local_checkpoint
from llava_llama31.trainer.images import ImageRef
from llava_llama31.trainer.reasons import RecordError


if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    from accelerate import PartialState
    from rich.progress import Progress
    from transformers import LlavaNextForConditionalGeneration

    from llava_llama31.processing import LlavaLlama31Processor
    from llava_llama31.trainer.evaluation.generation import GreedyAnswerer, Prompt


JPEG_QUALITY = 75
NUM_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Preset:
    """How a published evaluator words its prompt.

    | preset      | definition read from                                                                          |
    |-------------|-----------------------------------------------------------------------------------------------|
    | `card`      | VLMEvalKit's TextVQA_VAL as the LLaVA-LLaMA-3.1 card ran it: `vlmeval/vlm` `build_prompt`      |
    | `llava`     | LLaVA: `llava/eval/model_vqa_loader.py` on `llava_textvqa_val_v051_ocr.jsonl`                  |
    | `lmms-eval` | lmms-eval: `lmms_eval/tasks/textvqa/utils.py`, `ocr: false`                                    |

    Args:
        name: what stands beside every score.
        prompt: the text after the picture, with `{question}` and, where asked for, `{ocr_tokens}`.
        capitalize: first letter upper case and, as Python's `str.capitalize` does it, all others lower.
    """

    name: str
    prompt: str
    capitalize: bool = False

    def __post_init__(self) -> None:
        if "{question}" not in self.prompt:
            raise UserError("the prompt has no {question}", where=repr(self.prompt), fix="say where the question goes")

    @property
    def needs_ocr(self) -> bool:
        """Whether the prompt tells the model what an OCR engine read."""
        return "{ocr_tokens}" in self.prompt

    def text(self, question: Question) -> str:
        """The words after the picture."""
        asked = question.question.capitalize() if self.capitalize else question.question
        values = {"question": asked, "ocr_tokens": ", ".join(question.ocr_tokens or ())}
        # one pass: a question that says {ocr_tokens} stays what it is
        return re.sub(r"\{(question|ocr_tokens)\}", lambda match: values[match[1]], self.prompt)


PRESETS: Mapping[str, "Preset"] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            Preset("card", "{question}\nAnswer the question using a single word or phrase."),
            Preset(
                "llava",
                "{question}\nReference OCR token: {ocr_tokens}\nAnswer the question using a single word or phrase.",
            ),
            Preset("lmms-eval", "{question}\nAnswer the question using a single word or phrase.", capitalize=True),
        )
    }
)


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
    preset: Preset = PRESETS["card"],
    batch_size: int | None = None,
    max_new_tokens: int = 64,
    batch_invariant: bool = False,
    jpeg_rounds: int = 0,
    blind_seed: int | None = None,
    processes: "PartialState | None" = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Answer every question by greedy generation and score the answers.

    Answers are appended batch by batch to `output/predictions.jsonl`; called again with the same settings it goes on
    where it stopped, and the file ends the same, in the order of the questions. The model's modes and configuration
    and all random states are left as they were found.

    Args:
        model: LlavaNext, unwrapped.
        output: folder for predictions.jsonl, settings.json and scores.json.
        revision: what names these weights: a hash, a run's step.
        preset: how the question is worded.
        batch_size: questions answered together; those of one picture stay together. Default: by the device's memory.
        batch_invariant: no sum depends on the batch, so that bfloat16 answers do not either; see docs/evaluation.md.
        jpeg_rounds: times that each picture is written and read as JPEG first; the card's pictures went through two.
        blind_seed: show each question another question's picture, by a derangement of the pictures with this seed.
        processes: those that evaluate together, each with the whole model; all of them call this. Default: this alone.
        on_progress: called with (questions done by this process and before, all questions) after each batch.

    Raises:
        UserError: `output` holds the answers of another evaluation, not one question could be answered, or the preset
            asks for OCR tokens that a question does not have.
    """
    from llava_llama31.trainer.evaluation.generation import GreedyAnswerer, undisturbed

    _check_ocr(preset, questions)
    pictures = {question.image_id: question.image for question in questions if question.image is not None}
    shown = {image_id: image_id for image_id in pictures} if blind_seed is None else derangement(pictures, blind_seed)
    answerer = GreedyAnswerer(model, processor, max_new_tokens=max_new_tokens, batch_invariant=batch_invariant)
    asker = Asker(answerer, pictures, shown, preset, revision, jpeg_rounds)
    batch_size = batch_size or answerer.auto_batch_size(max(asker.num_image_tokens.values(), default=0))
    settings = {
        "revision": revision,
        "preset": preset.name,
        "prompt": preset.prompt,
        "jpeg_rounds": jpeg_rounds,
        "blind_seed": blind_seed,
        "decoding": f"greedy, at most {max_new_tokens} new tokens",
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": None if batch_invariant else batch_size,
        "num_questions": len(questions),
        "questions_sha256": _digest((q.question_id, q.image_id, preset.text(q)) for q in questions),
    }
    started = time.monotonic()
    batches = {batch[0].question_id: batch for batch in asker.plan(questions, batch_size)}
    ids = [[question.question_id for question in batch] for batch in batches.values()]
    with PredictionsFile(output, settings, ids, processes) as file, undisturbed(model):
        for rows in asker.ask_all([batches[batch[0]] for batch in file.left]):
            file.append(rows)
            if on_progress is not None:
                on_progress(file.num_answered, len(questions))
        rows = file.finish([question.question_id for question in questions])
    report = score_answers(questions, rows)
    evaluation = Evaluation(report, file.path, time.monotonic() - started, settings)
    if processes is None or processes.is_main_process:
        scores = json.dumps(evaluation.to_json() | {"predictions": PREDICTIONS}, indent=2)
        file.path.with_name("scores.json").write_text(scores + "\n", encoding="utf-8")
    return evaluation


def _check_ocr(preset: Preset, questions: Sequence[Question]) -> None:
    lacking = [question.question_id for question in questions if question.ocr_tokens is None]
    if preset.needs_ocr and lacking:
        raise UserError(
            f"the prompt of {preset.name} tells OCR tokens, and {len(lacking)} questions have none",
            where=f"question {lacking[0]}",
            fix="give annotations with ocr_tokens, or pass --ocr rapidocr",
        )


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
    preset: str = "card",
    ocr: str | None = None,
    jpeg_rounds: int = 0,
    limit: int | None = None,
    batch_size: int | None = None,
    max_new_tokens: int = 64,
    batch_invariant: bool = False,
    dtype: str = "auto",
    device: str | None = None,
    blind: bool = False,
    output: str | None = None,
    json_output: bool = False,
) -> int:
    """`llava-llama31 evaluate`: exit code 0, or 3 if a question could not be answered.

    Under `accelerate launch` the processes share the questions, and the first one prints.
    """
    questions = load_questions(data, image_root=image_root, limit=limit)  # before the weights: it fails faster
    if ocr is None:
        _check_ocr(PRESETS[preset], questions)
    from llava_llama31.trainer.evaluation.generation import load_model

    processes = _processes(device)
    folder = local_checkpoint(model, where="MODEL")
    loaded, processor = load_model(folder, dtype=dtype, device=processes.device if processes else device)
    revision = weights_revision(folder) or "unknown"
    if output is None:
        asked = [revision, data, limit, preset, ocr, jpeg_rounds, batch_size, max_new_tokens, batch_invariant, blind]
        digest = _digest([*asked, str(loaded.dtype)])
        output = str(Path("runs", "evaluate", f"{Path(model).name}-{Path(data).stem}-{digest[:8]}"))
    is_main = processes is None or processes.is_main_process
    with _progress(is_main) as progress:
        if ocr is not None:
            questions = _read_by_ocr(questions, output, processes, progress)
        task = progress.add_task("answering", total=len(questions))
        evaluation = evaluate(
            loaded,
            processor,
            questions,
            output,
            revision=revision,
            preset=PRESETS[preset],
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            batch_invariant=batch_invariant,
            jpeg_rounds=jpeg_rounds,
            blind_seed=0 if blind else None,
            processes=processes,
            on_progress=lambda done, _: progress.update(task, completed=done),
        )
    if is_main:
        from rich.console import Console

        if json_output:
            print_json(evaluation.to_json())
        else:
            title = f"{Path(model).name} on {Path(data).name}, prompt {preset}{', pictures shuffled' if blind else ''}"
            print_report(evaluation.report, title)
            Console().print(f"answers: {evaluation.predictions} ({evaluation.seconds:.1f} s)", markup=False)
    return 0 if evaluation.report.complete else EXIT_INCOMPLETE


def _processes(device: str | None) -> "PartialState | None":
    """Those that `accelerate launch` or torchrun started, if more than one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import PartialState

    return PartialState(cpu=device == "cpu")


def _progress(shown: bool) -> "Progress":
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown)


def _read_by_ocr(
    questions: list[Question], output: str, processes: "PartialState | None", progress: "Progress"
) -> list[Question]:
    """Questions with OCR tokens; the first process reads the pictures, the others its results."""
    from contextlib import nullcontext

    from llava_llama31.trainer.evaluation.ocr import with_ocr_tokens

    with processes.main_process_first() if processes else nullcontext():
        task = progress.add_task("reading by OCR")
        cache = Path(output, "ocr_tokens.jsonl")
        return with_ocr_tokens(
            questions, cache, lambda done, total: progress.update(task, completed=done, total=total)
        )


class Asker:
    """Turns questions into prediction rows; a question that cannot be answered becomes a row that says why.

    Args:
        pictures: image id -> picture.
        shown: image id -> image id of the picture that is shown for it.
    """

    def __init__(
        self,
        answerer: "GreedyAnswerer",
        pictures: Mapping[str, ImageRef],
        shown: Mapping[str, str],
        preset: Preset,
        revision: str,
        jpeg_rounds: int = 0,
    ):
        self.answerer, self.processor = answerer, answerer.processor
        self.pictures, self.shown = pictures, shown
        self.preset, self.revision, self.jpeg_rounds = preset, revision, jpeg_rounds
        self.num_image_tokens: dict[str, int] = {}
        """Image id -> placeholders, 0 where the header can't be read."""
        for image_id, image in pictures.items():
            try:
                self.num_image_tokens[image_id] = self.processor.num_image_tokens(image.size())
            except RecordError:
                self.num_image_tokens[image_id] = 0

    def plan(self, questions: Sequence[Question], batch_size: int) -> list[list[Question]]:
        """Batches of whole pictures, like length beside like; the longest first, where memory that lacks shows early.

        A picture with more questions than `batch_size` fills several batches.
        """
        by_picture: dict[str, list[Question]] = {}
        for question in questions:
            by_picture.setdefault(self.shown.get(question.image_id, ""), []).append(question)
        batches: list[list[Question]] = []
        for image_id in sorted(by_picture, key=lambda image_id: (-self.num_image_tokens.get(image_id, 0), image_id)):
            asked = by_picture[image_id]
            if batches and len(batches[-1]) + len(asked) <= batch_size:
                batches[-1] += asked
            else:
                batches += [asked[start : start + batch_size] for start in range(0, len(asked), batch_size)]
        return batches

    def ask_all(self, batches: Sequence[Sequence[Question]]) -> Iterator[list[dict[str, Any]]]:
        """Prediction rows batch by batch, while threads decode the pictures of the batches ahead."""
        with ThreadPoolExecutor(NUM_BATCHES_AHEAD) as pool:
            opened: dict[str, Future[_Picture | str]] = {}
            for number, batch in enumerate(batches):
                ahead = chain.from_iterable(batches[number : number + 1 + NUM_BATCHES_AHEAD])
                image_ids = dict.fromkeys(self.shown[q.image_id] for q in ahead if q.image_id in self.shown)
                # one object for all batches of a picture; what lies behind is let go
                opened = {
                    image_id: opened.get(image_id) or pool.submit(self._open, image_id) for image_id in image_ids
                }
                yield self._ask(batch, opened)

    def _open(self, image_id: str) -> "_Picture | str":
        """Tiles of a picture, or why there are none."""
        try:
            image = self.pictures[image_id].open()
            for _ in range(self.jpeg_rounds):
                image = _through_jpeg(image)
            sha256 = self.pictures[image_id].sha256()
            return _Picture(self.processor.tiles(image), (image.height, image.width), sha256)
        except RecordError as error:
            return str(error)

    def _ask(self, batch: Sequence[Question], opened: "Mapping[str, Future[_Picture | str]]") -> list[dict[str, Any]]:
        started = time.perf_counter()
        results: list[list[int] | str] = [""] * len(batch)
        prompts: dict[int, Prompt] = {}
        facts: list[dict[str, Any]] = [{} for _ in batch]
        for i, question in enumerate(batch):
            if question.image_id not in self.shown:
                results[i] = "missing_image: the question has no picture"
                continue
            picture = opened[self.shown[question.image_id]].result()
            if isinstance(picture, str):
                results[i] = picture
            else:
                prompts[i] = self._prompt(question, picture)
                facts[i] = {"prompt_sha256": _digest(prompts[i].input_ids), "image_sha256": picture.sha256}
        for i, result in zip(prompts, self._answers(list(prompts.values())), strict=True):
            results[i] = result
        seconds = {"seconds": round((time.perf_counter() - started) / len(batch), 6)}
        rows = zip(batch, results, facts, strict=True)
        return [self._row(question, result) | fact | seconds for question, result, fact in rows]

    def _prompt(self, question: Question, picture: "_Picture") -> "Prompt":
        content = [{"type": "image"}, {"type": "text", "text": self.preset.text(question)}]
        messages = [{"role": "user", "content": content}]
        return self.answerer.prompt_from_tiles(messages, [picture.tiles], [picture.size])

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

    def _row(self, question: Question, result: list[int] | str) -> dict[str, Any]:
        row: dict[str, Any] = {"question_id": question.question_id, "image_id": question.image_id}
        if self.shown.get(question.image_id, question.image_id) != question.image_id:
            row["shown_image_id"] = self.shown[question.image_id]
        row["question"] = question.question
        if isinstance(result, str):
            row |= {"answer": None, "error": result}
        else:
            ended = result[-1] in self.answerer.stop_ids
            row |= {"answer": self.answerer.text(result), "token_ids": result, "ended": "stop" if ended else "length"}
        return row | {"prompt": self.preset.text(question), "model": self.revision}


@dataclass(frozen=True, eq=False)
class _Picture:
    """Tiles (T, 3, H, W) of a decoded picture, its (height, width) in pixels, and the hash of its file."""

    tiles: "np.ndarray"
    size: tuple[int, int]
    sha256: str


def _through_jpeg(image: "PIL.Image.Image") -> "PIL.Image.Image":
    """The picture written as JPEG by Pillow's defaults (quality 75, 4:2:0) and read again."""
    import PIL.Image

    with io.BytesIO() as file:
        image.save(file, "JPEG", quality=JPEG_QUALITY)
        return PIL.Image.open(file).convert("RGB")


def _digest(values: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()
