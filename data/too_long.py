"""What becomes of documents that are longer than a packed sequence, and how many there are of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.cutting import Pieces
from data.documents import Documents

CHOICES = ("error", "drop", "truncate", "cut")


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What becomes of the documents of all data sets, each counted once whatever its weight.

    Of all tokens there are, those that training never sees are `dropped_tokens`, `truncated_tokens` and
    `lost_tokens`; it sees `repeated_tokens` once more, as the first of a piece.
    """

    documents: int
    empty: int  # sequences without a token, left out and not among `documents`
    dropped: int
    dropped_tokens: int
    truncated: int
    truncated_tokens: int  # the tokens cut away, not those kept
    unsupervised: int  # truncated documents that no supervised token is left of
    cut: int  # documents that became pieces
    pieces: int  # the pieces that they became
    dropped_pieces: int  # further pieces, without a supervised token
    lost_tokens: int  # tokens in dropped pieces alone
    repeated_tokens: int

    def __str__(self) -> str:
        said = [f"{self.documents:,} documents", f"dropped {self.dropped:,}", f"truncated {self.truncated:,}"]
        if self.unsupervised:
            said[-1] += f" ({self.unsupervised:,} to nothing supervised)"
        if self.cut:
            said.append(f"cut {self.cut:,} into {self.pieces:,} pieces")
        if self.dropped_pieces:
            said[-1] += f" ({self.dropped_pieces:,} more dropped with nothing supervised)"
        if self.empty:
            said.append(f"left out {self.empty:,} empty")
        return ", ".join(said)


class Fitted(NamedTuple):
    """Data sets of which every document that is offered fits a packed sequence."""

    indexes: list[Documents]
    offered: list[np.ndarray | None]  # [documents offered] for each data set, ordinals within it; None: all of them
    counts: Counts


def fit(indexes: Sequence[Documents], seq_len: int, too_long: str, *, allow_unsupervised: bool) -> Fitted:
    """Drop, truncate or cut what is longer than `seq_len` tokens; plain text is cut whatever `too_long` says.

    Truncation itself is left to whoever reads the tokens. Raises ValueError where there are such documents under
    "error", where truncation leaves documents without a supervised token and this is not allowed, and where nothing
    is left.
    """
    documents = sum(map(len, indexes))
    views = [_cut(index, seq_len) if too_long == "cut" or index.may_be_cut else index for index in indexes]
    pieces = [view for view in views if isinstance(view, Pieces)]
    long = [np.flatnonzero(view.lengths > seq_len) for view in views]
    too_many = sum(map(len, long))
    if too_many and too_long == "error":
        longest = max(int(view.lengths.max(initial=0)) for view in views)
        raise ValueError(
            f"{too_many:,} of {documents:,} documents are longer than --seq-len {seq_len} (the longest has "
            f"{longest:,} tokens): raise --seq-len, or choose --too-long drop, truncate or cut."
        )
    drops = too_long == "drop"
    held = sum(int(view.lengths[own].sum(dtype=np.int64)) for view, own in zip(views, long, strict=True))
    bare = [left_bare(*view.spans_of(own), seq_len) for view, own in zip(views, long, strict=True) if not drops]
    unsupervised = sum(map(np.count_nonzero, bare))
    counts = Counts(
        documents=documents,
        empty=sum(view.meta.get("empty_sequences", 0) for view in views),
        dropped=too_many if drops else 0,
        dropped_tokens=held if drops else 0,
        truncated=0 if drops else too_many,
        truncated_tokens=0 if drops else held - too_many * seq_len,
        unsupervised=unsupervised,
        cut=sum(view.cut for view in pieces),
        pieces=sum(view.pieces for view in pieces),
        dropped_pieces=sum(view.dropped for view in pieces),
        lost_tokens=sum(view.lost_tokens for view in pieces),
        repeated_tokens=sum(view.repeated_tokens for view in pieces),
    )
    if unsupervised and not allow_unsupervised:
        raise ValueError(
            f"--too-long truncate leaves {unsupervised:,} of {documents:,} documents without a supervised token: raise "
            f"--seq-len above {seq_len}, choose --too-long drop or cut, or give --allow-unsupervised to keep them."
        )
    if sum(map(len, views)) == counts.dropped:
        raise ValueError(
            f"--data leaves nothing to train on: it has {documents:,} documents, of which {counts.dropped:,} are "
            f"dropped as longer than --seq-len {seq_len}, and {counts.cut:,} are cut into pieces without a supervised "
            "token; give other data or a larger --seq-len."
        )
    offered = [
        np.flatnonzero(view.lengths <= seq_len) if drops and len(own) else None
        for view, own in zip(views, long, strict=True)
    ]
    return Fitted(views, offered, counts)


def left_bare(spans: np.ndarray, spans_in: np.ndarray, seq_len: int) -> np.ndarray:
    """Return of each document whether truncation leaves nothing supervised of it: bool [documents].

    spans, spans_in: see `Documents.spans_of`. The last of `seq_len` tokens does not count: the end token takes its
    place, and alone it would teach a model to stop where it has to begin.
    """
    last = seq_len - 1
    supervised = np.maximum(spans[:, 0], 1) < np.minimum(spans[:, 1], last)  # nothing predicts the first token
    owners = np.repeat(np.arange(len(spans_in)), spans_in)
    return np.bincount(owners[supervised], minlength=len(spans_in)) == 0


def _cut(index: Documents, seq_len: int) -> Documents:
    if int(index.lengths.max(initial=0)) <= seq_len:
        return index
    if seq_len < 2:
        raise ValueError(f"--seq-len {seq_len} leaves nothing to predict in documents that are cut; give at least 2.")
    return Pieces(index, seq_len)
