"""Llama 3.x: pre-norm RMSNorm, grouped-query attention, SwiGLU, no biases, rope with llama3 scaling."""

from models.families import common
from models.families.family import Family

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    table=(common.EMBEDDING, *common.ATTENTION, *common.GATED_MLP, *common.HEAD),
    fields=common.DENSE_FIELDS,
    constants=common.DENSE_CONSTANTS | {"add_qkv_bias": False},
    requires={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0},
    harmless=("pretraining_tp",),
    buffers=common.ROTARY_BUFFERS,
    tied_copy=common.TIED_COPY,
)
