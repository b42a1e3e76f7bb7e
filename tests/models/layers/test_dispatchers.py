"""Tokens by DeepEP's calls, over gloo: the same losses and gradients, and padding is sent nowhere."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe import moe_utils

from engine.check_model import check_dispatcher
from engine.config import MoeConfig, OptimConfig, RunConfig
from engine.layout import Layout
from models.layers.dispatchers import PackedAlltoAll, _PackedDeepEP, fused_permutation
from tests.support import deep_ep
from tests.support.parity import EXPERT_LAYOUTS
from tests.support.tiny import conversations, save_model
from tests.support.training import relative, step_batches, train

OPTIM = OptimConfig(lr=1e-3, schedule="constant")
INDEX = conversations(16)


def train_by_flex(*arguments):
    """(what `train` returns, tokens that this rank sent in each layer)."""
    deep_ep.SENT.clear()
    with deep_ep.in_place():
        return train(*arguments, MoeConfig(dispatcher="flex")), list(deep_ep.SENT)


@pytest.mark.parametrize("layout", ["ep2", "ep2 tp2", "ep2 etp2 tp2", "ep2 pp2"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_flex_does_the_same(pool, tmp_path, name, layout):
    """As one rank alone does, in fp32, with much padding."""
    folder, (ranks, degrees) = save_model(name, tmp_path / "model"), EXPERT_LAYOUTS[layout]
    options = {"pad_documents_to": 16, "seq_len": 192}
    alone = pool.run(train, 1, folder, Layout(), INDEX, 2, OPTIM, {})[0]
    found, _ = pool.run(train_by_flex, ranks, folder, degrees, INDEX, 2, OPTIM, options, "fp32", "none")[0]
    np.testing.assert_allclose(found.losses, alone.losses, rtol=1e-5)
    np.testing.assert_allclose(found.norms, alone.norms, rtol=1e-4)
    assert max(relative(found.gradients[key], one) for key, one in alone.gradients.items()) < 1e-4


def test_padding_is_sent_nowhere(pool, tmp_path):
    """Each layer sends as many tokens, however much padding there is."""
    folder = save_model("gpt_oss", tmp_path / "model")
    batches = step_batches(INDEX, 1, {})
    sent = []
    for options in ({"pad_documents_to": 2}, {"pad_documents_to": 32, "seq_len": 320, "micro_batch_size": 3}):
        arguments = (folder, Layout(ep=2), INDEX, 1, OPTIM, options, "fp32", "none")
        results = pool.run(train_by_flex, 2, *arguments)
        sent.append(sum(sum(counts) for _, counts in results))
    assert sent[0] == sent[1] > sum(len(INDEX.documents[number][0]) for number in batches[0])


def manager(*, topk: int, local: int) -> _PackedDeepEP:
    made = _PackedDeepEP.__new__(_PackedDeepEP)
    made.router_topk, made.num_local_experts = topk, local
    return made


def test_tokens_name_their_experts_and_padding_none():
    """An expert that was chosen at weight 0 stays chosen."""
    weights = torch.tensor([[0.0, 0.6, 0.4, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    chosen = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]]).bool()
    found = manager(topk=2, local=2)
    found.setup_metadata(chosen.view(3, 2, 2), weights.view(3, 2, 2))
    assert found.token_indices.tolist() == [[1, 2], [0, 3], [-1, -1]]
    torch.testing.assert_close(found.token_probs, torch.tensor([[0.6, 0.4], [1.0, 0.0], [0.0, 0.0]]))


def test_numbers_become_a_map_without_asking_the_device():
    indices, probs = torch.tensor([[1, -1], [-1, -1], [2, 0]]), torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.3, 0.7]])
    probs.requires_grad_()
    chosen, weights = manager(topk=2, local=3)._indices_to_multihot(indices, probs)
    assert chosen.tolist() == [[False, True, False], [False] * 3, [True, False, True]]
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, 0.0], [0.7, 0.0, 0.3]]))
    (weights * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert probs.grad.tolist() == [[2, 0], [0, 0], [3, 1]]
    on_meta = manager(topk=2, local=3)._indices_to_multihot(indices.to("meta"), probs.to("meta"))
    assert on_meta[0].shape == (3, 3)


def test_rows_are_those_of_real_tokens(monkeypatch):
    """The fused permutation makes as many rows as it is told; megatron-core tells it those of padding, too."""
    dispatcher = PackedAlltoAll.__new__(PackedAlltoAll)
    base = PackedAlltoAll.__mro__[1]
    monkeypatch.setattr(base, "preprocess", lambda self, routing_map: setattr(self, "num_out_tokens", 12) or "counts")
    dispatcher.config, dispatcher.real_tokens = SimpleNamespace(moe_router_topk=2), 5
    assert dispatcher.preprocess(torch.zeros(6, 4, dtype=torch.bool)) == "counts" and dispatcher.num_out_tokens == 10


@pytest.mark.parametrize(("cuda", "kernels", "fused"), [(True, True, True), (False, True, False), (True, False, False)])
def test_sorting_is_fused_where_its_kernels_are(monkeypatch, cuda, kernels, fused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    for name in ("permute", "permute_with_probs", "sort_chunks_by_index", "sort_chunks_by_index_with_probs"):
        monkeypatch.setattr(moe_utils, f"fused_{name}", len, raising=False)
    monkeypatch.setattr(moe_utils, "fused_unpermute", len if kernels else None, raising=False)
    assert fused_permutation() is fused


def known_groups(ranks: int) -> None:
    assert ranks in (2, 4, 8), "Unsupported number of EP ranks"


FLEX = RunConfig(ep=2, precision="bf16", moe=MoeConfig(dispatcher="flex"))


@pytest.mark.parametrize(
    ("config", "cuda", "sentence"),
    [
        (replace(FLEX, ep=1), True, "needs --ep or --etp above 1"),
        (replace(FLEX, precision="fp32"), True, "sends bf16 alone"),
        (replace(FLEX, deterministic=True), True, "in no promised order"),
        (FLEX, False, "need GPUs, and none is visible"),
        (replace(FLEX, ep=3), True, "does not know groups of --ep times --etp = 3 ranks"),
    ],
)
def test_flex_is_refused_where_it_cannot_work(monkeypatch, config, cuda, sentence):
    buffer = SimpleNamespace(get_dispatch_config=known_groups)
    monkeypatch.setitem(sys.modules, "deep_ep", SimpleNamespace(Buffer=buffer))
    with pytest.raises(ValueError) as caught:
        check_dispatcher(config, cuda=cuda)
    assert sentence in str(caught.value) and str(caught.value).endswith("use --moe.dispatcher alltoall")
    check_dispatcher(FLEX, cuda=True)


def test_flex_is_refused_where_deepep_is_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    with pytest.raises(ValueError, match="--moe.dispatcher flex is DeepEP, which cannot be imported"):
        check_dispatcher(FLEX, cuda=True)
