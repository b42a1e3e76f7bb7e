"""Rotary position embeddings by position: one table a layer kind, indexed with the documents' own positions.

megatron-core's own rotary code is switched off (`position_embedding_type="none"`); the attention wrapper
applies these tables just before the core attention, for both backends, packed documents and context
parallelism alike.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from models.layers.fused import fused


def inverse_frequencies(parameters: dict, head_dim: int, max_position_embeddings: int) -> tuple[Tensor, float]:
    """Returns (inverse frequencies [head_dim / 2] in fp32, factor on cos and sin) of one layer's rope.

    `parameters` has the shape of transformers' `rope_parameters`; scaled kinds ("llama3", "yarn", "linear")
    are computed by transformers' own initialisers, so that both sides agree to the last bit.
    """
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
        return 1.0 / (parameters["rope_theta"] ** exponent), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = SimpleNamespace(
        rope_parameters=dict(parameters),
        head_dim=head_dim,
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=max_position_embeddings,
        standardize_rope_params=lambda: None,
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies.to(torch.float32), float(factor)


@dataclass(frozen=True)
class Rope:
    """One rotary table: `key` tells tables apart, so that layers with the same table share cos and sin."""

    key: str
    frequencies: Tensor  # [head_dim / 2], fp32
    factor: float

    @classmethod
    def from_parameters(cls, parameters: dict, head_dim: int, max_position_embeddings: int) -> Rope:
        """Builds the table that `inverse_frequencies` describes."""
        frequencies, factor = inverse_frequencies(parameters, head_dim, max_position_embeddings)
        return cls(json.dumps(parameters, sort_keys=True, default=str), frequencies, factor)

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns cos and signed sin, each [tokens, 1, head_dim], for `positions` [tokens].

        The sine's first half is negated, so that a rotation is `x * cos + swap_halves(x) * sin`.
        """
        angles = positions.to(torch.float32)[:, None] * self.frequencies.to(positions.device)  # [tokens, dim/2]
        cos, sin = angles.cos() * self.factor, angles.sin() * self.factor
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return cos[:, None].to(dtype), sin[:, None].to(dtype)


@fused()
def _rotated(states: Tensor, cos: Tensor, sin: Tensor, opposite: bool) -> Tensor:
    """Rotation by the tables' angle, or by the opposite one."""
    if opposite:
        sin = -sin
    first, second = states.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    return (states * cos).addcmul_(swapped, sin)


class _Rotate(torch.autograd.Function):
    """Rotation by cos and signed sin; its transpose is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(states, cos, sin, False)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _rotated(gradient, *ctx.saved_tensors, True), None, None


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary embedding to `states` [tokens, heads, head_dim]; tables as from `Rope.tables`."""
    return _Rotate.apply(states, cos, sin)
