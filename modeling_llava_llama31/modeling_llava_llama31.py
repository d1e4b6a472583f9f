"""LLaVA-NeXT on Llama 3.1: Transformers' LlavaNext with the same weights and keys, optimized for training.

Differences from `LlavaNextForConditionalGeneration` (transformers/models/llava_next/modeling_llava_next.py):
 - with `labels`, loss and logits are computed at supervised positions only;
 - rows may be packed, and samples about one image share it (packed_llama_llava_llama31.py);
 - a frozen vision tower runs without a graph, and no tower runs layers after the used one;
 - a text-only micro-batch with labels runs a one-tile pass, so that all ranks call the same modules;
 - a wrong number of image placeholders is reported row by row, with both counts.

Shapes: B rows, S positions, N supervised positions, I images, T tiles of all images, P patches of a tile,
V vocabulary, D hidden size, H W height and width of a tile.
"""

import os
import shutil
from collections.abc import Sequence
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
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextCausalLMOutputWithPast,
    LlavaNextModelOutputWithPast,
    LlavaNextMultiModalProjector,
    image_size_to_num_patches,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults

from .configuration_llava_llama31 import LlavaLlama31Config
from .packed_llama_llava_llama31 import LlavaLlama31TextModel, Packing, SupervisedHead


IGNORE_INDEX = -100


class LlavaLlama31Model(LlavaNextModel):
    """Vision tower, projector and Llama without the head; see `LlavaLlama31ForConditionalGeneration`."""

    config: LlavaLlama31Config

    def __init__(self, config: LlavaLlama31Config):
        super(LlavaNextModel, self).__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LlavaNextMultiModalProjector(config)
        self.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size, dtype=self.dtype))
        self.vocab_size = config.text_config.vocab_size
        is_llama = config.text_config.model_type == "llama"
        self.language_model = (LlavaLlama31TextModel if is_llama else AutoModel.from_config)(config.text_config)
        self._layouts: dict[tuple[int, int], torch.Tensor] = {}
        self.post_init()

    @merge_with_config_defaults
    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Projected features of each image, packed row by row with `image_newline`, in `pooler_output`.

        Args:
            pixel_values: (T, 3, H, W), or (I, max tiles, 3, H, W) padded like the stock processor's.
            image_sizes: (I, 2), height and width in pixels.
        """
        num_tiles = [
            image_size_to_num_patches(size, self.config.image_grid_pinpoints, self.config.vision_config.image_size)
            for size in image_sizes
        ]
        if pixel_values.dim() == 5:
            pixel_values = torch.cat([tiles[:n] for tiles, n in zip(pixel_values, num_tiles, strict=True)])
        if pixel_values.dim() != 4 or pixel_values.shape[0] != sum(num_tiles):
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, but {len(image_sizes)} images need "
                f"{sum(num_tiles)} tiles: pass tiles as (T, 3, H, W) or (I, max tiles, 3, H, W)"
            )
        features = self._tower_features(pixel_values, vision_feature_layer)
        if vision_feature_select_strategy == "default":
            features = features[:, 1:]
        features = self.multi_modal_projector(features).split(num_tiles)
        packed, _ = self.pack_image_features(features, image_sizes, vision_feature_select_strategy, self.image_newline)
        return BaseModelOutputWithPooling(pooler_output=packed)

    def _tower_features(self, tiles: torch.Tensor, feature_layer: int | list[int] | None) -> torch.Tensor:
        """Hidden states (T, 1 + P, D) of the chosen layers; the tower runs up to the last of them."""
        assert feature_layer is not None
        tower = self.vision_tower
        trainable = any(parameter.requires_grad for parameter in tower.parameters())
        with torch.set_grad_enabled(trainable and torch.is_grad_enabled()):
            tiles = tiles.to(tower.dtype)
            model_type = self.config.vision_config.model_type
            if model_type == "clip_vision_model":
                hidden = tower.pre_layrnorm(tower.embeddings(tiles))
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
        """Mask (B, S, 1) of the image placeholders; checks their number against the features."""
        if input_ids is None:
            return super().get_placeholder_mask(cast(Any, input_ids), inputs_embeds, image_features)
        mask = input_ids == self.config.image_token_id
        if mask.sum() != image_features.shape[0]:
            per_row = ", ".join(f"row {row}: {count}" for row, count in enumerate(mask.sum(dim=1).tolist()))
            raise ValueError(
                f"the batch has {int(mask.sum())} image placeholders ({per_row}) but the images have "
                f"{image_features.shape[0]} features: expand <image> with the processor, and do not truncate image "
                "tokens"
            )
        return mask.unsqueeze(-1)

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
        sizes = [(int(height), int(width)) for height, width in image_sizes]
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
        patches = layout[where[0]].to(embeds.device, non_blocking=True)
        patch_positions, newline_positions = (
            image_positions.index_select(0, index.to(embeds.device, non_blocking=True)) for index in where
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
        num_patches = (vision.image_size // vision.patch_size) ** 2 + (strategy != "default")
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> LlavaNextModelOutputWithPast | tuple:
        """Like the stock forward; with `packing`, hidden states (1, N, D) of a packed row's `supervised_positions`."""
        if packing is not None:
            assert input_ids is not None
            if image_positions is None:
                image_positions = (input_ids[0] == self.config.image_token_id).nonzero()[:, 0]
            self._check_packing(packing, input_ids.shape[1])
            # called inside forward: ZeRO-3 gathers image_newline only for this module's forward
            embeds = self.packed_embeds(
                input_ids, pixel_values, cast(Any, image_sizes), image_positions, image_features, has_features
            )
            hidden = self.language_model.packed(embeds, position_ids, packing, supervised_positions, past_key_values)
            return LlavaNextModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)
        text_only = input_ids is not None and pixel_values is None and mm_encoder_outputs is None
        # no cache: a row with labels, in training or validation, which all ranks run in parallel
        if text_only and use_cache is False and (_world_size() > 1 or self._trains_projector()):
            input_ids, inputs_embeds = None, self._text_only_embeds(cast(torch.LongTensor, input_ids))
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )


class LlavaLlama31ForConditionalGeneration(LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with a Llama-3.1 language model; weights and keys of `LlavaNextForConditionalGeneration`.

    `forward` takes the stock arguments. With `labels` (B, S) it returns the loss over supervised positions, summed
    and divided by `num_items_in_batch` where given (else by their number), and logits of shape (N, V) at the positions
    that predict a supervised token, in row order; without labels the logits are the stock ones.

    Packing: one row of whole samples with `position_ids` that restart at each sample, no `attention_mask`, no cache.
    With `packing`, the lengths of the row's trees (packed_llama_llava_llama31.py), and labels, only the loss is
    computed, no logits; without labels `past_key_values` receives the row's keys and values, and nothing else is
    computed. To avoid all waiting of a GPU for the host, also pass:
        image_sizes: as a list, not a tensor.
        image_positions: (number of image features,) row positions of the placeholders.
        supervised_positions: ascending row positions i whose label i + 1 is not -100, as a list.
    If the vision tower's features of some images are known (`tile_features`), pass them instead of their tiles:
        image_features: (T, P, D) of all tiles of those images; `pixel_values` has the tiles of the others.
        has_features: for each of `image_sizes`, whether it is one of those images.

    Raises:
        ValueError: from `forward`, if the numbers of placeholders and image features differ, no label is supervised
            and `num_items_in_batch` is not given, a row is packed for a language model other than Llama, or
            `image_features` are given without `packing`.

    Source: LLaVA-NeXT (Liu et al., 2024); Transformers' models/llava_next.
    """

    config: LlavaLlama31Config

    def __init__(self, config: LlavaLlama31Config):
        # skip the parent's __init__, which would build the stock inner model first
        super(LlavaNextForConditionalGeneration, self).__init__(config)
        self.model = LlavaLlama31Model(config)
        self.lm_head = SupervisedHead(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> LlavaNextCausalLMOutputWithPast | tuple:
        if packing is not None:
            row: dict[str, Any] = {"input_ids": input_ids, "pixel_values": pixel_values, "image_sizes": image_sizes}
            row |= {"position_ids": position_ids, "past_key_values": past_key_values, "has_features": has_features}
            row |= {"image_positions": image_positions, "image_features": image_features}
            return self._forward_packed(row, packing, labels, supervised_positions, num_items_in_batch)
        if image_features is not None:
            raise ValueError("image_features are for packed rows only: pass packing, or pixel_values")
        targets = None
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
            logits_to_keep = targets != IGNORE_INDEX
            targets = targets[logits_to_keep]
            if targets.numel() == 0 and num_items_in_batch is None:
                raise ValueError("no label of the batch is supervised: every label is -100")
            use_cache = False  # a training row is read once; a cache would also undo packing
        output = super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        if targets is not None:
            # at least float32; float64 stays exact
            logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
            total = F.cross_entropy(logits, targets.to(logits.device), reduction="sum")
            output.loss = total / (targets.numel() if num_items_in_batch is None else num_items_in_batch)
        return output

    def _forward_packed(
        self,
        row: dict[str, Any],
        packing: Packing,
        labels: torch.Tensor | None,
        supervised_positions: Sequence[int] | None,
        num_items_in_batch: torch.Tensor | int | None,
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
            return LlavaNextCausalLMOutputWithPast(past_key_values=row["past_key_values"])
        loss = self._packed_loss(hidden[0], labels[0], supervised_positions, num_items_in_batch)
        return LlavaNextCausalLMOutputWithPast(loss=loss)

    def _packed_loss(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        supervised: Sequence[int],
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        positions = torch.tensor(list(supervised) or [0], device=labels.device)
        total = self.lm_head(hidden, labels.index_select(0, positions + 1).clamp_min(0))
        if not supervised:
            total = total * 0
        return total / (len(supervised) if num_items_in_batch is None else num_items_in_batch)

    def _supports_mm_encoder_outputs(self) -> bool:
        # otherwise generate would call get_image_features outside forward, where ZeRO-3 has not gathered image_newline
        return False

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "LlavaLlama31ForConditionalGeneration":
        """Stock `from_pretrained`; also opens llava-hf's old and new key dialects."""
        if get_checkpoint_conversion_mapping(cls.__name__) is None:
            # conversions are looked up by class: without its own, a renamed class would get a random lm_head
            register_checkpoint_conversion_mapping(cls.__name__, get_checkpoint_conversion_mapping("llava_next"))
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
        kwargs["save_original_format"] = False  # Trainer restores native keys only (transformers #43701)
        super().save_pretrained(
            save_directory, is_main_process, state_dict=state_dict, max_shard_size=max_shard_size, **kwargs
        )
        if is_main_process:
            for file in (Path(__file__), Path(__file__).with_name("packed_llama_llava_llama31.py")):
                shutil.copyfile(file, Path(save_directory, file.name))


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _as_list(layers: int | list[int]) -> list[int]:
    return [layers] if isinstance(layers, int) else list(layers)


def _hidden_state_index(layer: int, num_layers: int) -> int:
    """Index into the num_layers + 1 hidden states; negative values count from the end."""
    return layer if layer >= 0 else num_layers + 1 + layer


__all__ = ["LlavaLlama31ForConditionalGeneration", "LlavaLlama31Model"]
