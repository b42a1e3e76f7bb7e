"""Recomputation, and what a module's products send to other ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.checkpoint import checkpoint as recomputed

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, fp8_autocast


class CudaRNGStatesTracker:
    """Generators by name; nothing is drawn on the host."""

    def __init__(self) -> None:
        self.states_: dict[str, Tensor] = {}

    def reset(self) -> None:
        self.states_ = {}


class activation_recompute_forward(contextlib.AbstractContextManager):
    """Tells FP8 modules that what they compute is computed twice; here they keep nothing that it would change."""

    def __init__(self, activation_recompute: bool = False, recompute_phase: bool = False):
        super().__init__()

    def __exit__(self, *exc_details: object) -> None:
        pass


def checkpoint(
    function: Callable,
    *args: Any,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker: Callable | None = None,
    tp_group: Any = None,
    use_reentrant: bool = True,
    **kwargs: Any,
) -> Any:
    """Calls a function whose inner activations are computed again in the backward pass, in FP8 if they were so."""
    assert not distribute_saved_activations
    recipe, group = FP8GlobalStateManager.recipe, FP8GlobalStateManager.group

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), fp8_autocast(recipe is not None, fp8_recipe=recipe, fp8_group=group)

    return recomputed(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def gathered(states: Tensor, group: Any) -> Tensor:
    """All ranks' rows, rank after rank."""
    result = states.new_empty((states.shape[0] * group.size(), *states.shape[1:]))
    distributed.all_gather_into_tensor(result, states.contiguous(), group=group)
    return result


def scattered(states: Tensor, group: Any) -> Tensor:
    """This rank's rows of the sum over ranks."""
    own = states.new_empty((states.shape[0] // group.size(), *states.shape[1:]))
    distributed.reduce_scatter_tensor(own, states.contiguous(), group=group)
    return own


def summed(states: Tensor, group: Any) -> Tensor:
    """The sum over ranks."""
    states = states.contiguous().clone()
    distributed.all_reduce(states, group=group)
    return states


class _Exchange(torch.autograd.Function):
    """One exchange on the way there, another on the way back."""

    @staticmethod
    def forward(ctx, states: Tensor, group: Any, there: Callable | None, back: Callable | None) -> Tensor:
        ctx.group, ctx.back = group, back
        return there(states, group) if there else states.view_as(states)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.back(gradient, ctx.group) if ctx.back else gradient, None, None, None


def gather(states: Tensor, group: Any) -> Tensor:
    return _Exchange.apply(states, group, gathered, scattered)


def before_column(states: Tensor, group: Any, sequence_parallel: bool) -> Tensor:
    """What a layer whose outputs are split over ranks reads."""
    if group is None or group.size() == 1:
        return states
    return gather(states, group) if sequence_parallel else _Exchange.apply(states, group, None, summed)


def after_row(states: Tensor, group: Any, sequence_parallel: bool) -> Tensor:
    """What a layer whose inputs are split over ranks gives on."""
    if group is None or group.size() == 1:
        return states
    there, back = (scattered, gathered) if sequence_parallel else (summed, None)
    return _Exchange.apply(states, group, there, back)
