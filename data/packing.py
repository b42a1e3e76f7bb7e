"""Packed sequences, here called bins: documents laid into sequences of fixed capacity with almost nothing left over."""

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Bins:
    """Which documents share a bin, as compressed rows: bin b holds items[offsets[b]:offsets[b + 1]]."""

    offsets: np.ndarray  # int64 [bins + 1], rising from 0 to the number of documents
    items: np.ndarray  # int32, int64 beyond 2**31: [documents], ordinals into the lengths that were packed

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        """Return the document ordinals of one bin, longest document first."""
        if not 0 <= number < len(self):
            raise IndexError(f"bin {number} of {len(self)}")
        return self.items[self.offsets[number] : self.offsets[number + 1]]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Add up `values` [documents], given in the order of `items`, for each bin: [bins]."""
        # No bin is empty, so reduceat's special case for an empty slice cannot arise.
        return np.add.reduceat(values, self.offsets[:-1]) if len(self) else values[:0]


def pack(lengths: np.ndarray, capacity: int) -> Bins:
    """Pack documents of the given lengths into bins of `capacity` tokens, every document exactly once.

    lengths: integers [documents], in tokens, already padded. The result depends on nothing else.

    This is best-fit for each bin in turn: it takes the longest document that still fits until none
    does, which yields the bins of first-fit decreasing (never more than 11/9 of the fewest possible,
    plus one; Dosa, "The tight bound of first fit decreasing bin-packing algorithm", 2007). The search
    goes over the histogram of lengths, so its cost hardly grows with the number of documents; they
    are dealt into the finished pattern of lengths afterwards, equal lengths in the order given.

    Raises ValueError for a length that is not between 1 and `capacity`.
    """
    lengths = np.asarray(lengths)
    if len(lengths) == 0:
        return Bins(np.zeros(1, np.int64), np.zeros(0, np.int64))
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 1 or longest > capacity:
        wrong = shortest if shortest < 1 else longest
        raise ValueError(f"a document of {wrong} tokens cannot be packed into sequences of 1 to {capacity} tokens")

    by_length = _stable_argsort(lengths, longest).astype(np.int32 if len(lengths) < 2**31 else np.int64)
    ascending = lengths[by_length]
    first = np.concatenate(([0], np.flatnonzero(ascending[1:] != ascending[:-1]) + 1))
    distinct = ascending[first]  # [distinct lengths], rising
    counts = np.diff(np.append(first, len(lengths)))
    del ascending, lengths  # at millions of documents each array counts

    offsets, slots = _expand(*_patterns(distinct.tolist(), counts.tolist(), capacity))
    items = np.empty_like(by_length)
    # Both sides group the same lengths in the same order: slot by slot, document by document.
    items[_stable_argsort(slots, len(distinct) - 1)] = by_length
    return Bins(offsets, items)


def _stable_argsort(values: np.ndarray, largest: int) -> np.ndarray:
    # numpy sorts 16-bit integers by radix, six times faster than wider ones.
    return np.argsort(values.astype(np.uint16) if largest < 2**16 else values, kind="stable")


def _patterns(
    lengths: list[int], counts: list[int], capacity: int
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Choose the contents of all bins by length alone; equal bins that follow each other are one pattern.

    lengths: distinct, rising; counts: how many documents have each (used up here).
    Returns (which length, how many of it) for each stretch of equal lengths, then
    (stretches in the pattern, bins that repeat it) for each pattern.
    """
    stretch_length: list[int] = []
    stretch_times: list[int] = []
    pattern_stretches: list[int] = []
    pattern_bins: list[int] = []
    # below[i + 1] leads to the nearest length at or below i of which documents are left; 0: none.
    # A length only ever disappears, so this is a disjoint-set forest with path halving.
    below = list(range(len(lengths) + 1))

    def available(node: int) -> int:
        while below[node] != node:
            below[node] = below[below[node]]
            node = below[node]
        return node - 1

    chosen = available(len(lengths))
    while chosen >= 0:
        stretches: list[tuple[int, int]] = []
        room = capacity
        bins = counts[chosen]
        while chosen >= 0:
            times = min(counts[chosen], room // lengths[chosen])
            stretches.append((chosen, times))
            room -= times * lengths[chosen]
            bins = min(bins, counts[chosen] // times)
            chosen = available(bisect_right(lengths, room, 0, chosen))
        for index, times in stretches:
            counts[index] -= bins * times
            if counts[index] == 0:
                below[index + 1] = index
            stretch_length.append(index)
            stretch_times.append(times)
        pattern_stretches.append(len(stretches))
        pattern_bins.append(bins)
        chosen = available(stretches[0][0] + 1)
    return stretch_length, stretch_times, pattern_stretches, pattern_bins


def _expand(
    stretch_length: list[int], stretch_times: list[int], pattern_stretches: list[int], pattern_bins: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Write the patterns out: bin offsets [bins + 1] and the length index of every slot [documents]."""
    stretches_in = np.asarray(pattern_stretches, np.int64)
    times = np.asarray(stretch_times, np.int64)
    first_stretch = np.cumsum(stretches_in) - stretches_in  # [patterns]
    size = np.add.reduceat(times, first_stretch)  # documents in a bin of the pattern
    documents = int(np.dot(size, pattern_bins))
    number = np.int32 if documents < 2**31 else np.int64  # none of the counts below is larger than `documents`
    pattern = np.repeat(np.arange(len(stretches_in), dtype=number), pattern_bins)  # [bins]
    offsets = np.concatenate(([0], np.cumsum(size[pattern])))

    # The stretches of a bin are consecutive: its pattern's first stretch plus 0, 1, 2, ...
    stretches = stretches_in.astype(number)[pattern]  # [bins]
    stretch = first_stretch.astype(number)[pattern]
    del pattern
    stretch += stretches
    stretch -= np.cumsum(stretches, dtype=number)  # less the stretches of all earlier bins
    stretch = np.repeat(stretch, stretches)
    stretch += np.arange(len(stretch), dtype=number)
    index = np.asarray(stretch_length, np.uint16 if max(stretch_length) < 2**16 else np.int64)
    return offsets, np.repeat(index[stretch], times[stretch])
