"""Qwen3, dense: pre-norm RMSNorm, queries and keys normed head by head, no biases."""

from models.families.common import (
    ATTENTION,
    DENSE_CONSTANTS,
    DENSE_FIELDS,
    EMBEDDING,
    GATED_MLP,
    HEAD,
    HEAD_QK_NORM,
    ROTARY_BUFFERS,
    TIED_COPY,
)
from models.families.family import Family

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    table=(EMBEDDING, *ATTENTION, *HEAD_QK_NORM, *GATED_MLP, *HEAD),
    fields=DENSE_FIELDS,
    constants=DENSE_CONSTANTS | {"add_qkv_bias": False},
    requires={"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0},
    buffers=ROTARY_BUFFERS,
    tied_copy=TIED_COPY,
    windows=True,
    qk_norm="head",
)
