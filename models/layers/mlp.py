"""megatron-core's dense MLP with our gated unit, which can be computed again in the backward pass."""

from __future__ import annotations

from functools import partial

from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from models.layers.gated import unit_of
from models.layers.recompute import again, parts_of


class GatedMLP(MLP):
    """megatron-core's own forward pass on the host unless its activation is to be computed again; else the same
    numbers by a unit that rounds on CUDA as its parts would.

    megatron-core's own compiled unit (0.16.1) leaves out roundings, and after eight kinds of shapes is compiled no
    more.
    """

    def forward(self, hidden_states: Tensor, per_token_scale=None, **options) -> tuple[Tensor, Tensor | None]:
        """hidden_states [tokens, batch, hidden]; returns the output and a bias that is still to be added, or None."""
        parts = parts_of(self.config)
        recomputed = "activation" in parts or "moe_act" in parts
        if per_token_scale is not None or (hidden_states.is_cpu and not recomputed):
            return super().forward(hidden_states, per_token_scale, **options)
        hidden, bias = self.linear_fc1(hidden_states)
        if bias is not None:
            hidden = hidden + bias
        if "moe_act" in parts:
            # Hooks around Transformer Engine's layers would take its marks from a weight that it saves (2.12).
            held = CheckpointWithoutOutput()
            output, bias = self.linear_fc2(held.checkpoint(partial(unit_of, self.config), hidden))
            held.discard_output_and_register_recompute(output)
            return output, bias
        activated = unit_of(self.config, hidden)
        if recomputed:
            activated = again(activated, partial(unit_of, self.config, hidden.detach()))
        return self.linear_fc2(activated)
