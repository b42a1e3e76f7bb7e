"""What model, layout, precision and experts allow together, and megatron-core's config of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import math

from engine.config import MoeConfig, RunConfig
from engine.fp8 import check_fp8
from engine.host import device_versions
from engine.layout import Layout, check_expert_widths, check_layout, check_sequence
from models.backend import is_plain_causal
from models.build import TransformerConfig, recomputed_parts, transformer_config
from models.description import ModelDescription
from models.layers.dispatchers import fused_permutation
from models.layers.fused import compiler_fault


def check_model(
    config: RunConfig, description: ModelDescription, world_size: int, *, pad_multiple: int, cuda: bool = False
) -> None:
    """Refuses what model, layout and sizes do not allow together; needs neither weights nor data."""
    layout: Layout = config.layout
    check_layout(layout, world_size, description)
    check_experts(config.moe, description)
    check_expert_widths(layout, description, 4 if config.precision == "fp32" else 2)
    check_sequence(layout, config.seq_len, pad_multiple)
    if config.precision == "fp8":
        tokens = config.seq_len * config.micro_batch_size
        check_fp8(config.fp8, layout, tokens, description, device_versions() if cuda else None)
    if config.seq_len > description.max_position_embeddings:
        raise ValueError(
            f"--seq-len {config.seq_len} exceeds the model's max_position_embeddings "
            f"{description.max_position_embeddings}; lower it or give --override.max-position-embeddings"
        )


def check_experts(moe: MoeConfig, description: ModelDescription) -> None:
    """Refuses --moe flags for a model without experts."""
    changed = [
        f"--moe.{field.name.replace('_', '-')}"
        for field in dataclasses.fields(MoeConfig)
        if getattr(moe, field.name) != field.default
    ]
    if changed and "num_moe_experts" not in description.transformer:
        raise ValueError(f"{', '.join(changed)}: this model has no experts; leave it out")


def check_machine(config: RunConfig, *, cuda: bool) -> None:
    """Refuses what this machine cannot do."""
    check_dispatcher(config, cuda=cuda)
    if cuda and (fault := compiler_fault()):
        raise ValueError(fault)
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("--log.wandb needs Weights & Biases, which is not installed: pip install 'lathe[track]'")


def check_dispatcher(config: RunConfig, *, cuda: bool) -> None:
    """Refuses --moe.dispatcher flex where DeepEP is not there or cannot do what is asked of it."""
    if config.moe.dispatcher != "flex":
        return
    reason, ranks = None, config.ep * config.etp
    if ranks == 1:
        reason = "sends tokens to other ranks' experts and needs --ep or --etp above 1"
    elif config.precision == "fp32":
        reason = "sends bf16 alone, which --precision fp32 does not have"
    elif config.deterministic:
        reason = "sends tokens in no promised order, which --deterministic asks for"
    elif not cuda:
        reason = "is DeepEP, whose kernels need GPUs, and none is visible"
    else:
        reason = _why_no_deepep(ranks)
    if reason:
        raise ValueError(f"--moe.dispatcher flex {reason}: use --moe.dispatcher alltoall")


def _why_no_deepep(ranks: int) -> str | None:
    """What keeps DeepEP from serving so many ranks, or None."""
    try:
        buffer = importlib.import_module("deep_ep").Buffer
    except (ImportError, OSError, AttributeError) as error:  # a library of CUDA's that is missing is an OSError
        return f"is DeepEP, which cannot be imported ({error})"
    try:
        buffer.get_dispatch_config(ranks)
    except AssertionError:
        return f"is DeepEP, which does not know groups of --ep times --etp = {ranks} ranks"
    return None


def present(config: RunConfig, description: ModelDescription, backend: str) -> set[str]:
    """What of `engine.mcore_fields.NEEDS` a run has."""
    te, fp8, layout = backend == "te", config.precision == "fp8", config.layout
    delayed = config.fp8 == "delayed"
    has = {
        "te": te,
        "te and cp": te and layout.cp > 1 and is_plain_causal(description),
        "delayed": fp8 and delayed,
        "not delayed": fp8 and not delayed,
        "bf16 layers": fp8 and not delayed and config.mcore.get("first_last_layers_bf16", False) is True,
        "full": config.recompute == "full",
        "batched p2p": layout.pp > 1 and layout.vpp == 1,
        "vpp": layout.vpp > 1,
        "sp": layout.sp,
        "experts": "num_moe_experts" in description.transformer,
    }
    return {name for name, there in has.items() if there}


def check_settings(config: RunConfig, description: ModelDescription, backend: str) -> None:
    """Refuses what --mcore and --recompute-modules ask of layers that cannot do it; ValueError in one sentence."""
    fields, layout = description.transformer, config.layout
    if config.recompute == "selective":
        recomputed_parts(config.recompute_modules, description, backend, config.precision)
    at_once = config.mcore.get("recompute_num_layers", 1)
    assert isinstance(at_once, int)
    if config.mcore.get("recompute_method", "uniform") == "uniform":
        stages = layout.stages or (fields["num_layers"] // layout.pp // layout.vpp,)
        common = math.gcd(*stages)
        if common % at_once:  # megatron-core 0.16.1 asks for layers past the last
            choices = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise ValueError(
                f"--mcore.recompute_num_layers {at_once} does not divide the layers of each pipeline stage "
                f"({', '.join(map(str, stages))}): choose among {choices}, or give --mcore.recompute_method block"
            )
    if config.mcore.get("cp_comm_type") == "a2a":
        heads, groups = (fields[name] // layout.tp for name in ("num_attention_heads", "num_query_groups"))
        if heads % layout.cp or groups % layout.cp:
            raise ValueError(
                f"--mcore.cp_comm_type a2a shares out the {heads} attention heads and {groups} key-value heads of a "
                f"tensor-parallel rank, and --cp {layout.cp} does not divide both: give p2p"
            )


def megatron_config(config: RunConfig, description: ModelDescription, backend: str = "native") -> TransformerConfig:
    """megatron-core's config of a run; ValueError for what --mcore or the layout ask of it in vain."""
    has_experts = "num_moe_experts" in description.transformer
    fields: dict[str, object] = {"deterministic_mode": config.deterministic}
    if has_experts:
        fields["moe_token_dispatcher_type"] = config.moe.dispatcher
        # Where tokens stay on their rank, `models.layers.dispatch` places them without it.
        fields["moe_permute_fusion"] = (
            config.ep * config.etp > 1 and config.moe.dispatcher != "allgather" and fused_permutation()
        )
    check_settings(config, description, backend)
    try:
        return transformer_config(
            description,
            layout=config.layout,
            precision=config.precision,
            recompute=config.recompute,
            recompute_modules=config.recompute_modules,
            backend=backend,
            fp8=config.fp8,
            extra=fields | config.mcore,
        )
    except (AssertionError, ValueError, TypeError) as error:
        given = " ".join(f"--mcore.{name}={value}" for name, value in config.mcore.items())
        raise ValueError(f"megatron-core refuses {given or 'this configuration'}: {error}") from None
