"""Leaving out documents that are all padding loses nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from data.loader import without_padding_documents
from tests.support.loading import make_loader
from tests.support.tiny import conversations


def first_step(documents: int, dp_rank: int, micro_batch_size: int) -> list:
    """One of two ranks' microbatches of a step that takes all documents, in bins of 640 tokens."""
    loader = make_loader(
        [(conversations(documents), 1)],
        seq_len=640,
        micro_batch_size=micro_batch_size,
        global_batch_size=documents,
        batch_unit="conversations",
        pad_documents_to=4,
        too_long="error",
        seed=1,
        dp_rank=dp_rank,
        dp_size=2,
    )
    return loader.next_step()


def documents(batch) -> list[tuple]:
    """Real documents with everything that belongs to them."""
    found = []
    for number in np.flatnonzero(batch.document_lengths):
        span = slice(batch.cu_seqlens[number], batch.cu_seqlens[number + 1])
        parts = (batch.tokens, batch.labels, batch.loss_mask, batch.positions)
        known = (int(batch.document_lengths[number]), int(batch.document_sources[number]))
        found.append((*known, *(tuple(part[span]) for part in parts)))
    return found


@pytest.mark.parametrize("micro_batch_size", [1, 3])
@pytest.mark.parametrize("multiple", [4, 8, 64])
def test_real_documents_stay_as_they_were(micro_batch_size, multiple):
    for batch in first_step(20, 0, micro_batch_size):
        trimmed = without_padding_documents(batch, multiple)
        size = len(trimmed.tokens)
        assert documents(trimmed) == documents(batch)
        assert trimmed.sample_ids == batch.sample_ids
        assert size % multiple == 0 and size - batch.cu_seqlens[0] < len(batch.tokens)
        kept = sum(np.diff(batch.cu_seqlens)[batch.document_lengths > 0])
        assert size - kept < multiple
        padding = trimmed.document_lengths == 0
        assert (trimmed.document_sources[padding] == -1).all() and (trimmed.document_sources[~padding] >= 0).all()
        assert trimmed.cu_seqlens[0] == 0 and trimmed.cu_seqlens[-1] == size
        assert (np.diff(trimmed.cu_seqlens) > 0).all() and len(trimmed.document_lengths) == len(trimmed.cu_seqlens) - 1
        assert trimmed.padding_tokens == size - batch.real_tokens
        assert trimmed.loss_mask.sum() == batch.supervised_tokens == trimmed.supervised_tokens
        assert trimmed.max_seqlen == np.diff(trimmed.cu_seqlens).max()


def test_a_filler_keeps_one_unit():
    (filler,) = first_step(1, 1, 1)
    assert filler.real_tokens == 0 and len(filler.tokens) == 640
    trimmed = without_padding_documents(filler, 8)
    assert len(trimmed.tokens) == trimmed.padding_tokens == 8 and trimmed.cu_seqlens.tolist() == [0, 8]
    assert trimmed.document_lengths.tolist() == [0] and not trimmed.loss_mask.any()
