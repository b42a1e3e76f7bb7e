"""The kernels and bytes of a layer and of what stands beside layers, exactly: another pass over the tokens fails."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the world of fakes is for hosts without a GPU")
TOKENS = 4096
HIDDEN, WIDTH, FEED_FORWARD, VOCABULARY = 4096, (32 + 8) * 128, 14336, 128256


@pytest.fixture
def counts(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    for name in ("gpu_shapes", "kernel_counts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("kernel_counts")


def kernels(tally) -> dict[str, float]:
    return {kind: work.kernels for kind, work in tally.items()}


def test_a_dense_layer_and_what_stands_beside_it(counts):
    found = counts.count("llama-3.1-8b", TOKENS)
    assert kernels(found.layer) == {
        "matrix products": 12,
        "attention": 2,
        "norms": 8,  # forward one; backward one, the sum of its partial sums, and the rounding of that
        "rotary": 4,
        "gated unit": 2,
        "residuals": 4,
        "weight gradients": 6,
        "other": 4,
    }

    def a_token(tally, kind: str) -> float:
        return tally[kind].bytes / TOKENS

    # Bytes an element; gains and scales come on top.
    assert a_token(found.layer, "norms") / (2 * HIDDEN) == pytest.approx(10.5, abs=0.01)
    assert a_token(found.layer, "gated unit") == 16 * FEED_FORWARD
    assert a_token(found.layer, "rotary") == 8 * WIDTH + 2 * 2 * 2 * 2 * 128  # and the tables
    assert a_token(found.layer, "residuals") == 4 * 6 * HIDDEN
    assert a_token(found.rest, "norms") / HIDDEN == pytest.approx(10.5, abs=0.01)
    assert a_token(found.rest, "loss") / VOCABULARY == pytest.approx(6, abs=0.001)  # one chunk of logits
    assert found.rest["loss"].kernels == 3
    assert found.layer["matrix products"].operations == TOKENS * 6 * (
        2 * HIDDEN * HIDDEN + 2 * HIDDEN * 8 * 128 + 3 * HIDDEN * FEED_FORWARD
    )


def test_the_parts_of_fused_functions_are_counted_when_asked_for(counts):
    found = counts.count("llama-3.1-8b", TOKENS, parts=True)
    assert {kind: found.layer[kind].kernels for kind in ("norms", "rotary", "gated unit")} == {
        "norms": 42,
        "rotary": 14,
        "gated unit": 7,
    }
    assert found.layer["norms"].bytes / TOKENS / (2 * HIDDEN) == pytest.approx(122, abs=0.1)


def test_layers_with_experts_fuse_the_same(counts):
    found = counts.count("gpt-oss-20b", TOKENS)
    assert {kind: found.layer[kind].kernels for kind in ("norms", "rotary", "gated unit")} == {
        "norms": 8,
        "rotary": 4,
        "gated unit": 2,
    }
    assert found.layer["gated unit"].bytes / TOKENS == 16 * 2880 * 4
    # The router, the rows that go to experts and come back, biases and weights of choices.
    experts = found.layer["experts"]
    assert (experts.kernels, round(experts.bytes / TOKENS)) == (96, 1_021_241)


def test_views_cost_nothing_and_what_is_written_is_counted(counts):
    states = torch.empty(8, 4, dtype=torch.bfloat16, device="meta")
    with counts.Counter(parts=False) as counter:
        wide = states.view(4, 8).t().float()  # 64 bytes read, 128 written
        wide.add_(1)  # 128 and 128
        wide.copy_(wide.clone())  # 128 and 128, twice
        (states @ states.t()).view(-1)  # 64 and 64, and 128
    work = counter.kinds["other"]
    assert (work.kernels, work.bytes) == (4, 64 + 128 + 2 * 128 + 4 * 128)
    product = counter.kinds["matrix products"]
    assert (product.kernels, product.bytes, product.operations) == (1, 256, 2 * 8 * 4 * 8)
