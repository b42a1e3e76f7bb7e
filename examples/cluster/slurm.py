"""The only place that calls SLURM's commands: sbatch, squeue, sacct and scancel, whose errors become one sentence."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# States in which a job may still do something; all others are ends.
QUEUED = (
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED", "REQUEUE_HOLD",
    "REQUEUE_FED", "RESIZING", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT",
)  # fmt: skip
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")  # and has no node at this moment
_PATIENCE = 120.0  # seconds for one command: a busy controller may take a minute


@dataclass(frozen=True)
class JobState:
    """How SLURM sees a job, or one task of an array."""

    id: str  # of the whole array, for a task
    task: str  # its number; empty for a job that is no array
    state: str  # SLURM's word, RUNNING for one
    reason: str  # why it waits or how it ended, in SLURM's words; empty for neither
    elapsed: str = ""
    left: str = ""
    nodes: str = ""

    @property
    def name(self) -> str:
        """What SLURM's commands call it."""
        return f"{self.id}_{self.task}" if self.task else self.id


def call(*command: str) -> str:
    """The output of a command of SLURM; ValueError with what it says where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    except FileNotFoundError:
        raise ValueError(f"there is no {command[0]} on this machine: call this where jobs are submitted") from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"{command[0]} has not answered for {_PATIENCE:.0f} seconds: try again later") from None
    if done.returncode:
        said = " ".join(line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip())
        raise ValueError(f"{command[0]} failed: {said or f'exit status {done.returncode}'}")
    return done.stdout


def dependency(
    *, after_success: Sequence[str] = (), after_end: Sequence[str] = (), after_start: Sequence[str] = ()
) -> list[str]:
    """sbatch's flags for a job that waits for others: some must succeed, some end in any way, some have begun.

    A job whose condition can no longer be met leaves the queue, instead of waiting for ever.
    """
    kinds = {"afterok": after_success, "afterany": after_end, "after": after_start}
    parts = [":".join([kind, *ids]) for kind, ids in kinds.items() if ids]
    return [f"--dependency={','.join(parts)}", "--kill-on-invalid-dep=yes"] if parts else []


def submit(script: Path, flags: Sequence[str] = ()) -> str:
    """Queues a script; returns the job's id."""
    said = call("sbatch", "--parsable", *flags, str(script))
    number = said.strip().split(";")[0]  # a cluster's name may follow
    if not number.isdecimal():
        raise ValueError(f"sbatch queued {script} and names no job: {said.strip()!r}")
    return number


def show_job(name: str) -> dict[str, str]:
    """What SLURM shows of a job, by its own words."""
    words = call("scontrol", "show", "job", "-o", name).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def states(ids: Sequence[str]) -> list[JobState]:
    """How these jobs stand, in their order, task by task for arrays; one that SLURM has forgotten is not among them.

    Jobs that the queue no longer shows are asked of the accounting, where a cluster keeps one.
    """
    if not ids:
        return []
    fields = "%F|%K|%T|%r|%M|%L|%N"
    found = [_of_queue(line) for line in _asked("squeue", "-h", "-r", "-t", "all", "-o", fields, "-j", ",".join(ids))]
    seen = {one.id for one in found}
    if lost := [number for number in ids if number not in seen]:
        found += [state for line in _accounts(lost) for state in _of_accounts(line)]
    return sorted((one for one in found if one.id in ids), key=lambda one: (ids.index(one.id), int(one.task or 0)))


def _asked(*command: str) -> list[str]:
    try:
        return [line for line in call(*command).splitlines() if line.strip()]
    except ValueError as error:
        if "invalid job id" in str(error).lower():  # it has forgotten the only job that it was asked for
            return []
        raise


def _accounts(ids: Sequence[str]) -> list[str]:
    try:
        return call("sacct", "-n", "-X", "-P", "-o", "JobID,State,ExitCode,Elapsed", "-j", ",".join(ids)).splitlines()
    except ValueError:  # no accounting on this cluster
        return []


def _of_queue(line: str) -> JobState:
    number, task, state, reason, elapsed, left, nodes = line.split("|")
    return JobState(
        number, "" if task == "N/A" else task, state, "" if reason == "None" else reason, elapsed, left, nodes
    )


def _of_accounts(line: str) -> list[JobState]:
    job, state, code, elapsed = line.split("|")
    number, _, tasks = job.partition("_")
    reason = "" if code == "0:0" else f"exit status {code}"
    return [JobState(number, task, state.split()[0], reason, elapsed) for task in _tasks(tasks) or [""]]


def _tasks(text: str) -> list[str]:
    """The tasks behind an array's number: one, or those that left the queue before they began, as [0,2-8:2%4].

    What follows % is how many may run at once; of a long list sacct cuts the end off, whose tasks stay unnamed.
    """
    ranges = (re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part) for part in text.strip("[]").split("%")[0].split(","))
    return [task for match in ranges if match for task in _counted(*match.groups())]


def _counted(first: str, last: str | None, step: str | None) -> Iterator[str]:
    return map(str, range(int(first), int(last or first) + 1, int(step or 1)))


def is_queued(state: JobState) -> bool:
    """Whether a job may still do something."""
    return state.state in QUEUED


def cancel(names: Sequence[str]) -> None:
    """Cancels jobs or tasks: one that runs has SLURM's KillWait to save, one that has ended is left as it is."""
    if names:
        call("scancel", *names)


def ask_to_stop(name: str) -> None:
    """Sends SIGTERM to what a job runs on its nodes, but not to its script: a run saves, however long that takes."""
    call("scancel", "--signal=TERM", name)
