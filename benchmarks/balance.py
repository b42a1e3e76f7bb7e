"""How evenly the attention of a step is dealt over 64 data-parallel ranks, beside dealing packed sequences in turn.

    python benchmarks/balance.py [--steps N] [--ranks N]

Lengths are lognormal, clipped to 8..32,768 tokens, packed into sequences of 32,768. A rank's cost is the sum of squares
of its documents' lengths; each cell is the slowest rank's cost over the mean of all ranks, in the median step and in
the one that 95% of steps do not exceed. "least" is what no dealing can go below, because a packed sequence is never
divided: the heaviest one over the mean, where that is above 1. The aim is 1.05 in 95% of steps.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from data.dealing import deal
from data.documents import Documents
from data.order import GlobalOrder

CAPACITY = 32_768
AIM = 1.05
# lognormal's mu and sigma, and what they are like
LENGTHS = (((6.3, 0.9), "chat"), ((8.5, 1.0), "long reasoning"))
# batch unit, and documents or packed sequences of a step for each kind of lengths
BATCHES = {
    (6.3, 0.9): (("conversations", 65_536), ("sequences", 512), ("sequences", 2_048)),
    (8.5, 1.0): (("conversations", 1_024), ("conversations", 4_096), ("sequences", 256), ("sequences", 1_024)),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measures how even the shares of data-parallel ranks are."""

    steps: int = 40
    ranks: int = 64


class Lengths(Documents):
    """Documents that are nothing but long."""

    def __init__(self, lengths: np.ndarray):
        self.path, self.fingerprint, self.meta, self.lengths = Path("lengths"), "made up", {}, lengths
        self.source_names, self.sources = ["made up"], np.zeros(len(lengths), np.uint16)


def draw(shape: tuple[float, float], documents: int) -> np.ndarray:
    """Lengths, int32 [documents], the same at every call."""
    return np.clip(np.random.default_rng(1).lognormal(*shape, documents), 8, CAPACITY).astype(np.int32)


def measure(shape: tuple[float, float], unit: str, batch: int, options: Options) -> tuple[np.ndarray, float, float]:
    """Returns slowest over mean [steps, (in turn, dealt, least)], packed sequences a rank, ms that dealing takes."""
    documents = batch if unit == "conversations" else round(batch * CAPACITY / draw(shape, 100_000).mean())
    order = GlobalOrder(
        [(Lengths(draw(shape, documents * options.steps)), 1.0)],
        seq_len=CAPACITY,
        global_batch_size=batch,
        batch_unit=unit,
        pad_documents_to=2,
        too_long="error",
        seed=1,
    )
    found, bins, seconds = [], [], []
    for step in range(order.steps_in_epoch(0) - 1):  # the last one may be smaller
        packed = order.batch(0, step)
        work = packed.sums(np.square(order.padded(packed.items), dtype=np.int64))
        began = time.perf_counter()
        shares = deal(work, options.ranks)
        seconds.append(time.perf_counter() - began)
        in_turn = max(work[rank :: options.ranks].sum() for rank in range(options.ranks))
        dealt = max(work[share].sum() for share in shares)
        mean = work.sum() / options.ranks
        found.append((in_turn / mean, dealt / mean, max(work.max() / mean, 1)))
        bins.append(len(packed) / options.ranks)
    return np.array(found), float(np.mean(bins)), float(np.median(seconds)) * 1e3


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    table = Table(title=f"slowest of {options.ranks} ranks over the mean: median, 95% of {options.steps} steps")
    for column in ("lengths", "a step", "each rank", "in turn", "dealt", "least", "within 5%", "could be", "ms"):
        table.add_column(column, justify="left" if column == "lengths" else "right")
    for shape, name in LENGTHS:
        for unit, batch in BATCHES[shape]:
            ratios, bins, milliseconds = measure(shape, unit, batch, options)
            cells = [" ".join(f"{ratio:.3f}" for ratio in np.quantile(column, (0.5, 0.95))) for column in ratios.T]
            within = [f"{np.mean(ratios[:, column] <= AIM):.0%}" for column in (1, 2)]
            step = (f"{batch:,} {unit}", f"{bins:.1f}")
            table.add_row(f"{name} {shape}", *step, *cells, *within, f"{milliseconds:.1f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
