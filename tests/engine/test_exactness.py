"""Every layout gives the losses, norms and gradients of the plain Hugging Face model, in fp32.

The reference runs one conversation at a time, without packing and padding; see `tests.support.tiny.reference`.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.parity import INDEX, LAYOUTS, OPTIM, STEPS, References, errors, layouts_of
from tests.support.tiny import MODELS
from tests.support.training import train

# All layouts of a model and some of all: `make test` runs these, the whole matrix runs with the slow tests.
SOME_LAYOUTS = ("dp1", "tp2 cp2", "pp2 vpp2", "ep2 etp2 tp2")
WHOLE = ("gpt_oss",)
CELLS = [
    pytest.param(name, layout, marks=() if name in WHOLE or layout in SOME_LAYOUTS else pytest.mark.slow)
    for name in MODELS
    for layout in layouts_of(name)
]
BATCHING = {
    "two sequences a microbatch": {"micro_batch_size": 2},
    "eight sequences a microbatch": {"micro_batch_size": 8, "seq_len": 48},
    "batches of sequences": {
        "batch_unit": "sequences",
        "global_batch_size": 3,
        "micro_batch_size": 2,
        "pad_documents_to": 4,
    },
    "much padding": {"pad_documents_to": 16, "seq_len": 192},
}


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return References(tmp_path_factory.mktemp("models"))


def check(found, wanted) -> None:
    """Losses, those of each source too, to 1e-5, norms to 1e-4, every gradient to 1e-4 (relative, L2 per tensor)."""
    seen = errors(found, wanted)
    assert seen.loss < 1e-5 and seen.source < 1e-5 and seen.norm < 1e-4 and seen.gradient < 1e-4, seen


@pytest.mark.parametrize(("name", "layout"), CELLS)
def test_layout_matches_plain_model(pool, references, name, layout):
    ranks, degrees = layouts_of(name)[layout]
    folder, wanted = references.get(name, {})
    results = pool.run(train, ranks, folder, degrees, INDEX, STEPS, OPTIM, {})
    check(results[0], wanted)
    assert all(result.losses == results[0].losses for result in results)


@pytest.mark.parametrize("batching", BATCHING)
@pytest.mark.parametrize("layout", ["dp1", "dp2", "pp2 vpp2", "tp2 cp2"])
def test_batching_matches_plain_model(pool, references, layout, batching):
    ranks, degrees = LAYOUTS[layout]
    options = BATCHING[batching]
    folder, wanted = references.get("qwen2_tied", options)
    check(pool.run(train, ranks, folder, degrees, INDEX, STEPS, OPTIM, options)[0], wanted)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_recomputation_changes_nothing(pool, references, name, recompute):
    folder, wanted = references.get(name, {})
    arguments = (folder, LAYOUTS["tp2"][1], INDEX, STEPS, OPTIM, {}, "fp32", recompute)
    check(pool.run(train, 2, *arguments)[0], wanted)


@pytest.mark.parametrize("name", ["qwen2_untied", "olmo3", "qwen3_moe", "gpt_oss"])
def test_bf16_follows_fp32(pool, references, name):
    folder, wanted = references.get(name, {})
    found = pool.run(train, 2, folder, LAYOUTS["tp2"][1], INDEX, STEPS, OPTIM, {}, "bf16")[0]
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=2e-2)
    assert found.losses != wanted.losses
