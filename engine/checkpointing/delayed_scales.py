"""What FP8's delayed recipe carries from step to step: scales, and the largest numbers that they come from.

Transformer Engine keeps them in its modules. They are saved as one vector a rank, for that rank of the same layout:
under another layout, as after another precision, they start anew, and the steps that follow choose them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.checkpointing.shards import Shard
from engine.checkpointing.store_reader import StoreReader
from engine.layout import Layout

PREFIX = "fp8."  # of such keys of a checkpoint


class DelayedScales:
    """This rank's scales; none where the run has another precision or recipe."""

    def __init__(self, chunks: Sequence[Any], layout: Layout, rank: int):
        self._kept = list(_kept(chunks))
        count = sum(tensor.numel() for tensor in self._kept)
        self._vector = torch.zeros(count, device=self._kept[0].device if self._kept else None)
        degrees = "-".join(f"{name}{getattr(layout, name)}" for name in ("tp", "cp", "pp", "vpp", "ep", "etp"))
        self._key = f"{PREFIX}delayed_scales.{degrees}.rank_{rank}"

    def shards(self) -> list[Shard]:
        """What to save of them; `note` brings it up to date."""
        if not self._kept:
            return []
        return [Shard(key=self._key, shape=tuple(self._vector.shape), offsets=(0,), weight=self._vector)]

    def note(self) -> None:
        """Takes what the modules hold into what is saved."""
        if self._kept:
            torch.cat([tensor.flatten() for tensor in self._kept], out=self._vector)

    def load(self, store: StoreReader) -> bool:
        """Gives the modules what was saved for them; False where there is nothing of this layout."""
        if self._key not in store or store.shape(self._key) != tuple(self._vector.shape):
            return not self._kept
        parts = store.read(self._key).to(self._vector.device).split([tensor.numel() for tensor in self._kept])
        for tensor, part in zip(self._kept, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
        return True


def _kept(chunks: Sequence[Any]) -> Iterator[Tensor]:
    """The modules' tensors, made where the first step has not made them yet."""
    for chunk in chunks:
        config = chunk.config
        if config.fp8_recipe != "delayed" or not config.fp8:
            continue
        from megatron.core.fp8_utils import get_fp8_context

        with get_fp8_context(config):
            for module in chunk.modules():
                if hasattr(module, "fuse_wgrad_accumulation"):  # Transformer Engine's, that multiply
                    module.init_fp8_metadata(num_gemms=getattr(module, "num_gemms", 1))
                    for direction in ("scaling_fwd", "scaling_bwd"):
                        state = module.fp8_meta[direction]
                        yield from (state.scale, state.amax_history)
