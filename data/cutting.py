"""Documents that are too long as pieces, so that every token that was predicted is predicted once."""

import numpy as np

from data.documents import Documents


class Pieces(Documents):
    """A view of documents in which those longer than `longest` tokens are pieces of at most that many.

    A piece begins with the last token of the piece before, so the pieces predict what the whole document did, each
    token once. Pieces in which nothing supervised is predicted are left out. Documents and pieces keep their order;
    what is held in memory beside lengths and sources is 12 bytes for each piece of a long document.
    """

    def __init__(self, index: Documents, longest: int):
        assert longest > 1, "a piece of one token predicts nothing"
        self._index, self._longest = index, longest
        self.path, self.meta, self.may_be_cut = index.path, index.meta, index.may_be_cut
        self.fingerprint = f"{index.fingerprint}, cut at {longest}"
        self.source_names, self.kinds = index.source_names, index.kinds
        self._long = np.flatnonzero(index.lengths > longest)
        # How many documents that stay whole come before each long one.
        self._whole_before = self._long - np.arange(len(self._long))
        stored = index.lengths[self._long].astype(np.int64)
        owners, starts, ends = _cut(stored, longest)
        kept = _predicts(*index.spans_of(self._long), stored, owners, starts, ends)
        self.dropped = int(np.count_nonzero(~kept))
        owners, starts, ends = owners[kept], starts[kept], ends[kept]
        self._owners, self._starts = owners.astype(np.int32), starts.astype(np.int32)
        ordinals = self._whole_before[owners] + np.arange(len(owners))
        self._ordinals = ordinals.astype(np.int32 if len(index) + len(owners) < 2**31 else np.int64)

        # Two pieces side by side share one token; what no kept piece holds is lost.
        self.repeated_tokens = int(np.count_nonzero((owners[1:] == owners[:-1]) & (starts[1:] == ends[:-1] - 1)))
        self.lost_tokens = int(stored.sum() - (ends - starts).sum()) + self.repeated_tokens
        self.lengths = self._merged(index.lengths, (ends - starts).astype(np.int32))
        self.sources = self._merged(index.sources, index.sources[self._long[owners]])
        self.kind_numbers = self._merged(index.kind_numbers, index.kind_numbers[self._long[owners]])

    def __reduce__(self):
        return Pieces, (self._index, self._longest)

    @property
    def cut(self) -> int:
        """How many documents were cut."""
        return len(self._long)

    @property
    def pieces(self) -> int:
        """How many pieces of these documents are left."""
        return len(self._owners)

    def tokens(self, document: int) -> np.ndarray:
        """Token ids [length] of a whole document or a piece, a view of the stored ones."""
        whole, start = self._find(document)
        return self._index.tokens(whole)[start : start + int(self.lengths[document])]

    def spans(self, document: int) -> np.ndarray:
        """Supervised tokens within it: int32 [n, 2]; the first token of a later piece is the piece before's."""
        whole, start = self._find(document)
        end = start + int(self.lengths[document])
        spans = np.clip(self._index.spans(whole), start + (start > 0), end) - start
        return spans[spans[:, 0] < spans[:, 1]].astype(np.int32)

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
        piece = int(np.searchsorted(self._ordinals, document))
        if piece < self.pieces and self._ordinals[piece] == document:
            return int(self._long[self._owners[piece]]), int(self._starts[piece])
        rank = document - piece  # among the documents that stay whole
        return rank + int(np.searchsorted(self._whole_before, rank, side="right")), 0

    def _merged(self, values: np.ndarray, of_pieces: np.ndarray) -> np.ndarray:
        """Values [stored documents] with those of the pieces in place of the long documents' own."""
        merged = np.empty(len(values) - self.cut + self.pieces, values.dtype)
        whole = np.ones(len(merged), bool)
        whole[self._ordinals] = False
        merged[self._ordinals] = of_pieces
        merged[whole] = np.delete(values, self._long)
        return merged


def _cut(lengths: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of every piece, in order, which length of `lengths` it belongs to, its first token and its end."""
    counts = -(-(lengths - 1) // (longest - 1))
    owners = np.repeat(np.arange(len(lengths)), counts)
    first = np.cumsum(counts) - counts
    starts = (np.arange(len(owners)) - first[owners]) * (longest - 1)
    return owners, starts, np.minimum(starts + longest, lengths[owners])


def _predicts(
    spans: np.ndarray,
    spans_in: np.ndarray,
    lengths: np.ndarray,
    owners: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
) -> np.ndarray:
    """Return of every piece whether a supervised token lies behind its first one: bool [pieces]."""
    # All documents end to end, so that one sorted search finds the first span that reaches behind a piece's start.
    base = np.cumsum(lengths) - lengths
    begin_end = np.append(spans + np.repeat(base, spans_in)[:, None], [[np.iinfo(np.int64).max] * 2], axis=0)
    reaching = np.searchsorted(begin_end[:, 1], base[owners] + starts + 1, side="right")
    return begin_end[reaching, 0] < base[owners] + ends
