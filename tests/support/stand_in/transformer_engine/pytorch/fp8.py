"""FP8 on the host: where it is switched on, and tensors rounded to it with a recipe's scales."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from transformer_engine.common.recipe import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    Format,
    MXFP8BlockScaling,
    Recipe,
)

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


class FP8GlobalStateManager:
    """Whether FP8 is on, by which recipe, and the modules whose delayed scales the end of a pass brings up to date."""

    recipe: Recipe | None = None
    group: Any = None
    forward: ClassVar[list[DelayedScale]] = []
    backward: ClassVar[list[DelayedScale]] = []
    first = False  # whether the next product is the first of a pass, whose backward is the last

    @classmethod
    def reset(cls) -> None:
        """Forgets the modules so far, which another rank need not have."""
        cls.forward.clear()
        cls.backward.clear()

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.recipe is not None

    @classmethod
    def get_fp8_recipe(cls) -> Recipe:
        assert cls.recipe is not None
        return cls.recipe

    @classmethod
    def take_first(cls) -> bool:
        """True once a pass that has gradients."""
        first = cls.first and torch.is_grad_enabled()
        cls.first = cls.first and not first
        return first

    @classmethod
    def with_fp8_parameters(cls) -> bool:
        return False


@contextlib.contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Recipe | None = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    """Switches FP8 on or off within the block."""
    assert not calibrating and not _graph
    manager = FP8GlobalStateManager
    before = manager.recipe, manager.group
    manager.first = manager.first or (enabled and manager.recipe is None)
    manager.recipe, manager.group = (fp8_recipe if enabled else None), fp8_group
    try:
        yield
    finally:
        manager.recipe, manager.group = before
        if enabled and manager.recipe is None and torch.is_grad_enabled():
            for scale in manager.forward:
                scale.update(fp8_group)


def fp8_model_init(
    enabled: bool = True, recipe: Recipe | None = None, preserve_high_precision_init_val: bool = False
) -> contextlib.AbstractContextManager[None]:
    """Weights kept in FP8, which the stand-in has not."""
    if enabled:
        raise NotImplementedError("the stand-in keeps no weights in FP8")
    return contextlib.nullcontext()


class DelayedScale:
    """The scales of some tensors, each from the largest numbers that were seen in earlier passes."""

    def __init__(self, tensors: int, recipe: DelayedScaling, dtype: torch.dtype):
        self.scale = torch.ones(tensors)
        self.amax_history = torch.zeros(recipe.amax_history_len, tensors)
        self.largest = LARGEST[dtype]

    def rounded(self, tensor: Tensor, number: int, dtype: torch.dtype) -> Tensor:
        """Rounds with the scale that stands, and notes the tensor's largest number for the next."""
        largest = tensor.abs().max().float() if tensor.numel() else torch.zeros(())
        self.amax_history[0, number] = torch.maximum(self.amax_history[0, number], largest)
        return cast(tensor, self.scale[number], dtype)

    def update(self, group: Any) -> None:
        """After a step: new scales, and room for the next step's numbers."""
        if group is not None:
            torch.distributed.all_reduce(self.amax_history[0], op=torch.distributed.ReduceOp.MAX, group=group)
        largest = self.amax_history.max(0).values
        usable = largest > 0
        self.scale[usable] = self.largest / largest[usable]
        self.amax_history.copy_(self.amax_history.roll(-1, 0))
        self.amax_history[0] = 0


def cast(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What becomes of numbers that are kept as `dtype` times 1 / scale; in the tensor's own dtype again."""
    limit = LARGEST[dtype]
    return ((tensor.float() * scale).clamp(-limit, limit).to(dtype).float() / scale).to(tensor.dtype)


def rounded(tensor: Tensor, recipe: Recipe, *, backward: bool, weight: bool = False) -> Tensor:
    """A tensor [rows, width] after its numbers went through FP8 with scales of its own."""
    gradients = backward and recipe.fp8_format == Format.HYBRID  # type: ignore[attr-defined]
    dtype = torch.float8_e5m2 if gradients else torch.float8_e4m3fn
    if not tensor.numel():
        return tensor
    if isinstance(recipe, Float8CurrentScaling):
        return cast(tensor, LARGEST[dtype] / tensor.abs().max().float().clamp_min(1e-12), dtype)
    size = 32 if isinstance(recipe, MXFP8BlockScaling) else 128
    rows = size if weight and isinstance(recipe, Float8BlockScaling) else 1
    height, width = tensor.shape
    if width % size or height % rows:
        raise ValueError(f"{recipe}: blocks of {rows} x {size} do not divide {height} x {width}")
    blocks = tensor.view(height // rows, rows, width // size, size)
    scale = LARGEST[dtype] / blocks.abs().amax((1, 3), keepdim=True).float().clamp_min(1e-12)
    return cast(blocks, torch.exp2(scale.log2().floor()), dtype).view_as(tensor)
