"""The first weights of a run: master weights are the base model's own numbers, rounded nowhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.checkpointing.shards import MASTER, Shard, gather_weights


@torch.no_grad()
def fill_weights(shards: Sequence[Shard], chunks: list, read: Callable[..., Tensor]) -> None:
    """Fills this rank's boxes from `read(key, offsets, shape)`, then every rank's weights from their owners.

    So each number is read by one data-parallel rank, in whatever dtype it lies; master weights take it as it is.
    """
    for shard in shards:
        values = read(shard.key, shard.offsets, tuple(shard.weight.shape))
        if MASTER in shard.states:
            shard.states[MASTER].copy_(values)
        shard.weight.copy_(values)
    gather_weights(chunks)
