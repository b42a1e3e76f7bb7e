"""Qwen3-MoE: Qwen3's attention, and in every layer experts chosen by a softmax over all or over the chosen."""

import operator

from models.conversion.rules import Entry, stacked
from models.families import common
from models.families.common import HF, MEGATRON
from models.families.family import Family

EXPERTS = (
    common.PRE_EXPERTS_NORM,
    Entry(MEGATRON + "mlp.router.weight", stacked, {HF + "mlp.gate.weight": "experts hidden"}, whole=True),
    Entry(
        MEGATRON + "mlp.experts.linear_fc1.weight",
        stacked,
        {
            HF + "mlp.experts.{e}.gate_proj.weight": "expert_ffn hidden",
            HF + "mlp.experts.{e}.up_proj.weight": "expert_ffn hidden",
        },
    ),
    Entry(
        MEGATRON + "mlp.experts.linear_fc2.weight",
        stacked,
        {HF + "mlp.experts.{e}.down_proj.weight": "hidden expert_ffn"},
    ),
)

FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    table=(common.EMBEDDING, *common.ATTENTION, *common.HEAD_QK_NORM, *EXPERTS, *common.HEAD),
    fields=common.DENSE_FIELDS
    | common.EXPERT_FIELDS
    | {
        "moe_ffn_hidden_size": "moe_intermediate_size",
        # Renormalised after the choice, a softmax over all is one over the chosen.
        "moe_router_pre_softmax": ("norm_topk_prob", operator.not_),
    },
    constants=common.DENSE_CONSTANTS | common.EXPERT_CONSTANTS | {"add_qkv_bias": False},
    requires={
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,  # an empty list
    },
    harmless=("sliding_window", "max_window_layers", "output_router_logits", "router_aux_loss_coef"),
    buffers=common.ROTARY_BUFFERS,
    tied_copy=common.TIED_COPY,
    qk_norm="head",
)
