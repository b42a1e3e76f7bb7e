"""--deterministic on CUDA: the same start gives the same bits, in a process whose environment is set for it."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine import cuda_setup, host
from engine.layout import Layout
from tests import gpu

NO_TE = host.transformer_engine_fault() is not None
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpu.NO_GPU, reason="no CUDA device is visible")]
TE = pytest.param("te", marks=pytest.mark.skipif(NO_TE, reason="Transformer Engine is not installed"))
LONGEST = 1_500  # attention's backward pass adds up parts of a document in several blocks


@pytest.fixture
def fresh(monkeypatch):
    """A process that has multiplied nothing yet: cuBLAS and torch read the environment once."""
    wanted = cuda_setup.wanted(Layout(), deterministic=True, dumps=Path(tempfile.gettempdir()) / "collectives_rank_")
    for name, value in cuda_setup.choose(wanted, os.environ).items():
        monkeypatch.setenv(name, value)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


def train_twice(folder: Path, backend: str) -> list[SimpleNamespace]:
    """Two steps from the same weights over the same data, twice."""
    from engine.config import OptimConfig
    from tests.support.tiny import conversations

    arguments = (folder, backend, "bf16", conversations(16, longest=LONGEST), 2, OptimConfig(lr=1e-3))
    return [gpu.train(*arguments, {"seq_len": 2_048}, deterministic=True) for _ in range(2)]


@pytest.mark.parametrize("backend", ["native", TE])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_the_same_bits_twice(fresh, tmp_path, name, backend):
    from tests.support.tiny import save_model

    folder = save_model(name, tmp_path, max_position_embeddings=2_048, **gpu.SHAPES.get(name, gpu.SHAPE))
    one, two = fresh.submit(train_twice, folder, backend).result()
    assert one.gradients.keys() == two.gradients.keys()
    assert [key for key, found in one.gradients.items() if not torch.equal(found, two.gradients[key])] == []
    assert one.losses == two.losses and one.norms == two.norms
    assert one.losses[0] != one.losses[1]
