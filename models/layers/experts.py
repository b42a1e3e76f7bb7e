"""Native experts: one grouped matrix product over all experts of a rank, with biases and clamped gated units.

Tokens come sorted by expert, see `models.layers.dispatch`. Under expert tensor parallelism the dispatcher sums what the
ranks of an expert's group hand back. Nothing in here waits for the device: where tokens of each expert end is a tensor,
which is copied to the device in the dispatchers that have waited for it on the host.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.layers.fused import fused
from models.layers.gated import unit_of
from models.layers.recompute import again, parts_of

_ONES = 8  # columns of a product with ones: a row of them has the 16 bytes that the grouped product asks of bf16


class ExpertLinear(torch.nn.Module):
    """Weights [experts, out, in] and biases [experts, out] of one linear layer of all experts of a rank."""

    def __init__(self, config, experts: int, width_in: int, width_out: int, *, split: int | None):
        super().__init__()
        where = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = torch.nn.Parameter(torch.empty((experts, width_out, width_in), **where))
        self.bias = None
        if config.add_bias_linear:
            self.bias = torch.nn.Parameter(torch.empty((experts, width_out), **where))
            self.bias.is_bias = True  # type: ignore[attr-defined]  # for the optimizer, which decays matrices
        for parameter, axis in ((self.weight, split), (self.bias, split if split == 1 else None)):
            if parameter is not None:
                # Reduced over the ranks that hold the same experts, also where that is not all of dp and cp.
                parameter.allreduce = False  # type: ignore[attr-defined]  # megatron-core's mark
                if axis is not None:
                    set_tensor_model_parallel_attributes(parameter, True, axis, 1)

    def forward(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """tokens [tokens, in] sorted by expert, ends [experts] int32; returns [tokens, out] without bias."""
        weight = self.weight
        if weight.is_cuda and _writes_empty_groups(weight.device):
            weight = _NoGradientWithoutRows.apply(weight, ends)
        return torch._grouped_mm(tokens, weight.transpose(1, 2), offs=ends)

    def add_bias(self, rows: Tensor, expert: Tensor | None, ends: Tensor, *, adds: bool = True) -> Tensor:
        """rows [tokens, out] with the bias, if any, of their expert [tokens]; adds: False leaves it to another rank."""
        return rows if self.bias is None else _AddBias.apply(rows, self.bias, expert, ends, adds)


class _AddBias(torch.autograd.Function):
    """Adds biases; their gradient is a grouped product with ones, which sums in fp32 and is rounded once.

    The gradient of an index is a sum by atomics, on CUDA rounded to the bias's dtype at every addition: in bf16 it is
    off by 5% at 2,048 tokens an expert.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bias: Tensor, expert: Tensor, ends: Tensor, adds: bool) -> Tensor:
        ctx.save_for_backward(ends)
        return bias.index_select(0, expert).add_(rows) if adds else rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        (ends,) = ctx.saved_tensors
        return gradient, sums_by_expert(gradient, ends), None, None, None


@fused()
def _product(rows: Tensor, weights: Tensor) -> Tensor:
    return (rows * weights[:, None]).to(rows.dtype)


@fused()
def _product_gradients(gradient: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of rows and weights."""
    wide = gradient.to(weights.dtype)
    return (wide * weights[:, None]).to(rows.dtype), (wide * rows).sum(-1)


class _Weighted(torch.autograd.Function):
    """See `weighted`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        return _product(rows, weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        return _product_gradients(gradient, *ctx.saved_tensors)


def weighted(rows: Tensor, weights: Tensor) -> Tensor:
    """rows [tokens, width] times weights [tokens] in fp32, rounded once to the rows' dtype."""
    return _Weighted.apply(rows, weights)


def experts_of_rows(count: int, ends: Tensor) -> Tensor:
    """int32 [count]: the expert of each row, where experts' rows end at `ends`; the last expert for rows behind."""
    places = torch.arange(count, device=ends.device, dtype=torch.int32)
    return torch.bucketize(places, ends, right=True, out_int32=True).clamp_max(len(ends) - 1)


def add_weighted_bias(rows: Tensor, bias: Tensor, weights: Tensor, ends: Tensor, *, adds: bool = True) -> Tensor:
    """rows [tokens, width] with their bias [experts, width] times weights [tokens]; `adds` as in `add_bias`."""
    nothing = rows.new_zeros((1, 1)).expand_as(rows)
    own = _AddBias.apply(nothing, bias, experts_of_rows(len(rows), ends), ends, adds)
    return rows + weighted(own, weights)


def sums_by_expert(rows: Tensor, ends: Tensor) -> Tensor:
    """rows [tokens, width] sorted by expert, ends [experts] int32 -> [experts, width]; rows after the last are none's.

    Zeros for an expert without rows.
    """
    rows = rows.contiguous()
    ones = rows.new_ones((len(rows), _ONES)).t()
    total = torch._grouped_mm(ones, rows, offs=ends)[:, 0] if len(rows) else rows.new_zeros((len(ends), rows.shape[1]))
    return total.masked_fill(_without_rows(ends)[:, None], 0)


def _without_rows(ends: Tensor) -> Tensor:
    """bool [experts]: which experts have no rows."""
    return ends.diff(prepend=ends.new_zeros(1)) == 0


class _NoGradientWithoutRows(torch.autograd.Function):
    """The identity, whose gradient is zero for an expert without rows."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(ends)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        (ends,) = ctx.saved_tensors
        return gradient.masked_fill(_without_rows(ends)[:, None, None], 0), None


@cache
def _writes_empty_groups(device: torch.device) -> bool:
    """Whether a grouped product leaves something else than zeros for an empty group: on Blackwell, pytorch#172439."""
    return torch.cuda.get_device_capability(device)[0] >= 10


class GroupedExperts(MegatronModule):
    """The experts of one rank; takes the place of megatron-core's GroupedMLP, which knows neither bias nor clamp."""

    def __init__(self, num_local_experts: int, config, submodules=None, pg_collection=None):
        super().__init__(config=config)
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        etp = self.tp_group.size()
        ffn, hidden = config.moe_ffn_hidden_size // etp, config.hidden_size
        split = etp > 1
        self.linear_fc1 = ExpertLinear(config, num_local_experts, hidden, 2 * ffn, split=1 if split else None)
        self.linear_fc2 = ExpertLinear(config, num_local_experts, ffn, hidden, split=2 if split else None)

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """tokens [tokens, hidden] sorted by expert, tokens_per_expert [experts], weights [tokens].

        Returns the experts' outputs times their weights, [tokens, hidden]; under expert tensor parallelism this
        rank's summand of them.
        """
        if "experts" in parts_of(self.config) and torch.is_grad_enabled():
            # Nothing is drawn at random, so no generator's state is kept.
            given = (tokens, tokens_per_expert, weights)
            return checkpoint(self._compute, *given, use_reentrant=False, preserve_rng_state=False), None
        return self._compute(tokens, tokens_per_expert, weights), None

    def _compute(self, tokens: Tensor, tokens_per_expert: Tensor, weights: Tensor) -> Tensor:
        ends = tokens_per_expert.to(tokens.device, non_blocking=True).cumsum(0).to(torch.int32)
        expert = None if self.linear_fc1.bias is None else experts_of_rows(len(tokens), ends)
        hidden = self.linear_fc1.add_bias(self.linear_fc1(tokens, ends), expert, ends)
        unit = unit_of(self.config, hidden)
        if "activation" in parts_of(self.config):
            again(unit, partial(unit_of, self.config, hidden.detach()))
        output = self.linear_fc2(unit, ends)
        # One rank adds it, but every rank holds it and must find its gradient.
        output = self.linear_fc2.add_bias(output, expert, ends, adds=self.tp_group.rank() == 0)
        return weighted(output, weights)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Global tensors [experts, ...]: a rank holds its experts, and of these its part of the feed-forward size."""
        return {
            f"{prefix}{name}": self._sharded(f"{prefix}{name}", parameter)
            for name, parameter in self.state_dict(keep_vars=True).items()
            if isinstance(parameter, Tensor)
        }

    def _sharded(self, key: str, parameter: Tensor) -> ShardedTensor | ShardedTensorFactory:
        etp, rank, edp_rank = self.tp_group.size(), self.tp_group.rank(), self.dp_group.rank()
        experts = (0, self.ep_group.rank(), self.ep_group.size())
        axis = getattr(parameter, "partition_dim", -1) if etp > 1 else -1
        replica = (0, 0 if axis >= 0 or etp == 1 else rank, edp_rank)
        if axis == 1:  # gates above ups, each split by itself
            return ShardedTensorFactory(key, parameter, _split_halves(experts, rank, etp), _join_halves, replica)
        offsets = (experts,) if axis < 0 else (experts, (axis, rank, etp))
        return ShardedTensor.from_rank_offsets(key, parameter, *offsets, replica_id=replica)


def _split_halves(experts: tuple[int, int, int], rank: int, etp: int):
    def build(key: str, tensor: Tensor, replica, flattened_range: slice | None):
        return [
            ShardedTensor.from_rank_offsets(key, half, experts, (1, rank + number * etp, 2 * etp), replica_id=replica)
            for number, half in enumerate(tensor.chunk(2, dim=1))
        ]

    return build


@torch.no_grad()
def _join_halves(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=1)
