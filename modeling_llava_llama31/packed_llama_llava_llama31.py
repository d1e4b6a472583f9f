"""Llama for training on packed rows: no padding, shared prefixes, and no work at positions that are never read.

A packed row is a sequence of trees. A tree is a list of lengths: `[n]` is one sample of n tokens; `[n, a, b]` is a
trunk of n tokens (system turn and image) with two branches, the conversations about it. A branch sees its trunk and
itself; a trunk sees only itself; a branch's positions continue from its trunk's end. So every sample computes what it
would compute alone, and each trunk is computed once.

Weights and keys, and without packing also the computation, are those of Transformers' models/llama.

Shapes: S positions of the row, N supervised positions, Q queries of the last layer, H heads, D hidden size, V
vocabulary.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import Cache, LlamaConfig, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs


logger = logging.getLogger(__name__)

T = TypeVar("T")
Packing = Sequence[Sequence[int]]
Positions = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, (1, S, head size) each
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # queries, keys, values


# on a CPU: queries per block, also in types whose segments are padded, and the number of keys up to which blocks beat
# the fused kernel
_BLOCK_QUERIES, _FILLED_BLOCK_QUERIES = 128, 256
_MAX_BLOCK_KEYS = 1024
# types that a GPU's varlen kernel takes, the first NVIDIA GPUs with it (Ampere), and a row that shows whether it is
# right: a trunk with two branches and a sample alone; rounding is within a share of the largest number
_VARLEN_DTYPES = (torch.float16, torch.bfloat16)
_VARLEN_CAPABILITY = (8, 0)
_VARLEN_ROW = ((37, 5, 19), (3,))
_VARLEN_TOLERANCE = 2**-5
# types whose kernels a CPU builds for every new shape (0.7 ms), and the multiple that segments are then padded to
_FILLED_DTYPES = (torch.bfloat16,)
_SEGMENT_MULTIPLE = 32
# what stock calls a cache: since Transformers 5.24 `cache`; ours takes both names
CACHE_NAME = "cache" if "cache" in {part.name for part in fields(BaseModelOutputWithPast)} else "past_key_values"
# Transformers' names of the activation
_SILU = ("silu", "swish")


class HeadSizes(NamedTuple):
    """How a device computes the head's loss.

    Args:
        rows: positions whose logits exist at once: few enough for little memory, enough for efficient products.
        softmax_rows: of those, how many are processed in float32 at once: few enough for a CPU's cache, enough to
            occupy all of a GPU.
        wide_sums: gradients of the weights add up in float32 over the chunks, whatever their type.
    """

    rows: int
    softmax_rows: int
    wide_sums: bool


_HEAD_SIZES, _HEAD_SIZES_CUDA = HeadSizes(256, 64, False), HeadSizes(2048, 512, True)


class Segment(NamedTuple):
    """Queries that see the same keys: those of a trunk, and their own segment's up to the diagonal.

    Args:
        own: (begin, end) of the segment in the row, end exclusive.
        trunk: (begin, end) of its trunk, end exclusive; empty for a trunk itself.
    """

    query_begin: int  # index of the first query among all queries
    num_queries: int  # the last of the segment's own positions
    own: tuple[int, int]
    trunk: tuple[int, int]

    @property
    def num_keys(self) -> int:
        return self.own[1] - self.own[0] + self.trunk[1] - self.trunk[0]

    @property
    def queries(self) -> slice:
        return slice(self.query_begin, self.query_begin + self.num_queries)

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """The keys or values (..., S, head size) that the segment sees."""
        own = x[..., slice(*self.own), :]
        if self.trunk[0] == self.trunk[1]:
            return own
        return torch.cat([x[..., slice(*self.trunk), :], own], dim=-2)

    def add(self, x: torch.Tensor, part: torch.Tensor) -> None:
        """Add gradients of the segment's keys to (..., S, head size)."""
        length = self.trunk[1] - self.trunk[0]
        x[..., slice(*self.own), :] += part[..., length:, :]
        if length:
            x[..., slice(*self.trunk), :] += part[..., :length, :]

    def blocks(self, size: int) -> list["Segment"]:
        """The segment cut into equal blocks of queries, each of which sees only the keys up to its last query."""
        size = -(-self.num_queries // -(-self.num_queries // size))
        after = self.own[1] - self.num_queries
        return [
            Segment(
                self.query_begin + begin,
                min(size, self.num_queries - begin),
                (self.own[0], after + min(begin + size, self.num_queries)),
                self.trunk,
            )
            for begin in range(0, self.num_queries, size)
        ]


class Aligned(NamedTuple):
    """Segments with keys and queries padded to a multiple, and the indices to pad and unpad.

    A segment's padding comes after its keys, where none of its own queries sees it, and around its queries.

    Args:
        segments: in places of the padded row.
        queries, keys: (Q',), (S',) the source index of each padded place.
        query_places: (Q,) the padded place of each query.
        key_places, key_positions: (N,) padded place and source position of each key that any query sees.
    """

    segments: list[Segment]
    queries: torch.Tensor
    keys: torch.Tensor
    query_places: torch.Tensor
    key_places: torch.Tensor
    key_positions: torch.Tensor


@dataclass
class AttentionPlan:
    """Which positions see which in a packed row; made once, used by every layer.

    Args:
        segments: in the order of their queries.
        queries: (Q,) row positions of the queries; None: all.
        kept: (N,) queries whose output the layer returns; None: all.
        varlen: in half precision, a GPU may run its varlen kernel.
    """

    segments: list[Segment]
    queries: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    varlen: bool = False
    _masks: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)
    _lengths: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor] | None = None
    _aligned: Aligned | None = None

    def aligned(self, multiple: int) -> Aligned:
        """The segments on a CPU, each padded to a multiple; a trunk is padded where it is its own segment."""
        if self._aligned is not None:
            return self._aligned
        segments: list[Segment] = []
        queries: list[int] = []
        keys: list[int] = []
        query_places: list[int] = []
        places: dict[tuple[int, int], int] = {}  # of the keys between two positions
        for segment in self.segments:
            for span in (segment.own, segment.trunk):
                if span not in places:
                    places[span] = len(keys)
                    keys += [*range(*span), *[span[0]] * (-(span[1] - span[0]) % multiple)]
            length = segment.own[1] - segment.own[0]
            before, behind = (length - segment.num_queries) % multiple, -length % multiple
            begin = len(queries) + before
            query_places += range(begin, begin + segment.num_queries)
            own, trunk = places[segment.own], places[segment.trunk]
            segments.append(
                Segment(
                    len(queries),
                    before + segment.num_queries + behind,
                    (own, own + length + behind),
                    (trunk, trunk + segment.trunk[1] - segment.trunk[0]),
                )
            )
            filling, real = segment.query_begin, range(segment.query_begin, segment.query_begin + segment.num_queries)
            queries += [*[filling] * before, *real, *[filling] * behind]
        key_places = [place + i for span, place in places.items() for i in range(span[1] - span[0])]
        key_positions = [position for span in places for position in range(*span)]
        indices = map(torch.tensor, (queries, keys, query_places, key_places, key_positions))
        self._aligned = Aligned(segments, *indices)
        return self._aligned

    def mask(self, segment: Segment, query: torch.Tensor) -> torch.Tensor:
        """Additive (num_queries, num_keys) mask, causal and aligned at the last key."""
        shape = (segment.num_queries, segment.num_keys)
        if shape not in self._masks:
            hidden = torch.full(shape, float("-inf"), dtype=query.dtype, device=query.device)
            self._masks[shape] = hidden.triu_(1 + shape[1] - shape[0])
        return self._masks[shape]

    def diagonal(self, num_queries: int, query: torch.Tensor) -> torch.Tensor:
        """Additive mask of `num_queries` queries over the keys of their own positions."""
        square = Segment(0, num_queries, (0, num_queries), (0, 0))
        return self.mask(square, query)

    def lengths(
        self, num_positions: int, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Key positions, and cumulative lengths of queries and keys, in the form that varlen kernels take.

        Positions are None where the keys are those of the row in its order: nothing is shared or left out.
        """
        if self._lengths is None:
            keys = [torch.cat([torch.arange(*segment.trunk), torch.arange(*segment.own)]) for segment in self.segments]
            num_queries = torch.tensor([0, *(segment.num_queries for segment in self.segments)])
            num_keys = torch.tensor([0, *(segment.num_keys for segment in self.segments)])
            positions, is_row = torch.cat(keys), int(num_keys.sum()) == num_positions
            is_row = is_row and torch.equal(positions, torch.arange(num_positions))
            query_ends, key_ends = (to_device(x.cumsum(0).int(), device) for x in (num_queries, num_keys))
            self._lengths = None if is_row else to_device(positions, device), query_ends, key_ends
        return self._lengths


def to_device(values: torch.Tensor | Sequence[int], device: torch.device) -> torch.Tensor:
    """A host's tensor or integers on the device, without a wait: a copy from pageable memory would make one."""
    tensor = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=torch.long)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def plan_row(packing: Packing, *, varlen: bool = False) -> AttentionPlan:
    """Attention of all positions of a packed row."""
    segments, begin = [], 0
    for trunk_length, *branches in packing:
        trunk = (begin, begin + trunk_length)
        segments.append(Segment(begin, trunk_length, trunk, (begin, begin)))
        begin += trunk_length
        for length in branches:
            segments.append(Segment(begin, length, (begin, begin + length), trunk))
            begin += length
    return AttentionPlan(segments, varlen=varlen)


def plan_last_layer(row: AttentionPlan, supervised: Sequence[int], device: torch.device) -> AttentionPlan:
    """Attention of the last layer: queries from each segment's first supervised position on.

    Queries end with their segment, so that its last query sees its last key, as varlen kernels require.

    Args:
        supervised: ascending row positions whose output is read.
    """
    segments: list[Segment] = []
    queries: list[int] = []
    kept: list[int] = []
    positions = iter(supervised)
    position = next(positions, None)
    for segment in row.segments:
        end = segment.own[1]
        if position is None or position >= end:
            continue
        offset = len(queries) - position
        segments.append(Segment(len(queries), end - position, segment.own, segment.trunk))
        queries.extend(range(position, end))
        while position is not None and position < end:
            kept.append(offset + position)
            position = next(positions, None)
    return AttentionPlan(segments, to_device(queries, device), to_device(kept, device), row.varlen)


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan, scaling: float
) -> torch.Tensor:
    """Attention (1, Q, H, head size) of queries (1, H, Q, head size) over the row's keys (1, key heads, S, head size).

    A GPU in half precision runs one varlen kernel over all segments, where the plan says that it may. Otherwise
    segments run one by one, since a mask over the whole row would cost more than padding.
    """
    if plan.varlen and query.is_cuda and query.dtype in _VARLEN_DTYPES:
        return _varlen_attention(query, key, value, plan, scaling)
    if query.device.type == "cpu" and max(segment.num_keys for segment in plan.segments) <= _MAX_BLOCK_KEYS:
        return _BlockAttention.apply(query, key, value, plan, scaling)
    return _segment_attention(query, key, value, plan, scaling)


def _segment_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan, scaling: float
) -> torch.Tensor:
    outputs, in_groups = [], _takes_groups(query.device)
    if not in_groups:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    for segment in plan.segments:
        is_square = segment.num_queries == segment.num_keys
        mask = None if is_square else plan.mask(segment, query)
        queries, keys, values = query[:, :, segment.queries], segment.keys(key), segment.keys(value)
        outputs.append(
            F.scaled_dot_product_attention(
                queries, keys, values, mask, is_causal=is_square, scale=scaling, enable_gqa=in_groups
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _takes_groups(device: torch.device) -> bool:
    """Whether attention by segments may have fewer heads of keys than of queries.

    On GPUs FlashAttention alone is sure to take them, which knows no float32 and needs Ampere; without it PyTorch
    would compute by its plain kernel, with all scores in memory at once.
    """
    return device.type == "cpu"


class _BlockAttention(torch.autograd.Function):
    """Attention in blocks of queries, as plain matrix products.

    In bfloat16 a CPU's fused kernel is no faster than in float32, while its matrix products are several times faster;
    and gradients add up in place, whereas each slice would fill a tensor as large as the whole row.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: AttentionPlan,
        scaling: float,
    ) -> torch.Tensor:
        groups = query.shape[1] // key.shape[1]
        aligned = plan.aligned(_SEGMENT_MULTIPLE) if query.dtype in _FILLED_DTYPES else None
        ctx.num_positions, ctx.aligned, ctx.groups, ctx.scaling = key.shape[2], aligned, groups, scaling
        # (positions, heads, head size), the projections' layout: rows are gathered and scattered whole
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        if aligned is not None:
            query = query.index_select(0, aligned.queries)
            key, value = key.index_select(0, aligned.keys), value.index_select(0, aligned.keys)
        segments, size = plan.segments, _BLOCK_QUERIES
        if aligned is not None:
            segments, size = aligned.segments, _FILLED_BLOCK_QUERIES
        ctx.blocks = [block for segment in segments for block in segment.blocks(size)]
        output = query.new_empty(query.shape)
        query, key, value = (query * scaling).transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        weights = []
        for block in ctx.blocks:
            scores = _bmm(_fold(query[:, block.queries], groups), block.keys(key).transpose(1, 2))
            _unfold(scores, groups)[..., -block.num_queries :] += plan.diagonal(block.num_queries, query)
            weights.append(torch.softmax(scores, dim=-1, out=scores))
            output[block.queries] = _unfold(_bmm(scores, block.keys(value)), groups).transpose(0, 1)
        if aligned is not None:
            output = output.index_select(0, aligned.query_places)
        ctx.save_for_backward(query, key, value, output, *weights)
        return output[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, *weights = ctx.saved_tensors
        aligned, groups = ctx.aligned, ctx.groups
        grad = grad[0]
        along = (grad * output).sum(-1, keepdim=True)
        if aligned is not None:  # padding has no gradient
            grad, along = (
                x.new_zeros(query.shape[1], *x.shape[1:]).index_copy_(0, aligned.query_places, x)
                for x in (grad, along)
            )
        query_grad = torch.empty_like(query)
        key_grad, value_grad = torch.zeros_like(key), torch.zeros_like(value)
        for block, weight in zip(ctx.blocks, weights, strict=True):
            grads, mean = (_fold(x[block.queries].transpose(0, 1), groups) for x in (grad, along))
            block.add(value_grad, _bmm(weight.transpose(1, 2), grads))
            scores = _bmm(grads, block.keys(value).transpose(1, 2))
            scores.sub_(mean).mul_(weight)
            query_grad[:, block.queries] = _unfold(_bmm(scores, block.keys(key)), groups)
            block.add(key_grad, _bmm(scores.transpose(1, 2), _fold(query[:, block.queries], groups)))
        query_grad, key_grad, value_grad = (x.transpose(0, 1) for x in (query_grad, key_grad, value_grad))
        if aligned is not None:
            query_grad = query_grad.index_select(0, aligned.query_places)
            key_grad, value_grad = (
                x.new_zeros(ctx.num_positions, *x.shape[1:]).index_copy_(
                    0, aligned.key_positions, x.index_select(0, aligned.key_places)
                )
                for x in (key_grad, value_grad)
            )
        query_grad, key_grad, value_grad = (
            x.transpose(0, 1)[None] for x in (query_grad.mul_(ctx.scaling), key_grad, value_grad)
        )
        return query_grad, key_grad, value_grad, None, None


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`torch.bmm`, which gives each of a CPU's threads whole matrices: what is left over keeps all threads busy."""
    num_even = len(a) - len(a) % torch.get_num_threads()
    if num_even in (0, len(a)) or a.dtype in _FILLED_DTYPES:
        return torch.bmm(a, b)
    product = a.new_empty(len(a), a.shape[1], b.shape[2])
    torch.bmm(a[:num_even], b[:num_even], out=product[:num_even])
    for i in range(num_even, len(a)):
        torch.mm(a[i], b[i], out=product[i])
    return product


def _fold(x: torch.Tensor, groups: int) -> torch.Tensor:
    """(H, Q, size) -> (key heads, groups x Q, size): stacks the query heads of each key head."""
    return x.unflatten(0, (-1, groups)).flatten(1, 2)


def _unfold(x: torch.Tensor, groups: int) -> torch.Tensor:
    return x.unflatten(1, (groups, -1)).flatten(0, 1)


def _varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan, scaling: float
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    positions, query_ends, key_ends = plan.lengths(key.shape[2], query.device)
    # not x[0], whose gradient is a larger tensor of zeros with this one in it
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if positions is not None:
        key, value = key.index_select(0, positions), value.index_select(0, positions)
    output = varlen_attn(
        query,
        key,
        value,
        query_ends,
        key_ends,
        max(segment.num_queries for segment in plan.segments),
        max(segment.num_keys for segment in plan.segments),
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=True,
    )
    assert isinstance(output, torch.Tensor)  # nothing more was asked for
    return output[None]


def varlen_fault(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the varlen kernel of this device and this PyTorch can't be used; None: it can. Waits for the device.

    The kernel is compared with PyTorch's scaled dot product, forward and backward: on some builds it refuses, and on
    some it aligns masks otherwise or returns NaN (pytorch #173469).
    """
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < _VARLEN_CAPABILITY:
            return (
                f"FlashAttention needs a GPU of compute capability 8.0 (Ampere) or newer; this one has {major}.{minor}"
            )
    plan, length = plan_row(_VARLEN_ROW), sum(map(sum, _VARLEN_ROW))
    num_heads = config.num_attention_heads
    num_key_heads, size = config.num_key_value_heads or num_heads, config.head_dim or config.hidden_size // num_heads
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, n, length, size, generator=generator) for n in (num_heads, num_key_heads, num_key_heads)]
    results = []
    try:
        for attend in (_varlen_attention, _segment_attention):
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
                inputs = [x.to(device, dtype).requires_grad_() for x in drawn]
                output = attend(inputs[0], inputs[1], inputs[2], plan, size**-0.5)
                results.append((output, *torch.autograd.grad(output.float().square().sum(), inputs)))
    except (ImportError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    names = ("output", "gradient of queries", "gradient of keys", "gradient of values")
    for name, mine, theirs in zip(names, *results, strict=True):
        difference = ((mine.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()
        if not difference <= _VARLEN_TOLERANCE:  # NaN neither
            return f"its {name} is off by {difference:.2g} of the largest number"
    return None


class LlavaLlama31Attention(LlamaAttention):
    """Llama's attention, with a path for packed rows."""

    def project(self, hidden: torch.Tensor, positions: Positions, queries: torch.Tensor | None) -> Heads:
        """Rotated queries (1, H, Q, head size), rotated keys and values (1, key heads, S, head size) of (1, S, D)."""
        query = self._heads(self.q_proj(hidden if queries is None else hidden.index_select(1, queries)))
        cos, sin = (x if queries is None else x.index_select(1, queries) for x in positions)
        return _Rotary.apply(query, cos, sin), *self.keys_and_values(hidden, positions)

    def keys_and_values(self, hidden: torch.Tensor, positions: Positions) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated keys and values (1, key heads, S, head size) of (1, S, D)."""
        return _Rotary.apply(self._heads(self.k_proj(hidden)), *positions), self._heads(self.v_proj(hidden))

    def cached(self, hidden: torch.Tensor, positions: Positions, visible: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Input of the output projection (B, Q, H x head size) of new positions (B, Q, D) that see cached ones.

        The query heads of a key head stand one below the other, as more queries: stock repeats keys and values for
        each of them, at every step.

        Args:
            visible: (B, 1, Q, K) keys that each query sees.
        """
        query, key, value = self.project(hidden, positions, None)
        key, value = cache.update(key, value, self.layer_idx)
        num_key_heads, num_queries = key.shape[1], query.shape[2]
        folded = query.unflatten(1, (num_key_heads, -1)).flatten(2, 3)
        visible = visible.repeat(1, 1, self.num_key_value_groups, 1)
        output = F.scaled_dot_product_attention(folded, key, value, visible, scale=self.scaling)
        return output.unflatten(2, (-1, num_queries)).flatten(1, 2).transpose(1, 2).flatten(2)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def packed(self, heads: Heads, plan: AttentionPlan, cache: Cache | None = None) -> torch.Tensor:
        """Input of the output projection (1, N, H x head size); `cache` stores keys and values."""
        query, key, value = heads
        if cache is not None:
            cache.update(key, value, self.layer_idx)
        output = packed_attention(query, key, value, plan, self.scaling).flatten(2)
        return output if plan.kept is None else output.index_select(1, plan.kept)


class _Rotary(torch.autograd.Function):
    """Rotary embedding of x (1, H, Q, head size) by `cos` and `sin` (1, Q, head size), pairing halves like Llama.

    Products use the wider type, the output has x's type; the backward pass is the opposite rotation.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        cos, sin = cos[:, None, :, :half], sin[:, None, :, :half]
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    output = torch.empty_like(x)
    output_first, output_second = output.chunk(2, dim=-1)
    output_first.copy_((first * cos).sub_(second * sin))
    output_second.copy_((second * cos).add_(first * sin))
    return output


class LlavaLlama31RMSNorm(LlamaRMSNorm):
    """Llama's norm; saves only its input for the backward pass, and returns the type that autocast would cast to.

    With `arithmetic` it returns (normed, scale), with `added` as well (sum of both, its norm, scale).
    """

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        added: torch.Tensor | None = None,
        arithmetic: "Arithmetic | None" = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        device = hidden_states.device.type
        dtype = hidden_states.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        if arithmetic is None:
            return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon, dtype)
        others = self.weight, self.variance_epsilon, dtype, arithmetic
        if added is None:
            return _FusedNorm.apply(hidden_states, *others)
        return _FusedSumNorm.apply(hidden_states, added, *others)


class _RMSNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich, 2019), in at least float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x.to(scale.dtype) * scale
        grad = grad.to(scale.dtype)
        along = grad * normed
        weight_grad = along.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, weight_grad, None, None
        mean = torch.mv(along.flatten(0, -2), weight.to(scale.dtype)).view(scale.shape) / x.shape[-1]
        x_grad = (grad * weight).addcmul_(normed, mean, value=-1).mul_(scale)
        return x_grad.to(x.dtype), weight_grad, None, None


# Arithmetic between the matrix products, in functions that torch.compile makes one kernel of, two where a gradient is
# summed over the positions. Each is that of Llama's modules; compiled, intermediates are not rounded.


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """RMS norm of x (..., D) in `dtype`, and 1 / RMS (..., 1)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.square().mean(-1, keepdim=True).add(eps).rsqrt()
    return (wide * scale).to(x.dtype).mul(weight).to(dtype), scale


def sum_norm(
    x: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum, its RMS norm, and 1 / RMS."""
    total = x + added
    return total, *norm(total, weight, eps, dtype)


def norm_again(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The norm of x whose 1 / RMS is known."""
    return (x.to(scale.dtype) * scale).to(x.dtype).mul(weight).to(dtype)


def norm_gradient(
    grad: torch.Tensor,
    passed: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    trains_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of a norm's input and weight; `passed` is another gradient of the input, to add."""
    wide, normed = grad.to(scale.dtype), x.to(scale.dtype) * scale
    weight_grad = (wide * normed).flatten(0, -2).sum(0).to(weight.dtype) if trains_weight else None
    weighted = wide * weight
    x_grad = (weighted - normed * (weighted * normed).mean(-1, keepdim=True)) * scale
    return (x_grad if passed is None else x_grad + passed).to(x.dtype), weight_grad


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (1, Q, H, head size) rotated by `cos` and `sin` (1, Q, head size), pairing halves."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = cos[:, :, None, :half], sin[:, :, None, :half]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def rotate_back(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The opposite rotation."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = cos[:, :, None, :half], sin[:, :, None, :half]
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1).to(x.dtype)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) x up (Shazeer, 2020)."""
    return F.silu(gate) * up


def gated_gradient(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up."""
    wide, exact = gate.to(torch.promote_types(gate.dtype, torch.float32)), grad.dtype
    share = torch.sigmoid(wide)
    slope = share * (1 + wide * (1 - share))
    return (grad * up * slope).to(exact), (grad * wide * share).to(exact)


class Arithmetic(NamedTuple):
    """The functions of these names; compiled or plain.

    Tensors come to them detached: compiled code is then the same for parameters of every engine and for activations.
    """

    norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    sum_norm: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    norm_again: Callable[..., torch.Tensor]
    norm_gradient: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
    rotate: Callable[..., torch.Tensor]
    rotate_back: Callable[..., torch.Tensor]
    gated: Callable[..., torch.Tensor]
    gated_gradient: Callable[..., tuple[torch.Tensor, torch.Tensor]]


PLAIN = Arithmetic(norm, sum_norm, norm_again, norm_gradient, rotate, rotate_back, gated, gated_gradient)


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype, arithmetic: Arithmetic
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, scale = arithmetic.norm(x.detach(), weight.detach(), eps, dtype)
        ctx.save_for_backward(x, weight, scale)
        ctx.arithmetic = arithmetic
        ctx.mark_non_differentiable(scale)
        return normed, scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        trains_weight = ctx.needs_input_grad[1]
        x_grad, weight_grad = ctx.arithmetic.norm_gradient(
            grad, None, x.detach(), weight.detach(), scale, trains_weight
        )
        return x_grad, weight_grad, None, None, None


class _FusedSumNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        added: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        dtype: torch.dtype,
        arithmetic: Arithmetic,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        total, normed, scale = arithmetic.sum_norm(x.detach(), added.detach(), weight.detach(), eps, dtype)
        ctx.save_for_backward(total, weight, scale)
        ctx.dtypes, ctx.arithmetic = (x.dtype, added.dtype), arithmetic
        ctx.mark_non_differentiable(scale)
        return total, normed, scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, passed: torch.Tensor, grad: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        total, weight, scale = ctx.saved_tensors
        trains_weight = ctx.needs_input_grad[2]
        x_grad, weight_grad = ctx.arithmetic.norm_gradient(
            grad, passed, total.detach(), weight.detach(), scale, trains_weight
        )
        return *(x_grad.to(dtype) for dtype in ctx.dtypes), weight_grad, None, None, None


class _FusedRotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, arithmetic: Arithmetic
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.arithmetic = arithmetic
        return arithmetic.rotate(x.detach(), cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.arithmetic.rotate_back(grad, *ctx.saved_tensors), None, None, None


class _FusedGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, arithmetic: Arithmetic) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.arithmetic = arithmetic
        return arithmetic.gated(gate.detach(), up.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        return *ctx.arithmetic.gated_gradient(grad, gate.detach(), up.detach()), None


class _View(NamedTuple):
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Remade:
    """Hooks by which autograd makes a tensor again in the backward pass, once for all that read it, and keeps none.

    Args:
        tensor: it is contiguous, or of the layout that `make` returns.
        make: returns its numbers again.
    """

    def __init__(self, tensor: torch.Tensor, make: Callable[[], torch.Tensor]):
        self._storage, self._make = tensor.untyped_storage()._cdata, make
        self._num_saved = self._num_read = 0
        self._made: torch.Tensor | None = None

    def pack(self, x: torch.Tensor) -> torch.Tensor | _View:
        if x.untyped_storage()._cdata != self._storage:
            return x
        self._num_saved += 1
        return _View(tuple(x.shape), x.stride(), int(x.storage_offset()))

    def unpack(self, packed: torch.Tensor | _View) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        if self._made is None:
            with torch.no_grad():
                self._made = self._make()
        x = self._made.as_strided(packed.size, packed.stride, packed.offset)
        self._num_read = (self._num_read + 1) % self._num_saved
        if not self._num_read:
            self._made = None
        return x


def _without_keeping(tensor: torch.Tensor, make: Callable[[], torch.Tensor] | None, compute: Callable[[], T]) -> T:
    """What is computed from a tensor that is not kept for the backward pass, if there is a way to make it again."""
    if make is None:
        return compute()
    remade = _Remade(tensor, make)
    with torch.autograd.graph.saved_tensors_hooks(remade.pack, remade.unpack):
        return compute()


class LlavaLlama31DecoderLayer(LlamaDecoderLayer):
    """Llama's decoder layer; with a plan it runs a packed row, only at the positions that the plan keeps."""

    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn: LlavaLlama31Attention = LlavaLlama31Attention(config, layer_idx)
        self.input_layernorm = LlavaLlama31RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlavaLlama31RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.token_wise = EAGER

    def forward(  # type: ignore[misc]  # stock's arguments, which its keyword arguments name again
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: Positions | None = None,
        plan: AttentionPlan | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        cache = past_key_values if cache is None else cache
        if plan is None and cache is not None and position_embeddings is not None and self._folds(attention_mask):
            assert attention_mask is not None
            normed = self.input_layernorm(hidden_states)
            attended = self.self_attn.cached(normed, position_embeddings, attention_mask, cache)
            return _after_attention(self, hidden_states, attended)
        if plan is None:
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **{CACHE_NAME: cache},
                **kwargs,
            )
        if not plan.segments:  # the output is never read: only keys and values are needed
            assert position_embeddings is not None and cache is not None
            normed = self.input_layernorm(hidden_states)
            keys_and_values = self.self_attn.keys_and_values(normed, position_embeddings)
            cache.update(*keys_and_values, self.self_attn.layer_idx)
            return hidden_states[:, :0]
        assert position_embeddings is not None
        before, after = self.token_wise if self.training else EAGER
        heads = before(self, hidden_states, position_embeddings, plan.queries)
        attended = self.self_attn.packed(heads, plan, cache)
        if plan.queries is not None and plan.kept is not None:
            hidden_states = hidden_states.index_select(1, plan.queries.index_select(0, plan.kept))
        return after(self, hidden_states, attended)

    def _folds(self, attention_mask: torch.Tensor | None) -> bool:
        """Whether stock would repeat keys and values: several heads share them, and a mask says what they see."""
        attention = self.self_attn
        if self.training or attention_mask is None or attention.num_key_value_groups == 1:
            return False
        is_of_all_heads = attention_mask.dim() == 4 and attention_mask.shape[1] == 1
        return (
            attention.config._attn_implementation == "sdpa" and attention_mask.dtype == torch.bool and is_of_all_heads
        )


class TokenWise(NamedTuple):
    """The position-wise parts of a layer, before and after its attention; these can be compiled."""

    before: Callable[[LlavaLlama31DecoderLayer, torch.Tensor, Positions, torch.Tensor | None], Heads]
    after: Callable[[LlavaLlama31DecoderLayer, torch.Tensor, torch.Tensor], torch.Tensor]


def _before_attention(
    layer: LlavaLlama31DecoderLayer, hidden: torch.Tensor, positions: Positions, queries: torch.Tensor | None
) -> Heads:
    return layer.self_attn.project(layer.input_layernorm(hidden), positions, queries)


def _after_attention(layer: LlavaLlama31DecoderLayer, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    hidden = hidden + layer.self_attn.o_proj(attended)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


EAGER = TokenWise(_before_attention, _after_attention)


@dataclass(frozen=True)
class Fused:
    """The same with an `Arithmetic`.

    Args:
        remakes: keep the attention's and the MLP's products, and compute the norms and the MLP's gated product, which
            those are made from or make, again in the backward pass. No matrix product is repeated.
    """

    arithmetic: Arithmetic
    remakes: bool = False

    def before(
        self, layer: LlavaLlama31DecoderLayer, hidden: torch.Tensor, positions: Positions, queries: torch.Tensor | None
    ) -> Heads:
        attention = layer.self_attn
        normed, scale = layer.input_layernorm(hidden, arithmetic=self.arithmetic)
        read = normed if queries is None else normed.index_select(1, queries)
        projected = _without_keeping(
            normed,
            self._again(layer.input_layernorm, hidden, scale, normed.dtype),
            lambda: (attention.q_proj(read), attention.k_proj(normed), attention.v_proj(normed)),
        )
        query, key, value = (x.unflatten(-1, (-1, attention.head_dim)) for x in projected)
        angles = positions if queries is None else [x.index_select(1, queries) for x in positions]
        query = _FusedRotary.apply(query, *angles, self.arithmetic)
        key = _FusedRotary.apply(key, *positions, self.arithmetic)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def after(self, layer: LlavaLlama31DecoderLayer, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        mlp, norm = layer.mlp, layer.post_attention_layernorm
        added = layer.self_attn.o_proj(attended)
        hidden, normed, scale = norm(hidden, added=added, arithmetic=self.arithmetic)
        again = self._again(norm, hidden, scale, normed.dtype)
        gate, up = _without_keeping(normed, again, lambda: (mlp.gate_proj(normed), mlp.up_proj(normed)))
        product = _FusedGate.apply(gate, up, self.arithmetic)
        make = partial(self.arithmetic.gated, gate.detach(), up.detach()) if self.remakes else None
        return hidden + _without_keeping(product, make, lambda: mlp.down_proj(product))

    def _again(
        self, norm: LlamaRMSNorm, x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
    ) -> Callable[[], torch.Tensor] | None:
        if not self.remakes:
            return None
        # a copy: ZeRO-3 takes a weight away between its module's forward and backward pass
        return partial(self.arithmetic.norm_again, x.detach(), norm.weight.detach().clone(), scale, dtype)


class LlavaLlama31TextModel(LlamaModel):
    """Llama without the head; `packed` is the training path, `forward` the stock one."""

    _no_split_modules = ["LlavaLlama31DecoderLayer"]

    def __init__(self, config: LlamaConfig):
        # skip the parent's __init__, which would build the stock layers first
        super(LlamaModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([LlavaLlama31DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlavaLlama31RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.uses_varlen: dict[torch.dtype, bool] = {}  # on a GPU, by type; `check_attention` fills it
        self.post_init()

    def check_attention(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether packed rows use a GPU's varlen kernel; asked and tried once, with a warning if they don't."""
        if device.type != "cuda" or dtype not in _VARLEN_DTYPES:
            return False
        if dtype not in self.uses_varlen:
            fault = varlen_fault(self.config, device, dtype)
            self.uses_varlen[dtype] = fault is None
            if fault is not None and not (torch.distributed.is_initialized() and torch.distributed.get_rank()):
                logger.warning("packed rows are read segment by segment, which is slower: varlen attention: %s", fault)
        return self.uses_varlen[dtype]

    def compile_token_wise(self) -> None:
        """Compile the layers' norms, projections and MLPs for training on packed rows, once for all row lengths.

        Attention is left out: its plan consists of Python lists, so every row would trigger a new compilation.
        """
        compiled = TokenWise(
            torch.compile(EAGER.before, dynamic=True),
            torch.compile(EAGER.after, dynamic=True),
        )
        self._use(compiled)

    def fuse(self, compiled: Callable[[Any], Any], *, remakes: bool = False) -> None:
        """Train on packed rows with fused norms, rotary embeddings and gated products (`Arithmetic`).

        Args:
            compiled: makes a fused function of a plain one, as torch.compile does.
            remakes: as `Fused` has it.

        Raises:
            ValueError: the MLPs have another activation than SiLU.
        """
        if self.config.hidden_act not in _SILU:
            raise ValueError(f"only MLPs with SiLU are fused, not with {self.config.hidden_act}")
        fused = Fused(Arithmetic(*map(compiled, PLAIN)), remakes)
        self._use(TokenWise(fused.before, fused.after))

    def _use(self, token_wise: TokenWise) -> None:
        for layer in self.layers:
            assert isinstance(layer, LlavaLlama31DecoderLayer)
            layer.token_wise = token_wise

    def packed(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        packing: Packing,
        supervised: Sequence[int],
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Normed hidden states (1, N, D) of a packed row at its supervised positions.

        Args:
            inputs_embeds: (1, S, D).
            position_ids: (1, S), restarting at each tree and continuing from the trunk in each branch.
            packing: lengths of the trees, S in all.
            supervised: ascending row positions.
            cache: stores the keys and values of all positions.
        """
        positions = self.rotary_emb(inputs_embeds, position_ids)
        device = inputs_embeds.device
        narrow = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if narrow else inputs_embeds.dtype
        plan = plan_row(packing, varlen=self.check_attention(device, dtype))
        last = plan_last_layer(plan, supervised, inputs_embeds.device)
        hidden = inputs_embeds
        for i, layer in enumerate(self.layers):
            is_last = i == len(self.layers) - 1
            hidden = layer(hidden, position_embeddings=positions, plan=last if is_last else plan, cache=cache)
        return self.norm(hidden)


class SupervisedHead(nn.Linear):
    """The language model's head; given targets, it returns their loss without storing the logits."""

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor | None = None, scores: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (..., V) of hidden states (..., D); with `targets` (N,), the sum of their cross-entropies.

        `scores` (2, N) receives each target's own, and whether no logit is above the target's.
        """
        if targets is None:
            return super().forward(hidden)
        assert self.bias is None
        return _LinearCrossEntropy.apply(hidden, self.weight, targets, scores)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of `hidden @ weight.T`, chunk by chunk; gradients are computed in the forward pass.

    As in Cut Your Losses (Wijmans et al., 2024) and Liger's fused loss, only one chunk of logits exists at a time.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scores: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.hidden_dtype, device = hidden.dtype, hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        exact = torch.promote_types(dtype, torch.float32)
        hidden_grad = torch.empty_like(hidden, dtype=dtype) if ctx.needs_input_grad[0] else None
        weight_grad = None
        with torch.autocast(device, enabled=False):
            hidden, narrow_weight = hidden.to(dtype), weight.to(dtype)
            total = torch.zeros((), dtype=exact, device=hidden.device)
            sizes = _HEAD_SIZES_CUDA if device == "cuda" else _HEAD_SIZES
            rows = min(len(targets), sizes.rows)
            summed = weight.dtype
            if sizes.wide_sums and rows < len(targets):
                summed = torch.promote_types(summed, torch.float32)
            # overwritten chunk by chunk: allocating memory of this size costs as much as the products
            logits = hidden.new_empty(rows, weight.shape[0])
            room = hidden.new_empty(0 if dtype == exact else sizes.softmax_rows, weight.shape[0], dtype=exact)
            for begin in range(0, len(targets), rows):
                part = slice(begin, min(begin + rows, len(targets)))
                chunk = slice(0, part.stop - begin)
                torch.mm(hidden[part], narrow_weight.T, out=logits[chunk])
                own = None if scores is None else scores[:, part]
                total += _cross_entropy(logits[chunk], room, targets[part], sizes.softmax_rows, own)
                if hidden_grad is not None:
                    torch.mm(logits[chunk], narrow_weight, out=hidden_grad[part])
                if ctx.needs_input_grad[1]:
                    gradient, inputs = logits[chunk].T, hidden[part]
                    if weight_grad is None:
                        weight_grad = (gradient @ inputs).to(summed)
                    elif summed == dtype:
                        weight_grad.addmm_(gradient, inputs)
                    else:
                        weight_grad.add_(gradient @ inputs)
        ctx.save_for_backward(hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad.to(ctx.hidden_dtype).mul_(grad),
            None if weight_grad is None else weight_grad.mul_(grad.to(weight_grad.dtype)),
            None,
            None,
        )


def _cross_entropy(
    logits: torch.Tensor,
    room: torch.Tensor,
    targets: torch.Tensor,
    num_rows: int,
    scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of the cross-entropies of logits (N, V), so many rows at once; overwrites the logits with their gradient.

    `room` (R, V), of the type to compute in, is scratch space; it may be empty if the logits have that type. `scores`
    (2, N) receives each cross-entropy, and whether no logit is above the target's.
    """
    total = room.new_zeros(())
    for begin in range(0, len(logits), num_rows):
        rows = slice(begin, begin + num_rows)
        part, index = logits[rows], targets[rows, None]
        wide = room[: len(part)] if len(room) else part
        wanted, largest = (x.to(wide.dtype) for x in (part.gather(1, index), part.amax(dim=1, keepdim=True)))
        wide.copy_(part)
        torch.softmax(wide, dim=1, out=wide)
        # log-sum-exp, computed from the largest probability, which cannot underflow
        normaliser = largest - wide.amax(dim=1, keepdim=True).log()
        # not scatter_add_, for which CUDA has no deterministic kernel
        part.copy_(wide.scatter_(1, index, wide.gather(1, index) - 1))
        losses = normaliser - wanted
        total += losses.sum()
        if scores is not None:
            scores[0, rows], scores[1, rows] = losses[:, 0], (wanted >= largest)[:, 0]
    return total


__all__ = ["LlavaLlama31TextModel", "SupervisedHead"]
