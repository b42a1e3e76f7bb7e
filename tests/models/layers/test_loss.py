"""The loss head over several chunks, which tiny models never fill, against plain cross entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import distributed

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


def both_ways(dtype: torch.dtype) -> list:
    """Losses and gradients on the host's way and on CUDA's; the vocabulary is split over all ranks of this world."""
    group = distributed.group.WORLD
    rank, ranks = group.rank(), group.size()
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, HIDDEN).to(dtype), torch.randn(VOCABULARY, HIDDEN).to(dtype)
    labels = torch.randint(VOCABULARY, (TOKENS,))
    share = 0 if ranks == 3 and rank == 2 else 66 if ranks > 1 else VOCABULARY  # the third of three has padding alone
    columns = weight[rank * 66 :][:share]
    owned = (labels >= rank * 66) & (labels < rank * 66 + share)
    local = (labels - rank * 66).clamp(0, max(len(columns) - 1, 0))
    found = [passes(hidden, columns, local, owned, group, True) for passes in (loss._in_place, loss._in_two_passes)]
    wanted = F.cross_entropy(hidden.double() @ weight.double().t(), labels, reduction="none")
    return [*found, (wanted, None), loss._in_two_passes(hidden, columns, local, owned, group, False)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_two_passes_are_the_passes_in_place(pool, ranks):
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for in_place, two_passes, (wanted, _), losses_only in pool.run(both_ways, ranks, dtype):
            torch.testing.assert_close(two_passes[0], in_place[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(two_passes[0].double(), wanted, rtol=error, atol=5 * error)
            assert two_passes[1].dtype == dtype
            torch.testing.assert_close(two_passes[1], in_place[1], rtol=error, atol=1e-6)
            assert torch.equal(losses_only[0], two_passes[0]) and losses_only[1] is None
