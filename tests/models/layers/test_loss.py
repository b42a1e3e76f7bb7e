"""The loss head over several chunks, which tiny models never fill, against plain cross entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.layers import loss

TOKENS, HIDDEN, ROWS, VOCABULARY = 37, 16, 136, 131  # the last five rows are padding


@pytest.mark.parametrize("chunk", [1, 5 * ROWS, 10**9])  # logits held at once: of one token, of five, of all
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_chunks_are_one_sum(monkeypatch, chunk, dtype, error):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk)
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    weight = torch.randn(ROWS, HIDDEN).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,))
    total = loss.loss_sum(hidden, weight, labels, vocab_size=VOCABULARY)
    (total * 0.5).backward()
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    wanted = F.cross_entropy(exact[0] @ exact[1][:VOCABULARY].t(), labels, reduction="sum")
    (wanted * 0.5).backward()
    assert total.dtype == torch.float32 and total.item() == pytest.approx(wanted.item(), rel=error)
    for found, leaf in ((hidden.grad, exact[0]), (weight.grad, exact[1])):
        assert found.dtype == dtype
        assert float((found.double() - leaf.grad).norm() / leaf.grad.norm()) < error
    assert not weight.grad[VOCABULARY:].any()
    with torch.no_grad():
        assert torch.equal(loss.loss_sum(hidden, weight, labels, vocab_size=VOCABULARY), total)


@pytest.mark.parametrize("chunk", [5 * ROWS, 10**9])
def test_losses_are_added_up_by_source(monkeypatch, chunk):
    """Over two microbatches into one array, whose gradient and whose own sums are as they were without it."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk)
    torch.manual_seed(1)
    sums, wanted, gradients = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), []
    weight = torch.randn(ROWS, HIDDEN)
    for tokens in (TOKENS, 8):
        hidden = torch.randn(tokens, HIDDEN)
        labels, sources = torch.randint(VOCABULARY, (tokens,)), torch.randint(3, (tokens,))  # none of the fourth
        totals = []
        for by_source in (None, loss.BySource(sources=sources, sums=sums)):
            leaf = hidden.clone().requires_grad_()
            totals.append(loss.loss_sum(leaf, weight, labels, vocab_size=VOCABULARY, by_source=by_source))
            totals[-1].backward()
            gradients.append(leaf.grad)
        assert torch.equal(*totals) and torch.equal(*gradients[-2:])
        each = F.cross_entropy(hidden.double() @ weight.double()[:VOCABULARY].t(), labels, reduction="none")
        for source in range(3):
            wanted[source] += each[sources == source].sum()
    torch.testing.assert_close(sums, wanted, rtol=1e-6, atol=0)
    assert sums[3] == 0 and not sums.requires_grad
