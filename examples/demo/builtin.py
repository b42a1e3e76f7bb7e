"""The built-in job: what `pretrain_sft.py` runs when it is given neither model nor data."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from engine.cli import is_given, parse_run
from engine.config import CheckpointConfig, OptimConfig, RunConfig
from examples.demo.problems import TRAIN

INPUT = Path("runs/demo/input")
# About 52 tokens a conversation; 300 steps of 128 take a fresh model to nearly every held-out answer.
DEMO = RunConfig(
    output=Path("runs/demo"),
    seq_len=1024,
    micro_batch_size=7,
    global_batch_size=128,
    batch_unit="conversations",
    steps=300,
    precision="fp32",
    optim=OptimConfig(
        lr=3e-3,
        min_lr=1.5e-4,
        schedule="wsd",
        warmup_steps=30,
        decay_steps=120,
        beta1=0.9,
        beta2=0.98,
        weight_decay=0.01,
        clip_grad=1.0,
    ),
    checkpoint=CheckpointConfig(every=10, keep=5),
)


def parse_over_demo(arguments: list[str]) -> RunConfig:
    """`[recipe.yaml ...] [--flags]`, over the demo's settings where they name neither model nor data.

    A demo of another length has the same course of rates: warmup and decay keep their shares of it.
    """
    config = parse_run(arguments)
    if config.model is not None or config.data:
        return config
    assert DEMO.steps is not None
    steps = config.steps or DEMO.steps
    if config.epochs is not None:
        of_epochs = round(config.epochs * TRAIN / config.global_batch_size)
        steps = of_epochs if config.steps is None else min(of_epochs, config.steps)
    scale = min(1.0, steps / DEMO.steps)
    warmup, decay = (round(scale * count) for count in (DEMO.optim.warmup_steps, DEMO.optim.decay_steps))
    optim = replace(DEMO.optim, warmup_steps=warmup, decay_steps=max(1, decay))
    if is_given("optim.schedule", arguments) and config.optim.schedule != optim.schedule:
        optim = replace(optim, min_lr=0.0, decay_steps=0)  # which another schedule may not know
    return parse_run(arguments, replace(DEMO, optim=optim))


def run_script(*command: object) -> None:
    """Runs one of our scripts as a user would; its failure ends this process with its status."""
    root = Path(__file__).resolve().parents[2]
    shown = " ".join(str(part) for part in command)
    print(f"$ {shown}", flush=True)
    executable = [sys.executable]
    if command[0] == "torchrun":
        executable, command = [sys.executable, "-m", "torch.distributed.run"], command[1:]
    script = [root / str(part) if str(part).endswith(".py") else part for part in command]
    status = subprocess.run([*executable, *map(str, script)]).returncode
    if status:
        sys.exit(status)


def make_input(folder: Path = INPUT) -> tuple[Path, Path, Path]:
    """Makes model, prepared data and held-out problems where they are not there; returns their paths."""
    model, data, heldout = folder / "model", folder / "data", folder / "problems" / "heldout.jsonl"
    if data.is_dir():
        return model, data, heldout
    from examples.demo.model import build_demo_model
    from examples.demo.problems import write_problems

    shutil.rmtree(folder, ignore_errors=True)
    train, heldout = write_problems(folder / "problems")
    build_demo_model(model)
    run_script("examples/prepare_data.py", "--model", model, "--sources", train, "--output", data)
    return model, data, heldout


def wait_for_input(folder: Path = INPUT, seconds: float = 600) -> tuple[Path, Path]:
    """Waits until another process has made the input. TimeoutError where it does not."""
    deadline = time.monotonic() + seconds
    while not (folder / "data").is_dir():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{folder} was not made within {seconds:.0f} s")
        time.sleep(0.2)
    return folder / "model", folder / "data"


def read_accuracy(folder: Path) -> float:
    """The score that evaluate.py left in a folder, a fraction of 1."""
    return float(json.loads((folder / "results.json").read_text(encoding="utf-8"))["score"])
