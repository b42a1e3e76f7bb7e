"""What a run on a SLURM cluster loses to each kind of end, measured on a small one, and scaled to a large one.

python -m benchmarks.job_ends [--only "a killed rank" ...]      (needs slurm-wlm and munge, and to be root)

A run of two nodes is disturbed after a step that is no checkpoint's. Lost is the time from the last step before the
disturbance to the first one that had not been made before; steps that are made twice lie in it. The large table is
reckoned: SLURM's own seconds as they were measured, all others from the flags.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median

import psutil
import tyro

from benchmarks.full_disk import fill, small_disk
from engine.run_folder import RunFolder, read_object
from engine.run_status import DONE, read_status
from engine.time_limit import TimeLimit
from tests.slurm.cluster import Cluster, flags, kill, kill_node, start_cluster

STEPS, EVERY, DISTURBED = 700, 200, 300  # steps; from one checkpoint to the next; the disturbance comes after this one


class Watch:
    """Notes when a run made each step for the first time, from metrics that a start takes back to a checkpoint."""

    def __init__(self, run: RunFolder):
        self.run, self.first = run, {}  # step -> seconds since the epoch
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.02):
            now, lines = time.time(), 0
            if self.run.metrics.exists():
                lines = self.run.metrics.read_bytes().count(b"\n")
            for step in range(max(self.first, default=0) + 1, lines + 1):
                self.first[step] = now

    def gap(self) -> tuple[int, float, float]:
        """The step before the longest pause, when it was made, and when the next one was."""
        step = max(range(2, len(self.first)), key=lambda step: self.first[step + 1] - self.first[step])
        return step, self.first[step], self.first[step + 1]


@dataclass(frozen=True)
class Loss:
    """What one end has cost, in seconds but for the steps."""

    steps: int  # made twice
    seconds: float  # from the last step to the first new one
    away: float  # of them until the job script began again: saving, ending, SLURM
    starting: float  # of them from there to the first step, old or new
    step: float  # the usual time of a step


def lose(run: RunFolder, watch: Watch) -> Loss:
    """What a run that is done has lost to its disturbance."""
    if read_status(run)["state"] != DONE:
        raise RuntimeError(f"the run did not end well: {read_status(run)}")
    step, last, new = watch.gap()
    usual = median(watch.first[n + 1] - watch.first[n] for n in range(step - 200, step - 1))
    starts = [read_object(path) for path in run.logs.glob("*/start.json")]
    times = {datetime.fromisoformat(one["time"]).timestamp(): one["latest"] for one in starts}
    begun = min(time for time in times if time > last - 1)
    steps = step - int((times[begun] or "step_0").rpartition("_")[2])
    return Loss(steps, new - last - usual, begun - last, new - begun - (steps + 1) * usual, usual)


def leave(cluster: Cluster, job: str, run: RunFolder) -> None:
    """A job that is left to go on by itself."""


def usr1(cluster: Cluster, job: str, run: RunFolder) -> None:
    cluster.call("scancel", "--signal=USR1", job)


def cancel(cluster: Cluster, job: str, run: RunFolder) -> None:
    cluster.call("scancel", job)


def preempt(cluster: Cluster, job: str, run: RunFolder) -> None:
    cluster.preempt()


def preempt_frozen(cluster: Cluster, job: str, run: RunFolder) -> None:
    """Ranks that stand still save nothing, as if a save took longer than the notice."""
    ranks = [psutil.Process(one) for node in ("node1", "node2") for one in cluster.processes(job, node, "RANK")]
    cluster.preempt()
    while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in ranks):
        for one in ranks:
            with suppress(psutil.NoSuchProcess):  # SLURM lets what stands still go on before it signals it
                one.send_signal(signal.SIGSTOP)
        time.sleep(0.01)


def requeue(cluster: Cluster, job: str, run: RunFolder) -> None:
    cluster.call("scontrol", "requeue", job)


def kill_rank(cluster: Cluster, job: str, run: RunFolder) -> None:
    kill(cluster.processes(job, "node2", "RANK")[:1])


def lose_node(cluster: Cluster, job: str, run: RunFolder) -> None:
    kill_node(cluster, job)


def fill_disk(cluster: Cluster, job: str, run: RunFolder) -> None:
    """No room for the next checkpoint; the job ends, and somebody makes room and queues it again."""
    filler = fill(run.path, 100_000)
    cluster.end_of(job)
    filler.unlink()


@dataclass(frozen=True)
class Kind:
    """One way in which a job ends before its run is done."""

    disturb: Callable[[Cluster, str, RunFolder], None]
    partition: str = "normal"
    again: bool = False  # whether another job goes on, because this one does not
    time: str = "20"
    saves: bool = True  # whether the run saves before it ends
    fills: bool = False  # whether RUN lies on a small disk
    hurries: bool = False  # whether KillWait is all the time there is to save


KINDS = {
    "time limit": Kind(leave, again=True, time="1"),
    "--signal=USR1@600, scancel --signal": Kind(usr1, again=True),
    "scancel JOB": Kind(cancel, again=True, hurries=True),
    "scontrol requeue": Kind(requeue, hurries=True),
    "preempted at once": Kind(preempt, "low", hurries=True),
    "preempted with grace": Kind(preempt, "grace"),
    "preempted at once, no time to save": Kind(preempt_frozen, "low", saves=False),
    "preempted with grace, no time to save": Kind(preempt_frozen, "grace", saves=False),
    "a killed rank": Kind(kill_rank, saves=False),
    "a dead node": Kind(lose_node, saves=False),
    "a full disk": Kind(fill_disk, again=True, saves=False, fills=True),
}


def measure(cluster: Cluster, kind: Kind, inputs: Path, run: RunFolder) -> Loss:
    """Disturbs one run, lets it come to its end, and says what it has lost."""
    given = flags(inputs, run, "--steps", str(STEPS), "--checkpoint.every", str(EVERY), "--checkpoint.keep", "0")
    with Watch(run) as watch:
        job = cluster.submit(*given, flags=[f"--partition={kind.partition}", f"--time={kind.time}"])
        if kind.again:
            behind = f"--dependency=afterany:{job}"
            last = cluster.submit(*given, flags=[f"--partition={kind.partition}", behind])
        else:
            last = job
        cluster.reach(run, DISTURBED, checkpoint=EVERY)
        kind.disturb(cluster, job, run)
        state, status = cluster.end_of(last)
        time.sleep(0.1)
    if (state, status) != ("COMPLETED", 0):
        raise RuntimeError(f"job {last}: {state}, {status}\n{cluster.log(last)[-2000:]}")
    return lose(run, watch)


def scaled(
    kind: Kind, loss: Loss, *, save: float, step: float, start: float, interval: float, kill_wait: float
) -> tuple[float, float]:
    """Steps made twice and seconds lost by a large run, on average over when it happens.

    What SLURM itself took is left as it was measured: a notice that passed in vain and a node's time-out among it.
    """
    saves = kind.saves and not (kind.hurries and save > kill_wait)
    twice = 0.0 if saves else interval / 2
    ending = save if saves else kill_wait if kind.saves else 0.0
    return twice / step, ending + loss.away + start + twice


def main(
    only: tuple[str, ...] = (),
    saves: tuple[float, ...] = (10.0, 140.0, 1440.0),
    step: float = 10.0,
    start: float = 120.0,
    interval: float = 3600.0,
    hours: float = 4.0,
    kill_wait: float = 30.0,
) -> int:
    """Prints what was measured, and what a large run would lose.

    Args:
        only: these kinds of end alone.
        saves: seconds that a save of the large run takes, one column each.
        step: seconds of its step.
        start: seconds from its job script to the first step, but for reading the checkpoint, taken as long as a save.
        interval: seconds from one checkpoint to the next.
        hours: the time limit of its jobs.
        kill_wait: seconds that its cluster leaves a job that is cancelled, slurm.conf's KillWait.
    """
    from tests.support.tiny import make_inputs

    measured: dict[str, Loss] = {}
    with tempfile.TemporaryDirectory(prefix="job-ends-") as name:
        folder = Path(name)
        inputs = make_inputs(folder, "qwen2_tied", 14)
        cluster = start_cluster(folder)
        try:
            for number, (what, kind) in enumerate((k, v) for k, v in KINDS.items() if not only or k in only):
                place = folder / f"run{number}"
                with small_disk(place, 200_000_000) if kind.fills else nullcontext():
                    loss = measured[what] = measure(cluster, kind, inputs, RunFolder(place / "run"))
                print(
                    f"{what:40}{loss.steps:5} steps twice, {loss.seconds:6.1f} s lost: {loss.away:6.1f} until the job "
                    f"script began again, {loss.starting:5.1f} to start, a step takes {loss.step:.3f}",
                    flush=True,
                )
        finally:
            cluster.daemons("stop")
    print(
        f"\nreckoned: steps of {step:g} s, a checkpoint every {interval / 60:g} minutes, start {start:g} s and a save's"
    )
    print(f"{'':40}" + "".join(f"{f'save {save:g} s':>24}" for save in saves))
    for what, loss in measured.items():
        large = {"step": step, "interval": interval, "kill_wait": kill_wait}
        cells = [scaled(KINDS[what], loss, save=save, start=start + save, **large) for save in saves]
        print(f"{what:40}" + "".join(f"{f'{steps:,.0f} steps, {lost:,.0f} s':>24}" for steps, lost in cells))
    limit = TimeLimit(end=hours * 3600, length=hours * 3600)
    notices = [limit.end - limit.stop_at(save, step) for save in saves]
    print(f"{'stops before a limit, s':40}" + "".join(f"{notice:24,.0f}" for notice in notices))
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
