"""Predicts how many floating-point operations a row needs, part by part, for MFU and HFU.

Matrix products count, at two operations (a multiplication and an addition) per element, like in PyTorch's
`torch.utils.flop_counter` and Megatron-LM (Narayanan et al., 2021, arXiv:2104.04473); norms, activations, rotary
embeddings, softmax and the optimizer do not. "Needed" operations are those of an exact implementation without any
waste, so padding, a full attention mask or logits that are never read do not raise the figure (Chowdhery et al., 2022,
arXiv:2204.02311, appendix B, call it MFU). docs/speed.md explains the formula in words.

This file does not import torch: `llava-llama31 plan` needs only a configuration.

Shapes in comments: n positions, i and o width of a linear layer's input and output.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Protocol, get_args

from llava_llama31.trainer.recipes.schema import LORA_TARGETS, ModuleGroup, Recomputed, Stage


Packing = Sequence[Sequence[int]]  # a row's trees: [trunk, branch, ...] in positions; a plain sample is [length]


class Config(Protocol):
    """A configuration object of Transformers."""

    def to_dict(self) -> dict[str, Any]: ...


def attention_pairs(packing: Packing) -> int:
    """Query-key pairs of causal attention in a packed row: a branch sees its trunk and itself, a trunk only itself."""
    pairs = 0
    for trunk, *branches in packing:
        pairs += trunk * (trunk + 1) // 2
        pairs += sum(trunk * branch + branch * (branch + 1) // 2 for branch in branches)
    return pairs


def last_layer_attention(
    packing: Packing, supervised: Sequence[int], *, to_segment_end: bool = False
) -> tuple[int, int]:
    """Queries and query-key pairs of a last layer that runs only where its output is read.

    Args:
        packing: lengths of the row's trees.
        supervised: ascending row positions whose output is read.
        to_segment_end: count the queries from each segment's (trunk's or branch's) first supervised position to its
            end, as kernels with a causal mask run them; otherwise only the supervised ones, which are needed.

    Raises:
        ValueError: a position is outside the row, or positions do not ascend.
    """
    num_queries = num_pairs = seen = begin = 0
    for trunk, *branches in packing:
        for length, num_before in [(trunk, 0), *((branch, trunk) for branch in branches)]:
            own = []
            while seen < len(supervised) and begin <= supervised[seen] < begin + length:
                own.append(supervised[seen] - begin)
                seen += 1
            if own != sorted(set(own)):
                raise ValueError(f"supervised positions do not ascend: {own} from position {begin} on")
            queries = range(own[0], length) if own and to_segment_end else own
            num_queries += len(queries)
            num_pairs += sum(num_before + query + 1 for query in queries)
            begin += length
    if seen < len(supervised):
        raise ValueError(f"supervised position {supervised[seen]} is out of order, or not in a row of {begin}")
    return num_queries, num_pairs


@dataclass(frozen=True)
class Work:
    """The work that a row or a micro-batch requires of the model; all are counts.

    Autograd treats a row as a whole: a row with an image passes gradients on everywhere, one without perhaps nowhere.
    So a step's FLOPs are the sum of its rows' FLOPs, not the FLOPs of its summed work.

    Args:
        num_tiles: tiles that the vision tower reads.
        num_image_features: patch features that pass the projector (no newlines).
        num_tokens: positions of the language model, including image features.
        num_attention_pairs: query-key pairs of a layer's attention.
        num_supervised_tokens: positions at which the head runs.
        num_last_layer_queries: positions whose query the last layer computes; it computes keys and values for all.
        num_last_layer_pairs: query-key pairs of the last layer's attention.
        num_last_layer_outputs: positions at which the last layer's output projection and MLP run.
    """

    num_tiles: int
    num_image_features: int
    num_tokens: int
    num_attention_pairs: int
    num_supervised_tokens: int
    num_last_layer_queries: int
    num_last_layer_pairs: int
    num_last_layer_outputs: int

    @classmethod
    def pruned(
        cls,
        packing: Packing,
        supervised: Sequence[int],
        *,
        num_tiles: int = 0,
        num_image_features: int = 0,
        to_segment_end: bool = False,
    ) -> "Work":
        """A packed row whose last layer runs only where its output is read; arguments as in `last_layer_attention`."""
        queries, pairs = last_layer_attention(packing, supervised, to_segment_end=to_segment_end)
        return cls(
            num_tiles=num_tiles,
            num_image_features=num_image_features,
            num_tokens=sum(map(sum, packing)),
            num_attention_pairs=attention_pairs(packing),
            num_supervised_tokens=len(supervised),
            num_last_layer_queries=queries,
            num_last_layer_pairs=pairs,
            num_last_layer_outputs=len(supervised),
        )

    @classmethod
    def unpruned(
        cls, packing: Packing, num_supervised_tokens: int, *, num_tiles: int = 0, num_image_features: int = 0
    ) -> "Work":
        """Rows whose last layer runs at every position, like stock Llama's."""
        num_tokens, pairs = sum(map(sum, packing)), attention_pairs(packing)
        return cls(
            num_tiles=num_tiles,
            num_image_features=num_image_features,
            num_tokens=num_tokens,
            num_attention_pairs=pairs,
            num_supervised_tokens=num_supervised_tokens,
            num_last_layer_queries=num_tokens,
            num_last_layer_pairs=pairs,
            num_last_layer_outputs=num_tokens,
        )


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one part; `recompute` is activation checkpointing's second forward."""

    forward: int = 0
    backward: int = 0
    recompute: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recompute + other.recompute)

    @property
    def needed(self) -> int:
        """The operations that MFU counts."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        """The operations that HFU counts."""
        return self.needed + self.recompute


@dataclass(frozen=True)
class FlopsByPart:
    """Floating-point operations of the model's parts.

    Args:
        vision_tower: patch embedding and the layers up to the one that is read, their attention included.
        multi_modal_projector: its two linear layers.
        language_model: linear layers of the decoder, adapters included.
        attention: the decoder's products of queries with keys and of weights with values.
        lm_head: the head.
    """

    vision_tower: Flops = Flops()
    multi_modal_projector: Flops = Flops()
    language_model: Flops = Flops()
    attention: Flops = Flops()
    lm_head: Flops = Flops()

    def __add__(self, other: "FlopsByPart") -> "FlopsByPart":
        return FlopsByPart(
            self.vision_tower + other.vision_tower,
            self.multi_modal_projector + other.multi_modal_projector,
            self.language_model + other.language_model,
            self.attention + other.attention,
            self.lm_head + other.lm_head,
        )

    @property
    def total(self) -> Flops:
        return _sum((self.vision_tower, self.multi_modal_projector, self.language_model, self.attention, self.lm_head))


@dataclass(frozen=True)
class TowerShape:
    """Sizes of a CLIP, SigLIP or DINOv2 tower.

    Args:
        patch_numbers: channels times pixels of a patch.
        num_patches: of a tile.
        num_positions: of a layer: the patches, and the class token where the tower has one.
        num_layers: layers that run: up to the last one whose output is read.
        num_feature_layers: layers whose output is read.
        mlp: (i, o) of the linear layers in an MLP, in order.
        saved_by_mlp: tensors as wide as the MLP that a layer saves for the backward pass.
        saves_output: a layer saves the output of its last linear layer for the backward pass.
    """

    hidden_size: int
    patch_numbers: int
    num_patches: int
    num_positions: int
    num_layers: int
    num_feature_layers: int
    mlp: tuple[tuple[int, int], ...]
    saved_by_mlp: int
    saves_output: bool

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(i, o) of a layer's linear layers, attention's four first."""
        return [(self.hidden_size, self.hidden_size)] * 4 + list(self.mlp)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a LlavaNext model on Llama that determine its FLOPs; create it with `ModelShape.of`.

    Args:
        hidden_size: of the language model, like all that follow.
        intermediate_size: width of its MLP.
        num_layers: of the decoder.
        num_heads: query heads.
    """

    tower: TowerShape
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @property
    def projector_linears(self) -> list[tuple[int, int]]:
        """(i, o) of the projector's two linear layers."""
        features = self.tower.hidden_size * self.tower.num_feature_layers
        return [(features, self.hidden_size), (self.hidden_size, self.hidden_size)]

    @classmethod
    def of(cls, config: Config | Mapping[str, Any]) -> "ModelShape":
        """Sizes from a LlavaNext configuration, or from the complete mapping of its `to_dict`.

        Raises:
            ValueError: a part has an unsupported type, or a mapping lacks a field (a configuration file may leave
                defaults out).
        """
        fields = config if isinstance(config, Mapping) else config.to_dict()
        try:
            text = fields["text_config"]
            if text["model_type"] not in ("llama", "mistral"):
                raise ValueError(f"FLOPs of a {text['model_type']!r} language model are not known")
            return cls(
                tower=_tower_shape(fields["vision_config"], fields["vision_feature_layer"]),
                hidden_size=text["hidden_size"],
                intermediate_size=text["intermediate_size"],
                num_layers=text["num_hidden_layers"],
                num_heads=text["num_attention_heads"],
                num_key_value_heads=text["num_key_value_heads"],
                head_dim=text["head_dim"] or text["hidden_size"] // text["num_attention_heads"],
                vocab_size=text["vocab_size"],
            )
        except KeyError as error:
            raise ValueError(
                f"the configuration has no {error.args[0]}: pass a complete one, config.to_dict()"
            ) from None


def _tower_shape(vision: Mapping[str, Any], feature_layer: int | Sequence[int]) -> TowerShape:
    hidden, num_layers = vision["hidden_size"], vision["num_hidden_layers"]
    chosen = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    if vision["model_type"] in ("clip_vision_model", "siglip_vision_model"):
        inner = vision["intermediate_size"]
        mlp: tuple[tuple[int, int], ...] = ((hidden, inner), (inner, hidden))
    elif vision["model_type"] == "dinov2":
        inner = int(hidden * vision["mlp_ratio"])
        mlp = ((hidden, inner), (inner, hidden))
        if vision["use_swiglu_ffn"]:
            inner = (int(inner * 2 / 3) + 7) // 8 * 8
            mlp = ((hidden, inner), (hidden, inner), (inner, hidden))
    else:
        raise ValueError(f"FLOPs of a {vision['model_type']!r} vision tower are not known")
    num_patches = (vision["image_size"] // vision["patch_size"]) ** 2
    return TowerShape(
        hidden_size=hidden,
        patch_numbers=vision["num_channels"] * vision["patch_size"] ** 2,
        num_patches=num_patches,
        num_positions=num_patches + (vision["model_type"] != "siglip_vision_model"),
        num_layers=max(layer if layer >= 0 else num_layers + 1 + layer for layer in chosen),
        num_feature_layers=len(chosen),
        mlp=mlp,
        # the activation's input and output; quick_gelu, a product, and SwiGLU also save a factor
        saved_by_mlp=2 if str(vision["hidden_act"]).startswith("gelu") and len(mlp) == 2 else 3,
        saves_output=vision["model_type"] == "dinov2",  # its learned scale multiplies that output
    )


def adapter_ranks(stage: Stage) -> dict[str, Any]:
    """The arguments of `needed_flops` that say what adapters a stage trains."""
    lora, ranks = stage.lora, dict[str, Any]()
    if lora is None:
        return ranks
    if "language_model" in stage.adapted:
        ranks |= {"lora_rank": lora.r, "lora_targets": tuple(lora.targets)}
    if lora.vision_tower is not None:
        ranks["tower_rank"] = lora.vision_tower.r
    if lora.multi_modal_projector is not None:
        ranks["projector_rank"] = lora.multi_modal_projector.r
    return ranks


def needed_flops(
    model: ModelShape,
    work: Work,
    trainable: Collection[str],
    *,
    checkpointing: Recomputed = 0,
    lora_rank: int = 0,
    lora_targets: Collection[str] = LORA_TARGETS,
    tower_rank: int = 0,
    projector_rank: int = 0,
) -> FlopsByPart:
    """FLOPs of one forward and backward pass over a row or micro-batch.

    A linear layer's weight gradient counts if its weights are trained, its input gradient if anything before it is
    trained; so the head, and whatever runs after a trained weight, pass gradients on although frozen.

    Args:
        trainable: module groups that are trained.
        checkpointing: every n-th transformer layer of tower and decoder, from the first, runs its forward pass twice
            if it has a backward pass; 1 (or True): all, 0: none; `selective`: none of the decoder, all of the tower.
        lora_rank: of adapters trained in place of the language model's weights, without dropout and DoRA's norms.
        lora_targets: linear layers of the decoder with an adapter.
        tower_rank, projector_rank: likewise, of adapters on all linear layers of the tower or the projector.

    Raises:
        ValueError: an unknown module group or adapter target.
    """
    unknown = sorted({*trainable} - {*get_args(ModuleGroup)}) + sorted({*lora_targets} - {*LORA_TARGETS})
    if unknown:
        raise ValueError(f"neither a module group nor a linear layer of the decoder: {', '.join(unknown)}")
    trains_tower, trains_projector = "vision_tower" in trainable, "multi_modal_projector" in trainable
    trains_text = "language_model" in trainable
    trains_weights = trains_text and not lora_rank
    has_images = work.num_image_features > 0
    decoder = _Decoder(
        model,
        trains_weights=trains_weights,
        lora_rank=lora_rank if trains_text else 0,
        lora_targets=frozenset(lora_targets),
        checkpointing=0 if checkpointing == "selective" else checkpointing,
    )
    # the embeddings belong to the language model: if trained, the first layer passes gradients on
    linears, attention, has_grad = decoder.count(
        work, has_grad=trains_weights or (has_images and (trains_tower or trains_projector))
    )
    of_tower = 1 if checkpointing == "selective" else checkpointing
    return FlopsByPart(
        vision_tower=_tower(model.tower, work.num_tiles, trains=trains_tower, rank=tower_rank, checkpointing=of_tower),
        multi_modal_projector=_projector(
            model, work.num_image_features, trains=trains_projector, trains_tower=trains_tower, rank=projector_rank
        ),
        language_model=linears,
        attention=attention,
        lm_head=_linear(
            work.num_supervised_tokens,
            (model.hidden_size, model.vocab_size),
            input_grad=has_grad,
            weight_grad=trains_weights,
        ),
    )


def mfu(flops: Flops, *, seconds: float, peak: float, num_devices: int = 1) -> float:
    """Model FLOPs utilisation: needed operations as a share of what `num_devices` of `peak` FLOP/s each could do."""
    return flops.needed / (seconds * peak * num_devices)


def hfu(flops: Flops, *, seconds: float, peak: float, num_devices: int = 1) -> float:
    """Hardware FLOPs utilisation: like `mfu`, plus activation checkpointing's recomputation."""
    return flops.hardware / (seconds * peak * num_devices)


def _sum(parts: Iterable[Flops]) -> Flops:
    return reduce(add, parts, Flops())


def _linear(n: int, shape: tuple[int, int], *, input_grad: bool, weight_grad: bool) -> Flops:
    """(n, i) times (i, o); each gradient is a product of the same size."""
    once = 2 * n * shape[0] * shape[1]
    return Flops(once, once * (input_grad + weight_grad))


def _low_rank(n: int, shape: tuple[int, int], rank: int, *, input_grad: bool) -> Flops:
    """An adapter's two products: (n, i) times (i, rank), and that times (rank, o)."""
    down = _linear(n, (shape[0], rank), input_grad=input_grad, weight_grad=True)
    return down + _linear(n, (rank, shape[1]), input_grad=True, weight_grad=True)


def _projector(model: ModelShape, n: int, *, trains: bool, trains_tower: bool, rank: int) -> Flops:
    total = Flops()
    for shape, input_grad in zip(model.projector_linears, (trains_tower, trains or trains_tower), strict=True):
        total += _linear(n, shape, input_grad=input_grad, weight_grad=trains and not rank)
        if trains and rank:
            total += _low_rank(n, shape, rank, input_grad=input_grad)
    return total


def _tower(tower: TowerShape, num_tiles: int, *, trains: bool, rank: int, checkpointing: int) -> Flops:
    hidden, trains_weights = tower.hidden_size, trains and not rank
    # pixels need no gradient
    embedding = _linear(
        num_tiles * tower.num_patches, (tower.patch_numbers, hidden), input_grad=False, weight_grad=trains_weights
    )
    total = embedding
    for i in range(tower.num_layers):
        has_grad = trains_weights or (trains and i > 0)
        layer, last_product = _tower_layer(tower, num_tiles, trains=trains, rank=rank, has_grad=has_grad)
        total += layer
        if trains and _is_repeated(i, checkpointing):
            total += Flops(recompute=layer.forward - (0 if tower.saves_output else last_product))
    return total


def _tower_layer(tower: TowerShape, num_tiles: int, *, trains: bool, rank: int, has_grad: bool) -> tuple[Flops, int]:
    """A layer, and its last product's forward pass; `has_grad` is the input's."""
    hidden, n = tower.hidden_size, num_tiles * tower.num_positions
    trains_weights = trains and not rank
    # queries, keys and values read the input; what comes after them depends on what is trained in them
    grads = [has_grad] * 3 + [trains] * (1 + len(tower.mlp))
    linears = [
        _linear(n, shape, input_grad=grad, weight_grad=trains_weights)
        for shape, grad in zip(tower.linears, grads, strict=True)
    ]
    last_product = linears[-1].forward
    if trains and rank:
        linears += [
            _low_rank(n, shape, rank, input_grad=grad) for shape, grad in zip(tower.linears, grads, strict=True)
        ]
        last_product = 2 * n * rank * tower.linears[-1][1]
    scores = 2 * 2 * num_tiles * tower.num_positions**2 * hidden
    return _sum([*linears, Flops(scores, 2 * scores * trains)]), last_product


def _is_repeated(layer: int, checkpointing: int) -> bool:
    return checkpointing > 0 and layer % checkpointing == 0


@dataclass(frozen=True)
class _Decoder:
    """Llama's layers; what is trained in them."""

    model: ModelShape
    trains_weights: bool
    lora_rank: int
    lora_targets: frozenset[str]
    checkpointing: int

    def count(self, work: Work, *, has_grad: bool) -> tuple[Flops, Flops, bool]:
        """Linear layers, attention, and whether the output has a gradient; `has_grad` is the input's."""
        linears, attention = Flops(), Flops()
        everywhere = (work.num_tokens, work.num_attention_pairs, work.num_tokens)
        last = (work.num_last_layer_queries, work.num_last_layer_pairs, work.num_last_layer_outputs)
        for i in range(self.model.num_layers):
            queries, pairs, outputs = last if i == self.model.num_layers - 1 else everywhere
            repeats = _is_repeated(i, self.checkpointing)
            layer, scores, has_grad = self._layer(work.num_tokens, queries, pairs, outputs, has_grad, repeats)
            linears, attention = linears + layer, attention + scores
        return linears, attention, has_grad

    def _layer(
        self, num_tokens: int, num_queries: int, num_pairs: int, num_outputs: int, has_grad: bool, repeats: bool
    ) -> tuple[Flops, Flops, bool]:
        model = self.model
        hidden, inner = model.hidden_size, model.intermediate_size
        wide, narrow = (heads * model.head_dim for heads in (model.num_heads, model.num_key_value_heads))
        q_grad, k_grad, v_grad = (has_grad or self._trains(name) for name in ("q_proj", "k_proj", "v_proj"))
        mixed_grad = q_grad or k_grad or v_grad
        middle_grad = has_grad or mixed_grad or self._trains("o_proj")
        gated_grad = middle_grad or self._trains("gate_proj") or self._trains("up_proj")
        out_grad = gated_grad or self._trains("down_proj")
        down = self._linear("down_proj", num_outputs, (inner, hidden), gated_grad)
        linears = _sum(
            [
                self._linear("q_proj", num_queries, (hidden, wide), has_grad),
                self._linear("k_proj", num_tokens, (hidden, narrow), has_grad),
                self._linear("v_proj", num_tokens, (hidden, narrow), has_grad),
                self._linear("o_proj", num_outputs, (wide, hidden), mixed_grad),
                self._linear("gate_proj", num_outputs, (hidden, inner), middle_grad),
                self._linear("up_proj", num_outputs, (hidden, inner), middle_grad),
                down,
            ]
        )
        # every query head has its pairs, however many key heads there are. Backward: by values; by scores, from there
        # by queries and by keys
        product = 2 * num_pairs * wide
        scores = Flops(2 * product, product * (v_grad + (q_grad or k_grad) + q_grad + k_grad))
        if repeats and out_grad:
            last_product = 2 * num_outputs * self.lora_rank * hidden if self._adapts("down_proj") else down.forward
            # the backward pass reads nothing after the last product's inputs, so its recomputation stops before it
            linears += Flops(recompute=linears.forward - last_product)
            scores += Flops(recompute=scores.forward)
        return linears, scores, out_grad

    def _adapts(self, name: str) -> bool:
        return self.lora_rank > 0 and name in self.lora_targets

    def _trains(self, name: str) -> bool:
        return self.trains_weights or self._adapts(name)

    def _linear(self, name: str, n: int, shape: tuple[int, int], input_grad: bool) -> Flops:
        flops = _linear(n, shape, input_grad=input_grad, weight_grad=self.trains_weights)
        return flops + _low_rank(n, shape, self.lora_rank, input_grad=input_grad) if self._adapts(name) else flops
