"""Learning rates beside each other: real runs, one of which blows up, and the ways to ask wrongly."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from examples import lr_sweep
from tests.support.tiny import save_model, write_documents

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_model("qwen2_tied", folder / "model", layers=1)
    write_documents(folder / "data", 14)
    write_documents(folder / "valid", 6, seed=1)
    return folder


def sweep(*arguments) -> tuple[int, str]:
    """The exit status and what the table said."""
    printed = io.StringIO()
    return lr_sweep.main(list(map(str, arguments)), Console(file=printed, width=120)), printed.getvalue()


def test_rates_are_trained_and_compared(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    paths = ["--model", inputs / "model", "--data", inputs / "data", "--valid", inputs / "valid"]
    shape = "--seq-len 96 --global-batch-size 4 --steps 6 --precision fp32 --optim.clip-grad 0"
    own = ["--lrs", "1e-3,1e-6,1e30", "--output", tmp_path]
    status, printed = sweep(*own, "--", *paths, *shape.split())
    assert status == 0
    results = {one["lr"]: one for one in json.loads((tmp_path / "sweep.json").read_text())}
    assert results[1e30]["state"] == "failed" and results[1e30]["steps"] < 6
    assert results[1e-3]["state"] == "done" and results[1e-3]["steps"] == results[1e-6]["steps"] == 6
    assert results[1e-3]["valid_loss"] < results[1e-6]["valid_loss"]
    lines = [json.loads(line) for line in (tmp_path / "lr_0.001" / "metrics.jsonl").read_text().splitlines()]
    assert results[1e-3]["loss"] == lines[-1]["loss"] and results[1e-3]["valid_loss"] == lines[-1]["valid_loss"]
    assert [line.split("│")[1].strip() for line in printed.splitlines() if "best" in line] == ["0.001"]
    assert sum("failed" in line for line in printed.splitlines()) == 1
    # What is there can be compared without training, and nothing is trained twice.
    monkeypatch.setattr(lr_sweep, "train", None)
    assert sweep(*own)[1] == sweep(*own, "--", *paths, *shape.split())[1] == printed
    # A mistake in another call is none of the rate's.
    with pytest.raises(SystemExit):
        sweep(*own, "--", *paths, *shape.split(), "--no-such-flag", "1")
    # A run that has stopped early, or has not begun, is not compared.
    (tmp_path / "lr_1e-06" / "unfinished").touch()
    status, printed = sweep("--lrs", "1e-3,1e-6,5", "--output", tmp_path)
    assert status == 1 and "no rate is the best yet: 1e-06, 5 still to be trained to the end" in printed


@pytest.mark.slow
def test_an_interrupt_reaches_the_run_and_ends_the_sweep(inputs, tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "lr_sweep.py"), "--lrs", "1e-3,1e-6", "--output", str(tmp_path)]
    command += ["--", "--model", str(inputs / "model"), "--data", str(inputs / "data"), "--seq-len", "96"]
    command += ["--global-batch-size", "4", "--steps", "100000", "--precision", "fp32"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = tmp_path / "lr_0.001" / "metrics.jsonl"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A test run in the background may have been started to ignore it.
    listening = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, env=environment, **pipes, **listening) as process:
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 1):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and errors.splitlines()[-1] == "interrupted: the same command continues"
    steps = len(log.read_text().splitlines())
    assert (tmp_path / "lr_0.001" / "checkpoints" / "latest").read_text().strip() == f"step_{steps:06d}"
    assert (tmp_path / "lr_0.001" / "unfinished").exists() and not (tmp_path / "lr_1e-06").exists()
    command[command.index("100000")] = str(steps + 2)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "sweep.json").read_text())
    assert [(one["steps"], one["state"]) for one in results] == [(steps + 2, "done")] * 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--lrs", "1e-5,x"), "--lrs 1e-5,x: give rates above 0"),
        (("--lrs", "1e-5,-1"), "--lrs 1e-5,-1: give rates above 0"),
        (("--lrs", "1e-5,0.00001"), "a rate is named twice"),
        (
            ("--lrs", "1e-5", "--", "--model", "nowhere", "--data", "x"),
            "the run of --optim.lr 1e-05 ended with status 2; see above",
        ),
    ],
)
def test_sweeps_that_are_refused(arguments, sentence, tmp_path, capfd):
    own = [*arguments[:2], "--output", str(tmp_path / "sweep"), *arguments[2:]]
    assert sweep(*own)[0] == 2
    assert sentence in capfd.readouterr().err.splitlines()[-1]
