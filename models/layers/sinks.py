"""Attention with a learned sink per head: a logit in the softmax's denominator that no value belongs to.

Fused kernels know no sinks, but they give back the logarithm of the denominator. With a sink s it becomes
t = log(exp(lse) + exp(s)), and the output is the kernel's times exp(lse - t). Their backward passes compute the
weights as exp(score - lse) and need the output only for its product with the gradient: given t and the scaled
output in place of lse and the kernel's own, they compute the gradients of attention with sinks.
"""

from __future__ import annotations

import torch
from torch import Tensor

_padded = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_padded_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _with_sink(output: Tensor, denominator: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (output with the sink, logarithm of the denominator with it); `sink` broadcasts against lse."""
    total = torch.logaddexp(denominator, sink.to(denominator.dtype))
    return output * (denominator - total).exp().to(output.dtype)[..., None], total


def _sink_gradient(gradient: Tensor, output: Tensor, total: Tensor, sink: Tensor) -> Tensor:
    """The gradient at every query and head; the caller sums over queries."""
    return -(sink.to(total.dtype) - total).exp() * (gradient.to(total.dtype) * output).sum(-1)


class _PaddedSinks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, mask: Tensor | None, scale: float):
        bias = None
        if mask is not None:
            bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
        ctx.options = {"dropout_p": 0.0, "is_causal": mask is None, "attn_mask": bias, "scale": scale}
        output, denominator = _padded(query, key, value, **ctx.options)
        output, total = _with_sink(output, denominator, sinks[None, :, None])
        ctx.save_for_backward(query, key, value, sinks, output, total)
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor):
        query, key, value, sinks, output, total = ctx.saved_tensors
        states = _padded_backward(gradient, query, key, value, output, total, **ctx.options)
        own = _sink_gradient(gradient, output, total, sinks[None, :, None]).sum((0, 2))
        return *states, own.to(sinks.dtype), None, None


def padded_sink_attention(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Causal attention of padded batches, sinks included: fused on the host, in plain products on a GPU (for fp32).

    query [batch, heads, queries, dim]; key, value [batch, groups, keys, dim]; sinks [heads]; mask, True where
    attended, broadcasts to [batch, 1, queries, keys], None for plain causality. Returns query's shape.
    """
    attention = _PaddedSinks.apply if query.is_cpu else plain_sink_attention
    return attention(query, key, value, sinks, mask, scale)


def plain_sink_attention(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """The same as a softmax over the scores and one column more, all held in memory: [batch, heads, queries, keys]."""
    heads_per_group = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(heads_per_group, 1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if mask is None:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    column = sinks[None, :, None, None].expand(*scores.shape[:3], 1).to(scores.dtype)
    return torch.cat((scores, column), dim=-1).softmax(-1)[..., :-1] @ value


class _VarlenSinks(torch.autograd.Function):
    """By the operators under `torch.nn.attention.varlen`, whose own signatures change from release to release."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, bounds, scale: float, window):
        ctx.options = {"scale": scale, "window_size_left": window[0], "window_size_right": window[1]}
        causal = window == (-1, 0)
        ctx.fixed = (*bounds, 0.0, causal)  # without dropout
        output, denominator, *random, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, *ctx.fixed, False, **ctx.options
        )
        # [heads, tokens] -> [tokens, heads]
        output, total = _with_sink(output, denominator.t(), sinks[None])
        ctx.save_for_backward(query, key, value, sinks, output, total, *random)
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor):
        query, key, value, sinks, output, total, *random = ctx.saved_tensors
        states = torch.ops.aten._flash_attention_backward(
            gradient.contiguous(), query, key, value, output, total.t().contiguous(), *ctx.fixed, *random, **ctx.options
        )
        own = _sink_gradient(gradient, output, total, sinks[None]).sum(0)
        return *states, own.to(sinks.dtype), None, None, None


def varlen_sink_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    bounds: tuple[Tensor, Tensor, int, int],
    scale: float,
    window: tuple[int, int],
) -> Tensor:
    """The same over packed documents on CUDA: query [tokens, heads, dim], key and value [tokens, groups, dim].

    bounds: cu_seqlens of queries and keys and the longest of each; window: tokens to the left and right, -1 for all.
    """
    return _VarlenSinks.apply(query, key, value, sinks, bounds, scale, window)
