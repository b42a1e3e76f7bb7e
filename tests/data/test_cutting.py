"""Pieces of long documents predict what the whole documents did, each token once."""

import pickle

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.cutting import Pieces
from data.index import DocumentIndex, write_index
from tests.support.loading import MemoryIndex, in_memory


@st.composite
def _documents(draw: st.DrawFn) -> tuple[MemoryIndex, int]:
    documents = []
    for number in range(draw(st.integers(1, 8))):
        length = draw(st.integers(1, 40))
        cuts = draw(st.lists(st.integers(0, length), unique=True, max_size=6).map(sorted))
        spans = [(begin, end) for begin, end in zip(cuts[::2], cuts[1::2], strict=False)]
        documents.append((np.arange(length) + 100 * number, spans))
    sources = draw(st.lists(st.integers(0, 2), min_size=len(documents), max_size=len(documents)))
    return MemoryIndex(documents, sources=sources), draw(st.integers(2, 12))


def predicted(tokens: np.ndarray, spans: np.ndarray) -> list[tuple[int, int]]:
    """(token, label) of every supervised token that has one before it."""
    return [(int(tokens[at - 1]), int(tokens[at])) for begin, end in spans.tolist() for at in range(max(begin, 1), end)]


@settings(deadline=None, max_examples=400)
@given(_documents())
def test_pieces_predict_what_whole_documents_do(case):
    index, longest = case
    view = Pieces(index, longest)
    expected = [pair for number in range(len(index)) for pair in predicted(index.tokens(number), index.spans(number))]
    found = [pair for number in range(len(view)) for pair in predicted(view.tokens(number), view.spans(number))]
    assert found == expected  # in the order of the documents, each once
    assert view.lengths.tolist() == [len(view.tokens(number)) for number in range(len(view))]
    assert view.lengths.max(initial=0) <= longest and view.lengths.dtype == np.int32

    owners = [int(view.tokens(number)[0]) // 100 for number in range(len(view))]
    assert owners == sorted(owners) and view.sources.tolist() == index.sources[owners].tolist()
    for number, owner in enumerate(owners):
        cut = index.lengths[owner] > longest
        spans = view.spans(number)
        assert not cut or predicted(view.tokens(number), spans)  # no piece bears nothing
        assert (spans[:, 0] < spans[:, 1]).all() and (spans >= 0).all() and (spans <= view.lengths[number]).all()
        if not cut:
            assert view.place(number) == f"memory:{owner}"
            assert view.tokens(number).tolist() == index.tokens(owner).tolist()

    # tokens in = tokens out: nothing is lost without a count
    held = [set(view.tokens(number).tolist()) for number in range(len(view))]
    assert index.lengths.sum() - view.lost_tokens == len(set().union(*held))
    assert view.lengths.sum() == index.lengths.sum() - view.lost_tokens + view.repeated_tokens
    whole = int(np.count_nonzero(index.lengths <= longest))
    assert (len(view), view.cut) == (whole + view.pieces, len(index) - whole)
    whole_pieces = sum(-(-(length - 1) // (longest - 1)) for length in index.lengths.tolist() if length > longest)
    assert view.pieces + view.dropped == whole_pieces


def test_a_document_in_pieces():
    index = in_memory([[7, 8], list(range(10, 22)), [9]], [[(1, 2)], [(0, 5), (11, 12)], [(0, 1)]])
    view = Pieces(index, 5)
    assert [view.tokens(number).tolist() for number in range(len(view))] == [
        [7, 8], [10, 11, 12, 13, 14], [18, 19, 20, 21], [9],
    ]  # fmt: skip
    assert [view.spans(number).tolist() for number in range(4)] == [[[1, 2]], [[0, 5]], [[3, 4]], [[0, 1]]]
    assert [view.place(number) for number in range(3)] == ["data:0", "data:1, tokens 0 to 5", "data:1, tokens 8 to 12"]
    assert view.tokens(-1).tolist() == [9] and view.spans(-2).tolist() == [[3, 4]]
    assert (view.cut, view.pieces, view.dropped) == (1, 2, 1)
    assert (view.lost_tokens, view.repeated_tokens) == (3, 0)  # tokens 15, 16, 17
    assert view.fingerprint == "of-data, cut at 5"


def test_pieces_go_to_other_processes(tmp_path):
    write_index(tmp_path / "a", [(range(1, 10), [[2, 9]]), ([1], [])], vocab_size=10)
    view = pickle.loads(pickle.dumps(Pieces(DocumentIndex(tmp_path / "a"), 4)))
    assert [view.tokens(number).tolist() for number in range(4)] == [[1, 2, 3, 4], [4, 5, 6, 7], [7, 8, 9], [1]]
