"""Says how the jobs of a run stand on its cluster, how the run itself stands, and why a job ended.

lathe jobs RUN             what is queued, running and done
lathe jobs RUN --cancel    waiting jobs leave the queue; the one that trains saves and stops
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby, takewhile
from operator import methodcaller
from pathlib import Path
from typing import Any

from engine.run_folder import RunFolder
from engine.run_status import read_status
from examples.cluster import slurm
from examples.cluster.job_record import TRAIN, Job, log_paths, read
from examples.cluster.slurm import JobState
from examples.flags import exit_status

_TAIL = 64 * 2**10  # bytes of a log's end in which its last word is looked for
_START = "start: "  # how lines begin that a start of a job begins with: what stands before them another start has said
# How lines begin that say why a job ended.
_LATHE, _SLURM = ("lathe: ", "error: "), ("slurmstepd: error: ", "srun: error: ")
_BY_SLURM = ("TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")  # states in which SLURM knows best why
_ENDED = JobState("", "", "ENDED", "")  # a job that SLURM has forgotten
# SLURM's reasons in words; {} are the jobs that a job waits for.
_REASONS = {
    "Dependency": "waits for {}",
    "DependencyNeverSatisfied": "of {}, which had to succeed, one did not",
}


def last_word(log: Path, *, by_slurm: bool = False) -> str:
    """The last lines of a log that say how its job ended, the reason last; empty where there are none.

    Lathe's before SLURM's, or with `by_slurm` SLURM's before Lathe's.
    """
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - _TAIL))
        lines = stream.read().decode("utf-8", errors="replace").splitlines()
    # From the end, and so in the order that reads well: job_end says first why, and then which jobs left the queue.
    of_this_start = list(takewhile(lambda line: not line.startswith(_START), reversed(lines)))
    for begins in (_SLURM, _LATHE) if by_slurm else (_LATHE, _SLURM):
        for speaks, together in groupby(of_this_start, methodcaller("startswith", begins)):
            if speaks:
                return "; ".join(line.removeprefix("lathe: ") for line in together)
    return ""


def why(job: Job, state: JobState) -> str:
    """Why a job waits or how it ended, as far as SLURM or its log say so."""
    if slurm.is_queued(state) and state.state not in slurm.WAITING:
        return f"on {state.nodes}, {state.left} left" if state.nodes else ""
    logs = log_paths(job)
    if state.task:
        logs = [path for path in logs if path.stem.endswith(f"_{state.task}")]
    by_slurm = state.state in _BY_SLURM
    said = last_word(logs[-1], by_slurm=by_slurm) if logs else ""
    reason = _REASONS.get(state.reason, state.reason).format(", ".join(job.after))
    if state.state in slurm.WAITING:
        return "; before that: ".join(filter(None, (reason, said)))
    if by_slurm:
        return "; ".join(filter(None, (reason, said)))
    return said or ("" if state.reason == "Dependency" else reason)


def run_line(run: RunFolder, status: dict[str, Any]) -> str:
    """How the run itself stands."""
    if not status:
        return f"{run.path}: no training has begun"
    step = f", step {status.get('step') or 0:,} of {status['total_steps']:,}" if status.get("total_steps") else ""
    reason = status.get("reason") or run.why_unfinished()
    return f"{run.path}: {status.get('state')}{step}, at {status.get('time')}{f': {reason}' if reason else ''}"


def rows(jobs: Sequence[Job], states: Sequence[JobState]) -> list[tuple[str, str, str, str, str]]:
    """A row for each job, or task of an array: id, stage, state, time that it ran, why."""
    found = []
    for job in jobs:
        of = f" {job.number} of {job.of}" if job.of > 1 else ""
        for state in [one for one in states if one.id == job.id] or [_ENDED]:
            name = state.name if state.id else job.id
            found.append((name, f"{job.stage}{of}", state.state.lower(), state.elapsed, why(job, state)))
    return found


def cancel(jobs: Sequence[Job], states: Sequence[JobState]) -> list[str]:
    """Takes jobs that wait out of the queue, asks those that train to save and stop, and cancels the others."""
    stages = {job.id: job.stage for job in jobs}
    queued = [state for state in states if slurm.is_queued(state)]
    trains = [state for state in queued if state.state == "RUNNING" and stages[state.id] == TRAIN]
    others = [state.name for state in queued if state not in trains]
    slurm.cancel(others)  # first, so that none of them starts when the one that trains has ended
    lines = [f"cancelled: {', '.join(others)}"] if others else []
    for state in trains:
        try:
            slurm.ask_to_stop(state.name)
            lines.append(f"{state.name} saves and stops; `scancel {state.name}` ends it at once")
        except ValueError:  # nothing runs on its nodes yet, or any more
            slurm.cancel([state.name])
            lines.append(f"cancelled: {state.name}")
    return lines or ["nothing is queued"]


def table(lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest entry, but for the last, which goes on to its end."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(line.rstrip() for line in padded)


def show(arguments: Sequence[str]) -> None:
    """Prints how the run stands and a line for each of its jobs, or cancels them; ValueError where there are none."""
    parser = argparse.ArgumentParser(
        prog="lathe jobs", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of the run, --output")
    parser.add_argument("--cancel", action="store_true", help="end what is queued or running")
    flags = parser.parse_args(arguments)
    run = RunFolder(flags.run)
    jobs = read(run).jobs
    if not jobs:
        raise ValueError(f"{run.path}: no jobs were queued for it by lathe submit (there is no {run.jobs.name})")
    states = slurm.states([job.id for job in jobs])
    if flags.cancel:
        print("\n".join(cancel(jobs, states)))
        return
    for one in [RunFolder(path) for path in sorted(run.path.glob("lr_*/"))] or [run]:  # the runs of a sweep
        print(run_line(one, read_status(one)))
    print(table([("job", "stage", "state", "ran", ""), *rows(jobs, states)]))


def main(arguments: list[str]) -> int:
    """Shows or cancels; returns the exit status. A user's mistake is one sentence."""
    return exit_status(lambda: show(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
