"""Gated linear units that keep nothing but their input for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_QUICK = 1.702


def quick_gelu(gate: Tensor) -> Tensor:
    """x * sigmoid(1.702 x). megatron-core's own is compiled, and past a number of shapes not: rounded differently."""
    return gate * torch.sigmoid(_QUICK * gate)


# Activations of the form x * sigmoid(slope * x).
SLOPES: dict[Callable[..., Tensor], float] = {F.silu: 1.0, quick_gelu: _QUICK}


class _GatedUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, activation, limit: float | None, offset: float) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.slope, ctx.limit, ctx.offset = SLOPES[activation], limit, offset
        gate, up = _clamped(hidden, limit)
        return activation(gate) * (up + offset if offset else up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        (hidden,) = ctx.saved_tensors
        gate, up = _clamped(hidden, ctx.limit)
        both = torch.empty_like(hidden)
        gate_gradient, up_gradient = both.chunk(2, dim=-1)
        # The derivative of x * sigmoid(s x) is that of silu at s x.
        wanted = gradient * (up + ctx.offset if ctx.offset else up)
        slope = torch.ops.aten.silu_backward(wanted, gate * ctx.slope if ctx.slope != 1 else gate)
        torch.mul(gradient, gate * torch.sigmoid(ctx.slope * gate), out=up_gradient)
        if ctx.limit is None:
            gate_gradient.copy_(slope)
        else:
            raw_gate, raw_up = hidden.chunk(2, dim=-1)
            torch.mul(slope, raw_gate <= ctx.limit, out=gate_gradient)
            up_gradient.mul_(raw_up.abs() <= ctx.limit)
        return both, None, None, None


def _clamped(hidden: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    gate, up = hidden.chunk(2, dim=-1)
    return (gate, up) if limit is None else (gate.clamp(max=limit), up.clamp(-limit, limit))


def gated_unit(hidden: Tensor, activation: Callable[..., Tensor], limit: float | None, offset: float) -> Tensor:
    """activation(gate) * (up + offset) of hidden [..., 2 * width], gates before ups; returns [..., width].

    `limit` clamps gates from above and ups on both sides; `activation` is one of `SLOPES`.
    """
    return _GatedUnit.apply(hidden, activation, limit, offset)
