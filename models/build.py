"""A model description -> megatron-core modules of this rank, and their weights straight from Hugging Face files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from models.backend import parameter_dtype
from models.description import ModelDescription
from models.layers.gated import quick_gelu
from models.layers.loss import loss_sum
from models.layers.rope import Rope
from models.native_spec import native_block_spec

_ACTIVATIONS = {"silu": F.silu, "quick_gelu": quick_gelu}
# Parts that can be computed again, as megatron-core's Transformer Engine layers know them.
_TE_PARTS = {"norm": "layernorm", "activation": "moe_act", "mlp": "mlp"}
SHARDING_METADATA = {
    # Layers are named one by one, whatever stage they live on: keys do not depend on the layout.
    "non_homogeneous_layers": True,
    "singleton_local_shards": False,
}


class PackedModel(GPTModel):
    """megatron-core's GPT over packed documents, whose last stage returns a sum of token losses."""

    def __init__(self, *args, true_vocab_size: int, **kwargs):
        super().__init__(*args, position_embedding_type="none", **kwargs)
        self.true_vocab_size = true_vocab_size

    def _postprocess(self, hidden_states, *args, labels=None, packed_seq_params=None, **kwargs):
        """Returns hidden states between stages, the loss sum (a scalar) with labels, else logits."""
        if labels is None or not self.post_process:
            kwargs = {**kwargs, "packed_seq_params": packed_seq_params}
            return super()._postprocess(hidden_states, *args, labels=labels, **kwargs)
        tp_group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=tp_group)
        elif tp_group.size() > 1:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=tp_group)
        weight = self.output_layer.weight
        # The layer is not called, so its hook, which waits for the weight's all-gather, is called here.
        for hook in self.output_layer._forward_pre_hooks.values():
            hook(self.output_layer, ())
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        hidden = hidden_states.flatten(0, 1).index_select(0, packed_seq_params.supervised)  # [tokens, hidden]
        by_source = packed_seq_params.by_source
        return loss_sum(hidden, weight, labels, vocab_size=self.true_vocab_size, group=tp_group, by_source=by_source)


def _leave_alone(weight: Tensor) -> Tensor:
    return weight


_ALWAYS = {
    "calculate_per_token_loss": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    # Initialisation also marks which parameters are split over ranks; weights are loaded, not drawn.
    "perform_initialization": True,
    "init_method": _leave_alone,
    "output_layer_init_method": _leave_alone,
    "embedding_init_method": _leave_alone,
    "variable_seq_lengths": False,
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
    "bias_dropout_fusion": False,
    "bias_activation_fusion": False,  # on CUDA the gated unit is Lathe's
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
}


def recomputed_parts(
    asked: Sequence[str], description: ModelDescription, backend: str, precision: str = "bf16"
) -> tuple[str, ...]:
    """The parts that --recompute selective computes again: those asked for, or what costs next to nothing.

    ValueError for parts that these layers do not have, or could not compute again by themselves.
    """
    experts, te = "num_moe_experts" in description.transformer, backend == "te"
    why_not = {
        "norm": "this model's norms stand behind its blocks and are not kept" if description.post_norm else None,
        "activation": None,
        "mlp": "this model has experts in place of dense layers; give experts" if experts else None,
        "experts": None if experts else "this model has no experts; give mlp",
    }
    if te and not experts:
        fused = "Transformer Engine computes norms as one with the products behind them; give mlp, or --recompute full"
        why_not["norm"] = why_not["norm"] or fused
        if precision == "fp8":
            why_not["activation"] = "the product behind it keeps its output in FP8, not as it came; give mlp"
    elif te:
        why_not["experts"] = "Transformer Engine's experts compute their activation alone again; give activation"
    for part in asked:
        if (reason := why_not[part]) is not None:
            raise ValueError(f"--recompute-modules {part} has no effect: {reason}")
    found = tuple(asked) or tuple(part for part in ("norm", "activation") if why_not[part] is None)
    if not found:
        raise ValueError(
            "--recompute selective finds nothing under --precision fp8 in layers without experts that costs little to "
            "compute again: give --recompute-modules mlp, --recompute full or --recompute none"
        )
    return found


def transformer_config(
    description: ModelDescription,
    *,
    layout: Any,
    precision: str,
    recompute: str = "none",
    recompute_modules: Sequence[str] = (),
    backend: str = "native",
    fp8: str = "tensorwise",
    extra: dict[str, Any] | None = None,
) -> TransformerConfig:
    """Turns a description into megatron-core's config. `layout` has tp, cp, pp, vpp, ep, etp, sp, stages.

    `recompute` is none, selective (of `recompute_modules`, see `recomputed_parts`) or full.
    `extra` holds TransformerConfig fields the user set by hand; they win.
    """
    dtype = parameter_dtype(precision)
    fields = dict(description.transformer)
    fields["activation_func"] = _ACTIVATIONS[fields["activation_func"]]
    fields |= _ALWAYS | {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        # megatron-core's experts cannot add a bias once under expert tensor parallelism; ours can, and take the
        # degree from their groups.
        "expert_tensor_parallel_size": 1 if fields["add_bias_linear"] else layout.etp,
        "sequence_parallel": layout.sp,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        # With two stages the batched form matches a rank's messages up wrongly: both neighbours are one rank.
        "batch_p2p_comm": layout.vpp == 1,
        "overlap_p2p_comm": layout.vpp > 1,
    }
    if layout.stages:
        parts = ["t" * count for count in layout.stages]
        fields["pipeline_model_parallel_layout"] = "E" + "|".join(parts) + "L"
    if "num_moe_experts" in fields and precision != "fp32":
        fields["moe_router_dtype"] = "fp32"  # logits of close experts differ in digits that bf16 has not
    if precision == "fp8":
        fields |= {"fp8": "hybrid", "fp8_recipe": fp8}
    recomputed: tuple[str, ...] = ()
    if recompute == "selective":
        recomputed = recomputed_parts(recompute_modules, description, backend, precision)
    if recompute == "full":
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif recomputed:
        modules = [_TE_PARTS[part] for part in recomputed] if backend == "te" else list(recomputed)
        # Without experts megatron-core's own check would refuse the names; what it cannot do then, Lathe does.
        theirs = backend == "te" and "num_moe_experts" in fields
        fields |= {"recompute_granularity": "selective", "recompute_modules": modules if theirs else []}
        fields["moe_grouped_gemm"] = "num_moe_experts" in fields  # asked of those whose activation is recomputed
    config = TransformerConfig(**(fields | (extra or {})))
    if recomputed:
        config.recompute_modules = modules
    return config


def model_ropes(description: ModelDescription) -> tuple[Rope, ...]:
    """One rotary table a layer; layers with equal parameters share the object."""
    built: dict[str, Rope] = {}
    ropes = []
    for parameters in description.rope:
        key = repr(sorted(parameters.items(), key=str))
        if key not in built:
            head_dim = description.transformer["kv_channels"]
            built[key] = Rope.from_parameters(parameters, head_dim, description.max_position_embeddings)
        ropes.append(built[key])
    return tuple(ropes)


def build_chunks(
    description: ModelDescription, config: TransformerConfig, *, backend: str, groups: Any
) -> list[PackedModel]:
    """Builds this rank's model chunks: one, or `vpp` of them under interleaved pipeline parallelism.

    Weights are allocated and not initialised: load them next.
    """
    stages = config.virtual_pipeline_model_parallel_size or 1
    pp_size, pp_rank = groups.pp.size(), groups.pp.rank()
    ropes = model_ropes(description)
    block_spec = _block_spec(backend)
    chunks = []
    for stage in range(stages):
        first = pp_rank == 0 and stage == 0
        last = pp_rank == pp_size - 1 and stage == stages - 1
        layers = get_num_layers_to_build(config, stage if stages > 1 else None, pp_rank)
        spec = block_spec(layers, description, ropes, groups)
        if not last:
            spec.layer_norm = None
        chunks.append(
            PackedModel(
                config,
                spec,
                vocab_size=description.padded_vocab_size,
                max_sequence_length=description.max_position_embeddings,
                pre_process=first,
                post_process=last,
                share_embeddings_and_output_weights=description.tied,
                pg_collection=groups,
                vp_stage=stage if stages > 1 else None,
                true_vocab_size=description.vocab_size,
            )
        )
        for module in chunks[-1].modules():
            if hasattr(module, "fuse_wgrad_accumulation"):  # Transformer Engine's: added to main_grad by the product
                module.fuse_wgrad_accumulation = True
    return chunks


def _block_spec(backend: str) -> Callable[..., TransformerBlockSubmodules]:
    """What describes the layers of a stage; Transformer Engine's are imported where they are asked for."""
    if backend == "native":
        return native_block_spec
    from models.te_spec import te_block_spec

    return te_block_spec


def sharded_tensors(chunk: PackedModel, metadata: dict) -> Iterator[ShardedTensor]:
    """Yields this rank's pieces of global tensors; their `.data` are views of the parameters."""
    pending = list(chunk.sharded_state_dict(metadata=metadata).values())
    while pending:
        entry = pending.pop(0)
        if isinstance(entry, ShardedTensorFactory):
            built = entry.build()
            pending = list(built.values() if isinstance(built, dict) else built) + pending
        elif isinstance(entry, ShardedTensor):
            yield entry


@torch.no_grad()
def load_weights(chunks: list[PackedModel], metadata: dict, read: Callable[..., Tensor]) -> int:
    """Fills every parameter of this rank from `read(key, global offset, local shape)`; returns bytes read."""
    read_bytes = 0
    for chunk in chunks:
        for piece in sharded_tensors(chunk, metadata):
            # A parameter of one expert is a slice of the global tensor of all.
            shape = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
            values = read(piece.key, tuple(piece.global_offset), shape)
            piece.data.copy_(values.view(piece.local_shape))
            read_bytes += values.numel() * values.element_size()
    return read_bytes
