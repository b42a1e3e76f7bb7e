"""RMSNorm that knows sequence and tensor parallelism, with backward passes that keep only input and scale."""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.tensor_parallel.layers import RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, distributed

from models.layers.fused import fused
from models.layers.recompute import again


@fused(fixed="weight")
def _normed(states: Tensor, weight: Tensor, eps: float, gain_in_fp32: bool) -> tuple[Tensor, Tensor]:
    """(y, 1 / rms(x) [..., 1])."""
    wide = states.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return _with_gain(wide * scale, weight, gain_in_fp32, states.dtype), scale


def _with_gain(normed: Tensor, weight: Tensor, gain_in_fp32: bool, dtype: torch.dtype) -> Tensor:
    if gain_in_fp32:
        return (normed * weight.float()).to(dtype)
    return normed.to(dtype) * weight


# Between the two stages of the gains' gradient: fp32 sums over 16 tokens each, as torch.compile cuts them.
@fused(fixed="weight", kernels=3, scratch=1 / 16)
def _gradients(gradient: Tensor, states: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of states and gains."""
    wide = gradient.float()
    normed = states.float() * scale
    grad_weight = (wide * normed).flatten(0, -2).sum(0).to(weight.dtype)
    wide = wide * weight.float()
    inner = (wide * normed).mean(-1, keepdim=True)
    wide = torch.addcmul(wide, normed, inner, value=-1).mul_(scale)
    return wide.to(gradient.dtype), grad_weight


# Where the last dimension is shared out over ranks, a sum over them lies between two fused parts.
@fused()
def _squares(states: Tensor) -> Tensor:
    return states.float().pow(2).sum(-1, keepdim=True)


@fused(fixed="weight")
def _scaled(states: Tensor, weight: Tensor, scale: Tensor, gain_in_fp32: bool) -> Tensor:
    return _with_gain(states.float() * scale, weight, gain_in_fp32, states.dtype)


@fused(fixed="weight", kernels=3, scratch=1 / 16)
def _products(gradient: Tensor, states: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's part of the sum that the gradient of states needs [..., 1], and the gradient of its gains."""
    wide = gradient.float()
    normed = states.float() * scale
    grad_weight = (wide * normed).flatten(0, -2).sum(0).to(weight.dtype)
    return (wide * weight.float() * normed).sum(-1, keepdim=True), grad_weight


@fused(fixed="weight")
def _input_gradient(gradient: Tensor, states: Tensor, weight: Tensor, scale: Tensor, inner: Tensor) -> Tensor:
    wide = gradient.float() * weight.float()
    return torch.addcmul(wide, states.float() * scale, inner, value=-1).mul_(scale).to(gradient.dtype)


def _mean(total: Tensor, width: int, group) -> Tensor:
    """The mean over a last dimension of which each rank of a group has summed up its `width` numbers: [..., 1]."""
    distributed.all_reduce(total, group=group)
    return total / (width * group.size())


class _RMSNorm(torch.autograd.Function):
    """y = weight * (x / rms(x)), statistics in fp32, rounded before the gain or, if `gain_in_fp32`, after it.

    With a group, its ranks share out the last dimension, and each keeps its part.
    """

    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, eps: float, gain_in_fp32: bool, group=None) -> Tensor:
        ctx.group = group if group is not None and group.size() > 1 else None
        if ctx.group is None:
            output, scale = _normed(states, weight, eps, gain_in_fp32)
        else:
            scale = torch.rsqrt(_mean(_squares(states), states.shape[-1], ctx.group) + eps)
            output = _scaled(states, weight, scale, gain_in_fp32)
        ctx.save_for_backward(states, weight, scale)
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor):
        states, weight, scale = ctx.saved_tensors
        if ctx.group is None:
            grad_states, grad_weight = _gradients(gradient, states, weight, scale)
        else:
            inner, grad_weight = _products(gradient, states, weight, scale)
            inner = _mean(inner, states.shape[-1], ctx.group)
            grad_states = _input_gradient(gradient, states, weight, scale, inner)
        return grad_states, grad_weight, None, None, None


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019, arXiv:1910.07467).

    Under sequence parallelism each rank sees a part of the tokens; the attribute `sequence_parallel` of
    the weight tells megatron-core to sum its gradient over tensor-parallel ranks.
    """

    gain_in_fp32 = False  # as transformers rounds most models' norms
    recompute = False  # whether its output is computed again in the backward pass; set by the layer

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_unused):
        super().__init__()
        self.eps = eps
        device = torch.cuda.current_device()
        weight = torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # megatron-core's mark

    def forward(self, states: Tensor) -> Tensor:
        """states [..., hidden_size]; returns the same shape and dtype."""
        output = _RMSNorm.apply(states, self.weight, self.eps, self.gain_in_fp32)
        if self.recompute:
            held = (states.detach(), self.weight.detach(), self.eps, self.gain_in_fp32)
            again(output, partial(_RMSNorm.apply, *held))
        return output


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
