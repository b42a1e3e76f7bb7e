"""FP8 recipes: how scales are chosen. Fields and their order are those of Transformer Engine 2.12."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from typing import Literal, NamedTuple


class Format(Enum):
    """Of forward and backward numbers: E4M3 for both, or E5M2 for gradients alone."""

    E4M3 = "e4m3"
    E5M2 = "e5m2"
    HYBRID = "hybrid"


class MMParams(NamedTuple):
    """How a product accumulates; of no consequence here."""

    use_split_accumulator: bool = True


FAST, PRECISE = MMParams(False), MMParams(True)


class Recipe:
    """What all recipes have in common."""

    def delayed(self) -> bool:
        return isinstance(self, DelayedScaling)

    def mxfp8(self) -> bool:
        return isinstance(self, MXFP8BlockScaling)


@dataclass(init=False)
class DelayedScaling(Recipe):
    """A scale a tensor, from the largest numbers of earlier steps."""

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: Literal["max", "most_recent"] | Callable = "max"
    scaling_factor_compute_algo: Callable | None = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False

    def __init__(self, **given: object):
        """Arguments that are no fields are ignored, as by the real class, which pydantic makes."""
        for field in fields(type(self)):
            setattr(self, field.name, given.get(field.name, field.default))


@dataclass
class Float8CurrentScaling(Recipe):
    """A scale a tensor, from its own largest number."""

    use_power_2_scales: bool = False
    fp8_format: Format = Format.HYBRID
    fp8_gemm_fprop: MMParams = FAST
    fp8_gemm_dgrad: MMParams = PRECISE
    fp8_gemm_wgrad: MMParams = PRECISE
    fp8_dpa: bool = False
    fp8_mha: bool = False


@dataclass
class MXFP8BlockScaling(Recipe):
    """A power of two every 32 numbers."""

    margin: int = 0
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False


@dataclass
class Float8BlockScaling(Recipe):
    """A scale every 128 numbers of activations and gradients, and every 128 x 128 of weights."""

    use_f32_scales: bool = False
    fp8_format: Format = Format.E4M3
    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1
    fp8_gemm_fprop: MMParams = PRECISE
    fp8_gemm_dgrad: MMParams = PRECISE
    fp8_gemm_wgrad: MMParams = PRECISE
    fp8_dpa: bool = False
    fp8_mha: bool = False
