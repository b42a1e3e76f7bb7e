"""How a job of a training run begins and ends: what RUN says decides, for exit statuses of launchers say little.

job_end.py where FLAGS        prints RUN
job_end.py begin RUN FLAGS    prints where the ranks' logs go; status 10: the run is done, 3: it failed for good
job_end.py end RUN STATUS     ends the job; STATUS is srun's
job_end.py check RUN          for other stages: status 0 where the run is done
job_end.py stage STATUS       ends the job of another stage
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from engine.run_folder import RunFolder
from engine.run_lock import describe, is_anothers, now, read_lock, release_dead
from engine.run_status import DONE, read_status
from examples.cluster import job_record, slurm, this_job
from examples.cluster.endings import FOR_GOOD, GAVE_UP, End, Start, decide
from examples.cluster.this_job import Note

ALREADY_DONE = 10  # the exit status of `begin` for a run that is done
PATIENCE = 120  # seconds in which SLURM ends a job that it puts back


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
    if said := over(run, status, flags, this_job.submitted()):
        print(f"lathe: {said}", file=sys.stderr)
        cancel(run, "chain" if status["state"] == DONE else "all")
        return ALREADY_DONE if status["state"] == DONE else FOR_GOOD
    # Ranks in a container cannot ask SLURM whether a lock's owner is gone; this script can.
    if freed := release_dead(run):
        print(f"start: {freed}", file=sys.stderr)
    try:
        this_job.write_note(run, next_note(run, flags))
    except OSError as error:
        print(f"error: --output {run.path}: nothing can be written in {run.logs}: {error}", file=sys.stderr)
        return FOR_GOOD
    print(this_job.own_logs(run))
    return 0


def next_note(run: RunFolder, flags: Sequence[str]) -> Note:
    """What this start notes of itself, with what the job's starts before it have come to."""
    note = Note(flags=tuple(flags), latest=latest(run), time=now())
    if not this_job.restart():
        return note
    before = this_job.read_note(run, this_job.job_id(), this_job.restart() - 1)
    fruitless = before.fruitless + 1 if before.latest == note.latest else 0
    return replace(note, failures=before.failures + before.failed, fruitless=fruitless)


def over(run: RunFolder, status: dict[str, Any], flags: Sequence[str], submitted: float) -> str:
    """Why this job has nothing to do: since it was submitted it or another has finished the run, or failed for good.

    Empty where it is to start: what the run itself finds is exact, and costs the start of all ranks.
    """
    if not status.get("job"):
        return ""
    again = status["job"] == this_job.job_id()  # and SLURM has put it back although it had ended
    if not again and datetime.fromisoformat(status["time"]).timestamp() <= submitted:
        return ""
    if status["state"] == DONE:
        restart = int((status.get("restarts") or ["0"])[-1])
        same = this_job.read_note(run, status["job"], restart).flags == tuple(flags)
        whole = latest(run) == run.checkpoint(status["step"]).name
        return f"the run was done by job {status['job']} at step {status['step']}" if same and whole else ""
    if status["state"] == "failed" and status.get("lasting"):
        return f"the run failed for good in job {status['job']}: {status['reason']}"
    return ""


def end(run: RunFolder, srun: int) -> int:
    """Says how this job ends and does what follows of it; returns its exit status."""
    job, status = this_job.shown(), read_status(run)
    note = this_job.read_note(run, this_job.job_id(), this_job.restart())
    if not is_own(status):
        status = {}
        owner = read_lock(run)
        if owner and owner.get("job") != this_job.job_id() and is_anothers(run):
            print(f"lathe: {run.path} is in use by {describe(owner)}: wait for it, or give another --output")
            return FOR_GOOD
    start = Start(
        preempted=this_job.is_preempted(job),
        progress=latest(run) != note.latest,
        failures=note.failures,
        fruitless=note.fruitless,
        lacking=tuple(this_job.lacking_nodes(run)),
        nodes=int(os.environ.get("SLURM_NNODES", "0")),
        lacked_before=lacked_before(run),
        retries=int(os.environ.get("LATHE_RETRIES", "3")),
        until_done=bool(os.environ.get("LATHE_UNTIL_DONE")),
    )
    found = decide(status, start, srun)
    if found.failed:
        with contextlib.suppress(OSError):  # a full disk
            this_job.write_note(run, replace(note, failed=True))
    if start.lacking and found.exit_status == GAVE_UP and found.failed:
        found = replace(found, sentence=f"{found.sentence}; {leave_out(run, start.lacking)}")
    cancel(run, found.cancel)
    return leave(found, job)


def leave(found: End, job: dict[str, str]) -> int:
    """Says how this job ends, and puts it back into the queue where it is to go there; returns its exit status."""
    if found.requeue and (hindrance := this_job.why_no_requeue(job)):
        found = replace(found, sentence=f"{found.sentence}; but {hindrance}", requeue=False)
    print(f"lathe: {found.sentence}", flush=True)
    if found.requeue:
        try:
            slurm.call("scontrol", "requeue", this_job.name())
            time.sleep(PATIENCE)  # SLURM ends this process meanwhile
        except ValueError as error:
            print(f"lathe: {error}; submit the job again")
            return GAVE_UP
    return found.exit_status


def stage(srun: int) -> int:
    """Ends the job of another stage: preempted, it goes back, which not every release does; returns its exit status."""
    job = this_job.shown() if srun else {}
    if not this_job.is_preempted(job):
        return srun
    return leave(End(srun, "the job was preempted, so it goes back to the queue", requeue=True), job)


def lacked_before(run: RunFolder) -> int:
    """How many training jobs of the chain right before this one ended because a node lacked something."""
    try:
        jobs = {job.id: job for job in job_record.read(run).jobs if job.stage == job_record.TRAIN}
    except ValueError:
        return 0
    count, own = 0, jobs.get(this_job.recorded_id())
    while own and (own := next((jobs[id] for id in own.after if id in jobs), None)):
        if not any(run.logs.glob(f"{own.id}.*/*{this_job.LACKING}")):
            break
        count += 1
    return count


def leave_out(run: RunFolder, nodes: Sequence[str]) -> str:
    """Keeps these nodes from the training jobs behind this one, or says how the user does."""
    kept = []
    for one in behind(run, "chain"):
        try:
            said = slurm.show_job(one).get("ExcNodeList", "(null)")
            others = [] if said == "(null)" else [said]
            slurm.call("scontrol", "update", f"JobId={one}", f"ExcNodeList={','.join([*others, *nodes])}")
            kept.append(one)
        except ValueError as error:
            print(f"lathe: {error}", file=sys.stderr)
    if kept:
        return f"the training jobs behind this one leave it out: {', '.join(kept)}"
    return f"to leave it out: --sbatch=--exclude={','.join(nodes)}"


def behind(run: RunFolder, which: str) -> list[str]:
    """The jobs that wait behind this one, as far as RUN/jobs.json names them; see `End.cancel`."""
    try:
        jobs = job_record.read(run).jobs if which else ()
    except ValueError as error:
        print(f"lathe: {error}", file=sys.stderr)
        return []
    found = {this_job.recorded_id()}
    for one in jobs:
        if found & set(one.after) and (which == "all" or one.stage == job_record.TRAIN):
            found.add(one.id)
    return sorted(found - {this_job.recorded_id()}, key=int)


def cancel(run: RunFolder, which: str) -> None:
    """Takes jobs that wait behind this one out of the queue."""
    if ids := behind(run, which):
        try:
            slurm.call("scancel", "--quiet", "--state=PENDING", *ids)
            said = f"of the jobs behind this one, those that still wait leave the queue: {', '.join(ids)}"
        except ValueError as error:
            said = str(error)
        print(f"lathe: {said}", file=sys.stderr, flush=True)


def check(run: RunFolder) -> int:
    """Whether the run is done, by the training jobs that this one waits for where there are some; a sentence if not."""
    status = read_status(run)
    status = status.get("run") or status  # what a refused start has left as it was
    if status.get("state") != DONE:
        why = run.why_unfinished() or f"it {'has ' + status['state'] if status else 'was never begun'}"
    elif not (since := trained_since(run)) or datetime.fromisoformat(status["time"]) >= datetime.fromisoformat(since):
        return 0
    else:
        why = f"it was done at {status['time']}, and the training that was submitted at {since} has not come to its end"
    print(f"error: {run.path} is not done, so this stage does not begin: {why}", file=sys.stderr)
    return FOR_GOOD


def trained_since(run: RunFolder) -> str:
    """When the training was submitted behind which this stage waits, at one stage or several; empty for none."""
    jobs = {job.id: job for job in job_record.read(run).jobs}
    wanted, seen = [this_job.recorded_id()], set()
    while wanted:
        one = jobs.get(wanted.pop())
        if one is not None and one.id not in seen:
            seen.add(one.id)
            wanted += one.after
    return min((jobs[id].submitted for id in seen if jobs[id].stage == job_record.TRAIN), default="")


def is_own(status: dict[str, Any]) -> bool:
    """Whether this start of this job wrote a status."""
    restarts = status.get("restarts") or [""]
    return status.get("job") == this_job.job_id() and restarts[-1] == str(this_job.restart())


def latest(run: RunFolder) -> str:
    """The name of the newest checkpoint; empty where there is none."""
    return run.latest.read_text(encoding="utf-8").strip() if run.latest.exists() else ""


def main(arguments: Sequence[str]) -> int:
    command, *rest = arguments
    if command == "where":
        print(where(rest))
        return 0
    if command == "stage":
        return stage(int(rest[0]))
    run = RunFolder(rest[0])
    if command == "begin":
        return begin(run, rest[1:])
    return check(run) if command == "check" else end(run, int(rest[1]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
