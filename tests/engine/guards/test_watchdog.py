"""A step that never ends is noticed by every rank, written down and ended."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from engine.guards.watchdog import OTHERS, RESTART, SAVE, STEP, Watchdog
from engine.run_folder import RunFolder
from tests.support.tiny import save_model, write_documents

ROOT = Path(__file__).parents[3]
SCRIPT = """
import sys, time
from engine.guards import watchdog
from engine.trainer import Trainer
from examples.pretrain_sft import main

watchdog.GRACE, watchdog.POLL, watchdog.BEAT = 3.0, 0.2, 0.2
step = Trainer.train_step

def sleeps_for_ever(trainer):
    if trainer.step == 4 and trainer.mesh.rank == 1:
        time.sleep(600)
    return step(trainer)

Trainer.train_step = sleeps_for_ever
sys.exit(main(sys.argv[1:]))
"""


def test_a_rank_that_hangs_is_told_by_all(tmp_path):
    save_model("qwen2_tied", tmp_path / "model", layers=2)
    write_documents(tmp_path / "data", 14)
    (tmp_path / "script.py").write_text(SCRIPT)
    run = tmp_path / "run"
    flags = ["--model", tmp_path / "model", "--data", tmp_path / "data", "--output", run, "--steps", "9"]
    flags += ["--seq-len", "96", "--global-batch-size", "4", "--optim.lr", "1e-2", "--guard.minutes", "0.1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*torchrun, tmp_path / "script.py", *flags]
    found = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=150)
    assert found.returncode != 0
    assert f"it ends with status {RESTART} for a restart" in found.stderr and "step of step 5" in found.stderr
    stacks = [(run / "stacks" / f"rank_{rank}.txt").read_text() for rank in range(2)]
    assert "in sleeps_for_ever" in stacks[1] and "in run_microbatches" not in stacks[1]
    assert "in train_step" in stacks[0] and "all_reduce" in stacks[0]
    assert (
        "step 4\n" in (run / "heartbeats" / "rank_0").read_text()
        or "step 5\n" in (run / "heartbeats" / "rank_0").read_text()
    )


def test_limits_follow_the_longest_of_their_kind(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    dog = Watchdog(RunFolder(tmp_path), 0, patience=10, minutes=1)
    for phase, lasts, limit in (
        (STEP, 30.0, OTHERS * 60),  # compiles
        (STEP, 2.0, 300.0),
        (SAVE, 80.0, OTHERS * 60),
        (STEP, 1.0, 300.0),
        (SAVE, 1.0, 800.0),
    ):
        dog.enter(phase, 1)
        assert dog._now.limit == limit
        clock[0] += lasts


def test_a_run_that_ends_leaves_no_thread_and_no_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.guards.watchdog.POLL", 0.02)
    run = RunFolder(tmp_path)
    with Watchdog(run, 0, patience=10, minutes=1) as dog:
        dog.enter(STEP, 7)
        time.sleep(0.3)
        assert (run.heartbeats / "rank_0").read_text().endswith(" step 7\n")
    assert not dog._thread.is_alive() and not run.heartbeats.exists() and not run.stacks.exists()
