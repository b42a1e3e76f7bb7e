"""Attention by FlashAttention 3, windows and sinks included, against sums in fp64; skipped where it is not offered."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from models.backend import activate_flash_attention_3
from models.layers.attention import varlen_attention
from models.layers.packed_documents import PackedDocuments
from models.layers.sinks import plain_sink_attention
from tests import gpu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpu.NO_GPU, reason="no CUDA device is visible")]
LENGTHS = (300, 1, 700)


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("sinks", [False, True])
def test_outputs_and_gradients(window, sinks):
    if not activate_flash_attention_3(deterministic=False):
        pytest.skip("FlashAttention 3 is not offered here")
    try:
        _compare(window, sinks)
    finally:
        torch.nn.attention.restore_flash_attention_impl()


def _compare(window: int | None, with_sinks: bool) -> None:
    torch.manual_seed(1)
    total, heads, groups, dim = sum(LENGTHS), 8, 2, 64
    shapes = [(total, heads, dim), (total, groups, dim), (total, groups, dim)]
    states = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    sinks = torch.randn(heads, device="cuda", dtype=torch.bfloat16, requires_grad=True) if with_sinks else None
    boundaries = torch.tensor([0, *LENGTHS], device="cuda", dtype=torch.int32).cumsum(0).to(torch.int32)
    packed = PackedDocuments(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=max(LENGTHS),
        max_seqlen_kv=max(LENGTHS),
        positions=torch.cat([torch.arange(length) for length in LENGTHS]).cuda(),
    )
    output = varlen_attention(*states, packed, dim**-0.5, window, sinks)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    wide = [state.detach().double().requires_grad_() for state in states]
    none = torch.full((heads,), float("-inf"), device="cuda", dtype=torch.float64)
    sink = sinks.detach().double().requires_grad_() if sinks is not None else none
    exact = torch.cat([_document(*wide, sink, part, window) for part in pairwise(boundaries)])
    exact.backward(gradient.double())
    pairs = [(output, exact), *((one.grad, two.grad) for one, two in zip(states, wide, strict=True))]
    pairs += [(sinks.grad, sink.grad)] if sinks is not None else []
    for found, wanted in pairs:
        assert (found.double() - wanted).norm() / wanted.norm() < 2e-2


def _document(query, key, value, sinks, bounds, window):
    rows = slice(*map(int, bounds))
    length = rows.stop - rows.start
    place = torch.arange(length, device="cuda")
    mask = place[:, None] >= place[None]
    if window is not None:
        mask &= place[:, None] - place[None] < window
    parts = [state[rows].transpose(0, 1)[None] for state in (query, key, value)]
    return plain_sink_attention(*parts, sinks, mask, query.shape[-1] ** -0.5)[0].transpose(0, 1)
