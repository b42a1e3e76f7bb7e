"""Native experts: one grouped matrix product over all experts of a rank, with biases and clamped gated units.

Expert and expert tensor parallelism are megatron-core's: its dispatcher brings tokens sorted by expert, and sums
what the ranks of an expert's tensor-parallel group hand back.
"""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.layers.gated import gated_unit
from models.layers.recompute import again, parts_of


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
        return torch._grouped_mm(tokens, self.weight.transpose(1, 2), offs=ends)


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
        counts = tokens_per_expert.to(tokens.device)
        ends = counts.cumsum(0).to(torch.int32)
        hidden = self.linear_fc1(tokens, ends)
        if self.linear_fc1.bias is not None:
            hidden = hidden + self.linear_fc1.bias.repeat_interleave(counts, 0, output_size=len(tokens))
        config = self.config
        limit, offset = config.activation_func_clamp_value, config.glu_linear_offset
        unit = gated_unit(hidden, config.activation_func, limit, offset)
        if "activation" in parts_of(config):
            again(unit, partial(gated_unit, hidden.detach(), config.activation_func, limit, offset))
        output = self.linear_fc2(unit, ends)
        if self.linear_fc2.bias is not None:
            bias = self.linear_fc2.bias.repeat_interleave(counts, 0, output_size=len(tokens))
            # One rank adds it, but every rank holds it and must find its gradient.
            output = output + (bias if self.tp_group.rank() == 0 else bias - bias.detach())
        return (output * weights[:, None]).to(tokens.dtype)

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
