"""Time from the start of a training command to its first step, on an index of two million short documents.

    python benchmarks/start_time.py [--documents N] [--ranks 1 2] [--rounds N] [--repositories DIR ...]

Several checkouts take turns. The model is tiny, so that what is left is starting: imports, opening, packing an epoch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import tyro
from rich.console import Console
from rich.table import Table

from engine.run_folder import RunFolder

REPOSITORY = Path(__file__).resolve().parents[1]
FLAGS = "--global-batch-size 64 --seq-len 256 --epochs 1 --precision fp32"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measures how long a run takes to begin."""

    documents: int = 2_000_000
    ranks: tuple[int, ...] = (1, 2)
    rounds: int = 3
    """How often each start is timed; the median counts."""
    repositories: tuple[Path, ...] = (REPOSITORY,)
    """Checkouts whose training script is started."""


def write_input(folder: Path, documents: int) -> None:
    """A two-layer model with random weights, and documents of 20 to 60 tokens."""
    import numpy as np
    from common import MODEL
    from transformers import AutoConfig, AutoModelForCausalLM

    from data.index import IndexWriter

    shape = {**MODEL, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).save_pretrained(folder / "model")
    random, writer = np.random.default_rng(0), IndexWriter(folder / "data", vocab_size=shape["vocab_size"])
    lengths = random.integers(20, 60, documents)
    spans = np.stack((np.full(documents, 5), lengths), axis=1)
    writer.add(random.integers(3, shape["vocab_size"], lengths.sum()), lengths, spans, np.ones(documents, np.int64))
    writer.close({})


def start(repository: Path, folder: Path, ranks: int, unit: str) -> float:
    """Seconds until the first line of metrics.jsonl."""
    output = Path(tempfile.mkdtemp(dir=folder)) / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    paths = ["--model", folder / "model", "--data", folder / "data", "--output", output, "--batch-unit", unit]
    command = [*torchrun, repository / "examples" / "pretrain_sft.py", *paths, *FLAGS.split()]
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "wb") as log:
        began = time.perf_counter()
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log)
        metrics = RunFolder(output).metrics
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                raise RuntimeError((folder / "log").read_text())
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        # torchrun gives its processes sessions of their own: none of them ends with it when it is killed.
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        process.wait()
    return seconds


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    table = Table("checkout", "ranks", "batch unit", "seconds", title=f"{options.documents:,} documents")
    with tempfile.TemporaryDirectory() as name:
        write_input(Path(name), options.documents)
        for ranks in options.ranks:
            for unit in ("conversations", "sequences"):
                seconds: dict[Path, list[float]] = {repository: [] for repository in options.repositories}
                for _ in range(options.rounds):
                    for repository, found in seconds.items():
                        found.append(start(repository, Path(name), ranks, unit))
                for repository, found in seconds.items():
                    table.add_row(str(repository), str(ranks), unit, f"{median(found):.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
