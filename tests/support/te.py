"""What ranks do in cases of Transformer Engine's layers; see `tests.support.world.Pool(stand_in=True)`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from torch import distributed

from data.loader import Microbatch
from engine.cli import parse_run
from engine.layout import Layout
from engine.mesh import build_mesh, destroy_mesh
from engine.prepare import Prepared, prepare_run
from engine.step import run_microbatches, wrap_chunks
from engine.train import train
from engine.trainer import Trainer
from models.build import sharded_tensors
from tests.support.training import SMALL_BUCKETS, start


def described(folder: Path, backend: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor of a checkpoint of a model in bf16, by key."""
    part = start(folder, Layout(), precision="bf16", backend=backend)
    pieces = list(sharded_tensors(part.chunks[0], part.metadata))
    return {piece.key: (tuple(piece.global_shape), str(piece.dtype)) for piece in pieces}


def prepared_by(backend: str, inputs: Path, output: Path, *flags: str) -> Prepared:
    """A run on the ranks of this world whose layers are the backend's, though no GPU is visible."""
    paths = ["--model", inputs / "model", "--data", inputs / "data", "--output", output]
    shape = "--global-batch-size 8 --optim.lr 1e-3 --optim.schedule constant"
    config = parse_run([*map(str, paths), *shape.split(), *flags])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.prepare.choose_backend", lambda *_, **__: (backend, "asked for"))
        return prepare_run(config, world_size=distributed.get_world_size(), cuda=False)


def resumed_by(inputs: Path, output: Path, backends: Sequence[str], *flags: str) -> list[dict]:
    """Six steps of a run, cut where another backend takes over; the lines of its metrics."""
    for number, backend in enumerate(backends, 1):
        shape = f"--seq-len 96 --steps {6 * number // len(backends)}"
        more = "--checkpoint.every 3 --overlap on --bucket-size 2000"
        train(prepared_by(backend, inputs, output, *shape.split(), *more.split(), *flags))
        destroy_mesh()
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def scales_of(inputs: Path, output: Path, *flags: str) -> dict[str, list[float]]:
    """This rank's delayed scales once it has taken up a run again, by their keys."""
    prepared = prepared_by("te", inputs, output, *["--steps", "7", "--precision", "fp8", "--fp8", "delayed"], *flags)
    trainer = Trainer(prepared, build_mesh(prepared.config.layout))
    trainer.scales.note()
    found = {shard.key: shard.weight.tolist() for shard in trainer.scales.shards()}
    trainer.saver.close()
    destroy_mesh()
    return found


def nothing_but_padding(folder: Path, tokens: int = 96) -> float:
    """The largest gradient after a microbatch without a document, which sends no expert a token."""
    part = start(folder, Layout(), backend="te")
    wrapped = wrap_chunks(part.chunks, part.mesh, **SMALL_BUCKETS)
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    nothing = np.zeros(tokens, dtype=np.int64)
    batch = Microbatch(
        tokens=nothing,
        labels=nothing,
        loss_mask=nothing.astype(bool),
        positions=np.arange(tokens),
        cu_seqlens=np.array([0, tokens], dtype=np.int32),
        document_lengths=np.zeros(1, dtype=np.int32),
        document_sources=np.full(1, -1, dtype=np.int32),
        max_seqlen=tokens,
        sample_ids=[],
        real_tokens=0,
        supervised_tokens=0,
        padding_tokens=tokens,
        bins=0,
    )
    run_microbatches(wrapped, [batch], part.mesh, kernel=part.kernel)
    return max(float(p.main_grad.abs().max()) for chunk in wrapped for p in chunk.parameters())
