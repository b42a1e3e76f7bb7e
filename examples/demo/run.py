"""`make demo`: conversations in, parallel training, an averaged and evaluated Hugging Face model out.

Every stage is a command of ours, run as a user would run it and printed before it runs.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from engine.run_folder import RunFolder
from examples.demo.builtin import DEMO, make_input, read_accuracy, run_script

RUN = DEMO.output
AVERAGED = 4  # checkpoints


def evaluate(model: Path, problems: Path, output: Path) -> float:
    """Greedy answers to the held-out problems; returns the share that is right."""
    flags = ("--max-new-tokens", 48, "--batch-size", 128, "--num-workers", 2)
    run_script("examples/evaluate.py", "--model", model, "--data", problems, "--output", output, *flags)
    return read_accuracy(output)


def main() -> None:
    """Runs the stages in order; any failing stage ends the demo with its status."""
    started = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run = RunFolder(RUN)
    for path in (run.checkpoints, run.tensorboard, run.metrics, RUN / "averaged", RUN / "evaluation"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    model, data, heldout = make_input()
    before = evaluate(model, heldout, RUN / "evaluation" / "before")
    train = ("torchrun", "--nproc-per-node", 2, "examples/pretrain_sft.py", "--tp", 2, "--output", RUN)
    run_script(*train)
    every, last = DEMO.checkpoint.every, DEMO.steps
    assert last is not None
    steps = ",".join(str(last - every * back) for back in reversed(range(AVERAGED)))
    averaged = RUN / "averaged"
    tool = "checkpoint_tools/average_steps.py"
    run_script(tool, "--run", RUN, "--steps", steps, "--output", averaged, "--format", "hf")
    after = evaluate(averaged, heldout, RUN / "evaluation" / "after")
    print(f"\ndata: {data}, trained with tensor parallelism over two processes, steps {steps} averaged")
    print(f"model: {averaged}, report: {run.report}, {time.monotonic() - started:.0f} s in all")
    print(f"accuracy before: {before:.3f}")
    print(f"accuracy after: {after:.3f}")


if __name__ == "__main__":
    main()
