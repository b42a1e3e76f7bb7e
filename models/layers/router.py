"""The router of experts over packed documents: padding is sent nowhere, and what each expert gets is counted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, distributed

from models.layers.dispatch import find_places, from_experts, to_experts
from models.layers.dispatchers import KINDS, forget_graph


@dataclass(frozen=True, kw_only=True)
class RoutedTokens:
    """What a router must know of its tokens [tokens], those of one tensor- and context-parallel rank."""

    real: Tensor  # bool [tokens], False for padding
    real_tokens: int  # how many are real, known without asking the device
    document: Tensor  # int64 [tokens]
    lengths: Tensor  # fp32 [documents], real tokens of the whole document, wherever they lie
    supervised: Tensor  # fp32 [documents], tokens of the whole document that bear a loss


class PackedRouter(TopKRouter):
    """megatron-core's top-k router, with statistics and an auxiliary loss that know documents and padding.

    The load-balancing loss (Fedus et al., 2021, arXiv:2101.03961, equation 4, with the shares of all top-k choices)
    is taken over each document and counts as often as the document has supervised tokens: like the loss, it is a
    sum that does not depend on how documents are packed, split over ranks or cut into microbatches.
    """

    aux_loss_coefficient = 0.0  # set by the model's builder

    def __init__(self, config, pg_collection=None):
        super().__init__(config=config, pg_collection=pg_collection)
        self.tokens_per_expert: Tensor | None = None  # int64 [experts], since the last `take_statistics`
        self.aux_loss: Tensor | None = None  # fp32, the auxiliary loss of all layers' tokens here, without coefficient

    def forward(self, states: Tensor, routed: RoutedTokens) -> tuple[Tensor, Tensor]:
        """states [tokens, 1, hidden]; returns (weights, choices), both [tokens, experts], zero for padding."""
        logits = self.gating(states)
        padding = ~routed.real
        weights, chosen = self.routing(logits, padding_mask=padding[:, None])
        chosen = chosen & routed.real[:, None]
        weights = weights.masked_fill(padding[:, None], 0.0)
        if torch.is_grad_enabled():  # not in evaluation, nor in the first of two passes of recomputation
            counts = chosen.sum(0)
            self.tokens_per_expert = counts if self.tokens_per_expert is None else self.tokens_per_expert + counts
            if self.aux_loss_coefficient:
                weights = self._balance(logits.flatten(0, 1), weights, chosen, routed)
        return weights, chosen

    def _balance(self, logits: Tensor, weights: Tensor, chosen: Tensor, routed: RoutedTokens) -> Tensor:
        """Hangs the auxiliary loss on `weights`; its value is kept for the metrics."""
        counts = torch.zeros((len(routed.lengths), chosen.shape[1]), dtype=torch.float32, device=chosen.device)
        counts.index_add_(0, routed.document, chosen.float())
        if self.tp_cp_group.size() > 1:  # a document's tokens lie on several ranks
            distributed.all_reduce(counts, group=self.tp_cp_group)
        lengths = routed.lengths.clamp_min(1)
        shares = counts / (lengths * self.topk)[:, None]  # [documents, experts]
        weight = (routed.supervised / lengths)[routed.document] * routed.real
        probabilities = logits.softmax(-1, dtype=torch.float32)
        each = (shares[routed.document] * probabilities).sum(-1)
        total = chosen.shape[1] * (each * weight).sum()
        self.aux_loss = total.detach() if self.aux_loss is None else self.aux_loss + total.detach()
        return MoEAuxLossAutoScaler.apply(weights, self.aux_loss_coefficient * total)

    def take_statistics(self) -> tuple[Tensor | None, Tensor | None]:
        """Returns tokens per expert and auxiliary loss since the last call, and starts anew."""
        found = self.tokens_per_expert, self.aux_loss
        self.tokens_per_expert = self.aux_loss = None
        return found


class PackedMoELayer(MoELayer):
    """megatron-core's mixture of experts, told by the packed documents which of its tokens are real."""

    def __init__(self, config, submodules=None, layer_number=None, pg_collection=None):
        super().__init__(config, submodules, layer_number, pg_collection)
        if kind := KINDS.get(config.moe_token_dispatcher_type):
            arguments = (self.num_local_experts, self.local_expert_indices)
            self.token_dispatcher = kind(*arguments, config=config, pg_collection=pg_collection)

    @property
    def all_experts_here(self) -> bool:
        """Whether tokens need no communication."""
        return self.token_dispatcher.ep_size * self.token_dispatcher.tp_size == 1

    def forward(self, states: Tensor, padding_mask: RoutedTokens):
        """states [tokens, 1, hidden]. The second argument bears the name by which a layer hands it over."""
        weights, chosen = self.router(states, padding_mask)
        if self.all_experts_here:
            return self._forward_here(states, weights, chosen, padding_mask), None
        real_tokens = padding_mask.real_tokens
        if real_tokens == 0 and self.config.moe_permute_fusion:
            # The kernels hand back what they are given where that is no row at all: one of padding goes, at weight 0.
            chosen, real_tokens = _with_one_token(chosen, self.config.moe_router_topk), 1
        self.token_dispatcher.real_tokens = real_tokens
        dispatched, weights = self.preprocess(states, weights, chosen)
        dispatched, weights = self.dispatch(dispatched, weights)
        output, _ = self.routed_experts_compute(dispatched, weights)
        output = self.postprocess(self.combine(output), None)
        forget_graph(self.token_dispatcher)
        return output, None

    def _forward_here(self, states: Tensor, weights: Tensor, chosen: Tensor, routed: RoutedTokens) -> Tensor:
        real_tokens, topk = routed.real_tokens, self.config.moe_router_topk
        places = find_places(chosen, routed.real, topk=topk, real_tokens=real_tokens)
        rows, weights = to_experts(states.flatten(0, 1), weights, places)
        outputs, _ = self.experts(rows, places.tokens_per_expert, weights)
        return from_experts(outputs, places).view_as(states)


def _with_one_token(chosen: Tensor, topk: int) -> Tensor:
    """chosen [tokens, experts], where the first token goes to the first experts."""
    places = torch.arange(chosen.numel(), device=chosen.device).view_as(chosen)
    return chosen | (places < topk)


def set_routers(chunks: list, *, aux_loss: float, frozen: bool) -> None:
    """Gives every router of a model the coefficient of its auxiliary loss, and stops its training if `frozen`."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, PackedRouter):
                module.aux_loss_coefficient = aux_loss
                for parameter in module.parameters():
                    parameter.requires_grad_(not frozen)
