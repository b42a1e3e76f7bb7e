"""What a layer keeps for its backward pass, counted, against what the GPU benchmark reckons."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.kept import EXPERTS, SIZES, kept_bytes
from tests.support.tiny import save_model


@pytest.mark.parametrize(("name", "changes"), [("llama", {}), ("qwen2_untied", {}), ("gpt_oss", EXPERTS)])
def test_a_layer_keeps_what_is_reckoned(pool, tmp_path, name, changes, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    monkeypatch.delitem(sys.modules, "gpu_shapes", raising=False)
    from gpu_shapes import layer_activations

    shape = SIZES | changes
    one, three = (
        pool.run(kept_bytes, 1, save_model(name, tmp_path / f"{layers}", layers=layers, **shape))[0]
        for layers in (1, 3)
    )
    reckoned = layer_activations(shape, recompute=False)
    if "num_local_experts" not in shape:  # the host's activation is not fused: it keeps the gate's and one copy more
        reckoned += 4 * shape["intermediate_size"]
    # Scales of norms, logarithms of attention and the router's choices come on top.
    assert reckoned <= (three - one) / 2 <= 1.08 * reckoned
