"""What is measured and tested on a GPU is set up as a run is: the environment before torch, torch's switches after."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from engine.cuda_setup import wanted
from engine.layout import Layout
from tests import gpu

ROOT = Path(__file__).parents[2]
WANTED = wanted(Layout(), deterministic=False, dumps=Path("collectives_rank_"))
# Prints the environment as it is when torch is first imported.
PROBE = """
import json, os, sys
class Seen:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.write(2, json.dumps(dict(os.environ)).encode())
            os._exit(0)
sys.meta_path.insert(0, Seen())
sys.path.insert(0, "benchmarks")
"""


@pytest.mark.parametrize(
    "begin",
    [
        "import gpu",
        "import gpu_profile",
        "import pytest; pytest.main(['tests/gpu', '-m', 'gpu', '--collect-only', '--capture=no'])",
    ],
)
def test_the_environment_is_set_before_torch_is_there(begin):
    names = {name for one in WANTED for name in (one.name, *one.aliases)}
    clean = {name: value for name, value in os.environ.items() if name not in names} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROBE + begin]
    done = subprocess.run(command, env=clean, cwd=ROOT, capture_output=True, text=True, timeout=120)
    seen = json.loads(done.stderr)
    assert names & seen.keys() == {one.name for one in WANTED}
    assert seen["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.fixture
def products():
    """How torch adds up parts of products, as torch has it itself; all that `switch` sets is put back afterwards."""
    settings, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [(settings, name, getattr(settings, name)) for name in (*names, "allow_tf32")]
    before += [(cudnn, name, getattr(cudnn, name)) for name in ("deterministic", "benchmark")]
    for name in names:
        setattr(settings, name, True)
    yield lambda: [getattr(settings, name) for name in names]
    torch.use_deterministic_algorithms(False)
    for module, name, value in before:
        setattr(module, name, value)


def test_the_benchmarks_trainer_is_switched(products, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from gpu_profile import lathe_trainer

    monkeypatch.setattr("engine.prepare.prepare_run", lambda config, **_: config)
    monkeypatch.setattr("engine.mesh.build_mesh", lambda layout: None)
    monkeypatch.setattr("engine.trainer.Trainer", lambda prepared, mesh: products())
    assert lathe_trainer(tmp_path / "model", tmp_path / "data", seq_len=8, bins=1) == [False, False]


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_tests_world_is_switched(products, monkeypatch, deterministic):
    for place in ((torch.cuda, "set_device"), (distributed, "init_process_group")):
        monkeypatch.setattr(*place, lambda *_, **__: None)
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr("engine.mesh.destroy_mesh", lambda: None)
    with gpu.one_rank(deterministic=deterministic):
        assert products() == [False, False]
        assert torch.are_deterministic_algorithms_enabled() is deterministic
