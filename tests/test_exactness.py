"""Every layout gives the losses, norms and gradients of the plain Hugging Face model, in fp32.

The reference runs one conversation at a time, without packing and padding; see `tests.tiny.reference`.
"""

from __future__ import annotations

import numpy as np
import pytest

from engine.config import OptimConfig
from engine.mesh import Layout
from tests.tiny import MODELS, conversations, reference, save_model
from tests.training import relative, step_batches, train

STEPS = 4
OPTIM = OptimConfig(lr=1e-3, weight_decay=0.1, clip_grad=1.0, schedule="constant")
INDEX = conversations(30)
LAYOUTS = {
    "dp1": (1, Layout()),
    "tp2": (2, Layout(tp=2)),
    "tp2 sp": (2, Layout(tp=2, sp=True)),
    "cp2": (2, Layout(cp=2)),
    "cp4": (4, Layout(cp=4)),
    "pp2": (2, Layout(pp=2)),
    "pp2 vpp2": (2, Layout(pp=2, vpp=2)),
    "dp2": (2, Layout()),
    "tp2 cp2": (4, Layout(tp=2, cp=2, sp=True)),
    "tp2 pp2": (4, Layout(tp=2, pp=2, sp=True)),
    "cp2 pp2": (4, Layout(cp=2, pp=2)),
    "dp2 tp2": (4, Layout(tp=2, sp=True)),
    "pp4": (4, Layout(pp=4)),
}
BATCHING = {
    "two bins a microbatch": {"micro_batch_size": 2},
    "eight bins a microbatch": {"micro_batch_size": 8, "seq_len": 48},
    "batches of bins": {
        "batch_unit": "sequences",
        "global_batch_size": 3,
        "micro_batch_size": 2,
        "pad_documents_to": 4,
    },
    "much padding": {"pad_documents_to": 16, "seq_len": 192},
}


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Model folders and, by batching, what the plain model does."""
    made, results = {}, {}

    def get(name: str, options: dict):
        if name not in made:
            made[name] = save_model(name, tmp_path_factory.mktemp(name))
        batches = step_batches(INDEX, STEPS, options)
        key = (name, str(batches))
        if key not in results:
            results[key] = reference(made[name], INDEX, batches, OPTIM)
        return made[name], results[key]

    return get


def check(found, wanted) -> None:
    """Losses to 1e-5, norms to 1e-4, every gradient to 1e-4 (relative, L2 per tensor)."""
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=1e-5)
    np.testing.assert_allclose(found.norms, wanted.norms, rtol=1e-4)
    assert found.gradients.keys() == wanted.gradients.keys()
    errors = {name: relative(found.gradients[name], wanted.gradients[name]) for name in wanted.gradients}
    worst = max(errors, key=errors.get)
    assert errors[worst] < 1e-4, f"{worst}: {errors[worst]:.2e}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_layout_matches_plain_model(pool, references, name, layout):
    ranks, degrees = LAYOUTS[layout]
    folder, wanted = references(name, {})
    results = pool.run(train, ranks, folder, degrees, INDEX, STEPS, OPTIM, {})
    check(results[0], wanted)
    assert all(result.losses == results[0].losses for result in results)


@pytest.mark.parametrize("batching", BATCHING)
@pytest.mark.parametrize("layout", ["dp1", "dp2", "pp2 vpp2", "tp2 cp2"])
def test_batching_matches_plain_model(pool, references, layout, batching):
    ranks, degrees = LAYOUTS[layout]
    options = BATCHING[batching]
    folder, wanted = references("qwen2_tied", options)
    check(pool.run(train, ranks, folder, degrees, INDEX, STEPS, OPTIM, options)[0], wanted)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(pool, references, recompute):
    folder, wanted = references("llama", {})
    arguments = (folder, Layout(tp=2, sp=True), INDEX, STEPS, OPTIM, {}, "fp32", recompute)
    check(pool.run(train, 2, *arguments)[0], wanted)


def test_bf16_follows_fp32(pool, references):
    folder, wanted = references("qwen2_untied", {})
    found = pool.run(train, 2, folder, Layout(tp=2, sp=True), INDEX, STEPS, OPTIM, {}, "bf16")[0]
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=2e-2)
    assert found.losses != wanted.losses
