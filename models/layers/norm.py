"""RMSNorm that knows sequence and tensor parallelism, with backward passes that keep only input and scale."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.layers import RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, distributed


class _RMSNorm(torch.autograd.Function):
    """y = weight * (x / rms(x)), statistics in fp32, rounded before the gain or, if `gain_in_fp32`, after it.

    With a group, its ranks share out the last dimension, and each keeps its part.
    """

    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, eps: float, gain_in_fp32: bool, group=None) -> Tensor:
        wide = states.float()
        scale = torch.rsqrt(_mean(wide.pow(2), group) + eps)  # [..., 1]
        ctx.group = group
        ctx.save_for_backward(states, weight, scale)
        if gain_in_fp32:
            return (wide * scale * weight.float()).to(states.dtype)
        return (wide * scale).to(states.dtype) * weight

    @staticmethod
    def backward(ctx, gradient: Tensor):
        states, weight, scale = ctx.saved_tensors
        wide = gradient.float()
        normed = states.float() * scale
        grad_weight = (wide * normed).flatten(0, -2).sum(0).to(weight.dtype)
        wide = wide * weight.float()
        inner = _mean(wide * normed, ctx.group)
        wide = torch.addcmul(wide, normed, inner, value=-1).mul_(scale)
        return wide.to(gradient.dtype), grad_weight, None, None, None


def _mean(values: Tensor, group) -> Tensor:
    """The mean over the last dimension, which the ranks of a group share out: [..., 1]."""
    if group is None or group.size() == 1:
        return values.mean(-1, keepdim=True)
    total = values.sum(-1, keepdim=True)
    distributed.all_reduce(total, group=group)
    return total / (values.shape[-1] * group.size())


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019, arXiv:1910.07467).

    Under sequence parallelism each rank sees a part of the tokens; the attribute `sequence_parallel` of
    the weight tells megatron-core to sum its gradient over tensor-parallel ranks.
    """

    gain_in_fp32 = False  # as transformers rounds most models' norms

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_unused):
        super().__init__()
        self.eps = eps
        device = torch.cuda.current_device()
        weight = torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # megatron-core's mark

    def forward(self, states: Tensor) -> Tensor:
        """states [..., hidden_size]; returns the same shape and dtype."""
        return _RMSNorm.apply(states, self.weight, self.eps, self.gain_in_fp32)


class FP32GainRMSNorm(RMSNorm):
    """RMSNorm that multiplies by its gain in fp32, as some models do; the same in fp32."""

    gain_in_fp32 = True


class ProjectionNorm(MegatronModule):
    """RMSNorm of queries or keys over all heads at once, heads split over tensor-parallel ranks.

    The sum of squares spans the ranks, and so do the gains: each rank holds those of its own heads.
    """

    def __init__(self, config, hidden_size: int, eps: float, *, heads: int, tp_group):
        super().__init__(config=config)
        self.eps, self.tp_group = eps, tp_group
        width = hidden_size * heads // tp_group.size()
        weight = torch.ones(width, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = torch.nn.Parameter(weight)
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, states: Tensor) -> Tensor:
        """states [..., this rank's heads, head_dim]; returns the same shape and dtype."""
        flat = states.flatten(-2)
        return _RMSNorm.apply(flat, self.weight, self.eps, True, self.tp_group).view_as(states)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """The gains, split over tensor-parallel ranks by head."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class PostNormLinear(RowParallelLinear):
    """A block's output projection and the norm of its output, which the residual is added to."""

    norm = FP32GainRMSNorm  # of all models that norm after a block

    def __init__(self, input_size: int, output_size: int, *, config, **options):
        super().__init__(input_size, output_size, config=config, **options)
        assert self.bias is None, "a bias would have to be added before the norm"
        self.post_norm = self.norm(config, output_size, eps=config.layernorm_epsilon)

    def forward(self, states: Tensor) -> tuple[Tensor, None]:
        """states [tokens, batch, this rank's width]; under sequence parallelism the output is this rank's tokens."""
        output, _ = super().forward(states)
        return self.post_norm(output), None
