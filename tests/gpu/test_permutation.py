"""Transformer Engine's sorting of tokens by expert against megatron-core's own; skipped where it is not there."""

from __future__ import annotations

import pytest
import torch

from tests import gpu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpu.NO_GPU, reason="no CUDA device is visible")]

DEVICE, HIDDEN, EXPERTS, TOPK = "cuda", 256, 8, 4
# (tokens, of which real): none at all, one, some, all. Of tokens without a real one Transformer Engine 2.12 gives
# none back.
TOKENS = [(0, 0), (1_300, 1), (1_300, 900), (1_300, 1_300)]
# Rows of each chunk: none at all, none of some, some of all.
CHUNKS = [(0,) * 6, (0, 700, 0, 0, 31, 5), (3, 128, 700, 1, 64, 9)]
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def kernels():
    from models.layers.dispatchers import fused_permutation

    if not fused_permutation():
        pytest.skip("Transformer Engine's permutation is not there")


def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(3)).to(dtype)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def there_and_back(fused: bool, tokens: int, real: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """[rows, their weights, tokens, gradients of states and weights] of tokens that go to experts and return."""
    from megatron.core.transformer.moe import moe_utils

    states = draw(tokens, HIDDEN, dtype=dtype).requires_grad_()
    likes = draw(tokens, EXPERTS, dtype=torch.float32)
    chosen = torch.zeros_like(likes, dtype=torch.bool).scatter_(1, likes.topk(TOPK).indices, True)
    chosen[real:] = False  # padding
    weights = (likes.sigmoid() * chosen).requires_grad_()
    count = {"num_out_tokens": real * TOPK, "fused": fused}
    rows, of_rows, order = moe_utils.permute(states, chosen, probs=weights, **count)
    outputs = (rows * of_rows[:, None]).to(dtype)
    back = moe_utils.unpermute(outputs, order, restore_shape=states.shape, routing_map=chosen, fused=fused)
    back.backward(draw(tokens, HIDDEN, dtype=dtype))
    assert states.grad is not None and weights.grad is not None
    return [rows, of_rows, back, states.grad, weights.grad]


@pytest.mark.parametrize("dtype", BOUNDS, ids=["fp32", "bf16"])
@pytest.mark.parametrize(("tokens", "real"), TOKENS)
def test_tokens_go_to_experts_and_return(tokens, real, dtype):
    found, wanted = (there_and_back(fused, tokens, real, dtype) for fused in (True, False))
    for one, other in zip(found[:2], wanted[:2], strict=True):
        assert len(one) == real * TOPK and torch.equal(one, other)  # moved, and nothing else
    assert max(map(error, found[2:], wanted[2:])) < BOUNDS[dtype]


def sort(fused: bool, sizes: tuple[int, ...], with_weights: bool) -> list[torch.Tensor]:
    """[rows, their weights, gradients of both] of chunks put into another order."""
    from megatron.core.transformer.moe import moe_utils

    order = torch.tensor([0, 3, 1, 4, 2, 5], device=DEVICE)  # from experts of each rank to ranks of each expert
    rows = draw(sum(sizes), HIDDEN, dtype=torch.bfloat16).requires_grad_()
    weights = draw(sum(sizes), dtype=torch.float32).requires_grad_() if with_weights else None
    split = torch.tensor(sizes, device=DEVICE)  # where the kernels read them
    found, of_rows = moe_utils.sort_chunks_by_idxs(rows, split, order, probs=weights, fused=fused)
    outputs = [found] if of_rows is None else [found, of_rows]
    torch.autograd.backward(outputs, [draw(*one.shape, dtype=one.dtype) for one in outputs])
    return [*outputs, rows.grad] if weights is None else [*outputs, rows.grad, weights.grad]


@pytest.mark.parametrize("with_weights", [True, False])
@pytest.mark.parametrize("sizes", CHUNKS)
def test_chunks_are_put_in_the_order_of_experts(sizes, with_weights):
    found, wanted = (sort(fused, sizes, with_weights) for fused in (True, False))
    assert [torch.equal(one, other) for one, other in zip(found, wanted, strict=True)] == [True] * len(wanted)
