"""What the layers need to know about a microbatch of packed documents, computed once and shared by all.

Context parallelism splits each document into 2*cp chunks; rank r holds chunks r and 2*cp-1-r ("zigzag"),
so that every rank has the same work. `cu_seqlens` are the padded boundaries of whole documents
throughout; a document's padding comes after its tokens, where causality hides it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from models.layers.loss import BySource

# Documents share a padded batch on the host when the shorter is at least this share of the longest.
_GROUP_RATIO = 0.8
_GROUP_SLACK = 32  # tokens: below this, another call costs more than the padding
_SHORTEST_BLOCK = 64  # queries that are cut off together where windows are shorter than documents


def zigzag_indices(cu_seqlens: np.ndarray, cp_size: int, cp_rank: int) -> np.ndarray:
    """Returns where this context-parallel rank's tokens stand in the whole microbatch, int64 [tokens / cp]."""
    if cp_size == 1:
        return np.arange(cu_seqlens[-1], dtype=np.int64)
    chunks = np.diff(cu_seqlens) // (2 * cp_size)
    starts = np.stack((cu_seqlens[:-1] + cp_rank * chunks, cu_seqlens[:-1] + (2 * cp_size - 1 - cp_rank) * chunks))
    return _ranges(starts.T.reshape(-1), np.repeat(chunks, 2))


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenates the ranges [start, start + length)."""
    offsets = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum(), dtype=np.int64) + np.repeat(starts - offsets, lengths)


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Queries and the keys they may see: row i of `queries` sees all but the last `queries - 1 - i` keys."""

    query_starts: np.ndarray  # [segments], in this rank's token order
    query_lengths: np.ndarray
    key_starts: np.ndarray  # [segments], in the whole microbatch's token order
    key_lengths: np.ndarray

    @classmethod
    def of(cls, cu_seqlens: np.ndarray, real_lengths: np.ndarray, cp_size: int, cp_rank: int) -> Segments:
        """Cuts documents into segments; a document without real tokens is padding and gets none."""
        real = np.flatnonzero(real_lengths)
        starts, lengths = cu_seqlens[:-1][real], np.diff(cu_seqlens)[real]
        if cp_size == 1:
            return cls(query_starts=starts, query_lengths=lengths, key_starts=starts, key_lengths=lengths)
        chunks = lengths // (2 * cp_size)
        first = starts // cp_size
        return cls(
            query_starts=np.concatenate((first, first + chunks)),
            query_lengths=np.concatenate((chunks, chunks)),
            key_starts=np.concatenate((starts, starts)),
            key_lengths=np.concatenate(((cp_rank + 1) * chunks, (2 * cp_size - cp_rank) * chunks)),
        )

    def within(self, window: int | None) -> Segments:
        """Cuts the queries into blocks that leave out the keys before every window; itself where none ends."""
        if window is None or not len(self.key_lengths) or self.key_lengths.max() <= window:
            return self
        block = max(window, _SHORTEST_BLOCK)
        counts = np.where(self.key_lengths > window, -(-self.query_lengths // block), 1)
        owner = np.repeat(np.arange(len(counts)), counts)
        number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        cut = self.key_lengths[owner] > window
        first = np.where(cut, number * block, 0)
        last = np.where(cut, np.minimum(first + block, self.query_lengths[owner]), self.query_lengths[owner])
        before = (self.key_lengths - self.query_lengths)[owner]  # keys of a segment before its first query
        left = np.where(cut, np.maximum(before + first - window + 1, 0), 0)
        return Segments(
            query_starts=self.query_starts[owner] + first,
            query_lengths=last - first,
            key_starts=self.key_starts[owner] + left,
            key_lengths=before + last - left,
        )


@dataclass(frozen=True, kw_only=True)
class Group:
    """Segments of like length, padded to one batch of shape [batch, queries] x [batch, keys]."""

    batch: int
    queries: int
    keys: int
    mask: Tensor | None  # bool [batch, 1, queries, keys]; None where plain causality says the same


@dataclass(frozen=True, kw_only=True)
class PaddedPlan:
    """How packed tokens become padded batches and come back, for hosts without variable-length kernels."""

    groups: tuple[Group, ...]
    queries: Tensor  # int64 [sum of batch*queries]: local token of every padded query
    keys: Tensor  # int64 [sum of batch*keys]: gathered token of every padded key
    in_place: bool  # whether the packed tokens are the padded batches already, as with documents of one length
    back: Tensor  # int64 [local tokens]: padded query of every local token
    unattended: Tensor | None  # int64: local tokens that are padding documents' and get zeros


def _group_segments(segments: Segments) -> list[np.ndarray]:
    """Groups segments of like key length, longest first; deterministic in the lengths alone."""
    order = np.argsort(-segments.key_lengths, kind="stable")
    groups, start = [], 0
    for end in range(1, len(order) + 1):
        longest = segments.key_lengths[order[start]]
        if end == len(order) or segments.key_lengths[order[end]] < _GROUP_RATIO * longest - _GROUP_SLACK:
            groups.append(order[start:end])
            start = end
    return groups


def plan_padded(
    segments: Segments,
    local_tokens: int,
    gathered: np.ndarray | None,
    device: torch.device,
    window: int | None = None,
) -> PaddedPlan:
    """Plans the padded batches. `gathered` [tokens] says where a token lies in the all-gathered keys.

    window: the last keys that a query sees, itself included; None for all.
    """
    whole, segments = segments, segments.within(window)
    once = gathered is None and segments is whole  # queries and keys are the same tokens, each taken once

    def place(indices: np.ndarray) -> Tensor:
        return torch.from_numpy(indices).to(device)

    groups, query_indices, key_indices = [], [], []
    back = np.full(local_tokens, -1, dtype=np.int64)
    filled = 0
    for members in _group_segments(segments):
        query_lengths, key_lengths = segments.query_lengths[members], segments.key_lengths[members]
        queries, keys, batch = int(query_lengths.max()), int(key_lengths.max()), len(members)
        row, column = np.arange(queries), np.arange(keys)
        # Padded rows and columns repeat the segment's last one; nothing reads the rows back.
        query = segments.query_starts[members, None] + np.minimum(row, query_lengths[:, None] - 1)
        key = segments.key_starts[members, None] + np.minimum(column, key_lengths[:, None] - 1)
        real = row < query_lengths[:, None]  # [batch, queries]
        back[query[real]] = filled + np.flatnonzero(real.reshape(-1))
        filled += batch * queries
        query_indices.append(query.reshape(-1))
        key_indices.append((key if gathered is None else gathered[key]).reshape(-1))
        mask = None
        narrow = window is not None and keys > window
        if narrow or not np.array_equal(query_lengths, key_lengths):
            last = (key_lengths - query_lengths)[:, None] + np.minimum(row, query_lengths[:, None] - 1)
            seen = column <= last[:, :, None]  # [batch, queries, keys]
            if narrow:
                seen &= column > last[:, :, None] - window
            mask = place(seen[:, None])
        groups.append(Group(batch=batch, queries=queries, keys=keys, mask=mask))
    empty = np.zeros(0, dtype=np.int64)
    missing = np.flatnonzero(back < 0)
    back[missing] = 0
    query_rows = place(np.concatenate(query_indices or [empty]))
    return PaddedPlan(
        groups=tuple(groups),
        in_place=once and filled == local_tokens and np.array_equal(back, np.arange(filled)),
        queries=query_rows,
        # One object tells the attention that each key is taken once, too, so that gradients can be gathered.
        keys=query_rows if once else place(np.concatenate(key_indices or [empty])),
        back=place(back),
        unattended=place(missing) if len(missing) else None,
    )


@dataclass(frozen=True, kw_only=True)
class PrefixPlan:
    """Each chunk of queries and the prefix of its document that it sees, laid out one after the other."""

    rows: Tensor  # int64: gathered token of every key, prefix after prefix
    query_bounds: Tensor  # int32 [segments + 1]
    key_bounds: Tensor  # int32 [segments + 1]
    longest_query: int
    longest_key: int


def plan_prefixes(segments: Segments, gathered: np.ndarray, device: torch.device) -> PrefixPlan:
    """Lays keys out for a kernel that aligns causality with a segment's last key."""
    order = np.argsort(segments.query_starts, kind="stable")
    queries, keys = segments.query_lengths[order], segments.key_lengths[order]

    def bounds(lengths: np.ndarray) -> Tensor:
        return torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)).to(device)

    return PrefixPlan(
        rows=torch.from_numpy(gathered[_ranges(segments.key_starts[order], keys)]).to(device),
        query_bounds=bounds(queries),
        key_bounds=bounds(keys),
        longest_query=int(queries.max()),
        longest_key=int(keys.max()),
    )


@dataclass(frozen=True, kw_only=True)
class PaddedInput:
    """What plans of padded batches are made from."""

    segments: Segments
    local_tokens: int
    gathered: np.ndarray | None


@dataclass(kw_only=True)
class PackedDocuments(PackedSeqParams):
    """megatron-core's THD parameters together with what the native attention plans once a microbatch."""

    positions: Tensor = field(kw_only=True)  # int64 [local tokens], position in the document
    supervised: Tensor | None = None  # int64, this rank's tokens that bear a loss
    by_source: BySource | None = None  # of these tokens, where sources are told apart
    padded: PaddedInput | None = None  # for the padded kernel
    plans: dict[int | None, PaddedPlan] = field(default_factory=dict)  # window -> plan
    prefixes: PrefixPlan | None = None  # for the variable-length kernel under context parallelism
    routed: Any = None  # models.layers.router.RoutedTokens, for models with experts
    rotary: dict = field(default_factory=dict)  # (rope key, dtype) -> tables

    def tables(self, rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns the rotary tables of this microbatch, computed at the first layer that asks."""
        key = (rope.key, dtype)
        if key not in self.rotary:
            self.rotary[key] = rope.tables(self.positions, dtype)
        return self.rotary[key]

    def plan(self, window: int | None) -> PaddedPlan:
        """Returns the padded batches for layers with this window, planned at the first that asks."""
        if window not in self.plans:
            assert self.padded is not None
            given = self.padded
            device = self.positions.device
            self.plans[window] = plan_padded(given.segments, given.local_tokens, given.gathered, device, window)
        return self.plans[window]

    def for_transformer_engine(self) -> PackedSeqParams:
        """The plain parameters: Transformer Engine's attention takes each field as an argument."""
        names = (field.name for field in fields(PackedSeqParams))
        return PackedSeqParams(**{name: getattr(self, name) for name in names})


def pack_documents(
    cu_seqlens: np.ndarray,
    real_lengths: np.ndarray,
    *,
    cp_group,
    device: torch.device,
    kernel: str,
) -> PackedDocuments:
    """Builds the shared description of one microbatch.

    cu_seqlens: int [documents + 1], padded boundaries over the whole microbatch, each document a multiple
    of 2*cp; real_lengths: int [documents], 0 for a document of padding only; kernel: which attention will
    read it, as `models.backend.attention_kernel` says.
    """
    cp_size, cp_rank = (cp_group.size(), cp_group.rank()) if cp_group is not None else (1, 0)
    local = zigzag_indices(cu_seqlens, cp_size, cp_rank)
    starts = np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
    boundaries = torch.from_numpy(cu_seqlens.astype(np.int32)).to(device)
    longest = int(np.diff(cu_seqlens).max())
    packed = PackedDocuments(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        positions=torch.from_numpy(local - starts[local]).to(device),
    )
    gathered = None
    if cp_size > 1:
        order = np.concatenate([zigzag_indices(cu_seqlens, cp_size, rank) for rank in range(cp_size)])
        gathered = np.empty_like(order)
        gathered[order] = np.arange(len(order))
    if kernel == "padded":
        segments = Segments.of(cu_seqlens, real_lengths, cp_size, cp_rank)
        packed.padded = PaddedInput(segments=segments, local_tokens=len(local), gathered=gathered)
    elif kernel == "varlen" and gathered is not None:
        # Padding documents, too: the kernel leaves what it is not given uninitialised.
        segments = Segments.of(cu_seqlens, np.diff(cu_seqlens), cp_size, cp_rank)
        packed.prefixes = plan_prefixes(segments, gathered, device)
    return packed
