"""RMSNorm that knows sequence parallelism, with a backward pass that keeps only the input and its scale."""

from __future__ import annotations

import torch
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """y = weight * (x / rms(x)), statistics in fp32, as transformers computes it."""

    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = states.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # [..., 1]
        ctx.save_for_backward(states, weight, scale)
        return (wide * scale).to(states.dtype) * weight

    @staticmethod
    def backward(ctx, gradient: Tensor):
        states, weight, scale = ctx.saved_tensors
        wide = gradient.float()
        normed = states.float() * scale
        grad_weight = (wide * normed).flatten(0, -2).sum(0).to(weight.dtype)
        wide = wide * weight.float()
        inner = (wide * normed).mean(-1, keepdim=True)
        return torch.addcmul(wide, normed, inner, value=-1).mul_(scale).to(gradient.dtype), grad_weight, None


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019, arXiv:1910.07467).

    Under sequence parallelism each rank sees a part of the tokens; the attribute `sequence_parallel` of
    the weight tells megatron-core to sum its gradient over tensor-parallel ranks.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_unused):
        super().__init__()
        self.eps = eps
        device = torch.cuda.current_device()
        weight = torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # megatron-core's mark

    def forward(self, states: Tensor) -> Tensor:
        """states [..., hidden_size]; returns the same shape and dtype."""
        return _RMSNorm.apply(states, self.weight, self.eps)
