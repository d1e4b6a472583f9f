"""A conversation about images, whose answers come in pieces as they are generated."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from llava_llama31 import LlavaLlama31ForConditionalGeneration
from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.data.sources.images import ImageRef, image_at
from llava_llama31.trainer.data.sources.reject_reasons import RecordError
from llava_llama31.trainer.data.sources.remote_files import check_is_path
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.generation import Choice, GreedyAnswerer, most_likely
from llava_llama31.trainer.recipes.data_formats import MAX_PIXELS


# what a tokenizer decodes the first bytes of a longer character to
_UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class Sampling:
    """Draw each token instead of taking the most likely one.

    Args:
        temperature: above 0; below 1 sharpens the distribution.
        top_p: draw from the most likely tokens that together have this probability.
        seed: the same seed and conversation give the same answers on the same device.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def choice(self, device: torch.device) -> Choice:
        """Picks the next ids (B,) from logits (B, vocabulary)."""
        generator = torch.Generator(device).manual_seed(self.seed)
        warpers = TemperatureLogitsWarper(self.temperature), TopPLogitsWarper(self.top_p)

        def choose(logits: torch.Tensor) -> torch.Tensor:
            nothing: Any = None  # the ids before, which neither of them reads
            for warper in warpers:
                logits = warper(nothing, logits)
            return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]

        return choose


@dataclass(frozen=True)
class _Shown:
    path: str
    tiles: np.ndarray
    size: tuple[int, int]


class Conversation:
    """Turns with one model, which is read once; an image is encoded once too, until another one is shown.

    Args:
        model: LlavaNext in eval mode.
        processor: the model's.
        max_new_tokens: length at which an answer is cut.
        sampling: how to draw tokens; None: greedy, as `evaluate` answers.
        system: text of a system turn.
        max_pixels: of the largest image that is read, height x width; default: that of training data.
    """

    def __init__(
        self,
        model: LlavaLlama31ForConditionalGeneration,
        processor: LlavaLlama31Processor,
        *,
        max_new_tokens: int = 512,
        sampling: Sampling | None = None,
        system: str = "",
        max_pixels: int | None = None,
    ):
        self._answerer = GreedyAnswerer(model, processor, max_new_tokens=max_new_tokens)
        self._choose = sampling.choice(model.device) if sampling else most_likely
        self._context = model.config.get_text_config().max_position_embeddings
        self._max_pixels = max_pixels or MAX_PIXELS
        self._system = [_turn("system", system)] if system else []
        self.reset()

    def reset(self) -> None:
        """Forget all turns and images; a system turn stays."""
        self.messages: list[dict[str, Any]] = list(self._system)
        self._shown: list[_Shown] = []
        self._pending: list[_Shown] = []

    def add_image(self, path: str) -> tuple[int, int]:
        """Show an image with the next question; returns its (height, width) in pixels.

        Raises:
            UserError: it cannot be read, under the rules of training data.
        """
        check_is_path(path)
        file = Path(path).expanduser().absolute()
        try:
            # the folder is where the user says, so links out of it are fine
            image = image_at(str(file.resolve()), Path(file.resolve().anchor), self._max_pixels).open()
        except RecordError as error:
            raise UserError(error.detail, where=path, fix=_fix_of(error, "name an image file")) from error
        size = image.height, image.width
        self._pending.append(_Shown(str(file), self._answerer.processor.tiles(image), size))
        return size

    def add_images(self, images: Sequence[tuple[str, bytes]]) -> None:
        """Show encoded images with the next question, under these names: all of them, or none.

        Raises:
            UserError: one cannot be read, under the rules of training data.
        """
        opened = []
        for name, data in images:
            try:
                image = ImageRef(name, data=data, max_pixels=self._max_pixels).open()
            except RecordError as error:
                raise UserError(error.detail, where=name, fix=_fix_of(error, "choose an image file")) from error
            size = image.height, image.width
            opened.append(_Shown(name, self._answerer.processor.tiles(image), size))
        self._pending += opened

    def drop_pending(self) -> None:
        """Show no image with the next question."""
        self._pending = []

    def ask(self, text: str) -> Generator[str, None, None]:
        """Put a question and yield the answer in pieces of text.

        If the iterator is closed early, the turn holds what was said until then.

        Raises:
            UserError: the conversation is longer than the model's context; the question is not added.
        """
        shown = [*self._shown, *self._pending]
        images: list[dict[str, str]] = [{"type": "image"} for _ in self._pending]
        asked = {"role": "user", "content": [*images, {"type": "text", "text": text}]}
        tiles, sizes = [image.tiles for image in shown], [image.size for image in shown]
        try:
            prompt = self._answerer.prompt_from_tiles([*self.messages, asked], tiles, sizes)
        except ValueError as error:
            raise UserError(str(error), where="the question", fix="word it differently") from error
        room = self._context - len(prompt.input_ids)
        if room < 1:
            what = (
                f"the conversation has {len(prompt.input_ids):,} tokens, the model's context holds {self._context:,}"
            )
            raise UserError(what, fix="start again with /reset")
        self._shown, self._pending = shown, []
        self.messages.append(asked)
        pieces: list[str] = []
        try:
            for piece in self._pieces(islice(self._answerer.stream(prompt, self._choose), room)):
                pieces.append(piece)
                yield piece
        finally:
            self.messages.append(_turn("assistant", "".join(pieces).strip()))

    def _pieces(self, token_ids: Iterator[int]) -> Iterator[str]:
        """Text of ids once it is settled, so that no piece ends within a character."""
        decode = self._answerer.processor.tokenizer.decode
        ids: list[int] = []
        said = ""
        for token_id in token_ids:
            ids.append(token_id)
            text = decode(ids, skip_special_tokens=True).lstrip()
            if text.endswith(_UNFINISHED) or not text.startswith(said):
                continue
            yield text[len(said) :]
            said = text
        rest = decode(ids, skip_special_tokens=True).lstrip()[len(said) :]
        if rest:
            yield rest

    def to_json(self) -> list[dict[str, Any]]:
        """All turns, with the paths of their images."""
        paths = iter([image.path for image in self._shown])
        return [
            {
                "role": turn["role"],
                "images": [next(paths) for part in turn["content"] if part["type"] == "image"],
                "text": turn["content"][-1]["text"],
            }
            for turn in self.messages
        ]


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def answer_to(conversation: Conversation, text: str, images: Sequence[str]) -> str:
    """One whole answer to a question about images.

    Raises:
        UserError: an image cannot be read, or there is no room in the context.
    """
    for image in images:
        conversation.add_image(image)
    return "".join(conversation.ask(text)).strip()


def _fix_of(error: RecordError, usual: str) -> str:
    """The fix for an image; for one that is too large, the error itself has it."""
    return "" if error.reason == "oversized_image" else usual
