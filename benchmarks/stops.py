"""Signals a run of two ranks in every stage, as a scheduler does, and holds what follows against the promise: an end
within a few seconds that RUN explains, and a resume whose end is that of a run that was left alone, bit for bit.

python -m benchmarks.stops [--stages save export] [--rounds 3]
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tyro

from benchmarks.kills import descendants, differences, flags, run_to_the_end, start
from engine.run_folder import BEING_WRITTEN, RunFolder
from engine.run_status import read_status

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STEPS = 12


def being_written(folder: Path) -> bool:
    return any(folder.glob(f"step_*{BEING_WRITTEN}"))


def lines(run: RunFolder) -> int:
    return len(run.metrics.read_text(encoding="utf-8").splitlines()) if run.metrics.exists() else 0


# stage -> when it has come, and the flags under which it lasts
STAGES: dict[str, tuple[Callable[[RunFolder], bool], tuple[str, ...]]] = {
    "start-up": (lambda run: True, ()),
    "training": (lambda run: lines(run) > 2, ("--global-batch-size", "30")),
    "held-out loss": (lambda run: lines(run) > 2, ("--valid-every", "1")),
    "save": (lambda run: being_written(run.checkpoints), ("--checkpoint.every", "1", "--checkpoint.async", "off")),
    "save beside": (lambda run: being_written(run.checkpoints), ("--checkpoint.every", "1")),
    "export": (lambda run: being_written(run.export(1).parent), ("--checkpoint.export-hf",)),
}


def signalled(arguments: list[str], run: RunFolder, come: Callable[[RunFolder], bool], number: int, wait: float) -> str:
    """Starts the run, signals all its ranks `wait` seconds after the stage has come; says how it ended."""
    process = start(arguments)
    ranks: list = []
    while process.poll() is None and len(ranks) < 2:
        ranks = [child for child in descendants(process) if "pretrain_sft.py" in " ".join(child.cmdline())]
    while process.poll() is None and not come(run):
        time.sleep(0.0005)
    time.sleep(wait)
    if process.poll() is not None:
        raise RuntimeError(f"the run ended before:\n{process.communicate()[0].decode(errors='replace')[-2000:]}")
    for rank in ranks:
        os.kill(rank.pid, number)
    sent = time.monotonic()
    said = process.communicate(timeout=120)[0].decode(errors="replace")
    status = read_status(run)
    words = f"{status.get('state')} at step {status.get('step')}, status {process.returncode}"
    words += f" after {time.monotonic() - sent:.1f} s: {status.get('reason')}"
    if process.returncode and process.returncode != -number:
        words += f"\n{said[-2000:]}"
    return words


def main(stages: tuple[str, ...] = tuple(STAGES), rounds: int = 1, seed: int = 1) -> int:
    """Prints a line a signal and stage; the status is 1 where an end differs from the one of a run left alone."""
    from tests.support.tiny import make_inputs, write_documents

    drawn, wrong = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as place:
        folder = make_inputs(Path(place), "qwen2_tied", 30)
        write_documents(folder / "held_out", 600)
        for stage in stages:
            come, extra = STAGES[stage]
            if stage == "held-out loss":
                extra = (*extra, "--valid", str(folder / "held_out"))
            whole = RunFolder(folder / f"{stage}-whole")
            run_to_the_end(flags(folder, whole.path, STEPS, *extra))
            for number in SIGNALS * rounds:
                cut = RunFolder(folder / f"{stage}-{drawn.random()}")
                wait = drawn.uniform(0.3, 5.0) if stage == "start-up" else 0.0
                words = signalled(flags(folder, cut.path, STEPS, *extra), cut, come, number, wait)
                print(f"{stage}, {signal.Signals(number).name}: {words}", flush=True)
                run_to_the_end(flags(folder, cut.path, STEPS, *extra))
                if found := differences(cut, whole, STEPS):
                    wrong += 1
                    print("\n".join(found), flush=True)
    print("nothing differs, and nothing is left" if not wrong else f"{wrong} ends differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
