"""Prepared data that was made to harm: nothing in it is executed, and no number reaches beyond its file."""

import io
import json
import os
import pickle
import resource
import struct
from pathlib import Path

import numpy as np
import pytest

from data.checksums import own_sum
from data.index import DocumentIndex, write_index
from data.prefix import PrefixIndex
from tests.data.test_index import without_checksums

DOCUMENTS, LENGTH = 20, 50
LENGTHS, POINTERS = 34, 34 + 4 * DOCUMENTS  # where they begin in tokens.idx


@pytest.fixture
def folder(tmp_path) -> Path:
    """Data whose checksums its maker has left out."""
    tokens = np.arange(LENGTH)
    write_index(tmp_path / "data", [(tokens, [[0, 20]])] * DOCUMENTS, vocab_size=900)
    without_checksums(tmp_path / "data")
    return tmp_path / "data"


def array(header: str, body: bytes = b"") -> bytes:
    """A .npy file with a header of our own."""
    padded = header.ljust((len(header) + 10) // 64 * 64 + 117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded.encode() + body


def numbers(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


class Payload:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_arrays_execute_nothing(folder, tmp_path):
    objects = "{'descr': '|O', 'fortran_order': False, 'shape': (20, 2), }"
    for name in ("spans.npy", "spans_offsets.npy", "sources.npy", "kinds.npy"):
        content = (folder / name).read_bytes() if (folder / name).exists() else None
        for bad in (
            array(objects, pickle.dumps(Payload(tmp_path / "mark"))),
            array(f"__import__('os').system('touch {tmp_path / 'mark'}')", bytes(160)),
        ):
            (folder / name).write_bytes(bad)
            with pytest.raises(ValueError, match=rf"{name} is damaged"):
                DocumentIndex(folder)
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("spans.npy", array("{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000, 2), }", bytes(160))),
        ("spans.npy", array("{'descr': '<i4', 'fortran_order': False, 'shape': (-1, 2), }", bytes(160))),
        ("spans.npy", array("{'descr': '<i8', 'fortran_order': False, 'shape': (20,), }", bytes(160))),
        ("spans.npy", array("{'descr': '<i4', 'fortran_order': True, 'shape': (20, 2), }", bytes(160))),
        ("spans_offsets.npy", numbers(np.arange(DOCUMENTS + 1)[::-1])),
        ("spans_offsets.npy", numbers(np.array([0, 10**12, *[1] * (DOCUMENTS - 2), DOCUMENTS]))),
        ("spans_offsets.npy", numbers(np.array([-5, *[0] * (DOCUMENTS - 1), DOCUMENTS]))),
        ("spans_offsets.npy", numbers(np.arange(DOCUMENTS + 1.0))),
    ],
)
def test_spans_stay_within_their_file(folder, name, content):
    (folder / name).write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="prepare the data again"):
        DocumentIndex(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 2**10


@pytest.mark.parametrize(
    ("place", "content"),
    [
        (18, struct.pack("<QQ", 10**15, 10**15)),
        (18, struct.pack("<QQ", DOCUMENTS, 10**15)),
        (18, struct.pack("<QQ", 2**64 - 1, 2**64 - 1)),
        (LENGTHS, struct.pack("<i", 10**9)),
        (LENGTHS, struct.pack("<ii", -LENGTH, 3 * LENGTH)),
        (POINTERS, struct.pack("<q", 10**14)),
        (POINTERS, struct.pack("<q", -(10**6))),
    ],
)
def test_documents_stay_within_their_file(folder, place, content):
    idx = folder / "tokens.idx"
    changed = bytearray(idx.read_bytes())
    changed[place : place + len(content)] = content
    idx.write_bytes(changed)
    for opened in (lambda: DocumentIndex(folder), lambda: PrefixIndex(folder / "tokens")):
        with pytest.raises(ValueError, match=r"tokens\.idx"):
            opened()
        (folder / "spans.npy").unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd"])
def test_names_do_not_leave_their_directory(folder, name):
    meta = json.loads((folder / "meta.json").read_text())
    meta["checksums"] = {name: "0"}
    (folder / "meta.json").write_text(json.dumps(meta | {"checksum": own_sum(meta)}) + "\n")
    with pytest.raises(ValueError, match=f"names a file outside its directory: {name}"):
        DocumentIndex(folder)
