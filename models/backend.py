"""Which layers a run is built from, Transformer Engine's or native ones, and which attention and dtypes follow."""

from __future__ import annotations

import importlib.util

import torch
from torch.nn import attention

from models.description import ModelDescription


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
        return "Transformer Engine's layers are taken in bf16 and fp8 alone"
    return None


def is_plain_causal(description: ModelDescription) -> bool:
    """Whether attention is causal and nothing else in every layer: neither windows nor sinks."""
    fields = description.transformer
    return fields.get("softmax_type", "vanilla") == "vanilla" and "window_size" not in fields


def attention_kernel(backend: str, device: torch.device, dtype: torch.dtype, description: ModelDescription) -> str:
    """Which attention reads a microbatch: "te", "varlen" (flash, on CUDA, not for fp32) or "padded"."""
    if backend == "te" and is_plain_causal(description):
        return "te"
    return "varlen" if device.type == "cuda" and dtype != torch.float32 else "padded"


def activate_flash_attention_3(deterministic: bool) -> bool:
    """Puts FlashAttention 3 behind torch's variable-length kernel, and says whether it stands there.

    On Hopper alone, where torch (2.10 and later) offers it and its package is installed; not where runs must repeat bit
    for bit, which was not looked into.
    """
    if deterministic or torch.cuda.get_device_capability()[0] != 9:
        return False
    offered: list[str] = getattr(attention, "list_flash_attention_impls", list)()
    if "FA3" not in offered or importlib.util.find_spec("flash_attn_interface") is None:
        return False
    try:
        attention.activate_flash_attention_impl("FA3")
    except (ImportError, OSError, RuntimeError):  # built for another torch, or without a backward pass
        return False
    return True


def parameter_dtype(precision: str) -> torch.dtype:
    """The dtype of weights and activations for --precision fp32|bf16|fp8."""
    return torch.float32 if precision == "fp32" else torch.bfloat16
