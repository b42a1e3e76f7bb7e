"""Numbers that describe a data directory: groups of documents, how they pack, what repeats, which ones to look at.

Memory stays flat: a few bytes for each document, never the tokens of all. What would take long on many documents is
computed on a sample that depends on nothing but the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from data.documents import Documents
from data.packing import pack

CAPACITIES = tuple(2**power for power in range(11, 18))  # 2048 ... 131072 tokens
PACKED_DOCUMENTS = 200_000
COMPARED_DOCUMENTS, COMPARED_TOKENS = 2_000_000, 400_000_000
_BLOCK = 1 << 20  # documents whose spans are read together


@dataclass(frozen=True)
class Group:
    """The documents of one source, of one kind, or all."""

    name: str
    documents: int
    tokens: int
    supervised_tokens: int
    longest: int


@dataclass(frozen=True)
class Fill:
    """How documents pack into sequences of `capacity` tokens, before any padding of single documents."""

    capacity: int
    longer: int  # of all documents: those that do not fit, and are left out here
    sequences: int  # that hold the documents which were packed
    fill: float | None  # share of those sequences that documents fill; None where none fits


@dataclass(frozen=True)
class Repeats:
    """Documents that have the tokens of an earlier one."""

    compared: int
    repeated: int
    most: tuple[tuple[int, int], ...]  # (first document, how often it is there), the most frequent first


@dataclass(frozen=True, eq=False)
class Contents:
    """A data directory and what is computed of it once."""

    index: Documents
    supervised: np.ndarray  # int32 [documents]
    sources: list[Group]
    kinds: list[Group]
    all: Group

    @property
    def dropped(self) -> dict[str, dict[str, Any]]:
        """Reasons with their `count` and `first`."""
        return self.index.meta.get("dropped", {})

    @property
    def drops(self) -> int:
        return sum(drop["count"] for drop in self.dropped.values())

    @property
    def rows(self) -> int:
        return self.index.meta.get("rows", len(self.index))

    def count(self, name: str) -> int:
        """A count of meta.json; 0 where it has none of this name."""
        return self.index.meta.get(name, 0)


def read_contents(index: Documents) -> Contents:
    """Counts the documents of each source and kind."""
    supervised = supervised_tokens(index)
    sources = groups(index.source_names, index.sources, index.lengths, supervised)
    kinds = groups(index.kinds, index.kind_numbers, index.lengths, supervised)
    whole = Group(
        name="all",
        documents=len(index),
        tokens=sum(group.tokens for group in sources),
        supervised_tokens=sum(group.supervised_tokens for group in sources),
        longest=max(group.longest for group in sources),
    )
    return Contents(index, supervised, sources, kinds, whole)


def supervised_tokens(index: Documents) -> np.ndarray:
    """How many tokens of each document are supervised: int32 [documents]."""
    counted = np.zeros(len(index), np.int32)
    for start in range(0, len(index), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(index)))
        spans, counts = index.spans_of(block)
        sums = np.concatenate(([0], np.cumsum(spans[:, 1].astype(np.int64) - spans[:, 0])))
        ends = np.cumsum(counts)
        counted[block] = sums[ends] - sums[ends - counts]
    return counted


def groups(names: Sequence[str], numbers: np.ndarray, lengths: np.ndarray, supervised: np.ndarray) -> list[Group]:
    """A group for each name; numbers [documents] say which name a document has."""
    documents = np.bincount(numbers, minlength=len(names))
    tokens = np.bincount(numbers, lengths, len(names))  # in float64, which is exact up to 2**53
    trained = np.bincount(numbers, supervised, len(names))
    longest = np.zeros(len(names), lengths.dtype)  # of one type, which numpy has a fast way for
    np.maximum.at(longest, numbers, lengths)
    columns = (part.astype(np.int64).tolist() for part in (documents, tokens, trained, longest))
    return [Group(name, *row) for name, *row in zip(names, *columns, strict=True)]


def fills(lengths: np.ndarray) -> list[Fill]:
    """How full packed sequences are at `CAPACITIES`; of many documents a sample is packed."""
    sample = lengths
    if len(lengths) > PACKED_DOCUMENTS:
        sample = lengths[draw(len(lengths), PACKED_DOCUMENTS, seed=0)]
    found = []
    for capacity in CAPACITIES:
        fitting = sample[(sample > 0) & (sample <= capacity)]
        sequences = len(pack(fitting, capacity))
        fill = int(fitting.sum(dtype=np.int64)) / (sequences * capacity) if sequences else None
        found.append(Fill(capacity, int(np.count_nonzero(lengths > capacity)), sequences, fill))
    return found


def repeats(index: Documents, supervised: np.ndarray, shown: int = 5) -> Repeats:
    """Counts documents that have the same tokens as an earlier one; supervised [documents]."""
    chosen = _compared(index.lengths, supervised)
    hashes = np.empty(len(chosen), np.uint64)
    for place, document in enumerate(chosen.tolist()):
        digest = blake2b(np.ascontiguousarray(index.tokens(document)), digest_size=8).digest()
        hashes[place] = int.from_bytes(digest, "little")
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    often = np.flatnonzero(counts > 1)
    often = often[np.lexsort((first[often], -counts[often]))][:shown]
    most = tuple(zip(chosen[first[often]].tolist(), counts[often].tolist(), strict=True))
    return Repeats(len(chosen), len(chosen) - len(counts), most)


def _compared(lengths: np.ndarray, supervised: np.ndarray) -> np.ndarray:
    """The documents that are compared, rising: all, or a sample in which copies meet.

    Copies agree in length and supervised tokens. Documents are taken in the order of a hash of the two, so that the
    sample holds all copies of a document or none; only of the last hash that it reaches it may hold a part.
    """
    tokens = int(lengths.sum(dtype=np.int64))
    if len(lengths) <= COMPARED_DOCUMENTS and tokens <= COMPARED_TOKENS:
        return np.arange(len(lengths))
    keys = lengths.astype(np.uint64) << np.uint64(32) | supervised.astype(np.uint64)
    keys *= np.uint64(0x9E3779B97F4A7C15)
    keys ^= keys >> np.uint64(32)
    keys *= np.uint64(0xD6E8FEB86659FD93)  # its high bits now depend on all bits, and 16 of them sort fast
    order = np.argsort((keys >> np.uint64(48)).astype(np.uint16), kind="stable")
    most = np.searchsorted(np.cumsum(lengths[order], dtype=np.int64), COMPARED_TOKENS, side="right")
    return np.sort(order[: max(1, min(COMPARED_DOCUMENTS, int(most)))])


def choose_samples(index: Documents, each: int, most: int) -> list[int]:
    """Documents to look at: up to `each` of every kind of every source, at most `most`, in their order there.

    Where those are too many, every kind of every source comes to its first before any comes to its second.
    """
    pairs = index.sources.astype(np.int64) * len(index.kinds) + index.kind_numbers
    pairs = pairs.astype(np.min_scalar_type(len(index.source_names) * len(index.kinds)))  # small types sort fast
    order = np.argsort(pairs, kind="stable")
    counts = np.bincount(pairs)
    ends = np.cumsum(counts)
    ranked = []
    for pair in np.flatnonzero(counts).tolist():
        count = int(counts[pair])
        drawn = draw(count, 8 * each, seed=pair).tolist() if count > each else range(count)
        documents = np.sort(order[ends[pair] - count + np.array([*dict.fromkeys(drawn)][:each])])
        ranked += [(rank, pair, document) for rank, document in enumerate(documents.tolist())]
    return [document for _, _, document in sorted(sorted(ranked)[:most], key=lambda one: one[1:])]


def draw(size: int, count: int, *, seed: int) -> np.ndarray:
    """`count` numbers below `size`, with repetition: a function of the arguments under every version of numpy."""
    return (np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count) % np.uint64(size)).astype(np.int64)


def length_edges(lengths: np.ndarray) -> np.ndarray:
    """Edges [bars + 1] of a histogram of lengths, two bars to a doubling; bar b starts at edges[b]."""
    shortest, longest = max(1, int(lengths.min())), int(lengths.max())
    edges = np.round(2.0 ** (np.arange(0, 2 * 33) / 2)).astype(np.int64)
    first = np.searchsorted(edges, shortest, side="right") - 1
    last = np.searchsorted(edges, longest, side="right")
    return np.unique(edges[first : last + 1])
