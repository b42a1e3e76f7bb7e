"""A rank that hangs is ended with its stacks written, whatever it hangs in, and so are those that wait for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.guards import watchdog
from engine.guards.watchdog import HELD_OUT, SAVE, START_UP, STEP, Watchdog
from engine.run_folder import RunFolder
from tests.support.tiny import save_model, write_documents

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_how_long_a_phase_may_take(tmp_path, monkeypatch):
    clock = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    monkeypatch.setattr(watchdog, "SUSPENDED", 100.0)  # nobody looks between two phases
    dog = Watchdog(RunFolder(tmp_path), 0, patience=10, minutes=1)

    def after(seconds: float, phase: str, step: int) -> tuple[str, float]:
        nonlocal clock
        clock += seconds
        dog.enter(phase, step)
        return dog._now.name, dog._now.limit

    assert (dog._now.name, dog._now.limit) == (START_UP, 360)
    assert after(5, STEP, 1) == (STEP, 360)  # the first, which warms up
    assert after(30, STEP, 2) == (STEP, 300)
    assert after(2, HELD_OUT, 2) == (HELD_OUT, 360)
    assert after(90, SAVE, 2) == (SAVE, 360)  # 90 s were held-out loss
    assert after(40, SAVE, 2) == (SAVE, 400)
    assert after(40, STEP, 3) == (STEP, 300)
    for step in range(4, 60):
        after(2, STEP, step)
    assert dog._now.limit == 60  # the 30 s are long past
    assert not list(tmp_path.iterdir())


# How a program hangs, its exit status, and what is found where.
PROGRAM = """
import ctypes, sys, time
from engine import run_status
from engine.guards import watchdog
from engine.run_folder import RunFolder
watchdog.POLL, watchdog.GRACE, watchdog.BACKSTOP, run_status.PATIENCE = 0.05, 0.1, {backstop}, 0.1

def stuck_here():
    {hang}

with watchdog.Watchdog(RunFolder({folder!r}), 3, patience=2, minutes=0.005) as dog:
    for step in (1, 2):
        dog.enter(watchdog.STEP, step)
        time.sleep(0.1)
    dog.enter(watchdog.STEP, 3)
    time.sleep(0.2)
    stuck_here()
"""


def hang(folder: Path, how: str) -> subprocess.CompletedProcess:
    program = PROGRAM.format(hang=how, folder=str(folder), backstop=1.0)
    return subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)


def test_a_rank_that_hangs_is_ended(tmp_path):
    done = hang(tmp_path, "time.sleep(100)")
    assert done.returncode == watchdog.RESTART == 75
    written = (tmp_path / "stacks" / "rank_3.txt").read_text()
    assert "step of step 3 has taken" in written and "stuck_here" in written
    line, where = done.stderr.splitlines()
    assert line.startswith("error: rank 3 on ") and "the longest before took 0.1 s" in line
    assert f"its stacks are in {tmp_path / 'stacks' / 'rank_3.txt'}" in line and "status 75" in line
    # So it is written down, for those who come later.
    assert where.endswith(str(tmp_path / "errors")) and line[7:] in (tmp_path / "errors" / "rank_3.txt").read_text()
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["reason"], status["rank"]) == ("failed", line[7:], 3)


def test_a_suspension_does_not_count(tmp_path):
    """Neither against the phase that it interrupts nor, as one that took long, for those that follow."""
    waiting = "print('stuck', flush=True); time.sleep(0.1); dog.enter(watchdog.STEP, 4); print(dog._now.limit)"
    program = PROGRAM.format(hang=waiting, folder=str(tmp_path), backstop=100.0)
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "stuck\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        process.send_signal(signal.SIGCONT)
        limit = process.stdout.read()
    assert process.returncode == 0 and float(limit) < 2 * 1.5


def test_a_rank_that_hangs_with_pythons_lock_is_ended(tmp_path):
    done = hang(tmp_path, "ctypes.PyDLL(None).sleep(100)")
    assert done.returncode == 1 and not (tmp_path / "stacks").exists()
    assert "Timeout (" in done.stderr and "stuck_here" in done.stderr


def test_where_stacks_cannot_be_written_they_are_printed(tmp_path):
    (tmp_path / "stacks").write_text("in the way")
    done = hang(tmp_path, "time.sleep(100)")
    assert done.returncode == 75 and "stuck_here" in done.stderr


def test_a_heartbeat_says_where_a_rank_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "POLL", 0.01)
    run = RunFolder(tmp_path)
    with Watchdog(run, 0, patience=10, minutes=10) as dog:
        time.sleep(0.1)
        assert not run.heartbeats.exists()  # RUN is not ready before the first step
        dog.enter(STEP, 12)
        while not (run.heartbeats / "rank_0").exists():
            time.sleep(0.01)
        time.sleep(0.05)
        assert (run.heartbeats / "rank_0").read_text().split()[-3:] == [str(os.getpid()), "step", "12"]
    assert not run.heartbeats.exists()


def test_patience_0_watches_nothing(tmp_path):
    with Watchdog(RunFolder(tmp_path), 0, patience=0, minutes=0) as dog:
        dog.enter(STEP, 1)
        time.sleep(0.05)
    assert not list(tmp_path.iterdir())


HANGING = """
import sys, time
from engine.guards import watchdog
from engine.trainer import Trainer
from examples.pretrain_sft import main

step, watchdog.GRACE = Trainer.train_step, 6.0

def sleeping(trainer):
    if trainer.step == 3 and trainer.mesh.rank == 1:
        time.sleep(1000)
    return step(trainer)

Trainer.train_step = sleeping
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_every_rank_says_where_it_waits(tmp_path):
    """One sleeps, the other waits for it in a collective, which is named."""
    save_model("qwen2_untied", tmp_path / "model", layers=2)
    write_documents(tmp_path / "data", 10)
    (tmp_path / "hanging.py").write_text(HANGING)
    flags = f"--model {tmp_path / 'model'} --data {tmp_path / 'data'} --output {tmp_path / 'run'} --steps 6"
    flags += " --precision fp32 --seq-len 96 --global-batch-size 4 --guard.minutes 0.1 --guard.patience 2"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "hanging.py")]
    done = subprocess.run([*command, *flags.split()], env=ENVIRONMENT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 1 and "exitcode  : 75" in done.stderr
    stacks = [(tmp_path / "run" / "stacks" / f"rank_{rank}.txt").read_text() for rank in (0, 1)]
    assert "in sleeping" in stacks[1] and "time.sleep" not in stacks[0]
    assert "run_microbatches" in stacks[0] and "run_microbatches" not in stacks[1]
    assert all(
        "step of step 4 has taken" in stack and "gloo:" in stack.rpartition("collectives")[2] for stack in stacks
    )
