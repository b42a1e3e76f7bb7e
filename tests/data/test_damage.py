"""A flipped byte and a cut tail in every file of a data directory are named, by --verify and where they are read."""

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from checkpoint_tools import inspect_checkpoint
from data.index import DocumentIndex, write_index
from tests.data.test_index import without_checksums

DOCUMENTS = 300


class Tokenizer:
    """What a tokenizer does when it is saved."""

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "tokenizer.json").write_text('{"a": 1}')


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    numbers = np.random.default_rng(1)
    lengths = numbers.integers(2, 2000, DOCUMENTS)
    documents = [(numbers.integers(0, 900, length), [[0, length // 2 + 1]]) for length in lengths]
    folder = tmp_path_factory.mktemp("index") / "data"
    write_index(folder, documents, vocab_size=900, tokenizer=Tokenizer())
    return folder


def read_all(folder: Path) -> None:
    index = DocumentIndex(folder)
    for document in range(len(index)):
        index.tokens(document)
    index.spans_of(np.arange(len(index)))


def test_every_flip_and_every_cut_is_named(folder, capsys):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert {"tokens.bin", "tokens.bin.sums", "spans.npy", "meta.json", "tokenizer.json"} <= {
        path.name for path in files
    }
    for path in files:
        content, numbers = path.read_bytes(), random.Random(path.name)
        places = [0, len(content) // 2, len(content) - 1, *(numbers.randrange(len(content)) for _ in range(4)), None]
        for place in places:
            changed = bytearray(content)
            if place is not None:
                changed[place] ^= 1 << numbers.randrange(8)
            path.write_bytes(changed if place is not None else changed[:-1])
            with pytest.raises(ValueError, match=path.name.removesuffix(".sums")):
                read_all(folder)
            assert inspect_checkpoint.main(folder, verify=True) == 1
            assert path.name.removesuffix(".sums") in capsys.readouterr().out, (path, place)
        path.write_bytes(content)
    assert inspect_checkpoint.main(folder, verify=True) == 0
    assert capsys.readouterr().out == f"{folder} is intact\n"


def test_only_documents_in_a_damaged_block_are_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    with open(copy / "tokens.bin", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    index = DocumentIndex(copy)
    assert index.tokens(0).tolist() == DocumentIndex(folder).tokens(0).tolist()
    with pytest.raises(ValueError, match=r"tokens.bin is damaged: its bytes [\d,]+ to [\d,]+ are not .* it again"):
        index.tokens(DOCUMENTS - 1)


def test_directories_without_checksums_are_read(folder, tmp_path, capsys):
    older = shutil.copytree(folder, tmp_path / "older")
    without_checksums(older)
    read_all(older)
    assert DocumentIndex(older).fingerprint == DocumentIndex(folder).fingerprint
    assert inspect_checkpoint.main(older, verify=True) == 0
    assert "has no checksums" in capsys.readouterr().out
