"""How a training job ends, decided from plain values: what its run says, and what is known of this start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.run_status import DONE, STOPPED
from engine.signals import LIMIT_NEAR

FOR_GOOD, GAVE_UP = 3, 4  # exit statuses


@dataclass(frozen=True)
class End:
    """How a job ends."""

    exit_status: int
    sentence: str
    requeue: bool = False
    cancel: str = ""  # of the jobs that wait behind it: "chain" the training jobs, "all" also the stages after them
    failed: bool = False  # whether this start counts as a failure of the job's


@dataclass(frozen=True)
class Start:
    """This start of a job."""

    preempted: bool
    progress: bool  # whether the newest checkpoint is another one than when it began
    failures: int = 0  # of the job's earlier starts, see `this_job.Note`
    fruitless: int = 0
    lacking: tuple[str, ...] = ()  # nodes on which the setup or the check has failed
    nodes: int = 0  # in all
    lacked_before: int = 0  # training jobs right before this one that ended so
    retries: int = 3
    until_done: bool = False


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
    if start.lacking:
        why = f"the setup or the check of {','.join(start.lacking)} has failed, see above"
        # A node may be bad; where half of them are, or three jobs in a row find some, it is what they were told to do.
        many = len(start.lacking) > 1 and 2 * len(start.lacking) >= start.nodes
        if many or start.lacked_before > 1:
            return End(FOR_GOOD, f"{why}, and would fail again", cancel="all", failed=True)
        return End(GAVE_UP, why, failed=True)
    why = f"the run was killed, or failed: {reason or f'srun ended with status {srun}'}"
    if not start.progress:
        return End(GAVE_UP, f"{why}; it wrote no new checkpoint, so the job ends here", failed=True)
    if start.failures >= start.retries:
        return End(GAVE_UP, f"{why}; the job has failed {start.failures} times before, so it ends here", failed=True)
    return End(GAVE_UP, f"{why}; it made progress, so the job goes back to the queue", requeue=True, failed=True)


def _preempted(start: Start) -> End:
    """Preemption is no fault: only a job that never comes to a checkpoint ends."""
    if start.progress or start.fruitless < start.retries:
        return End(GAVE_UP, "the job was preempted, so it goes back to the queue", requeue=True)
    words = f"the job was preempted without a new checkpoint, as {start.fruitless} times before; it ends here"
    return End(GAVE_UP, f"{words} (--checkpoint.rescue-minutes makes checkpoints more frequent)")


def _out_of_time(start: Start, at: str) -> End:
    words = f"saved at {at} before the job's time limit"
    if not start.until_done:
        return End(0, f"{words}; the next job of the chain, or the same command, continues")
    if start.progress:
        return End(0, f"{words}; the job goes back to the queue", requeue=True)
    return End(GAVE_UP, f"{words}, but made no step in all of its time; it ends here")
