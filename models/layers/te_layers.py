"""Transformer Engine's layers where megatron-core's own forms of them lack something that a family needs.

Imported only where Transformer Engine is there: the classes are subclasses of its own.
"""

from __future__ import annotations

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm, TERowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import TEGroupedMLP
from torch import Tensor
from torch.nn import Parameter

from models.layers.experts import add_weighted_bias, weighted
from models.layers.gated import unit_of
from models.layers.rope import Rope, rotate


class RotaryTEAttention(MegatronModule):
    """Transformer Engine's core attention behind the same rotary wrapper as the native one."""

    def __init__(self, config, layer_number: int, *, ropes: tuple[Rope, ...], **options):
        super().__init__(config=config)
        self.rope = ropes[layer_number - 1]
        self.inner = TEDotProductAttention(config=config, layer_number=layer_number, **options)

    def forward(self, query, key, value, attention_mask=None, *, packed_seq_params, **options):
        """Rotates query and key [tokens, heads, dim] by document position, then attends."""
        tables = packed_seq_params.tables(self.rope, query.dtype)
        query, key = rotate(query, *tables), rotate(key, *tables)
        params = packed_seq_params.for_transformer_engine()
        return self.inner(query, key, value, attention_mask, packed_seq_params=params, **options)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Nothing: what it keeps of FP8 is none of the model's weights."""
        return {}


class TEPostNormLinear(TERowParallelLinear):
    """A block's output projection and the norm of its output, which the residual is added to."""

    def __init__(self, input_size: int, output_size: int, *, config, **options):
        super().__init__(input_size, output_size, config=config, **options)
        assert not self.te_return_bias, "a bias would have to be added before the norm"
        self.post_norm = TENorm(config, output_size, eps=config.layernorm_epsilon)

    def forward(self, states: Tensor) -> tuple[Tensor, None]:
        """states [tokens, batch, this rank's width]; under sequence parallelism the output is this rank's tokens."""
        output, _ = super().forward(states)
        return self.post_norm(output), None


class TEExperts(TEGroupedMLP):
    """megatron-core's experts, a parameter for each, under the keys and global shapes of `GroupedExperts`."""

    def __init__(self, num_local_experts: int, config, submodules, pg_collection=None):
        super().__init__(num_local_experts, config, submodules, pg_collection)
        self.dp_group = pg_collection.expt_dp
        for parameter in self.parameters():
            # Reduced over the ranks that hold the same experts, also where megatron-core goes by ep alone.
            parameter.allreduce = False
        if self.tp_group.size() > 1:  # Transformer Engine, told nothing of these ranks, marks weights alone as split
            for name, parameter in self.linear_fc1.named_parameters():
                if name.startswith("bias"):
                    set_tensor_model_parallel_attributes(parameter, True, 0, 1)

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """tokens [tokens, hidden] sorted by expert, tokens_per_expert [experts], weights [tokens]; as `GroupedExperts`.

        Like megatron-core's own, but for the gated unit and the biases: these are Lathe's, a kernel each.
        """
        counts = tokens_per_expert.tolist()  # Transformer Engine wants them on the host: a layer waits here
        rows, given = tokens, counts
        if self.config.fp8:
            rows, counts = self.quantization_padding(tokens, given)
            weights, _ = self.quantization_padding(weights[:, None], given)
            weights = weights.flatten()
        hidden, _ = self.linear_fc1(rows, counts)
        unit = self._recomputed_unit if self.activation_recompute else self._unit
        output, biases = self.linear_fc2(unit(hidden, weights), counts)
        if self.activation_recompute:
            self.activation_checkpoint.discard_output_and_register_recompute(output)
        if biases is not None:
            ends = torch.tensor(counts, device=output.device).cumsum(0).to(torch.int32)
            # One rank of an expert's adds them, but every rank holds them and must find their gradients.
            adds = self.tp_group.rank() == 0
            output = add_weighted_bias(output, torch.stack(tuple(biases)), weights, ends, adds=adds)
        return (self.quantization_unpadding(output, given) if self.config.fp8 else output), None

    def _unit(self, hidden: Tensor, weights: Tensor) -> Tensor:
        return weighted(unit_of(self.config, hidden), weights)

    def _recomputed_unit(self, hidden: Tensor, weights: Tensor) -> Tensor:
        self.activation_checkpoint = CheckpointWithoutOutput()
        return self.activation_checkpoint.checkpoint(self._unit, hidden, weights)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Slices of global tensors [experts, ...]: each expert's own, and of it this rank's feed-forward part."""
        found = {}
        for layer, axis in (("linear_fc1", 0), ("linear_fc2", 1)):
            for name, parameter in getattr(self, layer).named_parameters():
                kind = name.rstrip("0123456789")  # "weight" or "bias"
                split = axis if kind == "weight" or axis == 0 else None
                expert = int(name.removeprefix(kind))
                key = f"{prefix}{layer}.{kind}"
                found[f"{prefix}{layer}.{name}"] = self._sharded(key, parameter, expert, split)
        return found

    def _sharded(
        self, key: str, parameter: Parameter, expert: int, axis: int | None
    ) -> ShardedTensor | ShardedTensorFactory:
        """`axis` is that of the parameter which the ranks of an expert share out; 0 of gates above ups."""
        etp, rank, local = self.tp_group.size(), self.tp_group.rank(), self.num_local_experts
        first = (0, self.ep_group.rank() * local + expert, self.ep_group.size() * local)
        replica = (0, rank if axis is None else 0, self.dp_group.rank())

        def piece(key: str, data: Tensor, *split: tuple[int, int, int]) -> ShardedTensor:
            return ShardedTensor.from_rank_offsets(key, data, first, *split, replica_id=replica, prepend_axis_num=1)

        def halves(key: str, tensor: Tensor, _replica, _flattened) -> list[ShardedTensor]:
            parts = enumerate(tensor.chunk(2, dim=0))
            return [piece(key, half, (1, rank + number * etp, 2 * etp)) for number, half in parts]

        if axis == 0:
            return ShardedTensorFactory(key, parameter, halves, torch.cat, replica)
        return piece(key, parameter) if axis is None else piece(key, parameter, (1 + axis, rank, etp))
