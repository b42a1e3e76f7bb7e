"""Token-sum cross entropy straight from hidden states: vocab-parallel, chunked, at supervised positions only.

Memory beside the weight's gradient is one chunk of logits, whatever the vocabulary and the batch: the
logits of a chunk are turned into their own gradient in place, as in Liger kernels' fused linear cross
entropy (Hsu et al., 2024, arXiv:2410.10989), here with the vocabulary split over tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from models.layers.fused import fused

CHUNK_LOGITS = 2**24  # logits held at once; in fp32 64 MiB
CUDA_CHUNK_BYTES = 2**30  # of logits in the model's dtype: each chunk reads and writes the whole weight gradient


def _reduce(tensor: Tensor, group, op=distributed.ReduceOp.SUM) -> Tensor:
    if group is not None and group.size() > 1:
        distributed.all_reduce(tensor, op=op, group=group)
    return tensor


def _chunk_losses(logits: Tensor, targets: Tensor, owned: Tensor, group) -> tuple[Tensor, Tensor]:
    """Turns fp32 `logits` [chunk, local vocabulary] into unnormalised probabilities in place.

    `targets` [chunk] are columns of this rank's shard (any value where `owned` is False). Returns
    (losses [chunk], sums of the probabilities [chunk]), both over the whole vocabulary.
    """
    if logits.shape[1]:
        maximum = logits.amax(dim=1)
    else:  # every row of this rank's shard is padding
        maximum = logits.new_full((logits.shape[0],), float("-inf"))
    maximum = _reduce(maximum, group, distributed.ReduceOp.MAX)
    logits.sub_(maximum[:, None])
    if logits.shape[1]:
        picked = logits.gather(1, targets[:, None]).squeeze(1) * owned
    else:
        picked = torch.zeros_like(maximum)
    logits.exp_()
    both = _reduce(torch.stack((logits.sum(dim=1), picked)), group)
    return both[0].log() - both[1], both[0]


def _in_place(hidden: Tensor, columns: Tensor, targets: Tensor, owned: Tensor, group, wanted: bool):
    """Returns the losses [chunk] of hidden [chunk, hidden size] and, if `wanted`, the gradient of their logits.

    columns [local vocabulary, hidden size]; targets, owned: as in `_chunk_losses`.
    """
    logits = (hidden @ columns.t()).float()
    losses, sums = _chunk_losses(logits, targets, owned, group)
    if not wanted:
        return losses, None
    logits.div_(sums[:, None])
    if logits.shape[1]:
        logits.scatter_add_(1, targets[:, None], -owned[:, None].to(logits.dtype))
    return losses, logits.to(hidden.dtype)


@fused(kernels=2)  # the targets are picked by the second
def _row_statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest logit of each row, the sum of exp(logit - largest), and the target's logit; in fp32."""
    wide = logits.float()
    largest = wide.amax(dim=1, keepdim=True)
    total = (wide - largest).exp().sum(dim=1, keepdim=True)
    return largest.squeeze(1), total.squeeze(1), logits.gather(1, targets.unsqueeze(1)).squeeze(1).float()


@fused(mutates="logits")
def _to_gradient(logits: Tensor, targets: Tensor, owned: Tensor, largest: Tensor, total: Tensor) -> None:
    """Writes probabilities, less one at the targets, over logits."""
    probabilities = (logits.float() - largest.unsqueeze(1)).exp() / total.unsqueeze(1)
    columns = torch.arange(logits.shape[1], device=logits.device)
    at_target = (columns == targets.unsqueeze(1)) & owned.unsqueeze(1)
    logits.copy_(probabilities - at_target.float())


def _in_two_passes(hidden: Tensor, columns: Tensor, targets: Tensor, owned: Tensor, group, wanted: bool):
    """What `_in_place` returns, with logits in the model's dtype alone: read once for the losses, and read and
    written once for the gradient."""
    logits = hidden @ columns.t()
    if logits.shape[1]:
        largest, total, picked = _row_statistics(logits, targets)
    else:  # every row of this rank's shard is padding
        total = picked = torch.zeros(logits.shape[0], device=logits.device)
        largest = torch.full_like(total, float("-inf"))
    if group is not None and group.size() > 1:
        own, largest = largest, _reduce(largest.clone(), group, distributed.ReduceOp.MAX)
        parts = torch.stack((total * (own - largest).exp(), (picked - largest) * owned))
        total, picked = _reduce(parts, group)
    else:
        picked = picked - largest
    if wanted and logits.shape[1]:
        _to_gradient(logits, targets, owned, largest, total)
    return total.log() - picked, logits if wanted else None


@dataclass(frozen=True, kw_only=True)
class BySource:
    """Where the loss head adds up token losses by the source of their document; no gradient passes through it."""

    sources: Tensor  # int64 [tokens], a number below the count of sources for each supervised token
    sums: Tensor  # float64 [sources], shared by the microbatches of a step

    def add(self, rows: slice, losses: Tensor) -> None:
        """Adds the losses [tokens] of these rows. Not by index_add_, whose order on a GPU is another in every run."""
        numbers = torch.arange(len(self.sums), device=losses.device)
        belongs = self.sources[rows] == numbers[:, None]  # [sources, tokens]
        self.sums.add_(torch.where(belongs, losses.double(), 0.0).sum(1))


class _LossSum(torch.autograd.Function):
    """Sum of token losses; gradients are computed with the losses, while a chunk's logits exist."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, first: int, valid: int, group, by_source: BySource | None
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        columns = weight[:valid]
        local = labels - first
        owned = (local >= 0) & (local < valid)
        local = local.clamp(0, max(valid - 1, 0))
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        on_host = hidden.is_cpu
        held = CHUNK_LOGITS if on_host else CUDA_CHUNK_BYTES // hidden.element_size()
        passes = _in_place if on_host else _in_two_passes
        chunk = max(1, held // max(1, weight.shape[0]))
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            wanted = wants_hidden or wants_weight
            losses, gradient = passes(hidden[rows], columns, local[rows], owned[rows], group, wanted)
            total += losses.sum(dtype=torch.float64)
            if by_source is not None:
                by_source.add(rows, losses)
            if grad_hidden is not None:
                torch.mm(gradient, columns, out=grad_hidden[rows])
            if grad_weight is not None:
                _accumulate(grad_weight[:valid], gradient, hidden[rows])
            del gradient  # else it would stand beside the next chunk's logits
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total.to(torch.float32)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * upstream.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = _narrow_in_place(grad_weight.mul_(upstream), ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def _narrow_in_place(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts an fp32 tensor within its own memory, from the front: a narrow row never passes an unread wide one."""
    if wide.dtype == dtype:
        return wide
    flat = wide.view(-1)
    narrow = flat.view(dtype)[: flat.numel()]
    for start in range(0, flat.numel(), CHUNK_LOGITS):
        block = slice(start, start + CHUNK_LOGITS)
        narrow[block] = flat[block].to(dtype)
    return narrow.view(wide.shape)


def _accumulate(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """Adds gradient^T hidden to fp32 `total` [rows, hidden size] without a second array of its size."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.t(), hidden)
        return
    if not hidden.is_cpu:  # the product adds to fp32 as it goes, without a sum in the narrow dtype in between
        torch.addmm(total, gradient.t(), hidden, out_dtype=total.dtype, out=total)
        return
    block = max(1, CHUNK_LOGITS // max(1, hidden.shape[1]))
    for start in range(0, total.shape[0], block):
        rows = slice(start, start + block)
        total[rows] += gradient[:, rows].t() @ hidden


def loss_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    group=None,
    by_source: BySource | None = None,
) -> Tensor:
    """Returns the sum over tokens of -log p(label), a scalar in fp32.

    hidden [tokens, hidden size]: supervised positions only, the same on every rank of `group`;
    weight [local vocabulary, hidden size]: this rank's equal share of the padded vocabulary;
    labels [tokens]: global vocabulary ids below `vocab_size`; rows from `vocab_size` on are padding and
    take no part. The gradient of `hidden` is this rank's share: the caller sums it over `group`. The token losses are
    also added to `by_source`, where it is given.
    """
    rank = group.rank() if group is not None else 0
    first = rank * weight.shape[0]
    valid = min(max(vocab_size - first, 0), weight.shape[0])
    return _LossSum.apply(hidden, weight, labels, first, valid, group, by_source)
