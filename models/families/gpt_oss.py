"""gpt-oss: attention sinks, windows in every other layer, biases everywhere, experts with a clamped SwiGLU.

Files hold each layer's experts in one tensor, [experts, in, out] in bf16 and [experts, out, in] in MXFP4 (which
the reader transposes), with the rows of gate and up interleaved.
"""

from models.conversion.rules import Entry, interleaved, stacked
from models.families import common
from models.families.common import HF, MEGATRON
from models.families.family import Family

EXPERTS = HF + "mlp.experts."
FC1, FC2 = MEGATRON + "mlp.experts.linear_fc1.", MEGATRON + "mlp.experts.linear_fc2."
TABLE = (
    common.QKV_BIAS,
    Entry(MEGATRON + "self_attention.linear_proj.bias", stacked, {HF + "self_attn.o_proj.bias": "hidden"}),
    Entry(MEGATRON + "self_attention.core_attention.softmax_offset", stacked, {HF + "self_attn.sinks": "heads"}),
    common.PRE_EXPERTS_NORM,
    Entry(MEGATRON + "mlp.router.weight", stacked, {HF + "mlp.router.weight": "experts hidden"}, whole=True),
    Entry(MEGATRON + "mlp.router.bias", stacked, {HF + "mlp.router.bias": "experts"}, whole=True),
    Entry(FC1 + "weight", interleaved, {EXPERTS + "gate_up_proj": "experts hidden 2*expert_ffn"}, transposed=True),
    Entry(FC1 + "bias", interleaved, {EXPERTS + "gate_up_proj_bias": "experts 2*expert_ffn"}),
    Entry(FC2 + "weight", stacked, {EXPERTS + "down_proj": "experts expert_ffn hidden"}, transposed=True),
    Entry(FC2 + "bias", stacked, {EXPERTS + "down_proj_bias": "experts hidden"}),
)

FAMILY = Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    table=(common.EMBEDDING, *common.ATTENTION, *TABLE, *common.HEAD),
    fields=common.DENSE_FIELDS
    | common.EXPERT_FIELDS
    | {"moe_ffn_hidden_size": "intermediate_size", "activation_func_clamp_value": "swiglu_limit"},
    constants=common.DENSE_CONSTANTS
    | common.EXPERT_CONSTANTS
    | {
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "softmax_type": "learnable",
        "activation_func": "quick_gelu",  # x * sigmoid(1.702 x)
        "glu_linear_offset": 1.0,
        "moe_router_pre_softmax": False,
    },
    requires={"hidden_act": "silu", "attention_bias": True, "attention_dropout": 0.0, "swiglu_alpha": 1.702},
    harmless=("output_router_logits", "router_aux_loss_coef"),
    # Under the names of the model's own repository.
    repeats={
        "initial_context_length": "original_max_position_embeddings",
        "experts_per_token": "num_experts_per_tok",
    },
    buffers=common.ROTARY_BUFFERS,
    tied_copy=common.TIED_COPY,
    windows=True,
    gain_in_fp32=True,
    mxfp4=("model.layers.*.mlp.experts.gate_up_proj", "model.layers.*.mlp.experts.down_proj"),
)
