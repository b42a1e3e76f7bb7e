"""Qwen2 and Qwen2.5 (Math included): pre-norm RMSNorm, biases on q, k and v only, often tied embeddings."""

from models.families import common
from models.families.family import Family

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    table=(common.EMBEDDING, *common.ATTENTION, common.QKV_BIAS, *common.GATED_MLP, *common.HEAD),
    fields=common.DENSE_FIELDS,
    constants=common.DENSE_CONSTANTS | {"add_qkv_bias": True},
    requires={"hidden_act": "silu", "attention_dropout": 0.0},
    buffers=common.ROTARY_BUFFERS,
    tied_copy=common.TIED_COPY,
    windows=True,
)
