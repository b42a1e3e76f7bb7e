"""The Transformer Engine backend: bf16 and every FP8 recipe close to the plain model, with the same checkpoints."""

from __future__ import annotations

import numpy as np
import pytest

from engine import host
from engine.fp8 import RECIPES
from tests import gpu

NO_TE = host.transformer_engine_fault() is not None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(gpu.NO_GPU, reason="no CUDA device is visible"),
    pytest.mark.skipif(NO_TE, reason="Transformer Engine is not installed"),
]

EXPERTS = ("gpt_oss", "qwen3_moe")
MODELS = (
    "llama",
    *EXPERTS,
    "olmo2",
    "olmo3",
    "qwen2_tied",
    "qwen2_untied",
    "qwen3_tied",
    "qwen3_windows",
    "llama_tied",
)
CURVE_STEPS = 50


def needs(recipe: str) -> None:
    """Skips a recipe that this GPU has no instructions for."""
    if lack := RECIPES[recipe].lacks(*host.device_versions()):
        pytest.skip(f"{recipe} {lack}")


def check_curve(folder, precision: str, *, loss: float, gradient: float, **settings) -> None:
    """Fifty steps within a relative tolerance of the plain fp32 model's losses, the first gradients likewise."""
    from engine.config import OptimConfig

    optim = OptimConfig(lr=5e-4, weight_decay=0.1, schedule="constant")
    wanted = gpu.curve_reference(folder, CURVE_STEPS, optim)
    found = gpu.train(folder, "te", precision, gpu.curve_data(), CURVE_STEPS, optim, **settings)
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=loss)
    assert found.losses[-1] < 0.95 * found.losses[0]  # the curve goes somewhere
    error, name = gpu.worst_gradient(found, wanted)
    assert error < gradient, f"{name}: {error:.2e}"


@pytest.mark.parametrize("name", MODELS)
def test_bf16_curve_follows_fp32(folders, name):
    # A router's choice between close experts turns on digits that bf16 has not, and so do its gradients.
    check_curve(folders(name), "bf16", loss=2e-2, gradient=0.5 if name in EXPERTS else 0.1)


@pytest.mark.parametrize("recompute", ["mlp", "full"])
def test_bf16_recomputation(folders, recompute):
    check_curve(folders("llama"), "bf16", loss=2e-2, gradient=0.1, recompute=recompute)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "qwen3_moe", "olmo2"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_curve_follows_fp32(folders, recipe, name):
    needs(recipe)
    # Three bits of mantissa: a gradient's direction is what has to hold.
    check_curve(folders(name), "fp8", loss=5e-2, gradient=0.9 if name in EXPERTS else 0.5, fp8=recipe)


def test_other_documents_do_not_notice(folders):
    with gpu.one_rank():
        gpu.check_isolation(gpu.build(folders("qwen2_untied"), "te", "bf16"))


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_have_the_same_keys_and_shapes(folders, name):
    from models.build import sharded_tensors

    def described(backend: str) -> dict[str, tuple[int, ...]]:
        with gpu.one_rank():
            part = gpu.build(folders(name), backend, "bf16")
            pieces = sharded_tensors(part.chunks[0], part.metadata)
            return {piece.key: tuple(piece.global_shape) for piece in pieces}

    assert described("te") == described("native")


@pytest.mark.slow
def test_saved_by_te_and_resumed_by_either_backend(inputs, tmp_path):
    te, native = (("--precision", "bf16", "--backend", backend) for backend in ("te", "native"))
    whole = gpu.pretrain(inputs, tmp_path / "whole", *te)
    for name, flags, on_host in (("te", te, False), ("native", native, False), ("host", native, True)):
        found = gpu.resume(inputs, tmp_path / "whole", tmp_path / name, *flags, on_host=on_host)
        gpu.assert_same_course(found, whole, loss=2e-2, norm=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_resumes(inputs, tmp_path, recipe):
    needs(recipe)
    flags = ("--precision", "fp8", "--fp8", recipe, "--backend", "te")
    whole = gpu.pretrain(inputs, tmp_path / "whole", *flags)
    found = gpu.resume(inputs, tmp_path / "whole", tmp_path / "again", *flags)
    gpu.assert_same_course(found, whole, loss=2e-2, norm=0.1)
