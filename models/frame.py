"""megatron-core's frame of a layer, which native and Transformer Engine's parts are put into."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from models.description import ModelDescription
from models.layers.mlp import GatedMLP
from models.layers.norm import ProjectionNorm, RMSNorm
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


def layer_spec(
    description: ModelDescription,
    ropes: tuple[Rope, ...],
    groups: Any,
    *,
    column: type,
    row: type,
    core: type,
    experts: Any,
    head_norm: type,
    input_norm: type = IdentityOp,
    pre_mlp_norm: type = IdentityOp,
    keys: dict[str, str] | None = None,
) -> ModuleSpec:
    """One layer of these parts.

    column, row: the linear layers whose outputs and whose inputs are split over tensor-parallel ranks; core: attention;
    experts: those of one rank, for a model that has them; head_norm: of single heads' queries and keys; input_norm,
    pre_mlp_norm: where the linear layer behind has none of its own; keys: what parts' keys begin with in a checkpoint.
    """
    query_norm, key_norm = _qk_norms(description, groups, head_norm)
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
    if "num_moe_experts" in description.transformer:
        submodules = MoESubmodules(experts=experts, router=PackedRouter)
        mlp = ModuleSpec(module=PackedMoELayer, submodules=submodules, params={"pg_collection": groups})
    else:
        linears = MLPSubmodules(linear_fc1=column, linear_fc2=row)
        # megatron-core 0.16.1 gives the group to its own class alone.
        mlp = ModuleSpec(module=GatedMLP, submodules=linears, params={"tp_group": groups.tp})
    return ModuleSpec(
        module=PackedLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=input_norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=pre_mlp_norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=keys or {},
        ),
    )


def _qk_norms(description: ModelDescription, groups: Any, of_head: type) -> tuple[Any, Any]:
    """The norms of queries and keys: none, of each head by itself (`of_head`), or over all heads at once."""
    if description.qk_norm == "head":
        return of_head, of_head
    if description.qk_norm == "none":
        return IdentityOp, IdentityOp
    fields = description.transformer
    heads = (fields["num_attention_heads"], fields["num_query_groups"])
    query, key = (ModuleSpec(module=ProjectionNorm, params={"heads": n, "tp_group": groups.tp}) for n in heads)
    return query, key
