"""Questions asked of a model that an OpenAI-compatible server serves, and a sample of them of our own engine too."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from transformers import LlavaNextForConditionalGeneration

from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.data.sources.images import ImageRef
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.engines.client import EngineClient, Unreachable
from llava_llama31.trainer.engines.questions import data_uri
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.answering import Answers, ToAsk, derangement
from llava_llama31.trainer.evaluation.asker import Asker, check_image, through_jpeg
from llava_llama31.trainer.evaluation.generation import GreedyAnswerer, undisturbed
from llava_llama31.trainer.evaluation.predictions import PredictionsFile
from llava_llama31.trainer.evaluation.presets import check_ocr
from llava_llama31.trainer.evaluation.questions import Question
from llava_llama31.trainer.evaluation.settings import EvaluationSettings, digest


SAMPLE = 16
SAMPLE_BATCH = 4


@dataclass(frozen=True)
class Server:
    """A server to ask.

    Args:
        engine: what settings.json calls it.
        concurrency: questions at a time.
    """

    client: EngineClient
    engine: str
    concurrency: int


@dataclass(frozen=True)
class Sampled:
    """A server's answers beside those of this package's engine, on some of the questions.

    Args:
        ids: of the questions.
        served: the server's answers by id; None where it gave none.
        own: this package's, likewise.
    """

    ids: tuple[int | str, ...]
    served: Mapping[str, str | None]
    own: Mapping[str, str | None]

    @property
    def different(self) -> list[int | str]:
        """Ids of the questions with two different answers."""
        return [i for i in self.ids if self.served[str(i)] != self.own[str(i)]]

    def to_json(self) -> dict[str, Any]:
        """Counts, then the first difference."""
        different = self.different
        value: dict[str, Any] = {"compared": len(self.ids), "equal": len(self.ids) - len(different)}
        if different:
            key = str(different[0])
            first = {"question_id": different[0], "served": self.served[key], "own": self.own[key]}
            value |= {"different_ids": different, "first_difference": first}
        return value


def answer_by_server(
    server: Server, asked: Sequence[ToAsk], *, on_progress: Callable[[int, int], None] | None = None
) -> list[Answers]:
    """Ask a server the questions of several sets, with the prompts and pixels that this package's engine is given.

    Images go as PNG of what the evaluator sees. Each answer is written as it comes, and the same call resumes.

    Args:
        server: which, and how many questions at a time.
        asked: sets with their folders and settings.
        on_progress: called with (questions done, all questions) of all sets.

    Raises:
        UserError: the server can't be reached, refuses all questions of a set, or a folder holds other answers.
    """
    num_questions, before = sum(len(part.questions) for part in asked), 0
    found = []
    for part in asked:
        started = time.monotonic()
        asking = _Asking(server, part)
        ids = [[question.question_id] for question in part.questions]
        with ExitStack() as stack:
            file = stack.enter_context(PredictionsFile(part.output, asking.written, ids, None, asking.check))
            questions = {question.question_id: question for question in part.questions}
            left = [questions[first] for (first,) in file.left]
            with ThreadPoolExecutor(server.concurrency) as pool:
                for row in pool.map(asking.row, sorted(left, key=lambda question: question.image_id)):
                    file.append([row])
                    if on_progress is not None:
                        on_progress(before + file.num_answered, num_questions)
            rows = file.finish([question.question_id for question in part.questions])
        before += len(part.questions)
        found.append(Answers(rows, file.path, time.monotonic() - started, asking.written))
    return found


class _Asking:
    """One set of questions on its way to a server."""

    def __init__(self, server: Server, asked: ToAsk):
        settings = asked.settings
        check_ocr(settings.preset, asked.questions)
        self.server, self.settings = server, settings
        self.images = {q.image_id: q.image for q in asked.questions if q.image is not None}
        seed = settings.blind_seed
        self.shown = {i: i for i in self.images} if seed is None else derangement(self.images, seed)
        self.written = settings.to_json() | {
            "engine": server.engine,
            "num_questions": len(asked.questions),
            "questions_sha256": digest((q.question_id, q.image_id, settings.preset.text(q)) for q in asked.questions),
        }
        self._recent: dict[str, tuple[str, str]] = {}  # questions of an image follow one another
        self._lock = threading.Lock()

    def check(self, row: dict[str, Any]) -> None:
        check_image(row, self.images)

    def row(self, question: Question) -> dict[str, Any]:
        """A question's row of predictions.jsonl."""
        row: dict[str, Any] = {"question_id": question.question_id, "image_id": question.image_id}
        shown = self.shown.get(question.image_id)
        if shown is not None and shown != question.image_id:
            row["shown_image_id"] = shown
        row["question"] = question.question
        started = time.perf_counter()
        prompt = self.settings.preset.text(question)
        try:
            if shown is None:
                raise RecordError("missing_image", "the question has no image")
            uri, sha256 = self._encoded(shown)
            answer = self._answer(prompt, uri)
        except Unreachable as error:  # the other questions would fail like this one
            fix = "start it again, and run the same command: what is answered is kept"
            raise Unreachable(error.what, where=error.where, fix=fix) from error
        except UserError as error:
            answer = {"answer": None, "error": f"{error.where}: {error.what}"}
        except (RecordError, OSError, ValueError) as error:
            answer = {"answer": None, "error": str(error)}
        else:
            answer["image_sha256"] = sha256
        seconds = round(time.perf_counter() - started, 6)
        return row | answer | {"prompt": prompt, "model": self.settings.revision, "seconds": seconds}

    def _answer(self, prompt: str, uri: str) -> dict[str, Any]:
        content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": prompt}]
        served = self.server.client.ask([{"role": "user", "content": content}], self.settings.max_new_tokens)
        if served.text is None:
            return {"answer": None, "error": served.error}
        facts: dict[str, Any] = {"answer": served.text.strip()}
        if served.finish_reason:
            facts["ended"] = "length" if served.finish_reason == "length" else "stop"
        if served.num_prompt_tokens is not None:
            facts["num_prompt_tokens"] = served.num_prompt_tokens
        if served.model not in ("", self.server.client.model):
            facts["served_model"] = served.model
        return facts

    def _encoded(self, image_id: str) -> tuple[str, str]:
        """The image as a data URI, and the hash of its file."""
        with self._lock:
            if image_id in self._recent:
                return self._recent[image_id]
        image = self.images[image_id].open()
        for _ in range(self.settings.jpeg_rounds):
            image = through_jpeg(image)
        encoded = data_uri(image), self.images[image_id].sha256()
        with self._lock:
            self._recent[image_id] = encoded
            while len(self._recent) > self.server.concurrency:
                del self._recent[next(iter(self._recent))]
        return encoded


def other_models(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Models other than the one asked for that a server says have answered -> how many questions."""
    return dict(Counter(row["served_model"] for row in rows if "served_model" in row))


def sample_of(questions: Sequence[Question], number: int) -> list[Question]:
    """At most this many questions, evenly spread."""
    number = min(number, len(questions))
    return [questions[i * len(questions) // number] for i in range(number)]


def compare_sample(
    model: LlavaNextForConditionalGeneration,
    processor: LlavaLlama31Processor,
    asked: ToAsk,
    rows: Iterable[Mapping[str, Any]],
    number: int,
) -> Sampled:
    """Ask this package's engine some of the questions that a server was asked.

    Args:
        model: the weights that are served.
        processor: theirs.
        asked: what the server was asked.
        rows: its answers.
        number: of questions to compare.
    """
    chosen = sample_of(asked.questions, number)
    images: dict[str, ImageRef] = {q.image_id: q.image for q in asked.questions if q.image is not None}
    seed = asked.settings.blind_seed
    shown = {image_id: image_id for image_id in images} if seed is None else derangement(images, seed)
    needed = {shown[q.image_id] for q in chosen if q.image_id in shown}
    settings: EvaluationSettings = asked.settings
    answerer = GreedyAnswerer(
        model, processor, max_new_tokens=settings.max_new_tokens, batch_invariant=settings.batch_invariant
    )
    contents = {image_id: image_id for image_id in images}
    asker = Asker(answerer, {image_id: images[image_id] for image_id in needed}, shown, settings, contents)
    batches = asker.plan(chosen, settings.batch_size or SAMPLE_BATCH)
    with undisturbed(model):
        own = {str(row["question_id"]): row["answer"] for part in asker.ask_all(batches) for row in part}
    served = {str(row["question_id"]): row["answer"] for row in rows}
    ids = tuple(question.question_id for question in chosen)
    return Sampled(ids, {str(i): served.get(str(i)) for i in ids}, {str(i): own.get(str(i)) for i in ids})
