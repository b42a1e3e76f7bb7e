"""Packed sequences dealt over ranks: each once, as many for everyone as must be, and even in work."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.dealing import deal
from data.packing import pack
from tests.support.loading import in_memory, small_loader


def loads(work: np.ndarray, ranks: int) -> list[int]:
    return [int(work[share].sum()) for share in deal(work, ranks)]


def least(work: list[int], ranks: int) -> int:
    """The smallest greatest load there is, by trying everything."""
    places = -(-len(work) // ranks)
    found = sum(work)
    for owners in itertools.product(range(ranks), repeat=len(work)):
        if max(map(owners.count, range(ranks))) <= places:
            sums = [sum(cost for cost, owner in zip(work, owners, strict=True) if owner == r) for r in range(ranks)]
            found = min(found, max(sums))
    return found


def test_work_is_dealt_evenly():
    work = np.array([9, 1, 8, 2, 7, 3, 6, 4, 5])
    assert [work[share].tolist() for share in deal(work, 4)] == [[9, 2, 1], [8, 3], [7, 4], [6, 5]]
    assert [share.tolist() for share in deal(np.array([], np.int64), 2)] == [[], []]
    assert [share.tolist() for share in deal(np.array([3]), 3)] == [[0], [], []]


def test_exchanges_mend_what_longest_first_leaves():
    # longest first gives 4, 2, 2 and 3, 3; exchanges compare places, too, that are still empty
    assert loads(np.array([4, 3, 3, 2, 2]), 2) == [7, 7]


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 50), max_size=8), st.integers(1, 3))
def test_every_bin_is_dealt_once_and_hardly_more_work_than_must_be(work, ranks):
    costs = np.array(work, np.int64)
    shares = deal(costs, ranks)
    assert len(shares) == ranks and sorted(np.concatenate(shares).tolist()) == list(range(len(work)))
    assert max(map(len, shares)) == -(-len(work) // ranks)
    for share in shares:
        assert (np.diff(costs[share]) <= 0).all()  # heaviest first, so that ranks meet bins of like weight
    if work:
        assert max(loads(costs, ranks)) <= 4 / 3 * least(work, ranks) + 1e-9


def test_long_tailed_steps_are_within_five_percent():
    """1,024 conversations of lognormal lengths at 32k over 64 ranks: four packed sequences or fewer for each."""
    draw = np.random.default_rng(5)
    even = uneven = 0
    for _ in range(40):
        lengths = np.clip(draw.lognormal(8.5, 1.0, 1024), 8, 32_768).astype(np.int64)
        bins = pack(lengths, 32_768)
        work = bins.sums(np.square(lengths[bins.items]))
        even += max(loads(work, 64)) <= 1.05 * work.sum() / 64
        uneven += max(work[rank::64].sum() for rank in range(64)) <= 1.05 * work.sum() / 64
    assert even >= 38 and uneven == 0


def test_the_loader_hands_out_even_shares():
    lengths = np.clip(np.random.default_rng(2).lognormal(3.0, 1.0, 600), 2, 256).astype(int)
    index = in_memory([[1] * length for length in lengths.tolist()])
    settings = dict(seq_len=256, pad_documents_to=2, global_batch_size=300, micro_batch_size=1, dp_size=8)
    ranks = [small_loader(index, **settings, dp_rank=rank) for rank in range(8)]
    for number in range(2):
        costs = []
        for loader in ranks:
            step = loader.step(0, number)
            padded = [np.diff(m.cu_seqlens)[m.document_lengths > 0].astype(np.int64) for m in step]
            costs.append(int(np.square(np.concatenate(padded)).sum()))
        assert max(costs) <= 1.05 * sum(costs) / 8
