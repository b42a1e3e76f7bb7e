"""The job in which this process runs: its names, what SLURM shows of it, and what its starts leave in RUN."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

from engine.run_folder import RunFolder, read_object, replace_text
from examples.cluster import slurm

START = "start.json"  # in the folder of a start's logs
LACKING = ".lacking"  # the same folder has NODE.lacking for a node whose setup or check has failed
REQUEUES_AFTER_GRACE = (24, 5)  # earlier releases drop a job that ends within GraceTime


@dataclass(frozen=True, kw_only=True)
class Note:
    """What a start of a job notes of itself as it begins, and of how it ends where the job goes back by its own doing.

    Restarts alone say little: SLURM counts preemptions, time limits and dead nodes among them.
    """

    flags: tuple[str, ...] = ()
    latest: str = ""  # the name of the newest checkpoint
    time: str = ""
    failures: int = 0  # of the job's starts before this one, those that were killed or failed
    fruitless: int = 0  # of the starts right before this one, those that made no checkpoint
    failed: bool = False  # whether this start did


def job_id() -> str:
    """The number that SLURM gives the processes of this job."""
    return os.environ["SLURM_JOB_ID"]


def name() -> str:
    """What SLURM's commands call this job. The number of one task of an array may stand for the whole array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else job_id()


def recorded_id() -> str:
    """What RUN/jobs.json calls this job: an array by one number."""
    return os.environ.get("SLURM_ARRAY_JOB_ID") or job_id()


def restart() -> int:
    """How often SLURM has started this job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def shown() -> dict[str, str]:
    """What SLURM shows of this job, as far as it can be asked."""
    try:
        return slurm.show_job(name())
    except ValueError as error:
        print(f"lathe: {error}", file=sys.stderr)
        return {}


def submitted() -> float:
    """When this job was queued, in seconds since the epoch; infinity where SLURM does not say it."""
    try:
        return datetime.fromisoformat(shown().get("SubmitTime", "")).timestamp()
    except ValueError:
        return float("inf")


def is_preempted(shown: dict[str, str]) -> bool:
    """Whether SLURM takes this start's nodes for another job."""
    return shown.get("PreemptTime", "None") not in ("None", "Unknown")


def release() -> tuple[int, int]:
    """The release of SLURM; of one that does not say it the oldest."""
    try:
        found = re.match(r"slurm\S* (\d+)\.(\d+)", slurm.call("scontrol", "--version"))
    except ValueError:
        found = None
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _is_cancelled(partition: str) -> bool:
    """Whether a partition's jobs are cancelled when they are preempted, as far as it says so itself."""
    try:
        return "PreemptMode=CANCEL" in slurm.call("scontrol", "show", "partition", "-o", partition)
    except ValueError:
        return False


def why_no_requeue(shown: dict[str, str]) -> str:
    """Why this job is not to be put back into the queue; empty where it is."""
    if is_preempted(shown) and release() >= REQUEUES_AFTER_GRACE and not _is_cancelled(shown.get("Partition", "")):
        return "SLURM puts it there itself"  # and would put it there once more if this job did
    if int(shown.get("Restarts", restart())) > restart():
        return "SLURM has put it there itself"
    if shown.get("BatchFlag") == "0":
        return "it is an interactive one: call the same command again"
    if shown.get("JobState", "RUNNING") != "RUNNING":
        return f"it is {shown['JobState'].lower()}"
    return ""


def logs_of(run: RunFolder, job: str, restart: int) -> Path:
    """Where a start of a job leaves its logs."""
    return run.logs / f"{job}.{restart}"


def own_logs(run: RunFolder) -> Path:
    """Where this start leaves its logs."""
    return logs_of(run, job_id(), restart())


def read_note(run: RunFolder, job: str, restart: int) -> Note:
    """What a start noted; nothing where it never came to it."""
    found = read_object(logs_of(run, job, restart) / START)
    known = {field.name for field in fields(Note)}
    values = {name: value for name, value in found.items() if name in known}
    return Note(**values | {"flags": tuple(values.get("flags", ()))})


def write_note(run: RunFolder, note: Note) -> None:
    """Notes it of this start; OSError where nothing can be written."""
    own_logs(run).mkdir(parents=True, exist_ok=True)
    replace_text(own_logs(run) / START, json.dumps(asdict(note), indent=1) + "\n")


def lacking_nodes(run: RunFolder) -> list[str]:
    """The nodes on which this start's setup or check has failed."""
    return sorted(path.name.removesuffix(LACKING) for path in own_logs(run).glob(f"*{LACKING}"))
