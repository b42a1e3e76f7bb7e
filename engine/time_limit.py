"""When a SLURM job ends, and how long before that its run saves and stops."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass

# Seconds since the epoch, which newer releases of SLURM set for their jobs.
JOB_START, JOB_END = "SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME"
# How long before its end a job stops by default. While no save's time is known: so many minutes, or this share of a
# shorter job, or two steps where they take longer. Then: so many times what a save and a step take, and a minute, or
# that share, for whatever else there is. At most half of the job: where saves take longer, it would make no step.
MINUTES, SHARE = 10.0, 0.1
TIMES, REST = 2.0, 60.0
MOST = 0.5


@dataclass(frozen=True)
class TimeLimit:
    """The end of this job; by default there is none."""

    end: float = math.inf  # seconds since the epoch
    length: float = math.inf  # seconds from the job's start, or from now where that is not known
    notice: float | None = None  # seconds before the end, where the user has said them

    def stop_at(self, save: float | None = None, step: float = 0.0) -> float:
        """When to save and stop, in seconds since the epoch; infinity for never.

        save, step: seconds that they take, as far as it is known.
        """
        if self.notice is not None:
            return self.end - self.notice
        if self.end == math.inf:
            return math.inf
        share = SHARE * self.length
        if save is None:
            notice = max(min(MINUTES * 60, share), TIMES * step)
        else:
            notice = TIMES * (save + step) + min(REST, share)
        return self.end - min(notice, MOST * self.length)


NO_LIMIT = TimeLimit()


def time_limit(minutes_before_end: float | None) -> TimeLimit:
    """The limit of this job, with the notice that --checkpoint.minutes-before-end asks for; 0 asks for no stop.

    ValueError where minutes are given and the job has no time limit that is known.
    """
    if minutes_before_end == 0:
        return NO_LIMIT
    start, end = _seconds(JOB_START), _seconds(JOB_END)
    flag = f"--checkpoint.minutes-before-end {minutes_before_end or MINUTES:g}"
    if end is None:
        if minutes_before_end:
            raise ValueError(f"{flag} needs the time limit of a SLURM job, but {JOB_END} does not say it")
        return NO_LIMIT
    length = max(end - (time.time() if start is None else start), 0.0)
    if minutes_before_end is not None and minutes_before_end * 60 >= length:
        raise ValueError(f"{flag} is not shorter than the job itself, which has {length / 60:.0f} minutes")
    return TimeLimit(end, length, None if minutes_before_end is None else minutes_before_end * 60)


def _seconds(name: str) -> float | None:
    """A variable of the environment as seconds; None where it is not set or is no number."""
    try:
        return float(os.environ.get(name, ""))
    except ValueError:
        return None
