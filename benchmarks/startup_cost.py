"""Processor time until a script answers `--help`, a mistyped flag, or (training) a layout that makes no grid.

    python benchmarks/startup_cost.py [--rounds N] [--repository DIR]

The mean of the rounds in seconds, user and system together, of a fresh process. The target is 1 s for the first two.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

TARGET = 1.0
EXAMPLES = ("pretrain_sft", "prepare_data", "evaluate", "lr_sweep", "plan_run", "rehearsal_model")
TOOLS = ("hf_to_mcore", "mcore_to_hf", "average_steps", "inspect_checkpoint")
REFUSED = {
    "examples/pretrain_sft.py": ["--tp", "3", "--cp", "2"],
    "examples/plan_run.py": ["--ranks", "4", "--tp", "3"],
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measures what it costs to be refused."""

    rounds: int = 3
    """How often each command is run."""
    repository: Path = Path(__file__).resolve().parents[1]
    """The checkout whose scripts are run."""


def processor_seconds(command: list[str], repository: Path) -> float:
    """User and system time of a command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    """Prints a line a script; the exit status is 1 where one takes longer than the target."""
    options = tyro.cli(Options, description=__doc__)
    table = Table()
    for column in ("script", "--help", "mistyped flag", "refused layout"):
        table.add_column(column, justify="right" if column != "script" else "left")
    slow = False
    scripts = [f"examples/{name}.py" for name in EXAMPLES] + [f"checkpoint_tools/{name}.py" for name in TOOLS]
    for script in scripts:
        cells = []
        for flags in (["--help"], ["--mistyped", "3"], REFUSED.get(script)):
            if flags is None:
                cells.append("")
                continue
            command = [sys.executable, str(options.repository / script), *flags]
            seconds = [processor_seconds(command, options.repository) for _ in range(options.rounds)]
            mean = sum(seconds) / len(seconds)
            slow = slow or mean >= TARGET
            cells.append(f"{mean:.2f}")
        table.add_row(script, *cells)
    Console(width=100).print(table)
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
