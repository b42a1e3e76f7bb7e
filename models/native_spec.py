"""Native layers: megatron-core's parallel linears with our attention, norms and experts, in its own frame.

Checkpoints have the keys and shapes of those that Transformer Engine's layers give (`models.te_spec`): a norm before a
linear layer is named as its fused layer names it.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from models.description import ModelDescription
from models.frame import layer_spec
from models.layers.attention import PackedAttention
from models.layers.experts import GroupedExperts
from models.layers.norm import FP32GainRMSNorm, PostNormLinear, RMSNorm
from models.layers.rope import Rope


def native_block_spec(
    layers: int, description: ModelDescription, ropes: tuple[Rope, ...], groups: Any
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage and the final norm."""
    norm = FP32GainRMSNorm if description.gain_in_fp32 else RMSNorm
    before: type = IdentityOp if description.post_norm else norm
    keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if "num_moe_experts" not in description.transformer:
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    spec = layer_spec(
        description,
        ropes,
        groups,
        column=ColumnParallelLinear,
        row=PostNormLinear if description.post_norm else RowParallelLinear,
        core=PackedAttention,
        experts=GroupedExperts,
        head_norm=RMSNorm,
        input_norm=before,
        pre_mlp_norm=before,
        keys=keys,
    )
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=norm)
