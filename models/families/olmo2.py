"""OLMo 2: norms after attention and feed-forward, queries and keys normed over the whole projection."""

from models.families.common import (
    DENSE_CONSTANTS,
    DENSE_FIELDS,
    EMBEDDING,
    FC1,
    FC2,
    HEAD,
    POST_ATTENTION_NORM,
    POST_MLP_NORM,
    PROJ,
    PROJECTION_QK_NORM,
    QKV,
    ROTARY_BUFFERS,
    TIED_COPY,
)
from models.families.family import Family

FAMILY = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    table=(EMBEDDING, QKV, *PROJECTION_QK_NORM, PROJ, POST_ATTENTION_NORM, FC1, FC2, POST_MLP_NORM, *HEAD),
    fields=DENSE_FIELDS,
    constants=DENSE_CONSTANTS | {"add_qkv_bias": False},
    requires={"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0},
    buffers=ROTARY_BUFFERS,
    tied_copy=TIED_COPY,
    post_norm=True,
    gain_in_fp32=True,
    qk_norm="projection",
)
