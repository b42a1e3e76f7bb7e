"""The index on disk: read by megatron-core, handed to other processes, refused when damaged."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from data.index import DocumentIndex, IndexWriter, open_index, write_index


def test_megatron_reads_the_index(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    for vocab_size, dtype in ((500, np.uint16), (70_000, np.int32)):
        documents = [(np.arange(n) * 7 % vocab_size, [[0, 1], [n - 1, n]]) for n in (5, 1 + 2, 11)]
        meta = write_index(tmp_path / dtype.__name__, documents, vocab_size=vocab_size)
        theirs = IndexedDataset(str(tmp_path / dtype.__name__ / "tokens"))
        ours = DocumentIndex(tmp_path / dtype.__name__)
        assert theirs.index.dtype == dtype == ours.tokens(0).dtype
        assert theirs.document_indices.tolist() == [0, 1, 2, 3]
        np.testing.assert_array_equal(theirs.sequence_lengths, ours.lengths)
        for number, (tokens, spans) in enumerate(documents):
            np.testing.assert_array_equal(theirs[number], tokens)
            np.testing.assert_array_equal(ours.tokens(number), tokens)
            np.testing.assert_array_equal(ours.spans(number), spans)
        assert meta["supervised_tokens"] == 6
        with pytest.raises(ValueError):
            ours.tokens(0)[0] = 1  # read-only


def test_index_goes_to_other_processes_and_knows_its_content(tmp_path):
    documents = [([1, 2, 3], [[1, 3]]), ([4, 5], []), ([6], [[0, 1]])]
    write_index(tmp_path / "a", documents, vocab_size=10, meta={"note": 1})
    write_index(tmp_path / "b", documents, vocab_size=10, meta={"note": 2})
    write_index(tmp_path / "c", [([1, 2, 3], [[2, 3]]), *documents[1:]], vocab_size=10)
    first, second, third = (DocumentIndex(tmp_path / name) for name in "abc")
    assert first.fingerprint == second.fingerprint != third.fingerprint
    copy = pickle.loads(pickle.dumps(first))
    assert copy.tokens(-1).tolist() == first.tokens(2).tolist() == [6]
    assert copy.spans(1).shape == (0, 2) and copy.spans(-1).tolist() == [[0, 1]]
    assert copy.lengths.tolist() == [3, 2, 1] and copy.lengths.dtype == np.int32


@pytest.mark.parametrize("spans", [[[2, 1]], [[0, 4]], [[0, 2], [1, 3]], [[-1, 2]]])
def test_writer_refuses_spans_that_are_none(tmp_path, spans):
    with pytest.raises(ValueError, match="sorted, disjoint"):
        write_index(tmp_path / "a", [([1, 2, 3], spans)], vocab_size=10)
    assert list(tmp_path.iterdir()) == []


def without_checksums(folder: Path) -> None:
    """Makes a directory what an older version wrote."""
    for path in folder.glob("*.sums"):
        path.unlink()
    meta = json.loads((folder / "meta.json").read_text())
    rest = {name: value for name, value in meta.items() if name not in ("checksum", "checksums")}
    (folder / "meta.json").write_text(json.dumps(rest))


def test_damaged_directories_are_refused(tmp_path):
    write_index(tmp_path / "a", [([1, 2, 3], [[1, 3]])] * 9, vocab_size=10)
    with pytest.raises(ValueError, match="outside the vocabulary of 3"):
        write_index(tmp_path / "b", [([1, 2, 3], [[1, 3]])], vocab_size=3)
    with pytest.raises(ValueError, match="there is no such data directory"):
        DocumentIndex(tmp_path / "missing")
    for name, size in (("tokens.bin", 10), ("tokens.idx", 60), ("tokens.bin", 0)):
        os.truncate(tmp_path / "a" / name, size)
        with pytest.raises(ValueError, match="prepare the data again"):
            DocumentIndex(tmp_path / "a")
    write_index(tmp_path / "c", [([1, 2, 3], [[1, 3]])] * 9, vocab_size=10)
    without_checksums(tmp_path / "c")
    for name, size in (("spans_offsets.npy", 0), ("spans.npy", 150)):
        os.truncate(tmp_path / "c" / name, size)
        with pytest.raises(ValueError, match=rf"/c: {name} is damaged, prepare the data again"):
            DocumentIndex(tmp_path / "c")
    (tmp_path / "a" / "meta.json").unlink()
    with pytest.raises(ValueError, match="meta.json missing"):
        DocumentIndex(tmp_path / "a")


def test_documents_know_their_source_and_kind(tmp_path):
    writer = IndexWriter(tmp_path / "mixed", vocab_size=10)
    one = (np.array([1, 2, 3]), np.array([3]), np.array([[1, 3]]), np.array([1]))
    two = (np.array([4, 5, 6]), np.array([2, 1]), np.array([[0, 1]]), np.array([0, 1]))
    writer.add(*one, sources=np.array([2]), kinds=np.array([1]))
    with pytest.raises(ValueError, match="sources are given for all documents or for none"):
        writer.add(*two)
    with pytest.raises(ValueError, match="sources are a number from 0 to 65535 for each document"):
        writer.add(*two, sources=np.array([0, 70_000]), kinds=np.array([0, 0]))
    writer.add(*two, sources=np.array([0, 2]), kinds=np.array([0, 1]))
    writer.close(
        {
            "may_be_cut": True,
            "sources": [{"name": name} for name in ("cot", "tir", "genselect")],
            "kinds": ["messages", "text"],
        }
    )
    index = open_index(tmp_path / "mixed")
    assert index.source_names == ["cot", "tir", "genselect"] and index.kinds == ["messages", "text"]
    assert index.sources.tolist() == [2, 0, 2] and index.kind_numbers.tolist() == [1, 0, 1]
    assert (index.sources.dtype, index.kind_numbers.dtype) == (np.uint16, np.uint8)
    assert not index.sources.flags.writeable and index.may_be_cut
    # training on the same documents is the same, wherever they came from
    write_index(tmp_path / "plain", [([1, 2, 3], [[1, 3]]), ([4, 5], []), ([6], [[0, 1]])], vocab_size=10)
    older = DocumentIndex(tmp_path / "plain")
    assert older.fingerprint == index.fingerprint and not older.may_be_cut
    assert older.source_names == ["plain"] and older.kinds == ["unknown"]
    assert older.sources.tolist() == older.kind_numbers.tolist() == [0, 0, 0]
    assert (older.sources.dtype, older.kind_numbers.dtype) == (np.uint16, np.uint8)

    without_checksums(tmp_path / "mixed")
    np.save(tmp_path / "mixed" / "sources.npy", np.array([2, 0, 3], np.uint16))
    with pytest.raises(ValueError, match="sources.npy has numbers that meta.json does not name"):
        DocumentIndex(tmp_path / "mixed")
    np.save(tmp_path / "mixed" / "sources.npy", np.array([2, 0], np.uint16))
    with pytest.raises(ValueError, match="sources.npy and tokens.idx do not belong together"):
        DocumentIndex(tmp_path / "mixed")


def test_spans_of_many_documents(tmp_path):
    documents = [([1] * 9, [[1, 3], [5, 9]]), ([2] * 4, []), ([3] * 2, [[0, 2]])]
    write_index(tmp_path / "a", documents, vocab_size=10)
    index = DocumentIndex(tmp_path / "a")
    spans, counts = index.spans_of(np.array([2, 1, 0]))
    assert spans.tolist() == [[0, 2], [1, 3], [5, 9]] and counts.tolist() == [1, 0, 2]
    spans, counts = index.spans_of(np.array([], np.int64))
    assert spans.shape == (0, 2) and counts.shape == (0,)
