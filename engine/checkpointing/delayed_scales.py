"""What FP8's delayed recipe carries from step to step: scales, and the largest numbers that they come from.

Transformer Engine keeps them in its modules, the same on all ranks of a pipeline stage: largest numbers are taken over
all of them. A checkpoint has a vector for each module, by the name that the module has in the whole model, so that
another layout finds them too. Modules of which it has none, as of experts under another --ep, start anew.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpointing.directory import FP8, STATE
from engine.checkpointing.shards import Shard
from engine.checkpointing.store_reader import StoreReader
from engine.mesh import Mesh

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


class DelayedScales:
    """The scales of this rank's modules; none where the run has another precision or recipe."""

    def __init__(self, chunks: Sequence[Any], mesh: Mesh):
        self._kept = {f"{FP8}{name}": kept for chunk in chunks for name, kept in _kept(chunk)}
        self._vectors = {key: _joined(kept) for key, kept in self._kept.items()}
        self._writes = mesh.is_first_of_stage

    def shards(self) -> list[Shard]:
        """What to save of them; `note` brings it up to date."""
        return [
            Shard(key=key, shape=tuple(vector.shape), offsets=(0,), weight=vector, written=self._writes)
            for key, vector in self._vectors.items()
        ]

    def note(self) -> None:
        """Takes what the modules hold into what is saved."""
        for key, kept in self._kept.items():
            self._vectors[key].copy_(_joined(kept))

    def load(self, checkpoint: Path) -> int:
        """Gives the modules what was saved for them; returns how many start anew."""
        if not self._vectors:  # a store is not opened for nothing: of a large run its index alone takes a second
            return 0
        store, missing = StoreReader(checkpoint / STATE), 0
        for key, vector in self._vectors.items():
            if key in store and store.shape(key) == tuple(vector.shape):
                _put_back(self._kept[key], store.read(key).to(vector.device))
            else:
                missing += 1
        return missing

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Leaves the scales as they are, whatever passes are made inside: those without gradients note numbers, too."""
        before = {key: _joined(kept) for key, kept in self._kept.items()}
        try:
            yield
        finally:
            for key, kept in self._kept.items():
                _put_back(kept, before[key])


def _joined(kept: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in kept])


def _put_back(kept: Sequence[Tensor], vector: Tensor) -> None:
    parts = vector.split([tensor.numel() for tensor in kept])
    for tensor, part in zip(kept, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def _kept(chunk: Any) -> Iterator[tuple[str, list[Tensor]]]:
    """Names in the whole model and tensors, made where the first step has not made them yet."""
    config = chunk.config
    if not config.fp8 or config.fp8_recipe != "delayed":
        return
    from megatron.core.fp8_utils import get_fp8_context

    with get_fp8_context(config):
        for name, module in chunk.named_modules():
            if not hasattr(module, "fuse_wgrad_accumulation"):  # what Transformer Engine multiplies with has it
                continue
            module.init_fp8_metadata(num_gemms=getattr(module, "num_gemms", 1))
            states = (module.fp8_meta["scaling_fwd"], module.fp8_meta["scaling_bwd"])
            yield _name(chunk, name), [tensor for state in states for tensor in (state.scale, state.amax_history)]


def _name(chunk: Any, name: str) -> str:
    """A module's name with its layer's number in the whole model instead of that in the stage."""
    found = _LAYER.match(name)
    if found is None:
        return name
    layer = chunk.decoder.layers[int(found[1])].layer_number - 1
    return f"decoder.layers.{layer}.{name[found.end() :]}"
