"""Rows that several families' tables share: the parts of a pre-norm transformer with grouped-query attention."""

from models.rules import Entry, by_group, stacked

MEGATRON = "decoder.layers.{i}."
HF = "model.layers.{i}."

EMBEDDING = Entry(
    "embedding.word_embeddings.weight",
    stacked,
    {"model.embed_tokens.weight": "vocab hidden"},
    rows="padded_vocab",
)
ATTENTION = (
    Entry(
        MEGATRON + "self_attention.linear_qkv.layer_norm_weight",
        stacked,
        {HF + "input_layernorm.weight": "hidden"},
    ),
    Entry(
        MEGATRON + "self_attention.linear_qkv.weight",
        by_group,
        {
            HF + "self_attn.q_proj.weight": "heads*head_dim hidden",
            HF + "self_attn.k_proj.weight": "groups*head_dim hidden",
            HF + "self_attn.v_proj.weight": "groups*head_dim hidden",
        },
    ),
    Entry(
        MEGATRON + "self_attention.linear_proj.weight",
        stacked,
        {HF + "self_attn.o_proj.weight": "hidden heads*head_dim"},
    ),
)
QKV_BIAS = (
    Entry(
        MEGATRON + "self_attention.linear_qkv.bias",
        by_group,
        {
            HF + "self_attn.q_proj.bias": "heads*head_dim",
            HF + "self_attn.k_proj.bias": "groups*head_dim",
            HF + "self_attn.v_proj.bias": "groups*head_dim",
        },
    ),
)
GATED_MLP = (
    Entry(
        MEGATRON + "mlp.linear_fc1.layer_norm_weight",
        stacked,
        {HF + "post_attention_layernorm.weight": "hidden"},
    ),
    Entry(
        MEGATRON + "mlp.linear_fc1.weight",
        stacked,
        {HF + "mlp.gate_proj.weight": "ffn hidden", HF + "mlp.up_proj.weight": "ffn hidden"},
    ),
    Entry(MEGATRON + "mlp.linear_fc2.weight", stacked, {HF + "mlp.down_proj.weight": "hidden ffn"}),
)
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
DENSE_CONSTANTS = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": "silu",
    "add_bias_linear": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
ROTARY_BUFFERS = ("model.layers.*.self_attn.rotary_emb.inv_freq",)
TIED_COPY = ("lm_head.weight", "model.embed_tokens.weight")
