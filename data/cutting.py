"""Documents that are too long as pieces, so that every token that was predicted is predicted once."""

import numpy as np

from data.documents import Documents

_AT_ONCE = 2**18  # long documents that are cut at once


class Pieces(Documents):
    """A view of documents in which those longer than `longest` tokens are pieces of at most that many.

    A piece begins with the last token of the piece before, so the pieces predict what the whole document did, each
    token once. Pieces in which nothing supervised is predicted are left out. Documents and pieces keep their order.
    Beside lengths, sources and kinds the view takes 4 bytes for each piece and 24 for each long document.
    """

    def __init__(self, index: Documents, longest: int):
        assert longest > 1, "a piece of one token predicts nothing"
        self._index, self._longest = index, longest
        self.path, self.meta, self.may_be_cut = index.path, index.meta, index.may_be_cut
        self.fingerprint = f"{index.fingerprint}, cut at {longest}"
        self.largest_sampled, self.source_names, self.kinds = index.largest_sampled, index.source_names, index.kinds
        self._long = np.flatnonzero(index.lengths > longest)
        blocks = [self._long[first : first + _AT_ONCE] for first in range(0, len(self._long), _AT_ONCE)]
        nothing = (np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32), 0)
        pieces_of, starts, lengths, dropped = zip(
            nothing, *(_cut(index, block, longest) for block in blocks), strict=True
        )
        kept, self._starts, own_lengths = map(np.concatenate, (pieces_of, starts, lengths))
        self._pieces_before = np.cumsum(np.append(0, kept))  # [long documents + 1]
        # The number that the first piece of each long document has; those that stay whole are counted, too.
        self._first = self._long - np.arange(len(self._long)) + self._pieces_before[:-1]

        self.dropped = sum(dropped)
        # Two pieces side by side share one token; what no kept piece holds is lost.
        beside = np.diff(self._starts, append=0) == longest - 1
        beside[self._pieces_before[1:][kept > 0] - 1] = False  # the last piece of each document
        self.repeated_tokens = int(np.count_nonzero(beside))
        stored = index.lengths[self._long].sum(dtype=np.int64)
        self.lost_tokens = int(stored - own_lengths.sum(dtype=np.int64)) + self.repeated_tokens

        times = np.ones(len(index), np.int64)
        times[self._long] = kept
        self.lengths = np.repeat(index.lengths, times)
        self.lengths[self.lengths > longest] = own_lengths
        self.sources, self.kind_numbers = np.repeat(index.sources, times), np.repeat(index.kind_numbers, times)

    def __reduce__(self):
        return Pieces, (self._index, self._longest)

    @property
    def cut(self) -> int:
        """How many documents were cut."""
        return len(self._long)

    @property
    def pieces(self) -> int:
        """How many pieces of these documents are left."""
        return len(self._starts)

    def tokens(self, document: int) -> np.ndarray:
        """Token ids [length] of a whole document or a piece, a view of the stored ones."""
        whole, start = self._find(document)
        return self._index.tokens(whole)[start : start + int(self.lengths[document])]

    def spans(self, document: int) -> np.ndarray:
        """Supervised tokens within it: int32 [n, 2]; the first token of a later piece is the piece before's."""
        whole, start = self._find(document)
        return spans_within(self._index.spans(whole), start, start + int(self.lengths[document]))

    def place(self, document: int) -> str:
        """The document, and which tokens of it."""
        whole, start = self._find(document)
        name = self._index.place(whole)
        if self._index.lengths[whole] <= self._longest:
            return name
        return f"{name}, tokens {start} to {start + int(self.lengths[document])}"

    def _find(self, document: int) -> tuple[int, int]:
        """The stored document, and the first token in it."""
        document = range(len(self))[document]
        begun = int(np.searchsorted(self._first, document, side="right"))  # long documents that begin at or before it
        if begun:
            piece = int(self._pieces_before[begun - 1] + document - self._first[begun - 1])
            if piece < self._pieces_before[begun]:
                return int(self._long[begun - 1]), int(self._starts[piece])
        return document + begun - int(self._pieces_before[begun]), 0


def spans_within(spans: np.ndarray, start: int, end: int) -> np.ndarray:
    """Spans [n, 2] of a document as its piece of tokens [start, end) has them: int32 [m, 2], counted from `start`.

    The first token of a later piece is the last of the piece before, which has predicted it.
    """
    inside = np.clip(spans, start + (start > 0), end) - start
    return inside[inside[:, 0] < inside[:, 1]].astype(np.int32)


def _cut(index: Documents, long: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Cut some documents: how many pieces of each stay, where these start, how long they are, and how many go."""
    lengths = index.lengths[long].astype(np.int64)
    counts = -(-(lengths - 1) // (longest - 1))
    owners = np.repeat(np.arange(len(long)), counts)
    starts = (np.arange(len(owners)) - (np.cumsum(counts) - counts)[owners]) * (longest - 1)
    ends = np.minimum(starts + longest, lengths[owners])

    # All documents end to end, so that one sorted search finds the first span that reaches behind a piece's start.
    base = np.cumsum(lengths) - lengths
    spans, spans_in = index.spans_of(long)
    spans = np.append(spans + np.repeat(base, spans_in)[:, None], [[np.iinfo(np.int64).max] * 2], axis=0)
    reaching = np.searchsorted(spans[:, 1], base[owners] + starts + 1, side="right")
    kept = spans[reaching, 0] < base[owners] + ends
    return (
        np.bincount(owners[kept], minlength=len(long)),
        starts[kept].astype(np.int32),
        (ends - starts)[kept].astype(np.int32),
        int(np.count_nonzero(~kept)),
    )
