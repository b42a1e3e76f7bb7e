"""Plain text in megatron-core's own files, PREFIX.bin and PREFIX.idx, trained on without preparation."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from data.documents import Documents, constant
from data.token_files import map_token_files

_SAMPLES, _SAMPLE_BYTES = 256, 4096


class PrefixIndex(Documents):
    """Memory-mapped sequences of a PREFIX, each one document, of which every token but the first is supervised.

    Empty sequences are left out; meta["empty_sequences"] counts them. The fingerprint covers the type of the
    tokens, the length of every sequence and 256 blocks of 4 KiB spread evenly over the tokens, so that it costs
    the same however large the file is; other tokens elsewhere under the same lengths go unseen. The same blocks
    give `largest_sampled`. Raises ValueError, in one sentence, for files that are damaged or hold no text.
    """

    may_be_cut = True

    def __init__(self, path: str | Path):
        self.path = Path(path)
        idx, bin_ = (self.path.with_name(self.path.name + ending) for ending in (".idx", ".bin"))
        if self.path.name == "tokens" and (self.path.parent / "spans.npy").is_file():
            raise ValueError(f"{bin_} is part of prepared data, whose supervised spans it has not: give {idx.parent}")
        self._files = map_token_files(idx, bin_)
        _check_text(idx, self._files.modes)
        self._kept: np.ndarray | None = None  # [documents], their sequences; None: all
        self.lengths = self._files.lengths
        if not self.lengths.all():
            self._kept = np.flatnonzero(self.lengths)
            self.lengths = self.lengths[self._kept]
        if not len(self):
            raise ValueError(f"{bin_} is empty: there is no document in it")
        self.fingerprint, largest = _sample(self._files.tokens, self._files.lengths)
        if not np.isfinite(largest):
            raise ValueError(f"{bin_} holds numbers that are no token ids, such as {largest}")
        self.largest_sampled = int(largest)
        self.meta: dict[str, Any] = {
            "documents": len(self),
            "tokens": len(self._files.tokens),
            "supervised_tokens": len(self._files.tokens) - len(self),
            "longest": int(self.lengths.max()),
            "empty_sequences": len(self._files.lengths) - len(self),
        }
        self.source_names, self.kinds = [self.path.name], ["text"]
        self.sources = constant(0, len(self), np.uint16)
        self.kind_numbers = constant(0, len(self), np.uint8)

    def __reduce__(self):
        return PrefixIndex, (self.path,)  # a process that is handed an index maps the files itself

    def tokens(self, document: int) -> np.ndarray:
        """Token ids [length] of a document, of the type that the file has, or int64 where that is a float."""
        stored = self._files.sequence(document if self._kept is None else int(self._kept[document]))
        if stored.dtype.kind != "f":
            return stored
        whole = stored.astype(np.int64)
        if (broken := stored[whole != stored]).size:
            raise ValueError(f"{self.place(document)} holds numbers that are no token ids, such as {broken[0]}")
        return whole

    def spans(self, document: int) -> np.ndarray:
        """Every token but the first: int32 [1, 2], or [0, 2] for a document of one token."""
        return self.spans_of(np.array([document]))[0]

    def spans_of(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ends = self.lengths[documents]
        spans = np.stack((np.ones_like(ends), ends), axis=1)
        return spans[ends > 1], (ends > 1).astype(np.int64)


def prefix_of(path: str | Path) -> Path | None:
    """The PREFIX that a path names, with or without an ending, where both its files exist."""
    prefix = Path(path)
    if prefix.suffix in (".bin", ".idx"):
        prefix = prefix.with_suffix("")
    files = [prefix.with_name(prefix.name + ending) for ending in (".bin", ".idx")]
    return prefix if prefix.name and all(file.is_file() for file in files) else None


def _check_text(idx: Path, modes: np.ndarray | None) -> None:
    """Refuse what is not text."""
    if modes is not None and modes.any():
        other = np.count_nonzero(modes)
        raise ValueError(f"{idx} is multimodal: {other:,} of {len(modes):,} sequences are not text")


def _sample(tokens: np.ndarray, lengths: np.ndarray) -> tuple[str, float]:
    """Return the fingerprint, and the largest token of the blocks that it covers."""
    digest = hashlib.sha256(tokens.dtype.name.encode())
    digest.update(lengths)
    block = _SAMPLE_BYTES // tokens.itemsize
    starts = np.unique(np.linspace(0, max(len(tokens) - block, 0), _SAMPLES).astype(np.int64))
    largest = []
    for start in starts.tolist():
        sampled = tokens[start : start + block]
        digest.update(np.ascontiguousarray(sampled))
        largest.append(sampled.max())
    return digest.hexdigest()[:32], np.max(largest)
