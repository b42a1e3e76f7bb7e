"""Packed attention against the definition: windows shorter than documents, sinks, context parallelism, padding."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.flops import doubled_pairs
from models.attention import padded_attention
from models.documents import pack_documents, zigzag_indices

HEADS, GROUPS, DIM = 4, 2, 8
SCALE = 0.4


def definition(query, key, value, owner, position, window, sinks):
    """Attention by a mask of pairs: same document, not later, within the window; sinks in the denominator alone."""
    key, value = (states.repeat_interleave(HEADS // GROUPS, 1) for states in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * SCALE
    distance = position[:, None] - position[None, :]
    seen = (owner[:, None] == owner[None, :]) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, len(query), 1)), -1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : len(key)], value)


@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 7, 40, 64, 100])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_padded_batches_are_attention(cp, window, with_sinks):
    random = np.random.default_rng(cp * 100 + (window or 0))
    lengths = random.integers(1, 330, 6)
    lengths[2] = 0  # a document of padding only
    sizes = -(-np.maximum(lengths, 1) // (2 * cp)) * 2 * cp
    bounds = np.concatenate(([0], np.cumsum(sizes)))
    owner = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))
    position = torch.from_numpy(np.arange(bounds[-1]) - np.repeat(bounds[:-1], sizes))
    real = torch.from_numpy(lengths)[owner] > position
    torch.manual_seed(cp)
    states = [torch.randn(int(bounds[-1]), n, DIM, requires_grad=True) for n in (HEADS, GROUPS, GROUPS)]
    sinks = torch.randn(HEADS, requires_grad=True) if with_sinks else None
    leaves = [*states, sinks] if with_sinks else states
    wanted = definition(*states, owner, position, window, sinks)
    weights = torch.randn_like(wanted) * real[:, None, None]  # nothing reads what padding gives
    expected = torch.autograd.grad((wanted * weights).sum(), leaves)
    order = np.concatenate([zigzag_indices(bounds, cp, rank) for rank in range(cp)])
    found = torch.zeros_like(wanted)
    for rank in range(cp):
        group = SimpleNamespace(size=lambda: cp, rank=lambda rank=rank: rank)
        packed = pack_documents(bounds, lengths, cp_group=group, device=torch.device("cpu"), kernel="padded")
        local = zigzag_indices(bounds, cp, rank)
        query, key, value = states[0][local], states[1][order], states[2][order]
        output = padded_attention(query, key, value, packed.plan(window), SCALE, sinks)
        found = found.index_copy(0, torch.from_numpy(local), output)
    gradients = torch.autograd.grad((found * weights).sum(), leaves)
    torch.testing.assert_close(found[real], wanted[real], atol=2e-6, rtol=1e-5)
    assert not found[owner == 2].any()
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_a_document_of_many_windows_is_cut_into_blocks():
    """Else a window would save nothing: every block of queries sees no more keys than it needs."""
    bounds = np.array([0, 1000, 1010])
    packed = pack_documents(bounds, np.diff(bounds), cp_group=None, device=torch.device("cpu"), kernel="padded")
    plan = packed.plan(100)
    assert sum(group.batch for group in plan.groups) == 11
    assert max(group.keys for group in plan.groups) == 199
    assert packed.plan(100) is plan and packed.plan(1000) is not plan
    assert [(g.batch, g.queries) for g in packed.plan(None).groups] == [(1, 1000), (1, 10)]


def test_pairs_are_counted_within_windows():
    lengths = np.array([3, 10])
    assert doubled_pairs(lengths, None) == 9 + 100
    # Of 10 tokens with a window of 4: 1 + 2 + 3 + 7 * 4 pairs, each counted without the half that the diagonal adds.
    assert doubled_pairs(lengths, 4) == 9 + 2 * 10 * 4 - 16
