"""The global order: which documents are in which bins of which batch, the same for every layout."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data.packing import Bins, pack
from data.too_long import CHOICES, fit

if TYPE_CHECKING:
    from data.documents import Documents

# The first word of every random stream, so that no two uses of one seed share numbers.
_DOCUMENTS, _EPOCH, _BINS = 1, 2, 3
_AT_ONCE = 2**20  # numbers that are made at once, so that millions of documents take little memory


class Plan(NamedTuple):
    """One epoch: its documents in order and, where batches are counted in sequences, its bins."""

    epoch: int
    documents: np.ndarray  # [documents of the epoch], ordinals over all data sets
    bins: Bins | None  # items are positions in `documents`
    bin_order: np.ndarray | None  # [bins]


def permutation(size: int, *entropy: int) -> np.ndarray:
    """Return a permutation of range(size) that depends on the entropy alone: int64 [size].

    numpy promises that the raw stream of a bit generator never changes, but not what
    `Generator.permutation` makes of it; a run resumed under another numpy must see the same order.
    """
    bits = np.uint64(max(size - 1, 1).bit_length())
    keys = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(size)
    # The index sits in the low bits: keys are distinct, so any sorting algorithm gives one result.
    keys <<= bits
    for begin in range(0, size, _AT_ONCE):
        end = min(begin + _AT_ONCE, size)
        keys[begin:end] |= np.arange(begin, end, dtype=np.uint64)
    keys.sort()
    keys &= (np.uint64(1) << bits) - np.uint64(1)
    return keys.view(np.int64)


class GlobalOrder:
    """The batches of every epoch as a pure function of (data sets, weights, settings, seed, epoch).

    blend: (index, weight) of each data set. One of weight w is a stream of permutations of its documents, of
    which each epoch takes the next w times as many as there are documents: a fraction visits all before it
    repeats one. Documents are named by ordinals that count through the data sets in their order. With
    `shuffle=False` documents and packed sequences stay in that order, as held-out data wants it. Documents that are
    cut are data sets of pieces (`data.cutting`); in all that is said here a piece is a document. Lengths are in
    tokens; `global_batch_size` counts what `batch_unit` says. With `vocab_size` no token outside the vocabulary
    passes: what an index knows of its tokens is checked here, every token when a microbatch is assembled.

    Raises ValueError where no order can be made of what the user gave.
    """

    def __init__(
        self,
        blend: Sequence[tuple[Documents, float]],
        *,
        seq_len: int,
        global_batch_size: int,
        batch_unit: str,
        pad_documents_to: int,
        too_long: str,
        seed: int,
        shuffle: bool = True,
        allow_unsupervised: bool = False,
        vocab_size: int | None = None,
    ):
        _check_settings(seq_len, global_batch_size, batch_unit, pad_documents_to, too_long, seed)
        _check_blend(blend, vocab_size)
        self.indexes, self._offered, self.counts = fit(
            [index for index, _ in blend], seq_len, too_long, allow_unsupervised=allow_unsupervised
        )
        self._sizes = [
            len(index) if offered is None else len(offered)
            for index, offered in zip(self.indexes, self._offered, strict=True)
        ]
        # Through its decimal form, so that a weight of 0.3 is three tenths and epochs come out even.
        self._weights = [Fraction(repr(float(weight))) for _, weight in blend]
        self._settings = {
            "--data": [index.fingerprint for index in self.indexes],
            "the weights of --data": [float(weight) for weight in self._weights],
            "--seq-len": seq_len,
            "--global-batch-size": global_batch_size,
            "--batch-unit": batch_unit,
            "--pad-documents-to": pad_documents_to,
            "--too-long": too_long,
            "shuffling": shuffle,
        }
        self.seq_len, self.pad_documents_to, self.seed = seq_len, pad_documents_to, seed
        self.vocab_size = vocab_size
        self._batch_size, self._shuffle = global_batch_size, shuffle
        self._by_conversation = batch_unit == "conversations"
        self._bounds = np.cumsum([0, *map(len, self.indexes)])  # [data sets + 1], in ordinals
        self.source_names = _source_names(self.indexes)
        self._first_sources = np.cumsum([0, *(len(index.source_names) for index in self.indexes)])
        lengths = [index.lengths for index in self.indexes]
        if self.counts.truncated:
            lengths = [np.minimum(own, np.int32(seq_len)) for own in lengths]
        self.lengths = lengths[0] if len(lengths) == 1 else np.concatenate(lengths)  # int32 [documents], as trained
        # Packing an epoch takes seconds at millions of documents, so one plan is kept; a loader
        # asks from two threads.
        self._lock = threading.Lock()
        self._plan: Plan | None = None
        self._bins_in_epoch: dict[int, int] = {}

    def padded(self, documents: np.ndarray) -> np.ndarray:
        """Return the padded lengths, in tokens, of the documents: int32, the shape of `documents`."""
        return -(-self.lengths[documents] // self.pad_documents_to) * self.pad_documents_to

    def locate(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (data set, document within it) of each ordinal."""
        dataset = np.searchsorted(self._bounds, documents, side="right") - 1
        return dataset, documents - self._bounds[dataset]

    def sources(self, datasets: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Return the places in `source_names`, int32, of (data set, document within it) as `locate` gives them."""
        found = self._first_sources[datasets].astype(np.int32)
        for dataset in np.unique(datasets):
            own = datasets == dataset
            found[own] += self.indexes[dataset].sources[documents[own]]
        return found

    def steps_in_epoch(self, epoch: int) -> int:
        """Return the number of batches in the epoch, the last of which may be smaller."""
        return -(-self.size_of_epoch(epoch) // self._batch_size)

    def size_of_epoch(self, epoch: int) -> int:
        """Return how many of what a batch counts, conversations or packed sequences, the epoch holds."""
        if self._by_conversation:
            ranges = (self._stream(dataset, epoch) for dataset in range(len(self._sizes)))
            return sum(end - begin for begin, end in ranges)
        # With whole weights every epoch holds the same lengths, hence as many bins.
        key = 0 if all(weight.denominator == 1 for weight in self._weights) else epoch
        if key not in self._bins_in_epoch:
            bins = self._planned(epoch).bins
            assert bins is not None
            self._bins_in_epoch[key] = len(bins)
        return self._bins_in_epoch[key]

    def batch(self, epoch: int, number: int) -> Bins:
        """Return one batch packed into bins; the items are ordinals of documents."""
        plan = self._planned(epoch)
        begin, end = number * self._batch_size, (number + 1) * self._batch_size
        if plan.bins is None or plan.bin_order is None:
            documents = plan.documents[begin:end]
            bins = pack(self.padded(documents), self.seq_len)
            return Bins(bins.offsets, documents[bins.items])
        rows = [plan.documents[plan.bins[row]] for row in plan.bin_order[begin:end]]
        return Bins(np.cumsum([0, *map(len, rows)]), np.concatenate(rows))

    def fingerprint(self) -> dict:
        """Return all that the order depends on apart from the seed, under the names users know."""
        return dict(self._settings)

    def check_state(self, state: dict) -> None:
        """Raise ValueError naming everything in which a loader's state differs and would change the order."""
        was = {**state["fingerprint"], "--seed": state["seed"]}
        now = {**self.fingerprint(), "--seed": self.seed}
        changed = [
            f"{name} (was {was.get(name)}, is {now.get(name)})"
            for name in {**was, **now}
            if was.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(
                "The run cannot continue in the order of its data because of a changed "
                f"{', '.join(changed)}: put it back, or start a new run with another --output."
            )

    def _stream(self, dataset: int, epoch: int) -> tuple[int, int]:
        """Return the half-open range of the data set's stream that the epoch takes."""
        share = self._weights[dataset] * self._sizes[dataset]
        return int(share * epoch), int(share * (epoch + 1))

    def _planned(self, epoch: int) -> Plan:
        with self._lock:
            if self._plan is None or self._plan.epoch != epoch:
                self._plan = None  # never two plans in memory
                self._plan = self._make_plan(epoch)
            return self._plan

    def _make_plan(self, epoch: int) -> Plan:
        documents = np.concatenate([self._take(dataset, epoch) for dataset in range(len(self._sizes))])
        documents = documents[self._permutation(len(documents), _EPOCH, epoch)]
        if self._by_conversation:
            return Plan(epoch, documents, None, None)
        bins = pack(self.padded(documents), self.seq_len)
        return Plan(epoch, documents, bins, self._permutation(len(bins), _BINS, epoch))

    def _take(self, dataset: int, epoch: int) -> np.ndarray:
        """Return the ordinals that the data set gives to the epoch, in the order of its stream."""
        begin, end = self._stream(dataset, epoch)
        size, offered = self._sizes[dataset], self._offered[dataset]
        ordinal = np.dtype(np.int32 if self._bounds[-1] < 2**31 else np.int64)
        taken = [np.zeros(0, ordinal)]
        for turn in range(begin // size, -(-end // size)) if end > begin else ():
            drawn = self._permutation(size, _DOCUMENTS, turn, dataset)
            drawn = drawn[max(begin - turn * size, 0) : end - turn * size]
            own = (drawn if offered is None else offered[drawn]).astype(ordinal)
            own += int(self._bounds[dataset])
            taken.append(own)
        return np.concatenate(taken)

    def _permutation(self, size: int, use: int, turn: int, dataset: int = 0) -> np.ndarray:
        return permutation(size, self.seed, use, turn, dataset) if self._shuffle else np.arange(size)


def _source_names(indexes: Sequence[Documents]) -> list[str]:
    """Name the sources of all data sets in their order; where a name comes twice, by their data set's path too."""
    names = [name for index in indexes for name in index.source_names]
    paths = [str(index.path) for index in indexes for _ in index.source_names]
    longer = [name if names.count(name) == 1 else f"{path}: {name}" for name, path in zip(names, paths, strict=True)]
    # One data set given twice is still two, with weights of their own.
    times = [longer[: number + 1].count(name) for number, name in enumerate(longer)]
    return [name if time == 1 else f"{name} ({time})" for name, time in zip(longer, times, strict=True)]


def outside_vocabulary(place: str, token: int, vocab_size: int) -> str:
    """The sentence about a token that the model does not have."""
    return (
        f"--data {place} holds token {token:,} and the model has {vocab_size:,} tokens; tokenise the data with the "
        "model's own tokenizer, or give the model rows for the new tokens with --override.resize-embeddings."
    )


def _check_blend(blend: Sequence[tuple[Documents, float]], vocab_size: int | None) -> None:
    for index, weight in blend:
        if not 0 < weight < float("inf"):
            raise ValueError(f"--data {index.path} has weight {weight}; give one above 0, or leave it out.")
        if len(index) and int(index.lengths.min()) < 1:
            raise ValueError(f"--data {index.path} has documents without a single token; prepare it again.")
        if vocab_size is not None and index.largest_sampled >= vocab_size:
            raise ValueError(outside_vocabulary(str(index.path), index.largest_sampled, vocab_size))


def _check_settings(
    seq_len: int, global_batch_size: int, batch_unit: str, pad_documents_to: int, too_long: str, seed: int
) -> None:
    for flag, value, least in (
        ("--seq-len", seq_len, 1),
        ("--global-batch-size", global_batch_size, 1),
        ("--pad-documents-to", pad_documents_to, 1),
        ("--seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{flag} is {value}; it must be at least {least}.")
    for flag, word, choices in (
        ("--batch-unit", batch_unit, ("sequences", "conversations")),
        ("--too-long", too_long, CHOICES),
    ):
        if word not in choices:
            raise ValueError(f"{flag} is {word!r}; choose one of {', '.join(choices)}.")
    if seq_len % pad_documents_to:
        lower = seq_len // pad_documents_to * pad_documents_to
        nearest = f"{lower} or {lower + pad_documents_to}" if lower else f"{pad_documents_to}"
        raise ValueError(
            f"--seq-len {seq_len} is not a multiple of --pad-documents-to {pad_documents_to}; "
            f"choose --seq-len {nearest}."
        )
