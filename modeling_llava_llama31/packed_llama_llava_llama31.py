"""Llama for training on packed rows: no padding, shared prefixes, and no work at positions that nothing reads.

A packed row is a sequence of trees. A tree is a list of lengths: `[n]` is one sample of n tokens; `[n, a, b]` is a
trunk of n tokens (system turn and picture) with two branches, the conversations about it. A branch sees its trunk and
itself; a trunk sees itself alone; positions of a branch go on from its trunk's end. So every sample computes what it
would compute alone, and a trunk is computed once.

Weights, keys and, without packing, the computation are those of Transformers' models/llama.

Shapes: S positions of the row, N supervised positions, Q queries of the last layer, H heads, D hidden size, V
vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import Cache, LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs


Packing = Sequence[Sequence[int]]
Positions = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, (1, S, head size) each

# logits that exist at once: 256 MiB in float32
_MAX_LOGITS = 2**26


class Segment(NamedTuple):
    """Queries that see the same keys: a trunk, and themselves up to the diagonal; row positions, ends excluded."""

    query_begin: int  # first query's place among the queries
    num_queries: int  # the last ones of the segment's own positions
    own: tuple[int, int]
    trunk: tuple[int, int]

    @property
    def num_keys(self) -> int:
        return self.own[1] - self.own[0] + self.trunk[1] - self.trunk[0]


@dataclass
class AttentionPlan:
    """Who sees whom in a packed row; made once, read by every layer.

    Args:
        segments: in the order of their queries.
        queries: (Q,) row positions of the queries; None: all.
        kept: (N,) which queries the layer gives back; None: all.
    """

    segments: list[Segment]
    queries: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    _masks: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    _varlen: tuple[torch.Tensor, ...] | None = None

    def mask(self, segment: Segment, query: torch.Tensor) -> torch.Tensor:
        """Additive (num_queries, num_keys) mask that is causal towards the last key."""
        shape = (segment.num_queries, segment.num_keys)
        if shape not in self._masks:
            hidden = torch.full(shape, float("-inf"), dtype=query.dtype, device=query.device)
            self._masks[shape] = hidden.triu_(1 + shape[1] - shape[0])
        return self._masks[shape]

    def varlen(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Key positions, and cumulative lengths of queries and keys, as varlen kernels take them."""
        if self._varlen is None:
            keys = [torch.cat([torch.arange(*segment.trunk), torch.arange(*segment.own)]) for segment in self.segments]
            num_queries = torch.tensor([0, *(segment.num_queries for segment in self.segments)])
            num_keys = torch.tensor([0, *(segment.num_keys for segment in self.segments)])
            arrays = torch.cat(keys), num_queries.cumsum(0).int(), num_keys.cumsum(0).int()
            self._varlen = tuple(array.to(device, non_blocking=True) for array in arrays)
        return self._varlen


def plan_row(packing: Packing) -> AttentionPlan:
    """Attention of all positions of a packed row."""
    segments, begin = [], 0
    for trunk_length, *branches in packing:
        trunk = (begin, begin + trunk_length)
        segments.append(Segment(begin, trunk_length, trunk, (begin, begin)))
        begin += trunk_length
        for length in branches:
            segments.append(Segment(begin, length, (begin, begin + length), trunk))
            begin += length
    return AttentionPlan(segments)


def plan_last_layer(row: AttentionPlan, supervised: Sequence[int], device: torch.device) -> AttentionPlan:
    """Attention of the last layer: queries from each segment's first supervised position on.

    They end with their segment, so that its last query sees its last key, as varlen kernels want it.

    Args:
        supervised: ascending row positions whose output is read, one at least.
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
    indices = (torch.tensor(values, device=device) for values in (queries, kept))
    return AttentionPlan(segments, *indices)


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan, scaling: float
) -> torch.Tensor:
    """Attention (1, Q, H, head size) of queries (1, H, Q, head size) over the row's keys (1, key heads, S, head size).

    A GPU in half precision runs one varlen kernel over all segments; elsewhere the segments run one by one, since a
    block mask would cost more than padding does.
    """
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        return _varlen_attention(query, key, value, plan, scaling)
    outputs = []
    for segment in plan.segments:
        own, trunk = slice(*segment.own), slice(*segment.trunk)
        keys, values = key[:, :, own], value[:, :, own]
        if trunk.start < trunk.stop:
            keys, values = (torch.cat([x[:, :, trunk], y], dim=2) for x, y in ((key, keys), (value, values)))
        queries = query[:, :, segment.query_begin : segment.query_begin + segment.num_queries]
        is_square = segment.num_queries == segment.num_keys
        mask = None if is_square else plan.mask(segment, query)
        outputs.append(
            F.scaled_dot_product_attention(
                queries, keys, values, mask, is_causal=is_square, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan, scaling: float
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    keys, query_ends, key_ends = plan.varlen(query.device)
    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1).index_select(0, keys),
        value[0].transpose(0, 1).index_select(0, keys),
        query_ends,
        key_ends,
        max(segment.num_queries for segment in plan.segments),
        max(segment.num_keys for segment in plan.segments),
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=True,
    )
    return output[None]


class LlavaLlama31Attention(LlamaAttention):
    """Llama's attention, with a way through for packed rows."""

    def packed(
        self, hidden: torch.Tensor, queries: torch.Tensor, positions: Positions, plan: AttentionPlan
    ) -> torch.Tensor:
        """Attention of `queries` (1, Q, D) over `hidden` (1, S, D), before the output projection's rows are cut."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, x in ((self.q_proj, queries), (self.k_proj, hidden), (self.v_proj, hidden))
        )
        cos, sin = positions
        query_cos, query_sin = (x if plan.queries is None else x[:, plan.queries] for x in positions)
        query, key = _rotate(query, query_cos, query_sin), _rotate(key, cos, sin)
        output = packed_attention(query, key, value, plan, self.scaling).flatten(2)
        return self.o_proj(output if plan.kept is None else output[:, plan.kept])


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return apply_rotary_pos_emb(x, x[:, :0], cos, sin)[0]


class LlavaLlama31RMSNorm(LlamaRMSNorm):
    """Llama's norm, which keeps its input alone for the way back, and gives what autocast would make of its output."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        device = hidden_states.device.type
        dtype = hidden_states.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon, dtype)


class _RMSNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich, 2019), in float32 at least."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
    ) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
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


class LlavaLlama31DecoderLayer(LlamaDecoderLayer):
    """Llama's decoder layer; with a plan it runs a packed row, and only at the positions that the plan keeps."""

    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = LlavaLlama31Attention(config, layer_idx)
        self.input_layernorm = LlavaLlama31RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlavaLlama31RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: Positions | None = None,
        plan: AttentionPlan | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        if plan is None:
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        normed = self.input_layernorm(hidden_states)
        queries = normed
        if plan.queries is not None and plan.kept is not None:
            queries = normed[:, plan.queries]
            hidden_states = hidden_states[:, plan.queries[plan.kept]]
        hidden_states = hidden_states + self.self_attn.packed(normed, queries, position_embeddings, plan)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LlavaLlama31TextModel(LlamaModel):
    """Llama without the head; `packed` is the training path, `forward` the stock one."""

    _no_split_modules = ["LlavaLlama31DecoderLayer"]

    def __init__(self, config: LlamaConfig):
        # not the parent's: it would build the stock layers first
        super(LlamaModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([LlavaLlama31DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlavaLlama31RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def packed(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        packing: Packing,
        supervised: Sequence[int],
    ) -> torch.Tensor:
        """Normed hidden states (1, N, D) of a packed row at its supervised positions.

        Args:
            inputs_embeds: (1, S, D).
            position_ids: (1, S), restarting at each tree and going on from the trunk in each branch.
            packing: lengths of the trees, S in all.
            supervised: ascending row positions, one at least.
        """
        positions = self.rotary_emb(inputs_embeds, position_ids)
        plan = plan_row(packing)
        last = plan_last_layer(plan, supervised, inputs_embeds.device)
        hidden = inputs_embeds
        for i, layer in enumerate(self.layers):
            is_last = i == len(self.layers) - 1
            hidden = layer(hidden, position_embeddings=positions, plan=last if is_last else plan)
        return self.norm(hidden)


class SupervisedHead(nn.Linear):
    """The language model's head; given targets, it returns their loss without keeping logits."""

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (..., V) of hidden states (..., D); with `targets` (N,), the sum of their cross-entropies."""
        if targets is None:
            return super().forward(hidden)
        assert self.bias is None
        return _LinearCrossEntropy.apply(hidden, self.weight, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of `hidden @ weight.T`, chunk by chunk; gradients are made on the way forward.

    As in Cut Your Losses (Wijmans et al., 2024) and Liger's fused loss: of the logits only one chunk ever exists.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        exact = torch.promote_types(dtype, torch.float32)
        with torch.autocast(device, enabled=False):
            narrow_hidden, narrow_weight = hidden.to(dtype), weight.to(dtype)
            total = torch.zeros((), dtype=exact, device=hidden.device)
            hidden_grad = torch.empty_like(narrow_hidden) if ctx.needs_input_grad[0] else None
            weight_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
            chunk = max(1, _MAX_LOGITS // weight.shape[0])
            for begin in range(0, len(targets), chunk):
                part = slice(begin, begin + chunk)
                logits = (narrow_hidden[part] @ narrow_weight.T).to(exact)
                target = targets[part, None]
                normaliser = logits.logsumexp(dim=-1, keepdim=True)
                counted = (target != -100).to(exact)
                index = target.clamp_min(0)
                total += ((normaliser - logits.gather(1, index)) * counted).sum()
                if hidden_grad is None and weight_grad is None:
                    continue
                grad = logits.sub_(normaliser).exp_()
                grad.scatter_add_(1, index, -counted)
                grad = grad.mul_(counted).to(dtype)
                if hidden_grad is not None:
                    torch.mm(grad, narrow_weight, out=hidden_grad[part])
                if weight_grad is not None:
                    weight_grad += grad.T @ narrow_hidden[part]
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.hidden_dtype = hidden.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad.to(ctx.hidden_dtype).mul_(grad),
            None if weight_grad is None else weight_grad.mul_(grad.to(weight_grad.dtype)),
            None,
        )


__all__ = ["LlavaLlama31TextModel", "SupervisedHead"]
