"""What the data loader costs of a training step of the 30 M model.

    python benchmarks/loader_share.py [--source FILE.jsonl] [--steps N] [--precision fp32|bf16]

"making" is the loader's own work for a step's microbatches, done in a thread while the step before trains;
"waiting" is how long the loop stands still for them.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from common import GSM8K, in_fresh_process, lathe_trainer, load, make_equal_data, make_model, make_real_data
from rich.console import Console
from rich.table import Table

TARGET = 0.01


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measures the loader's share of a step."""

    source: Path | None = GSM8K if GSM8K.exists() else None
    """JSONL with question and answer for the real lengths; without it they are generated."""
    steps: int = 10
    """Measured steps, of which the medians count."""
    precision: Literal["fp32", "bf16"] = "bf16"
    batch: int = 16
    """Conversations a step."""
    seq_len: int = 1024
    threads: int = 2


def measure(options: Options, model: Path, data: Path) -> tuple[float, float, float]:
    """Returns the medians of (making, waiting, step), in seconds."""
    trainer = lathe_trainer(
        model, data, seq_len=options.seq_len, batch=options.batch, precision=options.precision, lr=1e-4
    )
    loader, next_step = trainer.loader, trainer.loader.next_step
    waited, steps, made = [], [], []

    def timed_next_step() -> list:
        start = time.perf_counter()
        microbatches = next_step()
        waited.append(time.perf_counter() - start)
        return microbatches

    loader.next_step = timed_next_step  # type: ignore[method-assign]
    for _ in range(options.steps + 2):
        start = time.perf_counter()
        trainer.train_step()
        steps.append(time.perf_counter() - start)
    for number in range(options.steps):
        start = time.perf_counter()
        loader.step(0, number)
        made.append(time.perf_counter() - start)
    warm = slice(2, None)
    return float(np.median(made)), float(np.median(waited[warm])), float(np.median(steps[warm]))


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    table = Table(title=f"{options.precision}, {options.batch} conversations a step, load {load()}")
    for column in ("", "making ms", "waiting ms", "step ms", "making / step", f"under {TARGET:.0%}"):
        table.add_column(column, justify="right" if column else "left")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = make_model(work / "model", options.source)
        kinds = {
            "equal lengths": make_equal_data(work / "equal"),
            "real lengths": make_real_data(work / "real", model, options.source),
        }
        for name, data in kinds.items():
            arguments = (measure, options, model, data)
            made, waited, step = in_fresh_process(*arguments, threads=options.threads, log=work / "log")
            numbers = (f"{made * 1e3:.2f}", f"{waited * 1e3:.2f}", f"{step * 1e3:,.0f}")
            table.add_row(name, *numbers, f"{made / step:.2%}", "yes" if made < TARGET * step else "no")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
