"""What ends a run before its last step: a signal to any rank, or the time limit of its job."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

import torch
from torch import distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Seconds since the epoch, which SLURM sets for jobs with a time limit (from release 22.05 on).
JOB_START, JOB_END = "SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME"
MINUTES, SHARE = 10.0, 0.1  # by default, the lesser: before the end, and of the job's whole time
_TIME_LIMIT = signal.NSIG  # no signal has this number


def deadline(minutes_before_end: float | None) -> float:
    """When to save and stop, in seconds since the epoch; infinity for never.

    ValueError where minutes are given and the job has no time limit that is known.
    """
    end = os.environ.get(JOB_END)
    if end is None and minutes_before_end:
        raise ValueError(
            f"--checkpoint.minutes-before-end {minutes_before_end:g} needs the time limit of a SLURM job, "
            f"and {JOB_END} is not set"
        )
    if end is None or minutes_before_end == 0:
        return math.inf
    if minutes_before_end is None:
        length = float(end) - float(os.environ.get(JOB_START, time.time()))
        return float(end) - min(MINUTES * 60, SHARE * max(length, 0.0))
    return float(end) - minutes_before_end * 60


class StopRequest:
    """What asks this rank to stop, and whether all ranks do."""

    def __init__(self, deadline: float = math.inf):
        self._deadline = deadline
        self._signal = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Notes the first SIGTERM or SIGINT within this block; a second does what it would have done without."""
        before = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def note(number: int, frame: FrameType | None) -> None:
            self._signal = number
            restore()

        for number in SIGNALS:
            signal.signal(number, note)
        try:
            yield
        finally:
            restore()

    def reason(self) -> str | None:
        """Why all ranks stop now, the same on each; None where none has to. Every rank calls it after a step."""
        own = self._signal or (_TIME_LIMIT if time.time() >= self._deadline else 0)
        most = torch.tensor(own, dtype=torch.int32)
        distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
        number = int(most)
        if number == _TIME_LIMIT:
            return "the job's time limit is near"
        return f"{signal.Signals(number).name} was received" if number else None
