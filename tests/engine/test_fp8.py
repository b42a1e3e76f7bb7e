"""What FP8 recipes ask of a GPU and of a model's sizes, and what is offered where they do not fit."""

from __future__ import annotations

import pytest

from engine.fp8 import check_fp8
from engine.layout import Layout
from models.hf_config import describe
from tests import gpu
from tests.support.tiny import save_model

HOPPER, BLACKWELL, CUDA = (9, 0), (10, 0), (13, 0)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return describe(save_model("llama", tmp_path_factory.mktemp("dense"), layers=1, **gpu.SHAPE))


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "sentence"),
    [
        ("mxfp8", HOPPER, CUDA, "or higher, below 12.0, and this GPU has 9.0; --fp8 tensorwise or --fp8 blockwise or"),
        ("mxfp8", (12, 0), CUDA, "this GPU has 12.0; --fp8 tensorwise or --fp8 blockwise or --fp8 delayed works here"),
        ("blockwise", HOPPER, (12, 8), "needs CUDA 12.9, and torch was built for 12.8; --fp8 tensorwise or --fp8 del"),
        ("tensorwise", (8, 0), CUDA, "needs compute capability 8.9 or higher, and this GPU has 8.0; use --precision"),
    ],
)
def test_a_device_that_cannot_is_named_with_what_can(dense, recipe, capability, cuda, sentence):
    with pytest.raises(ValueError) as caught:
        check_fp8(recipe, Layout(), 256, dense, (capability, cuda))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "capability"), [("tensorwise", (8, 9)), ("delayed", HOPPER), ("blockwise", HOPPER), ("mxfp8", BLACKWELL)]
)
def test_devices_that_can(dense, recipe, capability):
    check_fp8(recipe, Layout(), 256, dense, (capability, CUDA))


def test_sizes(dense, tmp_path):
    for recipe in ("tensorwise", "delayed", "blockwise", "mxfp8"):
        check_fp8(recipe, Layout(), 256, dense)
    with pytest.raises(ValueError, match="units of 128, which does not divide the 64 tokens .*; --fp8 tensorwise or"):
        check_fp8("blockwise", Layout(tp=2, sp=True), 128, dense)
    with pytest.raises(ValueError, match="the 8 tokens of a rank's microbatch; use --precision bf16"):
        check_fp8("tensorwise", Layout(), 8, dense)
    # What a rank holds of experts is cut by --etp, not by --tp.
    shape = gpu.SHAPES["qwen3_moe"] | {"moe_intermediate_size": 64}
    experts = describe(save_model("qwen3_moe", tmp_path / "experts", layers=1, **shape))
    check_fp8("mxfp8", Layout(tp=2, sp=True, ep=2), 256, experts)
    with pytest.raises(ValueError, match="the experts size of a rank 16; --fp8 tensorwise or --fp8 delayed fits here"):
        check_fp8("mxfp8", Layout(etp=4), 256, experts)


def test_what_is_offered_fits_both_sizes_and_device(tmp_path):
    """gpt-oss' 2,880 is no multiple of 128, and Hopper has no mxfp8."""
    shape = gpu.SHAPES["gpt_oss"] | {"hidden_size": 320, "intermediate_size": 320}
    model = describe(save_model("gpt_oss", tmp_path / "model", layers=1, **shape))
    for recipe in ("blockwise", "mxfp8"):
        with pytest.raises(ValueError, match=r"; --fp8 tensorwise or --fp8 delayed works here$"):
            check_fp8(recipe, Layout(), 256, model, (HOPPER, CUDA))
