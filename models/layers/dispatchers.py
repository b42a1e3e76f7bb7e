"""megatron-core's token dispatchers, told that padding goes nowhere.

Written against 0.16.1: `tests/models/layers/test_dispatchers.py` runs them, DeepEP's kernels replaced by collectives.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
    MoETokenDispatcher,
    _DeepepManager,
)
from torch import Tensor


class PackedAlltoAll(MoEAlltoAllTokenDispatcher):
    """Knows how many rows its tokens have: the fused permutation would make rows for padding, too."""

    real_tokens = 0  # of the tokens that come next, set by the layer

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """routing_map bool [tokens, experts] -> int64 [experts of this rank]."""
        tokens_per_expert = super().preprocess(routing_map)
        self.num_out_tokens = self.real_tokens * self.config.moe_router_topk
        return tokens_per_expert


class _PackedDeepEP(_DeepepManager):
    """Names a token's experts by number, -1 for none: megatron-core gives padding the first ones, at weight 0."""

    def setup_metadata(self, routing_map: Tensor, probs: Tensor) -> None:
        """routing_map bool and probs, both [tokens, ranks, experts of a rank]."""
        chosen, weights = routing_map.flatten(1), probs.flatten(1)
        # What is chosen comes first, also where its weight is 0.
        indices = weights.masked_fill(~chosen, -1).topk(self.router_topk, dim=-1).indices
        self.token_probs = weights.gather(1, indices)
        self.token_indices = indices.masked_fill(~chosen.gather(1, indices), -1)

    def _indices_to_multihot(self, indices: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, topk] of this rank's experts, -1 for none -> bool and weights, both [tokens, experts of this rank].

        megatron-core's own waits for the device in each of three boolean selections.
        """
        experts = self.num_local_experts
        place = indices.long().masked_fill(indices < 0, experts)  # beside the last, and cut off
        shape = (len(indices), experts + 1)
        chosen = indices.new_zeros(shape).scatter_(1, place, 1)[:, :-1].bool()
        return chosen, probs.new_zeros(shape).scatter(1, place, probs)[:, :-1].contiguous()


class PackedFlex(MoEFlexTokenDispatcher):
    """Tokens by DeepEP. Its kernels are written for, not yet run."""

    def __init__(self, num_local_experts: int, local_expert_indices: list[int], config, pg_collection=None):
        super().__init__(num_local_experts, local_expert_indices, config, pg_collection=pg_collection)
        self._comm_manager = _PackedDeepEP(
            group=self.tp_ep_group,
            num_local_experts=num_local_experts,
            router_topk=self.tp_size * config.moe_router_topk,
            num_experts=self.tp_size * config.num_moe_experts,
            config=config,
        )

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """As megatron-core's, which compiles it, and again for every number of tokens."""
        self.hidden_shape = hidden_states.shape
        self._comm_manager.setup_metadata(*self._initialize_metadata(routing_map, probs))
        return hidden_states.view(-1, self.hidden_shape[-1]), self._comm_manager.token_probs


def fused_permutation() -> bool:
    """Whether Transformer Engine's kernels can sort tokens by expert: one for each way, and none waits for the device.

    Written, not yet run.
    """
    names = ("permute", "permute_with_probs", "sort_chunks_by_index", "sort_chunks_by_index_with_probs", "unpermute")
    kernels = [getattr(moe_utils, f"fused_{name}", None) for name in names]
    return torch.cuda.is_available() and None not in kernels


KINDS = {"alltoall": PackedAlltoAll, "flex": PackedFlex}  # in the place of megatron-core's own


def forget_graph(dispatcher: MoETokenDispatcher) -> None:
    """Lets go of a step's graph, which would keep the whole model, by its hooks, from ever being freed."""
    dispatcher.probs = dispatcher.local_probs = None
    if isinstance(dispatcher, PackedFlex):
        for name in ("token_probs", "dispatched_probs", "handle"):
            setattr(dispatcher._comm_manager, name, None)
