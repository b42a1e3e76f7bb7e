"""Tokens to the experts that this rank holds itself, and back: no communication, and no waiting for the device.

What a layer of experts waits for, by how its tokens travel (megatron-core 0.16.1):

- Where all experts are here (ep and etp 1), native ones for nothing; Transformer Engine's want their row counts on the
  host, and so wait once a layer. How many rows the experts get together is known on the host before the step: each real
  token has `topk` of them. So rows are placed by counting, and a token's outputs are added up by reading them, in fp32
  and in one order, where megatron-core adds them one by one in the weights' dtype by atomics.
- By `alltoall`, once a layer: the sizes of the messages are counts that the device has made, and NCCL wants them on the
  host. Without fused permutation (Transformer Engine's, `moe_permute_fusion`) four boolean selections and the chunks'
  sizes wait as well.
- By `allgather`, for the number of rows of this rank's experts, and in the boolean selections.
- By `flex`, within DeepEP, which tells the host how many tokens arrive, and in the boolean selections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where tokens lie among the rows of experts, which are sorted by expert and within an expert by token."""

    chosen: Tensor  # int64 [rows]: token * experts + expert
    tokens: Tensor  # int64 [rows]: the token
    rows: Tensor  # int64 [tokens, topk]: a token's rows; of padding the first row, which stands for none
    padding: Tensor | None  # bool [tokens, 1]; None where there is no padding
    tokens_per_expert: Tensor  # int64 [experts]


def find_places(chosen: Tensor, real: Tensor, *, topk: int, real_tokens: int) -> Places:
    """Counts out the places of tokens.

    chosen: bool [tokens, experts], `topk` of each real token and none of padding; real: bool [tokens], of which
    `real_tokens` are True.
    """
    tokens, experts = chosen.shape
    count = real_tokens * topk
    # [tokens, experts]: the row of each choice; what is not chosen is written behind the last row, and cut off.
    row = chosen.t().reshape(-1).cumsum(0).view(experts, tokens).t() - 1
    every = torch.arange(tokens * experts, device=chosen.device)
    flat = every.new_empty(count + 1).scatter_(0, torch.where(chosen, row, count).reshape(-1), every)[:count]
    place = torch.where(chosen, chosen.cumsum(1) - 1, topk)
    rows = row.new_zeros((tokens, topk + 1)).scatter_(1, place, row)[:, :topk]
    padding = None
    if real_tokens < tokens:
        padding = ~real[:, None]
        rows = rows.masked_fill(padding, 0)
    return Places(
        chosen=flat,
        tokens=flat // experts,
        rows=rows.contiguous(),
        padding=padding,
        tokens_per_expert=chosen.sum(0),
    )


def to_experts(states: Tensor, weights: Tensor, places: Places) -> tuple[Tensor, Tensor]:
    """states [tokens, hidden], weights [tokens, experts] -> the experts' rows [rows, hidden], their weights [rows]."""
    return _Spread.apply(states, places), weights.reshape(-1).index_select(0, places.chosen)


def from_experts(outputs: Tensor, places: Places) -> Tensor:
    """outputs [rows, hidden] -> [tokens, hidden], the sum of each token's; zeros for padding."""
    return _Collect.apply(outputs, places)


def _sums(rows: Tensor, places: Places) -> Tensor:
    tokens, topk = places.rows.shape
    if not len(rows):  # padding alone
        return rows.new_zeros((tokens, rows.shape[1]))
    gathered = rows.index_select(0, places.rows.view(-1)).view(tokens, topk, -1)
    total = gathered.sum(1)  # in fp32, rounded once
    return total if places.padding is None else total.masked_fill_(places.padding, 0)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return states.index_select(0, places.tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        return _sums(gradient, ctx.places), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return _sums(rows, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        return gradient.index_select(0, ctx.places.tokens), None
