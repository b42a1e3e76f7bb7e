"""Native core attention over packed documents: rotary embedding, context parallelism, then causal attention
that never crosses a document.

On the host, documents of like length become padded batches for torch's fused attention; on CUDA, the
variable-length flash kernel of `torch.nn.attention.varlen` reads them where they lie.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor, distributed

from models.layers.packed_documents import PackedDocuments, PaddedPlan
from models.layers.rope import Rope, rotate
from models.layers.sinks import padded_sink_attention, varlen_sink_attention


class _TakeRows(torch.autograd.Function):
    """Rows by index where every row that matters is taken once: the gradient is a gather, not a scatter."""

    @staticmethod
    def forward(ctx, states: Tensor, rows: Tensor, back: Tensor, missing: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, missing)
        return states.index_select(0, rows)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        back, missing = ctx.saved_tensors
        gradient = gradient.index_select(0, back)
        if missing is not None:
            gradient.index_fill_(0, missing, 0)
        return gradient, None, None, None


class _ReturnRows(torch.autograd.Function):
    """The way back from padded batches to packed tokens; padding receives no gradient."""

    @staticmethod
    def forward(ctx, padded: Tensor, back: Tensor, missing: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, missing)
        ctx.rows = padded.shape[0]
        packed = padded.index_select(0, back)
        if missing is not None:
            packed.index_fill_(0, missing, 0)
        return packed

    @staticmethod
    def backward(ctx, gradient: Tensor):
        back, missing = ctx.saved_tensors
        padded = gradient.new_zeros((ctx.rows, *gradient.shape[1:]))
        if missing is None:
            padded.index_copy_(0, back, gradient)
        else:
            kept = torch.ones(back.shape[0], dtype=torch.bool, device=back.device)
            kept[missing] = False
            padded.index_copy_(0, back[kept], gradient[kept])
        return padded, None, None


class _GatherSequence(torch.autograd.Function):
    """All ranks' tokens, rank after rank; the gradient is reduce-scattered."""

    @staticmethod
    def forward(ctx, states: Tensor, group) -> Tensor:
        ctx.group = group
        gathered = states.new_empty((states.shape[0] * group.size(), *states.shape[1:]))
        distributed.all_gather_into_tensor(gathered, states.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx, gradient: Tensor):
        own = gradient.new_empty((gradient.shape[0] // ctx.group.size(), *gradient.shape[1:]))
        distributed.reduce_scatter_tensor(own, gradient.contiguous(), group=ctx.group)
        return own, None


def padded_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: PaddedPlan, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """Attention by padded batches. query [local tokens, heads, dim]; key, value [gathered tokens, groups, dim].

    sinks: [heads], logits that only the softmax's denominator sees. Returns [local tokens, heads, dim]; tokens of
    padding documents get zeros.
    """
    if not plan.groups:  # nothing but padding: zeros that still carry (zero) gradients
        unused = key.sum() + value.sum() + (sinks.sum() if sinks is not None else 0.0)
        return query * 0.0 + unused * 0.0
    rows = query if plan.in_place else _TakeRows.apply(query, plan.queries, plan.back, plan.unattended)
    if plan.in_place:
        keys, values = key, value
    elif plan.keys is plan.queries:
        keys = _TakeRows.apply(key, plan.keys, plan.back, plan.unattended)
        values = _TakeRows.apply(value, plan.keys, plan.back, plan.unattended)
    else:
        keys, values = key.index_select(0, plan.keys), value.index_select(0, plan.keys)
    outputs, first_query, first_key = [], 0, 0
    for group in plan.groups:
        query_rows, key_rows = group.batch * group.queries, group.batch * group.keys
        batch = rows[first_query : first_query + query_rows].unflatten(0, (group.batch, group.queries))
        span = slice(first_key, first_key + key_rows)
        states = (
            batch.transpose(1, 2),
            keys[span].unflatten(0, (group.batch, group.keys)).transpose(1, 2),
            values[span].unflatten(0, (group.batch, group.keys)).transpose(1, 2),
        )
        if sinks is not None:
            output = padded_sink_attention(*states, sinks, group.mask, scale)
        else:
            output = F.scaled_dot_product_attention(
                *states,
                attn_mask=group.mask,
                is_causal=group.mask is None,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
        first_query, first_key = first_query + query_rows, first_key + key_rows
    padded = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return padded if plan.in_place else _ReturnRows.apply(padded, plan.back, plan.unattended)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedDocuments,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention by the variable-length flash kernel (CUDA, fp16 or bf16). Shapes as in `padded_attention`."""
    if packed.prefixes is None:
        boundaries, longest = packed.cu_seqlens_q, packed.max_seqlen_q
        bounds: tuple[Any, ...] = (boundaries, boundaries, longest, longest)
    else:
        plan = packed.prefixes
        key, value = key.index_select(0, plan.rows), value.index_select(0, plan.rows)
        bounds = (plan.query_bounds, plan.key_bounds, plan.longest_query, plan.longest_key)
    sides = (-1 if window is None else window - 1, 0)
    if sinks is not None:
        return varlen_sink_attention(query, key, value, sinks, bounds, scale, sides)
    kernel, names_gqa = _varlen_kernel()
    options = {"enable_gqa": query.shape[1] != key.shape[1]} if names_gqa else {}
    return kernel(query, key, value, *bounds, scale=scale, window_size=sides, **options)


@cache
def _varlen_kernel() -> tuple[Callable[..., Any], bool]:
    """torch's kernel, and whether it wants to be told of grouped queries (torch 2.11 does not)."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


class PackedAttention(MegatronModule):
    """Core attention of the native backend; takes the place of megatron-core's DotProductAttention.

    Heads are split over tensor-parallel ranks by the surrounding SelfAttention; keys and values are
    all-gathered over context-parallel ranks, queries stay where they are.
    """

    def __init__(self, config, layer_number: int, *, ropes: tuple[Rope, ...], pg_collection=None, **_unused):
        super().__init__(config=config)
        self.rope = ropes[layer_number - 1]
        self.cp_group = pg_collection.cp
        self.tp_group = pg_collection.tp
        self.scale = config.softmax_scale or config.kv_channels**-0.5
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // self.tp_group.size()
            offset = torch.zeros(heads, dtype=config.params_dtype, device=torch.cuda.current_device())
            self.softmax_offset = torch.nn.Parameter(offset)
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

    def forward(self, query, key, value, attention_mask=None, *, packed_seq_params: PackedDocuments, **_unused):
        """query [tokens, heads, dim], key and value [tokens, groups, dim], packed; returns query's shape."""
        tables = packed_seq_params.tables(self.rope, query.dtype)
        query, key = rotate(query, *tables), rotate(key, *tables)
        if self.cp_group.size() > 1:
            gathered = _GatherSequence.apply(torch.stack((key, value), dim=1), self.cp_group)
            key, value = gathered.unbind(1)
        if packed_seq_params.padded is None:
            return varlen_attention(query, key, value, packed_seq_params, self.scale, self.window, self.softmax_offset)
        plan = packed_seq_params.plan(self.window)
        return padded_attention(query, key, value, plan, self.scale, self.softmax_offset)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """The sinks, split over tensor-parallel ranks by head."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
