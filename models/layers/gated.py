"""Gated linear units that keep nothing but their input for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers.fused import fused

_QUICK = 1.702


def quick_gelu(gate: Tensor) -> Tensor:
    """x * sigmoid(1.702 x). megatron-core's own is compiled, and past a number of shapes not: rounded differently."""
    return gate * torch.sigmoid(_QUICK * gate)


# Activations of the form x * sigmoid(slope * x).
SLOPES: dict[Callable[..., Tensor], float] = {F.silu: 1.0, quick_gelu: _QUICK}


@fused()
def _activated(hidden: Tensor, slope: float, limit: float | None, offset: float) -> Tensor:
    gate, up = _clamped(hidden, limit)
    return _activation(gate, slope) * (up + offset if offset else up)


@fused()
def _gradient(gradient: Tensor, hidden: Tensor, slope: float, limit: float | None, offset: float) -> Tensor:
    """The gradient of `hidden`."""
    gate, up = _clamped(hidden, limit)
    to_gate, to_up = gradient * (up + offset if offset else up), gradient
    if limit is not None:  # what was clamped gets none
        raw_gate, raw_up = hidden.chunk(2, dim=-1)
        to_gate, to_up = to_gate * (raw_gate <= limit), to_up * (raw_up.abs() <= limit)
    # The derivative of x * sigmoid(s x) is that of silu at s x.
    gate_gradient = torch.ops.aten.silu_backward(to_gate, gate * slope if slope != 1 else gate)
    return torch.cat((gate_gradient, to_up * _activation(gate, slope)), dim=-1)


class _GatedUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, slope: float, limit: float | None, offset: float) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.constants = slope, limit, offset
        return _activated(hidden, *ctx.constants)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        return _gradient(gradient, *ctx.saved_tensors, *ctx.constants), None, None, None


def _activation(gate: Tensor, slope: float) -> Tensor:
    return F.silu(gate) if slope == 1 else gate * torch.sigmoid(slope * gate)


def _clamped(hidden: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    gate, up = hidden.chunk(2, dim=-1)
    return (gate, up) if limit is None else (gate.clamp(max=limit), up.clamp(-limit, limit))


def unit_of(config: Any, hidden: Tensor) -> Tensor:
    """The gated unit that megatron-core's config of a model describes; see `gated_unit`."""
    limit, offset = config.activation_func_clamp_value, config.glu_linear_offset
    return gated_unit(hidden, config.activation_func, limit, offset)


def gated_unit(hidden: Tensor, activation: Callable[..., Tensor], limit: float | None, offset: float) -> Tensor:
    """activation(gate) * (up + offset) of hidden [..., 2 * width], gates before ups; returns [..., width].

    `limit` clamps gates from above and ups on both sides; `activation` is one of `SLOPES`.
    """
    return _GatedUnit.apply(hidden, SLOPES[activation], limit, offset)
