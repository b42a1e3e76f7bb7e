"""Norms in bf16 round where transformers rounds, and the gradients of all norms are those of autograd."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from models.hf_config import describe
from models.layers.norm import FP32GainRMSNorm, ProjectionNorm, RMSNorm
from tests.support.tiny import save_model

WIDTH, EPS = 64, 1e-6
ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


def config(dtype: torch.dtype) -> SimpleNamespace:
    return SimpleNamespace(params_dtype=dtype, sequence_parallel=False)


def pairs(dtype: torch.dtype) -> list:
    """(our norm, transformers') with the same random gains."""
    ours = [RMSNorm(config(dtype), WIDTH, EPS), FP32GainRMSNorm(config(dtype), WIDTH, EPS)]
    ours += [FP32GainRMSNorm(config(dtype), WIDTH, EPS)]
    theirs = [kind(WIDTH, EPS).to(dtype) for kind in (Qwen3RMSNorm, Olmo2RMSNorm, GptOssRMSNorm)]
    for one, other in zip(ours, theirs, strict=True):
        with torch.no_grad():
            other.weight.copy_(torch.randn(WIDTH) * 0.3 + 1)
            one.weight.copy_(other.weight)
    return list(zip(ours, theirs, strict=True))


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))


def test_bf16_outputs_are_those_of_transformers_bit_for_bit():
    torch.manual_seed(0)
    states = torch.randn(200, WIDTH).bfloat16()
    for ours, theirs in pairs(torch.bfloat16):
        assert torch.equal(ours(states), theirs(states)), type(theirs).__name__


def test_gradients_are_those_of_autograd():
    torch.manual_seed(0)
    for ours, theirs in pairs(torch.float32):
        found, wanted = [], []
        for norm, results in ((ours, found), (theirs, wanted)):
            states = torch.linspace(-2, 3, 5 * WIDTH).reshape(5, WIDTH).requires_grad_()
            (norm(states) * torch.arange(5 * WIDTH).reshape(5, WIDTH)).sum().backward()
            results += [states.grad, norm.weight.grad]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-3)


def test_a_projection_is_normed_over_all_heads():
    torch.manual_seed(0)
    theirs = Olmo2RMSNorm(WIDTH, EPS).bfloat16()
    ours = ProjectionNorm(config(torch.bfloat16), WIDTH // 4, EPS, heads=4, tp_group=ALONE)
    with torch.no_grad():
        theirs.weight.copy_(torch.randn(WIDTH))
        ours.weight.copy_(theirs.weight)
    states = torch.randn(9, 1, WIDTH).bfloat16()
    assert torch.equal(ours(states.view(9, 1, 4, WIDTH // 4)).flatten(2), theirs(states))


def test_families_say_where_their_norms_round(tmp_path):
    late = {name for name in ("llama", "qwen3_moe", "olmo2", "olmo3", "gpt_oss")
            if describe(save_model(name, tmp_path / name, layers=1)).gain_in_fp32}  # fmt: skip
    assert late == {"olmo2", "olmo3", "gpt_oss"}
