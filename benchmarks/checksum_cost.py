"""What checksums cost: a checkpoint read from the page cache with and without them."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import tyro
from common import REPOSITORY  # noqa: F401  (puts the repository on the path)

from data.checksums import sums_of
from engine.checkpointing.store_reader import Scratch, StoreReader
from engine.checkpointing.store_writer import write_store


def main(gigabytes: float = 0.5, rounds: int = 5, folder: Path | None = None) -> None:
    """Print seconds of the median round, with and without checksums in turn, and their ratio.

    Args:
        gigabytes: of the checkpoint.
        rounds: of each.
        folder: where the files go; they are read from the page cache, where a hash costs most beside the reading.
    """
    with TemporaryDirectory(dir=folder) as name:
        store, rows = Path(name) / "state", int(gigabytes * 1e9 / 4 / 8 / 4096)
        whole = torch.randn(rows, 4096)
        specs = [(f"t{number}", whole.shape, whole.dtype, whole.__getitem__) for number in range(8)]
        write_store(store, specs)
        hidden = {sums_of(file): Path(name) / sums_of(file).name for file in store.glob("*.distcp")}

        def read(checked: bool) -> None:
            for beside, away in hidden.items():
                (away if checked else beside).rename(beside if checked else away)
            reader, scratch = StoreReader(store), Scratch()
            for key in reader.keys():  # noqa: SIM118  (no dict)
                reader.read(key, (), scratch)

        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            for checked in (False, True):
                seconds[checked].append(timed(lambda checked=checked: read(checked)))
        with_sums, without = median(seconds[True]), median(seconds[False])
        print(f"read: {with_sums:.3f} s with checksums, {without:.3f} s without: {with_sums / without - 1:+.1%}")


def timed(work: Callable[[], None]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    tyro.cli(main)
