"""Vision tower + projector + Llama -> one checkpoint with its processor: `llava-llama31 assemble`."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_llama31.trainer.errors import UserError


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llava_llama31.assembly import AssemblyPlan, VisionChoices
    from llava_llama31.checkpoint_parts import Vocabulary
    from llava_llama31.processing import LlavaLlama31Processor

logger = logging.getLogger(__name__)

DTYPES = ("auto", "bfloat16", "float32")


def assemble(
    vision_tower: str | Path,
    language_model: str | Path,
    output: str | Path,
    *,
    projector: str | Path | None = None,
    vision: "VisionChoices | None" = None,
    add_chat_tokens: bool = False,
    dtype: str = "auto",
    seed: int = 0,
) -> dict[str, int]:
    """Join the parts into one checkpoint folder with processor; returns the number of parameters of each part.

    Args:
        vision_tower: folder of a LLaVA checkpoint (any layout), a CLIP, a SigLIP or a DINOv2.
        language_model: folder of a Llama-family model with its tokenizer.
        output: new folder; it appears once complete.
        projector: folder of a LLaVA checkpoint, or a projector's safetensors file; default: a fresh one.
        vision: size and grid of the tiles, and the layer that is projected; default: the parts' own.
        add_chat_tokens: add Llama 3.1's turn tokens to a tokenizer that lacks them, as new rows of the embedding.
        dtype: `auto` (the language model's), `bfloat16` or `float32`.
        seed: for a fresh projector.

    Raises:
        UserError: the parts do not fit; names every wrong part, before anything is written.
    """
    from llava_llama31.assembly import staged_folder, write_model_files
    from llava_llama31.checkpoint_parts import AssemblyError

    choices = Choices(projector, vision, add_chat_tokens, dtype, seed)
    try:
        plan, processor = _planned(vision_tower, language_model, choices)
        for note in plan.notes:
            logger.info("%s", note)
        with staged_folder(output) as folder:
            write_model_files(plan, folder)
            processor.save_pretrained(folder)
    except AssemblyError as error:
        raise UserError(str(error)) from error
    logger.info("wrote %s: %.2f GB, %s", output, plan.num_bytes / 1e9, plan.dtype)
    return plan.parameter_counts()


@dataclass(frozen=True)
class Choices:
    """What `assemble` may be asked for, beside the parts."""

    projector: str | Path | None = None
    vision: "VisionChoices | None" = None
    add_chat_tokens: bool = False
    dtype: str = "auto"
    seed: int = 0


def planned_processor(
    vision_tower: str | Path, language_model: str | Path, choices: Choices
) -> "LlavaLlama31Processor":
    """The processor of the checkpoint that `assemble` would write; nothing is written.

    Raises:
        UserError: the parts do not fit.
    """
    from llava_llama31.checkpoint_parts import AssemblyError

    try:
        return _planned(vision_tower, language_model, choices)[1]
    except AssemblyError as error:
        raise UserError(str(error)) from error


def _planned(
    vision_tower: str | Path, language_model: str | Path, choices: Choices
) -> "tuple[AssemblyPlan, LlavaLlama31Processor]":
    import torch

    from llava_llama31.assembly import VisionChoices, collecting, plan_assembly
    from llava_llama31.checkpoint_parts import AssemblyError

    if choices.dtype not in DTYPES:
        raise UserError(f"dtype {choices.dtype!r}", fix=f"one of {', '.join(DTYPES)}")
    tokenizer, vocabulary, problems = prepare_tokenizer(language_model, choices.add_chat_tokens)
    with collecting(problems):
        plan = plan_assembly(
            vision_tower,
            language_model,
            vocabulary=vocabulary,
            projector=choices.projector,
            vision=choices.vision or VisionChoices(),
            dtype={"bfloat16": torch.bfloat16, "float32": torch.float32}.get(choices.dtype),
            seed=choices.seed,
        )
    if problems:
        raise AssemblyError(*problems)
    return plan, _processor_of(plan, tokenizer)


def _processor_of(plan: "AssemblyPlan", tokenizer: "PreTrainedTokenizerBase") -> "LlavaLlama31Processor":
    from llava_llama31.processing import build_processor

    config: Any = plan.config  # the stock class allows its parts to be missing
    return build_processor(
        tokenizer,
        image_size=config.vision_config.image_size,
        patch_size=config.vision_config.patch_size,
        image_mean=plan.image_mean,
        image_std=plan.image_std,
        image_grid_pinpoints=config.image_grid_pinpoints,
        has_class_token=config.vision_feature_select_strategy == "default",
    )


def convert_original(folder: str | Path, output: str | Path, *, add_chat_tokens: bool = False) -> dict[str, int]:
    """Rewrite a LLaVA-1.6 checkpoint of the original layout (`liuhaotian/...`) in Transformers' native keys."""
    return assemble(folder, folder, output, projector=folder, add_chat_tokens=add_chat_tokens)


def prepare_tokenizer(
    folder: str | Path, add_chat_tokens: bool
) -> "tuple[PreTrainedTokenizerBase, Vocabulary, list[str]]":
    """Add `<image>` to the language model's tokenizer; returns it, the embedding's vocabulary, and any problems.

    Added chat tokens start from useful values: `<|eot_id|>` from the token that ends the model's answers today (which
    stays a stop id), `<|begin_of_text|>` from its bos token, the others from the mean.

    Raises:
        AssemblyError: the folder has no tokenizer.
    """
    from transformers import AutoTokenizer, LlamaConfig

    from llava_llama31.checkpoint_parts import AssemblyError, Vocabulary, is_original_llava, read_json
    from llava_llama31.processing import CHAT_TOKENS, IMAGE_TOKEN, STOP_TOKENS

    # Transformers does not know the model type in LLaVA's own config.json
    config = LlamaConfig() if is_original_llava(read_json(Path(folder, "config.json"))) else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise AssemblyError(f"{folder}: no tokenizer: {reason} (fix: download the tokenizer's files too)") from error
    known = tokenizer.get_vocab()
    missing = [token for token in CHAT_TOKENS if token not in known]
    problems = []
    if missing and not add_chat_tokens:
        problems.append(
            f"{folder}: the tokenizer lacks {', '.join(missing)} (fix: use a Llama-3.1 tokenizer, or "
            f"add_chat_tokens to add them as new tokens)"
        )
    elif missing:
        logger.info("%s: the new chat tokens %s are untrained", folder, ", ".join(missing))
    old_eos, old_bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    predecessors = {"<|eot_id|>": old_eos, "<|begin_of_text|>": old_bos}
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [*missing, IMAGE_TOKEN]}, replace_extra_special_tokens=False
    )
    grown = tokenizer.get_vocab()
    ids = {token: grown[token] for token in (*CHAT_TOKENS, IMAGE_TOKEN)}
    new_ids = [token_id for token, token_id in ids.items() if token not in known]
    copies = {ids[new]: old for new, old in predecessors.items() if new in missing and old is not None}
    stop_ids = [ids[token] for token in STOP_TOKENS]
    vocabulary = Vocabulary(
        size=max(grown.values()) + 1,
        first_new_id=min(new_ids, default=None),
        image_token_id=ids[IMAGE_TOKEN],
        bos_token_id=ids["<|begin_of_text|>"],
        pad_token_id=ids["<|finetune_right_pad_id|>"],
        eos_token_ids=(*stop_ids, old_eos) if ids["<|eot_id|>"] in copies else tuple(stop_ids),
        copies=copies,
    )
    return tokenizer, vocabulary, problems
