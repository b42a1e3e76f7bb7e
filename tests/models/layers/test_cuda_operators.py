"""Operators that run on CUDA alone, called with fake tensors: they exist under these names and take these arguments.

Nothing is computed. Shapes and dtypes of outputs and gradients come from torch's own descriptions of its operators.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models.layers.attention import varlen_attention
from models.layers.experts import sums_by_expert
from models.layers.packed_documents import PackedDocuments

TOKENS = 1024


def states(heads: int, dim: int) -> torch.Tensor:
    return torch.empty(TOKENS, heads, dim, dtype=torch.bfloat16, requires_grad=True)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    ("heads", "groups", "dim", "window"), [(32, 8, 128, None), (64, 8, 64, 128), (28, 4, 128, 4096)]
)
def test_attention_over_documents(heads, groups, dim, window, sinks):
    with FakeTensorMode():
        query, key, value = states(heads, dim), states(groups, dim), states(groups, dim)
        boundaries = torch.empty(9, dtype=torch.int32)
        packed = PackedDocuments(
            qkv_format="thd",
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            max_seqlen_q=300,
            max_seqlen_kv=300,
            positions=torch.empty(TOKENS, dtype=torch.int64),
        )
        sink = torch.empty(heads, dtype=torch.bfloat16, requires_grad=True) if sinks else None
        output = varlen_attention(query, key, value, packed, dim**-0.5, window, sink)
        assert (output.shape, output.dtype) == (query.shape, torch.bfloat16)
        output.sum().backward()
        for one in (query, key, value) if sink is None else (query, key, value, sink):
            assert one.grad is not None and (one.grad.shape, one.grad.dtype) == (one.shape, torch.bfloat16)


def test_products_of_experts():
    with FakeTensorMode():
        tokens = torch.empty(96, 64, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(4, 128, 64, dtype=torch.bfloat16, requires_grad=True)
        ends = torch.empty(4, dtype=torch.int32)
        output = torch._grouped_mm(tokens, weight.transpose(1, 2), offs=ends)
        (output * output).sum().backward()
        assert output.shape == (96, 128) and weight.grad is not None and weight.grad.shape == weight.shape
        assert sums_by_expert(output.detach(), ends).shape == (4, 128)
