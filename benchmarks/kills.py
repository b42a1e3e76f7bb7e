"""Kills a run of two ranks with SIGKILL at random moments, starts it again each time, and holds its end against a
run that was left alone: weights, optimizer state and metrics bit for bit, every document once an epoch, nothing left.

python benchmarks/kills.py [--kills 100] [--seed 1] [--export]
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import tyro

from engine.reporting.metrics import MEASURED
from engine.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]


def flags(folder: Path, output: Path, steps: int, *extra: str) -> list[str]:
    """A run that saves every third step, beside the training, over small buckets."""
    paths = ["--model", folder / "model", "--data", folder / "data", "--output", output, "--steps", steps]
    shape = (
        "--seq-len 96 --global-batch-size 4 --checkpoint.every 3 --checkpoint.keep 2 --overlap on --bucket-size 4000"
    )
    return [*map(str, paths), *shape.split(), "--precision", "bf16", "--optim.lr", "1e-3", *extra]


def start(arguments: list[str]) -> subprocess.Popen:
    """The run on two ranks, in a session of its own."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(ROOT / "examples" / "pretrain_sft.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*launch, script, *arguments], env=environment, start_new_session=True, **streams)


def run_to_the_end(arguments: list[str]) -> None:
    """The run on two ranks; AssertionError with its last words where it does not end well."""
    process = start(arguments)
    said = process.communicate()[0].decode(errors="replace")
    assert process.returncode == 0, said[-3000:]


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill_at_random(arguments: list[str], drawn: random.Random, longest: float) -> str:
    """Starts the run and kills one rank or everything after a random time; returns "done" where it ended before."""
    process = start(arguments)
    seen: dict[int, psutil.Process] = {}
    end = time.monotonic() + drawn.uniform(0, longest)
    while time.monotonic() < end and process.poll() is None:
        seen |= {child.pid: child for child in descendants(process)}
        time.sleep(0.02)
    if process.poll() is not None:
        said = process.communicate()[0].decode(errors="replace")
        if process.returncode:
            raise RuntimeError(f"the run ended by itself with status {process.returncode}:\n{said[-3000:]}")
        return "done"
    children = descendants(process)
    seen |= {child.pid: child for child in children}
    ranks = [child for child in children if child.ppid() == process.pid]
    victims = [drawn.choice(ranks)] if ranks and drawn.random() < 0.5 else [*children]
    for victim in victims:
        os.kill(victim.pid, signal.SIGKILL)
    if len(victims) != 1:
        process.kill()
    process.communicate(timeout=90)
    left = [one for one in seen.values() if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    _, alive = psutil.wait_procs(left, timeout=10)
    if alive:
        raise RuntimeError(f"processes outlived the run: {[(one.pid, one.cmdline()) for one in alive]}")
    return "one rank" if len(victims) == 1 else "all"


def what_it_trained(run: RunFolder) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock or memory decides."""
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def differences(one: RunFolder, other: RunFolder, step: int) -> list[str]:
    """What differs between two runs that should be equal."""
    import torch

    from engine.checkpointing.directory import STATE
    from engine.checkpointing.store_reader import StoreReader

    found = [] if what_it_trained(one) == what_it_trained(other) else ["metrics.jsonl"]
    stores = [StoreReader(run.checkpoint(step) / STATE) for run in (one, other)]
    if stores[0].keys() != stores[1].keys():
        found.append("the keys of the checkpoints")
    for key in stores[0].keys():  # noqa: SIM118  (no dict)
        tensors = [store.read(key).flatten().view(torch.uint8) for store in stores if key in store]
        found += [key] if len(tensors) < 2 or not torch.equal(*tensors) else []
    leftovers = [path for path in one.path.rglob("*") if ".tmp" in path.name]
    return found + [f"left over: {path}" for path in leftovers]


def trial(folder: Path, *, kills: int, steps: int, seed: int, longest: float, extra: tuple[str, ...] = ()) -> list[str]:
    """A run left alone and one that is killed `kills` times, then left to end; returns what differs."""
    whole, cut = RunFolder(folder / "whole"), RunFolder(folder / "cut")
    run_to_the_end(flags(folder, whole.path, steps, *extra))
    drawn, done, counts = random.Random(seed), 0, dict[str, int]()
    while done < kills:
        how = kill_at_random(flags(folder, cut.path, steps, *extra), drawn, longest)
        counts[how] = counts.get(how, 0) + 1
        done += how != "done"
        if how == "done" and counts["done"] > 3:
            break
        if cut.metrics.exists() and done % 10 == 0:
            print(f"{done} kills, {counts}, metrics of {len(cut.metrics.read_text().splitlines())} steps", flush=True)
    run_to_the_end(flags(folder, cut.path, steps, *extra))
    print(f"killed {done} times: {counts}", flush=True)
    return differences(cut, whole, steps)


def main(kills: int = 100, steps: int = 1500, seed: int = 1, longest: float = 16.0, export: bool = False) -> int:
    """Makes a model and data, runs the trial and prints what differs; the status is 1 where anything does."""
    from tests.support.tiny import make_inputs

    with tempfile.TemporaryDirectory() as place:
        folder = make_inputs(Path(place), "qwen2_tied", 30)
        extra = ("--checkpoint.export-hf",) if export else ()
        found = trial(folder, kills=kills, steps=steps, seed=seed, longest=longest, extra=extra)
    print("\n".join(found) if found else "nothing differs, and nothing is left")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
