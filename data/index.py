"""Prepared documents on disk: tokens as megatron-core's IndexedDataset, supervised spans beside them.

tokens.bin          all tokens, one document after the other, uint16 or int32 by the vocabulary's size
tokens.idx          9 bytes magic, u64 version, u8 dtype code, u64 sequences, u64 documents + 1,
                    int32 [sequences] lengths, int64 [sequences] byte offsets, int64 [documents + 1]
                    sequence numbers at document boundaries (here 0..n: a document is one sequence)
spans.npy           int32 [all spans, 2] half-open token ranges within their document
spans_offsets.npy   int64 [documents + 1]: document d has the spans [offsets[d], offsets[d + 1])
meta.json           counts, drops, fingerprints, template, options
tokenizer/          the tokenizer with the chat template that was used
"""

import hashlib
import json
import mmap
import os
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype] = {8: np.dtype(np.uint16), 4: np.dtype(np.int32)}  # megatron-core's codes
_FILES = ("meta.json", "tokens.bin", "tokens.idx", "spans.npy", "spans_offsets.npy")


class DocumentIndex:
    """Memory-mapped documents of one prepared data directory.

    Raises ValueError, in one sentence, where the directory is missing, half-written or damaged.
    """

    path: Path
    meta: dict[str, Any]
    fingerprint: str  # of tokens, spans and the tokenizer: equal where training on them is
    lengths: np.ndarray  # int32 [documents], tokens per document

    def __init__(self, path: str | Path):
        self.path = Path(path)
        _check_files(self.path)
        try:
            self.meta = json.loads((self.path / "meta.json").read_text(encoding="utf-8"))
            self.fingerprint = self.meta["fingerprint"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.path}: meta.json is damaged, prepare the data again") from None
        index = _map(self.path / "tokens.idx")
        if len(index) < _HEADER.size:
            raise ValueError(f"{self.path}: tokens.idx is cut off, prepare the data again")
        magic, _, code, count, boundaries = _HEADER.unpack_from(index)
        if magic != _MAGIC or code not in _DTYPES or boundaries != count + 1:
            raise ValueError(f"{self.path}: tokens.idx is not an index that was written here")
        if len(index) != _HEADER.size + 4 * count + 8 * count + 8 * boundaries:
            raise ValueError(f"{self.path}: tokens.idx is cut off, prepare the data again")
        # a copy, because the header's 34 bytes leave the mapped numbers unaligned
        self.lengths = np.frombuffer(index, np.int32, count, _HEADER.size).copy()
        self._pointers = np.frombuffer(index, np.int64, count, _HEADER.size + 4 * count)
        self._tokens = np.frombuffer(_map(self.path / "tokens.bin"), _DTYPES[code])
        self._spans = np.load(self.path / "spans.npy", mmap_mode="r").view(np.ndarray)
        self._offsets = np.load(self.path / "spans_offsets.npy", mmap_mode="r").view(np.ndarray)
        whole = len(self._tokens) == self.lengths.sum(dtype=np.int64)
        if not whole or len(self._offsets) != count + 1 or self._offsets[-1] != len(self._spans):
            raise ValueError(f"{self.path}: tokens and index do not belong together, prepare the data again")

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self):
        return DocumentIndex, (self.path,)  # a process that is handed an index maps the files itself

    def tokens(self, document: int) -> np.ndarray:
        """Token ids [length] of a document, a read-only view on the memory map."""
        start = int(self._pointers[document]) // self._tokens.itemsize
        return self._tokens[start : start + int(self.lengths[document])]

    def spans(self, document: int) -> np.ndarray:
        """Supervised tokens of a document: int32 [n, 2] half-open ranges, sorted and disjoint."""
        if document < 0:
            document += len(self)
        return self._spans[self._offsets[document] : self._offsets[document + 1]]


def _map(path: Path):
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _check_files(path: Path) -> None:
    if not path.is_dir():
        unfinished = [path.with_name(path.name + ending) for ending in (".parts", ".partial")]
        if any(other.exists() for other in unfinished):
            raise ValueError(f"{path} is half-written: run examples/prepare_data.py again, it will continue")
        raise ValueError(f"{path}: there is no such data directory, make one with examples/prepare_data.py")
    missing = [name for name in _FILES if not (path / name).is_file()]
    if missing:
        raise ValueError(f"{path} is no prepared data directory: {', '.join(missing)} missing")
    if (path / "tokens.bin").stat().st_size == 0:
        raise ValueError(f"{path}: tokens.bin is empty, prepare the data again")


class IndexWriter:
    """Writes a data directory beside its place and moves it there when it is complete."""

    def __init__(self, path: str | Path, *, vocab_size: int):
        self.path = Path(path)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        # where files that belong to the data may be added before it is closed
        self.directory = self.path.with_name(self.path.name + ".partial")
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        self._bin = open(self.directory / "tokens.bin", "wb")  # noqa: SIM115 (closed by close or discard)
        self._hash = hashlib.sha256(self.dtype.name.encode())
        self._lengths: list[np.ndarray] = []
        self._spans: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []  # spans of each document

    def add(self, tokens: np.ndarray, lengths: np.ndarray, spans: np.ndarray, counts: np.ndarray) -> None:
        """Adds documents laid end to end.

        Shapes: tokens [sum of lengths], lengths [documents], spans [sum of counts, 2] with ranges within
        their document, counts [documents]. Raises ValueError for spans or ids out of range.
        """
        spans = np.asarray(spans, dtype=np.int32).reshape(-1, 2)
        if len(tokens) != np.sum(lengths) or len(spans) != np.sum(counts) or len(lengths) != len(counts):
            raise ValueError("tokens, lengths, spans and counts do not belong together")
        if len(tokens) and not 0 <= np.min(tokens) <= np.max(tokens) < self.vocab_size:
            raise ValueError(f"token id {np.max(tokens)} is outside the vocabulary of {self.vocab_size}")
        owner = np.repeat(np.arange(len(counts)), counts)
        overlap = (owner[1:] == owner[:-1]) & (spans[1:, 0] < spans[:-1, 1])
        ends = np.asarray(lengths)[owner]
        outside = (spans[:, 0] < 0) | (spans[:, 0] >= spans[:, 1]) | (spans[:, 1] > ends)
        if outside.any() or overlap.any():
            raise ValueError("supervised spans must be sorted, disjoint, not empty and inside their document")
        data = np.ascontiguousarray(tokens, dtype=self.dtype).data
        self._bin.write(data)
        self._hash.update(data)
        self._lengths.append(np.asarray(lengths, dtype=np.int32))
        self._spans.append(spans)
        self._counts.append(np.asarray(counts, dtype=np.int64))

    @property
    def documents(self) -> int:
        return sum(len(lengths) for lengths in self._lengths)

    def close(self, meta: dict[str, Any], tokenizer=None) -> dict[str, Any]:
        """Writes index, spans, tokenizer and meta, moves the directory to its place, returns the meta."""
        lengths = np.concatenate([*self._lengths, np.empty(0, np.int32)])
        spans = np.concatenate([*self._spans, np.empty((0, 2), np.int32)])
        counts = np.concatenate([np.zeros(1, np.int64), *self._counts])
        offsets = np.cumsum(counts)
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        self._write_idx(lengths)
        np.save(self.directory / "spans.npy", spans)
        np.save(self.directory / "spans_offsets.npy", offsets)
        for part in (lengths, spans, offsets, str(meta.get("tokenizer_fingerprint")).encode()):
            self._hash.update(part)
        meta = {
            "documents": len(lengths),
            "tokens": int(lengths.sum(dtype=np.int64)),
            "supervised_tokens": int((spans[:, 1] - spans[:, 0]).sum(dtype=np.int64)),
            "longest": int(lengths.max(initial=0)),
            "vocab_size": self.vocab_size,
            "dtype": self.dtype.name,
            **meta,
            "fingerprint": self._hash.hexdigest()[:32],
        }
        if tokenizer is not None:
            tokenizer.save_pretrained(self.directory / "tokenizer")
        (self.directory / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        os.rename(self.directory, self.path)
        return meta

    def discard(self) -> None:
        """Removes what was written."""
        self._bin.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _write_idx(self, lengths: np.ndarray) -> None:
        code = next(code for code, dtype in _DTYPES.items() if dtype == self.dtype)
        pointers = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1].astype(np.int64) * self.dtype.itemsize, out=pointers[1:])
        with open(self.directory / "tokens.idx", "wb") as file:
            file.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
            for part in (lengths, pointers, np.arange(len(lengths) + 1, dtype=np.int64)):
                file.write(part.tobytes())


def token_dtype(vocab_size: int) -> np.dtype:
    """The type tokens are kept in, by megatron-core's own rule."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


def write_index(
    path: str | Path,
    documents: Iterable[tuple[Any, Any]],
    *,
    vocab_size: int,
    meta: dict[str, Any] | None = None,
    tokenizer=None,
) -> dict[str, Any]:
    """Writes (tokens [length], spans [n, 2]) pairs as a data directory and returns its meta."""
    writer = IndexWriter(path, vocab_size=vocab_size)
    try:
        for tokens, spans in documents:
            tokens, spans = np.asarray(tokens), np.asarray(spans, dtype=np.int32).reshape(-1, 2)
            writer.add(tokens, np.array([len(tokens)]), spans, np.array([len(spans)]))
        if not writer.documents:
            raise ValueError(f"{path}: there are no documents to write")
        return writer.close(meta or {}, tokenizer)
    except BaseException:
        writer.discard()
        raise
