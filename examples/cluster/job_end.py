"""How a job of a training run begins and ends: what RUN says decides, for exit statuses of launchers say little.

job_end.py where FLAGS        prints RUN
job_end.py begin RUN FLAGS    prints where the ranks' logs go; status 10: the run is done, 3: it failed for good
job_end.py end RUN STATUS     ends the job; STATUS is srun's
job_end.py check RUN          for later stages: status 0 where the run is done
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from engine.run_folder import RunFolder, read_object, replace_text
from engine.run_lock import describe, is_anothers, now, read_lock
from engine.run_status import DONE, STOPPED, read_status
from engine.signals import LIMIT_NEAR
from examples.cluster import job_record, slurm

FOR_GOOD, GAVE_UP, ALREADY_DONE = 3, 4, 10  # exit statuses
START = "start.json"  # in the folder of a start's logs
PATIENCE = 120  # seconds in which SLURM ends a job that it puts back


@dataclass(frozen=True)
class End:
    """How a job ends."""

    exit_status: int
    sentence: str
    requeue: bool = False
    cancel: str = ""  # of the jobs that wait behind it: "chain" the training jobs, "all" also the stages after them


@dataclass(frozen=True)
class Start:
    """This start of a job."""

    job: str
    restart: int  # how often SLURM has started the job again
    preempted: bool
    progress: bool  # whether the newest checkpoint is another one than when it began
    retries: int = 3
    until_done: bool = False

    @property
    def may_go_on(self) -> bool:
        return self.progress and self.restart < self.retries


def decide(status: dict[str, Any], start: Start, srun: int) -> End:
    """How a job ends. `status` is what this start wrote to status.json; empty where it came to write nothing."""
    state, reason = status.get("state"), status.get("reason") or ""
    at = f"step {status.get('step')} of {status.get('total_steps')}"
    if state == DONE:
        return End(0, f"the run is done, {at}", cancel="chain")
    if status.get("lasting"):
        return End(FOR_GOOD, f"the run has {state} and would do so again: {reason}", cancel="all")
    if start.preempted:
        return _preempted(start)
    if state == STOPPED and reason == LIMIT_NEAR:
        return _out_of_time(start, at)
    if state == STOPPED or (not status and srun == 0):
        return End(0, f"the run was told to stop{f' at {at}: {reason}' if state else ' before it began'}")
    why = f"the run was killed, or failed: {reason or f'srun ended with status {srun}'}"
    if start.may_go_on:
        return End(GAVE_UP, f"{why}; it made progress, so the job goes back to the queue", requeue=True)
    if start.progress:
        return End(GAVE_UP, f"{why}; the job was started again {start.restart} times, so it ends here")
    return End(GAVE_UP, f"{why}; it wrote no new checkpoint, so the job ends here")


def _preempted(start: Start) -> End:
    """Preemption is no fault: only a job that never comes to a checkpoint ends."""
    if start.progress or start.restart < start.retries:
        return End(GAVE_UP, "the job was preempted, so it goes back to the queue", requeue=True)
    words = f"the job was preempted without a new checkpoint, after {start.restart} more starts; it ends here"
    return End(GAVE_UP, f"{words} (--checkpoint.rescue-minutes makes checkpoints more frequent)")


def _out_of_time(start: Start, at: str) -> End:
    words = f"saved at {at} before the job's time limit"
    if not start.until_done:
        return End(0, f"{words}; the next job of the chain, or the same command, continues")
    if start.progress:
        return End(0, f"{words}; the job goes back to the queue", requeue=True)
    return End(GAVE_UP, f"{words}, but made no step in all of its time; it ends here")


def where(flags: Sequence[str]) -> Path:
    """RUN, as far as flags and recipes name it."""
    from engine.config import RunConfig
    from examples.pretrain_sft import folder_of

    run = folder_of(list(flags))
    return (run.path if run else RunConfig().output).absolute()


def begin(run: RunFolder, flags: Sequence[str]) -> int:
    """Notes how this start finds RUN, and says where it stands where nothing is to be started."""
    if run.path.is_file() or run.is_foreign():
        print(
            f"error: --output {run.path} is a file, a model or data: give a directory of the run's own", file=sys.stderr
        )
        return FOR_GOOD
    status = read_status(run)
    if said := over(run, status, list(flags), submitted()):
        print(f"lathe: {said}", file=sys.stderr)
        cancel(run, "chain" if status["state"] == DONE else "all")
        return ALREADY_DONE if status["state"] == DONE else FOR_GOOD
    logs = logs_of(run, own_job(), own_restart())
    logs.mkdir(parents=True, exist_ok=True)
    note = {"flags": list(flags), "latest": latest(run), "time": now()}
    replace_text(logs / START, json.dumps(note, indent=1) + "\n")
    print(logs)
    return 0


def over(run: RunFolder, status: dict[str, Any], flags: list[str], submitted: float) -> str:
    """Why this job has nothing to do: since it was submitted another one has finished the run, or failed for good.

    Empty where it is to start: what the run itself finds is exact, and costs the start of all ranks.
    """
    if not status.get("job") or datetime.fromisoformat(status["time"]).timestamp() <= submitted:
        return ""
    if status["state"] == DONE:
        restart = int((status.get("restarts") or ["0"])[-1])
        same = read_object(logs_of(run, status["job"], restart) / START).get("flags") == flags
        whole = latest(run) == run.checkpoint(status["step"]).name
        return f"the run was done by job {status['job']} at step {status['step']}" if same and whole else ""
    if status["state"] == "failed" and status.get("lasting"):
        return f"the run failed for good in job {status['job']}: {status['reason']}"
    return ""


def end(run: RunFolder, srun: int) -> int:
    """Says how this job ends and does what follows of it; returns its exit status."""
    job = shown()
    status = read_status(run)
    before = read_object(logs_of(run, own_job(), own_restart()) / START)
    if not is_own(status):
        status = {}
        owner = read_lock(run)
        if owner and owner.get("job") != own_job() and is_anothers(run):
            print(f"lathe: {run.path} is in use by {describe(owner)}: wait for it, or give another --output")
            return FOR_GOOD
    start = Start(
        job=own_job(),
        restart=own_restart(),
        preempted=job.get("PreemptTime", "None") not in ("None", "Unknown"),
        progress=latest(run) != before.get("latest"),
        retries=int(os.environ.get("LATHE_RETRIES", "3")),
        until_done=bool(os.environ.get("LATHE_UNTIL_DONE")),
    )
    found = decide(status, start, srun)
    if found.requeue and (hindrance := why_no_requeue(job, start.restart)):
        found = replace(found, sentence=f"{found.sentence}; but {hindrance}", requeue=False)
    print(f"lathe: {found.sentence}", flush=True)
    cancel(run, found.cancel)
    if found.requeue:
        try:
            slurm.call("scontrol", "requeue", start.job)
            time.sleep(PATIENCE)  # SLURM ends this process meanwhile
        except ValueError as error:
            print(f"lathe: {error}; submit the job again")
            return GAVE_UP
    return found.exit_status


def why_no_requeue(job: dict[str, str], restart: int) -> str:
    """Why a job is not to be put back into the queue; empty where it is."""
    if int(job.get("Restarts", restart)) > restart:
        return "SLURM has put it there itself"
    if job.get("BatchFlag") == "0":
        return "it is an interactive one: call the same command again"
    if job.get("JobState", "RUNNING") != "RUNNING":
        return f"it is {job['JobState'].lower()}"
    return ""


def cancel(run: RunFolder, which: str) -> None:
    """Takes jobs that wait behind this one out of the queue, as far as RUN/jobs.json names them."""
    try:
        jobs = job_record.read(run).jobs if which else ()
        behind = {own_job()}
        for one in jobs:
            if behind & set(one.after) and (which == "all" or one.stage == job_record.TRAIN):
                behind.add(one.id)
        if ids := sorted(behind - {own_job()}, key=int):
            slurm.call("scancel", "--quiet", "--state=PENDING", *ids)
            print(f"lathe: of the jobs behind this one, those that still wait leave the queue: {', '.join(ids)}",
                  file=sys.stderr)  # fmt: skip
    except ValueError as error:
        print(f"lathe: {error}", file=sys.stderr)


def check(run: RunFolder) -> int:
    """Whether the run is done; a sentence where it is not."""
    status = read_status(run)
    status = status.get("run") or status  # what a refused start has left as it was
    if status.get("state") == DONE:
        return 0
    why = run.why_unfinished() or f"it {'has ' + status['state'] if status else 'was never begun'}"
    print(f"error: {run.path} is not done, so this stage does not begin: {why}", file=sys.stderr)
    return FOR_GOOD


def is_own(status: dict[str, Any]) -> bool:
    """Whether this start of this job wrote a status."""
    restarts = status.get("restarts") or [""]
    return status.get("job") == own_job() and restarts[-1] == str(own_restart())


def own_job() -> str:
    return os.environ["SLURM_JOB_ID"]


def own_restart() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def logs_of(run: RunFolder, job: str, restart: int) -> Path:
    """Where a start of a job leaves its logs."""
    return run.logs / f"{job}.{restart}"


def latest(run: RunFolder) -> str:
    """The name of the newest checkpoint; empty where there is none."""
    return run.latest.read_text(encoding="utf-8").strip() if run.latest.exists() else ""


def shown() -> dict[str, str]:
    """What SLURM shows of this job, as far as it can be asked."""
    try:
        words = slurm.call("scontrol", "show", "job", "-o", own_job()).split()
    except ValueError as error:
        print(f"lathe: {error}", file=sys.stderr)
        return {}
    return dict(word.split("=", 1) for word in words if "=" in word)


def submitted() -> float:
    """When this job was queued, in seconds since the epoch; infinity where SLURM does not say it."""
    try:
        return datetime.fromisoformat(shown().get("SubmitTime", "")).timestamp()
    except ValueError:
        return float("inf")


def main(arguments: Sequence[str]) -> int:
    command, *rest = arguments
    if command == "where":
        print(where(rest))
        return 0
    run = RunFolder(rest[0])
    if command == "begin":
        return begin(run, rest[1:])
    return check(run) if command == "check" else end(run, int(rest[1]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
