"""How published evaluators of TextVQA word their prompts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.evaluation.metrics.choices import inline_options


if TYPE_CHECKING:
    from llava_llama31.trainer.evaluation.questions import Question


PLACEHOLDERS = ("question", "ocr_tokens", "options", "context")


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
        prompt: the text after the image, with `{question}` and, where asked for, `{ocr_tokens}`, `{options}` (lines
            of their own, if the question does not list them itself) and `{context}` (a line before the question).
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
        """Whether the prompt contains what an OCR engine read."""
        return "{ocr_tokens}" in self.prompt

    def text(self, question: "Question") -> str:
        """The words after the image."""
        asked = question.question.capitalize() if self.capitalize else question.question
        listed = question.options == inline_options(question.question)
        values = {
            "question": asked,
            "ocr_tokens": ", ".join(question.ocr_tokens or ()),
            "options": "" if listed else "".join(f"\n{letter}. {text}" for letter, text in question.options),
            "context": f"{question.context}\n" if question.context else "",
        }
        # one pass: a question that says {ocr_tokens} stays what it is
        return re.sub(rf"\{{({'|'.join(PLACEHOLDERS)})\}}", lambda match: values[match[1]], self.prompt)


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


# whose prompts --preset and a recipe's preset name; VLMEvalKit's own of TextVQA is that of the card
PRESET_NAMES = (*PRESETS, "vlmevalkit")


def check_ocr(preset: Preset, questions: "Sequence[Question]") -> None:
    """Refuse a preset whose prompt contains OCR tokens where a question has none.

    Raises:
        UserError: naming the first such question.
    """
    lacking = [question.question_id for question in questions if question.ocr_tokens is None]
    if preset.needs_ocr and lacking:
        raise UserError(
            f"the prompt of {preset.name} contains OCR tokens, and {len(lacking)} questions have none",
            where=f"question {lacking[0]}",
            fix="give annotations with ocr_tokens, or pass --ocr rapidocr",
        )
