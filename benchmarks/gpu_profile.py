"""Profiles one training step on a GPU: what it costs by kind of work, by kernel, and where the host waits.

    python benchmarks/gpu_profile.py [--model NAME] [--seq-len N] [--backend native|te] [--precision bf16|fp8]

The models are those of `benchmarks/gpu_shapes.py`; `benchmarks/gpu.py` takes weights, data and trainer from here.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # on a bare machine Lathe is not installed

from engine import cuda_setup
from engine.layout import Layout

cuda_setup.apply(Layout(), deterministic=False, dumps=Path(tempfile.gettempdir()) / "collectives_rank_")

import numpy as np
import torch
import tyro
from gpu_shapes import SHAPES, layers_that_fit

# A kernel is of the first kind that has a part of its name.
KINDS: dict[str, tuple[str, ...]] = {
    "attention": ("flash", "fmha", "attention", "cudnn_generated"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "xmma"),
    "optimizer": ("adam", "multi_tensor"),
    "communication": ("nccl",),
    "copies and casts": ("memcpy", "memset", "copy", "cast", "catarray", "transpose", "fill"),
    "norms and reductions": ("norm", "reduce", "softmax"),
    "gathers and scatters": ("index", "gather", "scatter", "embedding"),
    "elementwise": ("elementwise", "triton", "silu", "swiglu"),
    "other": ("",),
}
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Profiles one step of Lathe."""

    model: str = "qwen2.5-1.5b"
    seq_len: int = 32768
    bins: int = 2
    """Microbatches of the step, of one bin each."""
    layers: int | None = None
    """Layers to keep; as many as fit unless given."""
    backend: Literal["native", "te"] = "native"
    precision: Literal["bf16", "fp8"] = "bf16"
    fp8: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    recompute: Literal["none", "selective", "full"] = "none"
    top: int = 15
    """Kernels to name."""
    trace: Path | None = None
    """Where a Chrome trace goes."""


def write_model(folder: Path, shape: dict[str, Any], layers: int) -> Path:
    """Writes a Hugging Face directory with random bf16 weights, drawn on the GPU where there is one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**(shape | {"num_hidden_layers": layers}))
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    return folder


def write_data(folder: Path, vocab_size: int, seq_len: int, tokens: int) -> Path:
    """Writes conversations of lognormal(6.3, 0.9) tokens, at most `seq_len`; the last two thirds are supervised."""
    from data.index import write_index

    random, documents = np.random.default_rng(0), []
    while tokens > 0:
        length = int(np.clip(random.lognormal(6.3, 0.9), 8, seq_len))
        documents.append((random.integers(0, vocab_size, length), np.array([[length // 3, length]])))
        tokens -= length
    write_index(folder, documents, vocab_size=vocab_size)
    return folder


def lathe_trainer(model: Path, data: Path, *, seq_len: int, bins: int, **settings: Any) -> Any:
    """Lathe's trainer on this GPU, ready to step over `bins` bins of `seq_len` tokens at a time."""
    from engine.config import OptimConfig, RunConfig
    from engine.mesh import build_mesh
    from engine.prepare import prepare_run
    from engine.trainer import Trainer

    config = RunConfig(
        model=str(model),
        data=(str(data),),
        output=data.with_name("run"),
        seq_len=seq_len,
        global_batch_size=bins,
        batch_unit="sequences",
        steps=1_000,
        optim=OptimConfig(lr=1e-5, schedule="constant"),
        **settings,
    )
    cuda_setup.switch(deterministic=False)
    return Trainer(prepare_run(config, world_size=1, cuda=torch.cuda.is_available()), build_mesh(config.layout))


def steps_of(data: str, *, seq_len: int, bins: int, steps: int) -> list[list[Any]]:
    """The microbatches of each step, one bin each, as Lathe's loader deals them to its only rank."""
    from data.index import DocumentIndex
    from data.loader import Loader
    from data.order import GlobalOrder

    order = GlobalOrder(
        [(DocumentIndex(data), 1.0)],
        seq_len=seq_len,
        global_batch_size=bins,
        batch_unit="sequences",
        pad_documents_to=2,
        too_long="error",
        seed=1234,
    )
    loader = Loader(order, micro_batch_size=1, dp_rank=0, dp_size=1)
    return [loader.step(0, step) for step in range(steps)]


def matrix_tflops(size: int = 8192, repeats: int = 30) -> float:
    """TFLOP/s of a bf16 product of two random square matrices, the median of `repeats`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(repeats + 3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        left @ right
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[3:]) / 1e12


def kind_of(kernel: str) -> str:
    """The kind of work that a kernel's name tells of."""
    return next(kind for kind, parts in KINDS.items() if any(part in kernel.lower() for part in parts))


def profile_step(trainer: Any, warmup_steps: int = 5) -> tuple[Any, float]:
    """Returns (torch.profiler's averages over one step, its seconds without the profiler)."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(warmup_steps):
        trainer.train_step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    trainer.train_step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        trainer.train_step()
        torch.cuda.synchronize()
    return profiler, seconds


def print_costs(profiler: Any, seconds: float, top: int) -> None:
    """Two tables: milliseconds by kind of work, then the most expensive kernels; and how often the host waits."""
    from rich.console import Console
    from rich.table import Table
    from torch.autograd import DeviceType

    console, averages = Console(width=160), profiler.key_averages()
    kernels = [e for e in averages if e.device_type == DeviceType.CUDA and e.self_device_time_total > 0]
    busy = sum(event.self_device_time_total for event in kernels) / 1e3
    kinds = dict.fromkeys(KINDS, 0.0)
    for event in kernels:
        kinds[kind_of(event.key)] += event.self_device_time_total / 1e3
    table = Table(title=f"one step: {seconds * 1e3:,.1f} ms, kernels {busy:,.1f} ms")
    for column in ("kind", "ms", "of the step"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind, cost in sorted(kinds.items(), key=lambda item: -item[1]):
        table.add_row(kind, f"{cost:,.2f}", f"{cost / seconds / 1e3:.1%}")
    table.add_row("no kernel runs", f"{max(0.0, seconds * 1e3 - busy):,.2f}", f"{max(0, 1 - busy / seconds / 1e3):.1%}")
    console.print(table)
    table = Table(title=f"the {top} most expensive kernels")
    for column in ("kernel", "kind", "calls", "ms", "of the step"):
        table.add_column(column, justify="left" if column in ("kernel", "kind") else "right", overflow="ellipsis")
    for event in sorted(kernels, key=lambda e: -e.self_device_time_total)[:top]:
        cost = event.self_device_time_total / 1e3
        share = f"{cost / seconds / 1e3:.1%}"
        table.add_row(event.key[:90], kind_of(event.key), str(event.count), f"{cost:,.2f}", share)
    console.print(table)
    waits = [f"{event.key} {event.count} times" for event in averages if event.key in WAITS]
    console.print(f"the host waited: {', '.join(waits) or 'never'}")


def main(options: Options) -> int:
    """Builds the model and prints what a step costs; returns the exit status."""
    if not torch.cuda.is_available():
        print("error: no CUDA device is visible, and a profile of one is what this script makes", file=sys.stderr)
        return 2
    shape = SHAPES[options.model]
    memory = torch.cuda.get_device_properties(0).total_memory
    recompute = options.recompute == "full"
    layers = options.layers or layers_that_fit(shape, options.seq_len, memory, recompute=recompute)
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model", shape, layers)
        torch.cuda.empty_cache()
        tokens = 10 * options.bins * options.seq_len
        data = write_data(Path(folder) / "data", shape["vocab_size"], options.seq_len, tokens)
        settings = {"backend": options.backend, "precision": options.precision, "fp8": options.fp8}
        trainer = lathe_trainer(
            model, data, seq_len=options.seq_len, bins=options.bins, recompute=options.recompute, **settings
        )
        print(
            f"{options.model}, {layers} layers, {options.bins} x {options.seq_len:,} tokens, {options.backend} "
            f"{options.precision}, {torch.cuda.get_device_name()}, torch {torch.__version__}"
        )
        profiler, seconds = profile_step(trainer)
    print_costs(profiler, seconds, options.top)
    if options.trace is not None:
        profiler.export_chrome_trace(str(options.trace))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
