"""Prints kernels and bytes of a token's way through a model, by kind of work, and its time reckoned from them.

    python benchmarks/kernels.py [--models NAME ...] [--tokens N] [--parts]

Nothing runs: `benchmarks/kernel_counts.py` counts on the meta device what CUDA would launch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # on a bare machine Lathe is not installed

import tyro
from gpu_shapes import SHAPES, widths
from kernel_counts import KINDS, Counts, Tally, Work, count, describe_shape, sum_of
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Options:
    """Counts kernels and bytes, and reckons the time of a token."""

    models: tuple[str, ...] = tuple(SHAPES)
    tokens: int = 16384
    """Tokens of a microbatch."""
    document: float = 1836
    """Mean length of a token's document: that of lognormal(6.3, 0.9) lengths, which the GPU benchmarks train on."""
    parts: bool = False
    """Count fused functions operation by operation, as they run without being compiled."""
    products: float = 700
    """TFLOP/s of a bf16 matrix product."""
    attention: float = 350
    """TFLOP/s of the attention kernel, forward and backward."""
    bandwidth: float = 2.6
    """TB/s of memory."""
    peak: float = 989
    """TFLOP/s of which the share is printed."""


def attention_operations(name: str, document: float) -> float:
    """Operations of the attention kernels of all layers for a token: two products forward, five backward."""
    shape = SHAPES[name]
    _, queries, _ = widths(shape)
    layers, windowed = shape["num_hidden_layers"], 0
    keys = document / 2  # that a token sees on average
    if "sliding_window" in shape:
        windowed = layers // 2  # every other layer
    seen = (layers - windowed) * keys + windowed * min(keys, shape.get("sliding_window", keys))
    return 7 * 2 * queries * seen


def reckon(name: str, counts: Counts, options: Options) -> float:
    """Microseconds of a token on one device, without the optimizer, communication and gaps between kernels.

    A kind of work takes as long as its operations or its bytes, whichever are slower; attention its operations.
    """
    layers = SHAPES[name]["num_hidden_layers"]
    seconds = options.tokens * attention_operations(name, options.document) / (options.attention * 1e12)
    for tally, times in ((counts.layer, layers), (counts.rest, 1)):
        for kind, work in tally.items():
            if kind != "attention":
                by_operations = work.operations / (options.products * 1e12)
                seconds += times * max(by_operations, work.bytes / (options.bandwidth * 1e12))
    return seconds / options.tokens * 1e6


def share_of_peak(name: str, microseconds: float, options: Options) -> float:
    """The model's own operations, as in a run's metrics, over what the device's data sheet has."""
    from engine.reporting.flops import step_flops

    shape = SHAPES[name]
    windowed = None
    if "sliding_window" in shape:
        windowed = int(2 * options.tokens * min(options.document / 2, shape["sliding_window"]))
    description = describe_shape(name, shape["num_hidden_layers"])
    operations = step_flops(description, options.tokens, int(options.tokens * options.document), windowed)
    return operations / options.tokens / (microseconds * options.peak * 1e6)


def rows(counts: dict[str, Counts], options: Options) -> Iterator[list[str]]:
    """The lines of the table; an empty one is a rule."""

    def works(tallies: list[Tally], kind: str) -> list[str]:
        found = [tally.get(kind, Work()) for tally in tallies]
        return [f"{work.kernels:,.0f}  {work.bytes / options.tokens / 1e3:7,.1f}" for work in found]

    for title, tallies in (
        ("", [one.layer for one in counts.values()]),
        ("beside layers: ", [one.rest for one in counts.values()]),
    ):
        for kind in KINDS:
            if any(kind in tally for tally in tallies):
                yield [title + kind, *works(tallies, kind)]
        totals = [{"all": sum_of(tally)} for tally in tallies]
        yield [title + "all", *works(totals, "all")]
        yield []
    times = {name: reckon(name, one, options) for name, one in counts.items()}
    yield ["reckoned microseconds a token", *(f"{time:,.1f}" for time in times.values())]
    yield ["reckoned tokens/s", *(f"{1e6 / time:,.0f}" for time in times.values())]
    yield ["share of peak", *(f"{share_of_peak(name, time, options):.0%}" for name, time in times.items())]


def main() -> None:
    from engine.quiet import silence_libraries

    options = tyro.cli(Options, description=__doc__)
    silence_libraries()
    counts = {name: count(name, options.tokens, parts=options.parts) for name in options.models}
    title = "Kernels, and kB a token, of one layer forward and backward; reckoned, never measured"
    table = Table("", *counts, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows(counts, options):
        if row:
            table.add_row(*row)
        else:
            table.add_section()
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
