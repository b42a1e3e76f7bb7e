"""A thread on every rank that notices when a step never ends, writes down what the rank was doing, and ends it.

One rank that hangs keeps all others waiting in a collective. Their watchdogs have the same limits and run out at the
same time, so each rank's stacks are written before torchrun ends them for the first that exits. The thread itself needs
Python's lock and a file system that answers. Where one of the two is what hangs, a timer of `faulthandler`, which needs
neither, prints the stacks to standard error half an hour later. Time in which the process is suspended does not count.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections import defaultdict, deque
from typing import NamedTuple, Self, TextIO

from engine.run_folder import RunFolder
from engine.run_status import FAILED, tell

RESTART = 75  # the exit status: EX_TEMPFAIL of sysexits.h, try again
START_UP, STEP, HELD_OUT, SAVE = "start-up", "step", "held-out loss", "save"
RECENT = 50  # of each phase, whose longest counts
OTHERS = 6  # times the least limit of a step: what the first step and other phases have
POLL = 1.0  # seconds between two looks
GRACE = 10.0  # seconds between writing stacks and the exit, in which the other ranks write theirs
SUSPENDED = 10.0  # times POLL, from which on a gap between two looks means that the process was suspended
# Seconds after which the timer steps in where the thread did not. It cannot know of a suspension, and fires after one
# that was longer; so do the time limits of collectives, which are as long.
BACKSTOP = 1800.0
BEAT = 30.0  # seconds between two heartbeats in RUN: many ranks share a file system
COLLECTIVES = 5  # the last so many are named


class Phase(NamedTuple):
    """What a rank is doing."""

    name: str
    step: int
    since: float  # by the watchdog's clock
    limit: float  # seconds
    longest: float = 0.0  # of those of its name before, in seconds

    @property
    def deadline(self) -> float:
        return self.since + self.limit


class Watchdog:
    """Watches this rank while its `with` block runs; the loop tells it what comes next.

    patience: times the longest of the recent phases of one kind, 0 for no watchdog; minutes: the least limit of a step.
    """

    def __init__(self, run: RunFolder, rank: int, *, patience: float, minutes: float):
        self._run, self._rank, self._patience, self._seconds = run, rank, patience, minutes * 60
        self._recent: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._lock, self._looked, self._suspended = threading.Lock(), time.monotonic(), 0.0
        self._now = Phase(START_UP, 0, self._clock(), OTHERS * self._seconds)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._heartbeat = run.heartbeats / f"rank_{rank}"

    def enter(self, phase: str, step: int) -> None:
        """Ends the phase before and begins the next, of this step; some microseconds."""
        now = self._clock()
        self._recent[self._now.name].append(now - self._now.since)
        longest = max(self._recent[phase], default=0.0)
        least = self._seconds * (1 if phase == STEP and longest else OTHERS)
        # One assignment, so that the thread never sees half of it.
        self._now = Phase(phase, step, now, max(least, self._patience * longest), longest)

    def _clock(self) -> float:
        """Seconds by the monotonic clock without those in which nobody looked, for the process was suspended."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked > SUSPENDED * POLL:
                self._suspended += now - self._looked
            self._looked = now
            return now - self._suspended

    def __enter__(self) -> Self:
        if self._patience:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._patience:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            with contextlib.suppress(OSError):  # another rank's is still there, or none was written
                self._heartbeat.unlink()
                self._run.heartbeats.rmdir()

    def _watch(self) -> None:
        armed, beaten = None, -BEAT
        while not self._over.wait(POLL):
            now, phase = self._clock(), self._now
            if (phase, self._suspended) != armed:
                left = max(0.0, phase.deadline - now)
                faulthandler.dump_traceback_later(left + BACKSTOP, exit=True, file=sys.__stderr__ or 2)
                armed = phase, self._suspended
            if now > phase.deadline:
                self._give_up(phase, now - phase.since)
            if phase.name != START_UP and now - beaten >= BEAT:
                beaten = now
                with contextlib.suppress(OSError):  # a full disk is told by what must be written
                    self._beat(phase)

    def _beat(self, phase: Phase) -> None:
        """Notes in RUN where this rank stands."""
        self._run.heartbeats.mkdir(parents=True, exist_ok=True)
        clock = time.strftime("%Y-%m-%d %H:%M:%S")
        self._heartbeat.write_text(f"{clock} {socket.gethostname()} {os.getpid()} {phase.name} {phase.step}\n")

    def _give_up(self, phase: Phase, seconds: float) -> None:
        """Says and writes down what this rank is doing, and ends the process."""
        path = self._run.stacks / f"rank_{self._rank}.txt"
        of_step = f" of step {phase.step:,}" if phase.step else ""
        usual = f", the longest before took {phase.longest:,.1f} s" if phase.longest else ""
        where = f"rank {self._rank} on {socket.gethostname()}, process {os.getpid()}"
        what = f"{phase.name}{of_step} has taken {seconds:,.0f} s{usual}"
        # Said before anything is written: what hangs may be the file system.
        words = f"{where}: {what}; its stacks are in {path}, and it ends with status {RESTART} for a restart"
        os.write(2, f"error: {words}\n".encode())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}, {where}: {what}\n", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
                file.flush()
                write_collectives(file)
        except OSError:
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        with contextlib.suppress(OSError):
            tell(self._run, self._rank, words, state=FAILED, printed=True)
        time.sleep(GRACE)
        os._exit(RESTART)


def write_collectives(file: TextIO) -> None:
    """Writes the last collectives of this rank, by torch's flight recorder; with NCCL written, not yet run."""
    c10d = sys.modules.get("torch._C._distributed_c10d")
    # NCCL's has a record of its own; where torch was built without it there is gloo's alone.
    trace = getattr(c10d, "_dump_nccl_trace_json", None) or getattr(c10d, "_dump_fr_trace_json", None)
    if trace is None:
        return
    entries = json.loads(trace(True, False)).get("entries", [])
    print(f"\nThe last of {len(entries)} collectives that are on record:", file=file)
    for entry in entries[-COLLECTIVES:]:
        group = entry.get("process_group") or ["?"]
        print(
            f"  {entry.get('profiling_name')} of {entry.get('input_sizes')} {entry.get('input_dtypes')}, "
            f"group {group[-1] or group[0]}, {entry.get('state')}",
            file=file,
        )
