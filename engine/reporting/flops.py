"""Model operations of a step, and what share of the device's peak they are."""

from __future__ import annotations

import numpy as np

from models.description import ModelDescription

# Dense bf16 peaks in TFLOP/s from the vendors' data sheets, by a part of the device's name.
PEAKS = {"B200": 2250.0, "H200": 989.0, "H100": 989.0, "A100": 312.0}


def matrix_parameters(description: ModelDescription) -> int:
    """Parameters that multiply each token: all matrices but the embedding's look-up, the head included."""
    fields = description.transformer
    hidden, layers = fields["hidden_size"], fields["num_layers"]
    matrices = [
        rule for rule in description.rules if rule.key.startswith("decoder.layers.0.") and rule.key.endswith("weight")
    ]
    per_layer = sum(int(np.prod(rule.shape)) for rule in matrices if len(rule.shape) == 2)
    experts = sum(int(np.prod(rule.shape)) for rule in matrices if len(rule.shape) == 3)
    if experts:  # of which a token sees the chosen ones
        per_layer += experts * fields["moe_router_topk"] // fields["num_moe_experts"]
    return layers * per_layer + description.vocab_size * hidden


def step_flops(
    description: ModelDescription, tokens: int, squared_lengths: int, windowed_squares: int | None = None
) -> float:
    """Operations of forward and backward over `tokens`, without recomputation.

    6 per parameter and token, and for causal attention 6 * heads * head_dim per layer and pair of tokens
    (`squared_lengths` is the sum of squared document lengths, half of which causality leaves; as in
    Chowdhery et al., 2022, arXiv:2204.02311, appendix B, with the half taken off). Layers with a window see
    `windowed_squares`, see `doubled_pairs`.
    """
    fields = description.transformer
    width = fields["num_attention_heads"] * fields["kv_channels"]
    windowed = sum(fields.get("window_attn_skip_freq", ()))
    squares = (fields["num_layers"] - windowed) * squared_lengths
    squares += windowed * (squared_lengths if windowed_squares is None else windowed_squares)
    return 6.0 * matrix_parameters(description) * tokens + 6.0 * width * squares


def doubled_pairs(lengths: np.ndarray, window: int | None) -> int:
    """Twice the pairs of tokens that attend, summed over documents: their squared lengths where no window ends."""
    lengths = lengths.astype(np.int64)
    seen = lengths if window is None else np.minimum(lengths, window)
    return int((2 * lengths * seen - seen * seen).sum())


def device_peak(name: str | None) -> float | None:
    """The bf16 peak of a CUDA device by name in TFLOP/s, None where it is not known."""
    if name is None:
        return None
    return next((peak for part, peak in PEAKS.items() if part in name), None)
