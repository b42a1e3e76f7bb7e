"""--optim.gradients bf16 on CUDA: within bf16's rounding of fp32 sums, by each backend."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine import host
from tests import gpu

NO_TE = host.transformer_engine_fault() is not None
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpu.NO_GPU, reason="no CUDA device is visible")]
TE = pytest.param("te", marks=pytest.mark.skipif(NO_TE, reason="Transformer Engine is not installed"))


@pytest.mark.parametrize("backend", ["native", TE])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_sums_in_bf16_stay_near_those_in_fp32(folders, name, backend):
    """Bounds as on the host, in tests/engine/test_gradients.py, over many microbatches."""
    from engine.config import OptimConfig
    from tests.support.tiny import conversations
    from tests.support.training import relative

    optim = OptimConfig(lr=1e-3, weight_decay=0.1, clip_grad=1.0, schedule="constant")
    wide, narrow = (
        gpu.train(
            folders(name), backend, "bf16", conversations(30), 2, replace(optim, gradients=kind), {"seq_len": 128}
        )
        for kind in ("fp32", "bf16")
    )
    assert narrow.losses[0] == pytest.approx(wide.losses[0], rel=1e-6)  # before the first update
    np.testing.assert_allclose(narrow.losses, wide.losses, rtol=5e-3)
    np.testing.assert_allclose(narrow.norms, wide.norms, rtol=2e-2)
    errors = {key: relative(narrow.gradients[key], gradient) for key, gradient in wide.gradients.items()}
    assert np.median(list(errors.values())) > 2**-12 and max(errors.values()) < 2e-2, errors
    assert all(torch.equal(one, one.bfloat16().float()) for one in narrow.gradients.values())
