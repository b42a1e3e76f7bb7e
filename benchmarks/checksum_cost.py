"""What checksums cost a load: a checkpoint read into a model's memory with and without them, from disk and from the
page cache.

python benchmarks/checksum_cost.py [--gigabytes 2] [--rounds 5]
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import tyro
from common import REPOSITORY  # noqa: F401  (puts the repository on the path)

from data.checksums import sums_of
from engine.checkpointing.store_reader import StoreReader
from engine.checkpointing.store_writer import write_store

TENSORS = 8


def main(gigabytes: float = 2.0, rounds: int = 5, folder: Path | None = None) -> None:
    """Print seconds of the median round, with and without checksums in turn, and their ratio.

    Args:
        gigabytes: of the checkpoint.
        rounds: of each.
        folder: where the files go.
    """
    with TemporaryDirectory(dir=folder) as name:
        store, rows = Path(name) / "state", int(gigabytes * 1e9 / 4 / TENSORS / 4096)
        whole = torch.randn(rows, 4096)
        write_store(store, [(f"t{number}", whole.shape, whole.dtype, whole.__getitem__) for number in range(TENSORS)])
        files = sorted(store.glob("*.distcp"))
        hidden = {sums_of(file): Path(name) / sums_of(file).name for file in files}
        targets = {f"t{number}": torch.zeros_like(whole) for number in range(TENSORS)}

        def load() -> None:
            reader = StoreReader(store)
            for key, target in targets.items():
                reader.read_into(key, (0, 0), target)

        for place, prepare in (("disk", forget), ("the page cache", lambda _: None)):
            seconds: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(rounds):
                for checked in (False, True):
                    for beside, away in hidden.items():
                        if beside.exists() is not checked:
                            (away if checked else beside).rename(beside if checked else away)
                    prepare(files)
                    seconds[checked].append(timed(load))
            with_sums, without = median(seconds[True]), median(seconds[False])
            print(
                f"from {place}: {with_sums:.3f} s with checksums, {without:.3f} s without "
                f"({gigabytes / without:.1f} GB/s): {with_sums / without - 1:+.1%}"
            )


def forget(files: list[Path]) -> None:
    """Have the kernel drop its copies of files, so that they are read from disk."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(work: Callable[[], None]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    tyro.cli(main)
