"""Predicts the parameters of a LlavaNext configuration, part by part, without building the model.

This file does not import torch: `llava-llama31 plan` needs only a configuration. The numbers are those of
Transformers' classes; tests/test_plan.py counts the real ones.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llava_llama31.trainer.costs.flops import ModelShape
from llava_llama31.trainer.recipes.schema import LORA_TARGETS, Stage


@dataclass(frozen=True)
class Parameters:
    """Number of parameters of each part.

    Args:
        vision_tower: all of it.
        unused_tower: its layers after the one that is read, which are never trained.
        multi_modal_projector: with `image_newline`.
        embedding: of the language model; an untied head has as many.
        decoder_layer: one of them.
        num_layers: of the decoder.
        final_norm: of the language model.
        tied: the head is the embedding.
        tower_layer: one layer of the tower.
    """

    vision_tower: int
    unused_tower: int
    multi_modal_projector: int
    embedding: int
    decoder_layer: int
    num_layers: int
    final_norm: int
    tied: bool
    tower_layer: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Parameters":
        """Count the parameters of a complete LlavaNext configuration, `config.to_dict()`.

        Raises:
            ValueError: as `ModelShape.of`.
        """
        shape, text, vision = ModelShape.of(config), config["text_config"], config["vision_config"]
        tower_layer, around, last_norm = _tower(vision)
        num_layers = vision["num_hidden_layers"]
        hidden = shape.hidden_size
        features = shape.tower.hidden_size * shape.tower.num_feature_layers
        projector = features * hidden + hidden * hidden + (2 * hidden if config["multimodal_projector_bias"] else 0)
        return cls(
            vision_tower=around + last_norm + num_layers * tower_layer,
            unused_tower=(num_layers - shape.tower.num_layers) * tower_layer + last_norm,
            multi_modal_projector=projector + hidden,
            embedding=shape.vocab_size * hidden,
            decoder_layer=_decoder_layer(shape, text),
            num_layers=shape.num_layers,
            final_norm=hidden,
            tied=config["tie_word_embeddings"] or text["tie_word_embeddings"],
            tower_layer=tower_layer,
        )

    @property
    def language_model(self) -> int:
        matrices = self.embedding * (1 if self.tied else 2)
        return matrices + self.num_layers * self.decoder_layer + self.final_norm

    @property
    def largest(self) -> int:
        """The largest part that is gathered at once: a layer, or the embedding."""
        return max(self.embedding, self.decoder_layer, self.tower_layer)

    def groups(self) -> dict[str, int]:
        """Number of parameters by module group."""
        return {
            "vision_tower": self.vision_tower,
            "multi_modal_projector": self.multi_modal_projector,
            "language_model": self.language_model,
        }

    def trainable(
        self, trainable: Collection[str], *, adapters: Mapping[str, int] | None = None, frozen_newline: int = 0
    ) -> dict[str, int]:
        """Number of parameters that get a gradient, by module group.

        Args:
            adapters: parameters of the adapters that are trained in place of a group, by module group.
            frozen_newline: size of `image_newline` if it is not trained with the projector.
        """
        numbers = {group: number if group in trainable else 0 for group, number in self.groups().items()}
        if numbers["vision_tower"]:
            numbers["vision_tower"] -= self.unused_tower
        if numbers["multi_modal_projector"]:
            numbers["multi_modal_projector"] -= frozen_newline
        return numbers | dict(adapters or {})


def decoder_linears(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Input and output width of a decoder layer's linear layers."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    wide, narrow = shape.num_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    sizes = ((hidden, wide), (hidden, narrow), (hidden, narrow), (wide, hidden), (hidden, inner), (hidden, inner))
    return dict(zip(LORA_TARGETS, (*sizes, (inner, hidden)), strict=True))


def adapter_parameters(shape: ModelShape, rank: int, targets: Collection[str], *, dora: bool = False) -> int:
    """Parameters of low-rank adapters on these linear layers of all decoder layers; DoRA adds one per output."""
    sizes = decoder_linears(shape)
    return shape.num_layers * _low_rank([sizes[name] for name in targets], rank, dora)


def stage_adapters(shape: ModelShape, stage: Stage) -> dict[str, int]:
    """Parameters of a stage's adapters, by module group; groups without adapters are left out."""
    lora, numbers = stage.lora, {}
    if lora is None:
        return {}
    if "vision_tower" in stage.adapted and lora.vision_tower is not None:
        of_layer = _low_rank(shape.tower.linears, lora.vision_tower.r, lora.dora)
        numbers["vision_tower"] = shape.tower.num_layers * of_layer
    if "multi_modal_projector" in stage.adapted and lora.multi_modal_projector is not None:
        numbers["multi_modal_projector"] = _low_rank(shape.projector_linears, lora.multi_modal_projector.r, lora.dora)
    if "language_model" in stage.adapted:
        numbers["language_model"] = adapter_parameters(shape, lora.r, lora.targets, dora=lora.dora)
    return numbers


def _low_rank(linears: Iterable[tuple[int, int]], rank: int, dora: bool) -> int:
    return sum(rank * (i + o) + dora * o for i, o in linears)


def _decoder_layer(shape: ModelShape, text: Mapping[str, Any]) -> int:
    sizes = decoder_linears(shape)
    number = 2 * shape.hidden_size + sum(i * o for i, o in sizes.values())
    if text.get("attention_bias"):
        number += sum(sizes[name][1] for name in LORA_TARGETS[:4])
    if text.get("mlp_bias"):
        number += sum(sizes[name][1] for name in LORA_TARGETS[4:])
    return number


def _tower(vision: Mapping[str, Any]) -> tuple[int, int, int]:
    """Parameters of one layer, of everything around the layers, and of what follows the last layer and is not read."""
    hidden, patches = vision["hidden_size"], (vision["image_size"] // vision["patch_size"]) ** 2
    patch_numbers = vision["num_channels"] * vision["patch_size"] ** 2
    attention, norm = 4 * (hidden * hidden + hidden), 2 * hidden
    positions = hidden + (patches + 1) * hidden + patch_numbers * hidden
    if vision["model_type"] == "clip_vision_model":
        inner = vision["intermediate_size"]
        return attention + 2 * norm + 2 * hidden * inner + inner + hidden, positions + norm, norm
    if vision["model_type"] == "siglip_vision_model":
        inner = vision["intermediate_size"]
        mlp = 2 * hidden * inner + inner + hidden
        # a probe that attends to all patches, a norm and an MLP
        head = hidden + attention + norm + mlp if vision["vision_use_head"] else 0
        # no class token, but a patch bias
        around = patches * hidden + patch_numbers * hidden + hidden
        return attention + 2 * norm + mlp, around, norm + head
    # dinov2: ModelShape.of refuses any other type
    inner = int(hidden * vision["mlp_ratio"])
    mlp = 2 * hidden * inner + inner + hidden
    if vision["use_swiglu_ffn"]:
        inner = (int(inner * 2 / 3) + 7) // 8 * 8
        mlp = 3 * hidden * inner + 2 * inner + hidden
    # patch bias and mask token; two learned scales per layer
    return attention + 2 * norm + mlp + 2 * hidden, positions + 2 * hidden, norm
