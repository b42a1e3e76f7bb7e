"""What guards cost: the calls that a step makes, beside the step's own time in a run's metrics."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import tyro
from common import REPOSITORY  # noqa: F401  (puts the repository on the path)

from engine.guards.spikes import Spikes
from engine.guards.watchdog import STEP, Watchdog
from engine.reporting.metrics import read_metrics
from engine.run_folder import RunFolder


def main(run: Path | None = None, calls: int = 10_000) -> None:
    """Print microseconds of each guard, and their share of a step where a run is given.

    Args:
        run: a finished run; its median step counts.
        calls: of each guard; the watchdog's thread runs beside them.
    """
    with TemporaryDirectory() as name, Watchdog(RunFolder(Path(name)), 0, patience=10, minutes=10) as watchdog:
        spikes = Spikes(2.0, [1.0] * 50)
        entering = microseconds(lambda: watchdog.enter(STEP, 1), calls)
        judging = microseconds(lambda: spikes.times_median(1.0), calls)
    print(f"watchdog {entering:.1f} us, spikes {judging:.1f} us a step")
    if run is not None:
        step = median(line["seconds"] for line in read_metrics(RunFolder(run).metrics)) * 1e6
        print(f"of a step of {step / 1e3:,.1f} ms: {(entering + judging) / step:.4%}")


def microseconds(work: Callable[[], object], calls: int) -> float:
    """Of one call, the mean of many."""
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls * 1e6


if __name__ == "__main__":
    tyro.cli(main)
