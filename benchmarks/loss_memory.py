"""Memory of the loss head beside plain cross entropy over whole logits, forward and backward.

    python benchmarks/loss_memory.py [--tokens N] [--hidden-size N] [--vocab-size N]

"above" is the process's highest resident memory during the two passes, less what was resident before them
(the inputs) and less the gradients of weight and hidden states, as the passes return them.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from common import in_fresh_process, load
from rich.console import Console
from rich.table import Table

from models.layers.loss import loss_sum

TARGET_MB = 300
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measures the loss head's memory."""

    tokens: int = 4096
    hidden_size: int = 1024
    vocab_size: int = 200_000
    threads: int = 2


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One head's memory in bytes, time and loss a token."""

    inputs: int
    gradients: int
    peak: int  # above what was resident before the passes
    seconds: float
    loss: float


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM the highest since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Makes VmHWM start again from VmRSS (proc(5): writing 5 to clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def whole_logits(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What models without a loss head of their own do, in fp32 like transformers."""
    return F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum")


def measure(head: str, dtype_name: str, options: Options) -> Reading:
    """Forward and backward of one head in this process."""
    dtype = getattr(torch, dtype_name)
    small = torch.randn(64, 32, dtype=dtype, requires_grad=True)
    (small @ small.t()).sum().backward()  # torch's own buffers and threads, before anything is counted
    torch.manual_seed(0)
    hidden = torch.randn(options.tokens, options.hidden_size).to(dtype).requires_grad_()
    weight = torch.empty(options.vocab_size, options.hidden_size, dtype=dtype)
    for rows in weight.split(4096):
        rows.copy_(torch.randn(rows.shape) * 0.02)
    weight.requires_grad_()
    labels = torch.randint(options.vocab_size, (options.tokens,))
    inputs = sum(tensor.nbytes for tensor in (hidden, weight, labels))
    reset_peak()
    before, start = resident("VmRSS"), time.perf_counter()
    if head == "models.layers.loss":
        total = loss_sum(hidden, weight, labels, vocab_size=options.vocab_size)
    else:
        total = whole_logits(hidden, weight, labels)
    total.backward()
    assert hidden.grad is not None and weight.grad is not None
    return Reading(
        inputs=inputs,
        gradients=hidden.grad.nbytes + weight.grad.nbytes,
        peak=resident("VmHWM") - before,
        seconds=time.perf_counter() - start,
        loss=total.item() / options.tokens,
    )


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    title = f"{options.tokens:,} tokens, hidden {options.hidden_size:,}, vocabulary {options.vocab_size:,}"
    table = Table(title=f"{title}, load {load()}")
    for column in ("", "inputs MB", "gradients MB", "peak MB", "above MB", f"within {TARGET_MB}", "seconds", "loss"):
        table.add_column(column, justify="right" if column else "left")
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16"):
            for head in ("models.layers.loss", "whole logits"):
                log = Path(folder, "log")
                reading = in_fresh_process(measure, head, dtype, options, threads=options.threads, log=log)
                above = (reading.peak - reading.gradients) / MB
                sizes = (reading.inputs, reading.gradients, reading.peak)
                table.add_row(
                    f"{head}, {dtype}",
                    *(f"{size / MB:,.0f}" for size in sizes),
                    f"{above:,.0f}",
                    "yes" if above <= TARGET_MB else "no",
                    f"{reading.seconds:.1f}",
                    f"{reading.loss:.4f}",
                )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
