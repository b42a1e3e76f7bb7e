"""Gated units against their plain expression, and what they keep for the backward pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.layers.gated import gated_unit, quick_gelu

KINDS = {"silu": (F.silu, None, 0.0), "clamped": (quick_gelu, 1.5, 1.0), "quick": (quick_gelu, None, 0.0)}


def plain(hidden, activation, limit, offset):
    gate, up = hidden.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return activation(gate) * (up + offset)


def case(dtype):
    """[tokens, 2 * width] on both sides of the limits, and on them."""
    torch.manual_seed(0)
    hidden = (torch.randn(64, 48, dtype=torch.float64) * 2).to(dtype)
    hidden[:2] = 1.5
    hidden[2] = -1.5
    hidden[3] = 0.0
    return hidden, torch.randn(64, 24, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_values_and_gradients(kind, dtype, error):
    hidden, weights = case(dtype)
    results = []
    for function in (gated_unit, plain):
        leaf = hidden.clone().requires_grad_()
        output = function(leaf, *KINDS[kind])
        results.append((output, *torch.autograd.grad((output * weights).sum(), leaf)))
    (found, gradient), (wanted, expected) = results
    assert torch.equal(found, wanted)  # the same operations in the same order
    torch.testing.assert_close(gradient, expected, rtol=0, atol=error * float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_input_is_kept(kind):
    hidden, _ = case(torch.float32)
    hidden = hidden.requires_grad_() * 1.0
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda nothing: nothing):
        gated_unit(hidden, *KINDS[kind])
    assert [tensor.data_ptr() for tensor in kept] == [hidden.data_ptr()]
