"""Records what a model answers to the fixed questions: `reference.json` in its exported folder.

Each question has its prompt's ids, its greedy answer, and for each token of the answer by how much it led; a digest of
the logits for the first token; and the answers under faults that change an answer but not the length of a prompt.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LlavaNextForConditionalGeneration

from llava_llama31.processing import LlavaLlama31Processor
from llava_llama31.trainer.engines.questions import FixedQuestion, fixed_questions
from llava_llama31.trainer.errors import UserError


REFERENCE = "reference.json"
FORMAT = 1
NUM_NEW_TOKENS = 16
NUM_TOP = 5
NUM_PADS = 8
PADDED_RIGHT = "prompts padded on the right"
ON_BLACK, DROPPED = "transparent images on black", "the transparency of images is dropped"


@dataclass(frozen=True)
class Recorded:
    """One question's answer.

    Args:
        id: of the question.
        prompt: (token id, number of times in succession), in order.
        answer: text, without special tokens.
        answer_ids: its tokens, with the one that ends it.
        leads: logit of each token minus that of the runner-up, by the deviation of all logits there.
        runners_up: the answer up to each token, with the runner-up in its place.
        first_logits_sha256: of the logits for the first token, as float32; the same on one machine only.
        first_top: (token id, log probability) of the likeliest first tokens.
        under_faults: name of a fault -> the answer with it.
    """

    id: str
    prompt: list[list[int]]
    answer: str
    answer_ids: list[int]
    leads: list[float]
    runners_up: list[str]
    first_logits_sha256: str
    first_top: list[list[float]]
    under_faults: dict[str, str]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(times for _, times in self.prompt)


@dataclass(frozen=True)
class Reference:
    """What a folder's `reference.json` holds.

    Args:
        tile, grids: what the questions depend on, see `fixed_questions`.
        dtype: that the model ran in.
        recorded: in the questions' order.
    """

    tile: int
    grids: list[list[int]]
    dtype: str
    recorded: list[Recorded]

    def questions(self) -> list[FixedQuestion]:
        return fixed_questions(self.grids, self.tile)


def record_reference(model: LlavaNextForConditionalGeneration, processor: LlavaLlama31Processor) -> str:
    """Ask a model the fixed questions; returns the content of `reference.json`."""
    grids = [[int(height), int(width)] for height, width in processor.image_processor.image_grid_pinpoints]
    questions = fixed_questions(grids, processor.tile_size)
    recorded = [asdict(_recorded(model, processor, question)) for question in questions]
    content = {"format": FORMAT, "tile": processor.tile_size, "grids": grids}
    content |= {"dtype": str(model.dtype).removeprefix("torch."), "recorded": recorded}
    return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"


def read_reference(folder: Path) -> Reference:
    """The reference of an exported folder.

    Raises:
        UserError: there is none, or it is not one of this version.
    """
    file = folder / REFERENCE
    fix = "write the folder again: llava-llama31 export RUN"
    if not file.is_file():
        raise UserError("has no reference answers", where=str(file), fix=fix)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise UserError("was written by another version", where=str(file), fix=fix)
        recorded = [Recorded(**item) for item in content.pop("recorded")]
        return Reference(**content, recorded=recorded)
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"is not a reference: {error}", where=str(file), fix=fix) from error


def inputs_of(processor: Any, messages: Sequence[dict[str, Any]]) -> Any:
    """A conversation as a model takes it."""
    return processor.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@torch.no_grad()
def _recorded(
    model: LlavaNextForConditionalGeneration, processor: LlavaLlama31Processor, question: FixedQuestion
) -> Recorded:
    inputs = _placed(model, inputs_of(processor, question.messages()))
    ids, logits = _greedy(model, inputs)

    def text(tokens: list[int]) -> str:
        return processor.tokenizer.decode(tokens, skip_special_tokens=True)

    top = logits.topk(2, dim=-1)
    leads = ((top.values[:, 0] - top.values[:, 1]) / logits.std(dim=-1)).tolist()
    first = logits[0].log_softmax(-1).topk(min(NUM_TOP, logits.shape[-1]))
    faulty = {PADDED_RIGHT: _greedy(model, _padded_right(inputs, processor.tokenizer.pad_token_id))[0]}
    if question.is_transparent:
        for name, show in ((ON_BLACK, _flat), (DROPPED, lambda image: image.convert("RGB"))):
            shown = _placed(model, inputs_of(processor, _with_images(question, show).messages()))
            faulty[name] = _greedy(model, shown)[0]
    return Recorded(
        question.id,
        [[token, len(list(run))] for token, run in groupby(inputs["input_ids"][0].tolist())],
        text(ids),
        ids,
        [round(lead, 4) for lead in leads],
        [text([*ids[:i], second]) for i, second in enumerate(top.indices[:, 1].tolist())],
        hashlib.sha256(logits[0].cpu().numpy().tobytes()).hexdigest(),
        [[token, round(value, 4)] for token, value in zip(first.indices.tolist(), first.values.tolist(), strict=True)],
        {name: text(answer) for name, answer in faulty.items()},
    )


def _placed(model: LlavaNextForConditionalGeneration, inputs: Any) -> dict[str, torch.Tensor]:
    placed = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    if "pixel_values" in placed:
        placed["pixel_values"] = placed["pixel_values"].to(model.dtype)
    return placed


def _greedy(
    model: LlavaNextForConditionalGeneration, inputs: dict[str, torch.Tensor]
) -> tuple[list[int], torch.Tensor]:
    """Ids of the answer, and its logits (N, V) in float32."""
    generating: Any = model  # its class hides that it generates
    output = generating.generate(
        **inputs, max_new_tokens=NUM_NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return ids, torch.stack([step[0] for step in output.logits]).float()


def _padded_right(inputs: dict[str, torch.Tensor], pad: int) -> dict[str, torch.Tensor]:
    ids = inputs["input_ids"]
    pads = ids.new_full((1, NUM_PADS), pad)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(pads)], dim=1)
    return {**inputs, "input_ids": torch.cat([ids, pads], dim=1), "attention_mask": mask}


def _with_images(question: FixedQuestion, show: Callable[[Image.Image], Image.Image]) -> FixedQuestion:
    turns = tuple(
        (role, tuple(show(part) if isinstance(part, Image.Image) else part for part in parts))
        for role, parts in question.turns
    )
    return FixedQuestion(question.id, turns)


def _flat(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image
    black = Image.new("RGB", image.size)
    black.paste(image, mask=image.getchannel("A"))
    return black
