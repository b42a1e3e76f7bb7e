"""What this rank holds of the model and its optimizer, as boxes of global tensors.

megatron-core's distributed optimizer gives each data-parallel rank a run of every parameter's flattened elements. Such
a run is a few boxes of the parameter, and so of the global tensor that the parameter is a part of: each rank writes and
reads just these, under any layout, and nothing is gathered. (Its own `fully_reshardable` gathers 12 bytes a parameter,
and in megatron-core 0.16.1 cuts them at wrong places once a gradient buffer has several buckets,
https://github.com/NVIDIA/Megatron-LM/pull/5077.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from engine.checkpointing.boxes import Box, boxes_of_run, flat_start, place_of
from models.build import sharded_tensors

MASTER = "param"  # megatron-core's name of master weights among the states


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A box of a global model tensor, with this rank's views of the weight and of the optimizer's states there.

    `states` holds `exp_avg`, `exp_avg_sq` and, where the model is not fp32, the master weights. A weight that is not
    trained is held whole by every rank, and has master weights alone: an export gives back the base model's numbers.
    All views have the shape of the box.
    """

    key: str
    shape: tuple[int, ...]  # of the global tensor
    offsets: tuple[int, ...]
    weight: Tensor
    states: dict[str, Tensor] = field(default_factory=dict)
    written: bool = True  # False where another rank has the same box and writes it

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything in the box with the key under which a checkpoint holds it."""
        yield self.key, self.weight
        for name, tensor in self.states.items():
            yield state_key(name, self.key), tensor


def state_key(name: str, key: str) -> str:
    """Under which a checkpoint holds a state of the optimizer, by the key of the model's tensor."""
    return f"optimizer.state.{name}.{key}"


@dataclass(frozen=True)
class _Owned:
    """The run of a parameter's flattened elements that this rank's optimizer updates."""

    start: int
    stop: int
    states: dict[str, Tensor]  # flat, of the run


def own_shards(chunks: list, optimizer: Any, metadata: dict) -> list[Shard]:
    """All boxes that this rank answers for; those of all ranks that are `written` cover every global tensor once.

    `chunks` are wrapped (`engine.step.wrap_chunks`), `metadata` is `sharding_metadata`. The views stay valid as long
    as model and optimizer live.
    """
    owned = _owned_runs(optimizer)
    shards: list[Shard] = []
    for chunk in chunks:
        places = _Places(chunk.module)
        for piece in sharded_tensors(chunk.module, metadata):
            if not piece.key.endswith("_extra_state"):  # a backend's own, which is none of the contract
                parameter = places.parameter(piece.data)
                shards += _shards_of(piece, parameter, owned)
    return shards


def _owned_runs(optimizer: Any) -> dict[Tensor, _Owned | None]:
    """By parameter: what this rank's optimizer has of it; None where other ranks have it all."""
    runs: dict[Tensor, _Owned | None] = {}
    for single in optimizer.chained_optimizers:
        single.optimizer.initialize()
        runs |= dict.fromkeys((parameter for buffer in single.buffers for parameter in buffer.params), None)
        for parameter, (group, order) in single.model_param_group_index_map.items():
            shard = single.optimizer.param_groups[group]["params"][order]
            master = {} if parameter.dtype == shard.dtype else {MASTER: shard.detach()}
            span = single._get_model_param_range_map(parameter)["param"]
            runs[parameter] = _Owned(span.start, span.end, master | single.optimizer.state[shard])
    return runs


class _Places:
    """Which parameter a view belongs to, by its address: all parameters of a buffer share one storage."""

    def __init__(self, module: torch.nn.Module):
        pairs: dict[int, Tensor] = {one.data_ptr(): one for one in module.parameters() if one.numel()}
        pairs |= {one.data_ptr(): one for one in module.buffers() if one.numel()}
        self._starts, self._tensors = sorted(pairs), pairs

    def parameter(self, view: Tensor) -> Tensor:
        start = self._starts[bisect_right(self._starts, view.data_ptr()) - 1]
        found = self._tensors[start]
        assert start <= view.data_ptr() < start + found.nbytes, "a piece of the model is no view of a parameter"
        return found


def _shards_of(piece: ShardedTensor, parameter: Tensor, owned: dict[Tensor, _Owned | None]) -> Iterator[Shard]:
    """The boxes of one piece, a box of a parameter (half of a gated unit's weight, say), that this rank answers for."""
    shape, offsets = tuple(piece.global_shape), tuple(piece.global_offset)
    ahead = len(shape) - piece.data.dim()  # dimensions that the global tensor has beside the parameter's own
    if parameter not in owned:
        weight = piece.data[(None,) * ahead]
        states = {MASTER: weight.detach().float()} if weight.element_size() < 4 else {}
        written = not any(piece.replica_id)
        yield Shard(key=piece.key, shape=shape, offsets=offsets, weight=weight, states=states, written=written)
        return
    run = owned[parameter]
    if run is None:
        return
    whole = tuple(parameter.shape)
    skipped = (piece.data.data_ptr() - parameter.data_ptr()) // parameter.element_size()
    here = Box(place_of(whole, skipped), tuple(piece.data.shape))  # the piece in the parameter
    written = not any(piece.replica_id[:2])  # the third tells data-parallel ranks apart, which share nothing here
    for box in boxes_of_run(whole, run.start, run.stop):
        common = box.cut(here)
        if common is None:
            continue
        at = flat_start(whole, box.offsets) - run.start
        inner = tuple(
            slice(c - b, c - b + n) for c, b, n in zip(common.offsets, box.offsets, common.lengths, strict=True)
        )
        count = torch.Size(box.lengths).numel()
        states = {name: flat.view(-1)[at : at + count].view(box.lengths)[inner] for name, flat in run.states.items()}
        own = (0,) * ahead + tuple(c - h for c, h in zip(common.offsets, here.offsets, strict=True))
        new = (None,) * ahead
        yield Shard(
            key=piece.key,
            shape=shape,
            offsets=tuple(a + b for a, b in zip(offsets, own, strict=True)),
            weight=parameter.detach()[common.slices][new],
            states={name: state[new] for name, state in states.items()},
            written=written,
        )


def gather_weights(chunks: list) -> None:
    """Gives every rank all weights of its parameters, each run from the rank whose optimizer updates it."""
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)
