"""What the tests of one GPU share: a single rank over NCCL, a small model that every backend takes, its steps.

Heavy imports stand inside functions: where there is no GPU, these tests are collected and skipped at once.
Layouts of several ranks need several GPUs; their arithmetic is tested on the host over gloo.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from engine import cuda_setup
from engine.layout import Layout

GIVEN = dict(os.environ)
if "torch" not in sys.modules:  # a session of other tests is left alone, and so are the processes that it starts
    dumps = Path(tempfile.gettempdir()) / "collectives_rank_"
    cuda_setup.apply(Layout(), deterministic=False, dumps=dumps)

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
# Every matrix divides into blocks of 128 x 128 and every microbatch into 128 tokens, as FP8 recipes want it.
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
HEADS = {"head_dim": 64}  # of families whose head is not the hidden size shared out
SHAPES = {
    "qwen3_tied": SHAPE | HEADS,
    "qwen3_windows": SHAPE | HEADS,
    "qwen3_moe": SHAPE | HEADS | {"moe_intermediate_size": 128},
    "qwen3_moe_tied": SHAPE | HEADS | {"moe_intermediate_size": 128},
    "gpt_oss": SHAPE | HEADS | {"intermediate_size": 256},  # square: a projection the wrong way round would fit
}
OPTIONS = {"seq_len": 256, "global_batch_size": 8, "batch_unit": "conversations"}
NO_GPU = not torch.cuda.is_available()


@contextlib.contextmanager
def one_rank(*, deterministic: bool = False) -> Iterator[None]:
    """A world of this process alone, switched as a run is; forgotten afterwards, with the memory it held."""
    from torch import distributed

    from engine.mesh import destroy_mesh, world_options

    cuda_setup.switch(deterministic=deterministic)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.cuda.set_device(0)
    store = distributed.HashStore()
    distributed.init_process_group(store=store, rank=0, world_size=1, **world_options(torch.device("cuda", 0), 30))
    try:
        yield
    finally:
        destroy_mesh()
        distributed.destroy_process_group()
        torch.cuda.empty_cache()


def build(
    folder: Path,
    backend: str,
    precision: str,
    *,
    fp8: str = "tensorwise",
    recompute: str = "none",
    deterministic: bool = False,
) -> SimpleNamespace:
    """Builds and loads the model of a Hugging Face directory on this GPU; call it inside `one_rank`."""
    from engine.checkpointing.checkpoint import sharding_metadata
    from engine.mesh import build_mesh
    from models.backend import attention_kernel
    from models.build import build_chunks, load_weights, transformer_config
    from models.conversion.hf_reader import HFReader
    from models.hf_config import describe
    from models.model_directory import read_shard

    description, layout = describe(folder), Layout()
    mesh = build_mesh(layout)
    parts = () if recompute in ("none", "full", "selective") else tuple(recompute.split())
    settings = {"recompute": "selective" if parts else recompute, "recompute_modules": parts, "fp8": fp8}
    settings["extra"] = {"deterministic_mode": deterministic}
    config = transformer_config(description, layout=layout, precision=precision, backend=backend, **settings)
    chunks = build_chunks(description, config, backend=backend, groups=mesh.groups)
    metadata, reader = sharding_metadata(mesh), HFReader(folder)
    load_weights(chunks, metadata, lambda *piece: read_shard(description, reader, *piece))
    return SimpleNamespace(
        description=description,
        mesh=mesh,
        chunks=chunks,
        metadata=metadata,
        kernel=attention_kernel(backend, mesh.device, config.params_dtype, description),
        bf16=precision != "fp32",
    )


def train(folder: Path, backend: str, precision: str, index, steps: int, optim, options=None, **settings):
    """Trains; returns losses, norms, the first step's gradients on the host and bytes held after each step."""
    from engine.optim import build_optimizer, update
    from engine.step import run_microbatches, wrap_chunks
    from tests.support.training import full_gradients, make_loader

    losses, norms, held, gradients = [], [], [], None
    with one_rank(deterministic=settings.get("deterministic", False)):
        part = build(folder, backend, precision, **settings)
        wrapped = wrap_chunks(part.chunks, part.mesh, gradients=optim.gradients)
        optimizer = build_optimizer(optim, wrapped, part.mesh, bf16=part.bf16)
        loader = make_loader(index, part.mesh, OPTIONS | (options or {}))
        for _ in range(steps):
            for chunk in wrapped:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            totals = run_microbatches(wrapped, loader.next_step(), part.mesh, kernel=part.kernel)
            if gradients is None:
                gradients = {name: g.cpu().clone() for name, g in full_gradients(part, wrapped).items()}
            norms.append(update(optimizer, lr=optim.lr, clip_grad=optim.clip_grad).grad_norm)
            losses.append(totals.loss)
            held.append(torch.cuda.memory_allocated())
    return SimpleNamespace(losses=losses, norms=norms, gradients=gradients, held=held)


def first_batches(part: SimpleNamespace, index, options=None) -> list[tuple[Any, Any]]:
    """(microbatch, the same on the device) of the first step."""
    from engine.step import to_device
    from tests.support.training import make_loader

    microbatches = make_loader(index, part.mesh, OPTIONS | (options or {})).next_step()
    experts = part.chunks[0].config.num_moe_experts is not None
    return [(batch, to_device(batch, part.mesh, kernel=part.kernel, experts=experts)) for batch in microbatches]


@torch.no_grad()
def logits(part: SimpleNamespace, index, options=None) -> dict[int, np.ndarray]:
    """Logits [length, vocabulary] of the first step's documents, in fp32 on the host."""
    documents = {}
    for batch, on_device in first_batches(part, index, options):
        positions = on_device.packed.positions[None]
        output = part.chunks[0](on_device.tokens, positions, None, packed_seq_params=on_device.packed)
        whole = output[0].float().cpu().numpy()
        real = batch.document_lengths > 0
        starts, lengths = batch.cu_seqlens[:-1][real], batch.document_lengths[real]
        for (_, document), start, length in zip(batch.sample_ids, starts, lengths, strict=True):
            documents[document] = whole[start : start + length]
    return documents


def reference(folder: Path, index, steps: int, optim, options=None) -> SimpleNamespace:
    """What the plain model does on the host in fp32, one conversation at a time, in the same order."""
    from tests.support import tiny
    from tests.support.training import step_batches

    return tiny.reference(folder, index, step_batches(index, steps, OPTIONS | (options or {})), optim)


def curve_data():
    """Conversations for fifty steps without a repetition, in which seven tokens of ten follow from the one before.

    The other three are drawn, so that no loss comes near zero, where relative differences would mean nothing.
    """
    from tests.support.tiny import VOCABULARY, conversations

    index, random = conversations(450), np.random.default_rng(0)
    follower = random.permutation(VOCABULARY)
    for tokens, _ in index.documents:
        for place in np.flatnonzero(random.random(len(tokens) - 1) < 0.7) + 1:
            tokens[place] = follower[tokens[place - 1]]
    return index


@functools.cache
def curve_reference(folder: Path, steps: int, optim) -> SimpleNamespace:
    """The plain model over `curve_data`, the same for every backend and precision."""
    return reference(folder, curve_data(), steps, optim)


def worst_gradient(found: SimpleNamespace, wanted: SimpleNamespace) -> tuple[float, str]:
    """The largest relative L2 distance of a gradient, and whose it is."""
    from tests.support.training import relative

    assert found.gradients.keys() == wanted.gradients.keys()
    return max((relative(found.gradients[name], wanted.gradients[name]), name) for name in wanted.gradients)


def check_isolation(part: SimpleNamespace, tolerance: float = 0.0) -> None:
    """Changes every token of one document: its own logits move, no other's do by more than `tolerance`."""
    from tests.engine.test_isolation import CHANGED, other_document
    from tests.support.tiny import conversations

    index, options = conversations(16), {"global_batch_size": 16}
    before, after = logits(part, index, options), logits(part, other_document(index, CHANGED), options)
    assert len(before) == 16 and np.abs(before[CHANGED] - after[CHANGED]).max() > 0.1
    for document in set(before) - {CHANGED}:
        assert np.isfinite(before[document]).all()
        np.testing.assert_allclose(before[document], after[document], rtol=0, atol=tolerance)


def make_inputs(folder: Path) -> Path:
    """A model and a data directory on disk, for runs of the training script."""
    from data.index import write_index
    from tests.support.tiny import VOCABULARY, conversations, save_model

    save_model("qwen2_untied", folder / "model", layers=2, **SHAPE)
    write_index(folder / "data", conversations(23, 1).documents, vocab_size=VOCABULARY)
    return folder


def pretrain(inputs: Path, output: Path, *flags: str, on_host: bool = False) -> list[dict]:
    """Runs the training script as a user would, 6 steps with a save every 3; returns the lines it logged."""
    script = [sys.executable, ROOT / "examples" / "pretrain_sft.py", "--model", inputs / "model"]
    paths = ["--data", inputs / "data", "--output", output]
    shape = "--seq-len 256 --global-batch-size 4 --steps 6 --pad-documents-to 2 --checkpoint.every 3"
    rates = "--optim.lr 1e-3 --optim.schedule linear --optim.warmup-steps 2 --optim.weight-decay 0.1"
    environment = {name: value for name, value in GIVEN.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), GIVEN.get("PYTHONPATH", "")])
    if on_host:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [*map(str, script + paths), *shape.split(), *rates.split(), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def resume(inputs: Path, whole: Path, cut: Path, *flags: str, on_host: bool = False) -> list[dict]:
    """Makes `cut` a run that was killed after step 3 of `whole`, continues it, and returns its lines."""
    from tests.engine.checkpointing.test_resume import interrupt

    interrupt(whole, cut, 3)
    return pretrain(inputs, cut, *flags, on_host=on_host)


def assert_same_course(found: list[dict], wanted: list[dict], *, loss: float, norm: float) -> None:
    """The same data and rates; losses and gradient norms within relative tolerances."""
    assert [line["step"] for line in found] == [line["step"] for line in wanted] == list(range(1, 7))
    for key in ("tokens", "supervised_tokens", "lr"):
        assert [line[key] for line in found] == [line[key] for line in wanted]
    for key, tolerance in (("loss", loss), ("grad_norm", norm)):
        np.testing.assert_allclose([f[key] for f in found], [w[key] for w in wanted], rtol=tolerance)
