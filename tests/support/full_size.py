"""Published models at their real size: their config.json with every field that the files have, and known counts."""

from __future__ import annotations

from typing import Any

LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_3_2 = LLAMA_3 | {
    "rope_scaling": LLAMA_3["rope_scaling"] | {"factor": 32.0},
    "tie_word_embeddings": True,
    "transformers_version": "4.45.0.dev0",
}
QWEN_2_5 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN_2_5_LARGE = {key: value for key, value in QWEN_2_5.items() if key != "use_mrope"} | {
    "rms_norm_eps": 1e-05,
    "transformers_version": "4.43.1",
}
QWEN_2_5_MATH = {
    "max_position_embeddings": 4096,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "transformers_version": "4.44.0",
}
QWEN_3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_3_MOE = QWEN_3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
}
OLMO_2 = {
    "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "model_type": "olmo2",
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.47.0",
    "use_cache": True,
    "vocab_size": 100352,
}
OLMO_3 = OLMO_2 | {
    "architectures": ["Olmo3ForCausalLM"],
    "bos_token_id": None,
    "max_position_embeddings": 65536,
    "model_type": "olmo3",
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "vocab_size": 100278,
}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 8,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}
MXFP4 = {
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    }
}


def sized(layers: int, hidden: int, ffn: int, heads: int, groups: int) -> dict[str, int]:
    """The fields that tell sizes of one family apart."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
    }


def qwen(layers: int, *sizes: int, window_layers: int = 0, **changes: Any) -> dict[str, Any]:
    """Sizes of a Qwen, whose files also say from which layer on windows would begin."""
    return sized(layers, *sizes) | {"max_window_layers": window_layers or layers} | changes


def windowed(layers: int, period: int) -> dict[str, list[str]]:
    """Which layers have a window: all but every `period`-th."""
    kinds = ["full_attention" if number % period == 0 else "sliding_attention" for number in range(1, layers + 1)]
    return {"layer_types": kinds}


SMALL = {"tie_word_embeddings": True, "vocab_size": 151936}
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": LLAMA_3_2 | sized(16, 2048, 8192, 32, 8) | {"head_dim": 64},
    "Llama-3.2-3B": LLAMA_3_2 | sized(28, 3072, 8192, 24, 8) | {"head_dim": 128},
    "Llama-3.1-8B": LLAMA_3,
    "Llama-3.1-70B": LLAMA_3 | sized(80, 8192, 28672, 64, 8),
    "Llama-3.1-Tulu-3-8B": LLAMA_3
    | {"_name_or_path": "/model", "transformers_version": "4.43.4", "use_cache": False, "vocab_size": 128264},
    "Qwen2.5-0.5B": QWEN_2_5 | qwen(24, 896, 4864, 14, 2, max_position_embeddings=32768, sliding_window=32768) | SMALL,
    "Qwen2.5-1.5B": QWEN_2_5 | qwen(28, 1536, 8960, 12, 2) | SMALL,
    "Qwen2.5-7B": QWEN_2_5 | qwen(28, 3584, 18944, 28, 4),
    "Qwen2.5-14B": QWEN_2_5_LARGE | qwen(48, 5120, 13824, 40, 8),
    "Qwen2.5-32B": QWEN_2_5_LARGE | qwen(64, 5120, 27648, 40, 8),
    "Qwen2.5-Math-1.5B": QWEN_2_5 | QWEN_2_5_MATH | qwen(28, 1536, 8960, 12, 2, window_layers=21) | SMALL,
    "Qwen2.5-Math-7B": QWEN_2_5 | QWEN_2_5_MATH | qwen(28, 3584, 18944, 28, 4),
    "Qwen3-0.6B": QWEN_3 | qwen(28, 1024, 3072, 16, 8) | SMALL,
    "Qwen3-1.7B": QWEN_3 | qwen(28, 2048, 6144, 16, 8) | SMALL,
    "Qwen3-4B": QWEN_3 | qwen(36, 2560, 9728, 32, 8) | SMALL,
    "Qwen3-8B": QWEN_3 | qwen(36, 4096, 12288, 32, 8),
    "Qwen3-14B": QWEN_3 | qwen(40, 5120, 17408, 40, 8),
    "Qwen3-32B": QWEN_3 | qwen(64, 5120, 25600, 64, 8),
    "Qwen3-30B-A3B": QWEN_3_MOE | qwen(48, 2048, 6144, 32, 4, moe_intermediate_size=768),
    "Qwen3-235B-A22B": QWEN_3_MOE | qwen(94, 4096, 12288, 64, 4, moe_intermediate_size=1536),
    "OLMo-2-1124-7B": OLMO_2 | sized(32, 4096, 11008, 32, 32),
    "OLMo-2-1124-13B": OLMO_2 | sized(40, 5120, 13824, 40, 40),
    "OLMo-2-0325-32B": OLMO_2
    | sized(64, 5120, 27648, 40, 8)
    | {"bos_token_id": 100257, "transformers_version": "4.49.0"},
    "Olmo-3-1025-7B": OLMO_3 | sized(32, 4096, 11008, 32, 32) | windowed(32, 4),
    "Olmo-3-1125-32B": OLMO_3 | sized(64, 5120, 27648, 40, 8) | windowed(64, 4),
    "gpt-oss-20b": GPT_OSS | MXFP4 | {"num_hidden_layers": 24, "num_local_experts": 32} | windowed(24, 2),
    "gpt-oss-120b": GPT_OSS | MXFP4 | {"num_hidden_layers": 36, "num_local_experts": 128} | windowed(36, 2),
}
for name in ("gpt-oss-20b", "gpt-oss-120b"):  # what converters to bf16 publish
    CONFIGS[f"{name}-BF16"] = {key: value for key, value in CONFIGS[name].items() if key not in MXFP4}

# As published with the files (the hub counts them), tied embeddings once.
PARAMETERS = {
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-Tulu-3-8B": 8_030_326_784,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-Math-1.5B": 1_543_714_304,
    "Qwen2.5-Math-7B": 7_615_616_512,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "OLMo-2-1124-7B": 7_298_617_344,
    "OLMo-2-1124-13B": 13_716_198_400,
    "OLMo-2-0325-32B": 32_234_279_936,
    "Olmo-3-1025-7B": 7_298_011_136,
    "Olmo-3-1125-32B": 32_233_522_176,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
}
PARAMETERS |= {f"{name}-BF16": PARAMETERS[name] for name in ("gpt-oss-20b", "gpt-oss-120b")}
