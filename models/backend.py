"""Which layers a model is built from: Transformer Engine's, or native torch within megatron-core's own frame.

Both give checkpoints with the same keys and shapes: a norm before a linear layer is named as Transformer
Engine's fused layer names it.
"""

from __future__ import annotations

import importlib.util
from functools import partial

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from models.attention import PackedAttention
from models.norm import RMSNorm
from models.rope import Rope, rotate


def choose_backend(asked: str, *, cuda: bool, precision: str) -> tuple[str, str]:
    """Returns (backend, why) for --backend auto|te|native; ValueError where the choice cannot run."""
    installed = importlib.util.find_spec("transformer_engine") is not None
    if asked == "te" and not (installed and cuda):
        missing = "Transformer Engine is not installed" if not installed else "no GPU is visible"
        raise ValueError(f"--backend te cannot run here because {missing}; use --backend native")
    if asked == "native" or (asked == "auto" and not (installed and cuda)):
        if precision == "fp8":
            raise ValueError("--precision fp8 needs --backend te on a GPU with Transformer Engine installed")
        if asked == "native":
            return "native", "asked for"
        return "native", "no GPU is visible" if not cuda else "Transformer Engine is not installed"
    if precision == "fp32":
        if asked == "te":
            raise ValueError("--backend te computes attention in bf16 or fp8 only; use --backend native for fp32")
        return "native", "Transformer Engine's attention has no fp32"
    return "te", "asked for" if asked == "te" else "a GPU and Transformer Engine are there"


class RotaryTEAttention(MegatronModule):
    """Transformer Engine's core attention behind the same rotary wrapper as the native one."""

    def __init__(self, config, layer_number: int, *, ropes: tuple[Rope, ...], inner: type, **options):
        super().__init__(config=config)
        self.rope = ropes[layer_number - 1]
        self.inner = inner(config=config, layer_number=layer_number, **options)

    def forward(self, query, key, value, attention_mask=None, *, packed_seq_params, **options):
        """Rotates query and key [tokens, heads, dim] by document position, then attends."""
        tables = packed_seq_params.tables(self.rope, query.dtype)
        query, key = rotate(query, *tables), rotate(key, *tables)
        params = packed_seq_params.for_transformer_engine()
        return self.inner(query, key, value, attention_mask, packed_seq_params=params, **options)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """The inner module's state under this module's name, so that both backends share keys."""
        return self.inner.sharded_state_dict(prefix, sharded_offsets, metadata)


def native_layer_spec(ropes: tuple[Rope, ...]) -> ModuleSpec:
    """A dense pre-norm layer from megatron-core's parallel linears and Lathe's attention and norm."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=partial(PackedAttention, ropes=ropes),
                    linear_proj=RowParallelLinear,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def te_layer_spec(ropes: tuple[Rope, ...]) -> ModuleSpec:
    """megatron-core's own Transformer Engine layer with the rotary wrapper around its core attention."""
    spec = get_gpt_layer_with_transformer_engine_spec()
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = partial(RotaryTEAttention, ropes=ropes, inner=attention.core_attention)
    return spec


def block_spec(backend: str, layers: int, ropes: tuple[Rope, ...]) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage and the final norm."""
    if backend == "native":
        return TransformerBlockSubmodules(layer_specs=[native_layer_spec(ropes)] * layers, layer_norm=RMSNorm)
    from megatron.core.extensions.transformer_engine import TENorm

    return TransformerBlockSubmodules(layer_specs=[te_layer_spec(ropes)] * layers, layer_norm=TENorm)


def attention_kernel(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Which attention reads a microbatch: "te", "varlen" (flash, on CUDA, not for fp32) or "padded"."""
    if backend == "te":
        return "te"
    return "varlen" if device.type == "cuda" and dtype != torch.float32 else "padded"


def parameter_dtype(precision: str) -> torch.dtype:
    """The dtype of weights and activations for --precision fp32|bf16|fp8."""
    return torch.float32 if precision == "fp32" else torch.bfloat16
