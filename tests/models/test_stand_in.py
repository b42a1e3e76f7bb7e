"""The stand-in for Transformer Engine takes the arguments that the real package takes, wherever that one lies."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from tests.support.signatures import signatures
from tests.support.world import STAND_IN

CALLED = (
    "Linear.__init__",
    "Linear.forward",
    "LayerNormLinear.__init__",
    "LayerNormLinear.forward",
    "GroupedLinear.__init__",
    "GroupedLinear.forward",
    "DotProductAttention.__init__",
    "DotProductAttention.forward",
    "DotProductAttention.set_context_parallel_group",
    "RMSNorm.__init__",
    "Fp8Padding.__init__",
    "Fp8Padding.forward",
    "Fp8Unpadding.forward",
    "activation_recompute_forward.__init__",
    "fp8_autocast",
    "fp8_model_init",
    "DelayedScaling.fields",
    "Float8CurrentScaling.fields",
    "Float8BlockScaling.fields",
    "MXFP8BlockScaling.fields",
)


def real_package() -> Path | None:
    """The installed package, or the one that TRANSFORMER_ENGINE_SOURCE names."""
    if named := os.environ.get("TRANSFORMER_ENGINE_SOURCE"):
        return Path(named)
    spec = importlib.util.find_spec("transformer_engine")
    return Path(spec.origin).parent if spec and spec.origin else None


def test_the_stand_in_has_all_that_is_called():
    ours = signatures(STAND_IN / "transformer_engine")
    assert [name for name in CALLED if name not in ours] == []
    assert ("plain", "fuse_wgrad_accumulation", True) in ours["GroupedLinear.__init__"]


@pytest.mark.parametrize("name", CALLED)
def test_signatures_are_those_of_the_real_package(name):
    package = real_package()
    if package is None:
        pytest.skip("Transformer Engine is not installed, and TRANSFORMER_ENGINE_SOURCE names no copy of it")
    ours, theirs = (signatures(where)[name] for where in (STAND_IN / "transformer_engine", package))
    assert ours == theirs
