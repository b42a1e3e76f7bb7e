"""What a rank does in a distributed case: build, load, train some steps, and hand back global numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import distributed

from data.loader import Loader
from engine.checkpointing.checkpoint import sharding_metadata
from engine.config import MoeConfig, OptimConfig
from engine.layout import Layout, check_layout
from engine.mesh import build_mesh
from engine.optim import build_optimizer, update
from engine.step import run_microbatches, take_router_statistics, to_device, wrap_chunks
from models.backend import attention_kernel
from models.build import build_chunks, load_weights, sharded_tensors, transformer_config
from models.conversion.hf_reader import HFReader
from models.hf_config import describe
from models.layers.packed_documents import zigzag_indices
from models.layers.router import set_routers
from models.model_directory import read_shard
from tests.support import loading
from tests.support.tiny import MemoryIndex

# As on GPUs: gradients travel while others are computed, in many buckets, most of them padded.
SMALL_BUCKETS = {"overlap": "on", "bucket_size": 2000}


def start(
    folder: Path,
    layout: Layout,
    *,
    precision: str = "fp32",
    recompute: str = "none",
    moe: MoeConfig | None = None,
    fields: dict | None = None,
    backend: str = "native",
) -> SimpleNamespace:
    """Builds this rank's part of a Hugging Face model under `layout`.

    recompute: none, full, selective, or the parts that selective is to compute again, e.g. "norm experts". `fields`
    are of megatron-core's config.
    """
    moe = moe or MoeConfig()
    description = describe(folder)
    check_layout(layout, distributed.get_world_size(), description)
    mesh = build_mesh(layout)
    extra = {"moe_token_dispatcher_type": moe.dispatcher} | (fields or {})
    parts = () if recompute in ("none", "full", "selective") else tuple(recompute.split())
    settings = {
        "recompute": "selective" if parts else recompute,
        "recompute_modules": parts,
        "extra": extra,
        "backend": backend,
    }
    config = transformer_config(description, layout=layout, precision=precision, **settings)
    chunks = build_chunks(description, config, backend=backend, groups=mesh.groups)
    set_routers(chunks, aux_loss=moe.aux_loss, frozen=moe.freeze_router)
    metadata = sharding_metadata(mesh)
    reader = HFReader(folder)
    load_weights(chunks, metadata, lambda *piece: read_shard(description, reader, *piece))
    kernel = attention_kernel(backend, mesh.device, config.params_dtype, description)
    return SimpleNamespace(
        description=description, mesh=mesh, chunks=chunks, metadata=metadata, config=config, kernel=kernel
    )


def make_loader(index: MemoryIndex, mesh, options: dict) -> Loader:
    """A loader with small defaults; `options` win."""
    defaults = {
        "seq_len": 96,
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "batch_unit": "conversations",
        "pad_documents_to": 2 * mesh.layout.cp,
        "too_long": "error",
        "seed": 5,
        "microbatch_multiple": mesh.layout.pp if mesh.layout.vpp > 1 else 1,
    }
    return loading.make_loader([(index, 1)], dp_rank=mesh.dp_rank, dp_size=mesh.dp_size, **(defaults | options))


@torch.no_grad()
def full_gradients(part: SimpleNamespace, wrapped: list) -> dict[str, torch.Tensor]:
    """Hugging Face-named global gradients on every rank, from reduce-scattered gradient buffers."""
    for chunk in wrapped:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                own = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                distributed.all_gather_into_tensor(bucket.grad_data, own, group=group)
    kept = []
    for chunk in part.chunks:
        for parameter in chunk.parameters():
            kept.append((parameter, parameter.data.clone()))
            parameter.data.copy_(getattr(parameter, "main_grad", torch.zeros(())))  # a frozen one has none
    pieces = [
        (piece.key, tuple(piece.global_offset), piece.data.clone()[(None,) * piece.prepend_axis_num])
        for chunk in part.chunks
        for piece in sharded_tensors(chunk, part.metadata)
    ]
    for parameter, data in kept:
        parameter.data.copy_(data)
    gathered: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, pieces)
    totals = {key: torch.full(rule.shape, torch.nan) for key, rule in part.description.rule.items()}
    for key, offset, data in (piece for rank in gathered for piece in rank):
        totals[key][tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))] = data
    return {name: g for key, rule in part.description.rule.items() for name, g in rule.split(totals[key])}


def train(
    folder: Path,
    layout: Layout,
    index: MemoryIndex,
    steps: int,
    optim: OptimConfig,
    options: dict,
    precision: str = "fp32",
    recompute: str = "none",
    moe: MoeConfig | None = None,
    fields: dict | None = None,
    backend: str = "native",
) -> SimpleNamespace:
    """Trains `steps` steps; returns losses, norms, sample ids, router statistics and the first step's gradients.

    `by_source` has of each step (loss sum, supervised tokens) of every source, where there are several.
    """
    part = start(folder, layout, precision=precision, recompute=recompute, moe=moe, backend=backend, fields=fields)
    wrapped = wrap_chunks(part.chunks, part.mesh, **SMALL_BUCKETS, gradients=optim.gradients)
    optimizer = build_optimizer(optim, wrapped, part.mesh, bf16=precision != "fp32")
    loader = make_loader(index, part.mesh, options)
    sources = len(index.source_names) if len(index.source_names) > 1 else 0
    losses, norms, by_source, samples, routers, gradients = [], [], [], [], [], None
    for _ in range(steps):
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        microbatches = loader.next_step()
        totals = run_microbatches(wrapped, microbatches, part.mesh, kernel=part.kernel, sources=sources)
        by_source.append(np.array([totals.source_losses, totals.source_tokens]).T)
        if gradients is None:
            gradients = full_gradients(part, wrapped)
        norms.append(update(optimizer, lr=optim.lr, clip_grad=optim.clip_grad).grad_norm)
        losses.append(totals.loss)
        routers.append(take_router_statistics(wrapped, part.mesh))
        samples.append([sample for batch in microbatches for sample in batch.sample_ids])
    first = distributed.get_rank() == 0
    return SimpleNamespace(
        losses=losses,
        norms=norms,
        by_source=by_source,
        samples=samples,
        routers=routers,
        gradients=gradients if first else None,
    )


def logits(folder: Path, layout: Layout, index: MemoryIndex, options: dict) -> dict[int, np.ndarray] | None:
    """One forward pass over the first step: logits [length, vocabulary] by document, on the first rank."""
    part = start(folder, layout)
    mesh = part.mesh
    wrapped = wrap_chunks(part.chunks, mesh, **SMALL_BUCKETS)
    microbatches = make_loader(index, mesh, options).next_step()
    experts = part.config.num_moe_experts is not None
    batches = [to_device(batch, mesh, kernel="padded", experts=experts) for batch in microbatches]

    def forward(iterator, model):
        batch = next(iterator)
        output = model(batch.tokens, batch.packed.positions[None], None, packed_seq_params=batch.packed)
        return output, lambda tensor, non_loss_data: tensor

    iterators = [iter(batches) for _ in wrapped]
    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators if len(wrapped) > 1 else iterators[0],
            model=wrapped if len(wrapped) > 1 else wrapped[0],
            num_microbatches=len(batches),
            seq_length=len(microbatches[0].tokens),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    found = []
    if mesh.is_last_stage:
        for number, (batch, output) in enumerate(zip(microbatches, outputs, strict=True)):
            places = zigzag_indices(batch.cu_seqlens.astype(np.int64), layout.cp, mesh.cp_rank)
            found.append((mesh.dp_rank, number, places, mesh.tp_rank, output[0].numpy(), batch))
    gathered: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, found)
    return _by_document([piece for rank in gathered for piece in rank]) if mesh.rank == 0 else None


def _by_document(pieces: list) -> dict[int, np.ndarray]:
    """Puts context-parallel tokens and tensor-parallel vocabulary shards together, cut into documents."""
    documents: dict[int, np.ndarray] = {}
    shards = 1 + max(tp_rank for _, _, _, tp_rank, _, _ in pieces)
    for dp_rank, number, _, _, _, batch in pieces:
        own = [piece for piece in pieces if piece[:2] == (dp_rank, number)]
        width = own[0][4].shape[-1]
        whole = np.full((len(batch.tokens), width * shards), np.nan, dtype=np.float32)
        for _, _, places, tp_rank, output, _ in own:
            whole[places, tp_rank * width : (tp_rank + 1) * width] = output
        starts = batch.cu_seqlens[:-1][batch.document_lengths > 0]
        lengths = batch.document_lengths[batch.document_lengths > 0]
        for (_, document), start, length in zip(batch.sample_ids, starts, lengths, strict=True):
            documents[document] = whole[start : start + length]
    return documents


def step_batches(index: MemoryIndex, steps: int, options: dict) -> list[list[int]]:
    """The documents of each step, read off the global order of one rank."""
    mesh = SimpleNamespace(layout=Layout(), dp_rank=0, dp_size=1)
    loader = make_loader(index, mesh, options)
    return [[d for batch in loader.next_step() for _, d in batch.sample_ids] for _ in range(steps)]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))
