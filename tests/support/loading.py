"""A loader from one set of keyword arguments, those of its order included, and documents for it in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.documents import Documents
from data.loader import Loader
from data.order import GlobalOrder

LOADER = ("micro_batch_size", "dp_rank", "dp_size", "microbatch_multiple", "pad_token")


def make_loader(blend: Sequence, **settings) -> Loader:
    """The loader of one rank over (index, weight) pairs."""
    own = {name: settings.pop(name) for name in LOADER if name in settings}
    return Loader(GlobalOrder(blend, **settings), **own)


def small_loader(*blend: Documents | tuple[Documents, float], **changes) -> Loader:
    """The loader of one rank over short documents: an index stands for one of weight 1."""
    pairs = [source if isinstance(source, tuple) else (source, 1.0) for source in blend]
    settings = dict(seq_len=16, micro_batch_size=1, global_batch_size=4, batch_unit="conversations")
    settings |= dict(pad_documents_to=4, too_long="error", seed=7, dp_rank=0, dp_size=1)
    return make_loader(pairs, **{**settings, **changes})


class MemoryIndex(Documents):
    """(tokens, spans) pairs as documents, each with the number of its source."""

    def __init__(self, documents: Sequence[tuple], name: str = "memory", sources: Sequence[int] | None = None):
        self.documents = [
            (np.asarray(tokens), np.asarray(spans, np.int32).reshape(-1, 2)) for tokens, spans in documents
        ]
        self.path, self.fingerprint, self.meta = Path(name), f"of-{name}", {}
        self.lengths = np.array([len(tokens) for tokens, _ in documents], np.int32)
        self.sources = np.array([0] * len(self) if sources is None else sources, np.uint16)
        self.source_names = [name] if sources is None else [f"{name}{number}" for number in range(max(sources) + 1)]
        self.kinds, self.kind_numbers = ["unknown"], np.zeros(len(self), np.uint8)

    def tokens(self, document: int) -> np.ndarray:
        return self.documents[document][0]

    def spans(self, document: int) -> np.ndarray:
        return self.documents[document][1]


def in_memory(documents: Sequence, spans: Sequence | None = None, **named) -> MemoryIndex:
    """Documents of these tokens; without spans the second half of each is supervised."""
    spans = spans or [[(len(tokens) // 2, len(tokens))] for tokens in documents]
    return MemoryIndex(list(zip(documents, spans, strict=True)), **{"name": "data", **named})
