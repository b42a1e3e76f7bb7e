"""Which data-parallel rank gets which packed sequences of a step, so that none waits for another."""

import heapq

import numpy as np

# A share this close to the least possible one is not made better: it is noise beside the rest of a step.
_CLOSE = 1.002
# Exchanges compare all pairs with the fullest rank's; with more pairs than this the shares are even without them.
_PAIRS = 1_000_000
_TIMES = 8  # exchanges for each rank at most; hardly ever needed


def deal(work: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Return the numbers of the bins that each rank gets, heaviest first, so that the greatest sum of work is small.

    work: integers [bins], what a bin costs beyond its fixed number of tokens: the squares of its documents' lengths,
    as attention has it. No rank gets more bins than it must. Depends on nothing else.

    Longest processing time first (Graham, "Bounds on multiprocessing timing anomalies", 1969), with as many places on
    every rank; then the fullest rank exchanges one bin with another rank's as long as that makes it lighter.
    """
    shares = _exchange(*_longest_first(work, ranks))
    bins = [share[share < len(work)] for share in shares]  # without places that stay empty
    return [share[np.argsort(-work[share], kind="stable")] for share in bins]


def _longest_first(work: np.ndarray, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the bins of each rank [ranks, places], and the work of each bin; places left empty are bins of no work."""
    places = -(-len(work) // ranks)
    shares = np.empty((ranks, places), np.int64)
    filled = [0] * ranks
    waiting = [(0, rank) for rank in range(ranks)]  # a heap: the least loaded rank comes first
    padded = np.append(work, np.zeros(ranks * places - len(work), np.int64))
    heaviest_first = np.argsort(-padded, kind="stable")
    for number, cost in zip(heaviest_first.tolist(), padded[heaviest_first].tolist(), strict=True):
        load, rank = heapq.heappop(waiting)
        shares[rank, filled[rank]] = number
        filled[rank] += 1
        if filled[rank] < places:
            heapq.heappush(waiting, (load + cost, rank))
    return shares, padded


def _exchange(shares: np.ndarray, work: np.ndarray) -> np.ndarray:
    """Exchange bins between the fullest rank and others, in place, until that does not help; return the shares."""
    own = work[shares]  # [ranks, places]
    loads = own.sum(axis=1)
    goal = max(loads.mean(), own.max(initial=0)) * _CLOSE
    for _ in range(_TIMES * len(shares) if own.size * own.shape[1] <= _PAIRS else 0):
        fullest = int(loads.argmax())
        if loads[fullest] <= goal:
            break
        # What the fullest rank gives away beyond what it gets: [its places, ranks, places].
        given = own[fullest][:, None, None] - own
        after = np.maximum(loads[fullest] - given, loads[:, None] + given)
        mine, rank, theirs = np.unravel_index(after.argmin(), after.shape)
        if after[mine, rank, theirs] >= loads[fullest]:
            break
        loads[fullest] -= given[mine, rank, theirs]
        loads[rank] += given[mine, rank, theirs]
        for table in (shares, own):
            table[fullest, mine], table[rank, theirs] = table[rank, theirs], table[fullest, mine]
    return shares
