"""Fused functions on CUDA: what their parts give, in as many kernels as are counted for them."""

from __future__ import annotations

import pytest
import torch

from tests import gpu
from tests.models.layers.test_fused import FUNCTIONS, arguments, results

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpu.NO_GPU, reason="no CUDA device is visible")]


def given(name: str, tokens: int, dtype: torch.dtype) -> tuple:
    return tuple(one.cuda() if isinstance(one, torch.Tensor) else one for one in arguments(name, tokens, dtype))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_kernel_is_its_parts(name):
    function, _ = FUNCTIONS[name]
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in (48, 200, 37):
            wanted = results(function.eager, given(name, tokens, dtype))
            for one, other in zip(results(function, given(name, tokens, dtype)), wanted, strict=True):
                error = float((one.double() - other.double()).abs().max() / other.double().abs().max())
                assert one.dtype == other.dtype and error < (2**-7 if one.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_many_kernels_as_are_counted(name):
    function, _ = FUNCTIONS[name]
    call = given(name, 512, torch.bfloat16)
    function(*call)  # compiled
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function(*call)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if not event.name.startswith(("Memcpy", "Memset"))]
    assert len(kernels) == function.kernels, kernels
