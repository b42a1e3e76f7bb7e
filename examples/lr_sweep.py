"""Trains the same run at several learning rates, one after the other, and compares them.

python examples/lr_sweep.py --lrs 1e-5,2e-5,3e-5,5e-5 --output SWEEP [--nproc-per-node N] -- \
    [recipe.yaml ...] --model HF --data DATA --steps 300 [any flag of pretrain_sft.py]

The runs are SWEEP/lr_1e-05 and so on; started again, the sweep continues. Without flags after `--` it only compares
runs that are there, such as those of several jobs. A rate at which training fails is a result like the others.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from engine.metrics import read_metrics

SCRIPT = Path(__file__).with_name("pretrain_sft.py")
LAST = 0.1  # the share of steps, at the end, over which the training loss is taken


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compares learning rates."""

    lrs: str
    """Learning rates, separated by commas."""
    output: Path
    """Where the runs go, each in a directory of its own."""
    nproc_per_node: int = 1
    """Processes of each run."""

    @property
    def rates(self) -> list[float]:
        """The rates in order; ValueError for what is none."""
        try:
            rates = [float(part) for part in self.lrs.split(",")]
        except ValueError:
            rates = []
        if not rates or not all(0 < rate < math.inf for rate in rates):
            raise ValueError(f"--lrs {self.lrs}: give rates above 0, separated by commas, e.g. 1e-5,2e-5")
        if len(set(rates)) != len(rates):
            raise ValueError(f"--lrs {self.lrs}: a rate is named twice")
        return rates

    def run(self, rate: float) -> Path:
        return self.output / f"lr_{rate:g}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one rate; None where there is no such number."""

    lr: float
    steps: int
    loss: float | None  # the mean over the last tenth of the steps
    valid_loss: float | None  # the last one
    largest_norm: float | None
    failed: bool


def train(options: Options, rate: float, flags: list[str]) -> bool:
    """Trains at one rate; returns whether that failed. ValueError where it failed before the first step."""
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", str(options.nproc_per_node)]
    launch = [sys.executable, *(ranks if options.nproc_per_node > 1 else []), str(SCRIPT)]
    own = ["--output", str(options.run(rate)), "--optim.lr", repr(rate)]
    status = subprocess.run([*launch, *flags, *own]).returncode
    if status and not (options.run(rate) / "metrics.jsonl").exists():
        raise ValueError(f"--optim.lr {rate:g} did not come to its first step (status {status}); see above")
    return status != 0


def result(run: Path, rate: float, failed: bool) -> Result:
    """What a run's metrics say; ValueError where there are none."""
    path = run / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{path} is missing: train that rate first, by giving the run's flags after --")
    lines = read_metrics(path)
    losses = [line["loss"] for line in lines[-max(1, round(LAST * len(lines))) :] if line["loss"] is not None]
    held_out = [line["valid_loss"] for line in lines if line.get("valid_loss") is not None]
    return Result(
        lr=rate,
        steps=len(lines),
        loss=sum(losses) / len(losses) if losses else None,
        valid_loss=held_out[-1] if held_out else None,
        largest_norm=max((line["grad_norm"] for line in lines), default=None),
        failed=failed,
    )


def best(results: list[Result]) -> Result | None:
    """The lowest held-out loss, or training loss where not all have one, among those that came as far as any."""
    longest = max(one.steps for one in results)
    whole = [one for one in results if not one.failed and one.steps == longest and one.loss is not None]
    by_valid = all(one.valid_loss is not None for one in whole)
    return min(whole, key=lambda one: (one.valid_loss if by_valid else one.loss) or 0.0, default=None)


def report(results: list[Result], console: Console) -> None:
    """Prints a line a rate, and which was best."""
    table = Table(title="learning rates")
    for column in ("lr", "steps", f"loss (last {LAST:.0%})", "held-out loss", "largest norm", ""):
        table.add_column(column, justify="right")
    chosen = best(results)
    for one in results:
        numbers = [f"{n:.4f}" if n is not None else "-" for n in (one.loss, one.valid_loss, one.largest_norm)]
        table.add_row(f"{one.lr:g}", str(one.steps), *numbers, "failed" if one.failed else "best" * (one is chosen))
    console.print(table)


def main(arguments: list[str], console: Console | None = None) -> int:
    """Trains what is asked for and compares; returns the exit status."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    own, flags = arguments[:cut], arguments[cut + 1 :]
    try:
        options = tyro.cli(Options, args=own, description=__doc__)
        failed = {rate: bool(flags) and train(options, rate, flags) for rate in options.rates}
        results = [result(options.run(rate), rate, failed[rate]) for rate in options.rates]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (options.output / "sweep.json").write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n")
    report(results, console or Console())
    return 0 if best(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
