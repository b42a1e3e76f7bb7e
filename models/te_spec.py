"""Layers of Transformer Engine in megatron-core's frame, for every family.

Imported only where Transformer Engine is there. `docs/gpu.md` says which attention serves which case, and why.
"""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from models.backend import is_plain_causal
from models.description import ModelDescription
from models.frame import layer_spec
from models.layers.attention import PackedAttention
from models.layers.rope import Rope
from models.layers.te_layers import RotaryTEAttention, TEExperts, TEPostNormLinear


def te_block_spec(
    layers: int, description: ModelDescription, ropes: tuple[Rope, ...], groups: Any
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage and the final norm.

    A norm before a linear layer is part of it, one behind a linear layer is not, nor is the one before experts.
    """
    post_norm, experts = description.post_norm, "num_moe_experts" in description.transformer
    grouped = MLPSubmodules(linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear)
    spec = layer_spec(
        description,
        ropes,
        groups,
        column=TEColumnParallelLinear if post_norm else TELayerNormColumnParallelLinear,
        row=TEPostNormLinear if post_norm else TERowParallelLinear,
        core=RotaryTEAttention if is_plain_causal(description) else PackedAttention,
        experts=ModuleSpec(module=TEExperts, submodules=grouped),
        head_norm=TENorm,
        pre_mlp_norm=TENorm if experts else IdentityOp,
    )
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=TENorm)
