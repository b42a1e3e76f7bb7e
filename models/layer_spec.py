"""Which layers a model is built from: Transformer Engine's, or native torch within megatron-core's own frame.

Both give checkpoints with the same keys and shapes: a norm before a linear layer is named as Transformer
Engine's fused layer names it.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from models.description import ModelDescription
from models.layers.attention import PackedAttention
from models.layers.experts import GroupedExperts
from models.layers.mlp import GatedMLP
from models.layers.norm import FP32GainRMSNorm, PostNormLinear, ProjectionNorm, RMSNorm
from models.layers.recompute import marked_are_not_kept, parts_of
from models.layers.rope import Rope
from models.layers.router import PackedMoELayer, PackedRouter


def choose_backend(asked: str, *, cuda: bool, precision: str, missing: str | None) -> tuple[str, str]:
    """Returns (backend, why) for --backend auto|te|native; ValueError where the choice cannot run.

    missing: what keeps Transformer Engine from being used on this machine, or None.
    """
    native = _why_native(cuda, precision, missing)
    if asked == "te" and native:
        raise ValueError(f"--backend te cannot run here because {native}; use --backend native")
    if precision == "fp8" and (asked == "native" or native):
        reason = f" ({native})" if native else ""
        raise ValueError(f"--precision fp8 needs --backend te on a GPU with Transformer Engine installed{reason}")
    if asked == "native":
        return "native", "asked for"
    if native:
        return "native", native
    return "te", "asked for" if asked == "te" else "a GPU and Transformer Engine are there"


def _why_native(cuda: bool, precision: str, missing: str | None) -> str | None:
    """What keeps Transformer Engine's layers from being used, or None."""
    if not cuda:
        return "no GPU is visible"
    if missing is not None:
        return missing
    if precision == "fp32":
        return "Transformer Engine's attention has no fp32"
    return None


def is_plain_causal(description: ModelDescription) -> bool:
    """Whether attention is causal and nothing else in every layer: neither windows nor sinks."""
    fields = description.transformer
    return fields.get("softmax_type", "vanilla") == "vanilla" and "window_size" not in fields


class PackedLayer(TransformerLayer):
    """megatron-core's layer; experts are told which tokens are real where it would hand over a padding mask."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.recomputed = parts_of(self.config)
        for norm in (self.input_layernorm, self.pre_mlp_layernorm):
            if isinstance(norm, RMSNorm):
                norm.recompute = "norm" in self.recomputed

    def forward(self, *args, **kwargs):
        if self.is_moe_layer:
            kwargs["padding_mask"] = kwargs["packed_seq_params"].routed
        with marked_are_not_kept() if self.recomputed else nullcontext():
            return super().forward(*args, **kwargs)


def native_layer_spec(description: ModelDescription, ropes: tuple[Rope, ...], groups: Any) -> ModuleSpec:
    """A layer from megatron-core's parallel linears and Lathe's attention, norms and experts."""
    post_norm = description.post_norm
    before: type = IdentityOp if post_norm else _norm(description)
    output: type = PostNormLinear if post_norm else RowParallelLinear
    query_norm, key_norm = qk_norms(description, groups, of_head=RMSNorm)
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=partial(PackedAttention, ropes=ropes),
            linear_proj=output,
            q_layernorm=query_norm,
            k_layernorm=key_norm,
        ),
    )
    keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if "num_moe_experts" in description.transformer:
        experts = MoESubmodules(experts=GroupedExperts, router=PackedRouter)
        mlp = ModuleSpec(module=PackedMoELayer, submodules=experts, params={"pg_collection": groups})
    else:
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=output)
        # megatron-core 0.16.1 gives the group to its own class alone.
        mlp = ModuleSpec(module=GatedMLP, submodules=linears, params={"tp_group": groups.tp})
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=PackedLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=before,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=before,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=keys,
        ),
    )


def _norm(description: ModelDescription) -> type:
    return FP32GainRMSNorm if description.gain_in_fp32 else RMSNorm


def qk_norms(description: ModelDescription, groups: Any, *, of_head: type) -> tuple[Any, Any]:
    """The norms of queries and keys: none, of each head by itself (`of_head`), or over all heads at once."""
    if description.qk_norm == "head":
        return of_head, of_head
    if description.qk_norm == "none":
        return IdentityOp, IdentityOp
    fields = description.transformer
    heads = (fields["num_attention_heads"], fields["num_query_groups"])
    query, key = (ModuleSpec(module=ProjectionNorm, params={"heads": n, "tp_group": groups.tp}) for n in heads)
    return query, key


def block_spec(
    backend: str, layers: int, description: ModelDescription, ropes: tuple[Rope, ...], groups: Any
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage and the final norm."""
    if backend == "native":
        spec = native_layer_spec(description, ropes, groups)
        return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=_norm(description))
    from models.te_spec import te_block_spec

    return te_block_spec(layers, description, ropes, groups)


def attention_kernel(backend: str, device: torch.device, dtype: torch.dtype, description: ModelDescription) -> str:
    """Which attention reads a microbatch: "te", "varlen" (flash, on CUDA, not for fp32) or "padded"."""
    if backend == "te" and is_plain_causal(description):
        return "te"
    return "varlen" if device.type == "cuda" and dtype != torch.float32 else "padded"


def parameter_dtype(precision: str) -> torch.dtype:
    """The dtype of weights and activations for --precision fp32|bf16|fp8."""
    return torch.float32 if precision == "fp32" else torch.bfloat16
