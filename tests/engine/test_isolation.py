"""Documents in a bin know nothing of each other, and padding changes nothing."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from engine.config import OptimConfig
from engine.layout import Layout
from tests.support.parity import EXPERT_LAYOUTS, LAYOUTS
from tests.support.tiny import VOCABULARY, MemoryIndex, conversations, save_model
from tests.support.training import logits, relative, train

OPTIM = OptimConfig(lr=1e-3, schedule="constant")
CHANGED = 5  # a document in the middle of its bin


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model("qwen2_untied", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def experts_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    return {name: save_model(name, folder / name) for name in ("qwen3_moe", "gpt_oss")}


def other_document(index: MemoryIndex, document: int) -> MemoryIndex:
    """The same index with every token of one document changed."""
    changed = copy.deepcopy(index)
    tokens, spans = changed.documents[document]
    changed.documents[document] = ((tokens + 1 + np.arange(len(tokens))) % VOCABULARY, spans)
    return changed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_documents_do_not_notice(pool, folder, layout):
    ranks, degrees = LAYOUTS[layout]
    index = conversations(16)
    options = {"global_batch_size": 16, "seq_len": 192}
    before = pool.run(logits, ranks, folder, degrees, index, options)[0]
    after = pool.run(logits, ranks, folder, degrees, other_document(index, CHANGED), options)[0]
    assert len(before) == 16
    assert np.abs(before[CHANGED] - after[CHANGED]).max() > 0.1
    for document in set(before) - {CHANGED}:
        assert np.isfinite(before[document]).all()
        if ranks == 1:
            np.testing.assert_array_equal(before[document], after[document])
        else:
            np.testing.assert_allclose(before[document], after[document], atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", ["dp1", "tp2", "cp2", "ep2", "ep2 cp2", "ep2 etp2 tp2"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_other_documents_do_not_notice_with_experts(pool, experts_folders, name, layout):
    """Another document's tokens go to other experts, whose groups change in size: rounding may differ, no more."""
    ranks, degrees = (LAYOUTS | EXPERT_LAYOUTS)[layout]
    index = conversations(16)
    options = {"global_batch_size": 16, "seq_len": 192}
    before = pool.run(logits, ranks, experts_folders[name], degrees, index, options)[0]
    after = pool.run(logits, ranks, experts_folders[name], degrees, other_document(index, CHANGED), options)[0]
    assert np.abs(before[CHANGED] - after[CHANGED]).max() > 0.1
    for document in set(before) - {CHANGED}:
        np.testing.assert_allclose(before[document], after[document], atol=1e-5, rtol=0)


def test_padding_changes_nothing(pool, folder):
    index = conversations(16)
    tight = pool.run(train, 1, folder, Layout(), index, 2, OPTIM, {"pad_documents_to": 2})[0]
    loose = {"pad_documents_to": 32, "seq_len": 320, "micro_batch_size": 3}
    padded = pool.run(train, 1, folder, Layout(), index, 2, OPTIM, loose)[0]
    np.testing.assert_allclose(padded.losses, tight.losses, rtol=1e-6)
    whole = [np.concatenate([r.gradients[k].flatten() for k in tight.gradients]) for r in (tight, padded)]
    assert np.linalg.norm(whole[0] - whole[1]) <= 1e-6 * np.linalg.norm(whole[0])
    for name, gradient in tight.gradients.items():
        # The gradient of a key's bias is a cancellation: softmax does not see a shift of all keys.
        bound = 5e-6 if "k_proj.bias" in name else 1e-6
        assert relative(padded.gradients[name], gradient) <= bound, name


@pytest.mark.parametrize("layout", ["dp1", "dp2", "pp2 vpp2", "tp2 cp2"])
def test_batch_without_supervision_contributes_zero(pool, folder, layout):
    ranks, degrees = LAYOUTS[layout]
    index = conversations(8)
    silent = MemoryIndex([(tokens, spans[:0]) for tokens, spans in index.documents])
    found = pool.run(train, ranks, folder, degrees, silent, 1, OPTIM, {})[0]
    assert found.losses == [0.0] and found.norms == [0.0]
    assert all(float(gradient.abs().max()) == 0.0 for gradient in found.gradients.values())
