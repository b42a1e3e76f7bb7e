"""RMSNorm: statistics and gain in fp32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from transformer_engine.pytorch.module.base import refuse


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = states.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(states.dtype)


class RMSNorm(torch.nn.Module):
    """The norm as a module; `hidden_size` is the older name of its width."""

    def __init__(
        self,
        normalized_shape: Iterable[int] | int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        refuse(zero_centered_gamma=zero_centered_gamma)
        assert set(kwargs) <= {"device", "dtype", "sm_margin"}, kwargs
        width = normalized_shape if hidden_size is None else hidden_size
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=params_dtype, device=kwargs.get("device")))  # type: ignore[arg-type]
        if sequence_parallel is not None:
            self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def reset_parameters(self, defer_init: bool | None = None) -> None:
        torch.nn.init.ones_(self.weight)

    def forward(self, states: Tensor) -> Tensor:
        return rms_norm(states, self.weight, self.eps)
