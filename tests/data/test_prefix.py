"""megatron-core's own files as data: every type it writes, every token but the first supervised."""

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from data.index import open_index, write_index
from data.prefix import PrefixIndex
from data.token_files import DTYPES

SEQUENCES = [[5, 6, 7], [], [8], [1, 2, 3, 4]]


def write_prefix(prefix: Path, sequences=SEQUENCES, dtype=np.int32, modes=None, pointers=None) -> Path:
    """The pair of files, laid out here by hand."""
    dtype = np.dtype(dtype)
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    if pointers is None:
        pointers = (np.cumsum(lengths) - lengths) * dtype.itemsize
    code = next(code for code, known in DTYPES.items() if known == dtype)
    boundaries = np.array([0, len(sequences)], np.int64)  # one document of all sequences
    parts = [
        lengths,
        np.asarray(pointers, np.int64),
        boundaries,
        *([] if modes is None else [np.array(modes, np.int8)]),
    ]
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(boundaries))
    prefix.with_name(prefix.name + ".idx").write_bytes(header + b"".join(part.tobytes() for part in parts))
    tokens = np.concatenate([np.asarray(sequence, dtype) for sequence in sequences])
    prefix.with_name(prefix.name + ".bin").write_bytes(tokens.tobytes())
    return prefix


def test_megatron_core_writes_it_and_it_needs_no_preparation(tmp_path):
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    assert {code: np.dtype(DType.dtype_from_code(code)) for code in DTYPES} == DTYPES
    assert len(DTYPES) == len(DType)
    prefix = tmp_path / "corpus_text_document"
    for dtype in DTYPES.values():
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype.type)
        builder.add_document(torch.tensor([5, 6, 7, 8]), [3, 1])  # two sequences of one document
        builder.add_document(torch.tensor([9, 10]), [0, 2])
        builder.finalize(f"{prefix}.idx")
        for name in (prefix, f"{prefix}.bin", f"{prefix}.idx"):
            index = open_index(name)
            assert [index.tokens(document).tolist() for document in range(3)] == [[5, 6, 7], [8], [9, 10]]
        assert index.lengths.tolist() == [3, 1, 2] and index.lengths.dtype == np.int32
        assert [index.spans(document).tolist() for document in range(3)] == [[[1, 3]], [], [[1, 2]]]
        assert index.tokens(0).dtype == (np.int64 if dtype.kind == "f" else dtype)


def test_what_is_known_of_a_prefix(tmp_path):
    index = open_index(write_prefix(tmp_path / "corpus"))
    assert index.may_be_cut and index.largest_sampled == 8
    assert index.meta == {
        "documents": 3, "tokens": 8, "supervised_tokens": 5, "longest": 4, "empty_sequences": 1,
    }  # fmt: skip
    assert index.source_names == ["corpus"] and index.kinds == ["text"]
    assert index.sources.tolist() == index.kind_numbers.tolist() == [0, 0, 0]
    spans, counts = index.spans_of(np.array([2, 1, 0]))
    assert spans.tolist() == [[1, 4], [1, 3]] and counts.tolist() == [1, 0, 1]
    copy = pickle.loads(pickle.dumps(index))
    assert isinstance(copy, PrefixIndex) and copy.tokens(2).tolist() == [1, 2, 3, 4]


def test_the_fingerprint_knows_lengths_type_and_content(tmp_path):
    many = [list(range(n % 50)) for n in range(20_000)]  # 2 MB: more than is sampled
    prefixes = {
        "same": write_prefix(tmp_path / "same", many),
        "type": write_prefix(tmp_path / "type", many, dtype=np.int64),
        "lengths": write_prefix(tmp_path / "lengths", [many[1] + many[2], [], *many[3:]]),
        "shifted": write_prefix(tmp_path / "shifted", [[1 + token for token in sequence] for sequence in many]),
        "last": write_prefix(tmp_path / "last", [*many[:-1], [*many[-1][:-1], 0]]),
    }
    found = {name: open_index(prefix).fingerprint for name, prefix in prefixes.items()}
    assert len(set(found.values())) == len(found)
    assert open_index(write_prefix(tmp_path / "again", many)).fingerprint == found["same"]


def test_the_files_of_prepared_data_are_no_prefix(tmp_path):
    write_index(tmp_path / "data", [([1, 2, 3], [(1, 2)])], vocab_size=10)
    for name in ("tokens", "tokens.bin", "tokens.idx"):
        with pytest.raises(ValueError, match=f"tokens.bin is part of prepared data, .* give {tmp_path / 'data'}$"):
            open_index(tmp_path / "data" / name)
    assert len(open_index(write_prefix(tmp_path / "tokens"))) == 3


def test_damaged_prefixes_are_refused(tmp_path):
    def refused(sentence: str, **changes) -> None:
        with pytest.raises(ValueError, match=sentence):
            open_index(write_prefix(tmp_path / "a", **changes))

    for pointers in ([0, 12, 12, 20], [-4, 12, 12, 16], [0, 13, 12, 16], [0, 12, 12 - 2**32, 16]):
        refused("does not place its sequences end to end", pointers=pointers)
    refused("is empty", sequences=[[], []])
    refused("2 of 4 sequences are not text", modes=[0, 1, 0, 1])
    assert len(open_index(write_prefix(tmp_path / "a", modes=[0, 0, 0, 0]))) == 3
    with pytest.raises(ValueError, match=r"a.bin holds numbers that are no token ids, such as (nan|inf)"):
        open_index(write_prefix(tmp_path / "a", [[1, 2], [float("nan"), 3]], dtype=np.float64))
    with pytest.raises(ValueError, match=r"a:0 holds numbers that are no token ids, such as 0.5"):
        open_index(write_prefix(tmp_path / "a", [[2, 0.5]], dtype=np.float32)).tokens(0)

    idx = write_prefix(tmp_path / "a").with_name("a.idx")
    whole = idx.read_bytes()
    for content, sentence in (
        (whole[:-3], "a.idx is cut off: its header asks for 98 bytes and it has 95"),
        (b"", "a.idx is not the index of a megatron-core data set, or is cut off"),
        (whole[:20], "a.idx is not the index of a megatron-core data set, or is cut off"),
        (b"x" + whole[1:], "a.idx is not the index of a megatron-core data set"),
        (whole[:17] + b"\x09" + whole[18:], "dtype code 9, which megatron-core does not know"),
    ):
        idx.write_bytes(content)
        with pytest.raises(ValueError, match=sentence):
            open_index(tmp_path / "a")
    idx.write_bytes(whole)
    os.truncate(tmp_path / "a.bin", 30)
    with pytest.raises(ValueError, match=r"a.bin and a.idx do not belong together"):
        open_index(tmp_path / "a")
    os.remove(tmp_path / "a.bin")
    for name in ("a", "a.bin", "a.idx"):
        with pytest.raises(ValueError, match=r"no such data directory, nor .*/a.bin with .*/a.idx; make a directory"):
            open_index(tmp_path / name)
