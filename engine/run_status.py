"""How a run stands and what went wrong, for scripts and for people who come later: status.json and errors/ in RUN."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from engine.run_folder import RunFolder, read_object, replace_text
from engine.run_lock import is_anothers, now, this_start

RUNNING, DONE, STOPPED, FAILED, REFUSED = "running", "done", "stopped", "failed", "refused"
# How long a rank waits for the first one to say what all have found: they start seconds apart, and torchrun ends all
# as soon as one has ended.
PATIENCE = 10.0
_loaded, _parent = time.time(), os.getppid()


class Refused(ValueError):
    """A start that is refused once the ranks have met: every rank raises it."""


def read_status(run: RunFolder) -> dict[str, Any]:
    """What status.json says; nothing where it is not there or cannot be read."""
    return read_object(run.status)


def write_status(
    run: RunFolder,
    state: str,
    *,
    step: int | None = None,
    total_steps: int | None = None,
    reason: str | None = None,
    rank: int = 0,
    began_with: str | None = None,
    aside: bool = False,
    lasting: bool = False,
    save: float | None = None,
) -> None:
    """Writes status.json in one move.

    save: seconds that the longest save of this start took; where it has made none, what an earlier one wrote stays.
    lasting: the same command fails again until somebody mends what `reason` says, as a refused start always does.

    What is not given is kept from what this start has written before. A start that fails before it has written anything
    keeps what the run's own status was as `run`; so does one that has changed nothing of the run, with aside.
    `began_with` is the flag that is to take effect once a job; it is kept as long as the job is the same.
    """
    before = read_status(run)
    own = before.get("state") in (RUNNING, FAILED) and _is_of_this_start(before)
    kept, earlier = before if own else {}, before.get("run") or before
    if not began_with and earlier.get("job_started_again") == _job_name():
        began_with = earlier.get("began_with")
    status = {
        "state": state,
        "step": kept.get("step") if step is None else step,
        "total_steps": kept.get("total_steps") if total_steps is None else total_steps,
        "reason": reason,
        "lasting": lasting or state == REFUSED,
        "time": now(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "rank": rank,
        "start": this_start(),
        "restarts": _restarts(),
        "parent": _parent,
        "began_with": began_with,
        "job_started_again": _job_name(),
        "save_seconds": earlier.get("save_seconds") if save is None else save,
    }
    if before and (aside or state in (FAILED, REFUSED)) and ("run" in before or not own):
        status["run"] = earlier
    replace_text(run.status, json.dumps(status, indent=1) + "\n")


def save_seconds(run: RunFolder) -> float | None:
    """How long a save of the latest start that has made one took; None where none has."""
    status = read_status(run)
    found = (status.get("run") or status).get("save_seconds")
    return float(found) if isinstance(found, int | float) else None


def took_effect(run: RunFolder, flag: str) -> bool:
    """Whether this job was started again, by torchrun or SLURM, after `flag` had done its work at an earlier start."""
    if not any(count.isdigit() and int(count) for count in _restarts()):
        return False
    status = read_status(run)
    status = status.get("run") or status
    return status.get("began_with") == flag and status.get("job_started_again") == _job_name()


def _job_name() -> str | None:
    """What a job is called, however often it is started again."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")


def _restarts() -> list[str]:
    return [os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]


def _is_of_this_start(status: dict[str, Any]) -> bool:
    """Whether a rank of this very start wrote it.

    All jobs of torchrun's static rendezvous have the same name: on one host the torchrun that started the ranks tells
    them apart, elsewhere the time.
    """
    if status.get("start") != this_start() or status.get("restarts") != _restarts():
        return False
    if "TORCHELASTIC_RUN_ID" in os.environ and status.get("host") == socket.gethostname():
        return status.get("parent") == _parent
    return datetime.fromisoformat(status["time"]).timestamp() >= _loaded - PATIENCE


def _said_by_another(run: RunFolder, rank: int) -> bool:
    """Whether another rank of this start has written why it ends."""
    status = read_status(run)
    return status.get("state") in (FAILED, REFUSED) and status.get("rank") != rank and _is_of_this_start(status)


def tell(
    run: RunFolder | None,
    rank: int,
    sentence: str,
    *,
    state: str,
    details: str | None = None,
    alone: bool = False,
    met: bool = False,
    printed: bool = False,
    lasting: bool = False,
    is_ended: Callable[[], bool] = lambda: False,
) -> None:
    """Says, once for all ranks, why this start ends, and writes it down; call it before the process ends.

    Every rank leaves its own words in RUN/errors/rank_N.txt, with `details` in place of the sentence where there are
    some. The first rank speaks; another one waits for it, and speaks where it hears nothing. alone: only this rank
    knows, so it speaks. met: all ranks are known to be here. printed: what there is to say was printed already.
    lasting: see `write_status`. is_ended: whether this process was told to end, as torchrun does once another rank has
    spoken and ended.
    Nothing is written into what is no run, or another job's.

    What a rank has said stands: others fail after it because it is gone, and say nothing. Those that fail within the
    few milliseconds in which it speaks may still speak, too, and the last is what status.json keeps.
    """
    if run is not None and (run.is_foreign() or is_anothers(run)):
        run = None
    noted = run is not None and _note(run, rank, details or sentence)
    if run is not None and _said_by_another(run, rank):
        return
    if rank and not alone:
        if _heard(run, rank, is_ended) or met:
            return
        silent = _lower_rank_noted(run, rank) if noted and run is not None else is_ended()
        if silent:
            return
    if not printed:
        who = f"rank {rank}: " if rank else ""
        print(f"error: {who}{sentence}" if details is None else details.rstrip(), file=sys.stderr, flush=True)
    if noted and run is not None:
        print(f"what each rank said lies in {run.errors}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            write_status(run, state, reason=sentence, rank=rank, lasting=lasting)


def clear_errors(run: RunFolder) -> None:
    """Removes what ranks said at earlier starts."""
    shutil.rmtree(run.errors, ignore_errors=True)


def _note(run: RunFolder, rank: int, words: str) -> bool:
    try:
        run.errors.mkdir(parents=True, exist_ok=True)
        head = f"{now()} rank {rank} on {socket.gethostname()}, process {os.getpid()}"
        replace_text(_error_file(run, rank), f"{head}\n{words.rstrip()}\n")
        return True
    except OSError:  # a full disk, a path that cannot be written: what is printed must do
        return False


def _error_file(run: RunFolder, rank: int) -> Path:
    return run.errors / f"rank_{rank}.txt"


def _heard(run: RunFolder | None, rank: int, is_ended: Callable[[], bool]) -> bool:
    """Waits until another rank of this start has written how it ended, or this process is to end; whether one has."""
    until = time.monotonic() + PATIENCE
    while True:
        over = is_ended() or time.monotonic() >= until
        if run is not None and _said_by_another(run, rank):
            return True
        if over:
            return False
        time.sleep(0.2)


def _lower_rank_noted(run: RunFolder, rank: int) -> bool:
    """Whether a lower rank has failed at this start, too: it speaks."""
    files = [_error_file(run, lower) for lower in range(rank)]
    return any(file.exists() and file.stat().st_mtime >= _loaded - PATIENCE for file in files)
