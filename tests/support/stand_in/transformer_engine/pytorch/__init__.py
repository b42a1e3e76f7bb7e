"""The modules that megatron-core takes from Transformer Engine."""

from transformer_engine.pytorch import distributed, ops
from transformer_engine.pytorch.attention import DotProductAttention
from transformer_engine.pytorch.fp8 import fp8_autocast, fp8_model_init
from transformer_engine.pytorch.module.grouped import Fp8Padding, Fp8Unpadding, GroupedLinear
from transformer_engine.pytorch.module.linear import LayerNormLinear, Linear
from transformer_engine.pytorch.module.norm import RMSNorm

__all__ = [
    "DotProductAttention",
    "Fp8Padding",
    "Fp8Unpadding",
    "GroupedLinear",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "distributed",
    "fp8_autocast",
    "fp8_model_init",
    "ops",
]
