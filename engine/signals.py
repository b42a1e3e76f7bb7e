"""What ends a run before its last step: a signal to any rank, or the time limit of its job."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

from engine.time_limit import NO_LIMIT, TimeLimit

# SLURM's --signal and preemption send the last two as people ask for them.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
LIMIT_NEAR = "the job's time limit is near"  # the reason of a stop that no signal asked for
_TIME_LIMIT = signal.NSIG  # no signal has this number

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

    def __init__(self, limit: TimeLimit = NO_LIMIT, save: float | None = None):
        """save: seconds that a save takes, as an earlier job has seen it."""
        self._limit, self._save, self._stop_at = limit, save, limit.stop_at(save)
        self.signal = _early  # the last one, 0 for none

    def learn(self, save: float | None, step: float) -> None:
        """Takes the seconds that a step of this run takes, and a save where it has made one."""
        self._save = self._save if save is None else save
        self._stop_at = self._limit.stop_at(self._save, step)

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
        return self.signal or (_TIME_LIMIT if time.time() >= self._stop_at else 0)


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


def heard_by_any(stop: StopRequest) -> str | None:
    """Which signal has come to any rank, the same on each, as `reason` says it; every rank calls it.

    The time limit does not count: a job that has so little time left makes one step all the same.
    """
    return reason(*largest(stop.signal))
