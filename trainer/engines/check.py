"""Asks an engine the questions of a reference; counts equal answers and names the cause of a difference."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from llava_llama31.trainer.engines.client import EngineClient, Served
from llava_llama31.trainer.engines.questions import FixedQuestion
from llava_llama31.trainer.engines.reference import NUM_NEW_TOKENS, Recorded, Reference
from llava_llama31.trainer.errors import UserError


# in standard deviations of the logits: what half precision can turn round
SMALL_LEAD = 0.05
TWO_BOS = "two <|begin_of_text|>: the tokenizer or the server adds one to the template's"
TILES = "another number of image tokens: other grids, tile size or unpadding"
SYSTEM_TURN = "another chat template: it writes a system turn of its own"
SEPARATOR = "another chat template: it joins several images differently"
TEMPLATE = "another chat template"
BATCH = "rows answered together disturb each other: prompts padded on the right, or pads not masked"
PRECISION = "another precision: answers change only where two tokens are almost equally likely"
PIXELS = "other pixels: resizing, normalisation or image mode"
WEIGHTS = "other weights, another template of the same length or another computation: text alone differs too"
REFUSED = "the server refuses such requests"


@dataclass(frozen=True)
class Asked:
    """One question with the recorded answer and the engine's.

    Args:
        alone: the engine's answer when asked again by itself, where it was.
    """

    question: FixedQuestion
    recorded: Recorded
    served: Served
    alone: Served | None = None

    @property
    def more_tokens(self) -> int:
        """By how many tokens the engine's prompt is longer than the recorded one; 0 if it does not count them."""
        counted = self.served.num_prompt_tokens
        return 0 if counted is None else counted - self.recorded.num_prompt_tokens

    @property
    def equal(self) -> bool:
        return self.served.text is not None and self._is_answer(self.served.text) and not self.more_tokens

    @property
    def equal_alone(self) -> bool:
        return self.alone is not None and self.alone.text is not None and self._is_answer(self.alone.text)

    def _is_answer(self, text: str) -> bool:
        return text.strip() == self.recorded.answer.strip()

    def is_under(self, fault: str) -> bool:
        """Whether the engine's answer is the one that the model gives with a fault, and not without."""
        answer = self.recorded.under_faults.get(fault)
        return answer is not None and self.served.text is not None and answer.strip() == self.served.text.strip()

    @property
    def is_close(self) -> bool:
        """Whether the answers part where a token led by little, and the engine took the runner-up."""
        text, answer = self.served.text or "", self.recorded.answer
        for lead, beside in zip(self.recorded.leads, self.recorded.runners_up, strict=True):
            beside = beside.rstrip("\N{REPLACEMENT CHARACTER}")  # of a letter whose other bytes follow
            parts_here = text == beside or not answer.startswith(beside)
            if lead < SMALL_LEAD and text.startswith(beside) and parts_here:
                return True
        return False


@dataclass(frozen=True)
class EngineReport:
    """What an engine answered to the fixed questions.

    Args:
        asked: number of questions.
        equal: number of those with the recorded answer from a prompt of the recorded length.
        first_difference: the first other one: question, what was expected and what came; None if all are equal.
        likely: what the differences come from; None if all are equal.
    """

    asked: int
    equal: int
    first_difference: dict[str, Any] | None
    likely: str | None

    def to_json(self) -> dict[str, Any]:
        return {
            "asked": self.asked,
            "equal": self.equal,
            "first_difference": self.first_difference,
            "likely": self.likely,
        }


def check_engine(reference: Reference, client: EngineClient, concurrency: int) -> EngineReport:
    """Ask an engine all questions, several at a time, and those it answers differently again by themselves.

    Raises:
        UserError: the server can't be reached, or refuses every question.
    """
    questions = reference.questions()
    with ThreadPoolExecutor(concurrency) as pool:
        answers = pool.map(lambda question: client.ask(question.openai_messages(), NUM_NEW_TOKENS), questions)
        together = list(map(Asked, questions, reference.recorded, answers))
    if all(item.served.text is None for item in together):
        fix = "start it with the exported folder, and let it take images"
        raise UserError(f"refuses every question: {together[0].served.error}", where=client.url, fix=fix)
    return report_of([item if item.equal else _asked_alone(item, client) for item in together])


def _asked_alone(item: Asked, client: EngineClient) -> Asked:
    alone = client.ask(item.question.openai_messages(), NUM_NEW_TOKENS)
    return Asked(item.question, item.recorded, item.served, alone)


def report_of(asked: Sequence[Asked]) -> EngineReport:
    """Count the equal answers and judge the others."""
    different = [item for item in asked if not item.equal]
    if not different:
        return EngineReport(len(asked), len(asked), None, None)
    first = different[0]
    difference = {
        "question": first.question.id,
        "expected": first.recorded.answer,
        "answered": first.served.text,
        "expected_prompt_tokens": first.recorded.num_prompt_tokens,
        "prompt_tokens": first.served.num_prompt_tokens,
    }
    if first.served.error:
        difference["error"] = first.served.error
    return EngineReport(len(asked), len(asked) - len(different), difference, likely_cause(asked))


def likely_cause(asked: Sequence[Asked]) -> str:
    """The cause that explains most, from what says most: lengths of prompts, then answers under known faults."""
    answered = [item for item in asked if item.served.text is not None]
    if any(item.more_tokens for item in answered):
        return _cause_of_lengths(answered)
    different = [item for item in answered if not item.equal]
    if not different:
        refused = [item.question.id for item in asked if item.served.text is None]
        return f"{REFUSED}: {', '.join(refused)}"
    names = sorted({name for item in different for name in item.recorded.under_faults})
    for name in names:
        if 2 * sum(item.is_under(name) for item in different) > len(different):
            return name
    if 2 * sum(item.equal_alone for item in different) > len(different):
        return BATCH
    if 2 * sum(item.is_close for item in different) > len(different):
        return PRECISION
    return PIXELS if all(item.question.images for item in different) else WEIGHTS


def _cause_of_lengths(answered: Sequence[Asked]) -> str:
    more = {item.question.id: item.more_tokens for item in answered}
    longer = [item for item in answered if item.more_tokens]
    if set(more.values()) == {1}:
        return TWO_BOS
    if all(len(item.question.images) > 1 for item in longer):
        return SEPARATOR
    if all(item.question.images for item in longer):
        first = longer[0]
        used = first.recorded.num_prompt_tokens + first.more_tokens
        return f"{TILES} (the prompt of {first.question.id!r} has {used}, not {first.recorded.num_prompt_tokens})"
    has_system = {item.question.id for item in answered if item.question.turns[0][0] == "system"}
    if all((item.question.id in has_system) != bool(item.more_tokens) for item in answered):
        return SYSTEM_TURN
    return TEMPLATE
