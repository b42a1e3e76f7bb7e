"""Microbatches of packed documents for one data-parallel rank, resumable under any layout."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from data.dealing import deal
from data.order import GlobalOrder, outside_vocabulary
from data.too_long import Counts, left_bare

# Free space is cut into padding documents of about this many tokens: attention over one filler bin
# as a single document would cost more than any bin of real ones.
PADDING_DOCUMENT = 512


@dataclass(frozen=True, eq=False)
class Microbatch:
    """`micro_batch_size` bins laid end to end; n = micro_batch_size * seq_len tokens.

    A document's padding follows its tokens and belongs to it; the free tail of a bin is made of
    documents that are all padding, whose lengths are multiples of the padding unit as well.
    """

    tokens: np.ndarray  # int64 [n]
    labels: np.ndarray  # int64 [n], the document's next token where it is supervised, else 0
    loss_mask: np.ndarray  # bool [n], true where the label counts
    positions: np.ndarray  # int64 [n], from 0 in every document
    cu_seqlens: np.ndarray  # int32 [documents + 1], padded boundaries from 0 to n
    document_lengths: np.ndarray  # int32 [documents], tokens before padding; 0 where all is padding
    document_sources: np.ndarray  # int32 [documents], places in `GlobalOrder.source_names`; -1 where all is padding
    max_seqlen: int  # the longest stretch between two boundaries
    sample_ids: list[tuple[int, int]]  # (data set, document) of the real documents, as they lie
    real_tokens: int
    supervised_tokens: int  # the sum of loss_mask
    padding_tokens: int  # n - real_tokens
    bins: int  # bins that hold documents


class Loader:
    """The steps of a run in the global order, as lists of this rank's microbatches.

    A step's documents depend on the data sets, the settings, the seed and the step, never on the
    layout: ranks share out the bins of one batch. Every rank gets the same number of microbatches, a
    multiple of `microbatch_multiple`; empty bins make up the count. The next step is prepared in a
    thread while the current one trains. Raises ValueError.
    """

    def __init__(
        self,
        order: GlobalOrder,
        *,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        microbatch_multiple: int = 1,
        pad_token: int = 0,
    ):
        if micro_batch_size < 1:
            raise ValueError(f"--micro-batch-size is {micro_batch_size}; it must be at least 1.")
        assert 0 <= dp_rank < dp_size and microbatch_multiple >= 1
        self._order = order
        self._micro_batch_size, self._microbatch_multiple = micro_batch_size, microbatch_multiple
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._pad_token = pad_token
        self.epoch, self.consumed = 0, 0  # the epoch of the next step, and its steps already taken
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: tuple[tuple[int, int], Future[list[Microbatch]]] | None = None

    @property
    def counts(self) -> Counts:
        """How many documents there are, and how many of them were dropped or truncated."""
        return self._order.counts

    @property
    def source_names(self) -> list[str]:
        """What the numbers in `Microbatch.document_sources` stand for."""
        return self._order.source_names

    def steps_in_epoch(self, epoch: int) -> int:
        """Return the number of steps in the epoch; counted in sequences, it has to be packed first."""
        return self._order.steps_in_epoch(epoch)

    def next_step(self) -> list[Microbatch]:
        """Return this rank's microbatches of the next step and move on, into the next epoch if need be."""
        self._skip_finished_epochs()
        at = (self.epoch, self.consumed)
        if self._ahead is not None and self._ahead[0] == at:
            microbatches = self._ahead[1].result()
        else:
            microbatches = self.step(*at)
        self.consumed += 1
        self._skip_finished_epochs()
        upcoming = (self.epoch, self.consumed)
        self._ahead = (upcoming, self._thread.submit(self.step, *upcoming))
        return microbatches

    def step(self, epoch: int, number: int) -> list[Microbatch]:
        """Return this rank's microbatches of any step of any epoch; the loader stays where it is."""
        batch = self._order.batch(epoch, number)
        work = batch.sums(np.square(self._order.padded(batch.items), dtype=np.int64))
        a_round = self._dp_size * self._micro_batch_size * self._microbatch_multiple
        microbatches = -(-len(batch) // a_round) * self._microbatch_multiple
        bins = [batch[row] for row in deal(work, self._dp_size)[self._dp_rank]]
        bins += [batch.items[:0]] * (microbatches * self._micro_batch_size - len(bins))
        return [
            assemble(self._order, bins[first : first + self._micro_batch_size], self._pad_token)
            for first in range(0, len(bins), self._micro_batch_size)
        ]

    def state_dict(self) -> dict:
        """Return where the run stands, as handed out: plain values, the same on every rank."""
        return {
            "seed": self._order.seed,
            "epoch": self.epoch,
            "consumed": self.consumed,
            "fingerprint": self._order.fingerprint(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue where the state was taken, under this or another layout; see `GlobalOrder.check_state`."""
        self._order.check_state(state)
        self.epoch, self.consumed = state["epoch"], state["consumed"]

    def _skip_finished_epochs(self) -> None:
        # A loop, because an epoch of a tiny fraction of the data may be empty.
        while self.consumed >= self._order.steps_in_epoch(self.epoch):
            self.epoch, self.consumed = self.epoch + 1, 0


def without_padding_documents(batch: Microbatch, multiple: int) -> Microbatch:
    """Return the microbatch without documents that are all padding, filled up to `multiple` tokens by one.

    `multiple` is a multiple of what documents are padded to. At least `multiple` tokens stay.
    """
    kept = np.flatnonzero(batch.document_lengths)
    lengths = np.diff(batch.cu_seqlens)[kept].astype(np.int64)
    filled = int(lengths.sum())
    size = max(-(-filled // multiple), 1) * multiple
    offsets = np.cumsum(lengths) - lengths
    rows = np.arange(filled) + np.repeat(batch.cu_seqlens[kept] - offsets, lengths)
    tail = np.zeros(size - filled, np.int64)
    ends = [filled, size] if size > filled else [size]
    cu_seqlens = np.concatenate((offsets, ends)).astype(np.int32)
    return Microbatch(
        tokens=np.concatenate((batch.tokens[rows], tail)),
        labels=np.concatenate((batch.labels[rows], tail)),
        loss_mask=np.concatenate((batch.loss_mask[rows], tail.astype(bool))),
        positions=np.concatenate((batch.positions[rows], np.arange(len(tail)))),
        cu_seqlens=cu_seqlens,
        document_lengths=np.append(batch.document_lengths[kept], [0] * (size > filled)).astype(np.int32),
        document_sources=np.append(batch.document_sources[kept], [-1] * (size > filled)).astype(np.int32),
        max_seqlen=int(np.diff(cu_seqlens).max()),
        sample_ids=batch.sample_ids,
        real_tokens=batch.real_tokens,
        supervised_tokens=batch.supervised_tokens,
        padding_tokens=size - batch.real_tokens,
        bins=batch.bins,
    )


def assemble(order: GlobalOrder, bins: list[np.ndarray], pad_token: int) -> Microbatch:
    """Lay bins, given as ordinals of their documents, end to end into one microbatch."""
    size = len(bins) * order.seq_len
    documents = np.concatenate(bins)
    lengths = order.lengths[documents].astype(np.int64)
    starts, cu_seqlens = _boundaries(order, bins)
    tokens = np.full(size, pad_token, np.int64)
    spans = [np.zeros((0, 2), np.int64)]
    datasets, numbers = order.locate(documents)
    sample_ids = list(zip(datasets.tolist(), numbers.tolist(), strict=True))
    for (dataset, number), start, length in zip(sample_ids, starts.tolist(), lengths.tolist(), strict=True):
        stored = order.indexes[dataset].tokens(number)
        spans.append(order.indexes[dataset].spans(number))
        tokens[start : start + length] = stored[:length]
        if len(stored) > length:  # truncated: it still has to end, or a model learns never to stop
            end = int(spans[-1][-1, 1]) if len(spans[-1]) else len(stored)
            tokens[start + length - 1] = stored[end - 1]
            if left_bare(spans[-1], np.array([len(spans[-1])]), length)[0]:
                spans[-1] = spans[-1][:0]

    if order.vocab_size is not None:
        _check_tokens(order, tokens, sample_ids, starts)
    # A span beyond the cut of a truncated document becomes empty and adds nothing.
    spans_in = [len(own) for own in spans[1:]]  # [real documents]
    ranges = np.minimum(np.concatenate(spans), np.repeat(lengths, spans_in)[:, None])
    ranges = ranges + np.repeat(starts, spans_in)[:, None]
    depth = np.bincount(ranges[:, 0], minlength=size + 1) - np.bincount(ranges[:, 1], minlength=size + 1)
    supervised = np.cumsum(depth)[:size] > 0
    supervised[starts] = False  # nothing in its document predicts the first token
    loss_mask = np.append(supervised[1:], False)
    real_tokens = int(lengths.sum())
    document_lengths = np.zeros(len(cu_seqlens) - 1, np.int32)
    document_sources = np.full(len(document_lengths), -1, np.int32)
    real = np.searchsorted(cu_seqlens, starts)
    document_lengths[real], document_sources[real] = lengths, order.sources(datasets, numbers)
    return Microbatch(
        tokens=tokens,
        labels=np.where(loss_mask, np.append(tokens[1:], 0), 0),
        loss_mask=loss_mask,
        positions=np.arange(size) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens)),
        cu_seqlens=cu_seqlens.astype(np.int32),
        document_lengths=document_lengths,
        document_sources=document_sources,
        max_seqlen=int(np.diff(cu_seqlens).max()),
        sample_ids=sample_ids,
        real_tokens=real_tokens,
        supervised_tokens=int(loss_mask.sum()),
        padding_tokens=size - real_tokens,
        bins=sum(len(documents) > 0 for documents in bins),
    )


def _check_tokens(
    order: GlobalOrder, tokens: np.ndarray, sample_ids: list[tuple[int, int]], starts: np.ndarray
) -> None:
    """Raise ValueError where a token has no row in the embedding."""
    assert order.vocab_size is not None
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < order.vocab_size:
        at = int(np.flatnonzero((tokens < 0) | (tokens >= order.vocab_size))[0])
        dataset, document = sample_ids[int(np.searchsorted(starts, at, side="right")) - 1]
        raise ValueError(outside_vocabulary(order.indexes[dataset].place(document), int(tokens[at]), order.vocab_size))


def _boundaries(order: GlobalOrder, bins: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the starts of the real documents [documents] and all boundaries [all documents + 1]."""
    unit = order.pad_documents_to
    padding_document = -(-PADDING_DOCUMENT // unit) * unit
    starts: list[np.ndarray] = []
    boundaries: list[np.ndarray] = []
    for number, documents in enumerate(bins):
        base = number * order.seq_len
        ends = base + np.append(0, np.cumsum(order.padded(documents)))
        starts.append(ends[:-1])
        boundaries += [ends[:-1], np.arange(ends[-1], base + order.seq_len, padding_document)]
    return np.concatenate(starts), np.concatenate([*boundaries, [len(bins) * order.seq_len]])
