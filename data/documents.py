"""Documents as training reads them, whatever they are kept in."""

from pathlib import Path
from typing import Any

import numpy as np


class Documents:
    """Documents of tokens, numbered from 0, with their supervised spans and where each came from."""

    path: Path
    meta: dict[str, Any]  # what is known of the data beside its documents; any key may be missing
    fingerprint: str  # equal where training on the documents is
    lengths: np.ndarray  # int32 [documents], tokens per document
    largest_sampled: int = -1  # the largest token of those that were looked at when the data was opened
    may_be_cut: bool = False  # plain text: a document that is too long is trained in pieces

    source_names: list[str]
    kinds: list[str]
    sources: np.ndarray  # uint16 [documents], the number of the document's source in `source_names`
    kind_numbers: np.ndarray  # uint8 [documents], the number of the document's kind in `kinds`

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, document: int) -> np.ndarray:
        """Token ids [length] of a document, read-only."""
        raise NotImplementedError

    def spans(self, document: int) -> np.ndarray:
        """Supervised tokens of a document: int32 [n, 2] half-open ranges, sorted and disjoint."""
        raise NotImplementedError

    def spans_of(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Spans of many documents: int32 [all their spans, 2] in their order, and int64 [documents] how many each."""
        own = [self.spans(int(document)) for document in documents]
        return np.concatenate([np.zeros((0, 2), np.int32), *own]), np.array([len(spans) for spans in own], np.int64)

    def place(self, document: int) -> str:
        """A document's name in a message."""
        return f"{self.path}:{document}"


def constant(value: int, count: int, dtype: type) -> np.ndarray:
    """A read-only array [count] of one value that takes the memory of one."""
    return np.broadcast_to(dtype(value), count)


def runs_of(values: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The runs values[start : start + count] end to end, for each of starts and counts [runs]."""
    shift = starts - (np.cumsum(counts) - counts)
    return values[np.arange(counts.sum()) + np.repeat(shift, counts)]
