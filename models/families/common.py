"""Rows that several families' tables share: the parts of a transformer with grouped-query attention."""

from models.conversion.rules import Entry, by_group, stacked

MEGATRON = "decoder.layers.{i}."
HF = "model.layers.{i}."

EMBEDDING = Entry(
    "embedding.word_embeddings.weight",
    stacked,
    {"model.embed_tokens.weight": "vocab hidden"},
    rows="padded_vocab",
)
QKV = Entry(
    MEGATRON + "self_attention.linear_qkv.weight",
    by_group,
    {
        HF + "self_attn.q_proj.weight": "heads*head_dim hidden",
        HF + "self_attn.k_proj.weight": "groups*head_dim hidden",
        HF + "self_attn.v_proj.weight": "groups*head_dim hidden",
    },
)
QKV_BIAS = Entry(
    MEGATRON + "self_attention.linear_qkv.bias",
    by_group,
    {
        HF + "self_attn.q_proj.bias": "heads*head_dim",
        HF + "self_attn.k_proj.bias": "groups*head_dim",
        HF + "self_attn.v_proj.bias": "groups*head_dim",
    },
)
PROJ = Entry(
    MEGATRON + "self_attention.linear_proj.weight",
    stacked,
    {HF + "self_attn.o_proj.weight": "hidden heads*head_dim"},
)
FC1 = Entry(
    MEGATRON + "mlp.linear_fc1.weight",
    stacked,
    {HF + "mlp.gate_proj.weight": "ffn hidden", HF + "mlp.up_proj.weight": "ffn hidden"},
)
FC2 = Entry(MEGATRON + "mlp.linear_fc2.weight", stacked, {HF + "mlp.down_proj.weight": "hidden ffn"})


def norm(key: str, name: str, width: str = "hidden") -> Entry:
    """The gain of one norm of a layer: `key` below megatron's layer, `name` below Hugging Face's."""
    return Entry(MEGATRON + key, stacked, {HF + name: width})


PRE_ATTENTION_NORM = norm("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
PRE_MLP_NORM = norm("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight")
# Experts read the norm's output through a router, so that the norm is a layer of its own in megatron-core.
PRE_EXPERTS_NORM = norm("pre_mlp_layernorm.weight", "post_attention_layernorm.weight")
POST_ATTENTION_NORM = norm("self_attention.linear_proj.post_norm.weight", "post_attention_layernorm.weight")
POST_MLP_NORM = norm("mlp.linear_fc2.post_norm.weight", "post_feedforward_layernorm.weight")
HEAD_QK_NORM = (
    norm("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "head_dim"),
    norm("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "head_dim"),
)
PROJECTION_QK_NORM = (
    norm("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "heads*head_dim"),
    norm("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "groups*head_dim"),
)
ATTENTION = (PRE_ATTENTION_NORM, QKV, PROJ)
GATED_MLP = (PRE_MLP_NORM, FC1, FC2)
HEAD = (
    Entry("decoder.final_layernorm.weight", stacked, {"model.norm.weight": "hidden"}),
    Entry(
        "output_layer.weight",
        stacked,
        {"lm_head.weight": "vocab hidden"},
        rows="padded_vocab",
        only="untied",
    ),
)

DENSE_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "intermediate_size",
    "layernorm_epsilon": "rms_norm_eps",
    "init_method_std": "initializer_range",
}
EXPERT_FIELDS = {
    "num_moe_experts": "num_experts",
    "moe_router_topk": "num_experts_per_tok",
}
EXPERT_CONSTANTS = {"moe_router_load_balancing_type": "none"}
DENSE_CONSTANTS = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": "silu",
    "add_bias_linear": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
# Wherever they stand, as transformers leaves them out (`_adjust_missing_and_unexpected_keys` of 5.23).
ROTARY_BUFFERS = ("*rotary_emb.inv_freq",)
TIED_COPY = ("lm_head.weight", "model.embed_tokens.weight")
# Fields of config.json that tools left which a model passed through: where code of its own lies, which is never run,
# and marks of these tools. They say nothing of the model.
IGNORED_FIELDS = ("auto_map", "is_llama_config", "transformers.js_config", "unsloth_fixed", "unsloth_version")
