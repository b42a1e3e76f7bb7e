"""Qwen2 and Qwen2.5 (Math included): pre-norm RMSNorm, biases on q, k and v only, often tied embeddings."""

from models.families.common import (
    ATTENTION,
    DENSE_CONSTANTS,
    DENSE_FIELDS,
    EMBEDDING,
    GATED_MLP,
    HEAD,
    QKV_BIAS,
    ROTARY_BUFFERS,
    TIED_COPY,
)
from models.families.family import Family

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    table=(EMBEDDING, *ATTENTION, QKV_BIAS, *GATED_MLP, *HEAD),
    fields=DENSE_FIELDS,
    constants=DENSE_CONSTANTS | {"add_qkv_bias": True},
    requires={"hidden_act": "silu", "attention_dropout": 0.0},
    buffers=ROTARY_BUFFERS,
    tied_copy=TIED_COPY,
    windows=True,
)
