"""The shapes that are measured on a GPU, and the memory that training them takes, reckoned beforehand.

Bytes of activations are those that the native backend keeps for the backward pass in bf16, counted on the host with
`torch.autograd.graph.saved_tensors_hooks`; the fused activation of dense models keeps its input and its output.
"""

from __future__ import annotations

from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-1.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        "tie_word_embeddings": False,
    },
}
SHAPES["gpt-oss-120b"] = SHAPES["gpt-oss-20b"] | {"num_hidden_layers": 36, "num_local_experts": 128}

# Bytes a parameter: bf16 weight, fp32 gradient, fp32 master weight and two moments.
STATE_BYTES = 18
# Logits held at once by `models.layers.loss` on a GPU, in bytes; their gradient takes their place.
LOSS_BYTES = 2**30


def widths(shape: dict[str, Any]) -> tuple[int, int, int]:
    """(hidden size, width of all queries, width of all keys)."""
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    head = shape.get("head_dim", hidden // heads)
    return hidden, heads * head, shape["num_key_value_heads"] * head


def layer_parameters(shape: dict[str, Any]) -> int:
    """Parameters of one layer's matrices."""
    hidden, queries, keys = widths(shape)
    experts = shape.get("num_local_experts", 1)
    return hidden * (2 * queries + 2 * keys) + 3 * hidden * shape["intermediate_size"] * experts


def embedding_parameters(shape: dict[str, Any]) -> int:
    """Parameters of the embedding and, where it is not the same, of the output layer."""
    return shape["vocab_size"] * shape["hidden_size"] * (1 if shape["tie_word_embeddings"] else 2)


def layer_activations(shape: dict[str, Any], *, recompute: bool) -> int:
    """Bytes a token that one layer keeps; only its input where all else is recomputed."""
    hidden, queries, keys = widths(shape)
    if recompute:
        return 2 * hidden
    ffn = shape["intermediate_size"]
    attention = 10 * hidden + 6 * queries + 6 * keys
    if "num_local_experts" in shape:
        return attention + shape["num_experts_per_tok"] * (4 * hidden + 6 * ffn)
    return attention + 6 * ffn


def memory_needed(shape: dict[str, Any], layers: int, tokens: int, *, recompute: bool) -> float:
    """Peak bytes of a step with microbatches of `tokens`: state, activations, and the larger of what comes and goes.

    That is the loss with its gradients, or one layer's backward pass: about as much again as a layer keeps, beside
    a whole layer where it is recomputed.
    """
    state = STATE_BYTES * (layers * layer_parameters(shape) + embedding_parameters(shape))
    kept = tokens * (layers * layer_activations(shape, recompute=recompute) + 8 * shape["hidden_size"])
    whole = tokens * layer_activations(shape, recompute=False)
    loss = LOSS_BYTES + 6 * shape["vocab_size"] * shape["hidden_size"] + 4 * tokens * shape["hidden_size"]
    return state + kept + max(loss, whole * (2 if recompute else 1))


def layers_that_fit(shape: dict[str, Any], tokens: int, memory: int, *, recompute: bool) -> int:
    """As many layers as nine tenths of `memory` bytes hold, and one at least."""
    layers = shape["num_hidden_layers"]
    while layers > 1 and memory_needed(shape, layers, tokens, recompute=recompute) > 0.9 * memory:
        layers -= 1
    return layers
