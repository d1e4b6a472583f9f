"""LLaVA-NeXT on Llama 3.1: Transformers' LlavaNext with the same weights and keys, and ways to train it faster.

As it is, the model consists of the modules of `LlavaNextForConditionalGeneration`
(transformers/models/llava_next/modeling_llava_next.py) and computes what that computes. What differs is asked for:
 - `packable=True`, when the model is made: a Llama whose rows may be packed, where samples about one image share it
   (packed_llama_llava_llama31.py), with norms and a head that save memory in training;
 - `packing`, in `forward`: such a row;
 - `supervised_only=True`, in `forward`: loss and logits at supervised positions only, no cache; a frozen vision tower
   runs without a graph, and no tower runs layers after the used one; a text-only micro-batch runs a one-tile pass, so
   that all ranks call the same modules.
Two things differ always: a wrong number of image placeholders is reported row by row, and under ZeRO-3 `generate`
encodes images inside `forward`.

Shapes: B rows, S positions, N supervised positions, I images, T tiles of all images, P patches of a tile,
V vocabulary, D hidden size, H W height and width of a tile.
"""

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, Cache, LlavaNextForConditionalGeneration, LlavaNextModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextCausalLMOutputWithPast,
    LlavaNextModelOutputWithPast,
    LlavaNextMultiModalProjector,
    image_size_to_num_patches,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_llava_llama31 import LlavaLlama31Config
from .packed_llama_llava_llama31 import CACHE_NAME, LlavaLlama31TextModel, Packing, SupervisedHead, to_device


IGNORE_INDEX = -100
# towers whose hidden states are patches only: with these `full` keeps the patches and nothing else
_WITHOUT_CLASS_TOKEN = ("siglip_vision_model",)


class LlavaLlama31Model(LlavaNextModel):
    """Vision tower, projector and Llama without the head; see `LlavaLlama31ForConditionalGeneration`."""

    config: LlavaLlama31Config

    def __init__(self, config: LlavaLlama31Config, packable: bool = False):
        super(LlavaNextModel, self).__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LlavaNextMultiModalProjector(config)
        # drawn as stock draws it, so that a seed gives stock's weights
        size = config.text_config.hidden_size
        self.image_newline = nn.Parameter(torch.randn(size, dtype=self.dtype) * (1 / math.sqrt(size)))
        self.vocab_size = config.text_config.vocab_size
        packs = packable and config.text_config.model_type == "llama"
        self.language_model = (LlavaLlama31TextModel if packs else AutoModel.from_config)(config.text_config)
        self._layouts: dict[tuple[int, int], torch.Tensor] = {}
        self.post_init()

    def _embeds_with_images(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor,
        feature_layer: int | list[int] | None,
        select_strategy: str | None,
    ) -> torch.Tensor:
        """Embeddings (B, S, D) with the images' features in place, from no more of the tower than they need."""
        embeds = self.get_input_embeddings()(input_ids)
        vision = self.config.vision_config
        strategy = self.config.vision_feature_select_strategy if select_strategy is None else select_strategy
        num_tiles = [
            image_size_to_num_patches(size, self.config.image_grid_pinpoints, vision.image_size)
            for size in image_sizes
        ]
        if pixel_values.dim() == 5:
            pixel_values = torch.cat([tiles[:n] for tiles, n in zip(pixel_values, num_tiles, strict=True)])
        if pixel_values.dim() != 4 or pixel_values.shape[0] != sum(num_tiles):
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, but {len(image_sizes)} images need "
                f"{sum(num_tiles)} tiles: pass tiles as (T, 3, H, W) or (I, max tiles, 3, H, W)"
            )
        layer = self.config.vision_feature_layer if feature_layer is None else feature_layer
        features = self._tower_features(pixel_values, layer)
        if strategy == "default":
            features = features[:, 1:]
        tiles = self.multi_modal_projector(features).split(num_tiles)
        images, _ = self.pack_image_features(tiles, image_sizes, strategy, self.image_newline)
        packed = torch.cat(images).to(embeds.device, embeds.dtype)
        return embeds.masked_scatter(self.get_placeholder_mask(input_ids, embeds, packed), packed)

    def _tower_features(self, tiles: torch.Tensor, feature_layer: int | list[int] | None) -> torch.Tensor:
        """Hidden states (T, 1 + P, D) of the chosen layers; the tower runs up to the last of them.

        A tower without a class token gives (T, P, D).
        """
        assert feature_layer is not None
        tower = self.vision_tower
        needs_graph = tiles.requires_grad or any(parameter.requires_grad for parameter in tower.parameters())
        with torch.set_grad_enabled(needs_graph and torch.is_grad_enabled()):
            tiles = tiles.to(tower.dtype)
            model_type = self.config.vision_config.model_type
            if model_type == "clip_vision_model":
                hidden = tower.pre_layrnorm(tower.embeddings(tiles))
                layers = tower.encoder.layers
            elif model_type == "siglip_vision_model":
                hidden = tower.embeddings(tiles)
                layers = tower.encoder.layers
            elif model_type == "dinov2":
                hidden = tower.embeddings(tiles)
                layers = tower.encoder.layer
            else:
                states = tower(tiles, output_hidden_states=True).hidden_states
                return self._select(dict(enumerate(states)), feature_layer, len(states) - 1)
            last = max(_hidden_state_index(layer, len(layers)) for layer in _as_list(feature_layer))
            states = {0: hidden}
            for i, layer in enumerate(layers[:last]):
                hidden = layer(hidden, None)
                states[i + 1] = hidden
            return self._select(states, feature_layer, len(layers))

    @staticmethod
    def _select(states: dict[int, torch.Tensor], feature_layer: int | list[int], num_layers: int) -> torch.Tensor:
        chosen = [states[_hidden_state_index(layer, num_layers)] for layer in _as_list(feature_layer)]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """Stock's mask; a wrong number of placeholders is reported row by row (ValueError)."""
        try:
            return super().get_placeholder_mask(cast(Any, input_ids), inputs_embeds, image_features)
        except ValueError as error:
            if input_ids is None:
                raise
            counts = (input_ids == self.config.image_token_id).sum(dim=1).tolist()
            per_row = ", ".join(f"row {row}: {count}" for row, count in enumerate(counts))
            raise ValueError(
                f"the batch has {sum(counts)} image placeholders ({per_row}) but the images have "
                f"{image_features.shape[0]} features: expand <image> with the processor, and do not truncate image "
                "tokens"
            ) from error

    def _trains_projector(self) -> bool:
        projector = self.multi_modal_projector.parameters()
        return self.image_newline.requires_grad or any(parameter.requires_grad for parameter in projector)

    def _text_only_embeds(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """Embeddings of a text-only micro-batch, plus zero times a blank tile's features.

        Under DDP, ZeRO and FSDP every rank must call the same modules in the same order (DeepSpeed #7170), so this
        follows the order of the image path: embeddings, tower, projector, newline. With one process it gives a trained
        projector a zero gradient, so that the loss has a graph and every world size takes the same steps.
        """
        embeds = self.get_input_embeddings()(input_ids)
        size = self.config.vision_config.image_size
        blank = torch.zeros(1, 3, size, size, device=embeds.device)
        features = self.multi_modal_projector(self._tower_features(blank, self.config.vision_feature_layer))
        # means, not sums: only finite values vanish when multiplied by zero
        return embeds + ((features.float().mean() + self.image_newline.float().mean()) * 0.0).to(embeds.dtype)

    def packed_embeds(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor | None,
        image_sizes: Sequence[tuple[int, int]],
        image_positions: torch.Tensor,
        image_features: torch.Tensor | None = None,
        has_features: Sequence[bool] | None = None,
    ) -> torch.Tensor:
        """Embeddings (1, S, D) of a packed row with its images' features at `image_positions`.

        Only patches that remain after unpadding are projected.
        """
        if pixel_values is None and image_features is None:
            if _world_size() > 1 or self._trains_projector():
                return self._text_only_embeds(input_ids)
            return self.get_input_embeddings()(input_ids)
        sizes = _pairs(image_sizes)
        layout, num_tiles = self.feature_layout(sizes, has_features)
        given = (
            0 if pixel_values is None else len(pixel_values),
            0 if image_features is None else len(image_features),
        )
        if num_tiles != given:
            raise ValueError(
                f"pixel_values and image_features have {given} tiles, but the {len(sizes)} images need {num_tiles}"
            )
        if len(layout) != len(image_positions):
            raise ValueError(
                f"the row has {len(image_positions)} image placeholders but the images have {len(layout)} features: "
                "expand <image> with the processor, and do not truncate image tokens"
            )
        embeds = self.get_input_embeddings()(input_ids)
        is_newline = layout < 0
        where = [(~is_newline).nonzero()[:, 0], is_newline.nonzero()[:, 0]]
        patches = to_device(layout[where[0]], embeds.device)
        patch_positions, newline_positions = (
            image_positions.index_select(0, to_device(index, embeds.device)) for index in where
        )
        computed = [] if pixel_values is None else [self.tile_features(pixel_values)]
        known = [] if image_features is None else [image_features]
        features = torch.cat(computed + known) if computed and known else (computed + known)[0]
        features = self.multi_modal_projector(features.flatten(0, 1).index_select(0, patches)).to(embeds.dtype)
        newlines = self.image_newline.to(embeds.dtype).expand(len(newline_positions), -1)
        row = embeds[0].index_copy(0, patch_positions, features).index_copy(0, newline_positions, newlines)
        return row[None]

    def tile_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The projector's input for tiles (T, 3, H, W): (T, P, D) of the tower's chosen layers."""
        features = self._tower_features(pixel_values, self.config.vision_feature_layer)
        return features[:, 1:] if self.config.vision_feature_select_strategy == "default" else features

    def _check_packing(self, packing: Packing, row_length: int) -> None:
        text, num_positions = self.config.text_config, sum(map(sum, packing))
        if text.model_type != "llama":
            raise ValueError(f"packing needs a Llama language model, not {text.model_type}")
        if not isinstance(self.language_model, LlavaLlama31TextModel):
            raise ValueError("this model reads no packed rows: open it with from_pretrained(..., packable=True)")
        if text.attention_dropout:
            raise ValueError(
                f"packing does not support attention dropout, but the language model's is {text.attention_dropout}"
            )
        if num_positions != row_length:
            raise ValueError(f"packing has {num_positions} positions, but the row has {row_length}")

    def feature_layout(
        self, image_sizes: Sequence[tuple[int, int]], has_features: Sequence[bool] | None = None
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """For each image feature in order, its patch among those of all tiles, or -1 for a newline.

        Also returns the number of tiles of images without and with features.

        Args:
            image_sizes: (height, width) of each image in pixels.
            has_features: the images whose tiles come after all others; default: none.
        """
        vision, strategy = self.config.vision_config, self.config.vision_feature_select_strategy
        num_patches = (vision.image_size // vision.patch_size) ** 2
        num_patches += strategy != "default" and vision.model_type not in _WITHOUT_CLASS_TOKEN
        has_features = [False] * len(image_sizes) if has_features is None else has_features
        counts = [
            image_size_to_num_patches(size, self.config.image_grid_pinpoints, vision.image_size)
            for size in image_sizes
        ]
        num_without = sum(own for own, known in zip(counts, has_features, strict=True) if not known)
        tiles = [0, num_without]  # next tile of images without and with features
        layouts = []
        for size, own, known in zip(image_sizes, counts, has_features, strict=True):
            if size not in self._layouts:
                # stock packing, applied to patch indices instead of features
                numbers = torch.arange(own * num_patches).view(own, num_patches, 1)
                packed, _ = self.pack_image_features([numbers], [size], strategy, torch.tensor([-1]))
                self._layouts[size] = packed[0][:, 0]
            layout = self._layouts[size]
            layouts.append(torch.where(layout < 0, layout, layout + tiles[known] * num_patches))
            tiles[known] += own
        return torch.cat(layouts), (num_without, sum(counts) - num_without)

    def images_of_copies(self, input_ids: torch.Tensor, image_sizes: torch.Tensor, num_copies: int) -> list[int]:
        """Numbers of the images of a batch in which each row (B, S) is repeated `num_copies` times in succession."""
        features = torch.tensor([len(self.feature_layout([size])[0]) for size in _pairs(image_sizes)])
        placeholders = (input_ids == self.config.image_token_id).sum(dim=1).cpu()
        owners = torch.searchsorted(placeholders.cumsum(0), features.cumsum(0)).tolist()
        last = len(input_ids) - 1  # has what is left over, for `forward` to refuse
        rows: list[list[int]] = [[] for _ in input_ids]
        for image, owner in enumerate(owners):
            rows[min(owner, last)].append(image)
        return [image for images in rows for image in images * num_copies]

    def forward(  # type: ignore[misc]  # stock's arguments, which its keyword arguments name again
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        packing: Packing | None = None,
        image_positions: torch.LongTensor | None = None,
        supervised_positions: Sequence[int] = (),
        image_features: torch.Tensor | None = None,
        has_features: Sequence[bool] | None = None,
        supervised_only: bool = False,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LlavaNextModelOutputWithPast | tuple:
        """The stock forward; with `packing`, hidden states (1, N, D) of a packed row's `supervised_positions`."""
        cache = past_key_values if cache is None else cache
        if packing is not None:
            assert input_ids is not None
            if image_positions is None:
                image_positions = (input_ids[0] == self.config.image_token_id).nonzero()[:, 0]
            self._check_packing(packing, input_ids.shape[1])
            # called inside forward: ZeRO-3 gathers image_newline only for this module's forward
            embeds = self.packed_embeds(
                input_ids, pixel_values, cast(Any, image_sizes), image_positions, image_features, has_features
            )
            hidden = self.language_model.packed(embeds, position_ids, packing, supervised_positions, cache)
            kept: dict[str, Any] = {CACHE_NAME: cache}
            return LlavaNextModelOutputWithPast(last_hidden_state=hidden, **kept)
        if supervised_only and input_ids is not None and mm_encoder_outputs is None:
            if pixel_values is not None:
                asked = (vision_feature_layer, vision_feature_select_strategy)
                inputs_embeds = self._embeds_with_images(input_ids, pixel_values, cast(Any, image_sizes), *asked)
                input_ids = pixel_values = None
            elif _world_size() > 1 or self._trains_projector():
                input_ids, inputs_embeds = None, self._text_only_embeds(cast(torch.LongTensor, input_ids))
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            **{CACHE_NAME: cache},
            **kwargs,
        )


class LlavaLlama31ForConditionalGeneration(LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with a Llama-3.1 language model; weights and keys of `LlavaNextForConditionalGeneration`.

    Modules and results are the stock ones, unless the following is asked for.

    `forward(labels=..., supervised_only=True)`, for training: the loss over supervised positions, summed and divided
    by `num_items_in_batch` where given (else by their number), and logits of shape (N, V) at the positions that
    predict a supervised token, in row order; no cache.

    Packing, for a model that was made or opened with `packable=True`: one row of whole samples with `position_ids`
    that restart at each sample, no `attention_mask`, no cache. With `packing`, the lengths of the row's trees
    (packed_llama_llava_llama31.py), and labels, only the loss is computed, no logits; without labels
    the cache receives the row's keys and values, and nothing else is computed. To avoid all waiting of a GPU
    for the host, also pass:
        image_sizes: as a list, not a tensor.
        image_positions: (number of image features,) row positions of the placeholders.
        supervised_positions: ascending row positions i whose label i + 1 is not -100, as a list.
    If the vision tower's features of some images are known (`tile_features`), pass them instead of their tiles:
        image_features: (T, P, D) of all tiles of those images; `pixel_values` has the tiles of the others.
        has_features: for each of `image_sizes`, whether it is one of those images.
    With either, `token_scores` (2, N), given empty, receives the loss of each supervised token in row order and
    whether no token is likelier (1 or 0), outside of the graph.

    Args:
        packable: build the Llama and the head that packed rows need; for other language models without effect.

    Raises:
        ValueError: from `forward`, if the numbers of placeholders and image features differ, a row is packed for
            another model than a packable Llama, arguments are given that packed or supervised-only rows do not take
            (or those of packed rows without `packing`), or such a row has no supervised label and
            `num_items_in_batch` is not given.

    Source: LLaVA-NeXT (Liu et al., 2024); Transformers' models/llava_next.
    """

    config: LlavaLlama31Config

    def __init__(self, config: LlavaLlama31Config, packable: bool = False):
        # skip the parent's __init__, which would build the stock inner model first
        super(LlavaNextForConditionalGeneration, self).__init__(config)
        self.model = LlavaLlama31Model(config, packable)
        head = SupervisedHead if packable else nn.Linear
        self.lm_head = head(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(  # type: ignore[misc]  # stock's arguments, which its keyword arguments name again
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        packing: Packing | None = None,
        image_positions: torch.LongTensor | None = None,
        supervised_positions: Sequence[int] | None = None,
        image_features: torch.Tensor | None = None,
        has_features: Sequence[bool] | None = None,
        supervised_only: bool = False,
        token_scores: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LlavaNextCausalLMOutputWithPast | tuple:
        row: dict[str, Any] = {"input_ids": input_ids, "pixel_values": pixel_values, "image_sizes": image_sizes}
        row |= {"position_ids": position_ids, CACHE_NAME: past_key_values if cache is None else cache}
        of_packing: dict[str, Any] = {"image_positions": image_positions, "image_features": image_features}
        of_packing["has_features"] = has_features
        more: dict[str, Any] = {"attention_mask": attention_mask, "inputs_embeds": inputs_embeds, **kwargs}
        more |= {"vision_feature_layer": vision_feature_layer, "mm_encoder_outputs": mm_encoder_outputs}
        more["vision_feature_select_strategy"] = vision_feature_select_strategy
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        of_logits = {"use_cache": use_cache or None, "logits_to_keep": None if keeps_all else logits_to_keep}
        if packing is not None:
            _refuse("a packed row does not take", {**more, **of_logits})
            return self._forward_packed(
                row | of_packing, packing, labels, supervised_positions, num_items_in_batch, token_scores
            )
        _refuse("only a packed row takes", {**of_packing, "supervised_positions": supervised_positions})
        if supervised_only:
            _refuse("supervised_only does not take", {**of_logits, **{key: more.get(key) for key in _OF_STOCKS_LOSS}})
            return self._forward_supervised({**row, **more}, labels, num_items_in_batch, token_scores)
        _refuse("only packed rows and supervised_only take", {"token_scores": token_scores})
        if num_items_in_batch is not None:
            more["num_items_in_batch"] = num_items_in_batch
        return super().forward(labels=labels, use_cache=use_cache, logits_to_keep=logits_to_keep, **row, **more)

    def _forward_supervised(
        self,
        arguments: dict[str, Any],
        labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
        token_scores: torch.Tensor | None,
    ) -> LlavaNextCausalLMOutputWithPast:
        """Loss and logits at the positions that predict a supervised token.

        Args:
            arguments: what the stock `forward` takes beside labels and what says which results to keep.
        """
        if labels is None:
            raise ValueError("supervised_only needs labels: they say which positions are supervised")
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        supervised = targets != IGNORE_INDEX
        targets = targets[supervised]
        if targets.numel() == 0 and num_items_in_batch is None:
            raise ValueError("no label of the batch is supervised: every label is -100")
        # a training row is read once; a cache would also undo packing
        inner = self.model(**arguments, supervised_only=True, use_cache=False, return_dict=True)
        # not by `logits_to_keep`, which takes a mask since Transformers 5.21 only
        logits = self.lm_head(inner.last_hidden_state[supervised.to(inner.last_hidden_state.device)])
        # at least float32; float64 stays exact
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(exact, targets.to(exact.device), reduction="sum")
        _fill_scores(token_scores, exact, targets.to(exact.device))
        return LlavaNextCausalLMOutputWithPast(
            loss=total / (targets.numel() if num_items_in_batch is None else num_items_in_batch),
            logits=logits,
            # named as this Transformers names them
            **{name: value for name, value in inner.items() if name != "last_hidden_state"},
        )

    def _forward_packed(
        self,
        row: dict[str, Any],
        packing: Packing,
        labels: torch.Tensor | None,
        supervised_positions: Sequence[int] | None,
        num_items_in_batch: torch.Tensor | int | None,
        token_scores: torch.Tensor | None,
    ) -> LlavaNextCausalLMOutputWithPast:
        """Loss of a packed row (1, S), or, without labels, its keys and values in the cache.

        Args:
            row: what the inner model takes beside the packing.
        """
        if labels is None:
            supervised_positions = []
        elif supervised_positions is None:
            supervised_positions = (labels[0, 1:] != IGNORE_INDEX).nonzero()[:, 0].tolist()
        if labels is not None and not supervised_positions and num_items_in_batch is None:
            raise ValueError("no label of the batch is supervised: every label is -100")
        hidden = self.model(
            packing=packing,
            # at least one with labels: every layer runs on every process, because the others' gathers wait for it
            supervised_positions=list(supervised_positions) or ([] if labels is None else [0]),
            **row,
        ).last_hidden_state
        if labels is None:
            return LlavaNextCausalLMOutputWithPast(**{CACHE_NAME: row[CACHE_NAME]})
        scores = token_scores if supervised_positions else None
        loss = self._packed_loss(hidden[0], labels[0], supervised_positions, num_items_in_batch, scores)
        return LlavaNextCausalLMOutputWithPast(loss=loss)

    def _packed_loss(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        supervised: Sequence[int],
        num_items_in_batch: torch.Tensor | int | None,
        token_scores: torch.Tensor | None,
    ) -> torch.Tensor:
        positions = to_device(list(supervised) or [0], labels.device)
        targets = labels.index_select(0, positions + 1).clamp_min(0)
        if isinstance(self.lm_head, SupervisedHead):
            total = self.lm_head(hidden, targets, token_scores)
        else:  # another module has taken its place, as resizing the vocabulary does
            logits = self.lm_head(hidden)
            wide = torch.promote_types(logits.dtype, torch.float32)
            total = F.cross_entropy(logits.to(wide), targets, reduction="sum")
            _fill_scores(token_scores, logits.to(wide), targets)
        if not supervised:
            total = total * 0
        return total / (len(supervised) if num_items_in_batch is None else num_items_in_batch)

    def _supports_mm_encoder_outputs(self) -> bool:
        # under ZeRO-3 image_newline is gathered inside forward only, so generate cannot encode images beforehand
        return not is_deepspeed_zero3_enabled() and cast(Any, super())._supports_mm_encoder_outputs()

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """Stock's; images that are not encoded yet go along with their rows, which stock would mix up."""
        pixels, sizes = model_kwargs.get("pixel_values"), model_kwargs.get("image_sizes")
        if expand_size == 1 or pixels is None or sizes is None:
            return cast(Any, super())._expand_inputs_for_generation(
                expand_size, is_encoder_decoder, input_ids, **model_kwargs
            )
        if input_ids is None or input_ids.numel() == 0:
            raise ValueError("under ZeRO-3 beams and several answers need input_ids, not inputs_embeds")
        order = self.model.images_of_copies(input_ids, sizes, expand_size)
        if pixels.dim() == 4:
            tiles = pixels.split([sum(self.model.feature_layout([size])[1]) for size in _pairs(sizes)])
            pixels = torch.cat([tiles[image] for image in order])
        else:
            pixels = pixels[order]
        del model_kwargs["pixel_values"], model_kwargs["image_sizes"]
        ids, expanded = cast(Any, super())._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return ids, {**expanded, "pixel_values": pixels, "image_sizes": sizes[order]}

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "LlavaLlama31ForConditionalGeneration":
        """Stock `from_pretrained`; also opens llava-hf's old and new key dialects."""
        # conversions are looked up by class: without its own, a renamed class would get random weights
        for name, stocks in ((cls.__name__, "llava_next"), (LlavaLlama31Model.__name__, LlavaNextModel.__name__)):
            conversion = get_checkpoint_conversion_mapping(stocks)
            if conversion is not None and get_checkpoint_conversion_mapping(name) is None:
                register_checkpoint_conversion_mapping(name, conversion)
        return super().from_pretrained(*args, **kwargs)

    def save_pretrained(  # type: ignore[override]  # stock has more arguments, which are keyword arguments here
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        **kwargs: Any,
    ) -> None:
        """Save in native keys with the code files, so that both stock Transformers and this class open the folder."""
        if push_to_hub:
            raise ValueError(
                "push_to_hub is not supported: upload the saved folder with huggingface_hub.upload_folder"
            )
        if kwargs.get("save_original_format"):
            raise ValueError(
                "save_original_format is not supported: folders have native keys, which stock classes open too; "
                "`llava-llama31 export` writes the keys that vLLM and older versions of Transformers read"
            )
        kwargs["save_original_format"] = False  # Trainer restores native keys only (transformers #43701)
        super().save_pretrained(
            save_directory, is_main_process, state_dict=state_dict, max_shard_size=max_shard_size, **kwargs
        )
        if is_main_process:
            for file in (Path(__file__), Path(__file__).with_name("packed_llama_llava_llama31.py")):
                shutil.copyfile(file, Path(save_directory, file.name))


# what changes stock's loss
_OF_STOCKS_LOSS = ("shift_labels", "ignore_index")


def _refuse(why: str, arguments: Mapping[str, Any]) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ValueError(f"{why} {', '.join(given)}")


@torch.no_grad()
def _fill_scores(scores: torch.Tensor | None, logits: torch.Tensor, targets: torch.Tensor) -> None:
    """Loss of each target (N,) under logits (N, V), and whether no logit is above its own, into `scores` (2, N)."""
    if scores is not None:
        scores[0] = F.cross_entropy(logits, targets, reduction="none")
        scores[1] = logits.gather(1, targets[:, None])[:, 0] >= logits.amax(dim=1)


def _pairs(image_sizes: torch.Tensor | Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(int(height), int(width)) for height, width in image_sizes]


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _as_list(layers: int | list[int]) -> list[int]:
    return [layers] if isinstance(layers, int) else list(layers)


def _hidden_state_index(layer: int, num_layers: int) -> int:
    """Index into the num_layers + 1 hidden states; negative values count from the end."""
    return layer if layer >= 0 else num_layers + 1 + layer


__all__ = ["LlavaLlama31ForConditionalGeneration", "LlavaLlama31Model"]
