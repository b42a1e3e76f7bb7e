"""Packed attention against the definition: windows shorter than documents, sinks, context parallelism, padding.

What CUDA's variable-length flash kernel computes is written down here for the host, with its arguments and layouts,
so that everything around it is tested: prefixes of context parallelism, windows, sinks by its logarithms.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.reporting.flops import doubled_pairs
from models.layers.attention import padded_attention, varlen_attention
from models.layers.packed_documents import pack_documents, zigzag_indices
from models.layers.sinks import plain_sink_attention

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


def flash_weights(query, key, bounds, lse, scale, left, right):
    """Scores [heads, queries, keys], minus infinity for keys that are not seen, and weights by `lse` or their own.

    bounds: cu_seqlens of queries and keys. Segments are aligned at their last query and key, as the kernel does.
    """
    owner, place, size = [], [], []
    for ends, count in zip(bounds, (len(query), len(key)), strict=True):
        sizes = ends.diff().long()
        assert ends.dtype == torch.int32 and ends[0] == 0 and ends[-1] == count
        owner.append(torch.repeat_interleave(torch.arange(len(sizes)), sizes))
        size.append(sizes[owner[-1]])
        place.append(torch.arange(count) - ends[:-1].long()[owner[-1]])
    distance = (place[0] + size[1][ends_of(bounds, owner[0])] - size[0])[:, None] - place[1][None, :]
    seen = (owner[0][:, None] == owner[1][None, :]) & (distance >= -right if right >= 0 else True)
    seen &= distance <= left if left >= 0 else True
    scores = (torch.einsum("qhd,khd->hqk", query, key) * scale).masked_fill(~seen, float("-inf"))
    return scores, (scores - (scores.logsumexp(-1) if lse is None else lse)[..., None]).exp()


def ends_of(bounds, owner):
    """The last key of the segment of every query."""
    return bounds[1][1:].long()[owner] - 1


def check_flash_arguments(tensors, bounds, longest, dropout, left, right):
    groups = {len(tensor.shape) for tensor in tensors}
    assert groups == {3} and dropout == 0.0
    assert tuple(int(ends.diff().max()) for ends in bounds) == longest
    assert right == 0 and (left == -1 or left >= 0)


def flash_forward(
    query, key, value, bounds_q, bounds_k, longest_q, longest_k, dropout, causal, debug, *, scale=None,
    window_size_left=None, window_size_right=None, **unused,
):  # fmt: skip
    """`aten::_flash_attention_forward` over packed segments: output, lse [heads, queries], random state, nothings."""
    left, right = window_size_left, window_size_right
    check_flash_arguments((query, key, value), (bounds_q, bounds_k), (longest_q, longest_k), dropout, left, right)
    assert causal == ((left, right) == (-1, 0)) and not any(value is not None for value in unused.values())
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores, weights = flash_weights(query, key, (bounds_q, bounds_k), None, scale, left, right)
    output = torch.einsum("hqk,khd->qhd", weights, value)
    return output, scores.logsumexp(-1), torch.zeros(2, dtype=torch.int64), torch.empty(0), torch.empty(0)


def flash_backward(
    gradient, query, key, value, output, lse, bounds_q, bounds_k, longest_q, longest_k, dropout, causal, state, unused,
    *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    """`aten::_flash_attention_backward`: from the output and lse it is given, not from those it would compute."""
    left, right = window_size_left, window_size_right
    check_flash_arguments((gradient, output), (bounds_q, bounds_k), (longest_q, longest_k), dropout, left, right)
    assert lse.is_contiguous() and lse.shape == (query.shape[1], len(query)) and lse.dtype == torch.float32
    groups, shared = key.shape[1], query.shape[1] // key.shape[1]
    wide_key, wide_value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    _, weights = flash_weights(query, wide_key, (bounds_q, bounds_k), lse, scale, left, right)
    products = torch.einsum("qhd,khd->hqk", gradient, wide_value)
    inner = (gradient * output).sum(-1).t()[..., None]
    scores = weights * (products - inner) * scale
    grad_key, grad_value = torch.einsum("hqk,qhd->khd", scores, query), torch.einsum("hqk,qhd->khd", weights, gradient)
    by_group = [states.unflatten(1, (groups, shared)).sum(2) for states in (grad_key, grad_value)]
    return torch.einsum("hqk,khd->qhd", scores, wide_key), *by_group


@contextlib.contextmanager
def flash_written_down():
    """Gives aten's flash operators the implementations above, for tensors on the host."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", flash_forward, "CPU")
    library.impl("_flash_attention_backward", flash_backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


@pytest.fixture(scope="module")
def flash_on_host():
    with flash_written_down():
        yield


def packed_case(cp, window, with_sinks):
    """Documents of odd lengths and one of padding only: what goes in, and by definition what comes out."""
    random = np.random.default_rng(cp * 100 + (window or 0))
    lengths = random.integers(1, 330, 6)
    lengths[2] = 0  # a document of padding only
    sizes = -(-np.maximum(lengths, 1) // (2 * cp)) * 2 * cp
    bounds = np.concatenate(([0], np.cumsum(sizes)))
    owner = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))
    position = torch.from_numpy(np.arange(bounds[-1]) - np.repeat(bounds[:-1], sizes))
    torch.manual_seed(cp)
    states = [torch.randn(int(bounds[-1]), n, DIM, requires_grad=True) for n in (HEADS, GROUPS, GROUPS)]
    sinks = torch.randn(HEADS, requires_grad=True) if with_sinks else None
    return SimpleNamespace(
        lengths=lengths,
        bounds=bounds,
        padding=owner == 2,
        real=torch.from_numpy(lengths)[owner] > position,
        states=states,
        sinks=sinks,
        leaves=[*states, sinks] if with_sinks else states,
        wanted=definition(*states, owner, position, window, sinks),
    )


def check_case(case, cp, kernel, attend):
    """Each context-parallel rank's part by `attend`; returns the outputs after comparing them and all gradients."""
    weights = torch.randn_like(case.wanted) * case.real[:, None, None]  # nothing reads what padding gives
    expected = torch.autograd.grad((case.wanted * weights).sum(), case.leaves)
    order = np.concatenate([zigzag_indices(case.bounds, cp, rank) for rank in range(cp)])
    found = torch.zeros_like(case.wanted)
    for rank in range(cp):
        group = SimpleNamespace(size=lambda: cp, rank=lambda rank=rank: rank)
        device = torch.device("cpu")
        packed = pack_documents(case.bounds, case.lengths, cp_group=group, device=device, kernel=kernel)
        local = zigzag_indices(case.bounds, cp, rank)
        query, key, value = case.states[0][local], case.states[1][order], case.states[2][order]
        found = found.index_copy(0, torch.from_numpy(local), attend(query, key, value, packed))
    gradients = torch.autograd.grad((found * weights).sum(), case.leaves)
    torch.testing.assert_close(found[case.real], case.wanted[case.real], atol=2e-6, rtol=1e-5)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    return found


@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 7, 40, 64, 100])
@pytest.mark.parametrize("sinks", ["none", "fused", "plain"])
def test_padded_batches_are_attention(cp, window, sinks, monkeypatch):
    if sinks == "plain":
        monkeypatch.setattr("models.layers.attention.padded_sink_attention", plain_sink_attention)
    case = packed_case(cp, window, with_sinks=sinks != "none")
    found = check_case(
        case,
        cp,
        "padded",
        lambda query, key, value, packed: padded_attention(query, key, value, packed.plan(window), SCALE, case.sinks),
    )
    assert not found[case.padding].any()


@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 7, 40, 64, 100])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_variable_lengths_are_attention(cp, window, with_sinks, flash_on_host):
    case = packed_case(cp, window, with_sinks)
    check_case(
        case,
        cp,
        "varlen",
        lambda query, key, value, packed: varlen_attention(query, key, value, packed, SCALE, window, case.sinks),
    )


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
