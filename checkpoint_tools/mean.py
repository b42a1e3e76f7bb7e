"""The mean of a model's tensors over several checkpoints: in fp64 and rounded once, block by block."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.checkpointing.hf_export import Checkpoint, check_range
from engine.checkpointing.store_reader import Scratch, box_of, master_key, row_blocks
from models.conversion.rules import Index

BLOCK_BYTES = 2 * 2**20  # of fp64 sums, which stay in a processor's cache
NARROW = {torch.float32, torch.float16, torch.bfloat16}


class Mean:
    """Called with (key, index): the mean of that part over all checkpoints, in fp64 and rounded once.

    Each call overwrites what the last one returned.
    """

    def __init__(self, opened: Sequence[Checkpoint], dtype: torch.dtype):
        self.dtype = dtype
        self._opened = opened
        self._scratch, self._result = (Scratch(), Scratch()), Scratch()

    def __call__(self, key: str, index: Index) -> Tensor:
        rows, *rest = box_of(self._opened[0].store.shape(key), index)
        shape = [len(rows), *map(len, rest)]
        result = self._result.empty(shape, self.dtype)
        others = [slice(side.start, side.stop) for side in rest]
        for block in row_blocks(shape, torch.float64, BLOCK_BYTES):
            result[block] = self._block(key, (slice(rows.start + block.start, rows.start + block.stop), *others))
        return result

    def _block(self, key: str, index: Index) -> Tensor:
        if self.dtype == torch.bfloat16 and len(self._opened) == 2:
            one, other = (self._read(number, key, index) for number in range(2))
            mean = mean_of_two(one, other) if {one.dtype, other.dtype} <= NARROW else None
            if mean is not None:
                return mean
        total: Tensor | None = None
        for number in range(len(self._opened)):
            part = self._read(number, key, index)
            total = part.to(torch.float64, copy=True) if total is None else total.add_(part)
        assert total is not None
        total /= len(self._opened)
        if not math.isfinite(total.sum()):  # in fp64 finite weights cannot add up to infinity
            raise ValueError(f"{key} holds values that are not finite in the checkpoints to average")
        result = round_once(total, self.dtype)
        if self.dtype == torch.float16:
            check_range(key, total, result)
        return result

    def _read(self, number: int, key: str, index: Index) -> Tensor:
        """A part of one checkpoint, which stays until the next but one is read."""
        store = self._opened[number].store
        return store.read(master_key(store, key) or key, index, self._scratch[number % 2])


def mean_of_two(one: Tensor, other: Tensor) -> Tensor | None:
    """The mean of two tensors in fp32 or less, rounded to bf16 as from fp64; None where fp32 cannot hold the sum.

    Half of a sum is rounded to fp32 at most once, so bf16 differs only where that made a tie of what was none. It
    never does for sums of two bf16 numbers (Figueroa, "When is double rounding innocuous?", SIGNUM Newsletter 30(3),
    1995: fp32 has more than twice their digits, and two).
    """
    mean = torch.add(one.float(), other.float()).mul_(0.5)
    if not math.isfinite(mean.sum()):
        return None
    result = mean.to(torch.bfloat16)
    if not one.dtype == other.dtype == torch.bfloat16:
        ties = np.flatnonzero(_ties(mean))
        exact = (one.view(-1)[ties].double() + other.view(-1)[ties]) / 2
        result.view(-1)[ties] = _round_by_odd(exact, torch.bfloat16)
    return result


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round finite fp64 values to the nearest of `dtype`, ties to even.

    torch rounds fp64 to 16 bits by way of fp32, which is twice. In bf16, whose range is that of fp32, this goes wrong
    only where the first rounding makes a tie of what was none: where the lower half of its bits is 0x8000.
    """
    if dtype.itemsize >= 4:
        return values.to(dtype)
    if dtype != torch.bfloat16:
        return _round_by_odd(values, dtype)
    rounded = values.float()
    result = rounded.to(dtype)
    ties = _ties(rounded)
    if np.count_nonzero(ties) > len(ties) // 64:  # as among means of bf16 weights, most of which are ties indeed
        ties &= rounded.view(-1).numpy() != values.view(-1).numpy()
    places = np.flatnonzero(ties)
    result.view(-1)[places] = _round_by_odd(values.view(-1)[places], dtype)
    return result


def _ties(values: Tensor) -> np.ndarray:
    """Which fp32 values, laid out flat, lie halfway between two of bf16.

    By numpy, whose comparisons and searches are several times faster than torch's on one core.
    """
    return values.view(-1).view(torch.int32).numpy() & 0xFFFF == 0x8000


def _round_by_odd(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to fp32 towards zero with the last bit set where anything was lost; the second rounding is then right.

    Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd",
    IEEE Transactions on Computers 57(4), 2008.
    """
    rounded = values.float()
    back = rounded.double()
    bits = rounded.view(torch.int32)
    bits -= (back.abs() > values.abs()).view(torch.int8)
    bits |= back != values
    return rounded.to(dtype)
