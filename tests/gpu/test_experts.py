"""Experts on CUDA: gradients of biases and of experts without tokens, and no wait for the device."""

from __future__ import annotations

import pytest
import torch

from tests import gpu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpu.NO_GPU, reason="no CUDA device is visible")]

ENDS = (0, 2048, 2048, 10_240)  # the first and the third expert have no rows


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bias_gradients_are_those_of_fp64(dtype, mean):
    from tests.models.layers.test_dispatch import bias_gradient, exact_sums

    rows = (torch.randn(ENDS[-1], 256, generator=torch.Generator().manual_seed(0)) + mean).to(dtype)
    found, exact = bias_gradient(rows.cuda(), list(ENDS)).cpu().double(), exact_sums(rows, list(ENDS))
    assert (found - exact).norm() / exact.norm() < (2**-8 if dtype == torch.bfloat16 else 1e-5)
    assert not found[[0, 2]].any()


def test_experts_without_rows_get_no_gradient():
    """Also where memory holds something else, as it does after the first step; Blackwell's own product leaves it."""
    from tests.models.layers.test_dispatch import expert_linear

    for _ in range(3):
        torch.full((64, 1024, 1024), torch.nan, device="cuda")  # freed at once, and handed out again
        linear = expert_linear(512, 256, len(ENDS), device="cuda", dtype=torch.bfloat16)
        tokens = torch.randn(ENDS[-1], 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        linear(tokens, torch.tensor(ENDS, dtype=torch.int32, device="cuda")).float().square().mean().backward()
        assert torch.isfinite(linear.weight.grad).all() and torch.isfinite(tokens.grad).all()
        assert not linear.weight.grad[[0, 2]].any() and linear.weight.grad[[1, 3]].any()


def test_a_layer_of_experts_does_the_same_twice():
    """The same bits forwards and backwards: nothing is added by atomics, whose order changes."""
    from models.layers.dispatch import find_places, from_experts, to_experts

    generator = torch.Generator("cuda").manual_seed(2)
    likes = torch.rand(4096, 32, generator=generator, device="cuda")
    chosen = torch.zeros_like(likes, dtype=torch.bool).scatter_(1, likes.topk(4).indices, True)
    states = torch.randn(4096, 512, generator=generator, device="cuda").bfloat16()
    places = find_places(chosen, chosen[:, 0], topk=4, real_tokens=4096)

    def pass_through() -> tuple[torch.Tensor, torch.Tensor]:
        own = states.clone().requires_grad_()
        rows, weights = to_experts(own, likes, places)
        output = from_experts((rows * weights[:, None]).to(rows.dtype), places)
        output.float().square().sum().backward()
        return output.detach(), own.grad

    (first, first_gradient), (second, second_gradient) = pass_through(), pass_through()
    assert torch.equal(first, second) and torch.equal(first_gradient, second_gradient)
