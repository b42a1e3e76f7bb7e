"""Which documents are written, how often, and which are held out: numbers alone, the same for any number of workers.

In this order: duplicates go, each source's part is taken, documents are held out of what was taken, and what is then
left of a source that is taken more than once is repeated.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.preparation.sources import Source


@dataclass(frozen=True)
class Selection:
    """What becomes of all documents, in their order."""

    duplicate_of: np.ndarray  # int64 [documents], the one before it that it repeats, or -1
    held_out: np.ndarray  # bool [documents], written once, into `valid`
    copies: np.ndarray  # int32 [documents], how often it is written to be trained on


def select(
    sources: Sequence[Source],
    sizes: Sequence[int],
    *,
    hashes: np.ndarray | None = None,
    hold_out: int | float = 0,
    seed: int = 0,
) -> Selection:
    """Chooses among the documents of sources that follow each other.

    sizes: documents of each source; hashes: uint64 [documents, 2], equal where documents are duplicates; hold_out: of
    the documents of all sources that do not hold out their own. Raises ValueError where there are fewer documents than
    are to be taken or held out.
    """
    documents = sum(sizes)
    bounds = np.cumsum([0, *sizes])
    ranges = [slice(first, last) for first, last in itertools.pairwise(bounds)]
    chances = [np.random.default_rng((seed, number)) for number in range(len(sources))]
    duplicate_of = find_duplicates(hashes) if hashes is not None else np.full(documents, -1)
    taken = duplicate_of < 0
    for source, places, chance in zip(sources, ranges, chances, strict=True):
        different = int(taken[places].sum())
        _keep(taken[places], _part(source, different, places.stop - places.start - different), chance)
    held_out = np.zeros(documents, bool)
    for source, places, chance in zip(sources, ranges, chances, strict=True):
        if source.hold_out is not None:
            name = f"--sources {source.name}: hold_out"
            held_out[places] = _hold_out(taken[places], source.hold_out, chance, name)
    shared = taken & np.repeat([source.hold_out is None for source in sources], sizes)
    held_out |= _hold_out(shared, hold_out, np.random.default_rng(seed), "--hold-out")
    copies = (taken & ~held_out).astype(np.int32)
    for source, places, chance in zip(sources, ranges, chances, strict=True):
        left = np.flatnonzero(copies[places])
        if isinstance(source.take, float) and source.take > 1 and len(left):
            whole, more = divmod(round(source.take * len(left)), len(left))
            copies[places][left] = whole
            copies[places][chance.permutation(left)[:more]] += 1
    return Selection(duplicate_of, held_out, copies)


def find_duplicates(hashes: np.ndarray) -> np.ndarray:
    """For each of hashes uint64 [documents, 2] the first document with the same, -1 where that is itself."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: of equal ones the first comes first
    new = np.ones(len(hashes), bool)
    new[1:] = (hashes[order[1:]] != hashes[order[:-1]]).any(1)
    first = order[new][np.cumsum(new) - 1]
    found = np.full(len(hashes), -1)
    found[order[~new]] = first[~new]
    return found


def _part(source: Source, documents: int, duplicates: int) -> int:
    """How many different documents of a source are taken."""
    if isinstance(source.take, float):
        return round(min(source.take, 1.0) * documents)
    if source.take > documents:
        left = f"{documents:,} documents" + (f" (without {duplicates:,} duplicates)" if duplicates else "")
        raise ValueError(f"--sources {source.name}: take {source.take} is more than its {left}")
    return source.take


def _keep(chosen: np.ndarray, count: int, chance: np.random.Generator) -> None:
    """Leaves `count` of the documents that are true in `chosen`."""
    found = np.flatnonzero(chosen)
    if count < len(found):
        chosen[chance.permutation(found)[count:]] = False


def _hold_out(taken: np.ndarray, part: int | float, chance: np.random.Generator, name: str) -> np.ndarray:
    """bool [documents], true for a count or share of those that are true in `taken`."""
    documents = int(taken.sum())
    count = round(part * documents) if isinstance(part, float) else part
    if count and count >= documents:
        raise ValueError(f"{name} {part} would leave nothing of {documents:,} documents to train on")
    chosen = taken.copy()
    _keep(chosen, count, chance)
    return chosen
