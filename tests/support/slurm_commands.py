"""Stand-ins of SLURM's commands: what they were called with is written down, and jobs are lines of text."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path

_COMMAND = """#!/bin/bash
printf '%s\\0' "$(basename "$0")" "$@" >> "{folder}/calls"
printf '\\n' >> "{folder}/calls"
"""
_SBATCH = """
[ -e "{folder}/refuse" ] && [ "$(cat "{folder}/refuse")" = "$(wc -l < "{folder}/queue")" ] && {{
    echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1; }}
number=$((101 + $(wc -l < "{folder}/queue")))
echo "$number|N/A|PENDING|Dependency|0:00|1:00:00|" >> "{folder}/queue"
echo "$number;cluster"
"""
_SQUEUE = 'cat "{folder}/queue"\n'
_SCANCEL = '[ "$1" != --signal=TERM ] || [ ! -e "{folder}/deaf" ]\n'
_SACCT = '[ -e "{folder}/accounts" ] && cat "{folder}/accounts"\n'


class SlurmCommands:
    """The commands, and what they were told."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        for name, body in {"sbatch": _SBATCH, "squeue": _SQUEUE, "scancel": _SCANCEL, "sacct": _SACCT}.items():
            path = folder / name
            path.write_text((_COMMAND + body).format(folder=folder), encoding="utf-8")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        self.set_queue([])

    def put_on_path(self, monkeypatch) -> None:
        """Lets this process and its children find them first."""
        monkeypatch.setenv("PATH", f"{self.folder}{os.pathsep}{os.environ['PATH']}")

    def calls(self, command: str) -> list[list[str]]:
        """The arguments of each call of a command, the oldest first."""
        path = self.folder / "calls"
        lines = path.read_text(encoding="utf-8").split("\0\n") if path.exists() else []
        words = [line.split("\0") for line in lines if line]
        return [rest for name, *rest in words if name == command]

    def set_queue(self, lines: Sequence[str]) -> None:
        """What squeue says: ID|TASK|STATE|REASON|ELAPSED|LEFT|NODES in each line."""
        (self.folder / "queue").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def write(self, name: str, text: str = "") -> None:
        """`refuse` N: sbatch refuses its job N, from 0; `deaf`: no signal gets through; `accounts`: what sacct says."""
        (self.folder / name).write_text(text, encoding="utf-8")


def read_jobs(run: Path) -> dict:
    """RUN/jobs.json as it lies there."""
    return json.loads((run / "jobs.json").read_text(encoding="utf-8"))
