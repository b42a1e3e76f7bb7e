"""Qwen3, dense: pre-norm RMSNorm, queries and keys normed head by head, no biases."""

from models.families import common
from models.families.family import Family

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    table=(common.EMBEDDING, *common.ATTENTION, *common.HEAD_QK_NORM, *common.GATED_MLP, *common.HEAD),
    fields=common.DENSE_FIELDS,
    constants=common.DENSE_CONSTANTS | {"add_qkv_bias": False},
    requires={"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0},
    buffers=common.ROTARY_BUFFERS,
    tied_copy=common.TIED_COPY,
    windows=True,
    qk_norm="head",
)
