"""A SLURM cluster of two nodes for a session of tests, jobs on it, and what they leave."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from engine.run_folder import RunFolder
from engine.run_status import read_status

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "slurm" / "pretrain_sft.sbatch"
TRAIN_JOB = ROOT / "examples" / "slurm" / "train_job.sh"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
STEPS = 120
PATIENCE = 240.0  # seconds for anything to happen on two cores that others use, too


class Cluster:
    """Daemons that `cluster.sh` has started, and the commands of SLURM that talk to them."""

    def __init__(self, state: Path, port: int):
        self.state, self.port = state, port
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.environment |= {
            "PORT": str(port),
            "SLURM_CONF": str(state / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "LATHE_PYTHON": sys.executable,
            "LATHE_RANKS": "1",
        }

    def daemons(self, *command: str) -> subprocess.CompletedProcess:
        """Calls cluster.sh: start, stop, node."""
        script, (action, *rest) = str(Path(__file__).with_name("cluster.sh")), command
        words = ["bash", script, action, str(self.state), *rest]
        with (self.state.parent / "cluster.log").open("a") as log:  # a pipe would stay open as long as the daemons live
            return subprocess.run(words, env=self.environment, stdout=log, stderr=log, timeout=120)

    def call(self, *command: object, **variables: str) -> str:
        """The output of a command of SLURM, called from a directory that is not the repository."""
        words, environment = list(map(str, command)), self.environment | variables
        done = subprocess.run(words, env=environment, cwd=self.state, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *arguments: object, flags: Sequence[str] = (), script: Path = SCRIPT, **variables: str) -> str:
        """Queues a job of two nodes, unless flags say otherwise; returns its number."""
        ours = ["--nodes=2", "--time=20", f"--output={self.state}/job-%j.out"]
        return self.call("sbatch", "--parsable", *ours, *flags, script, *arguments, **variables).strip()

    def preempt(self) -> None:
        """Queues a job of both nodes that goes before those of `low` and `grace`, and ends at once."""
        self.call("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "true")

    def clear(self) -> None:
        """Ends all jobs."""
        self.call("scancel", "--quiet", "--full", "--signal=KILL", "--user=root")
        self.call("scancel", "--quiet", "--user=root")
        self.wait(lambda: not self.call("squeue", "-h"), "an empty queue")

    def log(self, job: str) -> str:
        path = self.state / f"job-{job}.out"
        return path.read_text() if path.exists() else ""

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.call("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, condition: Callable[[], object], what: str) -> None:
        until = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > until:
                logs = "".join(path.read_text()[-2000:] for path in sorted(self.state.glob("job-*.out"))[-2:])
                raise AssertionError(f"{what} has not come: {self.call('squeue')}\n{logs}")
            time.sleep(0.2)

    def end_of(self, job: str) -> tuple[str, int]:
        """Waits until a job has left the queue for good; returns its state and exit status."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        self.wait(lambda: self.show(job)["JobState"] in over, f"the end of job {job}")
        shown = self.show(job)
        return shown["JobState"], int(shown["ExitCode"].split(":")[0])

    def reach(self, run: RunFolder, step: int, checkpoint: int = 0) -> None:
        """Waits until a run has made so many steps, and has a checkpoint of at least that step."""

        def reached() -> bool:
            steps = run.metrics.read_text().count("\n") if run.metrics.exists() else 0
            return steps >= step and max(run.checkpoint_steps(), default=0) >= checkpoint

        self.wait(reached, f"step {step} of {run.path}")

    def processes(self, job: str, node: str, variable: str = "SLURM_JOB_ID") -> list[int]:
        """What runs of a job on a node, the oldest first, by its environment; ranks have the variable RANK there."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # it has just ended
                environment = process.environ()
                ours = environment.get("SLURM_JOB_ID") == job and environment.get("SLURMD_NODENAME") == node
                if ours and variable in environment:
                    found.append(process.pid)
        return found


def start_cluster(folder: Path) -> Cluster:
    """A cluster that runs; skips the test, with the reason, where there can be none."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        pytest.skip(f"no SLURM here: {', '.join(missing)} missing (apt-get install slurm-wlm munge)")
    if os.geteuid():
        pytest.skip("SLURM's daemons are started by root alone")
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    cluster = Cluster(folder / "cluster", 18000 + 100 * int(worker) + os.getpid() % 30 * 3)
    cluster.state.mkdir()
    if cluster.daemons("start").returncode:
        cluster.daemons("stop")
        raise RuntimeError(f"the cluster did not start: {(folder / 'cluster.log').read_text()[-300:]}")
    return cluster


def flags(inputs: Path, run: RunFolder, *more: str) -> list[str]:
    """A run of two ranks that takes some seconds, and leaves its weights as a Hugging Face model."""
    given = ["--model", inputs / "model", "--data", inputs / "data", "--output", run.path, "--precision", "fp32"]
    given += ["--tp", 2, "--seq-len", 96, "--global-batch-size", 4, "--optim.lr", "1e-2", "--steps", STEPS]
    given += ["--checkpoint.every", 20, "--checkpoint.keep", 1, "--checkpoint.export-hf"]
    return [*map(str, given), *more]


def weights(run: RunFolder) -> dict[str, bytes]:
    """The files of weights that the last step has left; the run must be done."""
    status = read_status(run)
    assert (status["state"], status["step"]) == ("done", STEPS) and not run.why_unfinished(), status
    found = {path.name: path.read_bytes() for path in run.export(STEPS).glob("*.safetensors")}
    assert found
    return found


def kill_node(cluster: Cluster, job: str) -> None:
    """Kills the daemon of the second node and all that it runs of a job; it comes back once SLURM has missed it."""
    step = cluster.processes(job, "node2")
    stepds = [parent.pid for one in step if (parent := psutil.Process(one).parent()).name() == "slurmstepd"]
    kill([int((cluster.state / "slurmd-node2.pid").read_text()), *stepds, *step])
    cluster.wait(lambda: cluster.show(job)["JobState"] != "RUNNING", "the end of a job without its node")
    assert cluster.daemons("node", "2").returncode == 0


def kill(processes: Sequence[int]) -> None:
    assert processes
    for process in processes:
        os.kill(process, signal.SIGKILL)
