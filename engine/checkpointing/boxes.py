"""Runs of a tensor's flattened elements as boxes of the tensor, and boxes cut by boxes: plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple


class Box(NamedTuple):
    """A box of a tensor: where it begins and how long it is, in each dimension."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """The slices that cut it out of the tensor."""
        return tuple(slice(start, start + length) for start, length in zip(self.offsets, self.lengths, strict=True))

    def cut(self, other: Box) -> Box | None:
        """What two boxes of one tensor share; None for nothing."""
        starts = tuple(map(max, self.offsets, other.offsets))
        pairs = zip(self.offsets, self.lengths, other.offsets, other.lengths, strict=True)
        ends = (min(a + m, b + n) for a, m, b, n in pairs)
        lengths = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return Box(starts, lengths) if all(length > 0 for length in lengths) else None


def boxes_of_run(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Cuts the flat elements [start, stop) of a tensor in C order into boxes, in order: at most 2n-1."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Box((start,), (stop - start,)) if shape else Box((), ())
        return
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last:
        yield from _in_row(shape, first, start - first * row, stop - first * row)
        return
    whole, end = -(-start // row), stop // row  # the rows that lie in the run as a whole
    if start % row:
        yield from _in_row(shape, first, start - first * row, row)
    if end > whole:
        yield Box((whole, *[0] * (len(shape) - 1)), (end - whole, *shape[1:]))
    if stop % row:
        yield from _in_row(shape, end, 0, stop - end * row)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    for box in boxes_of_run(shape[1:], start, stop):
        yield Box((row, *box.offsets), (1, *box.lengths))


def flat_start(shape: tuple[int, ...], offsets: tuple[int, ...]) -> int:
    """The flat place of an element in a tensor in C order."""
    place = 0
    for size, offset in zip(shape, offsets, strict=True):
        place = place * size + offset
    return place


def place_of(shape: tuple[int, ...], flat: int) -> tuple[int, ...]:
    """The place in each dimension of a flat element: `flat_start` backwards."""
    offsets = []
    for size in reversed(shape):
        flat, offset = divmod(flat, size)
        offsets.append(offset)
    return tuple(reversed(offsets))
