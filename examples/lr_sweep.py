"""Trains the same run at several learning rates, one after the other, and compares them.

python examples/lr_sweep.py --lrs 1e-5,2e-5,3e-5,5e-5 --output SWEEP [--nproc-per-node N] -- \
    [recipe.yaml ...] --model HF --data DATA --steps 300 [any flag of pretrain_sft.py]

The runs are SWEEP/lr_1e-05 and so on; started again, the sweep continues. A rate at which the loss or a gradient stops
being finite is a result like the others, and is not tried again. Without flags after `--` the sweep only compares what
is there: several nodes train a rate each as a job of its own, with `--optim.lr 2e-5 --output SWEEP/lr_2e-05`.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from engine.changes import read_config
from engine.check_values import check_values
from engine.config import RunConfig
from engine.reporting.metrics import read_metrics
from engine.run_folder import FAILED, RunFolder, replace_text
from engine.signals import SIGNALS
from examples.demo.builtin import parse_over_demo
from examples.made_of import differences
from examples.sweep_settings import longer, made_of, own_length

SCRIPT = Path(__file__).with_name("pretrain_sft.py")
HEARD = (*SIGNALS, signal.SIGHUP)  # what ends a run after a save, and the end of a terminal
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
        if len(set(map(self.run, rates))) != len(rates):
            raise ValueError(f"--lrs {self.lrs}: a rate is named twice (six digits tell them apart)")
        if self.nproc_per_node < 1:
            raise ValueError(f"--nproc-per-node {self.nproc_per_node}: give at least 1")
        return rates

    def run(self, rate: float) -> Path:
        return self.output / f"lr_{rate:g}"

    def made_of(self, rate: float) -> Path:
        """Where it stands what the run of a rate was made of."""
        return self.output / f"lr_{rate:g}.json"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one rate; None where there is no such number."""

    lr: float
    steps: int
    loss: float | None  # the mean over the last tenth of the steps
    valid_loss: float | None  # the last one
    largest_norm: float | None
    state: str  # "done", "failed", "unfinished" or "missing"


def train(options: Options, rate: float, flags: list[str]) -> None:
    """Trains at one rate; ValueError where that ended without a result."""
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", str(options.nproc_per_node)]
    launch = [sys.executable, *(ranks if options.nproc_per_node > 1 else []), str(SCRIPT)]
    status = run_to_the_end([*launch, *flags, "--output", str(options.run(rate)), "--optim.lr", repr(rate)])
    if status and result(options, rate).state != "failed":
        raise ValueError(f"the run of --optim.lr {rate:g} ended with status {status}; see above")


def run_to_the_end(command: list[str]) -> int:
    """A command's exit status. What would end this process is passed on, and ends it after the command."""
    received: list[int] = []
    process: subprocess.Popen | None = None

    def pass_on(number: int, _) -> None:
        received.append(number)
        if process is not None:
            process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    heard = [number for number in HEARD if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in heard}
    try:
        process = subprocess.Popen(command, start_new_session=True)  # else a terminal would interrupt it, too
        if received:
            process.terminate()
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise KeyboardInterrupt
    return status


def result(options: Options, rate: float) -> Result:
    """How the run of a rate stands, and what its metrics say."""
    run = RunFolder(options.run(rate))
    why = run.why_unfinished()
    lines = read_metrics(run.metrics)
    losses = [line["loss"] for line in lines[-max(1, round(LAST * len(lines))) :] if line["loss"] is not None]
    held_out = [line["valid_loss"] for line in lines if line.get("valid_loss") is not None]
    state = "done" if lines else "missing"
    if why:
        state = "failed" if why.startswith(FAILED) else "unfinished"
    return Result(
        lr=rate,
        steps=len(lines),
        loss=sum(losses) / len(losses) if losses else None,
        valid_loss=held_out[-1] if held_out else None,
        largest_norm=max((line["grad_norm"] for line in lines), default=None),
        state=state,
    )


def best(results: list[Result], made: Sequence[dict[str, Any]] = ()) -> Result | str:
    """The lowest held-out loss, or training loss where one is missing; or why there is none.

    made: what the runs were made of, which must be the same.
    """
    if waiting := [f"{one.lr:g}" for one in results if one.state in ("unfinished", "missing")]:
        return f"no rate is the best yet: {', '.join(waiting)} still to be trained to the end"
    done = [one for one in results if one.state == "done"]
    if len({one.steps for one in done}) > 1:
        return "no rate is the best: the runs differ in their steps"
    if others := [found for one in made[1:] if (found := differences(made[0], one))]:
        return f"no rate is the best: the runs differ in more than their rates ({'; '.join(others[0])})"
    for name in ("valid_loss", "loss"):
        losses = [getattr(one, name) for one in done]
        if done and None not in losses:
            return done[losses.index(min(losses))]
    return "no rate is the best: no run has a loss" if done else "no rate is the best: training failed at all of them"


def report(results: list[Result], chosen: Result | str, console: Console) -> None:
    """Prints a line a rate, and which was best or why none is."""
    table = Table(title="learning rates")
    for column in ("lr", "steps", f"loss (last {LAST:.0%})", "held-out loss", "largest norm", ""):
        table.add_column(column, justify="right")
    for one in results:
        numbers = [f"{n:.4f}" if n is not None else "-" for n in (one.loss, one.valid_loss, one.largest_norm)]
        table.add_row(f"{one.lr:g}", str(one.steps), *numbers, "best" if one is chosen else one.state)
    console.print(table)
    if isinstance(chosen, str):
        console.print(chosen)


def made_of_before(options: Options, rate: float) -> dict[str, Any] | None:
    """What the run of a rate that was begun was made of; None where there is none."""
    run, path = RunFolder(options.run(rate)), options.made_of(rate)
    if not run.metrics.exists():
        return None
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    # Trained as a job of its own.
    return json.loads(json.dumps(made_of(read_config(run.config)))) if run.config.exists() else None


def refuse_others(options: Options, now: dict[str, Any]) -> None:
    """ValueError where a run that is there was made of something else than this sweep."""
    for rate in options.rates:
        before = made_of_before(options, rate)
        if before is not None and (found := differences(before, now)):
            decays = any(one.startswith(("steps:", "epochs:")) for one in found)
            raise ValueError(
                f"--output {options.output}: {options.run(rate).name} was trained with other settings "
                f"({'; '.join(found)}); give another --output, or the settings of before"
                f"{', since rates that decayed over one length do not go on to another' if decays else ''}"
            )


def goes_on(options: Options, done: Result, config: RunConfig) -> bool:
    """Whether the run of a rate that is done was asked for a shorter length than now."""
    run = RunFolder(options.run(done.lr))
    reached = config.steps is not None and done.steps >= config.steps
    return not reached and run.config.exists() and longer(config, read_config(run.config))


def sweep(options: Options, flags: list[str]) -> list[Result]:
    """Trains at every rate that is not done, where there are flags; returns what came of each."""
    if not flags:
        return [result(options, rate) for rate in options.rates]
    config, lines = own_length(parse_over_demo([*flags, "--output", str(options.output)]), flags)
    for rate in options.rates:
        check_values(replace(config, optim=replace(config.optim, lr=rate)))
    content = json.loads(json.dumps(made_of(config)))
    refuse_others(options, content)
    print("\n".join(lines), end="\n" * bool(lines), flush=True)
    optim = config.optim
    lengths = ["--optim.warmup-steps", str(optim.warmup_steps), "--optim.decay-steps", str(optim.decay_steps)]
    for rate in options.rates:
        before = result(options, rate)
        if before.state == "failed":
            why = RunFolder(options.run(rate)).why_unfinished()
            print(f"--optim.lr {rate:g} is not tried again, having {why}", flush=True)
        elif before.state != "done" or goes_on(options, before, config):
            options.output.mkdir(parents=True, exist_ok=True)
            replace_text(options.made_of(rate), json.dumps(content, indent=1) + "\n")
            train(options, rate, [*flags, *(lengths if lines else [])])
            if result(options, rate).state == "unfinished":  # near a time limit, which the others would meet, too
                break
    return [result(options, rate) for rate in options.rates]


def main(arguments: list[str], console: Console | None = None) -> int:
    """Trains what is asked for and compares; returns the exit status."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    own, flags = arguments[:cut], arguments[cut + 1 :]
    try:
        options = tyro.cli(Options, args=own, description=__doc__)
        results = sweep(options, flags)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return 130
    made = {f"{rate:g}": made_of_before(options, rate) for rate in options.rates}
    if any(one.steps for one in results):
        lines = [asdict(one) | {"made_of": made[f"{one.lr:g}"]} for one in results]
        replace_text(options.output / "sweep.json", json.dumps(lines, indent=1) + "\n")
    chosen = best(results, [one for one in made.values() if one is not None])
    report(results, chosen, console or Console())
    return 0 if isinstance(chosen, Result) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
