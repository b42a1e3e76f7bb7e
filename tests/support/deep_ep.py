"""DeepEP's two calls, as megatron-core makes them, over whatever collectives there are: tokens by all-to-all.

What is asked of its arguments is what DeepEP's kernels ask: experts by number with -1 for none, weights in fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from megatron.core.tensor_parallel import all_to_all
from torch import Tensor, distributed

SENT: list[int] = []  # tokens that left a rank in each dispatch, counted once for each rank that got them


@dataclass(frozen=True)
class Handle:
    """What came where, for the way back."""

    group: Any
    tokens: Tensor  # int64: the token of each row that was sent, sorted by rank
    sent: list[int]
    received: list[int]
    count: int


def dispatch(
    x: Tensor,
    token_indices: Tensor,
    token_probs: Tensor,
    num_experts: int,
    group: Any,
    async_finish: bool = False,
    allocate_on_comm_stream: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Handle]:
    """Sends each token once to every rank that holds an expert of its own."""
    assert token_indices.dtype == torch.int64 and token_probs.dtype == torch.float32 and x.is_contiguous()
    assert token_indices.shape == token_probs.shape and int(token_indices.max()) < num_experts
    ranks, local = group.size(), num_experts // group.size()
    taken = [torch.where(token_indices // local == rank, token_indices - rank * local, -1) for rank in range(ranks)]
    tokens = [(one >= 0).any(1).nonzero()[:, 0] for one in taken]
    sent = [len(one) for one in tokens]
    counts = torch.zeros(ranks, dtype=torch.int64)
    distributed.all_to_all_single(counts, torch.tensor(sent), group=group)
    handle = Handle(group, torch.cat(tokens), sent, counts.tolist(), len(x))
    SENT.append(sum(sent))
    indices = torch.cat([one[rows] for one, rows in zip(taken, tokens, strict=True)])
    probs = torch.cat([token_probs[rows].where(one[rows] >= 0, 0) for one, rows in zip(taken, tokens, strict=True)])
    received = [all_to_all(group, part, handle.received, sent) for part in (x[handle.tokens], indices, probs)]
    return *received, torch.bincount(received[1][received[1] >= 0], minlength=local), handle


def combine(
    x: Tensor, group: Any, handle: Handle, async_finish: bool = False, allocate_on_comm_stream: bool = False
) -> tuple[Tensor, None]:
    """Sends rows back and adds up those of each token; zeros for a token that went nowhere."""
    back = all_to_all(group, x, handle.sent, handle.received)
    return back.new_zeros((handle.count, x.shape[1])).index_add(0, handle.tokens, back), None


@contextlib.contextmanager
def in_place() -> Iterator[None]:
    """Puts these calls where megatron-core looks for DeepEP's."""
    from megatron.core.transformer.moe import token_dispatcher

    calls = {"fused_dispatch": dispatch, "fused_combine": combine, "set_deepep_num_sms": lambda number: None}
    with mock.patch.multiple(token_dispatcher, **calls):
        yield
