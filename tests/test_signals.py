"""A run that has to stop before its end saves first, and continues as if it had not stopped."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.index import write_index
from engine.checkpoint import find_latest
from engine.signals import StopRequest, deadline
from engine.train import Trainer
from tests.test_resume import metrics, run
from tests.tiny import VOCABULARY, conversations, save_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_model("qwen2_tied", folder / "model", layers=2)
    write_index(folder / "data", conversations(14).documents, vocab_size=VOCABULARY)
    return folder


def arguments(inputs: Path, output: Path, *extra: str) -> list[str]:
    fixed = ["--model", inputs / "model", "--data", inputs / "data", "--output", output, "--precision", "fp32"]
    return [*map(str, fixed), "--seq-len", "96", "--global-batch-size", "4", "--optim.lr", "1e-2", *extra]


def run_with_a_signal(arguments: list[str], at_step: int, number: int, environment: dict[str, str]) -> None:
    """Trains; the second rank receives a signal within a step."""
    step = Trainer.train_step

    def signalled(trainer: Trainer):
        if trainer.step + 1 == at_step and trainer.mesh.rank == 1:
            os.kill(os.getpid(), number)
        return step(trainer)

    Trainer.train_step = signalled
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        run(arguments, environment)
    finally:
        Trainer.train_step = step
        for name in environment:
            del os.environ[name]
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize("layout", ["", "--tp 2", "--pp 2"])
def test_a_signal_to_any_rank_saves_and_stops_all(pool, inputs, tmp_path, layout):
    extra = ("--steps", "6", *layout.split())
    pool.run(run, 2, arguments(inputs, tmp_path / "whole", *extra))
    stopped = arguments(inputs, tmp_path / "cut", *extra)
    pool.run(run_with_a_signal, 2, stopped, 3, signal.SIGTERM, {})
    assert find_latest(tmp_path / "cut").step == 3
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")[:3]
    pool.run(run_with_a_signal, 2, stopped, 5, signal.SIGINT, {})
    assert find_latest(tmp_path / "cut").step == 5
    pool.run(run, 2, stopped)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_a_job_that_nears_its_time_limit_saves_and_stops(pool, inputs, tmp_path):
    flags = arguments(inputs, tmp_path / "run", "--steps", "6", "--checkpoint.minutes-before-end", "2")
    environment = {"SLURM_JOB_END_TIME": str(int(time.time()) + 100)}
    pool.run(run_with_a_signal, 2, flags, 100, signal.SIGTERM, environment)
    assert find_latest(tmp_path / "run").step == 1
    environment = {"SLURM_JOB_END_TIME": str(int(time.time()) + 100_000)}
    pool.run(run_with_a_signal, 2, flags, 100, signal.SIGTERM, environment)
    assert find_latest(tmp_path / "run").step == 6


def test_when_a_job_has_to_stop(monkeypatch):
    for name in ("SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)
    assert deadline(None) == deadline(0) == math.inf
    with pytest.raises(ValueError, match="minutes-before-end 5 needs the time limit of a SLURM job"):
        deadline(5)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "100000")
    monkeypatch.setenv("SLURM_JOB_START_TIME", "94000")
    assert deadline(None) == 100_000 - 600
    assert deadline(5) == 100_000 - 300
    assert deadline(0) == math.inf
    monkeypatch.setenv("SLURM_JOB_START_TIME", "99400")  # ten minutes
    assert deadline(None) == 100_000 - 60


def test_a_second_signal_does_what_signals_do():
    with pytest.raises(KeyboardInterrupt), StopRequest().listening():
        signal.raise_signal(signal.SIGINT)  # noted
        signal.raise_signal(signal.SIGINT)


def test_sigterm_to_the_script(inputs, tmp_path):
    """As a scheduler sends it; the exit is clean, and the same command continues."""
    script = [sys.executable, str(ROOT / "examples" / "pretrain_sft.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = tmp_path / "run" / "metrics.jsonl"
    command = [*script, *arguments(inputs, tmp_path / "run", "--steps", "100000")]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 1):
            time.sleep(0.01)
        process.terminate()
        printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    step = find_latest(tmp_path / "run").step
    assert f"saved and stopped after step {step:,} of 100,000: SIGTERM was received" in printed
    assert len(metrics(tmp_path / "run")) == step
