"""From questions to prediction rows: images decoded by threads, whole images to a batch, every failure named.

Several askers of one model take turns: an image that they share is decoded and read once.
"""

import io
import time
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava_llama31.trainer.checkpoint.run_folder import PREDICTIONS
from llava_llama31.trainer.data.sources.images import ImageRef
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.generation import GreedyAnswerer, Prefixes, Prompt
from llava_llama31.trainer.evaluation.questions import Question
from llava_llama31.trainer.evaluation.settings import EvaluationSettings, digest
from llava_llama31.trainer.fault_tolerance.out_of_memory import is_of_device


JPEG_QUALITY = 75
NUM_BATCHES_AHEAD = 2
# after this many questions that fail alike and none answered, the machine is at fault and not the questions
FAILED_ALIKE = 16


class Asker:
    """Turns questions into prediction rows; a question that cannot be answered becomes a row that says why.

    Args:
        images: image id -> image.
        shown: image id -> image id of the image that is shown for it.
        contents: image id -> what names its content, the same for all askers that take turns. Default: the image id.
    """

    def __init__(
        self,
        answerer: GreedyAnswerer,
        images: Mapping[str, ImageRef],
        shown: Mapping[str, str],
        settings: EvaluationSettings,
        contents: Mapping[str, str] | None = None,
    ):
        self.answerer, self.processor = answerer, answerer.processor
        self.images, self.shown = images, shown
        self.settings = settings
        self.contents = contents or {image_id: image_id for image_id in images}
        self._any_answered = False
        self._failures: Counter[str] = Counter()  # prompts by what their generation failed with
        self.num_image_tokens: dict[str, int] = {}
        """Image id -> placeholders, 0 where the header can't be read."""
        for image_id, image in images.items():
            try:
                self.num_image_tokens[image_id] = self.processor.num_image_tokens(image.size())
            except RecordError:
                self.num_image_tokens[image_id] = 0

    def plan(self, questions: Sequence[Question], batch_size: int) -> list[list[Question]]:
        """Batches of whole images, like length beside like; the longest first, where memory that lacks shows early.

        An image with more questions than `batch_size` fills several batches.
        """
        by_image: dict[str, list[Question]] = {}
        for question in questions:
            by_image.setdefault(self.shown.get(question.image_id, ""), []).append(question)
        batches: list[list[Question]] = []
        for image_id in sorted(by_image, key=self._place):
            asked = by_image[image_id]
            if batches and len(batches[-1]) + len(asked) <= batch_size:
                batches[-1] += asked
            else:
                batches += [asked[start : start + batch_size] for start in range(0, len(asked), batch_size)]
        return batches

    def _place(self, image_id: str) -> tuple[int, str, str]:
        return -self.num_image_tokens.get(image_id, 0), self.contents.get(image_id, ""), image_id

    def place(self, batch: Sequence[Question]) -> tuple[int, str]:
        """Where a batch comes among those of all askers: by its first image."""
        return self._place(self.shown.get(batch[0].image_id, ""))[:2]

    def shows(self, batch: Sequence[Question]) -> dict[str, Hashable]:
        """Image id of each image of a batch -> its key among all askers."""
        shown = (self.shown[question.image_id] for question in batch if question.image_id in self.shown)
        return {image_id: (self.contents[image_id], self.settings.jpeg_rounds) for image_id in shown}

    def ask_all(self, batches: Sequence[Sequence[Question]]) -> Iterator[list[dict[str, Any]]]:
        """Prediction rows batch by batch; see `take_turns`."""
        return take_turns([(self, batch) for batch in batches])

    def open(self, image_id: str) -> "_Tiled | str":
        """Tiles of an image, or why there are none."""
        try:
            image = self.images[image_id].open()
            for _ in range(self.settings.jpeg_rounds):
                image = through_jpeg(image)
            sha256 = self.images[image_id].sha256()
            return _Tiled(self.processor.tiles(image), (image.height, image.width), sha256)
        except RecordError as error:
            return str(error)
        except (OSError, ValueError, RuntimeError) as error:  # e.g. too long for JPEG, too thin for tiles
            return f"{type(error).__name__}: {error}"

    def check(self, row: dict[str, Any]) -> None:
        """Whether the image of an answered row is still the same.

        Raises:
            UserError: it is another one now, or gone.
        """
        check_image(row, self.images)

    def ask(self, batch: Sequence[Question], opened: "Mapping[str, _Tiled | str]") -> list[dict[str, Any]]:
        """Prediction rows of a batch whose images are open, or why they are not."""
        started = time.perf_counter()
        results: list[list[int] | str] = [""] * len(batch)
        prompts: dict[int, Prompt] = {}
        facts: list[dict[str, Any]] = [{} for _ in batch]
        for i, question in enumerate(batch):
            if question.image_id not in self.shown:
                results[i] = "missing_image: the question has no image"
                continue
            image = opened[self.shown[question.image_id]]
            if isinstance(image, str):
                results[i] = image
                continue
            prompt = self._prompt(question, image)
            if isinstance(prompt, str):
                results[i] = prompt
            else:
                prompts[i] = prompt
                facts[i] = {"prompt_sha256": digest(prompts[i].input_ids), "image_sha256": image.sha256}
        for i, result in zip(prompts, self._answers(list(prompts.values())), strict=True):
            results[i] = result
        seconds = {"seconds": round((time.perf_counter() - started) / len(batch), 6)}
        rows = zip(batch, results, facts, strict=True)
        return [self._row(question, result) | fact | seconds for question, result, fact in rows]

    def _prompt(self, question: Question, image: "_Tiled") -> Prompt | str:
        content = [{"type": "image"}, {"type": "text", "text": self.settings.preset.text(question)}]
        messages = [{"role": "user", "content": content}]
        try:
            return self.answerer.prompt_from_tiles(messages, [image.tiles], [image.size])
        except (RuntimeError, TypeError, ValueError) as error:  # each tokenizer refuses non-text in its own way
            return f"{type(error).__name__}: {error}"

    def _answers(self, prompts: list[Prompt]) -> list[list[int] | str]:
        """Token ids of each answer; where generation fails, smaller batches, and in the end the reason.

        Raises:
            UserError: the device refuses to work, whatever the question.
        """
        if not prompts:
            return []
        try:
            answers = self.answerer.answer(prompts)
            self._any_answered = True
            return list(answers)
        except (RuntimeError, ValueError, IndexError) as error:
            if self.answerer.in_step:
                raise  # the other processes are waiting in the same call
            self._refuse_machine(error, alone=len(prompts) == 1)
            if len(prompts) == 1:
                return [f"{type(error).__name__}: {error}"]
        half = len(prompts) // 2
        return self._answers(prompts[:half]) + self._answers(prompts[half:])

    def _refuse_machine(self, error: Exception, *, alone: bool) -> None:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        self._failures[reason] += alone
        of_device = isinstance(error, torch.AcceleratorError | NotImplementedError) and not is_of_device(error)
        if of_device or (self._failures[reason] >= FAILED_ALIKE and not self._any_answered):
            fix = "see `llava-llama31 doctor`, or try another --dtype or --device"
            raise UserError(f"no question can be answered here: {reason}", fix=fix) from error

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
        return row | {"prompt": self.settings.preset.text(question), "model": self.settings.revision}


Turn = tuple[Asker, Sequence[Question]]


def check_image(row: Mapping[str, Any], images: Mapping[str, ImageRef]) -> None:
    """Whether the image of an answered row is still the same.

    Raises:
        UserError: it is another one now, or gone.
    """
    shown = row.get("shown_image_id", row["image_id"])
    try:
        same = images[shown].sha256() == row["image_sha256"]
    except (KeyError, RecordError):
        same = False
    if not same:
        what = f"question {row['question_id']} was answered from another image {shown}"
        raise UserError(what, where=PREDICTIONS, fix="pass another --output, or bring the image back")


def take_turns(turns: Sequence[Turn], prefixes: Prefixes | None = None) -> Iterator[list[dict[str, Any]]]:
    """Prediction rows of each turn's batch, in order.

    While a GPU computes, threads decode the images of the turns ahead. A CPU's threads all compute: there each turn's
    images are decoded when it comes, by as many threads.

    Args:
        turns: of one model.
        prefixes: those that the askers' answerers share; an image that no later turn shows is freed there.
    """
    last = {key: number for number, (asker, batch) in enumerate(turns) for key in asker.shows(batch).values()}
    num_ahead, num_threads = NUM_BATCHES_AHEAD, NUM_BATCHES_AHEAD
    if turns and turns[0][0].answerer.model.device.type == "cpu":
        num_ahead, num_threads = 0, torch.get_num_threads()
    with ThreadPoolExecutor(num_threads) as pool:
        opened: dict[Hashable, Future[_Tiled | str]] = {}
        for number, (asker, batch) in enumerate(turns):
            for other, later in turns[number : number + 1 + num_ahead]:
                for image_id, key in other.shows(later).items():
                    if key not in opened:
                        opened[key] = pool.submit(other.open, image_id)
            images = {image_id: opened[key].result() for image_id, key in asker.shows(batch).items()}
            yield asker.ask(batch, images)
            for key in [key for key in opened if last[key] <= number]:
                image = opened.pop(key).result()
                if prefixes is not None and not isinstance(image, str):
                    prefixes.release(image.tiles)


@dataclass(frozen=True, eq=False)
class _Tiled:
    """Tiles (T, 3, H, W) of a decoded image, its (height, width) in pixels, and the hash of its file."""

    tiles: np.ndarray
    size: tuple[int, int]
    sha256: str


def through_jpeg(image: Image.Image) -> Image.Image:
    """The image written as JPEG by Pillow's defaults (quality 75, 4:2:0) and read again."""
    with io.BytesIO() as file:
        image.save(file, "JPEG", quality=JPEG_QUALITY)
        return Image.open(file).convert("RGB")
