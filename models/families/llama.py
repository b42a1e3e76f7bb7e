"""Llama 3.x: pre-norm RMSNorm, grouped-query attention, SwiGLU, no biases, rope with llama3 scaling."""

from models.families.common import (
    ATTENTION,
    DENSE_CONSTANTS,
    DENSE_FIELDS,
    EMBEDDING,
    GATED_MLP,
    HEAD,
    ROTARY_BUFFERS,
    TIED_COPY,
)
from models.families.family import Family

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    table=(EMBEDDING, *ATTENTION, *GATED_MLP, *HEAD),
    fields=DENSE_FIELDS,
    constants=DENSE_CONSTANTS | {"add_qkv_bias": False},
    requires={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0},
    harmless=("pretraining_tp",),
    buffers=ROTARY_BUFFERS,
    tied_copy=TIED_COPY,
)
