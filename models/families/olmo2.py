"""OLMo 2: norms after attention and feed-forward, queries and keys normed over the whole projection."""

from models.families import common
from models.families.family import Family

FAMILY = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    table=(
        common.EMBEDDING,
        common.QKV,
        *common.PROJECTION_QK_NORM,
        common.PROJ,
        common.POST_ATTENTION_NORM,
        common.FC1,
        common.FC2,
        common.POST_MLP_NORM,
        *common.HEAD,
    ),
    fields=common.DENSE_FIELDS,
    constants=common.DENSE_CONSTANTS | {"add_qkv_bias": False},
    requires={"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0},
    buffers=common.ROTARY_BUFFERS,
    tied_copy=common.TIED_COPY,
    post_norm=True,
    gain_in_fp32=True,
    qk_norm="projection",
)
