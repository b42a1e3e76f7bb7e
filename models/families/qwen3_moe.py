"""Qwen3-MoE: Qwen3's attention, and in every layer experts chosen by a softmax over all or over the chosen."""

import operator

from models.conversion.rules import Entry, stacked
from models.families.common import (
    ATTENTION,
    DENSE_CONSTANTS,
    DENSE_FIELDS,
    EMBEDDING,
    EXPERT_CONSTANTS,
    EXPERT_FIELDS,
    HEAD,
    HEAD_QK_NORM,
    HF,
    MEGATRON,
    PRE_EXPERTS_NORM,
    ROTARY_BUFFERS,
    TIED_COPY,
)
from models.families.family import Family

EXPERTS = (
    PRE_EXPERTS_NORM,
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
    table=(EMBEDDING, *ATTENTION, *HEAD_QK_NORM, *EXPERTS, *HEAD),
    fields=DENSE_FIELDS
    | EXPERT_FIELDS
    | {
        "moe_ffn_hidden_size": "moe_intermediate_size",
        # Renormalised after the choice, a softmax over all is one over the chosen.
        "moe_router_pre_softmax": ("norm_topk_prob", operator.not_),
    },
    constants=DENSE_CONSTANTS | EXPERT_CONSTANTS | {"add_qkv_bias": False},
    requires={
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,  # an empty list
    },
    harmless=("sliding_window", "max_window_layers", "output_router_logits", "router_aux_loss_coef"),
    buffers=ROTARY_BUFFERS,
    tied_copy=TIED_COPY,
    qk_norm="head",
)
