"""Native layers: megatron-core's parallel linears with our attention, norms and experts, in its own frame.

Checkpoints have the keys and shapes of those that Transformer Engine's layers give (`models.te_spec`): a norm before a
linear layer is named as its fused layer names it.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from models.description import ModelDescription
from models.layers.attention import PackedAttention
from models.layers.experts import GroupedExperts
from models.layers.mlp import GatedMLP
from models.layers.norm import FP32GainRMSNorm, PostNormLinear, ProjectionNorm, RMSNorm
from models.layers.recompute import MARKED, marked_are_not_kept, parts_of
from models.layers.rope import Rope
from models.layers.router import PackedMoELayer, PackedRouter


class PackedLayer(TransformerLayer):
    """megatron-core's layer; experts are told which tokens are real where it would hand over a padding mask."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        recomputed = parts_of(self.config)
        self.marks = any(part in recomputed for part in MARKED)
        for norm in (self.input_layernorm, self.pre_mlp_layernorm):
            if isinstance(norm, RMSNorm):
                norm.recompute = "norm" in recomputed

    def forward(self, *args, **kwargs):
        if self.is_moe_layer:
            kwargs["padding_mask"] = kwargs["packed_seq_params"].routed
        with marked_are_not_kept() if self.marks else nullcontext():
            return super().forward(*args, **kwargs)


def native_layer_spec(description: ModelDescription, ropes: tuple[Rope, ...], groups: Any) -> ModuleSpec:
    """A layer from megatron-core's parallel linears and Lathe's attention, norms and experts."""
    post_norm = description.post_norm
    before: type = IdentityOp if post_norm else _norm(description)
    output: type = PostNormLinear if post_norm else RowParallelLinear
    query_norm, key_norm = qk_norms(description, groups, of_head=RMSNorm)
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=partial(PackedAttention, ropes=ropes),
            linear_proj=output,
            q_layernorm=query_norm,
            k_layernorm=key_norm,
        ),
    )
    keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if "num_moe_experts" in description.transformer:
        experts = MoESubmodules(experts=GroupedExperts, router=PackedRouter)
        mlp = ModuleSpec(module=PackedMoELayer, submodules=experts, params={"pg_collection": groups})
    else:
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=output)
        # megatron-core 0.16.1 gives the group to its own class alone.
        mlp = ModuleSpec(module=GatedMLP, submodules=linears, params={"tp_group": groups.tp})
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=PackedLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=before,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=before,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=keys,
        ),
    )


def _norm(description: ModelDescription) -> type:
    return FP32GainRMSNorm if description.gain_in_fp32 else RMSNorm


def qk_norms(description: ModelDescription, groups: Any, *, of_head: type) -> tuple[Any, Any]:
    """The norms of queries and keys: none, of each head by itself (`of_head`), or over all heads at once."""
    if description.qk_norm == "head":
        return of_head, of_head
    if description.qk_norm == "none":
        return IdentityOp, IdentityOp
    fields = description.transformer
    heads = (fields["num_attention_heads"], fields["num_query_groups"])
    query, key = (ModuleSpec(module=ProjectionNorm, params={"heads": n, "tp_group": groups.tp}) for n in heads)
    return query, key


def native_block_spec(
    layers: int, description: ModelDescription, ropes: tuple[Rope, ...], groups: Any
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage and the final norm."""
    spec = native_layer_spec(description, ropes, groups)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=_norm(description))
