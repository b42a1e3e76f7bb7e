"""Qwen2 and Qwen2.5 (Math included): pre-norm RMSNorm, biases on q, k and v only, often tied embeddings."""

from models.rules import Entry, Family, by_group, stacked

MEGATRON = "decoder.layers.{i}."
HF = "model.layers.{i}."

TABLE = (
    Entry(
        "embedding.word_embeddings.weight",
        stacked,
        {"model.embed_tokens.weight": "vocab hidden"},
        rows="padded_vocab",
    ),
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
        MEGATRON + "self_attention.linear_qkv.bias",
        by_group,
        {
            HF + "self_attn.q_proj.bias": "heads*head_dim",
            HF + "self_attn.k_proj.bias": "groups*head_dim",
            HF + "self_attn.v_proj.bias": "groups*head_dim",
        },
    ),
    Entry(
        MEGATRON + "self_attention.linear_proj.weight",
        stacked,
        {HF + "self_attn.o_proj.weight": "hidden heads*head_dim"},
    ),
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
    Entry("decoder.final_layernorm.weight", stacked, {"model.norm.weight": "hidden"}),
    Entry(
        "output_layer.weight",
        stacked,
        {"lm_head.weight": "vocab hidden"},
        rows="padded_vocab",
        only="untied",
    ),
)

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    table=TABLE,
    fields={
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_attention_heads": "num_attention_heads",
        "num_query_groups": "num_key_value_heads",
        "kv_channels": "head_dim",
        "ffn_hidden_size": "intermediate_size",
        "layernorm_epsilon": "rms_norm_eps",
        "init_method_std": "initializer_range",
    },
    constants={
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": "silu",
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    },
    requires={
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "layer_types": "full_attention",
    },
    # Both tell where windows would begin, and mean nothing without use_sliding_window.
    harmless=("sliding_window", "max_window_layers"),
    buffers=("model.layers.*.self_attn.rotary_emb.inv_freq",),
    tied_copy=("lm_head.weight", "model.embed_tokens.weight"),
)
