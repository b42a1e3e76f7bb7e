"""Layers of Transformer Engine in megatron-core's frame, for every family.

Imported only where Transformer Engine is there. `docs/gpu.md` says which attention serves which case, and why.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from models.backend import is_plain_causal
from models.description import ModelDescription
from models.layers.attention import PackedAttention
from models.layers.mlp import GatedMLP
from models.layers.rope import Rope
from models.layers.router import PackedMoELayer, PackedRouter
from models.layers.te_layers import RotaryTEAttention, TEExperts, TEPostNormLinear
from models.native_spec import PackedLayer, qk_norms


def te_block_spec(
    layers: int, description: ModelDescription, ropes: tuple[Rope, ...], groups: Any
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage and the final norm."""
    spec = te_layer_spec(description, ropes, groups)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=TENorm)


def te_layer_spec(description: ModelDescription, ropes: tuple[Rope, ...], groups: Any) -> ModuleSpec:
    """One layer. A norm before a linear layer is part of it, one behind a linear layer is not."""
    post_norm = description.post_norm
    column = TEColumnParallelLinear if post_norm else TELayerNormColumnParallelLinear
    row = TEPostNormLinear if post_norm else TERowParallelLinear
    core = RotaryTEAttention if is_plain_causal(description) else PackedAttention
    query_norm, key_norm = qk_norms(description, groups, of_head=TENorm)
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=partial(core, ropes=ropes),
            linear_proj=row,
            q_layernorm=query_norm,
            k_layernorm=key_norm,
        ),
    )
    experts = "num_moe_experts" in description.transformer
    return ModuleSpec(
        module=PackedLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=TENorm if experts else IdentityOp,
            mlp=_experts(groups) if experts else _dense(column, row, groups),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _dense(column: type, row: type, groups: Any) -> ModuleSpec:
    linears = MLPSubmodules(linear_fc1=column, linear_fc2=row)
    return ModuleSpec(module=GatedMLP, submodules=linears, params={"tp_group": groups.tp})


def _experts(groups: Any) -> ModuleSpec:
    linears = MLPSubmodules(linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear)
    experts = MoESubmodules(experts=ModuleSpec(module=TEExperts, submodules=linears), router=PackedRouter)
    return ModuleSpec(module=PackedMoELayer, submodules=experts, params={"pg_collection": groups})
