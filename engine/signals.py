"""What ends a run before its last step: a signal to any rank, or the time limit of its job."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

# SLURM's --signal and preemption send the last two as people ask for them.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
# Seconds since the epoch, which newer releases of SLURM set for their jobs.
JOB_START, JOB_END = "SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME"
# How long before its end a job stops by default: so many minutes, or this share of a shorter job.
MINUTES, SHARE = 10.0, 0.1
LIMIT_NEAR = "the job's time limit is near"  # the reason of a stop that no signal asked for
_TIME_LIMIT = signal.NSIG  # no signal has this number


def deadline(minutes_before_end: float | None) -> float:
    """When to save and stop, in seconds since the epoch; infinity for never.

    ValueError where minutes are given and the job has no time limit that is known.
    """
    if minutes_before_end == 0:
        return math.inf
    start, end = _seconds(JOB_START), _seconds(JOB_END)
    flag = f"--checkpoint.minutes-before-end {minutes_before_end or MINUTES:g}"
    if end is None:
        if minutes_before_end:
            raise ValueError(f"{flag} needs the time limit of a SLURM job, but {JOB_END} does not say it")
        return math.inf
    length = end - (time.time() if start is None else start)
    if minutes_before_end is None:
        return end - min(MINUTES * 60, SHARE * max(length, 0.0))
    if minutes_before_end * 60 >= length:
        raise ValueError(f"{flag} is not shorter than the job itself, which has {length / 60:.0f} minutes")
    return end - minutes_before_end * 60


def _seconds(name: str) -> float | None:
    """A variable of the environment as seconds; None where it is not set or is no number."""
    try:
        return float(os.environ.get(name, ""))
    except ValueError:
        return None


_saving = False
_interrupted_again = False
_early = 0  # the last signal that came before a StopRequest was made


def hear_early() -> None:
    """Notes signals from now on, as `StopRequest.listening` does; a run that starts up stops before its first step.

    For the life of the process. Without it a signal during start-up kills, and RUN does not say why.
    """

    def note(number: int, frame: FrameType | None) -> None:
        global _early
        if number == signal.SIGINT and _early:
            raise KeyboardInterrupt
        _early = number

    for number in _heard():
        signal.signal(number, note)


def hear_no_more() -> None:
    """Ignores signals from now on: Python takes its handlers away as it ends, and one more would be an error."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def is_ended() -> bool:
    """Whether SIGTERM has come before a StopRequest was made: torchrun sends it once another rank has ended."""
    return _early == signal.SIGTERM


def _heard() -> list[signal.Signals]:
    """What is ignored stays so: shells start what runs in the background without SIGINT."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Puts a second SIGINT off to the end of this block, and keeps SIGNALS from processes started in it.

    A scheduler signals every process of a job, and so also the one that writes a checkpoint.
    """
    global _saving, _interrupted_again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # of this thread, and so of what it starts
    _saving = True
    try:
        yield
    finally:
        _saving = False
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if _interrupted_again:
        _interrupted_again = False
        raise KeyboardInterrupt


class StopRequest:
    """What asks this rank to stop, and whether all ranks do."""

    def __init__(self, deadline: float = math.inf):
        self._deadline = deadline
        self.signal = _early  # the last one, 0 for none

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Notes SIGNALS within this block; a second SIGINT interrupts, but not while a save is written.

        A second SIGTERM does not: a scheduler sends one to every process, and torchrun another to those it started.
        """

        def note(number: int, frame: FrameType | None) -> None:
            global _interrupted_again
            if number == signal.SIGINT and self.signal:
                if not _saving:
                    raise KeyboardInterrupt
                _interrupted_again = True
            self.signal = number

        before = {number: signal.signal(number, note) or signal.SIG_DFL for number in _heard()}
        self.signal = self.signal or _early  # which may have come since
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def number(self) -> int:
        """What asks this rank to stop, for `largest` and then `reason`; 0 for nothing."""
        return self.signal or (_TIME_LIMIT if time.time() >= self._deadline else 0)


def reason(number: int) -> str | None:
    """What a number of `StopRequest` means; None where nothing asks to stop."""
    if number == _TIME_LIMIT:
        return LIMIT_NEAR
    return f"{signal.Signals(number).name} was received" if number else None


def largest(*numbers: int) -> list[int]:
    """The largest of all ranks for each of these numbers. Every rank calls it, once after a step."""
    import torch  # takes seconds, and signals are heard before
    from torch import distributed

    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    most = torch.tensor(numbers, dtype=torch.int32, device=device)
    distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
    return most.tolist()
