"""Tensors that are computed again in the backward pass instead of being kept for it, bit for bit.

A module marks its output with what gives it once more; while a layer runs, whatever would keep that output keeps the
recipe. Nothing else is computed twice: the product behind a norm or an activation is not, nor a collective. (Of
megatron-core 0.16.1, CheckpointWithoutOutput asks for Transformer Engine's FP8 state and fails without it.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

MARKED = ("norm", "activation")  # parts whose outputs modules mark by `again`


class _Recipe(NamedTuple):
    """How to get a tensor, or a view of it, once more."""

    function: Callable[[], Tensor]
    shape: Sequence[int]
    stride: Sequence[int]
    offset: int


def parts_of(config: Any) -> tuple[str, ...]:
    """The parts that layers of megatron-core's config compute again, by the names that `models.build` put there.

    On Transformer Engine's layers they have megatron-core's names.
    """
    return tuple(config.recompute_modules) if config.recompute_granularity == "selective" else ()


def again(output: Tensor, function: Callable[[], Tensor]) -> Tensor:
    """Marks `output` as what `function()` gives once more; it must do so bit for bit, and hold no graph."""
    if torch.is_grad_enabled():
        output.again = function  # type: ignore[attr-defined]
    return output


@contextlib.contextmanager
def marked_are_not_kept() -> Iterator[None]:
    """Lets the operations inside keep no output that was marked by `again`."""
    with saved_tensors_hooks(_pack, _unpack):
        yield


def _pack(tensor: Tensor) -> Tensor | _Recipe:
    # A parallel linear layer without ranks beside it keeps a view of its input.
    owner = tensor if hasattr(tensor, "again") else tensor._base
    function = getattr(owner, "again", None)
    if function is None:
        return tensor
    return _Recipe(function, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def _unpack(kept: Tensor | _Recipe) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    return kept.function().as_strided(kept.shape, kept.stride, kept.offset)
