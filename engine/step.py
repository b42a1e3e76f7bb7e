"""One optimizer step: microbatches through megatron-core's schedules, summed losses, one checked update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, distributed

from data.loader import Microbatch, without_padding_documents
from engine.mesh import Mesh, gather_samples
from engine.reporting.flops import doubled_pairs
from models.build import PackedModel
from models.layers.loss import BySource
from models.layers.packed_documents import PackedDocuments, pack_documents, zigzag_indices
from models.layers.router import RoutedTokens


@dataclass(frozen=True, kw_only=True)
class DeviceBatch:
    """One microbatch as this rank's model takes it."""

    tokens: Tensor  # int64 [1, local tokens]
    targets: Tensor  # int64 [local supervised tokens]
    packed: PackedDocuments
    supervised: Tensor  # int32 scalar, tokens with a loss on this context-parallel rank
    source_tokens: np.ndarray  # int64 [sources], these tokens by source


def to_device(
    batch: Microbatch, mesh: Mesh, *, kernel: str, experts: bool = False, source_losses: Tensor | None = None
) -> DeviceBatch:
    """Takes this context-parallel rank's tokens and plans what all layers share.

    experts: also what routers need; source_losses: float64 [sources], to which the loss head is to add, if any.
    """
    cp_size, device = mesh.layout.cp, mesh.device
    packed = pack_documents(
        batch.cu_seqlens.astype(np.int64),
        batch.document_lengths,
        cp_group=mesh.groups.cp,
        device=device,
        kernel=kernel,
    )
    local = zigzag_indices(batch.cu_seqlens.astype(np.int64), cp_size, mesh.cp_rank)
    supervised = np.flatnonzero(batch.loss_mask[local])
    packed.supervised = torch.from_numpy(supervised).to(device, non_blocking=True)
    if experts:
        packed.routed = routed_tokens(batch, local, mesh)
    source_tokens = np.zeros(0, dtype=np.int64)
    if source_losses is not None and len(source_losses):
        documents = np.searchsorted(batch.cu_seqlens, local[supervised], side="right") - 1
        sources = batch.document_sources[documents].astype(np.int64)
        source_tokens = np.bincount(sources, minlength=len(source_losses))
        on_device = torch.from_numpy(sources).to(device, non_blocking=True)
        packed.by_source = BySource(sources=on_device, sums=source_losses)
    return DeviceBatch(
        tokens=torch.from_numpy(batch.tokens[local])[None].to(device, non_blocking=True),
        targets=torch.from_numpy(batch.labels[local][supervised]).to(device, non_blocking=True),
        packed=packed,
        supervised=torch.tensor(len(supervised), dtype=torch.int).to(device, non_blocking=True),
        source_tokens=source_tokens,
    )


def routed_tokens(batch: Microbatch, local: np.ndarray, mesh: Mesh) -> RoutedTokens:
    """What routers must know of this rank's tokens; `local` are those of its context-parallel rank."""
    if mesh.layout.sp:
        local = np.split(local, mesh.layout.tp)[mesh.tp_rank]
    starts, sizes = batch.cu_seqlens[:-1].astype(np.int64), np.diff(batch.cu_seqlens)
    document = np.repeat(np.arange(len(sizes)), sizes)[local]
    arrays = {
        "real": local - starts[document] < batch.document_lengths[document],
        "document": document,
        "lengths": batch.document_lengths.astype(np.float32),
        "supervised": np.add.reduceat(batch.loss_mask, starts, dtype=np.float32),
    }
    on_device = {name: torch.from_numpy(array).to(mesh.device) for name, array in arrays.items()}
    return RoutedTokens(real_tokens=int(arrays["real"].sum()), **on_device)


@dataclass(frozen=True, kw_only=True)
class RouterStatistics:
    """What the routers of all layers did in one step, over all ranks."""

    tokens_per_expert: tuple[int, ...]  # summed over layers
    expert_imbalance: tuple[float, ...]  # a layer's most loaded expert over the mean of its experts
    aux_loss: float  # sum over supervised tokens, mean over layers, without its coefficient


def take_router_statistics(chunks: list, mesh: Mesh) -> RouterStatistics | None:
    """Adds up what all ranks' routers counted since the last call; None for models without experts."""
    config = chunks[0].config
    if config.num_moe_experts is None:
        return None
    totals = torch.zeros((config.num_layers, config.num_moe_experts + 1), dtype=torch.float64, device=mesh.device)
    for chunk in chunks:
        for layer in chunk.module.decoder.layers:
            counts, aux_loss = layer.mlp.router.take_statistics()
            if counts is not None:
                totals[layer.layer_number - 1, :-1] = counts.double()
            if aux_loss is not None:
                totals[layer.layer_number - 1, -1] = aux_loss.double()
    distributed.all_reduce(totals)
    loads = totals[:, :-1]
    imbalance = loads.amax(1) / loads.mean(1).clamp_min(1e-30)
    return RouterStatistics(
        tokens_per_expert=tuple(int(count) for count in loads.sum(0).tolist()),
        expert_imbalance=tuple(imbalance.tolist()),
        aux_loss=float(totals[:, -1].mean()),
    )


def wrap_chunks(
    chunks: list[PackedModel], mesh: Mesh, *, overlap: str = "auto", bucket_size: int = 0, gradients: str = "fp32"
) -> list[DistributedDataParallel]:
    """Gives each chunk its gradient buffers, sharded over data-parallel ranks.

    `gradients` is fp32, or bf16 for buffers in the dtype of their parameters, summed over microbatches and ranks so.
    `overlap` is auto, on or off: whether buckets of `bucket_size` parameters (0: megatron-core's size) travel while
    others are computed. Without overlap all parameters are one bucket.
    """
    overlaps = mesh.device.type == "cuda" if overlap == "auto" else overlap == "on"
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=gradients == "fp32",
        overlap_grad_reduce=overlaps,
        overlap_param_gather=overlaps,
        use_distributed_optimizer=True,
        bucket_size=bucket_size or None,
        check_for_nan_in_grad=False,  # engine/optim.py checks the norm, which no non-finite gradient passes
    )
    wrapped = [
        DistributedDataParallel(
            chunk.config,
            ddp_config,
            chunk,
            disable_bucketing=number > 0,
            pg_collection=mesh.groups,
        )
        for number, chunk in enumerate(chunks)
    ]
    config = chunks[0].config
    config.finalize_model_grads_func = partial(finalize_model_grads, pg_collection=mesh.groups)
    if overlaps:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def _forward(batches: Iterator[DeviceBatch], model, loss_sums: list[Tensor]):
    """megatron-core's forward step function: (output, loss function) of one microbatch."""
    batch = next(batches)
    output = model(
        batch.tokens,
        batch.packed.positions[None],
        None,
        labels=batch.targets,
        packed_seq_params=batch.packed,
    )

    def loss(total: Tensor):
        loss_sums.append(total.detach())
        return total, batch.supervised.clone(), {}

    return output, loss


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """What all ranks together put through the model in one step."""

    loss_sum: float
    supervised: int
    tokens: int  # the documents' own
    padding: int
    bins: int  # that hold documents
    squared_lengths: int  # the sum of squared document lengths, for counting attention's work
    windowed_squares: int  # and of what `engine.reporting.flops.doubled_pairs` makes of them in layers with a window
    source_losses: tuple[float, ...] = ()  # sums of token losses by source, where sources are told apart
    source_tokens: tuple[int, ...] = ()  # supervised tokens by source
    bad_samples: tuple[tuple[int, int], ...] = ()  # (data set, document) of microbatches whose loss is not finite

    @property
    def loss(self) -> float:
        """Mean over supervised tokens; 0 for a step without any."""
        return self.loss_sum / self.supervised if self.supervised else 0.0


def run_microbatches(
    chunks: list,
    microbatches: list[Microbatch],
    mesh: Mesh,
    *,
    kernel: str,
    forward_only: bool = False,
    sources: int = 0,
) -> StepTotals:
    """Runs forward (and backward) over this rank's microbatches; returns the totals of all ranks.

    All ranks must call it with equally many microbatches. Gradients are left reduced over all ranks and
    divided by the global count of supervised tokens. `sources` is how many sources are told apart in the totals.
    """
    config = chunks[0].config
    gathers_tokens = config.moe_token_dispatcher_type == "allgather" and mesh.layout.ep * mesh.layout.etp > 1
    if mesh.device.type == "cpu" and mesh.layout.pp == 1 and not gathers_tokens:
        # The host pays for every token; stages and gathered ranks exchange fixed shapes, and GPUs like them.
        multiple = _local_multiple(mesh, microbatches)
        microbatches = [without_padding_documents(batch, multiple) for batch in microbatches]
    experts = config.num_moe_experts is not None
    source_losses = torch.zeros(sources, dtype=torch.float64, device=mesh.device)
    batches = [
        to_device(batch, mesh, kernel=kernel, experts=experts, source_losses=source_losses) for batch in microbatches
    ]
    loss_sums: list[Tensor] = []
    iterators = [iter(batches) for _ in chunks]
    get_forward_backward_func()(
        forward_step_func=partial(_forward, loss_sums=loss_sums),
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=len(microbatches[0].tokens),
        micro_batch_size=1,
        forward_only=forward_only,
    )
    losses = torch.stack(loss_sums) if loss_sums else torch.zeros(1, device=mesh.device)
    window = config.window_size[0] + 1 if config.window_size else None
    return _reduce_totals(losses, source_losses, microbatches, batches, mesh, window)


def _local_multiple(mesh: Mesh, microbatches: list[Microbatch]) -> int:
    """What a microbatch's length must divide by: the padding of all documents, and the split over ranks."""
    layout = mesh.layout
    unit = int(np.gcd.reduce(np.concatenate([np.diff(batch.cu_seqlens) for batch in microbatches])))
    return math.lcm(unit, 2 * layout.cp, layout.cp * (layout.tp if layout.sp else 1))


def _reduce_totals(
    losses: Tensor,
    source_losses: Tensor,
    microbatches: list[Microbatch],
    batches: list[DeviceBatch],
    mesh: Mesh,
    window: int | None,
) -> StepTotals:
    """Adds up over data- and context-parallel ranks and tells every pipeline stage."""
    own = [0, 0, 0, 0, 0]
    if mesh.cp_rank == 0:  # context-parallel ranks hold the same microbatches
        own = [
            sum(batch.real_tokens for batch in microbatches),
            sum(batch.padding_tokens for batch in microbatches),
            sum(batch.bins for batch in microbatches),
            sum(doubled_pairs(batch.document_lengths, None) for batch in microbatches),
            sum(doubled_pairs(batch.document_lengths, window) for batch in microbatches),
        ]
    own.append(sum(len(batch.targets) for batch in batches))
    own += np.sum([batch.source_tokens for batch in batches], axis=0).tolist()
    # Integers travel as float64, exact up to 2**53.
    counts = torch.tensor(own, dtype=torch.float64, device=mesh.device)
    totals = torch.cat((losses.sum(dtype=torch.float64)[None], source_losses, counts))
    distributed.all_reduce(totals, group=mesh.groups.dp_cp)
    if mesh.layout.pp > 1:
        last = distributed.get_global_rank(mesh.groups.pp, mesh.layout.pp - 1)
        distributed.broadcast(totals, src=last, group=mesh.groups.pp)
    values, sources = totals.tolist(), len(source_losses)
    loss_sum, by_source = values[0], values[1 : 1 + sources]
    tokens, padding, bins, squared, windowed, supervised, *source_tokens = map(int, values[1 + sources :])
    bad = () if math.isfinite(loss_sum) else gather_samples(_bad_samples(losses, microbatches))
    return StepTotals(
        loss_sum=loss_sum,
        supervised=supervised,
        tokens=tokens,
        padding=padding,
        bins=bins,
        squared_lengths=squared,
        windowed_squares=windowed,
        source_losses=tuple(by_source),
        source_tokens=tuple(source_tokens),
        bad_samples=bad,
    )


def _bad_samples(losses: Tensor, microbatches: list[Microbatch]) -> set[tuple[int, int]]:
    """The samples of this rank's microbatches whose loss is not finite."""
    if len(losses) != len(microbatches):  # an earlier pipeline stage, which sees no loss
        return set()
    pairs = zip(losses.tolist(), microbatches, strict=True)
    return {sample for loss, batch in pairs if not math.isfinite(loss) for sample in batch.sample_ids}
