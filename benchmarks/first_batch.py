"""How soon, and in how much memory, an index of 14 million documents gives its first batch.

    python benchmarks/first_batch.py [--documents N] [--rounds N] [--folder DIR]

Lengths are lognormal(6.3, 0.9), clipped to 8..32,768 tokens, from three sources. The tokens are a file without
content, so that only the index takes room on the disk (about 0.5 GB). Each case runs in a process of its own. Seconds
count from before numpy is imported; "processor" is the same in processor time, which other programs on the machine
disturb less; "memory" is the process's peak, mapped pages included. The cases: a prepared directory with either batch
unit, the same cut at 2,048 tokens, and its token files as a PREFIX.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
SECONDS, MEMORY = 5.0, 1024  # what is aimed at, at 14 million documents; MB
# what is opened, batch unit, global batch size, --seq-len, --too-long
CASES = (
    ("data", "conversations", 1024, 32_768, "error"),
    ("data", "sequences", 256, 32_768, "error"),
    ("data", "sequences", 256, 2_048, "cut"),
    ("prefix/tokens", "sequences", 256, 32_768, "error"),
)
FIRST_BATCH = """
import json, resource, sys, time
began = time.perf_counter()
path, unit, batch, seq_len, too_long = json.loads(sys.argv[1])
from data.index import open_index
from data.loader import Loader
from data.order import GlobalOrder
index = open_index(path)
opened = time.perf_counter() - began
settings = dict(seq_len=seq_len, global_batch_size=batch, batch_unit=unit, too_long=too_long)
order = GlobalOrder([(index, 1.0)], **settings, pad_documents_to=2, seed=1)
loader = Loader(order, micro_batch_size=1, dp_rank=0, dp_size=64)
microbatches = loader.step(0, 0)
seconds = time.perf_counter() - began
assert microbatches[0].real_tokens and (microbatches[0].document_sources >= 0).any()
print(json.dumps([opened, seconds, time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measures the way to the first batch."""

    documents: int = 14_000_000
    rounds: int = 3
    """How often each case runs; the medians count."""
    folder: Path | None = None
    """Where the index is written; a temporary directory unless given."""


def write_data(folder: Path, documents: int) -> None:
    """A data directory of so many documents, the last quarter of each supervised."""
    from data.token_files import write_idx

    folder.mkdir()
    random = np.random.default_rng(1)
    lengths = np.clip(random.lognormal(6.3, 0.9, documents), 8, 32_768).astype(np.int32)
    write_idx(folder / "tokens.idx", np.dtype(np.int32), lengths)
    with open(folder / "tokens.bin", "wb") as file:
        file.truncate(4 * int(lengths.sum(dtype=np.int64)))
    np.save(folder / "spans.npy", np.stack((lengths - lengths // 4, lengths), axis=1))
    np.save(folder / "spans_offsets.npy", np.arange(documents + 1))
    np.save(folder / "sources.npy", random.integers(0, 3, documents, dtype=np.uint16))
    np.save(folder / "kinds.npy", np.zeros(documents, np.uint8))
    sources = [{"name": name} for name in ("cot", "tir", "genselect")]
    meta = {"fingerprint": "made up", "sources": sources, "kinds": ["messages"], "vocab_size": 150_000}
    (folder / "meta.json").write_text(json.dumps(meta))


def measure(folder: Path, case: tuple) -> list[float]:
    """Returns seconds to open, seconds to the first batch, these by the processor, and MB, of a fresh process."""
    argument = json.dumps([str(folder / case[0]), *case[1:]])
    command = [sys.executable, "-c", FIRST_BATCH, argument]
    return json.loads(subprocess.run(command, check=True, capture_output=True, cwd=REPOSITORY).stdout)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    table = Table(title=f"first batch of {options.documents:,} documents, median of {options.rounds}")
    for column in (
        "data",
        "batch",
        "seq len",
        "too long",
        "opened s",
        "first batch s",
        "processor s",
        "memory MB",
        "reached",
    ):
        table.add_column(column, justify="left" if column == "data" else "right")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        write_data(Path(name) / "data", options.documents)
        (Path(name) / "prefix").mkdir()
        for file in ("tokens.bin", "tokens.idx"):
            (Path(name) / "prefix" / file).hardlink_to(Path(name) / "data" / file)
        for case in CASES:
            found = [measure(Path(name), case) for _ in range(options.rounds)]
            opened, seconds, processor, memory = np.median(found, axis=0)
            path, unit, batch, seq_len, too_long = case
            kind = "directory" if path == "data" else "PREFIX"
            good = "yes" if seconds < SECONDS and memory < MEMORY else "no"
            numbers = (f"{opened:.2f}", f"{seconds:.2f}", f"{processor:.2f}", f"{memory:,.0f}", good)
            table.add_row(kind, f"{batch:,} {unit}", f"{seq_len:,}", too_long, *numbers)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
