"""Prepared documents on disk: tokens as megatron-core's IndexedDataset, supervised spans beside them.

tokens.bin          all tokens, one document after the other, uint16 or int32 by the vocabulary's size
tokens.idx          where each document lies, see `data.token_files`: a document is one sequence
spans.npy           int32 [all spans, 2] half-open token ranges within their document
spans_offsets.npy   int64 [documents + 1]: document d has the spans [offsets[d], offsets[d + 1])
sources.npy         uint16 [documents]: the document's source, by its place in meta.json's "sources"
kinds.npy           uint8 [documents]: the kind of row it was made of, by its place in meta.json's "kinds"
meta.json           counts, drops, fingerprints, template, options
tokenizer/          the tokenizer with the chat template that was used

Beside each file of numbers lie its checksums (`data.checksums`); meta.json has those of all other files and of itself.
Older directories have none of them, and neither sources.npy nor kinds.npy: all their documents are of one source and
kind.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data.checked_files import CheckedMap, verify
from data.checksums import DATA_BLOCK, BlockSums, DamagedFile, write_sums
from data.documents import Documents, constant, runs_of
from data.index_checks import FILES, META, NUMBERS, READ_WHOLE, add_checksums, read_meta, small_faults
from data.prefix import PrefixIndex, prefix_of
from data.token_files import map_file, map_token_files, write_idx

_LARGEST = {name: int(np.iinfo(dtype).max) for name, dtype in NUMBERS.items()}


class DocumentIndex(Documents):
    """Memory-mapped documents of one prepared data directory.

    The fingerprint is that of tokens, spans and the tokenizer. Raises ValueError, in one sentence, where the
    directory is missing, half-written or damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        _check_files(self.path)
        try:
            self.meta = read_meta(self.path)
            self.fingerprint = self.meta["fingerprint"]
            self.source_names = [source["name"] for source in self.meta.get("sources", [])]
            self.kinds = list(self.meta.get("kinds", []))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{self.path}: meta.json is damaged, prepare the data again") from None
        try:
            for fault in small_faults(self.path, self.meta):
                raise DamagedFile(fault)
            for name in READ_WHOLE:
                if (self.path / name).exists():
                    verify(self.path / name)
            self._files = map_token_files(self.path / "tokens.idx", self.path / "tokens.bin")
            self._checked_tokens = CheckedMap(self.path / "tokens.bin", memoryview(map_file(self.path / "tokens.bin")))
            self._checked_spans = CheckedMap(self.path / "spans.npy", memoryview(map_file(self.path / "spans.npy")))
            self._checked_spans.check_run(0, 128)  # what says how the numbers lie
        except ValueError as error:
            raise ValueError(f"{error}; prepare the data again") from None
        self.lengths = self._files.lengths
        self._spans, self._offsets = self._map("spans.npy"), self._map("spans_offsets.npy")
        self._spans_start = (self.path / "spans.npy").stat().st_size - self._spans.nbytes
        spans, offsets = self._spans, self._offsets
        whole = spans.dtype == np.int32 and spans.shape[1:] == (2,) and spans.flags.c_contiguous
        whole = whole and offsets.dtype == np.int64 and offsets.shape == (len(self) + 1,)
        if not whole or (offsets[0], offsets[-1]) != (0, len(spans)) or (offsets[1:] < offsets[:-1]).any():
            raise ValueError(f"{self.path}: spans and tokens do not belong together, prepare the data again")
        self.may_be_cut = bool(self.meta.get("may_be_cut"))
        self.sources = self._numbers("sources.npy", self.source_names, self.path.absolute().name, np.uint16)
        self.kind_numbers = self._numbers("kinds.npy", self.kinds, "unknown", np.uint8)

    def __reduce__(self):
        return DocumentIndex, (self.path,)  # a process that is handed an index maps the files itself

    def tokens(self, document: int) -> np.ndarray:
        """Token ids [length] of a document, a read-only view on the memory map."""
        start = int(self._files.pointers[document])
        self._check(self._checked_tokens, start, start + int(self.lengths[document]) * self._files.tokens.itemsize)
        return self._files.sequence(document)

    def _check(self, file: CheckedMap, start: int | np.ndarray, stop: int | np.ndarray) -> None:
        try:
            if isinstance(start, np.ndarray):
                file.check_runs(start, np.asarray(stop))
            else:
                file.check_run(start, int(stop))
        except DamagedFile as error:
            raise DamagedFile(f"{error}; copy the data anew from where it is whole, or prepare it again") from None

    def spans(self, document: int) -> np.ndarray:
        """Supervised tokens of a document: int32 [n, 2] half-open ranges, sorted and disjoint."""
        if document < 0:
            document += len(self)
        first, last = int(self._offsets[document]), int(self._offsets[document + 1])
        start = self._spans_start
        self._check(self._checked_spans, start + first * 8, start + last * 8)
        return self._spans[first:last]

    def spans_of(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first, counts = self._offsets[documents], self._offsets[documents + 1] - self._offsets[documents]
        self._check(self._checked_spans, self._spans_start + 8 * first, self._spans_start + 8 * (first + counts))
        return runs_of(self._spans, first, counts), counts

    def _map(self, name: str) -> np.ndarray:
        try:
            return np.load(self.path / name, mmap_mode="r").view(np.ndarray)
        except (ValueError, EOFError, SyntaxError):
            raise ValueError(f"{self.path}: {name} is damaged, prepare the data again") from None

    def _numbers(self, name: str, names: list[str], otherwise: str, dtype: type) -> np.ndarray:
        """Map the number of each document's name; without the file `names` becomes the one name `otherwise`."""
        if not (self.path / name).is_file():
            names[:] = [otherwise]
            return constant(0, len(self), dtype)
        numbers = self._map(name)
        if numbers.dtype != dtype or len(numbers) != len(self):
            raise ValueError(f"{self.path}: {name} and tokens.idx do not belong together, prepare the data again")
        if int(numbers.max(initial=0)) >= len(names):
            raise ValueError(f"{self.path}: {name} has numbers that meta.json does not name, prepare the data again")
        return numbers


def open_index(path: str | Path) -> Documents:
    """Opens a prepared data directory, or PREFIX.bin and PREFIX.idx of megatron-core; ValueError in one sentence."""
    prefix = None if Path(path).is_dir() else prefix_of(path)
    return DocumentIndex(path) if prefix is None else PrefixIndex(prefix)


def _check_files(path: Path) -> None:
    if not path.is_dir():
        unfinished = [path.with_name(path.name + ending) for ending in (".parts", ".partial")]
        if any(other.exists() for other in unfinished):
            raise ValueError(f"{path} is half-written: run examples/prepare_data.py again, it will continue")
        prefix = str(path).removesuffix(".bin").removesuffix(".idx")
        raise ValueError(
            f"{path}: there is no such data directory, nor {prefix}.bin with {prefix}.idx; make a directory with "
            "examples/prepare_data.py"
        )
    missing = [name for name in FILES if not (path / name).is_file()]
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
        self._sums = BlockSums(DATA_BLOCK)
        self._hash = hashlib.sha256(self.dtype.name.encode())
        self._lengths: list[np.ndarray] = []
        self._spans: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []  # spans of each document
        self._numbers: dict[str, list[np.ndarray]] = {"sources": [], "kinds": []}

    def add(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        spans: np.ndarray,
        counts: np.ndarray,
        sources: np.ndarray | None = None,
        kinds: np.ndarray | None = None,
    ) -> None:
        """Adds documents laid end to end.

        Shapes: tokens [sum of lengths], lengths [documents], spans [sum of counts, 2] with ranges within
        their document, counts [documents]; sources and kinds [documents] are places in the lists of those names
        that `close` is given, and are given for all documents or for none. Raises ValueError for spans or ids out
        of range.
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
        self._add_numbers("sources", sources, len(lengths))
        self._add_numbers("kinds", kinds, len(lengths))
        data = np.ascontiguousarray(tokens, dtype=self.dtype).data
        self._bin.write(data)
        self._sums.update(data)
        self._hash.update(data)
        self._lengths.append(np.asarray(lengths, dtype=np.int32))
        self._spans.append(spans)
        self._counts.append(np.asarray(counts, dtype=np.int64))

    def _add_numbers(self, name: str, numbers: np.ndarray | None, documents: int) -> None:
        added = self._numbers[name]
        if len(added) != (0 if numbers is None else len(self._lengths)):
            raise ValueError(f"{name} are given for all documents or for none")
        if numbers is not None:
            numbers = np.asarray(numbers)
            if len(numbers) != documents or not 0 <= numbers.min(initial=0) <= numbers.max(initial=0) <= _LARGEST[name]:
                raise ValueError(f"{name} are a number from 0 to {_LARGEST[name]} for each document")
            added.append(numbers.astype(NUMBERS[name]))

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
        write_idx(self.directory / "tokens.idx", self.dtype, lengths)
        np.save(self.directory / "spans.npy", spans)
        np.save(self.directory / "spans_offsets.npy", offsets)
        for name, numbers in self._numbers.items():
            if numbers:
                np.save(self.directory / f"{name}.npy", np.concatenate(numbers))
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
        self._sums.write(self.directory / "tokens.bin")
        for path in [self.directory / "tokens.idx", *self.directory.glob("*.npy")]:
            write_sums(path, DATA_BLOCK)
        add_checksums(self.directory, meta)
        (self.directory / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        os.rename(self.directory, self.path)
        return meta

    def discard(self) -> None:
        """Removes what was written."""
        self._bin.close()
        shutil.rmtree(self.directory, ignore_errors=True)


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
