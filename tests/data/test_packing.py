"""Bins hold every document once, never overflow, and are as full as first-fit decreasing makes them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import pack


@st.composite
def _documents(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    capacity = draw(st.integers(1, 200))
    lengths = draw(st.lists(st.integers(1, capacity), max_size=120))
    return np.array(lengths, np.int32), capacity


def _first_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """The textbook algorithm, document by document: the lengths in each bin."""
    bins: list[list[int]] = []
    for length in sorted(lengths.tolist(), reverse=True):
        for contents in bins:
            if sum(contents) + length <= capacity:
                contents.append(length)
                break
        else:
            bins.append([length])
    return bins


@settings(deadline=None, max_examples=300)
@given(_documents())
def test_bins_are_those_of_first_fit_decreasing(case):
    lengths, capacity = case
    bins = pack(lengths, capacity)
    assert sorted(bins.items.tolist()) == list(range(len(lengths)))
    assert bins.offsets[0] == 0 and bins.offsets[-1] == len(lengths)
    assert (np.diff(bins.offsets) > 0).all()
    assert (bins.sums(lengths[bins.items]) <= capacity).all()
    assert [lengths[bins[b]].tolist() for b in range(len(bins))] == _first_fit_decreasing(lengths, capacity)


def test_equal_lengths_are_dealt_in_the_order_given():
    bins = pack(np.array([3, 5, 3, 5, 3, 2]), 8)
    assert [bins[b].tolist() for b in range(len(bins))] == [[1, 0], [3, 2], [4, 5]]
    again = pack(np.array([3, 5, 3, 5, 3, 2]), 8)
    assert (again.items == bins.items).all() and (again.offsets == bins.offsets).all()


def test_lengths_beyond_sixteen_bits():
    lengths = np.array([70_000, 30_000, 100_000, 65_536, 1, 34_464])
    bins = pack(lengths, 100_000)
    assert [lengths[bins[b]].tolist() for b in range(len(bins))] == [
        [100_000],
        [70_000, 30_000],
        [65_536, 34_464],
        [1],
    ]


def test_long_tailed_lengths_fill_32k_bins():
    drawn = np.random.default_rng(3).lognormal(6.3, 0.9, 200_000)
    lengths = np.clip(drawn, 8, 32_768).astype(np.int32)
    bins = pack(lengths, 32_768)
    used = bins.sums(lengths[bins.items])
    assert used.max() <= 32_768 and used.sum() == lengths.sum()
    assert used.sum() / (len(bins) * 32_768) >= 0.999
    assert (np.bincount(bins.items, minlength=len(lengths)) == 1).all()


@pytest.mark.parametrize("lengths", [[4, 9], [4, 0]])
def test_a_length_that_fits_no_bin_is_refused(lengths):
    with pytest.raises(ValueError, match=f"a document of {lengths[1]} tokens .* sequences of 1 to 8 tokens"):
        pack(np.array(lengths), 8)


def test_no_documents_make_no_bins():
    bins = pack(np.zeros(0, np.int32), 8)
    assert len(bins) == 0 and bins.offsets.tolist() == [0] and len(bins.sums(np.zeros(0, np.int64))) == 0
